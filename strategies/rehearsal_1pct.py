"""Rehearsal of a small share of every past experience, mixed into the new one (CT0: Scialom et al., EMNLP 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, Experience, Objective, State, TensorData


@dataclass
class RehearsalShare(Strategy):
    """Shuffle a hundredth of every past experience into the training set of the new one, and train as usual.

    "Fine-tuned language models are continual learners" (Scialom et al. 2022, arXiv 2205.12393): with 1 % of the past in one
    shuffled mixture nearly all of a language model's earlier skills stay. ``replay`` draws from its memory in every
    step, so that old and new samples may weigh alike; here a remembered sample comes once per epoch, like any other.

    The samples kept are drawn at random, without repetition (the released code draws with it), once, when their experience
    ends.
    """

    needs_boundaries: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    share: float = knob(
        0.01, doc="share of each past experience's samples that is kept; at least one sample", gt=0, le=1
    )

    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # x, y, t

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"share": 0.2}

    def training_set(self, experience: Experience, learner: Learner) -> TensorData | None:
        if not self._kept:
            return experience.train
        return TensorData.concat([experience.train, TensorData(self._kept["x"], self._kept["y"], self._kept["t"])])

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        data = experience.train
        n = max(1, round(self.share * len(data)))
        some = data.take(torch.randperm(len(data), generator=learner.rng)[:n])
        rows = {"x": some.x, "y": some.y, "t": some.t}
        self._kept = {k: torch.cat([self._kept[k], v]) if self._kept else v for k, v in rows.items()}

    def measures(self) -> dict[str, float]:
        """Samples kept."""
        return {"memory_samples": float(len(self._kept.get("y", ())))}

    def state_dict(self) -> State:
        return {"kept": dict(self._kept)}

    def load_state_dict(self, state: State) -> None:
        kept: Any = state["kept"]
        self._kept = dict(kept)
