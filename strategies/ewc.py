"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017; online: Schwarz et al., ICML 2018; Huszár 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Experience, State

from . import _fisher


@dataclass
class EWC(Strategy):
    """Pull parameters back to where past experiences left them, in proportion to their Fisher information.

    After experience ``t`` with parameters ``θ*_t`` and diagonal Fisher ``F_t``, the loss gains (PNAS 2017, Eq. 3, one term
    per past experience)

        ``Σ_t λ/2 · F_t (θ − θ*_t)²``  =  ``λ/2 · A (θ − θ̄)² + constant``,  ``A = Σ_t F_t``, ``θ̄ = Σ_t F_t θ*_t / A``,

    so that any number of past experiences costs one running quadratic: two numbers per parameter. *online* keeps
    ``A ← γ A + F_t`` with ``θ̄ = θ*_t``. Its gradient ``λ A (θ − θ̄)`` is added between backward and step; elementwise, so
    the same under every engine. ``strength`` is not transferable between Fisher variants or between sample counts.
    """

    needs_boundaries: ClassVar[bool] = True

    strength: float = knob(100.0, doc="λ, the weight of the penalty λ/2·F(θ−θ*)²", ge=0)
    mode: Literal["separate", "online"] = knob("separate", doc="a penalty per past experience, or one that decays")
    gamma: float = knob(1.0, doc="decay of the old Fisher per experience in mode online", ge=0, le=1)
    fisher: _fisher.Variant = knob("exact", doc="exact over labels, one label sampled, empirical, or batched")
    fisher_samples: int | None = knob(None, doc="samples drawn for the Fisher; null takes the whole experience", ge=1)
    fisher_batch_size: int | None = knob(
        None,
        doc="samples per pass; null: 512, or for batched the training batch size, on which its result depends",
        ge=1,
    )

    _precision: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # A
    _anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # θ̄
    _scratch: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # not state: a buffer
    _offset: float = field(
        default=0.0, init=False, repr=False
    )  # the constant, so that the penalty's value is the sum's

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 5.0}  # a step must not overshoot: lr · λ · F < 2

    def adjust_gradients(self, learner: Learner) -> None:
        if not self._precision or self.strength == 0:
            return
        parameters = learner.parameters()
        self._place(learner.device)
        with learner.gradients() as gradients:
            for name, gradient in gradients.items():
                precision = self._precision.get(name)
                if precision is not None:
                    if name not in self._scratch:
                        self._scratch[name] = torch.empty_like(precision)
                    pull = torch.sub(parameters[name], self._anchor[name], out=self._scratch[name])
                    gradient.addcmul_(pull, precision, value=self.strength)

    def penalty(self, learner: Learner) -> float:
        parameters = learner.parameters()
        self._place(learner.device)
        quadratic = sum(
            float((self._precision[n] * (p - self._anchor[n]).square()).sum())
            for n, p in parameters.items()
            if n in self._precision
        )
        return self.strength / 2 * (quadratic + self._offset)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        fisher = self._estimate(experience, learner)
        self._place(learner.device)
        for name, theta in learner.parameters().items():
            new = fisher[name].to(theta.device)
            theta = theta.clone()
            old = self._precision.get(name)
            if old is None:
                self._precision[name], self._anchor[name] = new, theta
            elif self.mode == "online":
                self._precision[name], self._anchor[name] = old.mul(self.gamma).add_(new), theta
            else:
                total = old + new
                share = torch.where(total > 0, new / total, 1.0)
                shift = theta - self._anchor[name]
                self._offset += float((old * share * shift.square()).sum())
                self._precision[name], self._anchor[name] = total, self._anchor[name] + share * shift

    def _estimate(self, experience: Experience, learner: Learner) -> dict[str, Tensor]:
        """``F_t``: the mean over the samples drawn, by parameter name."""
        data = experience.train
        if self.fisher_samples is not None and self.fisher_samples < len(data):
            data = data.take(torch.randperm(len(data), generator=learner.rng)[: self.fisher_samples])
        model = learner.replica()
        if self.fisher == "batched":
            size = self.fisher_batch_size or learner.training_batch_size
            summed = _fisher.diagonal(model, data, "batched", prepare=learner.prepare_input, batch_size=size)
            return {n: v / _fisher.batches_in(len(data), size) for n, v in summed.items()}
        uniform = torch.rand(len(data), generator=learner.rng) if self.fisher == "sampled" else None
        mine = learner.shard(data)
        summed = _fisher.diagonal(
            model,
            mine,
            self.fisher,
            prepare=learner.prepare_input,
            batch_size=self.fisher_batch_size or 512,
            uniform=None if uniform is None else learner.shard_rows(uniform),
        )
        return {n: learner.reduce(v) / len(data) for n, v in summed.items()}

    def _place(self, device: torch.device) -> None:
        # A restored state is on the CPU; it moves to the parameters' device on first use.
        if next(iter(self._anchor.values()), torch.empty(0, device=device)).device != device:
            self._precision = {n: v.to(device) for n, v in self._precision.items()}
            self._anchor = {n: v.to(device) for n, v in self._anchor.items()}
            self._scratch.clear()

    def state_dict(self) -> State:
        return {"precision": dict(self._precision), "anchor": dict(self._anchor), "offset": self._offset}

    def load_state_dict(self, state: State) -> None:
        precision, anchor, offset = state["precision"], state["anchor"], state["offset"]
        assert isinstance(precision, dict)
        assert isinstance(anchor, dict)
        assert isinstance(offset, float)
        self._precision = {n: v for n, v in precision.items() if isinstance(v, Tensor)}
        self._anchor = {n: v for n, v in anchor.items() if isinstance(v, Tensor)}
        self._offset = offset
