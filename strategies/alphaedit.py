"""AlphaEdit: MEMIT's change kept to the directions that other texts' keys do not use, with earlier edits' keys held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_lab.editable import EditableModel, Site
from cl_lab.errors import ConfigError
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta, Patch, WeightPatch

from ._key_values import SpreadEditor, key_moments, least_squares

_SAME = 0.98  # cosine from which an earlier key is the new one's


@dataclass
class AlphaEdit(SpreadEditor):
    """Null-space constrained editing: changes act only where the keys that are to keep their values have next to nothing.

    Fang et al. 2024 (AlphaEdit, arXiv 2410.02355). With ``P`` the projection on the eigenvectors of ``C = E[k kᵀ]`` whose
    eigenvalue is below ``threshold`` times the mean one, this batch's keys ``K`` and missing values ``R`` as columns, and
    the keys ``K_p`` of all edits before it (Eq. 14), layer after layer as MEMIT does::

        Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + l2 I)⁻¹

    which is the ridge regression of ``R`` at ``K`` and of nothing at ``K_p`` on projected keys. Each patch keeps its own
    keys, so one that is taken away frees them. ``C`` is the unedited model's. The paper's threshold is an absolute 0.02.

    An earlier key that is nearly a new one gives way, or nothing could be corrected twice. An edit needs its subject, as it
    stands in the prompt.
    """

    threshold: float = knob(0.1, "eigenvalues below this are null, in units of the mean eigenvalue", gt=0)
    l2: float = knob(1.0, "L2, the weight of the change's own length", gt=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"layers": [0], "contexts": 0, "clamp": 30.0, "kl": 0.0, "steps": 150, "l2": 5.0, "threshold": 1.0}

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        changes, keys, notes = self._spread(model, edits, "alphaedit")
        kept = {f"{path}:keys": own for path, own in keys.items()}
        return WeightPatch("alphaedit", notes, changes, statistics=kept)

    def _update(self, model: EditableModel, site: Site, keys: Tensor, changes: Tensor) -> Delta:
        used = used_directions(model, site, self.threshold)
        held, new = (outside(k, used) for k in (kept_keys(model, site), keys))
        cosines = torch.nn.functional.normalize(held, dim=1) @ torch.nn.functional.normalize(new, dim=1).T
        whole = torch.cat([held[(cosines < _SAME).all(1)], new])
        return least_squares(whole, whole / self.l2, changes)


def used_directions(model: EditableModel, site: Site, threshold: float) -> Tensor:
    """Eigenvectors ``[in, n]`` float64 of ``C`` that its null space is free of. Raises :class:`ConfigError` if all are."""
    name = ("used directions", site.path, threshold)
    if name not in model.origin:
        (moments,) = key_moments(model, [site])
        values, vectors = torch.linalg.eigh(moments)
        model.origin[name] = vectors[:, values >= threshold * values.mean()]
    found: Tensor = model.origin[name]
    if found.shape[1] == len(found):
        raise ConfigError(f"threshold = {threshold}: no eigenvalue of '{site.path}' is below it; raise it")
    return found


def outside(keys: Tensor, used: Tensor) -> Tensor:
    """The part of ``keys`` ``[m, in]`` that lies in none of the orthonormal directions ``used`` ``[in, n]``; float64."""
    keys = keys.double()
    return keys - (keys @ used) @ used.T


def kept_keys(model: EditableModel, site: Site) -> Tensor:
    """The keys ``[m, in]`` of the edits whose patches lie on ``model``, oldest first."""
    name = f"{site.path}:keys"
    kept = [p.statistics[name] for p in model.patches if isinstance(p, WeightPatch) and name in p.statistics]
    return torch.cat(kept) if kept else torch.zeros(0, site.weight.shape[1])
