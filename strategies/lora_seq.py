"""Sequential LoRA: one adapter for all experiences (the baseline SeqLoRA of Wang et al., EMNLP 2023 Findings)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cl_lab.adapters import adapted_layers
from cl_lab.errors import ConfigError
from cl_lab.protocols import Strategy
from cl_lab.records import Objective, Stream


@dataclass
class LoRASeq(Strategy):
    """One low-rank adapter that learns one experience after another: fine-tuning, of a model with adapters.

    What ``naive`` does, under the name that the literature gives it (Wang et al. 2023, arXiv 2310.14152); and a model
    without adapters is refused, so that the name is true.
    """

    objectives: ClassVar[frozenset[Objective]] = frozenset({"language"})

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if not adapted_layers(model):
            raise ConfigError(
                f"lora-seq trains a low-rank adapter, but {type(model).__name__} has none; use model causal-lm with "
                "adapt: lora, or strategy naive"
            )
        return model
