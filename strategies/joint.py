"""Joint (offline, multi-task) training, the usual upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, Experience, Objective, TensorData


@dataclass
class Joint(Strategy):
    """Train once on all experiences together (upper bound; sees the whole stream).

    Everything is learnt in the first experience, with the optimiser steps of all of them; later experiences add nothing,
    so every row of the score matrix is the same model's.
    """

    needs_boundaries: ClassVar[bool] = True
    reference: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    def training_set(self, experience: Experience, learner: Learner) -> TensorData | None:
        if experience.index > 0:
            return None
        return TensorData.concat([e.train for e in learner.stream.experiences])

    def budget(self, experience: Experience, learner: Learner) -> int:
        return len(learner.stream)
