"""RegLoRA: what past adapters changed most stays out of the new one's reach (SEFE, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lab.adapters import LowRank
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import State

from ._adapters import PastAdapters

_BITS = 8


@dataclass
class RegLoRA(PastAdapters):
    """A new low-rank adapter for every experience, which is held back where those of the past changed the weights most.

    As ``lora-inc`` (merging an adapter into the weights is the same function), and after each experience the ``share`` of
    entries that are largest in ``|B_t A_t|`` of each matrix joins the matrix's mask ``Ω_m``. The loss of later ones gains

        ``λ · mean_m  mean_{(i,j) ∈ Ω_m} |(B A)_{ij}|``

    of the adapter that learns (SEFE, ICML 2025: RegLoRA, λ = 2500, the top 2 %); with ``S = sign(B A)`` on the mask, zero
    elsewhere, and M matrices, its gradient is ``λ/(M|Ω_m|) S Aᵀ`` at ``B`` and ``λ/(M|Ω_m|) Bᵀ S`` at ``A``. ``B A`` stands
    without ``α/r``, as in the released code. That keeps an entry in the mask once for each experience that chose it, so
    that repeated ones weigh more, and divides by the layers of one model; here a mask is a set, and M is counted.
    """

    whole_parameters: ClassVar[bool] = True

    strength: float = knob(2500.0, doc="λ, the weight of the penalty on masked entries of B·A", ge=0)
    share: float = knob(0.02, doc="share of a matrix's entries that each experience adds to its mask", gt=0, le=1)

    # Masks by path of their layer, packed: uint8 [⌈outputs · inputs / 8⌉], entry e in bit e mod 8 of byte ⌊e / 8⌋.
    _masks: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    # Not state: what they unpack to where they are used, with the number of entries in them.
    _unpacked: dict[Any, tuple[Tensor, int]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 1.0, "share": 0.05}  # masks of the toys' matrices are small, so the mean over one is steep

    def adjust_gradients(self, learner: Learner) -> None:
        if not self._masks or self.strength == 0:
            return
        parameters = learner.parameters()
        with learner.gradients() as gradients:
            for path, (a, b) in self._trained(parameters).items():
                layer = self._layers[path]
                mask, n = self._mask(path, a.device, (len(b), a.shape[1]))
                signs = (b @ a).sign_().mul_(mask)
                step = self.strength / (len(self._layers) * n)
                for name, slope in ((layer.a, b.T @ signs), (layer.b, signs @ a.T)):
                    if name in gradients:
                        gradients[name].add_(slope, alpha=step)

    def penalty(self, learner: Learner) -> float:
        if not self._masks or self.strength == 0:
            return 0.0
        total = 0.0
        for path, (a, b) in self._trained(learner.parameters()).items():
            mask, n = self._mask(path, a.device, (len(b), a.shape[1]))
            total += float((b @ a).abs_().mul_(mask).sum()) / n
        return self.strength * total / len(self._layers)

    def _trained(self, parameters: dict[str, Tensor]) -> dict[str, LowRank]:
        """Adapters whose layer has a mask, in float32; what is frozen adds nothing."""
        return {
            path: LowRank(parameters[layer.a].float(), parameters[layer.b].float())
            for path, layer in self._layers.items()
            if path in self._masks and layer.a in parameters and layer.b in parameters
        }

    def _mask(self, path: str, device: torch.device, shape: tuple[int, int]) -> tuple[Tensor, int]:
        key = (path, device)
        if key not in self._unpacked:
            mask = unpacked(self._masks[path], shape)
            self._unpacked[key] = mask.to(device), int(mask.sum())
        return self._unpacked[key]

    def consolidate(self, path: str, ended: LowRank) -> None:
        sizes = (ended.b.float() @ ended.a.float()).abs_().flatten()
        _, largest = sizes.topk(max(1, round(self.share * len(sizes))))
        chosen = largest[sizes[largest] > 0]  # of an adapter that learnt nothing, none
        if len(chosen) == 0:
            return
        mask = torch.zeros(len(sizes), dtype=torch.bool)
        mask[chosen] = True
        self._masks[path] = packed(mask) | self._masks[path] if path in self._masks else packed(mask)
        self._unpacked.clear()

    def measures(self) -> dict[str, float]:
        """With the rank, the bytes of all masks and the share of the entries of their matrices that is in them."""
        entries = sum(len(self._past[path].b) * self._past[path].a.shape[1] for path in self._masks)
        masked = sum(int(unpacked(mask, (len(mask), _BITS)).sum()) for mask in self._masks.values())
        size = float(sum(len(mask) for mask in self._masks.values()))
        return super().measures() | {"mask_bytes": size, "masked": masked / max(1, entries)}

    def state_dict(self) -> State:
        return super().state_dict() | {"masks": dict(self._masks)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        masks: Any = state["masks"]
        self._masks = dict(masks)
        self._unpacked.clear()


def packed(mask: Tensor) -> Tensor:
    """Booleans as bits: ``[n]`` bool → ``[⌈n / 8⌉]`` uint8, filled up with zeros."""
    bits = F.pad(mask.to(torch.uint8), (0, -len(mask) % _BITS)).view(-1, _BITS)
    return (bits << torch.arange(_BITS, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`packed`, as a bool tensor of ``shape``."""
    whole = (bits[:, None] >> torch.arange(_BITS, dtype=torch.uint8)) & 1
    return whole.flatten()[: shape[0] * shape[1]].view(shape).bool()
