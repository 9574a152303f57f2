"""Incremental LoRA: an adapter for every experience (the baseline IncLoRA of Wang et al., EMNLP 2023 Findings)."""

from __future__ import annotations

from dataclasses import dataclass

from ._adapters import PastAdapters


@dataclass
class LoRAInc(PastAdapters):
    """A new low-rank adapter for every experience; those of the past are frozen, and all are summed.

    After the t-th experience the model answers with ``W₀ + (α/r) Σ_{i≤t} B_i A_i``; while it is learnt, ``A_t`` and ``B_t``
    alone are trained (IncLoRA of Wang et al. 2023, arXiv 2310.14152). No task label is needed, for all adapters always
    answer; so the new one still disturbs what the past ones do, only more slowly than where one adapter is trained
    throughout (``naive``). The past costs ``r (inputs + outputs)`` numbers per layer and experience.
    """
