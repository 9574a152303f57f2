"""The user's cache, and writing files so that a reader, or a crash at any moment, sees the old one or the new one whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ASIDE = ".old-"


def cache_root() -> Path:
    """The user's cache: ``$CL_LAB_CACHE``, else ``~/.cache/cl-lab``. Nothing is created."""
    return Path(os.environ.get("CL_LAB_CACHE") or "~/.cache/cl-lab").expanduser()


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
