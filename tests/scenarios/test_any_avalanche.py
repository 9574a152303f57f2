"""Any Avalanche benchmark, materialised: made-up ones of this module, the classic ones by name."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from cl_lab import knobs
from cl_lab.errors import ConfigError, DataError
from scenarios import _avalanche, _cache
from scenarios.any_avalanche import AnyAvalanche, classic

pytestmark = pytest.mark.slow


class Samples(torch.utils.data.Dataset[Any]):
    """Ten samples per class as PIL images, arrays or tensors, with class labels in ``targets``."""

    def __init__(self, classes: int, form: str, sizes: tuple[int, ...] = (6,)) -> None:
        self.targets = [i % classes for i in range(10 * classes)]
        self.form = form
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        side = self.sizes[index % len(self.sizes)]
        array = np.full((side, side, 3), index, np.uint8)
        if self.form == "image":
            from PIL import Image

            return Image.fromarray(array), self.targets[index]
        if self.form == "float":
            return torch.from_numpy(array).permute(2, 0, 1) / 255, self.targets[index]
        return array, self.targets[index]


def benchmark(
    form: str = "array",
    tasks: bool = False,
    sizes: tuple[int, ...] = (6,),
    seed: int | None = None,
    one_test: bool = False,
    task_labels: list[list[int]] | None = None,
    test_labels: list[list[int]] | None = None,
) -> Any:
    """Six classes in three experiences; with ``tasks``, each is a task with labels 0 and 1.

    ``task_labels`` are given to the samples of such experiences in turn; to test samples, too, unless others are given.
    """
    _avalanche.import_avalanche()
    from avalanche.benchmarks import benchmark_from_datasets, class_incremental_benchmark, task_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset

    sizes = tuple(sizes)
    if task_labels:
        labels = {"train": task_labels, "test": test_labels or task_labels}
        return benchmark_from_datasets(**{part: [labelled(*own) for own in labels[part]] for part in labels})
    if tasks:
        streams = {n: [as_classification_dataset(Samples(2, form, sizes)) for _ in range(3)] for n in ("train", "test")}
        return task_incremental_benchmark(benchmark_from_datasets(**streams), reset_task_labels=True)
    torch.rand(1)  # draws from the global generator, as Avalanche's own benchmarks do
    sets = {n: as_classification_dataset(Samples(6, form, sizes)) for n in ("train", "test")}
    split = class_incremental_benchmark(sets, num_experiences=3, seed=seed)
    if one_test:
        return types.SimpleNamespace(train_stream=split.train_stream, test_stream=split.test_stream[:1])
    return split


def labelled(*tasks: int) -> Any:
    """Twenty samples with labels 0 and 1, as many with each of these task labels."""
    from avalanche.benchmarks.utils import TaskLabels, as_classification_dataset

    labels = TaskLabels([tasks[i * len(tasks) // 20] for i in range(20)])
    made = as_classification_dataset(Samples(2, "array"))
    return made.update_data_attribute(name="targets_task_labels", new_value=labels)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This module under a name that can be imported, and a cache of the test's own."""
    module = types.ModuleType("made_up_benchmarks")
    vars(module).update(benchmark=benchmark, nothing=lambda: 1, absent=absent)
    monkeypatch.setitem(sys.modules, "made_up_benchmarks", module)
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path / "cache"))


def absent(dataset_root: str) -> Any:
    raise FileNotFoundError(f"nothing in {dataset_root}")


def made(**options: Any) -> AnyAvalanche:
    return AnyAvalanche("made_up_benchmarks:benchmark", options)


@pytest.mark.parametrize(("form", "dtype"), [("array", torch.uint8), ("image", torch.uint8), ("float", torch.float32)])
def test_samples_become_tensors(form: str, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    stream = made(form=form).stream(0)
    assert torch.equal(before, torch.get_rng_state())
    assert stream.input_shape == (3, 6, 6)
    assert stream.n_classes == 6
    assert not stream.task_labels
    assert sorted(c for e in stream.experiences for c in e.classes) == list(range(6))
    for experience in stream.experiences:
        assert experience.train.x.dtype == dtype
        assert experience.train.x.is_contiguous()
        assert len(experience.train) == 20
        number = experience.train.x[:, 0, 0, 0].float() * (255 if form == "float" else 1)
        assert torch.equal(number.round().long() % 6, experience.train.y)
        assert experience.train.y.unique().tolist() == list(experience.classes)


def test_the_seed_reaches_the_benchmark() -> None:
    orders = {tuple(e.classes for e in made().stream(seed).experiences) for seed in range(6)}
    assert len(orders) > 1
    assert made().stream(4).fingerprint() == made().stream(4).fingerprint()
    assert made(seed=9).stream(0).fingerprint() == made(seed=9).stream(1).fingerprint()


def test_tasks_with_the_same_labels_get_outputs_of_their_own() -> None:
    stream = made(tasks=True).stream(0)
    assert stream.task_labels
    assert stream.n_classes == 6
    assert [e.classes for e in stream.experiences] == [(0, 1), (2, 3), (4, 5)]
    assert [e.test.y.unique().tolist() for e in stream.experiences] == [[0, 1], [2, 3], [4, 5]]
    assert [e.train.t.unique().tolist() for e in stream.experiences] == [[0], [1], [2]]


@pytest.mark.parametrize("labels", [(1, 2, 3), (2, 0, 1), (-4, 7, 500)])
def test_a_told_task_is_the_index_of_its_experience(labels: tuple[int, ...]) -> None:
    stream = made(task_labels=[[t] for t in labels]).stream(0)
    assert stream.task_labels
    for part in ("train", "test"):
        assert [getattr(e, part).t.unique().tolist() for e in stream.experiences] == [[0], [1], [2]]
        assert [getattr(e, part).y.unique().tolist() for e in stream.experiences] == [
            list(e.classes) for e in stream.experiences
        ]
    assert sorted(c for e in stream.experiences for c in e.classes) == list(range(6))
    record = toys.trainer([{"name": "naive"}], stream, training={"epochs": 1}).run()
    assert len(record.matrix) == 3, "a head for each task"


def test_a_test_set_of_all_tasks_asks_each_head() -> None:
    stream = made(task_labels=[[5], [3]], test_labels=[[3, 5]]).stream(0)
    test = stream.experiences[0].test
    assert test.t.tolist() == [1] * 10 + [0] * 10
    assert all(int(y) in stream.experiences[t].classes for y, t in zip(test.y, test.t, strict=True))


@pytest.mark.parametrize(
    ("train", "test", "complaint"),
    [
        ([[0], [0], [1]], None, "task label 0 is in training experiences 0, 1, but"),
        ([[0, 1], [2]], None, "training experience 0 has task labels 0, 1, but"),
        ([[0], [1]], [[0], [7]], "task label 7 is in no training experience, but"),
    ],
)
def test_tasks_that_are_not_one_experience_each_are_not_told(
    train: list[list[int]], test: list[list[int]] | None, complaint: str
) -> None:
    scenario = made(task_labels=train, test_labels=test)
    with pytest.raises(DataError, match=rf"^made_up_benchmarks:benchmark: {complaint}.*scenario\.task_labels=false$"):
        scenario.stream(0)
    scenario.task_labels = False
    stream = scenario.stream(0)
    assert (stream.task_labels, stream.n_classes) == (False, 2)
    assert all(not data.t.any() for e in stream.experiences for data in (e.train, e.test))


def test_one_task_label_throughout_is_none() -> None:
    stream = made(task_labels=[[3], [3], [3]]).stream(0)
    assert (stream.task_labels, stream.n_classes) == (False, 2)
    assert all(not e.train.t.any() for e in stream.experiences)


def test_one_test_experience_serves_all() -> None:
    experiences = made(one_test=True).stream(0).experiences
    assert all(e.test is experiences[0].test for e in experiences)


def test_flags_and_workers() -> None:
    stream = AnyAvalanche("made_up_benchmarks:benchmark", online=True, workers=1).stream(0)
    assert (stream.online, stream.boundaries) == (True, False)
    assert len(stream.experiences[0].train) == 20


def test_large_experiences_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_memory = made().stream(0).fingerprint()
    monkeypatch.setattr(_cache, "MAPPED_BYTES", 100)
    assert made().stream(0).fingerprint() == in_memory
    kept = sorted((tmp_path / "cache" / "avalanche").iterdir())
    assert len(kept) == 3
    monkeypatch.setattr(AnyAvalanche, "_fill", lambda *_: pytest.fail("read twice"))
    assert made().stream(0).fingerprint() == in_memory


def test_images_of_several_sizes_need_resize() -> None:
    with pytest.raises(DataError, match="set resize"):
        _ = made(form="image", sizes=[6, 8]).stream(0).experiences[0].train
    scenario = AnyAvalanche("made_up_benchmarks:benchmark", {"form": "image", "sizes": [6, 8]}, resize=4)
    assert scenario.stream(0).experiences[0].train.x.shape[1:] == (3, 4, 4)


def test_classic_benchmarks_are_known_by_name() -> None:
    assert {"SplitOmniglot", "CLEAR", "SplitMNIST", "CORe50"} <= set(classic())


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"benchmark": "SplitOmniglott"}, ConfigError, "did you mean 'SplitOmniglot'"),
        ({"benchmark": "SplitMNIST", "options": {"n_experience": 5}}, ConfigError, "did you mean 'n_experiences'"),
        ({"benchmark": "no_such_module:f"}, ConfigError, "no_such_module"),
        ({"benchmark": "made_up_benchmarks:benchmrak"}, ConfigError, "did you mean 'benchmark'"),
        ({"benchmark": "made_up_benchmarks:nothing"}, ConfigError, "gave a int"),
        ({"benchmark": "made_up_benchmarks:benchmark", "data_dir": "x"}, ConfigError, "has no dataset_root"),
        ({"benchmark": "made_up_benchmarks:absent"}, ConfigError, "missing a required argument: 'dataset_root'"),
        ({"benchmark": "made_up_benchmarks:absent", "data_dir": "x"}, DataError, "nothing in x.* set data_dir"),
    ],
)
def test_mistakes(settings: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint) as caught:
        AnyAvalanche(**settings).stream(0)
    assert "\n" not in str(caught.value)


def test_conformance_knobs_run() -> None:
    settings = AnyAvalanche.conformance_knobs()
    assert settings is not None
    stream = knobs.build(AnyAvalanche, settings, "scenario").stream(0)
    assert [e.classes for e in stream.experiences] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert all(len(e.train) == 24 and len(e.test) == 6 for e in stream.experiences)
