"""Experience replay (Chaudhry et al. 2019, "On tiny episodic memories"; Hsu et al. 2018, "naive rehearsal")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, State, Stream

from ._memory import Memory, Policy, parse_bytes


@dataclass
class Replay(Strategy):
    """Train each batch together with a batch drawn from a small memory of past samples.

    With boundaries, samples enter the memory after their experience, so only the past is rehearsed; on streams that hide
    boundaries they enter as they pass (each once, in its first epoch). Budget in samples or in bytes, all tensors counted.
    """

    memory: int = knob(500, doc="samples kept", ge=1)
    memory_bytes: int | str | None = knob(None, doc="instead of memory: a budget in bytes, for example 5MB")
    policy: Policy = knob("reservoir", doc="which samples stay: reservoir, class-balanced, or ring (newest per class)")
    replay_batch_size: int | None = knob(None, doc="samples drawn per step; null: the training batch size", ge=1)
    insert: Literal["auto", "experience", "stream"] = knob(
        "auto", doc="when samples enter: after their experience, as they pass, or auto by the stream's boundaries"
    )
    weighting: Literal["mean", "experiences"] = knob(
        "mean", doc="one mean over all rows, or 1/t on current and 1−1/t on replayed rows in the t-th experience"
    )

    _memory: Memory = field(init=False, repr=False)
    _experiences: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        budget = None if self.memory_bytes is None else parse_bytes(self.memory_bytes)
        self._memory = Memory(self.memory if budget is None else None, self.policy, budget)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"memory": 40}

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if not stream.boundaries and (self.insert == "experience" or self.weighting == "experiences"):
            knob_set = "insert=experience" if self.insert == "experience" else "weighting=experiences"
            raise ConfigError(
                f"replay with {knob_set} needs to know where an experience ends, but this stream hides it; "
                "leave that knob out, or set scenario.boundaries=true"
            )
        return model

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        streaming = self._streams(learner)
        mixed = self._rehearse(batch, learner) if len(self._memory) else batch
        if streaming and batch.epoch == 0:
            n = batch.current
            self._memory.add({"x": batch.x[:n], "y": batch.y[:n], "t": batch.t[:n]}, learner.rng)
        return mixed

    def _rehearse(self, batch: Batch, learner: Learner) -> Batch:
        if batch.extra or batch.weight is not None:
            raise ConfigError("replay must stand first among rehearsal strategies of a chain; reorder the chain")
        drawn = self._memory.draw(self.replay_batch_size or learner.training_batch_size, learner.rng)
        weight = None
        if self.weighting == "experiences":
            share = 1 / (self._experiences + 1)
            old, new = len(drawn["y"]), len(batch)
            weight = torch.cat([torch.full((new,), share / new), torch.full((old,), (1 - share) / old)])
        return Batch(
            torch.cat([batch.x, drawn["x"]]),
            torch.cat([batch.y, drawn["y"]]),
            torch.cat([batch.t, drawn["t"]]),
            batch.current,
            weight,
            epoch=batch.epoch,
        )

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._experiences += 1
        if not self._streams(learner):
            data = experience.train
            self._memory.add({"x": data.x, "y": data.y, "t": data.t}, learner.rng)

    def _streams(self, learner: Learner) -> bool:
        return self.insert == "stream" or (self.insert == "auto" and not learner.stream.boundaries)

    def state_dict(self) -> State:
        return {"memory": self._memory.state_dict(), "experiences": self._experiences}

    def load_state_dict(self, state: State) -> None:
        memory, experiences = state["memory"], state["experiences"]
        assert isinstance(memory, dict)
        assert isinstance(experiences, int)
        self._memory.load_state_dict(memory)
        self._experiences = experiences
