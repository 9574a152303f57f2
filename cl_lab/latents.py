"""Frozen layers as part of the data: a stream is put through them once, and only what comes above is a model.

Whatever the strategy, layers that never change give a sample the same latents in every epoch, replay and evaluation; so
they are computed once per sample, and, where asked, kept on disk for the other runs over the same data.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_lab.files import cache_root
from cl_lab.models import Classifier, channels_last
from cl_lab.records import Aside, Experience, Stream, TensorData

log = logging.getLogger("cl_lab")


_ROWS = 256  # samples through the frozen layers at a time


def put_through(stream: Stream, model: Classifier, stage: str, *, keep: bool, device: torch.device) -> Stream:
    """``stream`` as its latents behind ``stage``; ``model`` loses the layers up to there.

    Samples become float32 ``[C, …]``, made in evaluation mode on ``device`` when an experience is first used, kept on disk
    with ``keep``. Raises :class:`~cl_lab.errors.ConfigError` for a stage the model has not.
    """
    frozen = copy.deepcopy(model).to(device).eval()
    if len(stream.input_shape) == 3:
        channels_last(frozen)
    lower = frozen.split(stage)
    model.remove_below(stage)
    cache = LatentCache(cache_root() / "latents", _what_decides(frozen, lower, stream)) if keep else None
    normal = None
    if stream.mean is not None and stream.std is not None:
        trailing = (1,) * (len(stream.input_shape) - 1)
        normal = tuple(torch.tensor(v, device=device).view(-1, *trailing) for v in (stream.mean, stream.std))

    @torch.no_grad()
    def compute(x: Tensor) -> Tensor:
        parts = []
        for rows in x.split(_ROWS):
            scaled = rows.to(device)
            scaled = scaled.float().div(255) if scaled.dtype == torch.uint8 else scaled
            scaled = scaled if normal is None else (scaled - normal[0]) / normal[1]
            if scaled.dim() == 4:
                scaled = scaled.contiguous(memory_format=torch.channels_last)
            parts.append(frozen.latents(scaled).contiguous().cpu())
        return torch.cat(parts)

    def encoded(data: TensorData) -> TensorData:
        return TensorData(compute(data.x) if cache is None else cache.rows(data.x, compute), data.y, data.t)

    made: dict[int, TensorData] = {}  # test sets that experiences share are encoded once

    def experience(e: Experience) -> Experience:
        def train() -> TensorData:
            latents = encoded(e.train)
            e.release()
            return latents

        def test() -> TensorData:
            if id(e.test) not in made:
                made[id(e.test)] = encoded(e.test)
            return made[id(e.test)]

        return Experience(e.index, e.name, e.classes, train, test, ordered=e.ordered, groups=e.groups, edits=e.edits)

    shape = tuple(compute(torch.zeros(1, *stream.input_shape)).shape[1:])
    experiences = tuple(experience(e) for e in stream.experiences)
    layout = stream.layout if stream.objective == "language" else {}

    def beside(aside: Aside) -> Aside:
        return Aside(replace(aside.stream, input_shape=shape, layout=layout), lambda: encoded(aside.questions))

    asides = {name: beside(aside) for name, aside in stream.asides.items()}
    return replace(
        stream, experiences=experiences, input_shape=shape, mean=None, std=None, layout=layout, asides=asides
    )


def _what_decides(frozen: Classifier, lower: Sequence[str], stream: Stream) -> Iterator[bytes]:
    """All that the latents of a sample depend on."""
    yield repr((list(lower), stream.mean, stream.std, stream.input_shape, frozen.backbone)).encode()
    for name, value in (*frozen.named_parameters(), *frozen.named_buffers()):
        owner = name.rpartition(".")[0]
        if owner in lower or name in lower or owner == "backbone":  # the backbone's own: constants of its input
            yield name.encode() + value.detach().cpu().contiguous().numpy().tobytes()


class LatentCache:
    """Rows by the digest of the sample they were made of, below a folder that ``key`` names.

    Rows are written as whole files that appear in one step, so a process that is killed leaves no half of one, and several
    may write at once. Where the folder cannot be written, nothing is kept.
    """

    def __init__(self, folder: Path, key: Iterable[bytes]) -> None:
        self.folder = folder / _digest(b"".join(_digest(part) for part in key)).hex()
        self._places: dict[bytes, tuple[int, int]] = {}  # digest → file, row
        self._files: list[npt.NDArray[np.float32]] = []
        self._known: set[str] = set()

    def rows(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Float32 latents of samples ``x`` ``[N, …]``; ``compute`` makes those that are not there yet."""
        names = [_digest(row.tobytes()) for row in x.numpy()]
        self._look()
        missing = torch.tensor([i for i, n in enumerate(names) if n not in self._places], dtype=torch.int64)
        made = torch.empty(0)
        if len(missing):
            made = compute(x[missing]).cpu()
            self._write([names[i] for i in missing.tolist()], made)
            if len(missing) == len(x):
                return made
        found = torch.empty(len(x), *self._files[0].shape[1:])
        if len(missing):
            found[missing] = made
        held: dict[int, list[tuple[int, int]]] = {}
        taken = set(missing.tolist())
        for i, name in enumerate(names):
            if i not in taken:
                file, row = self._places[name]
                held.setdefault(file, []).append((row, i))
        for file, places in held.items():
            rows, targets = (torch.tensor(v) for v in zip(*sorted(places), strict=True))
            found[targets] = torch.from_numpy(self._files[file][rows.numpy()])
        return found

    def _look(self) -> None:
        """Take in the files that have appeared."""
        for path in sorted(self.folder.glob("*.names")) if self.folder.is_dir() else []:
            if path.stem in self._known:
                continue
            names = path.read_bytes()
            latents = np.load(path.with_suffix(".npy"), mmap_mode="r")
            for row in range(len(latents)):
                self._places.setdefault(names[16 * row : 16 * row + 16], (len(self._files), row))
            self._files.append(latents)
            self._known.add(path.stem)

    def _write(self, names: list[bytes], latents: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                np.save(file, latents.numpy())
            path = self.folder / f"{_digest(b''.join(names)).hex()}.npy"
            Path(temporary).replace(path)
            # The list of names comes last: a file without one is not looked at.
            listed = Path(temporary).with_suffix(".part")
            listed.write_bytes(b"".join(names))
            listed.replace(path.with_suffix(".names"))
        except OSError as error:
            log.warning("latents cannot be kept in %s (%s); they will be computed again", self.folder, error)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
