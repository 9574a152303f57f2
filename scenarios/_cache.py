"""The user's cache: where downloads and decoded images lie, and how files get there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cl_lab.files import cache_root

MAPPED_BYTES = 1 << 30
"""Arrays of more than this many bytes are kept on disk and memory-mapped."""


def data_root() -> Path:
    """Where ``cl-lab fetch`` puts downloads unless told otherwise: the cache's folder ``data``."""
    return cache_root() / "data"


def key_of(parts: Iterable[str]) -> str:
    """Twenty hexadecimal digits that name ``parts``."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


Create = Callable[[str, tuple[int, ...], Any], npt.NDArray[Any]]
"""Makes the zeroed array called ``name`` of a shape and dtype, in memory or on disk."""


def arrays(folder: Path, names: Iterable[str], fill: Callable[[Create], None]) -> dict[str, npt.NDArray[Any]]:
    """The arrays ``names`` kept as ``folder/<name>.npy``, memory-mapped; made by ``fill`` when they are not there.

    ``fill`` gets a :data:`Create` and must create and fill every name. The folder appears in one step, so a process
    that is killed, or a second one doing the same, leaves no half of it. Where the cache cannot be written (read-only,
    full), the arrays are made in memory instead. Changes to the arrays never reach the disk.
    """
    names = tuple(names)
    kept = _mapped(folder, names)
    if kept is not None:
        return kept
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError:
        return _in_memory(fill)
    try:
        try:
            fill(lambda name, shape, dtype: _allocate(temporary / f"{name}.npy", shape, dtype))
        except _NoSpaceError:
            return _in_memory(fill)
        shutil.rmtree(folder, ignore_errors=True)  # what is there was not readable
        try:
            temporary.rename(folder)
        except OSError:  # somebody else was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    made = _mapped(folder, names)
    assert made is not None, f"{folder} vanished while it was being read"
    return made


class _NoSpaceError(Exception):
    """The cache's disk cannot take the array."""


def _in_memory(fill: Callable[[Create], None]) -> dict[str, npt.NDArray[Any]]:
    made: dict[str, npt.NDArray[Any]] = {}

    def create(name: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        made[name] = np.zeros(shape, dtype)
        return made[name]

    fill(create)
    return made


def _allocate(path: Path, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if array.nbytes and hasattr(os, "posix_fallocate"):
            # A sparse file on a full disk would end the process with SIGBUS at some later write.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise _NoSpaceError from error
    return array


def _mapped(folder: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]] | None:
    try:
        # "c" is copy on write: torch wants writable memory, and the file must stay as it is.
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except (OSError, ValueError, EOFError):
        return None
