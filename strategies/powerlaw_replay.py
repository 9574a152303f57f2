"""Replay in a power-law environment (Gandhi et al. 2024, arXiv 2401.10393)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Batch, Experience, State, Stream, TensorData

from ._memory import Memory, Policy
from ._rehearsal import Rehearsal, join


@dataclass
class PowerLawReplay(Rehearsal):
    """Replay past experiences in proportion to a power of their age (or exponentially, or evenly, as controls).

    After ``k`` experiences, the share of experience ``j ≤ k`` among the samples rehearsed in a step is proportional to

        ``(k − j + 1)^−a`` (*power*),  ``e^−b(k − j)`` (*exponential*),  or 1 (*uniform*),

    with the same number of rehearsed samples in all of them. The law governs the draws, not what is kept: the memory is
    shared evenly between experiences, a uniform sample of each, so the laws differ in how often the past is met and in
    nothing else. (The paper draws from all past data, which a memory that large gives.) Where an experience keeps fewer
    samples than its share of a step, they are repeated evenly.

    Each step's counts are the expected ones rounded down or up by systematic sampling: right in expectation, one number
    drawn, and always the same total. (Rounding the largest remainders would favour the same experiences in every step.)
    """

    needs_boundaries: ClassVar[bool] = True

    # Settled here, no longer knobs.
    policy: ClassVar[Policy] = "class-balanced"  # type: ignore[misc]
    insert: ClassVar[Literal["experience"]] = "experience"  # type: ignore[misc]

    law: Literal["power", "exponential", "uniform"] = knob("power", doc="how the share of an experience falls with age")
    exponent: float = knob(1.0, doc="a of the power law, or b of the exponential one", ge=0)

    _groups: _Groups | None = field(default=None, init=False, repr=False)  # not state: follows from the memory

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        capacity, budget = self._memory.capacity, self._memory.budget
        given, knob_name = f"memory = {capacity}", "memory"
        if capacity is None:
            # What a sample takes, its data alone say; the memory that is made of one of them knows how many it holds.
            first = stream.experiences[0]
            probe = Memory(None, self.policy, budget)
            probe.add(self._labelled(first.train.map(lambda v: v[:1]), first.index), torch.Generator())
            capacity = probe.capacity
            given, knob_name = f"memory_bytes = {self.memory_bytes!r}, {capacity} samples", "memory_bytes"
        assert capacity is not None
        if capacity < len(stream):
            raise ConfigError(
                f"powerlaw-replay: {given}: holds less than one sample of each of the {len(stream)} "
                f"experiences; raise {knob_name}"
            )
        return super().prepare(model, stream)

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        return join(batch, self.draw(learner)) if len(self._memory) else batch

    def draw(self, learner: Learner) -> dict[str, Tensor]:
        if self._groups is None:
            self._groups = _Groups(self._memory.columns["y"][: len(self._memory)])
        groups, n = self._groups, self.replay_batch_size or learner.training_batch_size
        index = groups.draw(systematic(n * self.shares(groups.experiences), learner.rng), learner.rng)
        names = {"x": "x", "y": "label", "t": "t"}
        return {name: self._memory.columns[column].index_select(0, index) for name, column in names.items()}

    def shares(self, experiences: Tensor) -> Tensor:
        """The share of each of these experiences (indices, increasing, the last one learnt last), float64."""
        age = (experiences[-1] - experiences).double()
        if self.law == "power":
            weight = (age + 1).pow(-self.exponent)
        elif self.law == "exponential":
            weight = (-self.exponent * age).exp()
        else:
            weight = torch.ones_like(age)
        return weight / weight.sum()

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._memory.add(self._labelled(experience.train, experience.index), learner.rng)
        self._groups = None

    def _labelled(self, data: TensorData, experience: int) -> dict[str, Tensor]:
        rows = self.rows_of(data)
        rows["label"] = rows["y"]
        rows["y"] = torch.full_like(rows["label"], experience)  # what the memory balances
        return rows

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._groups = None


class _Groups:
    """The rows of a memory by experience: ``owner`` ``[N]`` says whose each row is."""

    def __init__(self, owner: Tensor) -> None:
        self._rows = torch.argsort(owner, stable=True)
        self.experiences, self._place, self._sizes = torch.unique(
            owner[self._rows], return_inverse=True, return_counts=True
        )
        self._first = self._sizes.cumsum(0) - self._sizes

    def draw(self, counts: Tensor, rng: torch.Generator) -> Tensor:
        """``counts[g]`` random rows of each group; none comes twice before all of its group came once."""
        shuffled = self._rows[
            torch.argsort(self._place + torch.rand(len(self._rows), generator=rng, dtype=torch.float64))
        ]
        group = torch.arange(len(counts)).repeat_interleave(counts)
        place = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]
        return shuffled[self._first[group] + place % self._sizes[group]]


def systematic(expected: Tensor, rng: torch.Generator) -> Tensor:
    """Whole numbers, int64, with these expectations and the same (whole) sum, each off by less than one."""
    upto = expected.cumsum(0)
    total = upto[-1:].round()
    edges = torch.floor(upto + torch.rand((), generator=rng, dtype=torch.float64)).minimum(total)
    return torch.diff(torch.cat([edges[:-1], total]).long(), prepend=torch.zeros(1, dtype=torch.int64))
