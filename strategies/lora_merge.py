"""Weight factorisation and centralisation: an adapter for each experience, brought together in shared weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob

from ._adapters import PastAdapters


@dataclass
class LoRAMerge(PastAdapters):
    """Factorise and centralise: learn each experience as a low-rank adapter, then merge it into shared weights.

    In the t-th experience a fresh adapter learns on top of the shared weights ``W_{t−1}``; then (Weight Factorisation and
    Centralisation, Interspeech 2025)

        ``mean``:  ``W_t = W₀ + (1/t) Σ_{i≤t} (α/r) B_i A_i``        ``sum``:  ``W_t = W_{t−1} + c (α/r) B_t A_t``.

    The paper's exact rule is in no source that was at hand; these are the two readings of it. With ``mean`` every experience
    counts the same, and the model right after an experience is not the one that learnt it: each adapter was trained with
    the others at another weight. ``sum`` with ``c = 1`` is ``lora-inc``. Shared weights are kept as their factors, exactly.
    """

    rule: Literal["mean", "sum"] = knob("mean", doc="shared weights change by the adapters' mean, or by c times each")
    weight: float = knob(1.0, doc="c, what a merged adapter counts with rule: sum", gt=0)

    def __post_init__(self) -> None:
        if self.rule == "mean" and self.weight != 1:
            raise ConfigError(f"weight = {self.weight}: a mean gives every adapter the same weight; set rule=sum")

    def shares(self, n: int) -> list[float]:
        return [1 / n if self.rule == "mean" else self.weight] * n
