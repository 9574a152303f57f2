"""ROME: one rank-one change of one feed-forward matrix for each fact, at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cl_lab.editable import EditableModel, Site
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta, Patch, WeightPatch

from ._edit_texts import edit_site
from ._key_values import KeyValueEditor, changed, joined, key_moments, rank_one, subject_inputs, whiten


@dataclass
class ROME(KeyValueEditor):
    """Rank-One Model Editing: the new value is written at the subject's key, and the values of other keys move the least.

    Meng et al. 2022 (ROME, arXiv 2202.05262), Eq. 2, with ``k*`` the mean key of the subject's last token over the prompt's
    forms and ``v* = W k* + δ``::

        W' = W + δ (C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*),        C = E[k kᵀ]

    so that ``W' k* = v*`` exactly. Both ``k*`` are that mean, as in R-ROME (Gupta et al. 2024, arXiv 2403.07175): the
    plain prompt's key in one of the places is what lets single edits break models. ``C`` comes from few texts, so ``ridge``
    times its mean eigenvalue is added to its diagonal. The edits of a patch are written one after the other, each found
    with those before it in place; keys are read below the change, so none of them moves.

    An edit needs its subject, as it stands in the prompt. Nothing holds earlier edits in place.
    """

    layer: int | None = knob(None, "layer whose down-projection is changed; null: a third up", ge=0)
    module: str | None = knob(None, "dotted path of the module instead, for a model whose parts are not found")
    ridge: float = knob(0.1, "added to C's diagonal, in units of its mean eigenvalue", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"layer": 0, "contexts": 0, "clamp": 30.0, "kl": 0.0, "steps": 150}

    def check(self, model: EditableModel) -> None:
        self._site(model)

    def _site(self, model: EditableModel) -> Site:
        return edit_site(model, self.layer, self.module, 1 / 3)

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        site = self._site(model)
        done: list[Delta] = []
        losses: list[float] = []
        steps = 0
        with model.unrouted():
            for edit in edits:
                with changed(model, {site.path: joined(done)} if done else {}):
                    delta, notes = self._search(model, site, [edit], "rome")
                (key,) = subject_inputs(model, self._subjects(model, [edit]), [site])
                (moments,) = key_moments(model, [site])
                done.append(rank_one(key[0], delta[0], whiten(key, moments, self.ridge)[0]))
                steps, losses = max(steps, notes["steps"]), [*losses, notes["loss"]]
        total = {"steps": steps, "loss": sum(losses) / len(losses), "edits": len(edits)}
        return WeightPatch("rome", total, {site.path: joined(done)})
