"""Synaptic intelligence (Zenke, Poole & Ganguli, ICML 2017)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import OBJECTIVES, Experience, Objective, State

from ._quadratic import QuadraticPull, by_name


@dataclass
class SI(QuadraticPull):
    """Pull parameters back to where the past left them, in proportion to how much each did to lower the loss.

    While an experience is learnt, ``ω ← ω − g · Δθ`` at every step: ``g`` is the gradient of the loss before this penalty
    is added, ``Δθ`` what the optimiser did to the parameter. At its end, with ``Δ`` the whole way from where it began,

        ``Ω ← max(0, Ω + ω / (Δ² + ξ))``,

    and the loss gains ``c Σ Ω (θ − θ*)²`` (Zenke et al. 2017, arXiv 1703.04200). The paper's text has no ``max``: where a
    parameter moved against its gradient in sum, as momentum can make it, ``Ω`` would turn negative and the penalty push
    away from ``θ*``. The authors' code cuts the running sum off at zero, and so does this. Nothing is cut off above
    (Avalanche stops at 10⁻³), and ``g`` never holds the penalty's own gradient (as in Avalanche's and van de Ven's code).
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    strength: float = knob(1.0, doc="c, the weight of the penalty c·Ω(θ−θ*)²", ge=0)
    damping: float = knob(0.1, doc="ξ, which bounds the importance of parameters that hardly moved", gt=0)

    _path: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # ω of the present experience
    _gradient: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # not state: of the present step
    _before: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # not state: θ before it
    _moving: list[str] = field(default_factory=list, init=False, repr=False)  # not state: what has a gradient in it

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 0.5}  # a step must not overshoot: lr · 2c · Ω < 2

    @property
    def stiffness(self) -> float:
        return 2 * self.strength

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if not self._anchor:
            self._anchor = {n: p.to(torch.float32, copy=True) for n, p in learner.parameters().items()}

    def adjust_gradients(self, learner: Learner) -> None:
        parameters = learner.parameters()
        self._place(learner.device)
        with learner.gradients() as gradients:
            self._moving = list(gradients)
            for name, gradient in gradients.items():
                if name not in self._gradient:
                    # In 32 bits, whatever the weights are held in: sums of many small terms.
                    exact = torch.empty_like(gradient, dtype=torch.float32)
                    self._gradient[name], self._before[name] = exact, torch.empty_like(exact)
                self._gradient[name].copy_(gradient)
                self._before[name].copy_(parameters[name])
            if self._precision and self.strength > 0:
                self._pull(parameters, gradients)

    def after_step(self, learner: Learner) -> None:
        parameters = learner.parameters()
        for name in self._moving:
            moved = torch.sub(parameters[name], self._before[name], out=self._before[name])
            if name not in self._path:
                self._path[name] = torch.zeros_like(moved)
            self._path[name].addcmul_(self._gradient[name], moved, value=-1.0)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._place(learner.device)
        for name, theta in learner.parameters().items():
            total = self._precision.get(name, torch.zeros_like(theta, dtype=torch.float32))
            if name in self._path:
                total = total + self._path[name] / ((theta - self._anchor[name]).square() + self.damping)
            self._precision[name] = total.clamp_(min=0)
            self._anchor[name] = theta.to(torch.float32, copy=True)
        self._path.clear()

    def _place(self, device: torch.device) -> None:
        super()._place(device)
        if next(iter(self._path.values()), torch.empty(0, device=device)).device != device:
            self._path = {n: v.to(device) for n, v in self._path.items()}

    def state_dict(self) -> State:
        return super().state_dict() | {"path": dict(self._path)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._path = {n: v.clone() for n, v in by_name(state["path"]).items()}  # it grows in place
