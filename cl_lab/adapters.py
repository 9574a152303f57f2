"""Low-rank adapters as plain matrices: found in a model, put beside each other, handed from a strategy to an export.

A model gets its adapters from PEFT (:mod:`cl_lab.causal_lm`), which is not imported here: a layer that has one is known by
its structure, a ``base_layer`` with ``lora_A`` and ``lora_B`` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_NAME = "default"  # what PEFT calls the one adapter that causal-lm injects


class LowRank(NamedTuple):
    """A change ``B A`` of one linear layer's weight ``[outputs, inputs]``."""

    a: Tensor
    """``A`` ``[R, inputs]``."""
    b: Tensor
    """``B`` ``[outputs, R]``."""


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with an adapter, which adds ``scale · B A`` to its weight."""

    a: str
    """The name of the parameter ``A`` ``[rank, inputs]``."""
    b: str
    """The name of the parameter ``B`` ``[outputs, rank]``."""
    rank: int
    scale: float
    """``α/r``."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight matrix: torch's own layer, or GPT-2's (:func:`is_transposed`)."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is the linear layer of GPT-2, which keeps its weight as ``[inputs, outputs]``."""
    return type(module).__name__ == "Conv1D"


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers of ``model`` that have an adapter, by path, in the model's order."""
    found: dict[str, AdaptedLayer] = {}
    for path, module in model.named_modules():
        layer: Any = module
        sides = (getattr(layer, "lora_A", None), getattr(layer, "lora_B", None))
        if all(isinstance(side, nn.ModuleDict) and _NAME in side for side in sides):
            a, b = (f"{path}.{side}.{_NAME}.weight" for side in ("lora_A", "lora_B"))
            found[path] = AdaptedLayer(a, b, int(layer.r[_NAME]), float(layer.scaling[_NAME]))
    return found


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """What the adapters of ``model`` add to their layers, by path: float32 copies on the CPU, ``α/r`` inside ``B``."""
    named = dict(model.named_parameters())
    made: dict[str, LowRank] = {}
    for path, layer in adapted_layers(model).items():
        a, b = (named[name].detach().to("cpu", torch.float32, copy=True) for name in (layer.a, layer.b))
        made[path] = LowRank(a, b * layer.scale)
    return made


def beside(parts: Sequence[LowRank]) -> LowRank:
    """The sum of changes of one layer as one change, of the sum of their ranks: nothing is approximated."""
    return LowRank(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], 1))
