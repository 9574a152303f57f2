"""Learning without forgetting (Li & Hoiem, ECCV 2016; TPAMI 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, Objective, State, Stream

from ._distillation import Teacher, Unmasked, divergence


@dataclass
class LwF(Strategy):
    """Keep answering new samples, at the outputs known before, as the model did before this experience.

    With the model as it stood before the experience as teacher, and ``p^T = softmax(z/T)``, the loss becomes

        ``CE + λ T² Σ_k KL(p^T_teacher,k ‖ p^T_k)``,

    one term per old task where task labels are told (the present samples, answered by that task's outputs), else a single
    term over all outputs met in the past. Li & Hoiem (2016, arXiv 1606.09282) sum over old tasks and write the
    cross-entropy, which has the same gradient, without ``T²`` (Hinton et al. 2015): theirs is ``λ/T²`` here.

    ``weighting: experiences`` is van de Ven & Tolias' (2019, arXiv 1904.07734): ``1/t · CE + (1 − 1/t) λT² · mean_k KL`` in
    the t-th experience. ``outputs: seen`` is theirs, too: without task labels the softmax that learns also runs over the
    outputs of the present experience, for which the teacher stands at probability 0.
    """

    needs_boundaries: ClassVar[bool] = True
    instead: ClassVar[Mapping[Objective, str]] = {"language": "kl"}

    strength: float = knob(1.0, doc="λ, the weight of the distillation", ge=0)
    temperature: float = knob(2.0, doc="T, which softens both distributions", gt=0)
    weighting: Literal["sum", "experiences"] = knob(
        "sum", doc="add one term per old task, or 1/t of the loss and 1−1/t of their mean in the t-th experience"
    )
    outputs: Literal["old", "seen"] = knob(
        "old", doc="without task labels: distil within the old outputs, or within all seen, new ones towards 0"
    )

    _past: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)  # {"task", "classes"} each
    _present: list[int] = field(default_factory=list, init=False, repr=False)
    _teacher: Teacher = field(default_factory=Teacher, init=False, repr=False)
    # Not state:
    _groups: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _unmasked: Unmasked = field(default_factory=Unmasked, init=False, repr=False)
    _one_pass: bool | None = field(default=None, init=False, repr=False)

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if stream.task_labels:
            self._unmasked.watch(model)
        return model

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        self._present = list(experience.classes)
        self._groups = self._one_pass = None
        if self._past:
            self._teacher.take(learner)

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        if not self._past:
            return loss
        share = 1 / (len(self._past) + 1) if self.weighting == "experiences" else None
        if self.strength == 0:
            return loss if share is None else share * loss
        learnt, taught = self._answers(batch, outputs, learner)
        each = divergence(learnt, taught, self.temperature)
        each = each.sum(dim=1) if share is None else each.mean(dim=1)
        distilled = self.strength * self.temperature**2 * learner.average(each, batch)
        return loss + distilled if share is None else share * loss + (1 - share) * distilled

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._past.append({"task": experience.index, "classes": list(experience.classes)})

    def _answers(self, batch: Batch, outputs: Tensor, learner: Learner) -> tuple[Tensor, Tensor]:
        """Logits of learner and teacher ``[B, groups, outputs]``, ``-inf`` where a group is smaller or not taught."""
        columns, possible, taught = self._grouped(learner)
        if not learner.stream.task_labels:
            found, told = outputs.float(), self._teacher.outputs(batch, learner)
        else:
            own = self._unmasked.of(outputs)
            told = self._teacher.outputs(batch, learner)
            told_all = self._unmasked.of(told)
            if own is None or told_all is None or not self._one_pass_serves(batch, learner):
                return self._answers_by_task(batch, learner)
            found, told = own.float(), told_all.float()
        shape = (len(batch), *columns.shape)
        found, told = (z.index_select(1, columns.flatten()).view(shape) for z in (found, told))
        return torch.where(possible, found, float("-inf")), torch.where(taught, told, float("-inf"))

    def _answers_by_task(self, batch: Batch, learner: Learner) -> tuple[Tensor, Tensor]:
        """The same for any model, through one pass per old task."""
        columns, possible, taught = self._grouped(learner)
        found, told = [], []
        for group, past in enumerate(self._past):
            asked = replace(batch, t=torch.full_like(batch.t, past["task"]))
            found.append(learner.forward(asked).float().index_select(1, columns[group]))
            told.append(self._teacher.outputs(asked, learner).index_select(1, columns[group]))
        return (
            torch.where(possible, torch.stack(found, dim=1), float("-inf")),
            torch.where(taught, torch.stack(told, dim=1), float("-inf")),
        )

    def _one_pass_serves(self, batch: Batch, learner: Learner) -> bool:
        """Whether a task's outputs are columns of the last layer, whatever task it was asked for; found by asking."""
        if self._one_pass is None:
            columns, possible, _ = self._grouped(learner)
            few = batch.rows(torch.arange(min(2, len(batch)), device=batch.y.device), None)
            at_once = self._unmasked.of(self._teacher.outputs(few, learner))
            assert at_once is not None
            self._one_pass = True
            for group, past in enumerate(self._past):
                asked = replace(few, t=torch.full_like(few.t, past["task"]))
                own = columns[group][possible[group]]
                answered = self._teacher.outputs(asked, learner)[:, own]
                self._one_pass &= torch.allclose(answered, at_once[:, own].float(), rtol=1e-4, atol=1e-6)
        return self._one_pass

    def _grouped(self, learner: Learner) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of each group of outputs ``[groups, outputs]``, which of them exist, and which the teacher knows."""
        if self._groups is None:
            old = [list(past["classes"]) for past in self._past]
            if learner.stream.task_labels:
                groups = [(classes, len(classes)) for classes in old]
            else:
                known = sorted({c for classes in old for c in classes})
                new = [c for c in self._present if c not in known] if self.outputs == "seen" else []
                groups = [(known + new, len(known))]
            width = max(len(classes) for classes, _ in groups)
            columns = torch.tensor([classes + [0] * (width - len(classes)) for classes, _ in groups])
            place = torch.arange(width)
            possible = torch.stack([place < len(classes) for classes, _ in groups])
            taught = torch.stack([place < known for _, known in groups])
            self._groups = (columns.to(learner.device), possible.to(learner.device), taught.to(learner.device))
        return self._groups

    def state_dict(self) -> State:
        return {
            "past": [dict(past) for past in self._past],
            "present": list(self._present),
            "teacher": self._teacher.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        past, present = state["past"], state["present"]
        assert isinstance(past, list)
        assert isinstance(present, list)
        self._past, self._present = [dict(p) for p in past], [int(c) for c in present]
        self._teacher.load_state_dict(state["teacher"])
        self._groups = self._one_pass = None
