"""I-LoRA: fast weights that learn, slow ones that remember (Ren et al., arXiv 2402.18865)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lab.adapters import LowRank
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Batch, Objective, State

from ._distillation import Teacher, answer_places
from ._rehearsal import Rehearsal, join

_STATISTICS_EVERY = 10
"""Steps between two looks at the fast model's running statistics, for the slow states that guide the fast ones."""


@dataclass
class ILoRA(Rehearsal):
    """Train fast weights on new and remembered samples, and let slow ones follow: their hidden states guide the memory's.

    What is trained (a language model's LoRA adapters, or every weight of another model) are the fast weights ``θ_f``; the
    slow ones begin as their copy and follow after each step,

        ``θ_s ← λ_k θ_s + (1 − λ_k) θ_f``,  ``λ_k = min(1 − 1/(k+1), λ)``

    (without ``warm_up``, ``λ_k = λ``). Each batch comes with one from the memory; with ``h`` what the head sees, at an
    answer's places where the answer is a text, the loss is

        ``CE(new and remembered) + γ · mean over the remembered of (h_f − h_s)²``.

    The slow weights answer, unless ``serve`` says the fast ones. After each experience the others are scored, too, on all
    that was met: ``ilora/fast_accuracy`` (or ``slow``) in the measures is their mean, ``…_exp_<j>`` that of one experience.
    It changes nothing in training; ``score_both: false`` saves the time. Only past experiences are remembered.

    In the released code the slow adapter never moves and so is the model as it was before all training, and its states
    pull only where they are the greater ones. ``variant: released`` does that, to tell how much of a gain is the moving
    average's. Running statistics of normalisation layers, and what a growing head has met, are those of the fast model.
    """

    uses_features: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification", "language"})

    decay: float = knob(0.99, doc="λ, the share of the slow weights that stays at each step", ge=0, lt=1)
    warm_up: bool = knob(True, doc="let the slow weights be the plain mean of the fast ones until λ takes over")
    strength: float = knob(1.0, doc="γ, the weight of the hidden states' distance", ge=0)
    serve: Literal["slow", "fast"] = knob("slow", doc="which weights answer")
    score_both: bool = knob(
        True, doc="score the weights that do not answer, too (ilora/fast_accuracy, …): evaluation takes twice the time"
    )
    variant: Literal["paper", "released"] = knob(
        "paper", doc="released: slow weights that never move, a one-sided pull"
    )

    _slow: Teacher = field(default_factory=Teacher, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)
    _looked: int = field(default=-1, init=False, repr=False)  # not state: the step whose buffers are lent
    _lent: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # not state
    _share: float = field(default=0.0, init=False, repr=False)  # not state: of remembered rows in the present batch

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return super().conformance_knobs() | {"decay": 0.8, "strength": 0.1}

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        if not self._slow:
            self._slow.take(learner)
        mixed = batch
        if len(self._memory):
            drawn = self.draw(learner)
            remembered = torch.arange(len(batch) + len(drawn["y"])) >= len(batch)
            mixed = join(batch, drawn, remembered=remembered)
            self._share = 1 - len(batch) / len(mixed)
        self.enter(batch, learner)
        return mixed

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        if batch.current == len(batch) or "remembered" not in batch.extra or self.strength == 0:
            return loss
        rows = batch.extra["remembered"].nonzero().squeeze(1)  # what another strategy rehearses has no mark
        if not len(rows):
            return loss
        x, y, t = (v.index_select(0, rows) for v in (batch.x, batch.y, batch.t))
        old = Batch(x, y, t, 0, epoch=batch.epoch, raw=batch.raw)
        slow = self._slow.outputs_and_features(old, learner)[1]
        fast = learner.features(batch).index_select(0, rows).float()
        if fast.dim() == 3:  # the longest answer of the whole batch may be longer than the memory's
            fast = fast[:, : slow.shape[1]]
        apart = slow - fast
        if self.variant == "released":  # (fast − max(fast, slow))²
            apart = apart.clamp(min=0)
        distance = apart.square().mean(-1)
        if distance.dim() == 2:
            said = answer_places(old, learner)[:, : distance.shape[1]]
            distance = (distance * said).sum(1) / said.sum(1)
        # A mean over the remembered rows of the whole step, as one over all rows, most of them zero.
        each = distance.new_zeros(len(batch)).index_copy(0, rows, distance / self._share)
        return loss + self.strength * learner.average(each, batch)

    def after_step(self, learner: Learner) -> None:
        self._steps += 1
        if self.variant == "paper":
            decay = min(1 - 1 / (self._steps + 1), self.decay) if self.warm_up else self.decay
            self._slow.follow(learner, 1 - decay)
        if self._steps % _STATISTICS_EVERY == 0:
            self._slow.take_buffers(learner)

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        if self.serve == "fast" or not self._slow:
            return learner.forward(batch)
        if self._looked != self._steps:
            self._looked, self._lent = self._steps, self._slow.buffers_of(learner)
        return self._slow.outputs(batch, learner, self._lent)

    def other_answers(self, learner: Learner) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Those of the weights that do not serve."""
        if not self.score_both or not self._slow:
            return {}
        if self.serve == "slow":
            return {"fast": learner.forward}
        # Running statistics are lent: what the slow model has of its own takes part in training.
        buffers = self._slow.buffers_of(learner)
        return {"slow": lambda batch: self._slow.outputs(batch, learner, buffers)}

    def adapters(self, learner: Learner) -> dict[str, LowRank]:
        if self.serve == "fast" or not self._slow:
            return super().adapters(learner)
        return self._slow.adapters(learner)

    def state_dict(self) -> State:
        return super().state_dict() | {"slow": self._slow.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        steps = state["steps"]
        assert isinstance(steps, int)
        self._steps, self._looked = steps, -1
        self._slow.load_state_dict(state["slow"])
