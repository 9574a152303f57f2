"""Selective fine-tuning: only those parts of a transformer learn that forget little (arXiv 2510.08564)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Experience, Objective

_PARTS: dict[str, frozenset[str]] = {
    "attention": frozenset({"self_attn", "attn", "attention"}),
    "gate-up": frozenset({"gate_proj", "up_proj"}),
}


@dataclass
class Selective(Strategy):
    """Train the self-attention projections alone, or gate and up of the feed-forward layers with down frozen.

    "How to teach large multimodal models new skills" (2025, arXiv 2510.08564): trained whole, a model gained 31.8 points on
    new tasks and lost 23.3 on held-out ones; its attention alone gained 24.9 and lost 0.6, gate and up 30.5 and 2.1. What is
    written by the down projection and what reads the stream decide how far the output distribution moves. Norms,
    embeddings and head are frozen, too.

    A part is known by a segment of its path (``self_attn``; ``gate_proj``), never by a piece of one, and is what has a
    matrix: the norms of queries and keys that some attention holds are norms. Of a model with low-rank adapters those in the
    part are trained.
    """

    objectives: ClassVar[frozenset[Objective]] = frozenset({"language"})
    needs_boundaries: ClassVar[bool] = True

    part: Literal["attention", "gate-up"] = knob("attention", doc="what is trained: self-attention, or gate and up")

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        there = learner.parameters()
        matrices = {_owner(name) for name, p in there.items() if p.dim() > 1}
        others = [n for n in there if _PARTS[self.part].isdisjoint(n.split(".")) or _owner(n) not in matrices]
        if len(others) == len(there):
            names = " or ".join(sorted(_PARTS[self.part]))
            raise ConfigError(
                f"selective: part = '{self.part}': nothing that is trained lies in {names}; choose the other part, or "
                f"adapters in this one (model.lora_targets); trained is {next(iter(there))} and {len(there) - 1} more"
            )
        if others:  # once: what is frozen is no longer among the parameters, in a resumed run either
            learner.freeze(others)


def _owner(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]
