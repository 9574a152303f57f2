"""Masked fine-tuning of one module: the simplest editor, and under honest decoding a hard one to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab.editable import EditableModel, Site
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta, Patch, WeightPatch
from cl_lab.protocols import Editor

from ._edit_texts import descend, edit_site, forms, of_like_length, rows_loss


@dataclass
class FTM(Editor):
    """FT-M: fine-tune one feed-forward matrix on the new answers, the prompts masked out of the loss.

    Zhang et al. 2024 (arXiv 2401.01286), FT-M; Meng et al. 2022's FT trains the last prompt token only. Adam on one
    down-projection until every answer token is likely enough; the answer's end is learnt, too, so that free decoding stops.
    The change is a plain one of weights: it holds for every prompt, and nothing keeps other answers in place.
    """

    folds: ClassVar[bool] = True

    layer: int | None = knob(None, "layer whose down-projection is trained; null: two thirds up", ge=0)
    module: str | None = knob(None, "dotted path of the module instead, for a model whose parts are not found")
    lr: float = knob(5e-4, "Adam's learning rate", gt=0, le=1000)
    steps: int = knob(25, "steps for each patch, at most", ge=1)
    stop_at: float = knob(0.9, "stop when every token of every answer has this probability; 1: never", gt=0, le=1)
    contexts: int = knob(2, "beginnings put before each prompt in training", ge=0, le=8)
    chat: bool = knob(True, "also train the prompt as a chat's turn, where the model has a template")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"lr": 0.02, "steps": 60, "contexts": 0}

    def check(self, model: EditableModel) -> None:
        self._site(model)

    def _site(self, model: EditableModel) -> Site:
        return edit_site(model, self.layer, self.module, 2 / 3)

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        site = self._site(model)
        chat = self.chat and model.tokenizer.can_chat
        texts = of_like_length([p for e in edits for p in forms(model, e, self.contexts, chat)])
        with model.unrouted():  # what answers for some prompts only, and goes by them, is not told of these
            parts = [(at, at.inputs.float()) for some in texts for at in [model.above(model.rows(some), site)]]
            delta = torch.zeros(site.weight.shape, device=model.device, requires_grad=True)
            optimizer = torch.optim.Adam([delta], lr=self.lr)

            def losses() -> tuple[Tensor, Tensor, bool]:
                rows, likely = rows_loss((at.logits(inputs @ delta.T), at.rows) for at, inputs in parts)
                return rows.mean(), rows.mean(), float(likely.min()) >= self.stop_at

            notes = descend(losses, optimizer, self.steps, f"ft-m: '{edits[0].shown}'") | {"edits": len(edits)}
            return WeightPatch("ft-m", notes, {site.path: Delta(dense=delta.detach().cpu())})
