"""Layer freezing: parts of the network stop changing from some experience on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.module_paths import named_by
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, Batch, Experience, Objective, State, Stream

from ._prefix import PrefixCache


@dataclass
class Freeze(Strategy):
    """Stop training chosen layers from an experience on; frozen means bit-identical, whatever the optimiser.

    ``layers: k`` takes the bottom k blocks of the network, those whose path ends in a number (``layers.0``,
    ``model.layers.11``, ``layer1.0``), and ``embeddings`` what comes before the first of them (a language model's table of
    tokens, a stem). That is the published Freeze for language models (arXiv 2501.13453), by structure. Where embedding and
    head are one tensor, the one is not frozen without the other.

    The released code of that paper looks for ``layers.1`` anywhere in a name and so freezes layers 10 to 19, too: of 32
    layers, "the bottom 6" are 28. ``variant: released`` freezes what it does, block i where some ``j < k`` has
    ``"layers.j"`` in ``"layers.i."``, to tell how much of a published result is that set's.

    ``modules`` are named by path: each dotted segment of a pattern matches one segment of a module's path, with shell
    wildcards (``backbone.layers.0``, ``backbone.layers.[0-3]``, ``*.norm``), and everything below a match freezes, running
    statistics included. A pattern that matches nothing is an error. Frozen parameters leave the optimiser, so neither
    weight decay nor momentum moves them.

    With ``cache``, what the frozen bottom makes of a sample is kept, and whenever that sample comes again, in a later epoch
    or rehearsed, training runs the layers above alone. For that the whole bottom must be frozen (``layers``, and
    ``embeddings`` unless nothing in there is trained anyway), samples must come as they are (no augmentation), and this link
    stands behind those that rehearse. What ``variant: released`` freezes above the first layer that learns is not cached.
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    modules: list[str] = knob([], "module or parameter paths to freeze, with wildcards per segment")
    layers: int = knob(0, "blocks to freeze from the bottom", ge=0)
    variant: Literal["paper", "released"] = knob(
        "paper", doc="layers: the bottom ones, or those that the released code's search in names finds"
    )
    embeddings: bool = knob(False, "freeze what comes before the first block")
    from_experience: int = knob(1, doc="index of the first experience during which they are frozen", ge=0)
    cache: Literal["none", "memory", "disk"] = knob(
        "none", doc="keep what the frozen bottom makes of each sample, in memory or in a temporary file"
    )

    _frozen: list[str] = field(default_factory=list, init=False, repr=False)
    _patterns: list[str] = field(default_factory=list, init=False, repr=False)  # not state: follow from the model
    _prefix: PrefixCache | None = field(default=None, init=False, repr=False)  # not state: made again

    def __post_init__(self) -> None:
        if not (self.modules or self.layers or self.embeddings):
            raise ConfigError("modules: nothing to freeze; give modules, layers or embeddings")
        if self.variant == "released" and not self.layers:
            raise ConfigError(
                "variant = 'released': says which layers the released code freezes; give layers = 1 or more"
            )
        if self.cache != "none" and not self.layers:
            raise ConfigError(f"cache = '{self.cache}': keeps what the bottom layers make; give layers = 1 or more")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"modules": ["backbone.layers.0"], "from_experience": 1}

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        self._patterns = list(self.modules)
        if self.layers or self.embeddings:
            self._patterns += self._bottom(model)
        return model

    def prepared(self, model: nn.Module) -> None:
        for pattern in self.modules:  # a misspelt path is told now, not where the first experience has been learnt
            named_by(model, pattern)

    def _bottom(self, model: Any) -> list[str]:
        """Paths of the modules in the bottom layers; cuts the model behind them where they are to be cached."""
        if not hasattr(model, "split"):
            raise ConfigError(f"freeze: {type(model).__name__} has no layers to count; name modules instead")
        stages = [name for name, _ in model.backbone.stages()]
        blocks = [name for name in stages if name.rpartition(".")[2].isdigit()]
        if self.layers > len(blocks):
            raise ConfigError(
                f"freeze: layers = {self.layers}: the model has {len(blocks)} blocks ({_span(blocks)}); lower layers"
            )
        before = stages[: stages.index(blocks[0])] if blocks else []
        held = model.modules_up_to(before[-1]) if before else []
        if self.embeddings and not held:
            raise ConfigError("freeze: embeddings = true: nothing comes before the model's first block; leave it out")
        chosen = range(self.layers) if self.variant == "paper" else released(self.layers, len(blocks))
        if self.cache != "none":
            # The frozen set may have gaps; only what lies below the first is the same from one step to the next.
            bottom = next((i for i in range(len(blocks)) if i not in chosen), len(blocks))
            self._cut(model, blocks[bottom - 1], [] if self.embeddings else held)
        return [*(held if self.embeddings else []), *(f"backbone.{blocks[i]}" for i in chosen)]

    def _cut(self, model: Any, stage: str, learning: list[str]) -> None:
        """Cut the model behind ``stage``, below which modules in ``learning`` are not frozen."""
        trained = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and any(name == path or name.startswith(path + ".") for path in learning)
        ]
        if trained:
            raise ConfigError(
                f"freeze: cache = '{self.cache}': {trained[0]} below the frozen layers goes on learning, so what they "
                "make of a sample changes; set embeddings=true"
            )
        if model.cut is not None:
            raise ConfigError(
                f"strategy chain: freeze would cut the network behind '{stage}', but another strategy cut it behind "
                f"'{model.cut}'; leave cache out, or keep one of the two"
            )
        model.split(stage)

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if experience.index >= self.from_experience and not self._frozen:
            self._frozen = learner.freeze(self._patterns)

    def mix(self, batch: Batch, learner: Learner) -> Batch | None:
        if self.cache == "none" or not self._frozen or not batch.raw:
            return batch
        if self._prefix is None:
            if learner.augments:
                raise ConfigError(
                    f"freeze: cache = '{self.cache}': training.augmentation changes samples whenever they come, so nothing "
                    "can be kept; set augmentation=none, or cache=none"
                )
            self._prefix = PrefixCache(learner, on_disk=self.cache == "disk")
        h = self._prefix.latents(batch.x, learner)
        return Batch(h, batch.y, batch.t, batch.current, batch.weight, batch.extra, batch.epoch, raw=False)

    def measures(self) -> dict[str, float]:
        """With a cache, the samples in it and their bytes."""
        if self._prefix is None:
            return {}
        return {"cached_samples": float(len(self._prefix)), "cached_bytes": float(self._prefix.nbytes)}

    def state_dict(self) -> State:
        return {"frozen": list(self._frozen)}

    def load_state_dict(self, state: State) -> None:
        frozen = state["frozen"]
        assert isinstance(frozen, list)
        self._frozen = [str(name) for name in frozen]
        self._prefix = None


def released(layers: int, blocks: int) -> list[int]:
    """The blocks, of so many, that the released code freezes as the bottom ``layers``: ``layers.1`` is in ``layers.10.``."""
    return [i for i in range(blocks) if any(f"layers.{j}" in f"layers.{i}." for j in range(layers))]


def _span(blocks: list[str]) -> str:
    return f"{blocks[0]} to {blocks[-1]}" if blocks else "none whose path ends in a number"
