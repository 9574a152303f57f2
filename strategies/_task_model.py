"""A model that runs with other weights for every task: what hypernetworks and relevance maps share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lab.errors import ConfigError
from cl_lab.records import Experience

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class TaskModel(nn.Module):
    """The plug-in model's own backbone and head, called with the tensors that a subclass makes for a task.

    A batch may mix tasks: each task's rows pass through the backbone with its tensors, and the head sees the features of
    the whole batch each time (it is small, and who listens at the head gets all rows). Running statistics of
    normalisation layers are a task's own; other buffers (a head's mask) are shared.

    Made by :func:`adopt`, which adds the plug-in model's class as a base, so that what the learner does for such models
    (telling a growing head its classes) goes on working.
    """

    backbone: nn.Module
    head: nn.Module
    labels: Tensor

    def _keep_statistics(self, tasks: int) -> None:
        self.register_buffer("labels", torch.arange(tasks), persistent=False)
        self._running: list[tuple[str, str]] = []  # path of a running statistic below the backbone, and of its bank
        for name, value in self.backbone.named_buffers():
            if name.rpartition(".")[2] in _RUNNING:
                bank = f"statistics_{len(self._running)}"
                self.register_buffer(bank, value.unsqueeze(0).repeat(tasks, *[1] * value.dim()))
                self._running.append((name, bank))

    def tensors(self, task: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What backbone and head run with for ``task`` (int64 ``[1]``), by their own parameters' names."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits ``[B, n_classes]`` of ``x`` ``[B, *input_shape]`` with task labels ``t`` ``[B]``."""
        if len(t) == 1 and not self.training:  # without a look at the label's value: torch.func.vmap hides it
            backbone, head = self.tensors(t)
            backbone |= {name: getattr(self, bank)[t][0] for name, bank in self._running}
            h = functional_call(self.backbone, backbone, (x,))
            logits: Tensor = functional_call(self.head, head, (h, t))
            return logits
        tasks = t.unique().tolist()
        made = [self.tensors(self.labels[k : k + 1]) for k in tasks]
        # A view of the bank, which the layer updates in place.
        running = [{name: getattr(self, bank)[k] for name, bank in self._running} for k in tasks]
        if len(tasks) == 1:
            h = functional_call(self.backbone, made[0][0] | running[0], (x,))
        else:
            rows = [(t == k).nonzero().flatten() for k in tasks]
            parts = [
                functional_call(self.backbone, made[i][0] | running[i], (x.index_select(0, rows[i]),))
                for i in range(len(tasks))
            ]
            h = torch.cat(parts).index_select(0, torch.cat(rows).argsort())
        outputs: Tensor = functional_call(self.head, made[0][1], (h, t))
        for k, (_, head) in list(zip(tasks, made, strict=True))[1:]:
            outputs = torch.where((t == k).unsqueeze(1), functional_call(self.head, head, (h, t)), outputs)
        return outputs

    def features(self, x: Tensor) -> Tensor:
        """Refused: features depend on the task."""
        raise ConfigError(
            f"strategy chain: another strategy wants features without a task, but those of {type(self).__name__} "
            "depend on the task; keep one of the two"
        )

    def split(self, stage: str) -> list[str]:
        """Refused: no layer is the same for all tasks."""
        raise ConfigError(
            f"strategy chain: another strategy cuts the network behind '{stage}', but no layer of "
            f"{type(self).__name__} is the same for all tasks; keep one of the two"
        )


def adopt(kind: type[TaskModel], model: nn.Module, method: str) -> Any:
    """The class of ``kind`` for ``model``: a subclass of its class, too. Raises :class:`ConfigError` where it cannot be."""
    if isinstance(model, TaskModel):
        raise ConfigError(f"strategy chain: {method} and another strategy both give every task its weights; keep one")
    if getattr(model, "cut", None) is not None:
        raise ConfigError(
            f"strategy chain: {method} gives every task its own weights, so no layers can be cut off and frozen as "
            "another strategy wants; keep one of the two"
        )
    if not all(isinstance(getattr(model, part, None), nn.Module) for part in ("backbone", "head")):
        raise ConfigError(
            f"{method} needs a model that is a backbone and a head, got {type(model).__name__}; see cl-lab list models"
        )
    return type(kind.__name__, (kind, type(model)), {})


def labels_of(experience: Experience, tasks: int) -> list[int]:
    """The task labels of an experience, ascending. Raises :class:`ConfigError` for one beyond ``tasks``."""
    labels: list[int] = experience.train.t.unique().tolist()
    if labels[-1] >= tasks:
        raise ConfigError(
            f"{experience!r} has task label {labels[-1]}, but the stream has {tasks} experiences; "
            "number tasks by their experience"
        )
    return labels
