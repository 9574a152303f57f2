"""Where the images come from: finding a data set on disk in any usual layout, reading it once, fetching it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_lab.compat import import_torchvision
from cl_lab.errors import DataError, nearest
from cl_lab.files import cache_root
from cl_lab.seeding import generator

from . import _readers as readers
from ._cache import data_root
from ._readers import Entry

SYSTEM_ROOT = Path("/usr/share/datasets")
"""Where Debian's ``dataset-*`` packages put their files."""


@dataclass(frozen=True)
class ImageSet:
    """A labelled set of images, in memory or memory-mapped; shared by all runs of a process, so never written to.

    ``train_x``/``test_x`` are uint8 ``[N, C, H, W]``, ``train_y``/``test_y`` int64 ``[N]`` in ``range(n_classes)``;
    ``train_domain``/``test_domain`` int64 ``[N]`` (a recording session) where the set has such, else ``None``.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    n_classes: int
    train_domain: Tensor | None = None
    test_domain: Tensor | None = None

    @functools.cached_property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training pixels, per channel, of values scaled to [0, 1].

        Counted exactly, from a histogram over the 256 levels, so every machine gets the same figures.
        """
        counts = np.zeros((self.train_x.shape[1], 256), np.int64)
        for block in torch.split(self.train_x, 1024):
            for channel in range(len(counts)):
                counts[channel] += np.bincount(block[:, channel].numpy().ravel(), minlength=256)
        levels = np.arange(256) / 255.0
        mean = (counts @ levels) / counts.sum(1)
        variance = (counts @ levels**2) / counts.sum(1) - mean**2
        return tuple(mean.tolist()), tuple(np.sqrt(variance.clip(1e-12)).tolist())

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training pixels per channel, see :attr:`statistics`."""
        return self.statistics[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the training pixels per channel, see :attr:`statistics`."""
        return self.statistics[1]


@dataclass(frozen=True, slots=True)
class Found:
    """Files of one layout in one folder: what to give its reader."""

    files: tuple[Path, ...]


Finder = Callable[["Source", Path], "Found | str | None"]
"""What a layout sees in a folder: all its files, ``"… is missing"`` where some are, ``None`` where there are none."""

Reader = Callable[["Source", tuple[Path, ...], "int | None"], ImageSet]
"""Reads what the layout's finder has found; the last argument scales images to that side."""


@dataclass(frozen=True)
class Source:
    """One data set: its names on disk, the layouts it may have, where it can be fetched from.

    ``scenario`` is the config name under which ``cl-lab fetch`` knows it; ``expected`` names the files in messages.
    """

    name: str
    scenario: str
    folders: tuple[str, ...]
    layouts: tuple[tuple[Finder, Reader], ...]
    expected: str
    download: Callable[[Path], None]

    @property
    def fix(self) -> str:
        """How a damaged file is replaced, as the end of an error line."""
        return f"replace it (delete it, then `cl-lab fetch {self.scenario}`)"


# -- searching -----------------------------------------------------------------------------------------------------


def roots(data_dir: str | None) -> tuple[Path, ...]:
    """The folders that are searched, in order: ``data_dir``, ``$CL_LAB_DATA``, the user's cache, the system's sets."""
    named = [v for v in (data_dir, os.environ.get("CL_LAB_DATA")) if v]
    folders = [*(Path(v).expanduser() for v in named), data_root(), cache_root(), SYSTEM_ROOT]
    return tuple(dict.fromkeys(folders))


def _folders(source: Source, root: Path) -> Iterator[Path]:
    for name in source.folders:
        for inside in (root / name, root / "vision" / name):
            yield from (inside, inside / "raw")
    # A root that carries another set's name holds that set: MNIST and Fashion-MNIST have the same file names.
    if not any(root.name.lower() == f.lower() for s in SOURCES.values() if s is not source for f in s.folders):
        yield root


def _locate(source: Source, data_dir: str | None) -> tuple[Reader, tuple[Path, ...]]:
    incomplete = ""
    for root in roots(data_dir):
        for folder in _folders(source, root):
            if not folder.is_dir():
                continue
            for find, read in source.layouts:
                found = find(source, folder)
                if isinstance(found, Found):
                    return read, found.files
                incomplete = incomplete or found or ""
    searched = ", ".join(str(r) for r in roots(data_dir))
    raise DataError(
        f"{source.name}: not found in {searched} (nor below, in {', '.join(source.folders)}); "
        f"expected {source.expected}{f' ({incomplete})' if incomplete else ''}; "
        f"run `cl-lab fetch {source.scenario}`, or name the folder with CL_LAB_DATA=... or data_dir"
    )


def load(name: str, data_dir: str | None = None, pixels: int | None = None) -> ImageSet:
    """The data set called ``name``, read once per process as long as its files do not change.

    ``pixels`` scales images to that side (sets stored as image files only). Raises :class:`DataError` where nothing is
    found or a file is damaged.
    """
    source = SOURCES.get(name)
    if source is None:
        raise DataError(f"unknown data set '{name}'{nearest(name, SOURCES)}")
    read, files = _locate(source, data_dir)
    stats = [f.stat() for f in files]
    return _read(source.name, read, files, pixels, tuple((s.st_size, s.st_mtime_ns) for s in stats))


@functools.lru_cache(maxsize=4)
def _read(name: str, read: Reader, files: tuple[Path, ...], pixels: int | None, stats: object) -> ImageSet:
    source = SOURCES[name]
    images = read(source, files, pixels)
    for part, labels in (("training", images.train_y), ("test", images.test_y)):
        present = torch.bincount(labels, minlength=images.n_classes) > 0
        if len(present) > images.n_classes:
            raise DataError(
                f"{name}: {part} label {len(present) - 1} in {files[0].parent}, there are {images.n_classes} classes; "
                f"{source.fix}"
            )
        if not bool(present.all()):
            lacking = (~present).nonzero().flatten().tolist()
            raise DataError(f"{name}: no {part} samples of class {lacking[0]} in {files[0].parent}; {source.fix}")
    return images


def find(name: str) -> Path:
    """The folder that holds ``name``, none of whose files is read. Raises :class:`DataError` where there is none."""
    return _locate(SOURCES[name], None)[1][0].parent


def fetch(name: str, root: Path) -> Path:
    """Download ``name`` below ``root`` (through torchvision), where :func:`load` finds it; returns ``root``.

    Raises :class:`DataError` on one line where the download fails or does not have the official checksum.
    """
    source = SOURCES[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        source.download(root)
    except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError; torchvision raises RuntimeError
        raise DataError(
            f"{name}: download to {root} failed ({type(error).__name__}: {error}); check the network and the folder, "
            f"or put {source.expected} there by hand"
        ) from error
    return root


# -- idx: MNIST and Fashion-MNIST ----------------------------------------------------------------------------------

_IDX = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_OFFICIAL_IDX: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    # Shape and MD5 of the uncompressed file: packagers compress it anew, so that of the .gz says nothing.
    "mnist": {
        "train-images": ((60000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
        "train-labels": ((60000,), "a25bea736e30d166cdddb491f175f624"),
        "t10k-images": ((10000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
        "t10k-labels": ((10000,), "27ae3e4e09519cfbb04c329615203637"),
    },
    "fashion-mnist": {
        "train-images": ((60000, 28, 28), "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        "train-labels": ((60000,), "9018921c3c673c538a1fc5bad174d6f9"),
        "t10k-images": ((10000, 28, 28), "8181f5470baa50b63fa0f6fddb340f0a"),
        "t10k-labels": ((10000,), "15d484375f8d13e6eb1aabb0c3f46965"),
    },
}


def _find_idx(source: Source, folder: Path) -> Found | str | None:
    files = []
    missing = ""
    for stem in _IDX:
        axes = 3 if stem.endswith("images") else 1
        names = [f"{stem}{dot}idx{axes}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        present = [folder / n for n in names if (folder / n).is_file()]
        if present:
            files.append(present[0])
        else:
            missing = missing or f"{folder} lacks {names[0]}[.gz]"
    if not files:
        return None
    return missing or Found(tuple(files))


def _read_idx(source: Source, files: tuple[Path, ...], pixels: int | None) -> ImageSet:
    parts = {}
    for stem, path in zip(_IDX, files, strict=True):
        shape, md5 = _OFFICIAL_IDX[source.name][stem]
        parts[stem] = readers.read_idx(path, len(shape), {shape: md5}, source.fix)
    for part, path in (("train", files[0]), ("t10k", files[2])):
        images, labels = len(parts[f"{part}-images"]), len(parts[f"{part}-labels"])
        if images != labels:
            raise DataError(f"{path}: {images} images, but {labels} labels in its label file; {source.fix}")
    x = {p: torch.from_numpy(parts[f"{p}-images"]).unsqueeze(1) for p in ("train", "t10k")}
    y = {p: torch.from_numpy(parts[f"{p}-labels"]).long() for p in ("train", "t10k")}
    return ImageSet(source.name, x["train"], y["train"], x["t10k"], y["t10k"], 10)


# -- CIFAR's pickles -----------------------------------------------------------------------------------------------

_Batches = Mapping[str, tuple[int, str]]
_CIFAR: dict[str, tuple[str, str, int, tuple[_Batches, _Batches]]] = {
    # Folder, archive, classes; then size and MD5 of each official training and test batch.
    "cifar10": (
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        10,
        (
            {
                "data_batch_1": (31035704, "c99cafc152244af753f735de768cd75f"),
                "data_batch_2": (31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
                "data_batch_3": (31035999, "54ebc095f3ab1f0389bbae665268c751"),
                "data_batch_4": (31035696, "634d18415352ddfa80567beed471001a"),
                "data_batch_5": (31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
            },
            {"test_batch": (31035526, "40351d587109b95175f43aff81a1287e")},
        ),
    ),
    "cifar100": (
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        100,
        (
            {"train": (155249918, "16019d7e3df5f24257cddd939b257f8d")},
            {"test": (31049713, "f0ef6b0ae62326f3e7ffdfab6717acfc")},
        ),
    ),
}


def _find_cifar(source: Source, folder: Path) -> Found | str | None:
    inner, archive, _, parts = _CIFAR[source.name]
    wanted = [name for part in parts for name in part]
    incomplete = None
    for place in (folder / inner, folder):
        missing = [n for n in wanted if not (place / n).is_file()]
        if not missing:
            return Found((place, *(place / n for n in wanted)))
        if place.name == inner and place.is_dir():
            incomplete = f"{place} lacks {missing[0]}"
    if (folder / archive).is_file():
        return Found((folder / archive,))
    return incomplete


def _read_cifar(source: Source, files: tuple[Path, ...], pixels: int | None) -> ImageSet:
    _, _, n_classes, parts = _CIFAR[source.name]
    batches = readers.read_cifar(files[0], {**parts[0], **parts[1]}, source.fix)
    tensors = []
    for part in parts:
        tensors.append(torch.from_numpy(np.concatenate([batches[n][0] for n in part])))
        tensors.append(torch.tensor([v for n in part for v in batches[n][1]], dtype=torch.int64))
    return ImageSet(source.name, tensors[0], tensors[1], tensors[2], tensors[3], n_classes)


# -- folders and archives of images --------------------------------------------------------------------------------

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


def _archives(folder: Path, pattern: str) -> list[Path]:
    return [
        p
        for p in sorted(folder.iterdir())
        if p.name.lower().endswith(_ARCHIVES)
        and re.fullmatch(pattern, p.name.lower().partition(".")[0])
        and p.is_file()
    ]


def _image_set(
    source: Source, arrays: Mapping[str, npt.NDArray[Any]], n_classes: int, domains: bool = False
) -> ImageSet:
    tensor = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return ImageSet(
        source.name,
        tensor["train_x"],
        tensor["train_y"],
        tensor["test_x"],
        tensor["test_y"],
        n_classes,
        tensor["train_domain"] if domains else None,
        tensor["test_domain"] if domains else None,
    )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in readers.IMAGE_SUFFIXES


def _find_tree(source: Source, folder: Path) -> Found | str | None:
    """``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, as folders or in one archive."""
    if (folder / "train").is_dir() and any(p.is_dir() for p in (folder / "train").iterdir()):
        if not (folder / "test").is_dir():
            return f"{folder} lacks test/<class>/*.png"
        return Found((folder,))
    archives = _archives(folder, r"cifar[-_]?100.*" if source.name == "cifar100" else r"cifar[-_]?10(?!0).*")
    archives = [a for a in archives if a.name != _CIFAR[source.name][1]]
    return Found((archives[0],)) if archives else None


def _tree_layout(n_classes: int) -> readers.Layout:
    def layout(names: list[str]) -> dict[str, Entry]:
        placed = []
        for name in names:
            path = name.split("/")
            if len(path) >= 3 and path[-3] in ("train", "test") and _is_image(name):
                placed.append((name, path[-3], path[-2]))
        classes = sorted({c for _, _, c in placed})
        if len(classes) != n_classes:
            raise ValueError(f"{len(classes)} class folders in train/ and test/, expected {n_classes}")
        return {name: Entry(part, classes.index(c)) for name, part, c in placed}

    return layout


def _read_tree(source: Source, files: tuple[Path, ...], pixels: int | None) -> ImageSet:
    n_classes = _CIFAR[source.name][2]
    return _image_set(
        source, readers.read_images(source.name, files[0], _tree_layout(n_classes), source.fix, pixels), n_classes
    )


# -- Tiny-ImageNet -------------------------------------------------------------------------------------------------


def _find_tiny(source: Source, folder: Path) -> Found | str | None:
    if (folder / "train").is_dir() and any((folder / "train").glob("n*/images")):
        if not (folder / "val" / "images").is_dir():
            return f"{folder} lacks val/images"
        if not (folder / "val" / "val_annotations.txt").is_file():
            return f"{folder} lacks val/val_annotations.txt"
        return Found((folder,))
    archives = _archives(folder, r"tiny[-_]?imagenet.*")
    return (
        Found((archives[0], *sorted(folder.glob("val*.tsv")), *sorted(folder.glob("wnids.txt")))) if archives else None
    )


def _read_tiny(source: Source, files: tuple[Path, ...], pixels: int | None) -> ImageSet:
    """The official layout; an archive without ``val_annotations.txt`` or ``wnids.txt`` may have them beside it."""
    store, *beside = files

    def layout(names: list[str]) -> dict[str, Entry]:
        annotations = _text(store, names, "val_annotations.txt", [p for p in beside if p.suffix == ".tsv"])
        order = _text(store, names, "wnids.txt", [p for p in beside if p.name == "wnids.txt"])
        if annotations is None:
            raise ValueError("no val_annotations.txt in it and no val*.tsv beside it")
        truth = dict(line.split("\t")[:2] for line in annotations.splitlines() if "\t" in line)
        paths = {n: n.split("/") for n in names if _is_image(n) and n.split("/")[-2:-1] == ["images"]}
        present = {p[-3] for p in paths.values()} - {"val", "test"}
        classes = {w: i for i, w in enumerate(w for w in (order.split() if order else sorted(present)) if w in present)}
        entries = {}
        for name, path in paths.items():
            if path[-3] in classes:
                entries[name] = Entry("train", classes[path[-3]])
            elif path[-3] == "val":
                if path[-1] not in truth:
                    raise ValueError(f"image {name} has no line in the validation list")
                if truth[path[-1]] in classes:
                    entries[name] = Entry("test", classes[truth[path[-1]]])
        return entries

    arrays = readers.read_images(source.name, store, layout, source.fix, pixels, beside)
    return _image_set(source, arrays, int(arrays["train_y"].max()) + 1)


def _text(store: Path, names: list[str], base: str, beside: list[Path]) -> str | None:
    """The text file ``base`` from anywhere inside the store, else the first of ``beside``, else ``None``."""
    for name in names:
        if name.rpartition("/")[2] == base:
            return readers.text_in(store, name)
    return beside[0].read_text(encoding="utf-8") if beside else None


# -- CORe50 --------------------------------------------------------------------------------------------------------

CORE50_TEST_SESSIONS = (3, 7, 10)
"""The sessions that CORe50's authors hold out."""

_CORE50_FRAME = re.compile(r"(?:^|/)s(\d+)/o(\d+)/[^/]+$")


def _find_core50(source: Source, folder: Path) -> Found | str | None:
    for place in (folder / "core50_128x128", folder / "core50_32x32", folder):
        if (place / "s1").is_dir() and any((place / "s1").glob("o*")):
            return Found((place,))
    archives = _archives(folder, r"core50_(128x128|32x32)")
    return Found((archives[0],)) if archives else None


def _core50_layout(names: list[str]) -> dict[str, Entry]:
    frames = [(n, m) for n in names if _is_image(n) and (m := _CORE50_FRAME.search(n))]
    objects = sorted({int(m[2]) for _, m in frames})
    if objects != list(range(1, len(objects) + 1)):
        raise ValueError(f"object folders are numbered {objects}, expected o1, o2, … without gaps")
    return {
        n: Entry("test" if int(m[1]) in CORE50_TEST_SESSIONS else "train", int(m[2]) - 1, int(m[1])) for n, m in frames
    }


def _read_core50(source: Source, files: tuple[Path, ...], pixels: int | None) -> ImageSet:
    arrays = readers.read_images(source.name, files[0], _core50_layout, source.fix, pixels)
    return _image_set(source, arrays, int(arrays["train_y"].max()) + 1, domains=True)


# -- digits --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def digits() -> ImageSet:
    """The 1,797 handwritten 8×8 digits that come with scikit-learn, values 0…16 rescaled to 0…255.

    Of each class a fifth is the test set, drawn once and for all with a seed of its own.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        rows = (y == label).nonzero().flatten()
        draw = torch.randperm(len(rows), generator=generator(0, "digits", "test", label))
        held_out[rows[draw[: len(rows) // 5]]] = True
    return ImageSet("digits", x[~held_out], y[~held_out], x[held_out], y[held_out], 10)


# -- downloads -----------------------------------------------------------------------------------------------------


def _torchvision(name: str) -> Callable[[Path], None]:
    def download(root: Path) -> None:
        import_torchvision()
        from torchvision import datasets

        for train in (True, False):
            getattr(datasets, name)(str(root), train=train, download=True)

    return download


def _archive(url: str, md5: str | None) -> Callable[[Path], None]:
    def download(root: Path) -> None:
        import_torchvision()
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, str(root), md5=md5)

    return download


_IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (or .gz)"
_TREE = "train/<class>/*.jpg with test/<class>/*.jpg (or an archive of them)"

SOURCES: dict[str, Source] = {
    s.name: s
    for s in (
        Source(
            "mnist",
            "split-mnist",
            ("mnist", "MNIST"),
            ((_find_idx, _read_idx),),
            _IDX_FILES,
            _torchvision("MNIST"),
        ),
        Source(
            "fashion-mnist",
            "split-fashion-mnist",
            ("fashion-mnist", "FashionMNIST", "fashion_mnist", "fashionmnist", "fmnist"),
            ((_find_idx, _read_idx),),
            _IDX_FILES,
            _torchvision("FashionMNIST"),
        ),
        Source(
            "cifar10",
            "split-cifar10",
            ("cifar10", "cifar-10", "CIFAR10", "cifar10_jpeg"),
            ((_find_cifar, _read_cifar), (_find_tree, _read_tree)),
            f"cifar-10-batches-py/, cifar-10-python.tar.gz, or {_TREE}",
            _torchvision("CIFAR10"),
        ),
        Source(
            "cifar100",
            "split-cifar100",
            ("cifar100", "cifar-100", "CIFAR100", "cifar100_jpeg"),
            ((_find_cifar, _read_cifar), (_find_tree, _read_tree)),
            f"cifar-100-python/, cifar-100-python.tar.gz, or {_TREE}",
            _torchvision("CIFAR100"),
        ),
        Source(
            "tiny-imagenet",
            "split-tiny-imagenet",
            ("tiny-imagenet-200", "tiny-imagenet", "tinyimagenet", "tiny_imagenet", "TinyImageNet"),
            ((_find_tiny, _read_tiny),),
            "tiny-imagenet-200/ (train/<wnid>/images/*.JPEG, val/val_annotations.txt) or an archive of it",
            _archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
        ),
        Source(
            "core50",
            "core50",
            ("core50", "CORe50", "core50_128x128", "core50_32x32"),
            ((_find_core50, _read_core50),),
            "core50_128x128/s1…s11/o1…o50/*.png or core50_128x128.zip",
            _archive("http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip", None),
        ),
    )
}
"""Every data set that is read from disk, by name."""
