"""WISE as its released code does it, where that departs from the paper: to tell how much of a result is the code's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab import seeding
from cl_lab.editable import Above, EditableModel, Site
from cl_lab.facts import Edit
from cl_lab.hub import activation
from cl_lab.knobs import knob
from cl_lab.patches import Patch, ReleasedSidePatch, packed, released_change, token_gaps, unpacked
from cl_lab.protocols import Editor

from ._edit_texts import Pair, descend, edit_site, row_loss, unrelated_prompts
from .wise import over, place_in_shards, shard_mask

STARTS = ("I", "You", "Because", "Yes", "Q:")
"""What the model goes on with to make the beginnings that stand before a prompt."""


@dataclass
class WiseReleased(Editor):
    """WISE as released (EasyEdit 14cea82): its gap, routing, loss and constants, with every departure from the paper named.

    Wang et al. 2024 (WISE, arXiv 2405.14768); ``wise`` is the method as the paper has it, with what this house adds. What
    the code does otherwise than the paper, and is done so here:

    - The gap is ``D(x) = ‖σ(W'a) − σ(Wa)‖₂`` with σ the model's activation on the *output* of the down-projection; Eq. 3 has
      none. It is the mean over all tokens, the first and the answer's too, in training and in routing; of a pass of more
      than 100 tokens it is the greatest token's.
    - ``α, β, γ`` = 5, 20, 10 are absolute, whatever the model's width.
    - Who answers is decided in every pass: with a cache each written token is another decision, and an answer that is given
      beforehand helps to find itself. The memory acts on the whole text, not from its end.
    - A memory answers from ``act_ratio`` = .88 times the least gap of its edits (the paper: the least). Memories are
      compared by their raw gaps, so that the newest, below its own threshold, keeps an older one from answering.
    - SGD's weight decay of 1e-5 is not masked: in every step all entries of ``W'`` shrink, so a shard's change is dense.
    - The cross-entropy of ``T`` tokens is divided by ``T + 1``. The answer's end is not learnt, nor a chat's turn.
    - Ten beginnings stand before the prompt, five of 5 tokens and five of 10, which the model wrote; one irrelevant text an
      edit is held away. Earlier edits are not rehearsed (B.3 of the paper is off by default).
    - Training stops where the loss is at most .02 and has moved by at most 1e-4.

    Left out: padding in the gap and in the masks of labels (there is none here); one decision for all rows of a batch (the
    code serves batches of one; rows are decided each for itself); merging, at 1,000 edits or in mode Merge, where evaluating
    changes the model; the norm constraint of ±1 an entry, which does not bind; and the two regressions by which newer
    checkouts forget all edits but the last, and score each when it is made. The paper's and the code's ``edits_per_shard``
    are 500. Where an edit brings no irrelevant text, which stops the code, one of our own stands in for it; edits that share
    a patch, which it does not take, are trained together.
    """

    routes_once: ClassVar[bool] = False

    layer: int | None = knob(
        None, "layer whose down-projection gets a side memory; null: 27/31 of the way up (25 of 30)", ge=0
    )
    module: str | None = knob(None, "dotted path of the module instead, for a model whose parts are not found")
    rho: float = knob(0.2, "ρ, the share of entries that a shard's mask leaves free", gt=0, le=1)
    edits_per_shard: int = knob(500, "edits before the next shard begins", ge=1)
    alpha: float = knob(5.0, "α: irrelevant texts stay below", ge=0)
    beta: float = knob(20.0, "β: edits reach this", gt=0)
    gamma: float = knob(10.0, "γ: edits stay this far above irrelevant texts", ge=0)
    act_ratio: float = knob(0.88, "share of the least gap of its edits from which a memory answers", gt=0, le=1)
    lr: float = knob(1.0, "SGD's learning rate", gt=0, le=1000)
    weight_decay: float = knob(1e-5, "SGD's weight decay, on all entries", ge=0)
    steps: int = knob(70, "steps for each patch, at most", ge=1)
    beginnings: int = knob(5, "beginnings of each length put before the prompt in training", ge=0, le=len(STARTS))
    seed: int = knob(0, "of the masks", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"alpha": 0.5, "beta": 2.0, "gamma": 1.0, "rho": 0.5, "steps": 40, "beginnings": 0}

    def check(self, model: EditableModel) -> None:
        self._site(model)

    def _site(self, model: EditableModel) -> Site:
        return edit_site(model, self.layer, self.module, 27 / 31)

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        site = self._site(model)
        there = [p for p in model.patches if isinstance(p, ReleasedSidePatch) and p.path == site.path]
        shard = place_in_shards(there, edits, self.edits_per_shard, self.seed)
        own = [p for p in there if p.shard == shard]
        before = released_change(own, site)
        size = before.numel()
        mask = unpacked(own[0].places, size) if own else shard_mask(size, self.rho, shard, self.seed)
        free = mask.to(before.device).view(before.shape)
        with model.unrouted():
            texts = [pair for edit in edits for pair in self._texts(model, edit)]
            at = model.above(model.rows(texts + [self._irrelevant(model, edit) for edit in edits]), site)
        change, gaps, notes = self._train(model, at, site, before, free, len(texts), edits)
        return ReleasedSidePatch(
            "wise-released",
            notes | {"edits": len(edits)},
            path=site.path,
            shard=shard,
            places=packed(mask),
            values=(change - before)[free].cpu(),
            gap=float(gaps[: len(texts)].view(len(edits), -1).mean(1).min()),
            whole=True,
            ratio=self.act_ratio,
            decay=(1 - self.lr * self.weight_decay) ** notes["steps"],
        )

    def _texts(self, model: EditableModel, edit: Edit) -> list[Pair]:
        """The edit's prompt as it is and behind each beginning, with the new answer; its end is not among it."""
        answer = model.encode_answer(edit.answer, end=False)
        prompts = [edit.prompt, *(f"{begun} {edit.prompt}" for begun in self._beginnings(model))]
        return [(model.encode_prompt(text), answer) for text in prompts]

    def _beginnings(self, model: EditableModel) -> list[str]:
        """What the model, unedited, makes of some short words: in 5 tokens, and in 10."""
        key = ("wise-released", "beginnings", self.beginnings)
        if key not in model.origin:
            starts = STARTS[: self.beginnings]
            with model.unpatched():
                model.origin[key] = [
                    f"{start} {more}"
                    for tokens in (5, 10)
                    for start, more in zip(
                        starts, model.write(starts, tokens=tokens, top_k=1) if starts else [], strict=True
                    )
                ]
        kept: list[str] = model.origin[key]
        return kept

    def _irrelevant(self, model: EditableModel, edit: Edit) -> Pair:
        """One text that has nothing to do with the edit; no answer is learnt of it."""
        ours = unrelated_prompts()
        text = edit.irrelevant[0] if edit.irrelevant else ours[seeding.derive(0, "irrelevant", edit.prompt) % len(ours)]
        return model.encode_prompt(text), []

    def _train(
        self,
        model: EditableModel,
        at: Above,
        site: Site,
        before: Tensor,
        free: Tensor,
        count: int,
        edits: Sequence[Edit],
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """``W' − W`` ``[out, in]`` on top of ``before``, the gaps of all rows with it, and notes.

        The first ``count`` rows of ``at`` are the edits', the others irrelevant; ``free`` is the mask ``[out, in]``.
        """
        weight, act = site.weight.float(), activation(model.model.config)
        memory = (weight + before).requires_grad_()
        memory.register_hook(lambda gradient: gradient * free)
        optimizer = torch.optim.SGD([memory], lr=self.lr, weight_decay=self.weight_decay)
        inputs, read = at.inputs.float(), at.rows.read.to(before.device)
        with torch.no_grad():
            out = site.module.forward(at.inputs).float()
        labels = at.rows.labels.to(before.device)
        lengths = (at.rows.length - at.rows.prompt)[:count]
        last = float("inf")

        def gaps(more: Tensor) -> Tensor:
            return (token_gaps(out, more, act) * read).sum(1) / read.sum(1)

        def losses() -> tuple[Tensor, Tensor, bool]:
            nonlocal last
            more = inputs @ (memory - weight).T
            rows, _ = row_loss(at.logits(more), labels, lengths)
            answers = (rows * (lengths / (lengths + 1)).to(rows)).mean()  # the mean counts one place too many
            near, far = gaps(more).split([count, len(inputs) - count])
            loss = answers + over(far - self.alpha) + over(self.beta - near) + over(self.gamma - near[:, None] + far)
            value, then = float(loss.detach()), last
            last = value
            return loss, answers, abs(value - then) <= 1e-4 and value <= 0.02

        notes = descend(losses, optimizer, self.steps, f"wise-released: '{edits[0].shown}'")
        change = memory.detach() - weight
        return change, gaps(inputs @ change.T), notes
