"""Fast and slow weights with two-step consolidation (Wang, Li, Zhong & Zhu 2021, arXiv 2104.09034)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Experience, Objective, State, Stream, TensorData

from ._quadratic import by_name
from .ewc import EWC


@dataclass
class FastSlow(EWC):
    """Fast weights learn each experience from where slow weights stand, slow weights learn from both to learn from few.

    From the paper: a pair of weights that start each other. Fast weights θ learn the stream under an EWC-like penalty; slow
    weights φ are consolidated with them and trained by an episodic few-shot loss, so that the next experience starts from
    weights that generalise. Its equations were not to be had; ours are, for experience t,

        ``θ ← φ``;  θ learns ``L_t + λ/2 · A (θ − θ̄)²`` (step one; A and θ̄ as in ``ewc``, whose knobs these are);
        ``φ ← φ + ρ (θ − φ) = c``;  then ``episodes`` steps of φ on ``L_proto + λ/2 · A (φ − c)²`` (step two),

    ``L_proto`` the loss of prototypical networks (Snell et al. 2017): queries of an episode are classified by the squared
    distance of their features to the means of a few support samples per class, both drawn from the experience. The pull
    towards c, which keeps φ from fitting the few, is solved for exactly in each step (``φ ← (φ − ηg + ηλA c) / (1 + ηλA)``).
    Every rank makes the same episodes, so φ needs no engine. The state keeps one φ besides ``ewc``'s two numbers per
    parameter. Normalisation layers keep the fast weights' running statistics. With ``consolidation: 1`` and ``episodes: 0``
    this is ``ewc``.
    """

    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification"})

    consolidation: float = knob(0.5, doc="ρ, how far slow weights go towards the fast ones", ge=0, le=1)
    answer: Literal["fast", "slow"] = knob("fast", doc="which weights are tested")
    episodes: int = knob(50, doc="few-shot episodes after each experience", ge=0)
    episode_lr: float = knob(0.01, doc="η, the learning rate of the slow weights", gt=0)
    ways: int = knob(5, doc="classes of an episode, or as many as there are", ge=2)
    shots: int = knob(5, doc="support samples per class", ge=1)
    queries: int = knob(15, doc="query samples per class, or as many as there are", ge=1)

    _slow: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # φ by name, on the CPU
    _accuracy: float | None = field(default=None, init=False, repr=False)  # not state: told once per experience

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"strength": 5.0, "episodes": 5}

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if self.episodes:
            _head(model)
        return model

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        weights = learner.weights()
        if not self._slow:
            self._slow = {name: weights[name] for name in learner.parameters()}
        elif self.answer == "fast":
            learner.set_weights({**weights, **self._trained(learner)})

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        super().after_experience(experience, learner)
        weights = learner.weights()
        self._slow = {name: phi.lerp(weights[name], self.consolidation) for name, phi in self._trained(learner).items()}
        self._accuracy = None
        if self.episodes:
            self._learn_episodes(experience.train, learner)
        if self.answer == "slow":
            learner.set_weights({**weights, **self._slow})

    def _trained(self, learner: Learner) -> dict[str, Tensor]:
        """φ of what is still trained: frozen weights stay as they are."""
        return {name: self._slow[name] for name in learner.parameters()}

    def _learn_episodes(self, data: TensorData, learner: Learner) -> None:
        by_class = _rows_by_class(data.y, self.shots + 1)
        if len(by_class) < 2:
            return  # nothing to tell apart
        model, pull = learner.replica(), {n: a * (self.episode_lr * self.stiffness) for n, a in self._precision.items()}
        phi = {n: p for n, p in model.named_parameters() if n in self._slow}
        with torch.no_grad():
            for name, p in phi.items():
                p.copy_(self._slow[name])
        centre = {n: p.detach().clone() for n, p in phi.items()}
        right = torch.zeros((), device=learner.device)
        with _seen_by_head(model) as seen:
            for _ in range(self.episodes):
                rows, per_class = self._draw(by_class, learner.rng)
                part = data.take(rows)
                with torch.enable_grad():
                    model(learner.prepare_input(part.x), part.t.to(learner.device))
                    scores, y = prototype_scores(seen.pop(), per_class, self.shots)
                    loss = F.cross_entropy(scores, y)
                right += (scores.argmax(dim=1) == y).float().mean()
                found = torch.autograd.grad(loss, list(phi.values()), allow_unused=True)
                with torch.no_grad():
                    for (name, p), g in zip(phi.items(), found, strict=True):
                        if g is not None:
                            p.sub_(g, alpha=self.episode_lr)
                            if name in pull:
                                p.addcmul_(pull[name], centre[name]).div_(1 + pull[name])
        self._slow = {n: p.detach().cpu() for n, p in phi.items()}
        self._accuracy = float(right) / self.episodes

    def _draw(self, by_class: list[Tensor], rng: torch.Generator) -> tuple[Tensor, int]:
        """Rows of an episode, class after class, support before queries, and how many there are of each class."""
        chosen = torch.randperm(len(by_class), generator=rng)[: self.ways].tolist()
        per_class = min(self.shots + self.queries, *(len(by_class[c]) for c in chosen))
        drawn = [by_class[c][torch.randperm(len(by_class[c]), generator=rng)[:per_class]] for c in chosen]
        return torch.cat(drawn), per_class

    def measures(self) -> dict[str, float]:
        """Query accuracy over the last experience's episodes, each before its step."""
        return {} if self._accuracy is None else {"episode_accuracy": self._accuracy}

    def state_dict(self) -> State:
        return super().state_dict() | {"slow": dict(self._slow)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._slow = by_name(state["slow"])


def prototype_scores(features: Tensor, per_class: int, shots: int) -> tuple[Tensor, Tensor]:
    """Scores ``[Q, C]`` of an episode's queries, minus squared distances to the classes' means, and their labels ``[Q]``.

    ``features`` ``[C · per_class, d]`` come class after class, ``shots`` support samples first.
    """
    grouped = features.float().unflatten(0, (-1, per_class))
    prototypes, queries = grouped[:, :shots].mean(dim=1), grouped[:, shots:]
    labels = torch.arange(len(grouped), device=features.device).repeat_interleave(per_class - shots)
    # ‖q − p‖² = ‖q‖² − 2 q·p + ‖p‖², of which the first is the same for all classes
    return 2 * queries.flatten(0, 1) @ prototypes.T - prototypes.square().sum(dim=1), labels


def _rows_by_class(y: Tensor, least: int) -> list[Tensor]:
    """The rows of each class that has ``least`` or more."""
    _, of_class, counts = y.unique(return_inverse=True, return_counts=True)
    return [rows for rows in of_class.argsort(stable=True).split(counts.tolist()) if len(rows) >= least]


def _head(model: nn.Module) -> nn.Module:
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"fast-slow compares features, but {type(model).__name__} has no 'head'; use a model that is a backbone "
            "and a head, and no strategy chain that puts another in its place"
        )
    return head


@contextmanager
def _seen_by_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the features of each call of ``model``, with gradients."""
    seen: list[Tensor] = []
    handle = _head(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
