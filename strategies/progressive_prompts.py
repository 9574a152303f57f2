"""Progressive Prompts (Razdaibiedina et al., ICLR 2023, arXiv 2301.12314)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Experience, Stream

from ._prompts import SoftPrompts, sampled

_OWN = "backbone.prefix."


class TaskPrefix(nn.Module):
    """What stands before a text of task j: ``[p_j, …, p_1]``, of those prompts that there are.

    ``fresh`` ``[L, D]`` is the newest prompt, before the network that may rewrite it; ``past`` ``[tasks, L, D]`` holds the
    ``learnt`` ones before it as they ended, and ``learning`` says whether there is a newest one yet.
    """

    past: Tensor
    learnt: Tensor
    learning: Tensor

    def __init__(self, tasks: int, length: int, width: int, bottleneck: int | None) -> None:
        super().__init__()
        self.fresh = nn.Parameter(torch.zeros(length, width))
        sizes = [] if bottleneck is None else [(width, bottleneck), (bottleneck, width)]
        self.rewriting = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in sizes)
        self.register_buffer("past", torch.zeros(tasks, length, width))
        self.register_buffer("learnt", torch.zeros((), dtype=torch.int64))
        self.register_buffer("learning", torch.zeros((), dtype=torch.bool))

    def prompts(self) -> Tensor:
        """All that there are, ``[k, L, D]``, the oldest first."""
        past = self.past[: int(self.learnt)]
        if not self.learning:
            return past
        fresh: Tensor = self.fresh
        if len(self.rewriting):
            fresh = fresh + self.rewriting[1](torch.tanh(self.rewriting[0](fresh)))
        return torch.cat([past, fresh[None]])

    def newest(self) -> Tensor:
        """What stands before a text of the newest task, ``[k·L, D]``."""
        return self.prompts().flip(0).flatten(0, 1)

    def forward(self, h: Tensor, read: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`cl_lab.causal_lm.CausalBackbone.take_prefix`; of tasks still to come, all prompts there are."""
        prompts = self.prompts()
        own = (t + 1).clamp(max=len(prompts))
        # In training always all, so that the new one takes part on every rank, whatever tasks its rows are of.
        longest = len(prompts) if self.training else int(own.max())
        soft = prompts[:longest].flip(0).flatten(0, 1)
        column = torch.arange(len(soft), device=t.device)
        # A row of an older task has its prompts at the right edge, where they are next to the text.
        there = column >= (longest - own)[:, None] * len(self.fresh)
        return soft.expand(len(h), -1, -1), there


@dataclass
class ProgressivePrompts(SoftPrompts):
    """A new soft prompt for every task, before the frozen ones of earlier tasks: nothing is forgotten, if the task is told.

    A text x of task j is read as ``[p_j, …, p_1, x]`` by a model that never changes (Razdaibiedina et al. 2023, arXiv
    2301.12314). While task t is learnt, ``p_t`` alone is trained; ever after it stays bit for bit as it ended, so an old
    task is answered as it was on the day it had been learnt. Which task a sample belongs to must be told at test time, too;
    of texts it always is (their ``t``). A task that was not learnt yet is answered with all prompts there are.

    ``p_t`` begins as the embeddings of tokens drawn from the vocabulary. With a ``bottleneck`` it is learnt as
    ``p + W₂ tanh(W₁ p + b₁) + b₂`` by a network of the task's own, which is thrown away with the task's end (the released
    code's MLP1, 800 wide). Prompts want learning rates far above those of weights: 0.3 with AdamW for T5. With
    ``training.optimizer_state: kept`` the moments of the last prompt would move the new one.
    """

    needs_boundaries: ClassVar[bool] = True
    task_conditioned: ClassVar[bool] = True

    length: int = knob(10, doc="places of each task's prompt", ge=1)
    bottleneck: int | None = knob(
        None, doc="learn prompts through a residual network this wide (paper: 800); null: themselves", ge=1
    )

    def prefix(self, table: Tensor, stream: Stream) -> tuple[nn.Module, int]:
        made = TaskPrefix(len(stream), self.length, table.shape[1], self.bottleneck)
        return made, len(stream) * self.length

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        weights = learner.weights()
        if weights[_OWN + "learning"]:  # not when its task ended: other links may still ask for its gradients then
            learnt = int(weights[_OWN + "learnt"])
            weights[_OWN + "past"][learnt] = self._ended(weights)
            weights[_OWN + "learnt"] = torch.tensor(learnt + 1)
        fresh = weights[_OWN + "fresh"]
        weights[_OWN + "fresh"] = sampled(weights[self._table], self.length, learner.rng).to(fresh.dtype)
        if self.bottleneck is not None:
            for i, inputs in enumerate((fresh.shape[1], self.bottleneck)):
                for part in ("weight", "bias"):  # as torch draws a linear layer
                    name, bound = f"{_OWN}rewriting.{i}.{part}", 1 / math.sqrt(inputs)
                    drawn = torch.empty(weights[name].shape).uniform_(-bound, bound, generator=learner.rng)
                    weights[name] = drawn.to(fresh.dtype)
        weights[_OWN + "learning"] = torch.tensor(True)
        learner.set_weights(dict(weights))

    def _ended(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The prompt as the network has left it, ``[L, D]``."""
        fresh = weights[_OWN + "fresh"]
        if self.bottleneck is None:
            return fresh
        w1, b1, w2, b2 = (weights[f"{_OWN}rewriting.{i}.{part}"] for i in (0, 1) for part in ("weight", "bias"))
        return fresh + F.linear(torch.tanh(F.linear(fresh, w1, b1)), w2, b2)
