"""What strategies that learn soft prompts share: vectors before each text are all that a frozen language model is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.protocols import Strategy
from cl_lab.records import Objective, Stream


@dataclass
class SoftPrompts(Strategy):
    """Vectors that stand before each text like tokens of it; nothing else is trained (abstract: subclasses give them).

    The model's own weights, adapters included, stay as they are, so take ``adapt: full`` for a model without any.
    """

    objectives: ClassVar[frozenset[Objective]] = frozenset({"language"})

    _table: str = field(default="", init=False, repr=False)  # not state: the name of the embedding of tokens

    def prefix(self, table: Tensor, stream: Stream) -> tuple[nn.Module, int]:
        """What gives the vectors, as the backbone's ``take_prefix`` wants it, with the most of them before a text.

        ``table`` ``[vocabulary, width]`` are the embeddings of tokens.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        built: Any = model
        backbone: Any = getattr(model, "backbone", None)
        name = type(self).__module__.rpartition(".")[2].replace("_", "-")  # of the method, as users write it
        if not hasattr(backbone, "take_prefix"):
            raise ConfigError(
                f"{name} puts vectors before the tokens of a text, but {type(model).__name__} reads none; use model "
                "causal-lm"
            )
        if built.frozen is not None:
            raise ConfigError(
                f"model.frozen = '{built.frozen}': texts pass these layers once, but the vectors that {name} puts before "
                "them go through all layers; leave model.frozen out"
            )
        if built.cut is not None:
            raise ConfigError(
                f"strategy chain: another strategy cut the network behind '{built.cut}', but the vectors that {name} puts "
                "before a text go through all layers; keep one of the two"
            )
        model.requires_grad_(False)
        table = backbone.model.get_input_embeddings().weight
        self._table = next(n for n, p in model.named_parameters() if p is table)
        backbone.take_prefix(*self.prefix(table.detach(), stream))
        return model


def sampled(table: Tensor, n: int, rng: torch.Generator | None) -> Tensor:
    """The embeddings ``[n, width]`` float32 of n tokens drawn from the whole vocabulary; ``None``: by torch's generator."""
    return table[torch.randint(len(table), (n,), generator=rng)].float().clone()
