"""Checkpoints: written atomically with a hash, as safetensors and JSON; nothing is ever unpickled.

A checkpoint is a folder ``step-000000123`` with ``tensors.safetensors`` and ``state.json``; the JSON holds the SHA-256 of
the tensors and of itself. It is written under a temporary name, flushed to disk and renamed, so it is either whole or
absent. A damaged one is noticed when read, and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_lab.errors import CheckpointError
from cl_lab.files import sync_folder
from cl_lab.records import State

log = logging.getLogger("cl_lab")

_SEPARATOR = "/"
_PREFIX = "step-"


def flatten(state: State, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a state into tensors and plain values, both keyed by ``/``-joined paths. Empty dictionaries are kept."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        escaped = prefix + key.replace("~", "~0").replace(_SEPARATOR, "~1")
        if isinstance(value, Tensor):
            tensors[escaped] = value
        elif isinstance(value, dict):
            if not value:
                values[escaped] = {}
            inner_tensors, inner_values = flatten(value, escaped + _SEPARATOR)
            tensors |= inner_tensors
            values |= inner_values
        else:
            values[escaped] = value
    return tensors, values


def unflatten(tensors: dict[str, Tensor], values: dict[str, Any]) -> State:
    """The inverse of :func:`flatten`."""
    state: State = {}
    for path, value in (*values.items(), *tensors.items()):
        *parents, last = (p.replace("~1", _SEPARATOR).replace("~0", "~") for p in path.split(_SEPARATOR))
        place: State = state
        for parent in parents:
            inner = place.setdefault(parent, {})
            assert isinstance(inner, dict)
            place = inner
        place[last] = value
    return state


def save(folder: Path, step: int, state: State, keep: int, *, suffix: str = "") -> Path:
    """Write ``state`` as the checkpoint of ``step`` under ``folder`` and drop all but the ``keep`` newest.

    Later ones are dropped, too: the run went on from an earlier checkpoint because they were damaged. Raises
    :class:`CheckpointError` naming the folder when it cannot be written; older checkpoints stay.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = folder / f"{_PREFIX}{step:09d}{suffix}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    tensors, values = flatten(state)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        file = temporary / "tensors.safetensors"
        save_file(_apart(tensors), file)
        content = {"tensors_sha256": _sha256(file), "values": values, "channels_last": _channels_last(tensors)}
        body = json.dumps(content, sort_keys=True)
        document = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body})
        (temporary / "state.json").write_text(document)
        for name in ("tensors.safetensors", "state.json"):
            with (temporary / name).open("rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(temporary)
        if target.exists():  # the same step saved again, after a resume
            shutil.rmtree(target)
        temporary.rename(target)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:  # a full disk shows as either
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write checkpoint {target}: {reason}; free space or choose another --out, then --resume"
        ) from error
    held = list(_newest_first(folder))
    place = held.index(target)
    for old in held[:place] + held[place + keep :]:
        shutil.rmtree(old, ignore_errors=True)
    for orphan in folder.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(orphan, ignore_errors=True)
    return target


def load_newest(folder: Path) -> tuple[State, Path] | None:
    """The newest whole checkpoint under ``folder``; ``None`` where there is none.

    A damaged one is skipped with a warning that names it and the one used instead. Raises :class:`CheckpointError` when
    checkpoints exist and all are damaged.
    """
    damaged: list[str] = []
    for path in _newest_first(folder):
        try:
            state = read(path)
        except CheckpointError as error:
            damaged.append(path.name)
            log.warning("%s; trying the one before", error)
            continue
        if damaged:
            log.warning("using checkpoint %s instead of damaged %s", path.name, ", ".join(damaged))
        return state, path
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}); delete the folder to start the run anew"
        )
    return None


def read(path: Path) -> State:
    """The state in one checkpoint folder; raises :class:`CheckpointError` where a hash does not match."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        document = json.loads((path / "state.json").read_text())
        body = document["body"]
        if hashlib.sha256(body.encode()).hexdigest() != document["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: state.json does not match its hash")
        content = json.loads(body)
        file = path / "tensors.safetensors"
        if _sha256(file) != content["tensors_sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: tensors.safetensors does not match its hash")
        tensors = {name: _aligned(value) for name, value in load_file(file).items()}
        for name in content.get("channels_last", ()):
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        return unflatten(tensors, content["values"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write ``weights`` as one safetensors file at ``path``, which is whole or absent at any moment.

    Raises :class:`CheckpointError` naming the file when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(dict(weights)), temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk shows as either
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write weights {path}: {reason}; free space, then --resume, or set checkpoint.experiences=false"
        ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """What :func:`save_weights` wrote. Raises :class:`CheckpointError` where the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: _aligned(value) for name, value in load_file(path).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"weights {path} cannot be read ({error}); run it again with checkpoint.experiences=true"
        ) from error


def _newest_first(folder: Path) -> Iterator[Path]:
    yield from sorted((p for p in folder.glob(f"{_PREFIX}*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: on the CPU, contiguous, none sharing memory with another."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        made[name] = value
    return made


def _channels_last(tensors: dict[str, Tensor]) -> list[str]:
    """Which lie with the channel innermost: they come back so, since sums in another order round otherwise."""
    return [
        name
        for name, value in tensors.items()
        if value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
    ]


_ALIGNMENT = 64
"""Bytes, as torch allocates on the CPU."""


def _aligned(value: Tensor) -> Tensor:
    """``value`` where torch itself would have put it: some processors' kernels round otherwise elsewhere."""
    return value if value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def equal(a: State, b: State) -> bool:
    """Whether two states hold the same tensors, bit for bit, and the same values."""
    tensors_a, values_a = flatten(a)
    tensors_b, values_b = flatten(b)
    return (
        values_a == values_b
        and tensors_a.keys() == tensors_b.keys()
        and all(torch.equal(v, tensors_b[k]) and v.dtype == tensors_b[k].dtype for k, v in tensors_a.items())
    )
