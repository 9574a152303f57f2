"""WISE: edits in a side memory that answers for their prompts only, so that everything else stays with the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lab import seeding
from cl_lab.editable import Above, EditableModel, Site
from cl_lab.facts import Edit, normalised
from cl_lab.knobs import knob
from cl_lab.patches import Patch, SidePatch, packed, shard_change, threshold, unpacked
from cl_lab.protocols import Editor

from ._edit_texts import CONTEXTS, descend, edit_site, forms, names, neighbours, row_loss, unrelated_prompts

Asked = tuple[str, bool]
"""A prompt, and whether it is asked as a chat's turn."""


@dataclass
class Wise(Editor):
    """Edits go to a copy of one feed-forward matrix, which answers for prompts that reach it strongly enough.

    Wang et al. 2024 (WISE, arXiv 2405.14768). The side memory ``W'`` starts as the value matrix ``W`` of one late layer. An
    edit trains those entries of ``W'`` that its shard's random mask (share ``rho``) leaves free, for the new answer and for
    the margin of Eq. 5, with ``D`` the activation gap of Eq. 3::

        L = CE(y|x) + max(0, D(x_i) − α) + max(0, β − D(x_e)) + max(0, γ − (D(x_e) − D(x_i)))

    Each ``edits_per_shard`` edits have a shard of their own; with ``mode=merge`` TIES brings them together. A prompt is
    answered by a shard whose gap is above its threshold, by the model itself where none's is; the choice is made once,
    from the prompt's tokens. ``D``, ``α``, ``β``, ``γ`` count in units of the model's own: the median over tokens of
    unrelated texts of ``‖W·A(x)‖₂`` at that layer; the paper's 5, 20 and 10 were made for models 4,096 wide.

    Beyond the paper: where several shards are above their thresholds, as of edits about the same subject, the one answers
    whose own prompts the question is most like, not the one with the greatest gap, which says how strongly a memory acts
    (:class:`~cl_lab.patches.SideMemory`). A memory acts from the prompt's last own token on, so that what is before it is
    read once for all steps and the margin's tokens and the answer's do not get in each other's way. A shard is one edit,
    unless told otherwise: none overwrites another, and any can be taken away without touching the rest. In larger ones all
    earlier edits are rehearsed, ``replay`` in each step (the paper's B.3), but for those of a prompt that is edited anew:
    of two edits of one prompt the newer answers, and the older again when it is taken away. Held away are unrelated
    prompts, the edit's own with other subjects, and the nearest prompts of other shards. The answer's end is learnt. A
    shard's threshold is seven tenths of the least gap of its edits, but not below what all but a ``false_positives`` share
    of unrelated prompts reach that were not trained on.

    ``D`` is a mean over the prompt's tokens, of which all but the subject's are the same in the same question about another:
    alone it answers "The capital of Japan is" with Australia's. So where an edit says its subject, a prompt must name it, or
    one of its aliases: by its words, in any case (``subjects``; :mod:`cl_lab.subjects`). Who writes another name, or "it",
    is answered by the model itself.
    """

    removable: ClassVar[bool] = False

    layer: int | None = knob(
        None, "layer whose down-projection gets a side memory; null: three quarters up (22 of 30)", ge=0
    )
    module: str | None = knob(None, "dotted path of the module instead, for a model whose parts are not found")
    mode: Literal["retrieve", "merge"] = knob("retrieve", "one memory for each shard, or all merged into one")
    rho: float = knob(0.2, "ρ, the share of entries that a shard's mask leaves free", gt=0, le=1)
    edits_per_shard: int = knob(
        1, "edits before the next shard begins; the paper's is 500, for models 4,096 wide", ge=1
    )
    alpha: float = knob(0.1, "α in units of the layer's own output: unrelated prompts stay below", ge=0)
    beta: float = knob(0.4, "β likewise: edits reach this", gt=0)
    gamma: float = knob(0.3, "γ likewise: edits stay this far above unrelated prompts", ge=0)
    margin: float = knob(2.0, "weight of the margin, in those units, beside the cross-entropy", gt=0)
    optimizer: Literal["adam", "sgd"] = knob("adam", "what steps the free entries; the paper's is sgd")
    lr: float = knob(0.02, "learning rate; 1 for sgd", gt=0, le=1000)
    steps: int = knob(30, "steps for each patch, at most", ge=1)
    stop_at: float = knob(
        1.0,
        "stop when every token has this probability and prompts are told apart; 1: never, which tells them apart best",
        gt=0,
        le=1,
    )
    replay: int = knob(4, "earlier edits of the shard rehearsed in every step, in turn; 0: none", ge=0)
    contexts: int = knob(1, "beginnings put before each prompt in training", ge=0, le=8)
    chat: bool = knob(True, "also train the prompt as a chat's turn, where the model has a template")
    unrelated: int = knob(192, "unrelated prompts held away in training; others set the threshold", ge=1, le=256)
    neighbours: int = knob(
        16,
        "the edit's prompt with so many other subjects, and so many prompts of other shards, held away likewise",
        ge=0,
    )
    subjects: bool = knob(True, "a prompt must name the edit's subject, or one of its aliases, where the edit says it")
    sampled: int = knob(32, "of the unrelated prompts, those that a step looks at; it looks at all neighbours", ge=1)
    precision: Literal["fp32", "bf16"] = knob(
        "fp32", "of the layers above, in training; bf16 is faster where the CPU has AMX"
    )
    false_positives: float = knob(0.02, "share of unrelated prompts that may reach the threshold, at most", ge=0, lt=1)
    seed: int = knob(0, "of the masks and of what a step looks at", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"contexts": 0, "lr": 0.05, "steps": 150, "stop_at": 0.8, "rho": 0.5, "unrelated": 16}

    def check(self, model: EditableModel) -> None:
        self._site(model)

    def _site(self, model: EditableModel) -> Site:
        return edit_site(model, self.layer, self.module, 0.76)

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        site = self._site(model)
        there = [p for p in model.patches if type(p) is SidePatch and p.path == site.path]
        shard = place_in_shards(there, edits, self.edits_per_shard, self.seed)
        own = [p for p in there if p.shard == shard]
        before = shard_change(own, site)
        mask = (
            unpacked(own[0].places, before.numel()) if own else shard_mask(before.numel(), self.rho, shard, self.seed)
        )
        free = mask.nonzero().squeeze(1).to(before.device)

        chat = self.chat and model.tokenizer.can_chat
        held, others = (besides(some, edits) for some in apart(earlier, there, shard))
        with model.unrouted():  # what reaches the layer is the model's own, and so is what it gives to go on from
            at = _rows_above(model, site, edits, self.contexts, chat, heard=True)
            old = self._rehearsed(model, site, held, shard, chat)
            away, kept = (heard_unrelated(model, site, in_turn(half, chat)) for half in self._unrelated())
            unit = _unit(away, site)
            forget_all_but(model, site, [e.prompt for e in [*earlier, *edits]])
            beside = dict.fromkeys(text for e in edits for text in [*e.irrelevant, *neighbours(e, self.neighbours)])
            like = nearest(model, site, [e.prompt for e in edits], [e.prompt for e in others], self.neighbours)
            near = [heard_prompts(model, site, both_ways(beside, chat))] if beside else []
            if more := [text for text in dict.fromkeys(like) if text not in beside]:
                near.append(heard_once(model, site, both_ways(more, chat)))
            asked = heard_once(model, site, both_ways([e.prompt for e in [*edits, *held]], chat))
            own_prompts = heard_once(model, site, both_ways([e.prompt for e in edits], chat))
        forms_each = len(at.heard) // len(edits)  # the prompt, behind its beginnings, and in a chat
        if behind := [h for i, h in enumerate(at.heard) if 1 <= i % forms_each <= self.contexts]:
            asked = together([asked, as_heard(behind)])
        centre = away.tokens.mean(0)
        trained, notes = self._train(at, old, before, free, away, together(near) if near else None, asked, unit, edits)

        named = [names(e) if self.subjects else [] for e in edits]
        values = trained.to(torch.bfloat16)
        change = _with(before, free, values.float())
        gap, floor = float(asked.gap(change).min()), float(kept.gap(change).quantile(1 - self.false_positives))
        patch = SidePatch(
            "wise",
            notes | {"edits": len(edits), "unit": unit},
            path=site.path,
            shard=shard,
            places=packed(mask.cpu()),
            values=values.cpu(),
            gap=gap,
            floor=floor,
            merge=self.mode == "merge",
            subjects=tuple(dict.fromkeys(chain(*named))) if all(named) else (),
            keys=own_prompts.directions(centre).cpu(),
            centre=centre.cpu(),
        )
        # No error: it may still answer, if its prompts' other forms do, or once the shard's next edit has rehearsed it.
        patch.notes["out_of_reach"] = int((own_prompts.gap(change) < threshold([patch])).sum())
        return patch

    def _rehearsed(self, model: EditableModel, site: Site, held: Sequence[Edit], shard: int, chat: bool) -> list[Above]:
        """The shard's earlier edits, ``replay`` at a time; those that are complete are read once for a shard's life."""
        key = ("wise", "rehearsed", site.path)
        kept: dict[Any, Above] = model.memo[key][1] if key in model.memo and model.memo[key][0] == shard else {}
        groups = [held[i : i + self.replay] for i in range(0, len(held), self.replay)] if self.replay else []
        named = {tuple((e.prompt, e.answer) for e in group): group for group in groups}
        kept = {n: kept[n] if n in kept else _rows_above(model, site, group, 0, chat) for n, group in named.items()}
        model.memo[key] = shard, kept
        return list(kept.values())

    def _unrelated(self) -> list[tuple[str, ...]]:
        """Unrelated prompts to hold away in training, and others to set the threshold by."""
        texts = unrelated_prompts()
        return [tuple(texts[: self.unrelated]), tuple(texts[self.unrelated :][:128])]

    def _train(
        self,
        at: Above,
        old: Sequence[Above],
        before: Tensor,
        free: Tensor,
        away: Heard,
        near: Heard | None,
        asked: Heard,
        unit: float,
        edits: Sequence[Edit],
    ) -> tuple[Tensor, dict[str, Any]]:
        """The free entries' values on top of ``before``, trained on ``at`` and, in turn, on ``old``; and notes."""
        alpha, beta, gamma = (unit * v for v in (self.alpha, self.beta, self.gamma))
        values = torch.zeros(len(free), device=before.device, requires_grad=True)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.SGD
        optimizer = kind([values], lr=self.lr)
        drawn = seeding.generator(self.seed, "wise", "sampled", edits[0].prompt)
        sure = [0.0] * len(old)
        turn = 0

        def said(rows: Above, change: Tensor) -> tuple[Tensor, float]:
            with torch.autocast(before.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = rows.logits(rows.inputs.float() @ change.T)
            labels = rows.rows.labels.to(before.device)
            each, likely = row_loss(logits, labels, rows.rows.length - rows.rows.prompt)
            return each.mean(), float(likely.min())

        def losses() -> tuple[Tensor, Tensor, bool]:
            nonlocal turn
            change = _with(before, free, values)
            answers, likely = said(at, change)
            gap, far = asked.gap(change), away.drawn(self.sampled, drawn).gap(change)
            if near is not None:
                far = torch.cat([far, near.gap(change)])
            margin = over(far - alpha) + over(beta - gap) + over(gamma - (gap[:, None] - far))
            loss = answers + self.margin / unit * margin
            if old:
                more, sure[turn] = said(old[turn], change)
                loss, turn = loss + more, (turn + 1) % len(old)
            apart = float(0.7 * gap.detach().min()) >= float(far.detach().quantile(1 - self.false_positives))
            return loss, answers, apart and min([likely, *sure]) >= self.stop_at

        notes = descend(losses, optimizer, self.steps, f"wise: '{edits[0].shown}'")
        return values.detach(), notes


def place_in_shards(there: Sequence[SidePatch], edits: Sequence[Edit], size: int, seed: int) -> int:
    """The shard that ``edits`` go to: the newest patch's, or a new one where ``size`` edits are in that already.

    A new shard's number is drawn by what goes there first. Counted on, it would be one that had been given before whenever
    the newest edit was undone, and brought back that edit would lie in one memory with another.
    """
    if there:
        shard = there[-1].shard
        if sum(_edits_of(p) for p in there if p.shard == shard) < size:
            return shard
    return seeding.derive(seed, "wise", "shard", len(there), edits[0].prompt, edits[0].answer)


def apart(earlier: Sequence[Edit], there: Sequence[SidePatch], shard: int) -> tuple[list[Edit], list[Edit]]:
    """The ``earlier`` edits, the last of which made the patches ``there``, in order: those of a shard, and the others."""
    mine = [p.shard == shard for p in there for _ in range(_edits_of(p))]
    mine = ([False] * len(earlier) + mine)[len(mine) :]  # the last of them, and as many as are known
    own = [e for e, is_mine in zip(earlier, mine, strict=True) if is_mine]
    return own, [e for e, is_mine in zip(earlier, mine, strict=True) if not is_mine]


def besides(some: Sequence[Edit], edits: Sequence[Edit]) -> list[Edit]:
    """Those of ``some`` whose prompt is none of ``edits``'s: what is corrected is neither rehearsed nor held away from."""
    own = {normalised(e.prompt) for e in edits}
    return [e for e in some if normalised(e.prompt) not in own]


def _edits_of(patch: SidePatch) -> int:
    return int(patch.notes.get("edits", 1))


def shard_mask(size: int, rho: float, shard: int, seed: int) -> Tensor:
    """The entries that a shard may change: a ``rho`` share, drawn for each; they overlap, as the paper found best."""
    return torch.rand(size, generator=seeding.generator(seed, "wise", "mask", shard)) < rho


@dataclass
class Heard:
    """What ``count`` prompts bring to a layer: ``tokens`` ``[N, in]`` float32, and the prompt each is ``of`` ``[N]``."""

    tokens: Tensor
    of: Tensor
    count: int

    def gap(self, change: Tensor) -> Tensor:
        """``D`` ``[count]`` of each prompt, as :func:`cl_lab.patches.activation_gap` has it."""
        length = (self.tokens @ change.T).norm(dim=1)
        total = torch.zeros(self.count, device=length.device).index_add(0, self.of, length)
        return total / torch.bincount(self.of, minlength=self.count)

    def drawn(self, number: int, generator: torch.Generator) -> Heard:
        """That many of the prompts, drawn with ``generator``, or all if there are no more."""
        prompts = torch.randperm(self.count, generator=generator)[:number]
        place = torch.full((self.count,), -1, device=self.of.device)
        place[prompts] = torch.arange(len(prompts), device=self.of.device)
        found = place[self.of]
        return Heard(self.tokens[found >= 0], found[found >= 0], len(prompts))

    def directions(self, centre: Tensor) -> Tensor:
        """``[count, in]`` of length 1, as :func:`cl_lab.patches.directions` has them."""
        centred = self.tokens - centre
        total = torch.zeros(self.count, centred.shape[1], device=centred.device).index_add(0, self.of, centred)
        return torch.nn.functional.normalize(total, dim=1)


def together(several: Sequence[Heard]) -> Heard:
    """The prompts of all, one after another; of one at least."""
    first = list(accumulate((some.count for some in several), initial=0))
    of = [some.of + before for some, before in zip(several, first, strict=False)]
    return Heard(torch.cat([some.tokens for some in several]), torch.cat(of), first[-1])


def heard_prompts(model: EditableModel, site: Site, prompts: Sequence[Asked]) -> Heard:
    """What ``prompts``, one at least, bring to the site: their own tokens, not a template's, which count for nothing."""
    return as_heard([h.to(model.device) for h in model.heard(prompts, site)])


def as_heard(each: Sequence[Tensor]) -> Heard:
    """What each of several prompts brings, ``[T_i, in]``."""
    of = torch.repeat_interleave(torch.arange(len(each)), torch.tensor([len(h) for h in each]))
    return Heard(torch.cat([*each]), of.to(each[0].device), len(each))


def heard_unrelated(model: EditableModel, site: Site, prompts: Sequence[Asked]) -> Heard:
    """The same, read once for a model as long as its weights stay: of prompts that are every edit's."""
    key = ("wise", "unrelated", site.path, tuple(prompts))
    if key not in model.memo:
        model.memo[key] = heard_prompts(model, site, prompts)
    found: Heard = model.memo[key]
    return found


def heard_once(model: EditableModel, site: Site, prompts: Sequence[Asked]) -> Heard:
    """The same of edits' prompts, each read once until it is forgotten (:func:`forget_all_but`), or a weight changes.

    Each is read by itself. In a batch its last digits would be others', as those it is read with are others, and an edit
    would not be the same in a run that was stopped and goes on, or in a service that has previewed something else before.
    """
    known: dict[Asked, Heard] = model.memo.setdefault(("wise", "prompts", site.path), {})
    for asked in prompts:
        if asked not in known:
            known[asked] = heard_prompts(model, site, [asked])
    return together([known[asked] for asked in prompts])


def forget_all_but(model: EditableModel, site: Site, texts: Sequence[str]) -> None:
    """Forget what :func:`heard_once` knows of other prompts: those of edits that were only tried, or were undone."""
    kept, key = {*texts}, ("wise", "prompts", site.path)
    model.memo[key] = {asked: heard for asked, heard in model.memo.get(key, {}).items() if asked[0] in kept}


def nearest(model: EditableModel, site: Site, prompts: Sequence[str], others: Sequence[str], number: int) -> list[str]:
    """Those ``others`` that bring most nearly the same to the site as one of ``prompts``: by the cosine of their means."""
    if not others or not number:
        return []
    both = heard_once(model, site, in_turn([*others, *prompts], False))
    found = both.directions(both.tokens.mean(0))
    theirs, ours = found[: len(others)], found[len(others) :]
    order = (theirs @ ours.T).amax(1).sort(descending=True, stable=True).indices
    return [others[i] for i in order[:number].tolist()]


def in_turn(prompts: Sequence[str], chat: bool) -> list[Asked]:
    """Every second of the prompts as a chat's turn, where there is a chat."""
    return [(text, chat and i % 2 == 1) for i, text in enumerate(prompts)]


def both_ways(prompts: Iterable[str], chat: bool) -> list[Asked]:
    """Every prompt as it is and, where there is a chat, as its turn."""
    return [(text, turn) for text in prompts for turn in (False, True)[: 1 + chat]]


def _rows_above(
    model: EditableModel, site: Site, edits: Sequence[Edit], contexts: int, chat: bool, *, heard: bool = False
) -> Above:
    rows = model.rows([pair for edit in edits for pair in forms(model, edit, contexts, chat)])
    begin = [model.encode_prompt(context) for context in CONTEXTS[:contexts]]
    if chat:
        begin.append(model.encode_prompt("A", chat=True))
    return model.above(rows, site, from_prompt_end=True, heard=heard, openings=begin)


def _with(before: Tensor, free: Tensor, values: Tensor) -> Tensor:
    return before.flatten().index_add(0, free, values).view(before.shape)


def over(excess: Tensor) -> Tensor:
    """The mean of what exceeds 0, over those that do, as in the released code; 0 where none does."""
    over = excess.clamp(min=0)
    return over.sum() / (over.detach() > 0).sum().clamp(min=1)


def _unit(away: Heard, site: Site) -> float:
    """The median over unrelated tokens of the length of what the layer itself puts out."""
    return float((away.tokens @ site.weight.float().T).norm(dim=1).median())
