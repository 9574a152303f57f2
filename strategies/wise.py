"""WISE: edits in a side memory that answers for their prompts only, so that everything else stays with the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lab import seeding
from cl_lab.editable import Above, EditableModel, Site, check_plain_residual
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Patch, SidePatch, activation_gap, packed, shard_change, unpacked
from cl_lab.protocols import Editor

from ._edit_texts import descend, edit_site, forms, row_loss, unrelated_prompts


@dataclass
class Wise(Editor):
    """Edits go to a copy of one feed-forward matrix, which answers for prompts that reach it strongly enough.

    Wang et al. 2024 (WISE, arXiv 2405.14768). The side memory ``W'`` starts as the value matrix ``W`` of one late layer. An
    edit trains those entries of ``W'`` that its shard's random mask (share ``rho``) leaves free, for the new answer and for
    the margin of Eq. 5, with ``D`` the activation gap of Eq. 3::

        L = CE(y|x) + max(0, D(x_i) − α) + max(0, β − D(x_e)) + max(0, γ − (D(x_e) − D(x_i)))

    Each of ``edits_per_shard`` edits has its own shard; with ``mode=merge`` they are brought together by TIES. A prompt is
    answered by the shard whose gap is furthest above its threshold, by the model itself where none is; the choice is made
    once, from the prompt's tokens. ``α``, ``β`` and ``γ`` count in units of the model's own: the median over tokens of
    unrelated texts of ``‖W·A(x)‖₂`` at that layer; the paper's 5, 20 and 10 were made for models 4,096 wide. Further
    beyond the paper: the answer's end is learnt, earlier edits of the shard are rehearsed in every step (its B.3; their gaps
    all are), training stops when the answer is sure, and a shard's threshold is four fifths of the least gap of its edits,
    but not below what all but a ``false_positives`` share of unrelated prompts reach that were not trained on.
    """

    removable: ClassVar[bool] = False

    layer: int | None = knob(
        None, "layer whose down-projection gets a side memory; null: three quarters up (22 of 30)", ge=0
    )
    module: str | None = knob(None, "dotted path of the module instead, for a model whose parts are not found")
    mode: Literal["retrieve", "merge"] = knob("retrieve", "one memory for each shard, or all merged into one")
    rho: float = knob(0.2, "ρ, the share of entries that a shard's mask leaves free", gt=0, le=1)
    edits_per_shard: int = knob(500, "edits before the next shard begins", ge=1)
    alpha: float = knob(0.1, "α in units of the layer's own output: unrelated prompts stay below", ge=0)
    beta: float = knob(0.4, "β likewise: edits reach this", gt=0)
    gamma: float = knob(0.3, "γ likewise: edits stay this far above unrelated prompts", ge=0)
    optimizer: Literal["adam", "sgd"] = knob("adam", "what steps the free entries; the paper's is sgd")
    lr: float = knob(0.02, "learning rate; 1 for sgd", gt=0, le=1000)
    steps: int = knob(40, "steps for each patch, at most", ge=1)
    stop_at: float = knob(0.8, "stop when every token has this probability and the margins hold; 1: never", gt=0, le=1)
    replay: int = knob(2, "earlier edits rehearsed in every step", ge=0)
    contexts: int = knob(1, "beginnings put before each prompt in training", ge=0, le=8)
    chat: bool = knob(True, "also train the prompt as a chat's turn, where the model has a template")
    unrelated: int = knob(192, "unrelated prompts held away in training; others set the threshold", ge=1, le=256)
    precision: Literal["fp32", "bf16"] = knob(
        "fp32", "of the layers above, in training; bf16 is faster where the CPU has AMX"
    )
    false_positives: float = knob(0.02, "share of unrelated prompts that may reach the threshold, at most", ge=0, lt=1)
    seed: int = knob(0, "of the masks and of what is rehearsed", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"contexts": 0, "lr": 0.05, "steps": 150, "rho": 0.5, "unrelated": 16}

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        site = edit_site(model, self.layer, self.module, 0.76)
        check_plain_residual(model, site)
        there = [p for p in model.patches if isinstance(p, SidePatch) and p.path == site.path]
        made = sum(int(p.notes.get("edits", 1)) for p in there)
        shard = made // self.edits_per_shard
        own = [p for p in there if p.shard == shard]
        before = shard_change(own, site)
        mask = unpacked(own[0].places, before.numel()) if own else self._mask(before.numel(), shard)
        free = mask.nonzero().squeeze(1).to(before.device)

        chat = self.chat and model.tokenizer.can_chat
        held = earlier[len(earlier) - made % self.edits_per_shard :] if made % self.edits_per_shard else []
        chosen = self._rehearsed(held, made)
        pairs = [p for e in edits for p in forms(model, e, self.contexts, chat)]
        old = [p for e in chosen for p in forms(model, e, 0, chat)]
        with model.unrouted():  # what reaches the layer is the model's own, and so is what it gives to go on from
            at = model.above(model.rows([*pairs, *old]), site)
            away, kept = (unrelated_inputs(model, site, half, chat) for half in self._unrelated())
            unit = _unit(away, site)
            if brought := tuple(text for edit in edits for text in edit.irrelevant):
                away = _together(away, _inputs(model, brought, site, chat))
            known = prompt_inputs(model, site, tuple(e.prompt for e in held), chat) if held else None
        trained, notes = self._train(at, before, free, away, known, unit, len(pairs), edits)

        values = trained.to(torch.bfloat16)
        change = _with(before, free, values.float())
        gaps = activation_gap(change, at.inputs[: len(pairs)], at.asked[: len(pairs)])
        if known is not None:
            gaps = torch.cat([gaps, activation_gap(change, *known)])
        floor = activation_gap(change, *kept).quantile(1 - self.false_positives)
        return SidePatch(
            "wise",
            notes | {"edits": len(edits), "unit": unit},
            path=site.path,
            shard=shard,
            places=packed(mask.cpu()),
            values=values.cpu(),
            gap=float(gaps.min()),
            floor=float(floor),
            merge=self.mode == "merge",
        )

    def _mask(self, size: int, shard: int) -> Tensor:
        """The entries that shard may change: a ``rho`` share, drawn for each; they overlap, as the paper found best."""
        return torch.rand(size, generator=seeding.generator(self.seed, "wise", "mask", shard)) < self.rho

    def _rehearsed(self, held: Sequence[Edit], made: int) -> list[Edit]:
        order = seeding.permutation(len(held), self.seed, "wise", "replay", made).tolist()
        return [held[i] for i in order[: self.replay]]

    def _unrelated(self) -> list[tuple[str, ...]]:
        """Unrelated prompts to hold away in training, and others to set the threshold by."""
        texts = unrelated_prompts()
        return [tuple(texts[: self.unrelated]), tuple(texts[self.unrelated :][:128])]

    def _train(
        self,
        at: Above,
        before: Tensor,
        free: Tensor,
        away: tuple[Tensor, Tensor],
        known: tuple[Tensor, Tensor] | None,
        unit: float,
        new: int,
        edits: Sequence[Edit],
    ) -> tuple[Tensor, dict[str, Any]]:
        """The free entries' values on top of ``before``, trained on ``at``, whose first ``new`` rows are new; and notes."""
        alpha, beta, gamma = (unit * v for v in (self.alpha, self.beta, self.gamma))
        values = torch.zeros(len(free), device=before.device, requires_grad=True)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.SGD
        optimizer = kind([values], lr=self.lr)
        inputs, labels = at.inputs.float(), at.rows.labels.to(before.device)
        lengths = at.rows.length - at.rows.prompt

        def losses() -> tuple[Tensor, Tensor, bool]:
            change = _with(before, free, values)
            with torch.autocast(before.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = at.logits(inputs @ change.T)
            rows, likely = row_loss(logits, labels, lengths)
            gap, far = activation_gap(change, inputs, at.asked), activation_gap(change, *away)
            if known is not None:
                gap = torch.cat([gap, activation_gap(change, *known)])
            margin = _over(far - alpha) + _over(beta - gap) + _over(gamma - (gap[:, None] - far))
            answers = rows[:new].mean()
            loss = answers + margin
            if len(rows) > new:
                loss = loss + rows[new:].mean()
            return loss, answers, float(likely.min()) >= self.stop_at and float(margin.detach()) <= 0.01 * unit

        notes = descend(losses, optimizer, self.steps, f"wise: '{edits[0].prompt}'")
        return values.detach(), notes


def unrelated_inputs(model: EditableModel, site: Site, texts: tuple[str, ...], chat: bool) -> tuple[Tensor, Tensor]:
    """:func:`_inputs`, computed once for a model as long as its weights stay."""
    key = ("unrelated", site.path, texts, chat)
    if key not in model.memo:
        model.memo[key] = _inputs(model, texts, site, chat)
    found: tuple[Tensor, Tensor] = model.memo[key]
    return found


def prompt_inputs(model: EditableModel, site: Site, prompts: Sequence[str], chat: bool) -> tuple[Tensor, Tensor]:
    """:func:`_inputs` of prompts, each of them both as it is and as a chat's turn, computed once for each."""
    found = []
    for prompt in prompts:
        key = ("prompt", site.path, prompt, chat)
        if key not in model.memo:
            model.memo[key] = _inputs(model, [prompt, prompt] if chat else [prompt], site, chat)
        found.append(model.memo[key])
    longest = max(x.shape[1] for x, _ in found)
    inputs = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x, _ in found])
    return inputs, torch.cat([F.pad(m, (0, longest - m.shape[1])) for _, m in found])


def _inputs(model: EditableModel, texts: Sequence[str], site: Site, chat: bool) -> tuple[Tensor, Tensor]:
    """What prompts, half of them as a chat's turns, bring to the site, ``[B, T, in]``, and which tokens count ``[B, T]``.

    Of a chat's turn the template's tokens are left out: they count for nothing, and are most of it.
    """
    rows = model.rows([(model.encode_prompt(t, chat=chat and i % 2 == 1), []) for i, t in enumerate(texts)])
    kept = model.inputs(rows, [site])[site.path]
    own = [h[a : max(b, a + 1)] for h, a, b in zip(kept, rows.begin.tolist(), rows.until.tolist(), strict=True)]
    marks = [torch.ones(len(h), dtype=torch.bool) for h in own]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(own, batch_first=True).to(model.device), pad(marks, batch_first=True).to(model.device)


def _together(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(one[0].shape[1], two[0].shape[1])
    a, b = ([F.pad(x, (0, 0, 0, longest - x.shape[1])), F.pad(m, (0, longest - m.shape[1]))] for x, m in (one, two))
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])


def _with(before: Tensor, free: Tensor, values: Tensor) -> Tensor:
    return before.flatten().index_add(0, free, values).view(before.shape)


def _over(excess: Tensor) -> Tensor:
    """The mean of what exceeds 0, over those that do, as in the released code; 0 where none does."""
    over = excess.clamp(min=0)
    return over.sum() / (over.detach() > 0).sum().clamp(min=1)


def _unit(away: tuple[Tensor, Tensor], site: Site) -> float:
    """The median over unrelated tokens of the length of what the layer itself puts out."""
    inputs, asked = away
    return float((inputs @ site.weight.float().T).norm(dim=2)[asked].median())
