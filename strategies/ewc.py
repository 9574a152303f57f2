"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017; online: Schwarz et al., ICML 2018; Huszár 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Experience, Objective, State, Stream, TensorData

from . import _fisher
from ._quadratic import QuadraticPull


@dataclass
class EWC(QuadraticPull):
    """Pull parameters back to where past experiences left them, in proportion to their Fisher information.

    After experience ``t`` with parameters ``θ*_t`` and diagonal Fisher ``F_t``, the loss gains (PNAS 2017, Eq. 3, one term
    per past experience)

        ``Σ_t λ/2 · F_t (θ − θ*_t)²``  =  ``λ/2 · A (θ − θ̄)² + constant``,  ``A = Σ_t F_t``, ``θ̄ = Σ_t F_t θ*_t / A``,

    so that any number of past experiences costs one running quadratic: two numbers per parameter. *online* keeps
    ``A ← γ A + F_t`` with ``θ̄ = θ*_t``. Its gradient ``λ A (θ − θ̄)`` is added between backward and step; elementwise, so
    the same under every engine. ``strength`` is not transferable between Fisher variants or between sample counts.

    An answer in words has a label for each of its tokens. There ``fisher=batched`` squares the gradient of the loss that
    is trained, over ``fisher_batch_size`` rows at a time; with 1 that is the empirical Fisher, a row counting as a sample.
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification", "language"})

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

    # The constant, so that the penalty's value is the sum's.
    _offset: float = field(default=0.0, init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 5.0}  # a step must not overshoot: lr · λ · F < 2

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if stream.objective == "language" and self.fisher != "batched":
            raise ConfigError(
                f"fisher = '{self.fisher}': asks for the one label of a sample, but an answer in words has many; set "
                "fisher=batched"
            )
        return super().prepare(model, stream)

    @property
    def stiffness(self) -> float:
        return self.strength

    def _constant(self) -> float:
        return self._offset

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        fisher = self._estimate(experience, learner)
        self._place(learner.device)
        for name, theta in learner.parameters().items():
            new = fisher[name].to(theta.device)
            theta = theta.to(torch.float32, copy=True)  # sums and means of 16 bits would round most of it away
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
        if learner.stream.objective == "language":
            return self._estimate_of_texts(data, learner)
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

    def _estimate_of_texts(self, data: TensorData, learner: Learner) -> dict[str, Tensor]:
        places = torch.arange(len(data)).split(self.fisher_batch_size or learner.training_batch_size)
        summed: dict[str, Tensor] = {}
        for rows in places:
            for name, g in learner.gradients_of(data.batch(rows)).items():
                g = g.float()
                summed[name] = summed[name].addcmul_(g, g) if name in summed else g.square()
        return {n: v / len(places) for n, v in summed.items()}

    def state_dict(self) -> State:
        return super().state_dict() | {"offset": self._offset}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        offset = state["offset"]
        assert isinstance(offset, float)
        self._offset = offset
