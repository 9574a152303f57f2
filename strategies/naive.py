"""Plain fine-tuning, the lower bound of continual learning."""

from __future__ import annotations

from dataclasses import dataclass

from cl_lab.protocols import Strategy


@dataclass
class Naive(Strategy):
    """Fine-tune on each experience in turn and do nothing against forgetting (lower bound)."""
