"""Random augmentation: the vectorised crop and flip against one picture at a time, and a user's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab.augmentation import PADDING, check, crop_flip, load_function, transformed_batches
from cl_lab.errors import ConfigError
from cl_lab.records import TensorData
from cl_lab.seeding import generator


def one_at_a_time(x: Tensor, seed: int, experience: int, step: int) -> Tensor:
    """The same numbers, used picture by picture."""
    rng = generator(seed, "augment", experience, step)
    b, _, height, width = x.shape
    offsets = torch.randint(0, 2 * PADDING + 1, (2, b, 1), generator=rng)[:, :, 0]
    flips = (torch.rand(b, 1, generator=rng) < 0.5)[:, 0]
    made = []
    for picture, top, left, flip in zip(x, offsets[0].tolist(), offsets[1].tolist(), flips.tolist(), strict=True):
        padded = torch.zeros(picture.shape[0], height + 2 * PADDING, width + 2 * PADDING, dtype=x.dtype)
        padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = picture
        crop = padded[:, top : top + height, left : left + width]
        made.append(crop.flip(-1) if flip else crop)
    return torch.stack(made)


@pytest.mark.parametrize("shape", [(40, 3, 8, 8), (7, 1, 5, 9), (1, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_crop_flip_equals_one_at_a_time(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(1, 255, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    made = crop_flip(x, 3, 1, 17)
    assert made.dtype == dtype
    assert made.shape == x.shape
    assert torch.equal(made, one_at_a_time(x, 3, 1, 17))
    assert torch.equal(x, before), "the pictures themselves stay"


def test_crop_flip_is_a_function_of_seed_experience_and_step() -> None:
    x = torch.rand(50, 1, 8, 8)
    state = torch.get_rng_state()
    made = [crop_flip(x, *key) for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert torch.equal(made[0], made[1])
    assert not any(torch.equal(made[0], other) for other in made[2:])
    assert torch.equal(state, torch.get_rng_state())


def test_crop_flip_reaches_every_place() -> None:
    # A single bright pixel shows where a picture went.
    x = torch.zeros(3000, 1, 9, 9)
    x[:, :, 4, 3] = 1
    places = {tuple(p) for p in crop_flip(x, 0, 0, 0).nonzero()[:, 2:].tolist()}
    rows, columns = {r for r, _ in places}, {c for _, c in places}
    assert rows == set(range(9)), "4 up to 4 down"
    assert columns == set(range(9)), "from either side"


FUNCTION = """
import torch

def noisy(x):
    return (x + torch.randint(0, 20, x.shape)).to(x.dtype)

def floating(x):
    return x / 255

def smaller(x):
    return x[..., 1:]

def negative(x):
    return 255 - x

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(FUNCTION)
    return path


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flip-crop", r"training\.augmentation = 'flip-crop': must be none, crop-flip, or file\.py:function"),
        ("absent.py:f", r"training\.augmentation = 'absent\.py:f': must be .* an existing file"),
        ("{}", r"must be none, crop-flip, or file\.py:function"),
        ("{}:number", r"has no function 'number'"),
        ("{}:absent", r"has no function 'absent'"),
    ],
)
def test_functions_that_do_not_serve(name: str, why: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load_function(name.format(file))
    assert "\n" not in str(caught.value)


def batches(file: str, steps: range, workers: int = 0, seed: int = 5) -> list[Any]:
    x = torch.arange(40, dtype=torch.uint8).view(10, 4)
    data = TensorData(x, torch.arange(10), torch.zeros(10, dtype=torch.int64))

    def plan(step: int) -> tuple[Tensor, int]:
        return torch.tensor([step % 10, (step + 3) % 10]), step // 5

    return list(transformed_batches(data, file, plan, steps, seed=seed, workers=workers))


def test_a_function_of_the_users(file: Path) -> None:
    made = batches(f"{file}:negative", range(7))
    assert len(made) == 7
    assert made[6].y.tolist() == [6, 9]
    assert made[6].x.tolist() == [[255 - v for v in range(24, 28)], [255 - v for v in range(36, 40)]]
    assert (made[6].epoch, made[6].current) == (1, 2)


def test_a_resumed_run_sees_the_same_pictures(file: Path) -> None:
    state = torch.get_rng_state()
    whole = batches(f"{file}:noisy", range(8))
    rest = batches(f"{file}:noisy", range(3, 8))
    assert all(torch.equal(a.x, b.x) for a, b in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0].x, batches(f"{file}:noisy", range(1), seed=6)[0].x)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"
    assert batches(f"{file}:noisy", range(3, 3)) == []


@pytest.mark.parametrize(("name", "got"), [("floating", r"torch\.float32 \[4\]"), ("smaller", r"torch\.uint8 \[3\]")])
def test_a_function_keeps_shape_and_dtype(name: str, got: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=rf"gave {got} for a sample of torch\.uint8 \[4\]; keep both"):
        batches(f"{file}:{name}", range(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # forking a process that has threads warns on newer Pythons
def test_workers_give_the_same(file: Path) -> None:
    alone, helped = (batches(f"{file}:noisy", range(4), workers) for workers in (0, 2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("augmentation", ["crop-flip", "{}:negative", "{}:noisy"])
def test_training_with_it_is_deterministic(augmentation: str, file: Path) -> None:
    on = toys.stream(form="images", experiences=2)
    model = {"name": "convnet", "channels": [4], "hidden": []}
    runs = []
    for how in (augmentation.format(file), augmentation.format(file), "none"):
        trainer = toys.trainer(
            [{"name": "replay", "memory": 20}], on, model=model, training={"augmentation": how, "epochs": 1, "lr": 0.01}
        )
        trainer.run()
        runs.append(toys.weights_of(trainer))
    assert not toys.differing(runs[0], runs[1])
    assert toys.differing(runs[0], runs[2])


def test_what_it_means_nothing_for_is_refused() -> None:
    flat, pictures = toys.stream(), toys.stream(form="images")
    for name in ("none", "noise.py:f"):
        check(name, flat)
    check("crop-flip", pictures)
    for on in (flat, toys.stream(form="questions"), toys.stream(form="texts")):
        with pytest.raises(
            ConfigError, match=r"^training\.augmentation = 'crop-flip': crops pictures .* set augmentation="
        ):
            check("crop-flip", on)
    for name in ("crop-flip", "noise.py:f"):
        with pytest.raises(ConfigError, match=rf"^training\.augmentation = '{name}': model\.frozen = 'pool' keeps"):
            check(name, pictures, latents="pool")
    check("none", pictures, latents="pool")


def test_codes_are_not_augmented(tmp_path: Path) -> None:
    """What a strategy made of the samples never meets the user's function, which is for samples."""
    place = tmp_path / "loud.py"
    place.write_text("def f(x):\n    raise AssertionError('seen')\n", encoding="utf-8")
    on = toys.stream(experiences=1)
    trainer = toys.trainer([{"name": "naive"}], on, training={"augmentation": f"{place}:f"})
    data, experience = on.experiences[0].train, on.experiences[0]
    t = trainer.config.training
    plan = trainer._plan(len(data), experience, 5, 12, False)
    codes = TensorData(data.x, data.y, data.t, raw=False)
    batches = [b for _, b in trainer._batches(codes, experience, range(5), plan, t)]
    assert sum(b.current for b in batches) == len(data)
    assert not any(b.raw for b in batches)
    with pytest.raises(AssertionError, match="seen"):
        next(trainer._batches(data, experience, range(5), plan, t))
