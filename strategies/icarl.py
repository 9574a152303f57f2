"""iCaRL: incremental classifier and representation learning (Rebuffi et al., CVPR 2017)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, State, TensorData

from ._distillation import Teacher
from ._features import features_of, herd


@dataclass
class ICaRL(Strategy):
    """Answer with the class whose exemplars' mean feature is nearest; train on exemplars too, distilling the old model.

    At most ``memory`` exemplars are shared by the classes met, ``m`` each. An experience is learnt on its samples together
    with all exemplars, ``g_y`` the sigmoid of output y and ``q_y`` that of the model before the experience, with

        ``ℓ = −Σ_new [δ_{y=y_i} log g_y + δ_{y≠y_i} log(1 − g_y)] − Σ_old [q_y log g_y + (1 − q_y) log(1 − g_y)]``

    over the classes of the experience (new) and the other classes met (old), averaged over samples. Then every old class
    keeps its first ``m`` exemplars, and each new one gets ``m`` by herding: one after another the sample that brings the
    mean of the chosen nearest to the class mean. The answer is ``argmin_y ‖φ(x) − μ_y‖`` with ``μ_y`` the mean over
    exemplars. Features ``φ`` and all means are scaled to unit length (paper, section 2 and algorithms 1–5).

    Means are taken anew after each experience. Within one, whose classes have none yet, the outputs answer: in anytime
    scores, and on the samples held out for early stopping. Of outputs that the head makes impossible, no loss is taken and
    none is answered. A class met again counts as new, its old exemplars among the candidates.
    """

    needs_boundaries: ClassVar[bool] = True
    uses_features: ClassVar[bool] = True
    gathers: ClassVar[bool] = True

    memory: int = knob(2000, doc="exemplars kept in all, K; each class met has an equal share", ge=1)
    loss: Literal["bce", "cross-entropy"] = knob(
        "bce", doc="bce: sigmoids with distillation (paper); cross-entropy: plain, over samples and exemplars"
    )

    temperature: float = knob(
        1.0,
        doc="the old model's outputs are divided by it before their sigmoid: 1 (paper), 2 (van de Ven's code)",
        gt=0,
    )

    _exemplars: TensorData | None = field(default=None, init=False, repr=False)  # by class, most important first
    _means: Tensor | None = field(
        default=None, init=False, repr=False
    )  # [C, d]; rows of unknown classes are zero; none in training
    _known: list[int] = field(default_factory=list, init=False, repr=False)  # classes met, those in training included
    _new: list[int] = field(default_factory=list, init=False, repr=False)
    _teacher: Teacher = field(default_factory=Teacher, init=False, repr=False)  # the model before the experience
    _masks: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # not state: known, new

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"memory": 60}

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        self._new = list(experience.classes)
        self._known = sorted({*self._known, *self._new})
        self._masks = self._means = None
        if self.memory < len(self._known):
            raise ConfigError(
                f"strategy icarl: memory = {self.memory} leaves no exemplar for each of {len(self._known)} classes; give "
                f"at least {learner.stream.n_classes}"
            )
        if self._distils():
            self._teacher.take(learner)

    def training_set(self, experience: Experience, learner: Learner) -> TensorData:
        if self._exemplars is None:
            return experience.train
        return TensorData.concat([experience.train, self._exemplars])

    @property
    def replaces_loss(self) -> bool:
        return self.loss != "cross-entropy"

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        if self.loss == "cross-entropy":
            return loss
        outputs = outputs.float()
        values = self._cross_entropies(outputs, batch, learner)
        # In place of the cross-entropy alone: what a chain's other strategies added stays.
        return loss + learner.average(values, batch) - learner.loss(outputs, batch)

    def _cross_entropies(self, outputs: Tensor, batch: Batch, learner: Learner) -> Tensor:
        """``ℓ`` of each row."""
        if self._masks is None:
            known, new = (torch.zeros(outputs.shape[1], dtype=torch.bool) for _ in range(2))
            known[self._known], new[self._new] = True, True
            self._masks = known.to(outputs.device), new.to(outputs.device)
        known, new = self._masks
        targets = F.one_hot(batch.y, outputs.shape[1]).to(outputs.dtype)
        if self._distils():
            before = torch.sigmoid(self._teacher.outputs(batch, learner) / self.temperature)
            targets = torch.where(new, targets, before)
        counted = known & outputs.isfinite()
        logits = outputs.masked_fill(~counted, 0.0)
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each.masked_fill(~counted, 0.0).sum(dim=1)

    def _distils(self) -> bool:
        return self.loss == "bce" and len(self._known) > len(self._new)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._teacher = Teacher()
        share = self.memory // len(self._known)
        model = learner.replica()
        data = experience.train if self._exemplars is None else self.training_set(experience, learner)
        old = 0 if self._exemplars is None else len(self._exemplars)
        features = F.normalize(features_of(model, data, learner), dim=1)
        labels, place = data.y.to(features.device), torch.arange(len(data), device=features.device)
        chosen, means = [], features.new_zeros(learner.stream.n_classes, features.shape[1])
        for label in self._known:
            rows = place[labels == label]
            # Exemplars come last, in their order of importance.
            rows = rows[herd(features[rows], share)] if label in self._new else rows[rows >= len(data) - old][:share]
            chosen.append(rows)
            means[label] = features[rows].mean(dim=0)
        self._exemplars = data.take(torch.cat(chosen).to(data.y.device))
        self._means = F.normalize(means, dim=1)

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        outputs = learner.forward(batch)
        if self._means is None:
            return outputs
        self._means = self._means.to(outputs.device)
        features = F.normalize(learner.features(batch).float(), dim=1)
        # Both are of unit length, so the nearest mean is the one with the largest product.
        answerable = outputs.isfinite() & (self._means.square().sum(dim=1) > 0)
        scores = (features @ self._means.T).masked_fill(~answerable, float("-inf"))
        return torch.where(answerable.any(dim=1, keepdim=True), scores, outputs.float())

    def state_dict(self) -> State:
        held, means = self._exemplars, self._means
        return {
            "exemplars": {} if held is None else {"x": held.x, "y": held.y, "t": held.t, "raw": held.raw},
            "means": {} if means is None else {"means": means.cpu()},
            "known": list(self._known),
            "new": list(self._new),
            "teacher": self._teacher.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        held: Any = state["exemplars"]
        means: Any = state["means"]
        known, new = state["known"], state["new"]
        assert isinstance(known, list)
        assert isinstance(new, list)
        self._exemplars = TensorData(held["x"], held["y"], held["t"], held["raw"]) if held else None
        self._means = means["means"] if means else None
        self._known, self._new = [int(c) for c in known], [int(c) for c in new]
        self._teacher, self._masks = Teacher(), None
        self._teacher.load_state_dict(state["teacher"])
