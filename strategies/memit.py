"""MEMIT: a batch of facts by least squares, spread over the feed-forward matrices of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cl_lab.editable import EditableModel, Site
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta, Patch, WeightPatch

from ._key_values import SpreadEditor, key_moments, least_squares, whiten


@dataclass
class MEMIT(SpreadEditor):
    """Mass-Editing Memory: in each of some layers, the least change that brings the new values at the subjects' keys.

    Meng et al. 2023 (MEMIT, arXiv 2210.07229). With the edits' keys ``K`` and what is missing of their values ``R`` as
    columns, a layer gets the share ``R/l`` with ``l`` layers to come, itself counted (Eq. 20), and by Eq. 14::

        Δ = (R/l) Kᵀ (λC + K Kᵀ)⁻¹,        C = E[k kᵀ]

    ``weight`` is λ: the more, the less other keys' values move and the less of ``R`` is brought; what one layer leaves the
    next sees. The paper's 15,000 goes with keys ten times as wide. ``C`` comes from few texts, so ``ridge`` times its mean
    eigenvalue is added to its diagonal. An edit needs its subject, as it stands in the prompt. Made for many edits at once
    (``--batch-size``): earlier patches' keys are not kept.
    """

    weight: float = knob(100.0, "λ, the weight of C beside the edits' keys", gt=0)
    ridge: float = knob(0.1, "added to C's diagonal, in units of its mean eigenvalue", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"layers": [0], "contexts": 0, "clamp": 30.0, "kl": 0.0, "steps": 150, "weight": 1.0}

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        changes, _, notes = self._spread(model, edits, "memit")
        return WeightPatch("memit", notes, changes)

    def _update(self, model: EditableModel, site: Site, keys: Tensor, changes: Tensor) -> Delta:
        (moments,) = key_moments(model, [site])
        return least_squares(keys, whiten(keys, moments, self.ridge) / self.weight, changes)
