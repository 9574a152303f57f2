"""What EWC, SI and MAS share: a quadratic pull of every parameter towards where the past left it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cl_lab.protocols import Learner, Strategy
from cl_lab.records import State


@dataclass
class QuadraticPull(Strategy):
    """A pull ``s/2 · Σ A (θ − θ̄)²`` towards an anchor ``θ̄`` (abstract: subclasses make the precision ``A`` and give ``s``).

    Its gradient ``s A (θ − θ̄)`` is added between backward and step; elementwise, so the same under every engine.
    """

    remembers_parameters: ClassVar[bool] = True

    _precision: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # A
    _anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # θ̄
    _scratch: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # not state: a buffer

    @property
    def stiffness(self) -> float:
        """``s``: twice the strength of a penalty that is written without the half."""
        raise NotImplementedError

    def adjust_gradients(self, learner: Learner) -> None:
        if not self._precision or self.stiffness == 0:
            return
        parameters = learner.parameters()
        self._place(learner.device)
        with learner.gradients() as gradients:
            self._pull(parameters, gradients)

    def _pull(self, parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        stiffness = self.stiffness
        for name, gradient in gradients.items():
            precision = self._precision.get(name)
            if precision is not None:
                if name not in self._scratch:
                    self._scratch[name] = torch.empty_like(precision)
                pull = torch.sub(parameters[name], self._anchor[name], out=self._scratch[name])
                gradient.addcmul_(pull, precision, value=stiffness)

    def penalty(self, learner: Learner) -> float:
        parameters = learner.parameters()
        self._place(learner.device)
        quadratic = sum(
            float((self._precision[n] * (p - self._anchor[n]).square()).sum())
            for n, p in parameters.items()
            if n in self._precision
        )
        return self.stiffness / 2 * (quadratic + self._constant())

    def _constant(self) -> float:
        """What the running quadratic leaves out of the sum it stands for."""
        return 0.0

    def _place(self, device: torch.device) -> None:
        # A restored state is on the CPU; it moves to the parameters' device on first use.
        if next(iter(self._anchor.values()), torch.empty(0, device=device)).device != device:
            self._precision = {n: v.to(device) for n, v in self._precision.items()}
            self._anchor = {n: v.to(device) for n, v in self._anchor.items()}
            self._scratch.clear()

    def state_dict(self) -> State:
        return {"precision": dict(self._precision), "anchor": dict(self._anchor)}

    def load_state_dict(self, state: State) -> None:
        self._precision, self._anchor = by_name(state["precision"]), by_name(state["anchor"])
        self._scratch.clear()


def by_name(saved: object) -> dict[str, Tensor]:
    """Tensors by name out of a saved state."""
    assert isinstance(saved, dict)
    return {n: v for n, v in saved.items() if isinstance(v, Tensor)}
