"""What ``der`` and ``derpp`` share: samples are kept with the logits they had, and drawn again to be held to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Batch, Experience, TensorData

from ._means import weights_of
from ._rehearsal import Rehearsal, join

IMPOSSIBLE = torch.finfo(torch.float32).min
"""Stands for the ``-inf`` of an impossible output in the memory, so that everything kept is finite."""

_CHUNK = 1024  # samples per pass where logits are made after an experience


@dataclass
class Dark(Rehearsal):
    """Rehearsal of stored logits (abstract: :meth:`label_strength` says how much of the labels comes with it).

    Rows of a batch are the current ones, then those drawn for their labels, then those drawn for their logits. The last
    kind is weighted like any other, so that terms add up over ranks and pieces; as the training loss takes it for
    labelled rows, :meth:`adjust_loss` puts the squared distance in place of its cross-entropy.
    """

    alpha: float = knob(0.3, doc="weight of the mean squared distance to the stored logits", ge=0)
    insert: Literal["auto", "experience", "stream"] = knob(
        "stream",
        doc="when samples enter: as they pass, after their experience (with the logits of its end), or auto by boundaries",
    )
    insert_epochs: Literal["all", "first"] = knob(
        "all", doc="as samples pass: they enter with the logits of every epoch, or of the first only"
    )

    _passing: Batch | None = field(default=None, init=False, repr=False)  # from mix to observe_outputs of one step

    def label_strength(self) -> float:
        """The weight of the cross-entropy of rows drawn for their labels."""
        return 0.0

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        n = batch.current
        # Rows as they are now: what observe_outputs sees may have been augmented since.
        self._passing = Batch(batch.x[:n], batch.y[:n], batch.t[:n], n, epoch=batch.epoch)
        return self._rehearse(batch, learner) if len(self._memory) else batch

    def _rehearse(self, batch: Batch, learner: Learner) -> Batch:
        beta = self.label_strength()
        matched, labelled = self._choose(self.alpha, learner), self._choose(beta, learner)
        n, m, k = len(batch), len(labelled), len(matched)
        if m + k == 0:
            return batch
        index = torch.cat([labelled, matched])
        drawn = {name: self._memory.columns[name].index_select(0, index) for name in ("x", "y", "t")}
        stored = self._memory.columns["logits"].index_select(0, matched)
        return join(
            batch,
            drawn,
            weights_of((1, n), (beta, m), (self.alpha, k)),
            logits=torch.cat([stored.new_zeros(n + m, stored.shape[1]), stored]),
            matched=torch.arange(n + m + k) >= n + m,
        )

    def _choose(self, strength: float, learner: Learner) -> Tensor:
        """Rows of the memory for a term of this strength, without replacement; none where it is zero."""
        if strength == 0:
            return torch.empty(0, dtype=torch.int64)
        size = self.replay_batch_size or learner.training_batch_size
        return torch.randperm(len(self._memory), generator=learner.rng)[:size]

    @property
    def replaces_loss(self) -> bool:
        return True

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        stored = batch.extra.get("logits")
        if stored is None:
            return loss
        outputs = outputs.float()
        distance = mean_squared_distance(outputs, stored)
        taken = F.cross_entropy(outputs, batch.y, reduction="none")
        return loss + learner.average(torch.where(batch.extra["matched"], distance - taken, 0.0), batch)

    def observe_outputs(self, batch: Batch, outputs: Tensor, learner: Learner) -> None:
        passing, self._passing = self._passing, None
        if passing is None or not self.streams(learner) or (self.insert_epochs == "first" and passing.epoch > 0):
            return
        rows = self.rows_of(TensorData(passing.x, passing.y, passing.t))
        # They stay on the device unless they enter the memory, which late in a stream few do.
        rows["logits"] = finite(outputs[: passing.current])
        self._memory.add(rows, learner.rng)

    @torch.no_grad()
    def after_experience(self, experience: Experience, learner: Learner) -> None:
        if self.streams(learner):
            return
        data, model = experience.train, learner.replica()
        logits = [
            finite(model(learner.prepare_input(x), t.to(learner.device)))
            for x, t in zip(data.x.split(_CHUNK), data.t.split(_CHUNK), strict=True)
        ]
        self._memory.add(self.rows_of(data, logits=torch.cat(logits)), learner.rng)


def finite(logits: Tensor) -> Tensor:
    """Logits as the memory holds them: float32, :data:`IMPOSSIBLE` for ``-inf``."""
    return logits.float().clamp(min=IMPOSSIBLE)


def mean_squared_distance(outputs: Tensor, stored: Tensor) -> Tensor:
    """Per row the mean of ``(h − z)²`` over the outputs that were possible when stored and are so now, ``[B]``."""
    both = (stored > IMPOSSIBLE) & (outputs > float("-inf"))
    return torch.where(both, outputs - stored, 0.0).square().sum(dim=1) / both.sum(dim=1).clamp(min=1)
