"""The user's cache, and writing files so that a reader, or a crash at any moment, sees the old one or the new one whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

_ASIDE = ".old-"
LOCK = ".lock"
"""The file in a folder whose lock its one writer holds."""


class InUse(Exception):
    """Another process works in a folder; the message is its number, ``?`` where it has not said."""


def cache_root() -> Path:
    """The user's cache: ``$CL_LAB_CACHE``, else ``~/.cache/cl-lab``. Nothing is created."""
    return Path(os.environ.get("CL_LAB_CACHE") or "~/.cache/cl-lab").expanduser()


@contextlib.contextmanager
def writing_tensors() -> Iterator[None]:
    """Within, what safetensors cannot write raises :class:`OSError`, as any other file does; its own error is none."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content``: written aside, flushed to disk, renamed. Raises :class:`OSError` as writing does."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to disk: what was made in it, or renamed into it, is there after a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Be the one process that works in ``folder``, which is there, after waiting ``wait`` seconds at most.

    The lock ends with the process, however it ends; its file stays, and moves with the folder. Raises :class:`InUse` where
    another holds it still, and :class:`OSError` where no file can be made there or the file system knows no locks.
    """
    import fcntl  # not on Windows

    end = time.monotonic() + wait
    with (folder / LOCK).open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    file.seek(0)
                    raise InUse(file.read().strip() or "?") from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def set_aside_name(folder: Path) -> Path:
    """A free name beside ``folder``, for keeping what it holds when a new run wants its place."""
    n = 1
    while (aside := folder.with_name(f"{folder.name}{_ASIDE}{n}")).exists():
        n += 1
    return aside


def run_folders(comparison: Path) -> list[Path]:
    """The folders of a comparison's runs, sorted, without earlier runs that were set aside."""
    found = (p for p in (comparison / "runs").glob("*") if p.is_dir())
    return sorted(p for p in found if not re.search(rf"{re.escape(_ASIDE)}\d+$", p.name))
