"""The streams: labels of each setting, completeness, determinism, permutations and rotations."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cl_lab import knobs
from cl_lab.errors import ConfigError, DataError
from cl_lab.records import Stream, TensorData
from scenarios import vision
from scenarios._sources import ImageSet
from scenarios.vision import CORe50, PermutedMNIST, RotatedMNIST, SplitDigits, SplitMNIST

SHARED = Path(os.environ.get("CL_LAB_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
SCENARIOS = [
    c
    for c in vars(vision).values()
    if isinstance(c, type) and issubclass(c, vision._Images) and not c.__name__.startswith("_")
]


def made_up(n_classes: int = 10, domains: bool = False) -> ImageSet:
    """Each pixel tells its sample's number, so that rows can be recognised."""
    rng = torch.Generator().manual_seed(0)
    train, test = 12 * n_classes, 4 * n_classes
    x = torch.randint(0, 256, (train + test, 1, 6, 6), generator=rng, dtype=torch.uint8)
    y = torch.arange(train + test) % n_classes
    sessions = torch.arange(train) // n_classes % 8 + 1 if domains else None
    held_out = torch.full((test,), 10) if domains else None
    return ImageSet("made-up", x[:train], y[:train], x[train:], y[train:], n_classes, sessions, held_out)


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """MNIST and CORe50 are made up."""
    made = made_up()
    monkeypatch.setattr(vision._sources, "load", lambda name, *_: made_up(50, True) if name == "core50" else made)
    return made


def labels(stream: Stream) -> list[list[int]]:
    return [e.train.y.unique().tolist() for e in stream.experiences]


# -- split ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("incremental", "expected", "outputs", "tasks"),
    [
        ("class", [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], 10, [0] * 5),
        ("task", [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], 10, [0, 1, 2, 3, 4]),
        ("domain", [[0, 1]] * 5, 2, [0] * 5),
    ],
)
def test_labels_of_a_split(images: ImageSet, incremental: Any, expected: Any, outputs: int, tasks: list[int]) -> None:
    stream = SplitMNIST(incremental=incremental).stream(0)
    assert labels(stream) == expected
    assert [e.test.y.unique().tolist() for e in stream.experiences] == expected
    assert [list(e.classes) for e in stream.experiences] == expected
    assert stream.n_classes == outputs
    assert stream.task_labels == (incremental == "task")
    assert [e.train.t.unique().tolist() for e in stream.experiences] == [[t] for t in tasks]
    assert stream.input_shape == (1, 6, 6)
    second = images.train_x[(images.train_y == 2) | (images.train_y == 3)]
    assert torch.equal(stream.experiences[1].train.x, second)
    if incremental == "domain":
        truth = images.train_y[(images.train_y == 2) | (images.train_y == 3)]
        assert torch.equal(stream.experiences[1].train.y, truth % 2)  # even and odd


def test_a_split_is_the_whole_set_once(images: ImageSet) -> None:
    for part in ("train", "test"):
        x = getattr(images, f"{part}_x")
        parts = [getattr(e, part).x for e in SplitMNIST(shuffle_classes=True).stream(3).experiences]
        rows = {bytes(v.flatten().tolist()) for v in torch.cat(parts)}
        assert sum(map(len, parts)) == len(x) == len(rows)
        assert rows == {bytes(v.flatten().tolist()) for v in x}


def test_joint_stream(images: ImageSet) -> None:
    stream = SplitMNIST(experiences=1).stream(0)
    assert len(stream) == 1
    assert torch.equal(stream.experiences[0].train.y, images.train_y)


def test_shuffled_labels_are_numbered_by_appearance(images: ImageSet) -> None:
    stream = SplitMNIST(shuffle_classes=True).stream(1)
    assert labels(stream) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    order = [int(w) for e in stream.experiences for w in e.name.split()[1:]]
    assert sorted(order) == list(range(10))
    assert order != list(range(10))
    for output, label in enumerate(order):
        train = stream.experiences[output // 2].train
        assert torch.equal(train.x[train.y == output], images.train_x[images.train_y == label])


def test_classes_that_do_not_divide() -> None:
    with pytest.raises(
        ConfigError, match=r"experiences = 3: the 10 classes of mnist .* choose one of 1, 2, 5, 10"
    ) as e:
        SplitMNIST(experiences=3).stream(0)
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="experiences = 20"):
        SplitMNIST(experiences=20).stream(0)


# -- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scenario",
    [
        SplitMNIST(shuffle_classes=True),
        SplitMNIST(train_limit=7),
        PermutedMNIST(experiences=3),
        RotatedMNIST(experiences=3, random_angles=True),
    ],
)
def test_equal_seeds_give_equal_streams_and_other_seeds_others(scenario: vision._Images) -> None:
    before = torch.get_rng_state()

    def digests(seed: int) -> list[str]:
        return [e.train.digest() for e in scenario.stream(seed).experiences]

    assert digests(1) == digests(1)
    assert digests(1) != digests(2)
    assert scenario.stream(1).fingerprint() == scenario.stream(1).fingerprint()
    assert torch.equal(before, torch.get_rng_state())


def test_order_seed_holds_the_order_while_the_run_s_seed_changes() -> None:
    fixed = PermutedMNIST(experiences=2, order_seed=5)
    assert fixed.stream(1).fingerprint() == fixed.stream(2).fingerprint()
    assert fixed.stream(1).fingerprint() == PermutedMNIST(experiences=2).stream(5).fingerprint()
    drawn = dataclasses.replace(fixed, train_limit=15)
    assert drawn.stream(1).experiences[0].train.digest() != drawn.stream(2).experiences[0].train.digest()


def test_fingerprint_of_the_digits_is_the_same_everywhere() -> None:
    assert SplitDigits().stream(0).fingerprint() == SplitDigits().stream(1).fingerprint()
    assert SplitDigits().stream(0).fingerprint().startswith("3360074f")


# -- limits and flags ----------------------------------------------------------------------------------------------


def test_limits_are_balanced_and_do_not_touch_the_test_set_s_draw(images: ImageSet) -> None:
    scenario = SplitMNIST(train_limit=7, test_limit=3)
    for experience in scenario.stream(0).experiences:
        assert sorted(experience.train.y.bincount()[list(experience.classes)].tolist()) == [3, 4]
        assert len(experience.test) == 3
    assert scenario.stream(0).fingerprint() == scenario.stream(1).fingerprint()
    assert len(SplitMNIST(train_limit=10**6).stream(0).experiences[0].train) == 24


def test_limit_with_a_rare_class() -> None:
    y = torch.tensor([0] * 50 + [1] * 2)
    rows = vision.limit_rows(torch.arange(52), y, 10, torch.Generator().manual_seed(0))
    assert y[rows].bincount().tolist() == [8, 2]
    assert bool((rows.diff() > 0).all())


def test_online_hides_boundaries_unless_told() -> None:
    assert (SplitMNIST().stream(0).online, SplitMNIST().stream(0).boundaries) == (False, True)
    assert (SplitMNIST(online=True).stream(0).online, SplitMNIST(online=True).stream(0).boundaries) == (True, False)
    assert SplitMNIST(online=True, boundaries=True).stream(0).boundaries
    assert not SplitMNIST(boundaries=False).stream(0).boundaries


def test_normalise_and_pad(images: ImageSet) -> None:
    assert SplitMNIST().stream(0).mean is None
    stream = SplitMNIST(normalise=True, pad=2).stream(0)
    assert (stream.mean, stream.std) == (images.mean, images.std)
    assert stream.input_shape == (1, 10, 10)
    x = stream.experiences[0].train.x
    assert x.dtype == torch.uint8
    assert x[:, :, :2].sum() == x[..., -2:].sum() == 0
    assert x[0, 0, 2:-2, 2:-2].equal(images.train_x[0, 0])


# -- permuted ------------------------------------------------------------------------------------------------------


def test_permutations_permute_and_differ(images: ImageSet) -> None:
    stream = PermutedMNIST(experiences=4, pad=1, first_identity=True).stream(0)
    first = stream.experiences[0].train.x
    assert first[0, 0, 1:-1, 1:-1].equal(images.train_x[0, 0])
    for experience in stream.experiences[1:]:
        assert torch.equal(experience.train.x.flatten(1).sort().values, first.flatten(1).sort().values)
    for a, b in itertools.combinations(stream.experiences, 2):
        assert not torch.equal(a.train.x, b.train.x)
    assert labels(stream) == [list(range(10))] * 4
    longer = PermutedMNIST(experiences=6, pad=1, first_identity=True).stream(0)
    assert torch.equal(longer.experiences[3].test.x, stream.experiences[3].test.x)
    assert not torch.equal(PermutedMNIST(experiences=1).stream(0).experiences[0].train.x, images.train_x)


def test_one_order_for_all_images() -> None:
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    x = torch.arange(27, dtype=torch.uint8).view(1, 3, 3, 3).expand(2, -1, -1, -1)
    assert vision.permute(x, order).flatten(1).tolist() == [order.tolist()] * 2


@pytest.mark.parametrize(("incremental", "outputs", "last"), [("domain", 10, 0), ("class", 30, 20), ("task", 30, 20)])
def test_labels_of_permuted(incremental: Any, outputs: int, last: int) -> None:
    stream = PermutedMNIST(experiences=3, incremental=incremental).stream(0)
    assert stream.n_classes == outputs
    assert labels(stream)[2] == list(range(last, last + 10))
    assert stream.task_labels == (incremental == "task")
    assert int(stream.experiences[2].test.t.max()) == (2 if incremental == "task" else 0)


# -- rotated -------------------------------------------------------------------------------------------------------


def test_rotations(images: ImageSet) -> None:
    x = torch.randint(0, 256, (5, 3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(vision.rotate(x, 0.0), x)
    assert torch.equal(vision.rotate(x, 360.0), x)
    for turns in (1, 2, 3):
        difference = vision.rotate(x, 90.0 * turns).int() - torch.rot90(x, turns, (2, 3)).int()
        assert int(difference.abs().max()) <= 1
    there_and_back = vision.rotate(vision.rotate(x, 30.0), -30.0)
    assert there_and_back.dtype == torch.uint8
    assert torch.equal(RotatedMNIST(experiences=2).stream(0).experiences[0].train.x, images.train_x)


def test_oblong_images_turn_about_their_centre() -> None:
    x = torch.zeros(1, 1, 5, 9, dtype=torch.uint8)
    x[0, 0, 2, 6] = 200  # two to the right of the centre
    turned = vision.rotate(x, 90.0)
    assert int(turned[0, 0, 0, 4]) >= 199  # two above it
    assert int(turned.int().sum()) <= 201


def test_many_images_turn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 256, (3, 1, 1500, 1500), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = vision.rotate(x, 12.5)
    assert torch.equal(whole[2:], vision.rotate(x[2:], 12.5))


def test_angles() -> None:
    names = [e.name for e in RotatedMNIST(experiences=4).stream(0).experiences]
    assert names == ["0°", "45°", "90°", "135°"]
    assert [e.name for e in RotatedMNIST(experiences=2, angles=[5.0, -20.0]).stream(0).experiences] == ["5°", "-20°"]
    with pytest.raises(ConfigError, match=r"angles has 1 entries, experiences = 10"):
        RotatedMNIST(angles=[1.0]).stream(0)
    with pytest.raises(ConfigError, match=r"remove one"):
        RotatedMNIST(angles=[1.0], random_angles=True, experiences=1).stream(0)


# -- CORe50 --------------------------------------------------------------------------------------------------------


def test_core50_sessions() -> None:
    stream = CORe50().stream(0)
    assert len(stream) == 8
    assert stream.n_classes == 50
    assert sum(len(e.train) for e in stream.experiences) == 600
    tests = [e.test for e in stream.experiences]
    assert all(t is tests[0] for t in tests)
    assert len(tests[0]) == 200
    assert [e.name for e in CORe50(experiences=4).stream(0).experiences][1] == "sessions 3 4"
    with pytest.raises(ConfigError, match="choose one of 1, 2, 4, 8"):
        CORe50(experiences=3).stream(0)


def test_core50_objects() -> None:
    stream = CORe50(incremental="class").stream(0)
    assert [len(e.classes) for e in stream.experiences] == [10, 5, 5, 5, 5, 5, 5, 5, 5]
    assert len(CORe50(incremental="task", experiences=10).stream(0)) == 10
    with pytest.raises(ConfigError, match="the 50 classes of core50"):
        CORe50(incremental="class", experiences=4).stream(0)


# -- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SCENARIOS, ids=lambda c: c.__name__)
def test_knobs_are_documented_and_defaults_valid(cls: type[vision._Images]) -> None:
    assert all(row["doc"] for row in knobs.describe(cls))
    assert knobs.build(cls, {}, "scenario") == cls()
    with pytest.raises(ConfigError):
        knobs.build(cls, {"experiences": -1}, "scenario")
    with pytest.raises(ConfigError, match="incremental"):
        knobs.build(cls, {"incremental": "both"}, "scenario")


def test_entry_points_name_these_classes() -> None:
    assert len(SCENARIOS) == 11


def test_conformance_knobs_build_and_run() -> None:
    settings = SplitDigits.conformance_knobs()
    assert settings is not None
    stream = knobs.build(SplitDigits, settings, "scenario").stream(0)
    assert all(len(e.train) == 60 and len(e.test) == 30 for e in stream.experiences)
    assert SplitMNIST.conformance_knobs() is None


def test_release_and_remake() -> None:
    experience = PermutedMNIST(experiences=2).stream(0).experiences[1]
    before = experience.train.digest()
    experience.release()
    assert experience.train.digest() == before


def test_fetch_goes_through_the_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vision._sources, "fetch", lambda name, root: root / name)
    assert SplitMNIST.fetch(tmp_path) == tmp_path / "mnist"
    assert (SplitDigits.fetch(tmp_path) / "datasets").is_dir()
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path))
    assert CORe50.fetch() == tmp_path / "data" / "core50"


def test_absent_data_reaches_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path))
    monkeypatch.delenv("CL_LAB_DATA", raising=False)
    with pytest.raises(DataError, match="cl-lab fetch core50"):
        CORe50(data_dir=str(tmp_path)).stream(0)


@pytest.mark.skipif(not (SHARED / "vision" / "mnist").is_dir(), reason=f"no MNIST in {SHARED}")
def test_real_split_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    stream = SplitMNIST(data_dir=str(SHARED)).stream(0)
    assert [len(e.train) for e in stream.experiences] == [12665, 12089, 11263, 12183, 11800]
    assert stream.fingerprint().startswith("659ce564")


# -- choosing settings without the test images ---------------------------------------------------------------------


def _rows_of(data: TensorData) -> set[bytes]:
    return {x.numpy().tobytes() for x in data.x}


def test_a_hold_out_comes_from_the_training_images_and_is_not_trained_on(images: ImageSet) -> None:
    known = {x.numpy().tobytes() for x in images.train_x}
    plain = SplitMNIST().stream(0)
    held = SplitMNIST(holdout=0.25).stream(0)
    for before, now in zip(plain.experiences, held.experiences, strict=True):
        train, test = _rows_of(now.train), _rows_of(now.test)
        assert not train & test
        assert train | test == _rows_of(before.train)
        assert test <= known
        assert now.test.y.unique().tolist() == list(now.classes)
        assert len(now.test) == 2 * round(0.25 * len(before.train) / 2)
    again = SplitMNIST(holdout=0.25).stream(1)
    assert [e.test.digest() for e in again.experiences] == [e.test.digest() for e in held.experiences]


def test_a_hold_out_goes_through_what_its_experience_does_to_the_pixels(images: ImageSet) -> None:
    first, second = PermutedMNIST(experiences=2, first_identity=True, holdout=0.5).stream(0).experiences
    assert torch.equal(first.test.y, second.test.y)
    assert not torch.equal(first.test.x, second.test.x)
    assert torch.equal(first.test.x.flatten(1).sort(1).values, second.test.x.flatten(1).sort(1).values)
    assert len(first.train) + len(first.test) == len(images.train_y)


@pytest.mark.parametrize("order", ["class", "iid"])
def test_only_the_first_classes_of_the_order(images: ImageSet, order: Literal["class", "iid"]) -> None:
    base = SplitMNIST(shuffle_classes=True, base_classes=4, experiences=4).stream(3).experiences[0]
    small = SplitMNIST(shuffle_classes=True, only_classes=4, base_classes=2, experiences=3, order=order).stream(3)
    assert small.n_classes == 4
    joined = set.union(*(_rows_of(e.train) for e in small.experiences))
    assert joined == _rows_of(base.train)


def test_more_classes_than_there_are_is_one_line(images: ImageSet) -> None:
    with pytest.raises(ConfigError, match="only_classes = 11: mnist has 10 classes"):
        SplitMNIST(only_classes=11).stream(0)
