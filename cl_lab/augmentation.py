"""Random augmentation of training batches: vectorised where we know the operation, by worker processes where we do not.

Every random number is a function of seed, experience and step, so a resumed run sees the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_lab.errors import ConfigError
from cl_lab.records import Batch, Stream, TensorData
from cl_lab.seeding import derive, generator

PADDING = 4
"""Pixels of zero padding before the random crop, as in the CIFAR literature (He et al. 2016)."""


def crop_flip(x: Tensor, seed: int, experience: int, step: int) -> Tensor:
    """Random crop after zero padding, and horizontal flip, of images ``[B, C, H, W]`` (any dtype), each on its own."""
    rng = generator(seed, "augment", experience, step)
    b, channels, height, width = x.shape
    offsets = torch.randint(0, 2 * PADDING + 1, (2, b, 1), generator=rng)
    flip = torch.rand(b, 1, generator=rng) < 0.5
    columns = torch.arange(width)
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.where(flip, columns.flip(0), columns)
    padded = F.pad(x, (PADDING,) * 4)
    index = torch.arange(b).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[(*index, rows.view(b, 1, height, 1), columns.view(b, 1, 1, width))]


def check(name: str, stream: Stream, *, latents: str | None = None) -> None:
    """Raise :class:`ConfigError` where ``training.augmentation = name`` means nothing for the samples of ``stream``.

    ``latents`` is the stage of the model behind which samples are kept, where that is what the stream holds.
    """
    if name == "none":
        return
    if latents is not None:
        raise ConfigError(
            f"training.augmentation = '{name}': model.frozen = '{latents}' keeps what its layers made of each sample once "
            "and for all, which is no picture any more; set augmentation=none, or leave model.frozen out"
        )
    if name == "crop-flip" and (len(stream.input_shape) != 3 or stream.layout):
        raise ConfigError(
            f"training.augmentation = 'crop-flip': crops pictures [channels, height, width], but a sample of stream "
            f"'{stream.name}' is {list(stream.input_shape)}; set augmentation=none"
        )


def load_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function that ``file.py:function`` names; raises :class:`ConfigError` where there is none."""
    import importlib.util

    file, colon, attribute = name.partition(":")
    if not colon or not file.endswith(".py") or not Path(file).is_file():
        raise ConfigError(
            f"training.augmentation = '{name}': must be none, crop-flip, or file.py:function with an existing file"
        )
    spec = importlib.util.spec_from_file_location("cl_lab_augmentation", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"training.augmentation = '{name}': '{file}' has no function '{attribute}'")
    found: Callable[[Tensor], Tensor] = function
    return found


class _Transformed(Dataset[Any]):
    """Rows of an experience, each put through the user's function under its own seed."""

    def __init__(self, data: TensorData, function: str, seed: int) -> None:
        self._data, self._name, self._seed = data, function, seed
        self._function: Callable[[Tensor], Tensor] | None = None  # loaded in the worker: it need not be picklable

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        row, place = key
        if self._function is None:
            self._function = load_function(self._name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self._seed, place, row))
            return self._function(self._data.x[row])


def transformed_batches(
    data: TensorData,
    function: str,
    plan: Callable[[int], tuple[Tensor, int]],
    steps: range,
    *,
    seed: int,
    workers: int,
) -> Iterator[Batch]:
    """Batches of the given steps with ``function`` applied to every sample by a DataLoader with ``workers`` processes.

    ``plan(step)`` gives the rows and the epoch of a step. Raises :class:`ConfigError` where the function changes a sample's
    shape or dtype: rehearsed samples, which do not pass through it, must go with the others.
    """
    planned = [plan(step) for step in steps]
    keys = [[(row, step) for row in rows.tolist()] for step, (rows, _) in zip(steps, planned, strict=True)]
    # A generator of its own, or the loader would draw from the global one, once more after a resume.
    loader = DataLoader(
        _Transformed(data, function, seed), batch_sampler=keys, num_workers=workers, generator=generator(seed, "loader")
    )
    for x, (rows, epoch) in zip(loader, planned, strict=True):
        if x.dtype != data.x.dtype or x.shape[1:] != data.x.shape[1:]:
            raise ConfigError(
                f"training.augmentation = '{function}': gave {x.dtype} {list(x.shape[1:])} for a sample of "
                f"{data.x.dtype} {list(data.x.shape[1:])}; keep both"
            )
        yield Batch(x, data.y[rows], data.t[rows], current=len(rows), epoch=epoch)
