"""What strategies that keep old low-rank adapters share: one adapter learns, those of the past stand beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.adapters import AdaptedLayer, LowRank, adapted_layers, beside, low_rank
from cl_lab.errors import ConfigError
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Experience, Objective, State, Stream


@dataclass
class PastAdapters(Strategy):
    """A new adapter for every experience, beside those of the past (abstract: subclasses give the weight of each).

    A layer of the model computes ``W₀x + (α/r) Σ_{i<t} c_i B_i A_i x + (α/r) B_t A_t x``; only ``A_t``, ``B_t`` are trained,
    and they are the adapter that ``causal-lm`` made. After an experience it joins the past, ``A_{t+1}`` is drawn anew as
    PEFT draws it (``U(−1/√inputs, 1/√inputs)``) and ``B_{t+1} = 0``, so that the new one adds nothing at first. The past is
    no parameter of the model: no optimiser, weight decay or penalty of another strategy moves it. It is added by a hook on
    each layer, as two products whatever its number of adapters, and sees the layer's input without dropout.

    An adapter that another strategy froze stays as it is. With ``training.optimizer_state: fresh`` (the default) the new
    adapter starts with empty moments; ``kept`` would let the moments of the old one move it. A strategy that remembers
    where parameters were (``ewc``, ``si``) is refused beside it: they belonged to another adapter.
    """

    needs_boundaries: ClassVar[bool] = True
    renews_parameters: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"language"})

    # Adapters of the past by path of their layer, on the CPU as they were trained: A [Σr, inputs], B [outputs, Σr].
    _past: dict[str, LowRank] = field(default_factory=dict, init=False, repr=False)
    # Not state:
    _layers: dict[str, AdaptedLayer] = field(default_factory=dict, init=False, repr=False)
    _placed: dict[Any, LowRank] = field(default_factory=dict, init=False, repr=False)  # scaled, by device and dtype

    def shares(self, n: int) -> list[float]:
        """``c_1 … c_n``: what each of ``n`` adapters of the past counts."""
        return [1.0] * n

    def consolidate(self, path: str, ended: LowRank) -> None:
        """One layer's adapter as its experience left it (CPU, not scaled by ``α/r``), before it joins the past."""

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        self._layers = adapted_layers(model)
        if not self._layers:
            raise ConfigError(
                f"{type(self).__name__} gives every experience a low-rank adapter, but {type(model).__name__} has none; use "
                "model causal-lm with adapt: lora"
            )
        for path in self._layers:
            # A plain function: copies of the model share it, where a bound method would bring a copy of the strategy.
            model.get_submodule(path).register_forward_hook(
                lambda _, args, out, path=path: self._with_past(path, args[0], out)
            )
        return model

    def _with_past(self, path: str, x: Tensor, out: Tensor) -> Tensor:
        if path not in self._past:
            return out
        kind = x.device.type
        past = self.past(path, x.device, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        return out + F.linear(F.linear(x, past.a), past.b).to(out.dtype)

    def past(self, path: str, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The past of one layer that has one, with ``α/r`` and the shares inside ``B``."""
        key = (path, device, dtype)
        if key not in self._placed:
            a, b = self._past[path]
            layer = self._layers[path]
            shares = torch.tensor(self.shares(len(a) // layer.rank)).repeat_interleave(layer.rank)
            self._placed[key] = LowRank(a.to(device, dtype), (b.float() * (layer.scale * shares)).to(device, dtype))
        return self._placed[key]

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        trained, weights = learner.parameters().keys(), learner.weights()
        ending = {path: layer for path, layer in self._layers.items() if layer.b in trained}
        if not ending:
            raise ConfigError(
                f"strategy chain: {type(self).__name__} finds no trained adapter where the model had them; leave out what "
                "puts another model in its place"
            )
        for path, layer in ending.items():
            ended = LowRank(weights[layer.a], weights[layer.b])
            self.consolidate(path, ended)
            self._past[path] = beside([self._past[path], ended]) if path in self._past else ended
            weights[layer.b] = torch.zeros_like(ended.b)
            if layer.a in trained:
                drawn = nn.init.kaiming_uniform_(torch.empty(ended.a.shape), math.sqrt(5), generator=learner.rng)
                weights[layer.a] = drawn.to(ended.a.dtype)
        self._placed.clear()
        learner.set_weights(dict(weights))

    def adapters(self, learner: Learner) -> dict[str, LowRank]:
        made = low_rank(learner.replica())
        for path in self._past:
            past = self.past(path, torch.device("cpu"), torch.float32)
            # One that has just begun adds nothing but its rank.
            made[path] = beside([past, made[path]]) if made[path].b.any() else past
        return made

    def measures(self) -> dict[str, float]:
        """The rank of what the past adds to a layer, the greatest of all."""
        return {"past_rank": float(max((len(a) for a, _ in self._past.values()), default=0))}

    def state_dict(self) -> State:
        return {"past": {path: {"a": a, "b": b} for path, (a, b) in self._past.items()}}

    def load_state_dict(self, state: State) -> None:
        past: Any = state["past"]
        self._past = {path: LowRank(held["a"], held["b"]) for path, held in past.items()}
        self._placed.clear()
