"""GRACE: a codebook of prompts beside one layer; what is near an entry gets its answer, everything else the model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab.editable import Above, EditableModel, Rows, Site
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import KeyPatch, Patch
from cl_lab.protocols import Editor

from ._edit_texts import descend, edit_site, forms, refuse_broken, row_loss, unrelated_prompts


@dataclass
class Grace(Editor):
    """Edits are entries of a codebook at one feed-forward matrix: what the prompt reads there, and what to add for it.

    Hartvigsen et al. 2023 (GRACE, arXiv 2211.11031). An entry's key ``k`` is what the prompt's last token brings to the
    layer, its value ``v`` is trained by Adam for the new answer, and it acts for prompts within its radius ``ε``::

        h_out + v_i   with   i = argmin_i ‖h − k_i‖₂,   if ‖h − k_i‖₂ ≤ ε_i

    Where a new key lies near one of another answer, both keep to half the distance between them; this is worked out when the
    codebook is put together, so taking an entry away gives its neighbours their reach back.

    What differs from the paper: the value is *added* to what the layer puts out, from the prompt's last token to the end of
    the answer, not put in its place, so it starts from the model's own. The radius is no absolute number but ``reach`` times
    the median distance between the keys of unrelated prompts, and does not grow when a near edit has the same answer: that
    one gets an entry of its own. The prompt as a chat's turn is an entry of its own, too. Answers end with the end token.
    """

    removable: ClassVar[bool] = True

    layer: int | None = knob(None, "layer whose down-projection has the codebook; null: 7/8 up", ge=0)
    module: str | None = knob(None, "dotted path of the module instead, for a model whose parts are not found")
    radius: float | None = knob(None, "ε of a new entry; null: by reach", gt=0)
    reach: float = knob(0.4, "ε as a share of the median distance between unrelated prompts' keys", gt=0, le=1)
    lr: float = knob(1.0, "Adam's learning rate, in units of the layer's own output", gt=0, le=1000)
    steps: int = knob(50, "steps for each patch, at most", ge=1)
    stop_at: float = knob(0.9, "stop when every token of every answer has this probability; 1: never", gt=0, le=1)
    chat: bool = knob(True, "also make an entry for the prompt as a chat's turn, where the model has a template")
    unrelated: int = knob(32, "unrelated prompts that the radius is taken from", ge=2)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"layer": 1, "lr": 0.3, "steps": 200, "unrelated": 8}

    def check(self, model: EditableModel) -> None:
        self._site(model)

    def _site(self, model: EditableModel) -> Site:
        return edit_site(model, self.layer, self.module, 0.87)

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        site = self._site(model)
        chat = self.chat and model.tokenizer.can_chat
        pairs = [p for e in edits for p in forms(model, e, 0, chat)]
        labels = [answer_label(e.answer) for e in edits for _ in range(1 + chat)]
        with model.unrouted():
            at = model.above(model.rows(pairs), site)
            scales = [self._scales(model, site, as_chat) for as_chat in (False, True)[: 1 + chat]]
        unit = scales[0][1]
        refuse_broken(torch.tensor(sum(map(sum, scales))), f"grace: '{edits[0].shown}'")
        values, notes = self._train(at, unit, edits)
        radii = [self.radius or self.reach * scales[i % (1 + chat)][0] for i in range(len(pairs))]
        return KeyPatch(
            "grace",
            notes | {"edits": len(edits), "unit": unit},
            path=site.path,
            keys=last_asked(at.inputs, at.rows).float().cpu(),
            values=values.cpu(),
            radii=torch.tensor(radii),
            labels=torch.tensor(labels),
        )

    def _scales(self, model: EditableModel, site: Site, chat: bool) -> tuple[float, float]:
        """Of unrelated prompts: the median distance between their keys, and the median length of the site's output."""
        key = ("grace", site.path, self.unrelated, chat)
        if key not in model.memo:
            rows = model.rows([(model.encode_prompt(t, chat=chat), []) for t in unrelated_prompts()[: self.unrelated]])
            heard = model.inputs(rows, [site])[site.path]
            keys = torch.stack([h[until - 1] for h, until in zip(heard, rows.until.tolist(), strict=True)])
            length = (keys @ site.weight.float().cpu().T).norm(dim=1).median()
            model.memo[key] = float(torch.pdist(keys).median()), float(length)
        found: tuple[float, float] = model.memo[key]
        return found

    def _train(self, at: Above, unit: float, edits: Sequence[Edit]) -> tuple[Tensor, dict[str, Any]]:
        """Values ``[B, width]``, one for each row of ``at``, after training; notes."""
        rows, width = at.rows, at.out.shape[2]
        behind = torch.arange(1, rows.ids.shape[1] + 1)[None] >= rows.until[:, None]
        behind = behind[..., None].to(at.out.device)
        labels, lengths = rows.labels.to(at.out.device), rows.length - rows.prompt
        values = torch.zeros(len(rows), width, device=at.out.device, requires_grad=True)
        # A coordinate's share of the output's length: one knob fits layers of any size and width.
        optimizer = torch.optim.Adam([values], lr=self.lr * unit / width**0.5)

        def losses() -> tuple[Tensor, Tensor, bool]:
            each, likely = row_loss(at.logits(behind * values[:, None]), labels, lengths)
            return each.sum(), each.mean(), float(likely.min()) >= self.stop_at  # the rows have nothing in common

        notes = descend(losses, optimizer, self.steps, f"grace: '{edits[0].shown}'")
        return values.detach(), notes


def last_asked(inputs: Tensor, rows: Rows) -> Tensor:
    """What each row's last prompt token, a template's not counted, brings: ``[B, in]`` from ``inputs`` ``[B, T, in]``."""
    return inputs[torch.arange(len(rows)), rows.until - 1]


def answer_label(answer: str) -> int:
    """A number, 63 bits, that tells an answer from others, whatever its case and outer space."""
    digest = hashlib.sha256(answer.strip().casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
