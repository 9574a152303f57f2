"""What every rehearsal strategy shares: a budgeted memory, when samples enter it, and how drawn rows join a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, State, Stream, TensorData

from ._memory import Memory, Policy, parse_bytes

DEFAULT_MEMORY = 500


@dataclass
class Rehearsal(Strategy):
    """A strategy with a memory of past samples (abstract: it keeps them and draws them, subclasses train on them).

    With boundaries, samples enter the memory after their experience, so only the past is rehearsed; on streams that hide
    boundaries they enter as they pass (each once, in its first epoch). Budget in samples or in bytes, all tensors counted.
    """

    memory: int | None = knob(None, doc=f"samples kept; {DEFAULT_MEMORY} where memory_bytes is not given either", ge=1)
    memory_bytes: int | str | None = knob(None, doc="instead of memory: a budget in bytes, for example 5MB")
    policy: Policy = knob("reservoir", doc="which samples stay: reservoir, class-balanced, or ring (newest per class)")
    replay_batch_size: int | None = knob(None, doc="samples drawn per step; null: the training batch size", ge=1)
    insert: Literal["auto", "experience", "stream"] = knob(
        "auto", doc="when samples enter: after their experience, as they pass, or auto by the stream's boundaries"
    )

    _memory: Memory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory_bytes is not None:
            raise ConfigError(
                f"memory = {self.memory} and memory_bytes = {self.memory_bytes!r}: the memory has one budget; "
                "leave one of them out"
            )
        budget = None if self.memory_bytes is None else parse_bytes(self.memory_bytes)
        capacity = (self.memory or DEFAULT_MEMORY) if budget is None else None
        self._memory = Memory(capacity, self.policy, budget)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"memory": 40}

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if stream.objective == "regression" and self.policy != "reservoir":
            raise ConfigError(
                f"policy = '{self.policy}': shares the memory out by class, but stream '{stream.name}' is a regression, "
                "which has none; set policy=reservoir"
            )
        if not stream.boundaries and self.insert == "experience" and not self.learns_when_asked:
            raise ConfigError(
                "insert=experience needs to know where an experience ends, but this stream hides it; "
                "leave that knob out, or set scenario.boundaries=true"
            )
        return model

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        if not self.streams(learner):
            self._memory.add(self.rows_of(experience.train), learner.rng)

    def streams(self, learner: Learner) -> bool:
        """Whether samples enter the memory as they pass."""
        return self.insert == "stream" or (self.insert == "auto" and not learner.stream.boundaries)

    def enter(self, batch: Batch, learner: Learner, **columns: Tensor) -> None:
        """Offer the current rows of ``batch`` as they pass: in their first epoch, where samples enter so.

        ``columns`` are further tensors to keep with each row, ``[current, …]``, on any device.
        """
        if self.streams(learner) and batch.epoch == 0:
            n = batch.current
            self._memory.add(self.rows_of(TensorData(batch.x[:n], batch.y[:n], batch.t[:n]), **columns), learner.rng)

    @staticmethod
    def rows_of(data: TensorData, **columns: Tensor) -> dict[str, Tensor]:
        """Samples as columns of the memory, with further ones."""
        return {"x": data.x, "y": data.y, "t": data.t, **{n: v.cpu() for n, v in columns.items()}}

    def draw(self, learner: Learner) -> dict[str, Tensor]:
        """The rows to rehearse in this step."""
        return self._memory.draw(self.replay_batch_size or learner.training_batch_size, learner.rng)

    def state_dict(self) -> State:
        return {"memory": self._memory.state_dict()}

    def load_state_dict(self, state: State) -> None:
        memory = state["memory"]
        assert isinstance(memory, dict)
        self._memory.load_state_dict(memory)


def join(batch: Batch, drawn: dict[str, Tensor], weight: Tensor | None = None, **extra: Tensor) -> Batch:
    """``batch`` with the ``drawn`` rows behind it; ``weight`` and each of ``extra`` have one row for every row of both.

    Raises :class:`ConfigError` for a batch of latents, and for one that another strategy has already added to: weights and
    stored outputs of the two would have to be brought together.
    """
    if not batch.raw:
        raise ConfigError(
            "strategy chain: one strategy trains on latents and another keeps raw samples; keep one of them (a freeze that "
            "caches stands last)"
        )
    if batch.extra or batch.weight is not None:
        raise ConfigError("strategy chain: a rehearsal strategy must stand first, and only one may weigh; reorder it")
    return Batch(
        torch.cat([batch.x, drawn["x"]]),
        torch.cat([batch.y, drawn["y"]]),
        torch.cat([batch.t, drawn["t"]]),
        batch.current,
        weight,
        extra,
        batch.epoch,
        batch.raw,
    )
