"""A Kullback–Leibler divergence to the model as it was: the regulariser of policy optimisation, for supervised streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, Objective, State

from ._distillation import Teacher, answer_places, divergence


@dataclass
class KL(Strategy):
    """Stay close to what the model answered before this experience, on the samples it is trained on.

    With ``π`` the distribution over all outputs, and over the vocabulary at each place of a written answer (the mean over
    those), and ``π_prev`` that of the model as it stood before the experience, the loss gains

        ``β · KL(π_prev ‖ π)``   (``towards: previous``, distillation: covers all that was likely), or
        ``β · KL(π ‖ π_prev)``   (``towards: current``, as in reinforcement from feedback: avoids what was unlikely).

    No sample of the past is kept, and those that another link rehearses count like new ones. Unlike ``lwf`` nothing is
    softened and no output is left out, so labels that are new come at the price of the term: it says how far the model may
    move, not where. (MLLM-CTBench finds that policy optimisation without this term forgets more than supervised training,
    with it less; its β is not known to us.)
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification", "language"})

    strength: float = knob(1.0, doc="β, the weight of the divergence", ge=0)
    towards: Literal["previous", "current"] = knob("previous", doc="whose distribution the expectation is under")

    _previous: Teacher = field(default_factory=Teacher, init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 0.1}

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        if not self._previous or self.strength == 0:
            return loss
        previous, now = self._previous.outputs(batch, learner), outputs.float()
        target, model = (previous, now) if self.towards == "previous" else (now, previous)
        apart = divergence(model, target, 1.0)
        if apart.dim() == 2:
            said = answer_places(batch, learner)[:, : apart.shape[1]]
            apart = (apart * said).sum(1) / said.sum(1)
        return loss + self.strength * learner.average(apart, batch)

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        # Not when the last one ended: another strategy may still move what was learnt elsewhere then.
        if experience.index > 0:
            self._previous.take(learner)

    def state_dict(self) -> State:
        return {"previous": self._previous.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self._previous.load_state_dict(state["previous"])
