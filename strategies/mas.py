"""Memory aware synapses (Aljundi et al., ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Experience, Objective

from . import _fisher
from ._quadratic import QuadraticPull


@dataclass
class MAS(QuadraticPull):
    """Pull parameters back to where the past left them, in proportion to how much the outputs depend on them.

    After each experience the importance grows by the mean sensitivity of the squared norm of the outputs, sample by sample,

        ``Ω ← Ω + 1/N · Σ_n |∂‖F(x_n; θ*)‖² / ∂θ|``,

    and the loss gains ``λ Σ Ω (θ − θ*)²`` with ``θ*`` the parameters after the last experience (Aljundi et al. 2018,
    arXiv 1711.09601, "global MAS", ℓ₂² form). No label is looked at. ``F`` are the logits; impossible ones (other tasks'
    heads) do not count. Much code takes the absolute gradient of a batch's sum instead, in which samples cancel: it is
    smaller, so a strength found with it means nothing here.
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification", "regression"})

    strength: float = knob(1.0, doc="λ, the weight of the penalty λ·Ω(θ−θ*)²", ge=0)
    samples: int | None = knob(None, doc="samples drawn for the importance; null takes the whole experience", ge=1)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 0.05}  # a step must not overshoot: lr · 2λ · Ω < 2

    @property
    def stiffness(self) -> float:
        return 2 * self.strength

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        data = experience.train
        if self.samples is not None and self.samples < len(data):
            data = data.take(torch.randperm(len(data), generator=learner.rng)[: self.samples])
        summed = _fisher.sensitivity(
            learner.replica(), learner.shard(data), prepare=learner.prepare_input, batch_size=512
        )
        self._place(learner.device)
        for name, theta in learner.parameters().items():
            gained = learner.reduce(summed[name]) / len(data)
            old = self._precision.get(name)
            self._precision[name] = gained if old is None else old + gained
            self._anchor[name] = theta.clone()
