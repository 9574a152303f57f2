"""Layer freezing: parts of the network stop changing from some experience on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, Experience, Objective, State


@dataclass
class Freeze(Strategy):
    """Stop training chosen modules from an experience on; frozen means bit-identical, whatever the optimiser.

    Modules are named by path structure: each dotted segment of a pattern matches one segment of a module's path, with
    shell wildcards (``backbone.layers.0``, ``backbone.layers.[0-3]``, ``*.norm``), and everything below a match freezes,
    running statistics included. A pattern that matches nothing is an error. Frozen parameters leave the optimiser, so
    neither weight decay nor momentum moves them.
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    modules: list[str] = knob(doc="module or parameter paths to freeze, with wildcards per segment", min_length=1)
    from_experience: int = knob(1, doc="index of the first experience during which they are frozen", ge=0)

    _frozen: list[str] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"modules": ["backbone.layers.0"], "from_experience": 1}

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if experience.index >= self.from_experience and not self._frozen:
            self._frozen = learner.freeze(self.modules)

    def state_dict(self) -> State:
        return {"frozen": list(self._frozen)}

    def load_state_dict(self, state: State) -> None:
        frozen = state["frozen"]
        assert isinstance(frozen, list)
        self._frozen = [str(name) for name in frozen]
