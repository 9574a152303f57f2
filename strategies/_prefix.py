"""What frozen layers make of samples, kept for the next time the same sample comes."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import weakref
from typing import IO, Any

import numpy as np
import psutil
import torch
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.files import cache_root
from cl_lab.protocols import Learner

_ROWS = 64  # room for so many samples to begin with; doubled whenever it is full


class PrefixCache:
    """Latents of the layers below the model's cut, by the digest of the sample; the layers must never change again.

    Each sample passes these layers alone, in evaluation mode, so what comes out does not depend on its neighbours in a batch
    and a resumed run, which begins with an empty cache, finds the same to the last bit. Float32, in memory or in a temporary
    file that goes with the process.
    """

    def __init__(self, learner: Learner, *, on_disk: bool) -> None:
        self._encoder: Any = learner.replica()
        self._on_disk = on_disk
        self._file: IO[bytes] | None = None
        self._places: dict[bytes, int] = {}
        self._rows = torch.empty(0)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of the latents kept."""
        return len(self) * math.prod(self._rows.shape[1:]) * self._rows.element_size()

    def latents(self, x: Tensor, learner: Learner) -> Tensor:
        """``[B, *latent]`` float32 of raw samples ``x`` ``[B, …]``, on the learner's device; made where not kept."""
        names = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in x.cpu().numpy()]
        for i, name in enumerate(names):
            if name not in self._places:
                self._keep(name, self._made(x[i : i + 1], learner))
        return self._rows.index_select(0, torch.tensor([self._places[n] for n in names])).to(learner.device)

    @torch.no_grad()
    def _made(self, x: Tensor, learner: Learner) -> Tensor:
        with learner.autocast():
            h: Tensor = self._encoder.latents(learner.prepare_input(x))[0]
        return h.float().cpu()

    def _keep(self, name: bytes, h: Tensor) -> None:
        if len(self) == len(self._rows):
            self._grow(h.shape)
        self._rows[len(self)] = h
        self._places[name] = len(self)

    def _grow(self, shape: torch.Size) -> None:
        rows, row = max(_ROWS, 2 * len(self)), math.prod(shape) * 4
        if not self._on_disk:
            free = psutil.virtual_memory().available
            rows = min(rows, len(self) + free // row)
            if rows == len(self):
                raise ConfigError(
                    f"freeze: cache = 'memory': {len(self)} samples are kept, another takes {row / 2**20:.1f} MiB and "
                    f"{free / 2**20:.1f} MiB are free; set cache=disk, or cache=none"
                )
            grown = torch.empty(rows, *shape)
            grown[: len(self)] = self._rows.view(-1, *shape)
            self._rows = grown
            return
        try:
            if self._file is None:
                cache_root().mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=cache_root(), prefix="prefix-")  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            size = rows * row
            self._file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would end the process with SIGBUS later
                os.posix_fallocate(self._file.fileno(), 0, size)
            self._rows = torch.from_numpy(np.memmap(self._file, np.float32, "r+", shape=(rows, *shape)))
        except OSError as error:
            raise ConfigError(
                f"freeze: cache = 'disk': {cache_root()} has no room for {rows} samples ({error.strerror}); set "
                "$CL_LAB_CACHE to another disk, or cache=none"
            ) from error
