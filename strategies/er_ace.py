"""ER-ACE: experience replay with an asymmetric cross-entropy (Caccia et al., ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Batch, State

from ._means import weights_of
from ._rehearsal import Rehearsal, join


@dataclass
class ERACE(Rehearsal):
    """Replay whose current rows compete only among the classes of their own batch, so new classes do not push old ones.

    With ``C_curr`` the classes of the current batch and ``C_old`` those met before, the loss is the sum of two means,

        ``CE(current rows; C_curr)  +  CE(memory rows; C_old ∪ C_curr)``,

    each cross-entropy with a softmax over the classes named. This holds from the first step on; while the memory is
    empty the second term is absent. Released variants differ there: Mammoth trains the first task by the full
    cross-entropy without rehearsal and later lets current rows compete with unmet classes too; Avalanche uses the full
    cross-entropy until it rehearses, and halves both terms.

    Samples enter the memory as they pass: rehearsal is where current classes meet the old ones.
    """

    insert: Literal["auto", "experience", "stream"] = knob(
        "stream", doc="when samples enter: as they pass, after their experience, or auto by the stream's boundaries"
    )

    _seen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), init=False, repr=False)
    _allowed: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # of this step, on the device

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        present = torch.zeros(learner.stream.n_classes, dtype=torch.bool)
        present[batch.y[: batch.current]] = True
        self._seen = present | self._seen if len(self._seen) else present
        self._allowed = present.to(learner.device), self._seen.to(learner.device)
        mixed = self._rehearse(batch, learner) if len(self._memory) else batch
        self.enter(batch, learner)
        return mixed

    def _rehearse(self, batch: Batch, learner: Learner) -> Batch:
        drawn = self.draw(learner)
        return join(batch, drawn, weights_of((1, len(batch)), (1, len(drawn["y"]))))

    @property
    def replaces_loss(self) -> bool:
        return True

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        assert self._allowed is not None
        present, seen = self._allowed
        outputs = outputs.float()
        current = torch.arange(len(outputs), device=outputs.device) < batch.current
        allowed = torch.where(current.unsqueeze(1), present, seen)
        asymmetric = F.cross_entropy(torch.where(allowed, outputs, float("-inf")), batch.y, reduction="none")
        # Taking away the very function that the training loss is cancels its gradient to the last bit, so that outputs
        # not allowed get a gradient of zero and not of rounding errors, which Adam would make steps of.
        return loss + learner.average(asymmetric - F.cross_entropy(outputs, batch.y, reduction="none"), batch)

    def state_dict(self) -> State:
        return super().state_dict() | {"seen": self._seen}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        seen = state["seen"]
        assert isinstance(seen, Tensor)
        self._seen = seen
