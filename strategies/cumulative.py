"""Cumulative training, the upper bound of rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, Experience, Objective, State, TensorData

from ._fresh import fresh_weights


@dataclass
class Cumulative(Strategy):
    """Train on all experiences seen so far, once more with each new one (upper bound of rehearsal; keeps every sample).

    The model goes on from where it stands. A network that has settled on its first samples may learn later ones worse than
    a fresh one would; with ``fresh`` every experience starts from the weights of the beginning, so that row i of the score
    matrix is an offline learner's of experiences up to i, which is what REMIND's Ω divides by. Parameters that are frozen
    stay as they are. Take ``training.optimizer_state: fresh`` with it.
    """

    needs_boundaries: ClassVar[bool] = True
    reference: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    fresh: bool = knob(False, doc="start each time from the weights that the model began with")

    _first: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if not self.fresh:
            return
        if experience.index == 0:
            self._first = learner.weights()
        else:
            learner.set_weights(fresh_weights(self._first, learner))

    def training_set(self, experience: Experience, learner: Learner) -> TensorData | None:
        return TensorData.concat([e.train for e in learner.stream.experiences[: experience.index + 1]])

    def state_dict(self) -> State:
        return {"first": dict(self._first)} if self.fresh else {}

    def load_state_dict(self, state: State) -> None:
        first = state.get("first", {})
        assert isinstance(first, dict)
        self._first = {name: v for name, v in first.items() if isinstance(v, Tensor)}
