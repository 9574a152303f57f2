"""File formats of image sets: idx, CIFAR's pickles, folders and archives of images.

Whatever is wrong with a file becomes one :class:`~cl_lab.errors.DataError` that names it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import math
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cl_lab.errors import DataError
from cl_lab.files import cache_root

from ._cache import Create, arrays, key_of

Bytes = npt.NDArray[np.uint8]

_DAMAGE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    NotImplementedError,
    OverflowError,
    struct.error,
)
"""What the readers of the standard library, numpy and Pillow raise on bytes that are not what they should be."""


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Turn any complaint about the bytes of ``path`` into a :class:`DataError` that ends with ``fix``."""
    try:
        yield
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: damaged or of another format ({type(error).__name__}: {reason}); {fix}") from error


def check_md5(path: Path, raw: bytes, expected: str | None, fix: str) -> None:
    """Raise :class:`DataError` unless ``raw`` has the MD5 of the official file; ``None`` means none is known."""
    if expected is None:
        return
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{path}: checksum mismatch, MD5 is {found}, the official file's is {expected}; {fix}")


# -- idx -----------------------------------------------------------------------------------------------------------


def read_idx(path: Path, axes: int, official: Mapping[tuple[int, ...], str], fix: str) -> Bytes:
    """An idx file of bytes (gzipped or not) as a fresh uint8 array of ``axes`` axes.

    ``official`` gives the MD5 of the uncompressed official file by its shape: a file of that shape must be that file.
    Raises :class:`DataError` for bad gzip data, a wrong magic number, missing or surplus bytes, a checksum mismatch.
    """
    with reading(path, fix):
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz":
            raw = gzip.decompress(raw)
    magic = raw[:4]
    wanted = bytes([0, 0, 8, axes])
    if magic != wanted:
        raise DataError(
            f"{path}: wrong magic number 0x{magic.hex()}, an idx file of {'images' if axes == 3 else 'labels'} starts "
            f"with 0x{wanted.hex()}; {fix}"
        )
    start = 4 + 4 * axes
    with reading(path, fix):
        shape = struct.unpack(f">{axes}I", raw[4:start])
    missing = math.prod(shape) - (len(raw) - start)
    if missing > 0:
        raise DataError(f"{path}: truncated, {missing} bytes of {math.prod(shape)} are missing; {fix}")
    if missing < 0:
        raise DataError(f"{path}: {-missing} bytes follow the {shape[0]} entries its header announces; {fix}")
    check_md5(path, raw, official.get(shape), fix)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


# -- CIFAR's pickles -----------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays and harmless builtins only: a pickle may otherwise run any code."""

    _allowed = frozenset(
        {
            *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
            *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
            *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # how Python 3 writes bytes in the older protocols
            *(
                (module, name)
                for module in ("builtins", "__builtin__")
                for name in ("bytes", "bytearray", "set", "frozenset", "complex", "list", "dict", "tuple", "int", "str")
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numpy arrays and builtins are allowed")
        return super().find_class(module, name)


def unpickle(raw: bytes) -> Any:
    """The object in ``raw``, of numpy arrays and builtins only; raises :class:`pickle.UnpicklingError` for others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy deprecates the flags with which CIFAR's arrays were written in 2009
        return _Unpickler(io.BytesIO(raw), encoding="latin1").load()


def read_cifar(path: Path, wanted: Mapping[str, tuple[int, str]], fix: str) -> dict[str, tuple[Bytes, list[int]]]:
    """The batches ``wanted`` (name → size and MD5 of the official file) as ``(uint8 [N, 3, 32, 32], labels)``.

    ``path`` is the folder of the pickles or the archive of it. A file as long as the official one must be it, byte for
    byte. Raises :class:`DataError` naming the file that is missing or damaged.
    """
    raws: dict[str, bytes] = {}
    with reading(path, fix):
        if path.is_dir():
            raws = {name: (path / name).read_bytes() for name in wanted}
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    base = member.name.rpartition("/")[2]
                    file = archive.extractfile(member) if base in wanted else None
                    if file is not None:
                        raws[base] = file.read()
    batches = {}
    for name, (size, md5) in wanted.items():
        where = path / name
        if name not in raws:
            raise DataError(f"{where}: missing in the archive; {fix}")
        check_md5(where, raws[name], md5 if len(raws[name]) == size else None, fix)
        with reading(where, fix):
            entry = unpickle(raws[name])
            data = np.asarray(entry["data"])
            labels = [int(v) for v in (entry["fine_labels"] if "fine_labels" in entry else entry["labels"])]
            if data.dtype != np.uint8:
                raise TypeError(f"pixels are {data.dtype}, not uint8")
            images = data.reshape(-1, 3, 32, 32)
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} images, {len(labels)} labels")
        batches[name] = (images, labels)
    return batches


# -- folders and archives of images --------------------------------------------------------------------------------

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What a layout says of one image file: ``part`` is ``"train"`` or ``"test"``, ``domain`` its session (or 0)."""

    part: str
    label: int
    domain: int = 0


Layout = Callable[[list[str]], dict[str, Entry]]
"""Says of all file names in a store (``/`` between folders, sorted) which images they are. May raise DataError."""


def names_in(store: Path) -> list[str]:
    """The names of all files in a folder, zip or tar archive, sorted, with ``/`` between folders."""
    if store.is_dir():
        return sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())
    if zipfile.is_zipfile(store):
        with zipfile.ZipFile(store) as archive:
            return sorted(i.filename for i in archive.infolist() if not i.is_dir())
    with tarfile.open(store) as tar:
        return sorted(_plain(m.name) for m in tar if m.isfile())


def text_in(store: Path, name: str) -> str:
    """The text file ``name`` of a store. Raises :class:`KeyError` or :class:`OSError` where there is none."""
    for _, raw in _contents(store, {name}):
        return raw.decode("utf-8")
    raise KeyError(name)


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _contents(store: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    if store.is_dir():
        for name in sorted(wanted):
            yield name, (store / name).read_bytes()
    elif zipfile.is_zipfile(store):
        with zipfile.ZipFile(store) as archive:
            for name in sorted(wanted):
                yield name, archive.read(name)
    else:
        with tarfile.open(store) as tar:
            for member in tar:
                name = _plain(member.name)
                file = tar.extractfile(member) if name in wanted else None
                if file is not None:
                    yield name, file.read()


def _identity(store: Path) -> list[str]:
    """Lines that change when the store changes: size and SHA-256 of an archive, a listing with sizes of a folder."""
    if store.is_dir():
        lines = []
        for name in names_in(store):
            stat = (store / name).stat()
            lines.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        return [str(store.resolve()), *lines]
    with store.open("rb") as file:
        return [str(store.stat().st_size), hashlib.file_digest(file, "sha256").hexdigest()]


PARTS = ("train_x", "train_y", "train_domain", "test_x", "test_y", "test_domain")
"""The arrays :func:`read_images` gives."""


def read_images(
    source: str, store: Path, layout: Layout, fix: str, pixels: int | None = None, sidecars: Collection[Path] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Decode the images of a folder or archive once; later calls map the cached arrays into memory.

    Gives :data:`PARTS`: ``x`` uint8 ``[N, 3, H, W]`` (grey images become RGB), ``y`` and ``domain`` int64 ``[N]``, in
    the order of the file names. ``pixels`` scales every image to that side; without, all must have one size. The cache
    key holds the store's size and SHA-256 (or listing) and that of the ``sidecars`` the layout has read.
    """
    with reading(store, fix):
        identity = [source, "1", str(pixels), *_identity(store)]
        for sidecar in sorted(sidecars):
            identity += _identity(sidecar)

    def fill(create: Create) -> None:
        with reading(store, fix):
            entries = layout(names_in(store))
            _decode(store, entries, create, pixels)

    return arrays(cache_root() / "decoded" / f"{source}-{key_of(identity)}", PARTS, fill)


def _decode(store: Path, entries: Mapping[str, Entry], create: Create, pixels: int | None) -> None:
    from PIL import Image

    names = {part: sorted(n for n, e in entries.items() if e.part == part) for part in ("train", "test")}
    for part, members in names.items():
        if not members:
            raise ValueError(f"no {part} images in it")
    rows = {name: row for members in names.values() for row, name in enumerate(members)}
    x: dict[str, npt.NDArray[Any]] = {}
    size: tuple[int, int] | None = None
    done = 0
    for name, raw in _contents(store, entries):
        try:
            with Image.open(io.BytesIO(raw)) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image {name}: {error}") from error
        if pixels is not None and image.size != (pixels, pixels):
            image = image.resize((pixels, pixels), Image.Resampling.BOX)
        if size is None:
            size = image.size
            width, height = size
            for part, members in names.items():
                x[part] = create(f"{part}_x", (len(members), 3, height, width), np.uint8)
                for kind in ("label", "domain"):
                    column = create(f"{part}_{'y' if kind == 'label' else kind}", (len(members),), np.int64)
                    column[:] = [getattr(entries[n], kind) for n in members]
        if image.size != size:
            raise ValueError(f"image {name} is {image.size[0]}×{image.size[1]}, the others {size[0]}×{size[1]}")
        x[entries[name].part][rows[name]] = np.asarray(image).transpose(2, 0, 1)
        done += 1
    if done != len(entries):
        raise ValueError(f"{done} of {len(entries)} images could be read")
