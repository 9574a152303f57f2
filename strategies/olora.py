"""O-LoRA: adapters in orthogonal subspaces (Wang et al., EMNLP 2023 Findings)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lab.adapters import LowRank
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Experience

from ._adapters import PastAdapters


@dataclass
class OLoRA(PastAdapters):
    """A new low-rank adapter for every experience, kept orthogonal to the frozen ones of the past.

    As ``lora-inc``, and the loss gains, over all adapted layers and all pairs of a row of the new ``A_t`` and one of a past
    ``A_i`` (Wang et al. 2023, arXiv 2310.14152),

        ``λ Σ_layers Σ_{i<t} Σ_{jk} |A_i A_tᵀ|_{jk}``,   whose gradient at ``A_t`` is   ``λ Σ_{i<t} sign(A_i A_tᵀ)ᵀ A_i``.

    The rows of ``A`` span the inputs that an adapter looks at: where the penalty is small, the new one looks elsewhere. It
    depends on scale. ``A_t → 0`` makes it zero as well, which ``B_t`` can make up for; and it grows with the number of
    layers, ranks and experiences, which λ does not know. ``measure: cosine`` takes every row at length 1, so that only
    directions count.

    The gradient is added once per step. The authors' code adds the penalty to each piece of an accumulated batch, outside
    DeepSpeed behind the division by their number, so that there its weight grows with accumulation. Its second term, a sum
    of the norms of ``A_t`` and ``B_t``, has weight 0 in all their runs and is left out.
    """

    whole_parameters: ClassVar[bool] = True

    strength: float = knob(0.5, doc="λ, the weight of the overlap with past adapters", ge=0)
    measure: Literal["product", "cosine"] = knob(
        "product", doc="overlap of two rows: their inner product (paper), or its cosine, which no scale changes"
    )

    # Sum and number of |cosines| of the adapters that ended last; not state: told once per experience.
    _overlap: tuple[float, int] = field(default=(0.0, 0), init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 0.05}

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        self._overlap = (0.0, 0)

    def adjust_gradients(self, learner: Learner) -> None:
        if not self._past or self.strength == 0:
            return
        parameters = learner.parameters()
        with learner.gradients() as gradients:
            for path in self._past:
                name = self._layers[path].a
                if name in gradients:
                    slope = self._overlap_of(path, parameters[name])[1]
                    gradients[name].add_(slope, alpha=self.strength)

    def penalty(self, learner: Learner) -> float:
        if not self._past or self.strength == 0:
            return 0.0
        parameters = learner.parameters()
        names = {path: self._layers[path].a for path in self._past}
        return self.strength * sum(
            float(self._overlap_of(path, parameters[name])[0]) for path, name in names.items() if name in parameters
        )

    def _overlap_of(self, path: str, a: Tensor) -> tuple[Tensor, Tensor]:
        """The overlap of ``a`` ``[r, inputs]`` with the layer's past, and its (sub)gradient ``[r, inputs]``, in float32."""
        a, old = a.float(), self.past(path, a.device, torch.float32).a
        if self.measure == "product":
            products = old @ a.T
            return products.abs().sum(), products.sign().T @ old
        old, lengths = F.normalize(old), a.norm(dim=1, keepdim=True).clamp(min=1e-12)
        directions = a / lengths
        cosines = old @ directions.T
        slope = cosines.sign().T @ old
        along = (slope * directions).sum(1, keepdim=True)  # the part that would change the length alone
        return cosines.abs().sum(), (slope - along * directions) / lengths

    def consolidate(self, path: str, ended: LowRank) -> None:
        if path in self._past:
            cosines = F.normalize(self._past[path].a.float()) @ F.normalize(ended.a.float()).T
            total, n = self._overlap
            self._overlap = total + float(cosines.abs().sum()), n + cosines.numel()

    def measures(self) -> dict[str, float]:
        """With the rank, the mean ``|cosine|`` of a row of the adapter that just ended with one of the past."""
        total, n = self._overlap
        return super().measures() | {"overlap": total / max(1, n)}
