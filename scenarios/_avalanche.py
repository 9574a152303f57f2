"""The one bridge to Avalanche: its generators divide a set into experiences, we read back which rows went where.

Avalanche's own loop fetches sample by sample; here only its division is used, as int64 row numbers per experience, and
the images are then indexed in one go. Labels and row numbers are :class:`DataAttribute` objects that work on whole
tensors, so no step walks over samples in Python.

``import avalanche`` costs two seconds beyond torch and torchvision (plotting, loggers, metrics, scipy) and changes the
process: it replaces ``Dataset.__add__`` and the unpickler of torch.distributed, warns, and writes into the home folder.
The generators need none of that, so :func:`generators` runs only the modules they live in and takes them out of
``sys.modules`` again. :func:`import_avalanche` imports all of it, with the effects undone, for those who need more.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_lab.compat import import_torchvision
from cl_lab.errors import PluginError

from ._cache import data_root

Rows = dict[str, Tensor]
"""Row numbers of one experience, int64, by stream name (``"train"``, ``"test"``)."""


# -- importing -----------------------------------------------------------------------------------------------------


def _require() -> list[str]:
    spec = importlib.util.find_spec("avalanche")
    if spec is None or spec.submodule_search_locations is None:
        raise PluginError("avalanche-lib is not installed; run `pip install avalanche-lib`")
    return list(spec.submodule_search_locations)


@contextmanager
def _undone() -> Iterator[None]:
    """Undo what importing Avalanche does to torch, and keep its (and its dependencies') import warnings to itself."""
    from torch.utils.data import Dataset

    c10d = importlib.import_module("torch.distributed.distributed_c10d") if torch.distributed.is_available() else None
    unpickler = getattr(c10d, "_unpickler", None)
    add = Dataset.__add__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            Dataset.__add__ = add  # type: ignore[method-assign]
            if unpickler is not None:
                c10d._unpickler = unpickler  # type: ignore[union-attr]


@contextmanager
def _writable_home() -> Iterator[bool]:
    """Lend a temporary home where ``~/.avalanche/config.json`` can neither be read nor written; says whether it did."""
    config = Path("~/.avalanche/config.json").expanduser()
    try:
        config.parent.mkdir(parents=True, exist_ok=True)
        if config.exists():
            config.read_bytes()
        else:
            # Avalanche writes the file itself; what matters is that it can.
            with tempfile.TemporaryFile(dir=config.parent):
                pass
        lend = False
    except OSError:
        lend = True
    if not lend:
        yield False
        return
    before = os.environ.get("HOME")
    with tempfile.TemporaryDirectory(prefix="cl-lab-home-") as home:
        os.environ["HOME"] = home
        try:
            yield True
        finally:
            if before is None:
                del os.environ["HOME"]
            else:
                os.environ["HOME"] = before


def import_avalanche() -> types.ModuleType:
    """All of Avalanche, its changes to torch undone and its import warnings silenced; works with a read-only home.

    Raises :class:`~cl_lab.errors.PluginError` where it is not installed or does not import.
    """
    if "avalanche" not in sys.modules:
        _require()
        import_torchvision()
    try:
        with _undone(), _writable_home() as lent:
            module = importlib.import_module("avalanche")
    except (ImportError, AttributeError, RuntimeError) as error:
        raise PluginError(f"avalanche-lib does not import ({error}); reinstall avalanche-lib") from error
    if lent:
        utilities = importlib.import_module("avalanche.benchmarks.datasets.dataset_utils")
        utilities.AVALANCHE_CONFIG["dataset_location"] = str(data_root())
    return module


_PACKAGES = ("avalanche", "avalanche.benchmarks", "avalanche.benchmarks.utils", "avalanche.benchmarks.scenarios")
_UTILITIES = tuple(
    f"avalanche.benchmarks.utils.{m}" for m in ("data_attribute", "flat_data", "data", "classification_dataset")
)
_SCENARIOS = tuple(f"avalanche.benchmarks.scenarios.{m}" for m in ("dataset_scenario", "supervised", "task_aware"))
_WANTED = (
    "ClassificationDataset",
    "DataAttribute",
    "benchmark_from_datasets",
    "class_incremental_benchmark",
    "task_incremental_benchmark",
)


@functools.lru_cache(maxsize=1)
def generators() -> types.SimpleNamespace:
    """Avalanche's dataset class, attribute class and benchmark generators, without the rest of Avalanche.

    Where Avalanche is imported already, or is laid out in another way than this expects, it is the whole of it.
    """
    if "avalanche" not in sys.modules:
        root = _require()[0]
        import_torchvision()  # its transforms use Compose
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _slice(root)
        except (ImportError, AttributeError, LookupError):
            pass
    import_avalanche()
    return _names([importlib.import_module(name) for name in (*_UTILITIES, *_SCENARIOS)])


def _slice(root: str) -> types.SimpleNamespace:
    try:
        for name in _PACKAGES:  # empty packages with a path: their modules import, their __init__ does not run
            package = types.ModuleType(name)
            package.__path__ = [os.path.join(root, *name.split(".")[1:])]
            sys.modules[name] = package
        utilities = sys.modules["avalanche.benchmarks.utils"]
        modules = []
        for name in _UTILITIES:
            module = importlib.import_module(name)
            vars(utilities).update({n: getattr(module, n) for n in module.__all__})
            modules.append(module)
        modules += [importlib.import_module(name) for name in _SCENARIOS]
        return _names(modules)
    finally:
        # A later `import avalanche` must find the real packages.
        for name in [m for m in sys.modules if m == "avalanche" or m.startswith("avalanche.")]:
            del sys.modules[name]


def _names(modules: Sequence[types.ModuleType]) -> types.SimpleNamespace:
    found = {name: getattr(m, name) for m in modules for name in _WANTED if hasattr(m, name)}
    return types.SimpleNamespace(**{name: found[name] for name in _WANTED})


# -- dividing ------------------------------------------------------------------------------------------------------


class _Items:
    """A data set whose samples are row numbers. Unhashable, or Avalanche would look for duplicates row by row."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, 0


@functools.lru_cache(maxsize=1)
def _column() -> Any:
    """The :class:`DataAttribute` subclass that keeps a tensor and works on all of it at once."""

    class Column(generators().DataAttribute):  # type: ignore[misc]
        """One int64 value per row, ``[N]``."""

        def __init__(self, values: Tensor, name: str) -> None:
            super().__init__([], name)
            self.values = values

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, item: Any) -> Any:
            return self.values[item].tolist()

        @property
        def data(self) -> list[int]:
            return list(self.values.tolist())

        @functools.cached_property
        def val_to_idx(self) -> dict[int, list[int]]:
            values, counts = torch.unique(self.values, return_counts=True)
            groups = torch.split(self.values.argsort(stable=True), counts.tolist())
            return {v: rows.tolist() for v, rows in zip(values.tolist(), groups, strict=True)}

        @functools.cached_property
        def uniques(self) -> set[int]:
            return set(torch.unique(self.values).tolist())

        def subset(self, indices: Sequence[int]) -> Column:
            return Column(self.values[torch.as_tensor(indices, dtype=torch.int64)], self.name)

        def concat(self, other: Any) -> Column:
            if len(other) == 0:
                return self
            return Column(torch.cat([self.values, other.values]), self.name)

    return Column


def _dataset(labels: Tensor, rows: Tensor) -> Any:
    column = _column()
    return generators().ClassificationDataset(
        [_Items(len(rows))], data_attributes=[column(labels[rows], "targets"), column(rows, "rows")]
    )


def _read(benchmark: Any) -> list[Rows]:
    streams = {name: list(stream) for name, stream in benchmark.streams.items()}
    lengths = {len(s) for s in streams.values()}
    assert len(lengths) == 1, f"streams of different length: {lengths}"
    return [
        {name: stream[i].dataset.rows.values.sort().values for name, stream in streams.items()}
        for i in range(lengths.pop())
    ]


def by_classes(labels: Mapping[str, Tensor], order: Sequence[int], sizes: Sequence[int]) -> list[Rows]:
    """Divide every set by class: the first ``sizes[0]`` classes of ``order``, then the next ``sizes[1]``, and so on.

    ``labels`` holds one int64 ``[N]`` per stream name, all with the same classes ``range(C)``; ``order`` is a
    permutation of them and ``sizes`` sums to C or less, the last classes then being left out. Rows come back ascending.
    """
    sets = {name: _dataset(y, torch.arange(len(y))) for name, y in labels.items()}
    rest = len(order) - sum(sizes)  # the generator takes all classes or none
    parts = [*sizes, rest] if rest else list(sizes)
    rows = _read(generators().class_incremental_benchmark(sets, class_order=list(order), num_classes_per_exp=parts))
    return rows[: len(sizes)]


def by_rows(labels: Mapping[str, Tensor], rows: Sequence[Rows]) -> list[Rows]:
    """A stream whose experiences are given row by row (the same rows more than once, sessions, …). Ascending."""
    sets = {name: [_dataset(y, part[name]) for part in rows] for name, y in labels.items()}
    return _read(generators().benchmark_from_datasets(**sets))


def task_labels(labels: Mapping[str, Tensor], rows: Sequence[Rows]) -> list[int]:
    """The task label that Avalanche's task-incremental generator gives each experience of :func:`by_rows`."""
    sets = {name: [_dataset(y, part[name]) for part in rows] for name, y in labels.items()}
    benchmark = generators().task_incremental_benchmark(generators().benchmark_from_datasets(**sets))
    return [int(e.task_label) for e in benchmark.streams["train"]]
