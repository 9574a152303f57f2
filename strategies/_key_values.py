"""What ROME, MEMIT and AlphaEdit share: subjects' keys, the values they should bring, and the least squares between them.

A feed-forward part's down-projection ``W`` is read as a memory: at a subject's last token its input is a key ``k``, its
output the value ``W k`` (Meng et al. 2022, arXiv 2202.05262). An edit wants the value at that key changed by ``δ`` and the
values of other keys left alone. Keys stand as rows here: ``K`` is ``[m, in]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cl_lab.editable import Above, EditableModel, Rows, Site, check_plain_residual
from cl_lab.errors import ConfigError, EditError
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta
from cl_lab.protocols import Editor

from ._edit_texts import CONTEXTS, descend, edit_layers, refuse_broken, row_loss, unrelated_prompts
from ._plain_texts import PARAGRAPHS

_WINDOW = (0.2, 0.24, 0.28, 0.32, 0.36)  # of the depth
_EDITS_AT_ONCE = 8
_TEXTS_AT_ONCE = 32
_LONG = 1000  # tokens of an article, in a text that is read at one go


# -- subjects ------------------------------------------------------------------------------------------------------


class SubjectRows(NamedTuple):
    """Edits' prompts in several forms, each with the new answer: ``forms`` rows for an edit, edit after edit.

    In ``rows`` each prompt is taken to end (``until``) with its subject's last token: nothing before it is changed by an
    edit, so :meth:`EditableModel.above` reads that once, and the token is the first of what is left.
    """

    rows: Rows
    forms: int

    def mean(self, each: Tensor) -> Tensor:
        """The mean ``[edits, …]`` over forms of ``each`` ``[edits · forms, …]``."""
        return each.reshape(-1, self.forms, *each.shape[1:]).mean(1)


def subject_rows(model: EditableModel, edits: Sequence[Edit], contexts: int, chat: bool) -> SubjectRows:
    """The prompts as they are, behind some of :data:`CONTEXTS`, and as chats' turns.

    Raises :class:`EditError` for an edit whose subject is not known or not in its prompt.
    """
    texts: list[tuple[str, int]] = []
    answers: list[list[int]] = []
    for edit in edits:
        if not edit.subject or edit.subject not in edit.prompt:
            what = f"subject '{edit.subject}' is not in it" if edit.subject else "has no subject"
            raise EditError(
                f"prompt '{edit.shown}': {what}, where this editor writes; give the edit's subject as it stands in the "
                "prompt, or take an editor that needs none, such as ft-m"
            )
        end = edit.prompt.rindex(edit.subject) + len(edit.subject)
        for opening in ("", *(f"{context} " for context in CONTEXTS[:contexts])):
            texts.append((opening + edit.prompt, len(opening) + end))
            answers.append(model.encode_answer(edit.answer))
        if chat:
            turn = model.tokenizer.chat(edit.prompt)
            texts.append((turn, turn.rindex(edit.prompt) + end))
            answers.append(model.encode_answer(edit.answer, chat=True))
    return SubjectRows(_rows(model, texts, answers), len(texts) // len(edits))


def _rows(model: EditableModel, texts: Sequence[tuple[str, int]], answers: Sequence[list[int]]) -> Rows:
    """Prompts, each with the number of its characters to its subject's end, and what follows them."""
    rows = model.rows([(model.tokenizer.encode(text), more) for (text, _), more in zip(texts, answers, strict=True)])
    return replace(rows, until=torch.tensor([tokens_until(model, text, end) for text, end in texts]))


def tokens_until(model: EditableModel, text: str, end: int) -> int:
    """How many of the tokens of ``text`` it takes to reach its character ``end``, which a token may lie across."""
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    whole, head = encode(text), encode(text[:end])
    shared = next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), min(len(whole), len(head)))
    left, until = len(decode(head[shared:])), shared
    while until < len(whole) and len(decode(whole[shared:until])) < left:
        until += 1
    return until


def subject_inputs(model: EditableModel, subjects: SubjectRows, sites: Sequence[Site]) -> list[Tensor]:
    """What reaches each site at the subjects' last tokens, ``[edits, in]`` float32, the mean over forms."""
    heard = model.inputs(subjects.rows, sites)
    last = (subjects.rows.until - 1).tolist()
    return [subjects.mean(torch.stack([h[i] for h, i in zip(heard[site.path], last, strict=True)])) for site in sites]


# -- the keys that are to keep their values ------------------------------------------------------------------------


def key_moments(model: EditableModel, sites: Sequence[Site]) -> list[Tensor]:
    """``C = E[k kᵀ]`` ``[in, in]`` float64 at each site, uncentred, of the model as it was before any patch.

    From texts that come with this laboratory and are read for nothing else, :data:`PARAGRAPHS` and
    :func:`unrelated_prompts`: a few thousand tokens, where the papers take a hundred thousand articles of Wikipedia. The
    small eigenvalues are poorly known, then, which is what ``ridge`` in :func:`whiten` is for.

    Texts' first tokens are weighed as if texts were :data:`_LONG` tokens long, as articles are. Their key is much the same
    in all texts and may be ten times as long as others': of texts as short as these, where every tenth token is a first
    one, they would be nearly all of ``C``'s trace, in whose units ``ridge`` and AlphaEdit's ``threshold`` count. Without
    any they would not be protected at all.
    """
    if new := [site for site in sites if ("key moments", site.path) not in model.origin]:
        texts = [*PARAGRAPHS, *unrelated_prompts()]
        sums = {site.path: [torch.zeros(()).double()] * 2 for site in new}  # of first tokens, and of the others
        count = 0
        with model.unpatched():
            for first in range(0, len(texts), _TEXTS_AT_ONCE):
                tokens = [model.tokenizer.encode(text) for text in texts[first : first + _TEXTS_AT_ONCE]]
                count += sum(len(t) - 1 for t in tokens)
                for path, heard in model.inputs(model.rows([(t, []) for t in tokens]), new).items():
                    keys = (torch.cat([h[part] for h in heard]).double() for part in (slice(1), slice(1, None)))
                    sums[path] = [total + k.T @ k for total, k in zip(sums[path], keys, strict=True)]
        for path, (firsts, others) in sums.items():
            model.origin["key moments", path] = firsts / len(texts) / _LONG + others / count * (1 - 1 / _LONG)
    return [model.origin["key moments", site.path] for site in sites]


def whiten(keys: Tensor, moments: Tensor, ridge: float) -> Tensor:
    """``K (C + ridge · c̄ I)⁻¹`` ``[m, in]`` float64 with ``c̄`` the mean eigenvalue of ``C``."""
    n = len(moments)
    full = moments + ridge * moments.trace() / n * torch.eye(n, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(full)
    if int(failed):
        raise ConfigError(f"ridge = {ridge}: the texts have fewer directions than the {n} of a key; take a larger one")
    return torch.cholesky_solve(keys.double().T, factor).T


# -- the updates ---------------------------------------------------------------------------------------------------


def rank_one(key: Tensor, change: Tensor, white: Tensor) -> Delta:
    """The change of ``W`` that moves the value at ``key`` ``[in]`` by ``change`` ``[out]``, and others the least.

    ``white`` is ``C⁻¹k`` ``[in]``: ``Δ = δ (C⁻¹k)ᵀ / (kᵀC⁻¹k)``, ROME's Eq. 2 with ``v* = W k + δ``.
    """
    a = white / (white @ key.double())
    return Delta(a=a.float()[None], b=change.float()[:, None].contiguous())


def least_squares(keys: Tensor, white: Tensor, changes: Tensor) -> Delta:
    """The ``Δ`` that makes ``‖Δ Kᵀ − Rᵀ‖² + tr(Δ M Δᵀ)`` least: ``Rᵀ (I + K M⁻¹Kᵀ)⁻¹ K M⁻¹``.

    ``keys`` ``K`` ``[m, in]``, ``white`` ``K M⁻¹`` likewise, ``changes`` ``R`` ``[e, out]``, ``e ≤ m``: of the values at the
    last ``e`` keys; those at the others are to stay. By the push-through identity this is MEMIT's
    ``Rᵀ K (M + KᵀK)⁻¹``, with as many equations as keys and a change of rank ``e``.
    """
    keys, white = keys.double(), white.double()
    gram = torch.eye(len(keys), dtype=torch.float64) + keys @ white.T
    solved = torch.linalg.solve(gram, white)[len(keys) - len(changes) :]
    return Delta(a=solved.float().contiguous(), b=changes.float().T.contiguous())


def joined(changes: Sequence[Delta]) -> Delta:
    """The sum of low-rank changes, their factors side by side."""
    a, b = zip(*((c.a, c.b) for c in changes if c.a is not None and c.b is not None), strict=True)
    return Delta(a=torch.cat(a), b=torch.cat(b, 1))


@contextmanager
def changed(model: EditableModel, changes: Mapping[str, Delta]) -> Iterator[None]:
    """In the block, low-rank ``changes`` of weights act as if they lay on the model; gradients reach their factors."""
    with ExitStack() as hooks:
        for path, change in changes.items():
            if change.a is not None and change.b is not None:
                hooks.enter_context(model.site(path).module.register_forward_hook(_Adding(change.a, change.b)))
        yield


class _Adding:
    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        a, b = self.a.to(out.device), self.b.to(out.device)
        return out + ((args[0].float() @ a.T) @ b.T).to(out.dtype)


# -- editors -------------------------------------------------------------------------------------------------------


@dataclass
class KeyValueEditor(Editor):
    """What editors that write at a subject's last token have in common: how the change ``δ`` of its value is found.

    Adam on ``δ``, added to what a layer puts out at that token. The loss is ROME's Eq. 4: cross-entropy of the new answer
    and its end over an edit's rows, ``kl`` times the divergence of what follows "subject is a" from what followed it before,
    ``decay`` times ``‖δ‖²``. Lengths count in units of the layer's own output there.
    """

    folds: ClassVar[bool] = True
    by_subject: ClassVar[bool] = True

    lr: float = knob(0.3, "Adam's learning rate for δ, in a coordinate's share of the layer's output", gt=0, le=1000)
    steps: int = knob(30, "steps for δ, at most", ge=1)
    stop_at: float = knob(0.9, "stop when every token of every answer has this probability; 1: never", gt=0, le=1)
    kl: float = knob(0.0625, 'weight of the divergence of what follows "subject is a"', ge=0)
    decay: float = knob(0.05, "weight of ‖δ‖² in units of the layer's output", ge=0)
    clamp: float = knob(1.0, "‖δ‖ in those units, at most", gt=0)
    contexts: int = knob(3, "beginnings put before each prompt, for key and value", ge=0, le=8)
    chat: bool = knob(True, "also write for the prompt as a chat's turn, where the model has a template")

    def _subjects(self, model: EditableModel, edits: Sequence[Edit]) -> SubjectRows:
        return subject_rows(model, edits, self.contexts, self.chat and model.tokenizer.can_chat)

    def _search(
        self, model: EditableModel, site: Site, edits: Sequence[Edit], what: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """``δ`` ``[edits, width]`` float32, and notes. Edits do not see each other; those of a group share their steps."""
        found: list[Tensor] = []
        losses: list[float] = []
        steps = 0
        for first in range(0, len(edits), _EDITS_AT_ONCE):
            some = edits[first : first + _EDITS_AT_ONCE]
            delta, notes = self._search_group(model, site, some, f"{what}: '{some[0].shown}'")
            found.append(delta)
            losses += [notes["loss"]] * len(some)
            steps = max(steps, notes["steps"])
        return torch.cat(found), {"steps": steps, "loss": sum(losses) / len(losses)}

    def _search_group(
        self, model: EditableModel, site: Site, edits: Sequence[Edit], what: str
    ) -> tuple[Tensor, dict[str, Any]]:
        subjects = self._subjects(model, edits)
        at = model.above(subjects.rows, site, from_prompt_end=True)
        beside = model.above(_essence(model, edits), site, from_prompt_end=True)
        before = beside.logits().log_softmax(1)
        labels, lengths = at.rows.labels.to(at.out.device), at.rows.length - at.rows.prompt
        unit = subjects.mean(at.out[:, 0].float().norm(dim=1))[:, None]
        refuse_broken(unit.mean(), what)
        delta = torch.zeros(len(edits), at.out.shape[2], device=at.out.device, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.lr * float(unit.mean()) / at.out.shape[2] ** 0.5)

        def losses() -> tuple[Tensor, Tensor, bool]:
            with torch.no_grad():
                delta.mul_((self.clamp * unit / delta.norm(dim=1, keepdim=True)).clamp(max=1))
            rows, likely = row_loss(at.logits(_at_first(delta, at, subjects.forms)), labels, lengths)
            after = beside.logits(_at_first(delta, beside, 1)).log_softmax(1)
            moved = (after.exp() * (after - before)).sum()
            loss = rows.sum() / subjects.forms + self.kl * moved + self.decay * (delta / unit).square().sum()
            return loss, rows.mean(), float(likely.min()) >= self.stop_at

        notes = descend(losses, optimizer, self.steps, what)
        return delta.detach().cpu(), notes


@dataclass
class SpreadEditor(KeyValueEditor):
    """What MEMIT and AlphaEdit have in common: one least-squares change in each of several layers.

    ``δ`` is what the last of the layers should put out beside what it does. Layer after layer takes its share of what is
    still missing, the changes below it in place: half of it with one layer to come (MEMIT, Eq. 20).
    """

    layers: list[int] | None = knob(
        None, "layers whose down-projections are edited; null: five, from a fifth to a third of the depth"
    )

    def check(self, model: EditableModel) -> None:
        self._places(model)

    def _places(self, model: EditableModel) -> tuple[list[Site], Site]:
        """What is changed, in order, and the layer above it, that reads what was written."""
        layers = edit_layers(model, self.layers, _WINDOW)
        sites = [model.down_projection(layer) for layer in layers]
        if layers[-1] + 1 == len(model.layers):
            raise ConfigError(
                f"layers = {layers}: the last must have one above it that reads what was written (model '{model.name}' has "
                f"{len(model.layers)})"
            )
        for site in sites:
            check_plain_residual(model, site)
        return sites, model.layer(layers[-1] + 1)

    def _update(self, model: EditableModel, site: Site, keys: Tensor, changes: Tensor) -> Delta:
        """The change at one site for the keys ``[edits, in]``, whose values are to move by ``changes`` ``[edits, out]``."""
        raise NotImplementedError

    def _spread(
        self, model: EditableModel, edits: Sequence[Edit], what: str
    ) -> tuple[dict[str, Delta], dict[str, Tensor], dict[str, Any]]:
        """Changes by path, the edits' keys by path, and notes."""
        sites, above = self._places(model)
        done: dict[str, Delta] = {}
        found: dict[str, Tensor] = {}
        with model.unrouted():
            delta, notes = self._search(model, sites[-1], edits, what)
            subjects = self._subjects(model, edits)
            (first,) = subject_inputs(model, subjects, [above])
            for i, site in enumerate(sites):
                with changed(model, done):
                    keys, hidden = subject_inputs(model, subjects, [site, above])
                left = delta - (hidden - first)
                found[site.path] = keys
                done[site.path] = self._update(model, site, keys, left / (len(sites) - i))
            with changed(model, done):
                (hidden,) = subject_inputs(model, subjects, [above])
        length = delta.norm()  # nothing, and nothing is missing, where all facts hold already
        missing = (delta - (hidden - first)).norm() / length if length else torch.zeros(())
        refuse_broken(missing, f"{what}: '{edits[0].shown}', what the layers left of the change")
        return done, found, notes | {"edits": len(edits), "missing": float(missing)}


def _essence(model: EditableModel, edits: Sequence[Edit]) -> Rows:
    """ "Subject is a" for each edit, with one token behind it so that what would follow is asked for."""
    subjects = [edit.subject or "" for edit in edits]
    return _rows(model, [(f"{s} is a", len(s)) for s in subjects], [[model.tokenizer.end] for _ in subjects])


def _at_first(delta: Tensor, at: Above, forms: int) -> Tensor:
    """``delta`` at the first token of each of an edit's rows, ``[B, T, width]``."""
    each = delta.repeat_interleave(forms, 0)[:, None]
    return nn.functional.pad(each, (0, 0, 0, at.out.shape[1] - 1))
