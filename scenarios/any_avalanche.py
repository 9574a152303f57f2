"""Any Avalanche benchmark by name, read once into tensors.

Avalanche builds the benchmark (and downloads its data, where it does so); each experience is then read once, batch by
batch, into contiguous tensors, and from there on no Python runs per sample.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cl_lab import seeding
from cl_lab.errors import ConfigError, DataError, nearest
from cl_lab.files import cache_root
from cl_lab.knobs import knob
from cl_lab.protocols import Scenario
from cl_lab.records import Experience, Stream, TensorData

from . import _avalanche, _cache


@dataclass
class AnyAvalanche(Scenario):
    """Any benchmark of Avalanche (avalanche:SplitOmniglot), or a function of yours that returns one.

    ``benchmark`` is a name in ``avalanche.benchmarks.classic`` or ``package.module:function``; ``options`` are its
    arguments. The run's seed goes to its ``seed`` argument, ``data_dir`` to its ``dataset_root``, where it has them and
    ``options`` do not. Both training and test samples get the benchmark's *evaluation* transforms: they are read once,
    and a random crop would be frozen.

    Where the benchmark has several task labels, they are told: each must be one training experience, and becomes its
    index. Tasks that use the same labels then get outputs of their own. ``task_labels: false`` tells none.
    """

    argument: ClassVar[str] = "benchmark"
    """The knob that what follows the colon in the config name sets."""

    benchmark: str = knob(doc="name of a classic Avalanche benchmark, or package.module:function")
    options: dict[str, Any] = knob({}, "arguments of the benchmark, such as n_experiences")
    data_dir: str | None = knob(None, "folder of the data, as the benchmark's dataset_root")
    task_labels: bool = knob(True, "tell a sample's task, where the benchmark has several; false: no task labels")
    online: bool = knob(False, "one pass: each sample is seen once")
    boundaries: bool | None = knob(None, "tell strategies where an experience ends; null: unless online")
    resize: int | None = knob(None, "scale images that have no tensor transform to this side", ge=1)
    workers: int = knob(0, "processes that read the samples", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """The example :func:`digits`, which needs no download."""
        return {"benchmark": f"{__name__}:{digits.__name__}", "options": {"n_experiences": 5, "per_class": 12}}

    def stream(self, seed: int) -> Stream:
        """The stream for one seed; samples are uint8 or float32, as the benchmark's transform gives them.

        Raises :class:`~cl_lab.errors.ConfigError` for an unknown benchmark or wrong options and
        :class:`~cl_lab.errors.DataError` where the data cannot be had.
        """
        built = self._build(seed)
        # An experience may make its dataset anew at each access; those we keep are the ones we know.
        train, test = ([e.dataset for e in stream] for stream in (built.train_stream, built.test_stream))
        if not train or len(test) not in (1, len(train)):
            raise DataError(
                f"{self.benchmark}: {len(train)} training and {len(test)} test experiences; a stream needs one test "
                "experience, or one for each training experience"
            )
        heads = _Heads(self.benchmark, train, test, self.task_labels)
        trains = [functools.partial(self._read, d, heads, f"train {i}", seed) for i, d in enumerate(train)]
        tests = [
            functools.cache(functools.partial(self._read, d, heads, f"test {i}", seed)) for i, d in enumerate(test)
        ]
        shape = _sample(_as_evaluated(train[0])[0], self.resize).x.shape
        return Stream(
            name=f"avalanche:{self.benchmark}",
            experiences=tuple(
                Experience(i, f"experience {i}", heads.outputs(d), trains[i], tests[i % len(tests)])
                for i, d in enumerate(train)
            ),
            input_shape=tuple(shape),
            n_classes=heads.n_outputs,
            task_labels=heads.told,
            boundaries=not self.online if self.boundaries is None else self.boundaries,
            online=self.online,
        )

    # -- building --------------------------------------------------------------------------------------------------

    def _build(self, seed: int) -> Any:
        make = self._function()
        arguments = dict(self.options)
        accepted = inspect.signature(make).parameters
        if "seed" in accepted:
            arguments.setdefault("seed", seed)
        if self.data_dir is not None:
            if "dataset_root" not in accepted:
                raise ConfigError(f"data_dir = {self.data_dir!r}: {self.benchmark} has no dataset_root; use options")
            arguments.setdefault("dataset_root", str(Path(self.data_dir).expanduser()))
        try:
            inspect.signature(make).bind(**arguments)
        except TypeError as error:
            unknown = [name for name in self.options if name not in accepted]
            reason = f"{unknown[0]}{nearest(unknown[0], accepted)}" if unknown else str(error)
            raise ConfigError(f"options of {self.benchmark}: {reason}") from error
        try:
            with _own_randomness(seed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built = make(**arguments)
        except (OSError, RuntimeError, EOFError) as error:
            raise DataError(
                f"{self.benchmark}: its data cannot be had ({type(error).__name__}: {error}); check the network, or "
                "set data_dir to a folder that holds it"
            ) from error
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"options of {self.benchmark} = {self.options}: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(built, "train_stream") or not hasattr(built, "test_stream"):
            raise ConfigError(
                f"benchmark = {self.benchmark!r}: gave a {type(built).__name__} without train_stream and test_stream; "
                "name a function that returns an Avalanche benchmark"
            )
        return built

    def _function(self) -> Callable[..., Any]:
        _avalanche.import_avalanche()
        name, colon, attribute = self.benchmark.partition(":")
        if not colon:
            known = classic()
            if name not in known:
                raise ConfigError(f"benchmark = {name!r}: Avalanche has none of this name{nearest(name, known)}")
            return known[name]
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"benchmark = {self.benchmark!r}: {error}; write package.module:function") from error
        function = getattr(module, attribute, None)
        if not callable(function):
            known = {n: v for n, v in vars(module).items() if inspect.isfunction(v)}
            raise ConfigError(f"benchmark = {self.benchmark!r}: {name} has no '{attribute}'{nearest(attribute, known)}")
        return function  # type: ignore[no-any-return]

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, dataset: Any, heads: _Heads, part: str, seed: int) -> TensorData:
        """All samples of one experience; more than 1 GiB of them are kept on disk and mapped."""
        evaluated = _as_evaluated(dataset)
        first = _sample(evaluated[0], self.resize)
        if len(evaluated) * first.x.numel() * first.x.element_size() <= _cache.MAPPED_BYTES:
            made = self._fill(evaluated, first, np.zeros)
        else:
            folder = cache_root() / "avalanche" / self._key(evaluated, part, seed)
            kept = _cache.arrays(
                folder,
                ("x", "y", "t"),
                lambda create: _unused(self._fill(evaluated, first, _in_order(create, ("x", "y", "t")))),
            )
            made = kept["x"], kept["y"], kept["t"]
        x, y, t = (torch.from_numpy(a) for a in made)
        return TensorData(x, *heads.mapped(y, t))

    def _fill(
        self, dataset: Any, first: _Sample, create: Callable[[tuple[int, ...], Any], Any]
    ) -> tuple[Any, Any, Any]:
        n = len(dataset)
        x = create((n, *first.x.shape), first.x.numpy().dtype)
        y, t = create((n,), np.int64), create((n,), np.int64)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=256,
            num_workers=self.workers,
            collate_fn=functools.partial(_collate, resize=self.resize),
        )
        done = 0
        for batch in loader:
            end = done + len(batch.y)
            if batch.x.shape[1:] != first.x.shape:
                raise DataError(
                    f"{self.benchmark}: samples of shape {tuple(first.x.shape)} and {tuple(batch.x.shape[1:])}; "
                    "set resize"
                )
            x[done:end], y[done:end], t[done:end] = batch.x.numpy(), batch.y.numpy(), batch.t.numpy()
            done = end
        return x, y, t

    def _key(self, dataset: Any, part: str, seed: int) -> str:
        """Names a cached experience; holds a few samples, so that other data in the same place makes another key."""
        probes = [_sample(dataset[i], self.resize) for i in (0, len(dataset) // 2, len(dataset) - 1)]
        digest = hashlib.sha256()
        for probe in probes:
            digest.update(probe.x.numpy().tobytes() + probe.y.numpy().tobytes())
        targets = hashlib.sha256(np.asarray(list(dataset.targets), np.int64).tobytes()).hexdigest()
        options = json.dumps(self.options, sort_keys=True, default=str)
        return _cache.key_of(
            [
                self.benchmark,
                options,
                str(self.data_dir),
                str(self.resize),
                str(seed),
                part,
                digest.hexdigest(),
                targets,
            ]
        )


def _in_order(create: _cache.Create, names: Sequence[str]) -> Callable[[tuple[int, ...], Any], Any]:
    """A function that creates the arrays ``names`` one after the other."""
    remaining = iter(names)
    return lambda shape, dtype: create(next(remaining), shape, dtype)


def _unused(_: object) -> None:
    """The arrays were filled in place."""


# -- samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sample:
    """One sample, or a batch of them: ``x`` uint8 or float32, ``y`` and ``t`` int64."""

    x: Tensor
    y: Tensor
    t: Tensor


def _as_evaluated(dataset: Any) -> Any:
    return dataset.eval() if hasattr(dataset, "eval") else dataset


def _sample(item: Sequence[Any], resize: int | None) -> _Sample:
    """An Avalanche sample ``(x, y[, t])``; a PIL image or array ``[H, W(, C)]`` becomes uint8 ``[C, H, W]``."""
    x = item[0]
    if not isinstance(x, Tensor):
        if resize is not None and hasattr(x, "resize") and not isinstance(x, np.ndarray):
            x = x.resize((resize, resize))
        array = np.array(x)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1) if array.ndim == 3 else array
        x = torch.from_numpy(np.ascontiguousarray(array))
    if x.dtype != torch.uint8:
        x = x.to(torch.float32)
    return _Sample(x, torch.tensor(int(item[1])), torch.tensor(int(item[2]) if len(item) > 2 else 0))


def _collate(items: Sequence[Sequence[Any]], resize: int | None) -> _Sample:
    samples = [_sample(item, resize) for item in items]
    shapes = {tuple(s.x.shape) for s in samples}
    if len(shapes) > 1:
        raise DataError(f"samples differ in shape: {', '.join(map(str, sorted(shapes)[:3]))}; set resize")
    return _Sample(*(torch.stack([getattr(s, name) for s in samples]) for name in ("x", "y", "t")))


class _Heads:
    """Maps (task, label) to a global output, and a task to the index of the experience that it is.

    ``told`` says whether samples carry more than one task label, and ``tell`` wants them. Labels stay as they are unless
    such tasks share some; then the outputs of a task start at an offset of its own. Raises :class:`DataError` where tasks
    are told that are not one training experience each.
    """

    def __init__(self, benchmark: str, train: Sequence[Any], test: Sequence[Any], tell: bool) -> None:
        datasets = [*train, *test]
        self._pairs = {id(d): _pairs(d) for d in datasets}
        labels: dict[int, set[int]] = {}
        for pairs in self._pairs.values():
            for task, label in pairs:
                labels.setdefault(task, set()).add(label)
        tasks = sorted(labels)
        self.told = tell and len(tasks) > 1
        self._offsets = dict.fromkeys(tasks, 0)
        if self.told and sum(map(len, labels.values())) > len(set().union(*labels.values())):
            start = 0
            for task in tasks:
                self._offsets[task] = start
                start += max(labels[task]) + 1
        self._experiences = self._experience_of(benchmark, train, tasks) if self.told else {}
        self.n_outputs = 1 + max(o for d in datasets for o in self.outputs(d))

    def _experience_of(self, benchmark: str, train: Sequence[Any], tasks: Sequence[int]) -> dict[int, int]:
        held = [{task for task, _ in self._pairs[id(d)]} for d in train]
        holders = {task: [i for i, own in enumerate(held) if task in own] for task in tasks}
        wrong = [
            f"task label {task} is in {f'training experiences {_listed(i)}' if i else 'no training experience'}"
            for task, i in holders.items()
            if len(i) != 1
        ]
        wrong += [
            f"training experience {i} has task labels {_listed(own)}" for i, own in enumerate(held) if len(own) > 1
        ]
        if wrong:
            raise DataError(
                f"{benchmark}: {wrong[0]}, but a task that is told is one training experience; give each a label of its "
                "own, the same at test, or set scenario.task_labels=false"
            )
        return {task: i for task, (i,) in holders.items()}

    def outputs(self, dataset: Any) -> list[int]:
        """The global outputs that occur in ``dataset``."""
        return sorted({label + self._offsets[task] for task, label in self._pairs[id(dataset)]})

    def mapped(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Global outputs and experiences' indices of labels ``y`` and task labels ``t``, int64 ``[N]`` all."""
        if not self.told:
            return y, torch.zeros_like(t)
        tasks, of = t.unique(return_inverse=True)
        offsets, experiences = (
            torch.tensor([by_task[task] for task in tasks.tolist()]) for by_task in (self._offsets, self._experiences)
        )
        return y + offsets[of], experiences[of]


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _pairs(dataset: Any) -> set[tuple[int, int]]:
    labels = [int(v) for v in dataset.targets]
    tasks = getattr(dataset, "targets_task_labels", None)
    return set(zip([0] * len(labels) if tasks is None else [int(t) for t in tasks], labels, strict=True))


# -- benchmarks ----------------------------------------------------------------------------------------------------


def classic() -> Mapping[str, Callable[..., Any]]:
    """Avalanche's classic benchmarks by name. Imports Avalanche."""
    _avalanche.import_avalanche()
    module = importlib.import_module("avalanche.benchmarks.classic")
    return {
        name: value
        for name, value in vars(module).items()
        if name[0].isupper() and callable(value) and getattr(value, "__module__", "").startswith(module.__name__ + ".")
    }


def digits(n_experiences: int = 5, per_class: int = 20) -> Any:
    """An example for ``benchmark: package.module:function``: scikit-learn's digits as an Avalanche benchmark.

    ``per_class`` training samples of each digit (and a quarter as many test samples), split by class; float32
    ``[1, 8, 8]`` in [0, 1].
    """
    from ._sources import digits as load

    _avalanche.import_avalanche()
    benchmarks = importlib.import_module("avalanche.benchmarks")
    utilities = importlib.import_module("avalanche.benchmarks.utils")
    images = load()
    datasets = {}
    for part, x, y, count in (
        ("train", images.train_x, images.train_y, per_class),
        ("test", images.test_x, images.test_y, max(1, per_class // 4)),
    ):
        rows = torch.cat([(y == c).nonzero().flatten()[:count] for c in range(images.n_classes)])
        samples = torch.utils.data.TensorDataset(x[rows] / 255, y[rows])
        samples.targets = y[rows].tolist()  # type: ignore[attr-defined]
        datasets[part] = utilities.as_classification_dataset(samples)
    return benchmarks.class_incremental_benchmark(
        datasets, class_order=list(range(images.n_classes)), num_experiences=n_experiences
    )


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators, from which Avalanche draws, and put them back afterwards."""
    before = seeding.global_state()
    seeding.seed_everything(seeding.derive(seed, "avalanche") % 2**32)
    try:
        yield
    finally:
        seeding.restore_global_state(before)
