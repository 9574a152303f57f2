"""GDumb: greedy sampler and dumb learner (Prabhu et al., ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Experience, State, TensorData

from ._fresh import fresh_weights
from ._memory import Policy
from ._rehearsal import Rehearsal


@dataclass
class GDumb(Rehearsal):
    """Keep a class-balanced memory and, at every experience, train a fresh model on nothing else.

    The sampler is greedy: the memory is shared evenly among the classes met; a sample enters while its class holds less
    than its share, and makes room by taking away a random one of the largest class. Once a class has its share, the first
    that came stay, so a stream whose classes do not change keeps samples of its beginning (``sampler: reservoir`` keeps
    a uniform sample of each class instead, as Avalanche does). Samples of one experience arrive in random order.

    That needs no boundaries: on a stream that hides them the learner learns before each evaluation, and ``epochs`` count
    passes over the memory also where the stream shows each sample once, as in the paper's online setting.

    The learner starts every experience from the weights of the run's beginning, running statistics included; parameters
    that are frozen stay as they are. Epochs, schedule and augmentation come from ``training`` (the paper's CutMix and
    warm restarts are not among them), and ``optimizer_state: kept`` would carry moments over to the fresh model. The
    result is that of the last epoch; the authors' code reports the best epoch by test accuracy.
    """

    learns_when_asked: ClassVar[bool] = True
    gathers: ClassVar[bool] = True

    # Settled here, no longer knobs.
    policy: ClassVar[Policy] = "class-balanced"  # type: ignore[misc]
    insert: ClassVar[Literal["experience"]] = "experience"  # type: ignore[misc]
    replay_batch_size: ClassVar[None] = None  # type: ignore[misc]

    sampler: Literal["greedy", "reservoir"] = knob(
        "greedy", doc="who stays in a class that has its share: the first that came, or a uniform sample of all"
    )

    _initial: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"memory": 60}  # as many steps as an experience of the toy stream

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if not self._initial:
            self._initial = learner.weights()
        else:
            learner.set_weights(fresh_weights(self._initial, learner))
        if self.sampler == "greedy":  # the memory keeps the smallest keys of each class
            held = len(self._memory)
            self._memory.keys[:held] = torch.rand(held, generator=learner.rng, dtype=torch.float64) - 1
        self._memory.add(self.rows_of(experience.train), learner.rng)

    def training_set(self, experience: Experience, learner: Learner) -> TensorData:
        x, y, t = (self._memory.columns[name][: len(self._memory)] for name in ("x", "y", "t"))
        return TensorData(x, y, t)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        """The samples are in the memory already."""

    def state_dict(self) -> State:
        return super().state_dict() | {"initial": dict(self._initial)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        initial = state["initial"]
        assert isinstance(initial, dict)
        self._initial = {n: v for n, v in initial.items() if isinstance(v, Tensor)}
