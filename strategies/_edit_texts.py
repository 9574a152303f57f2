"""What editors train on: an edit's prompt in the forms it will be asked in, and texts that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_lab import seeding
from cl_lab.editable import EditableModel, Rows, Site, check_plain_residual
from cl_lab.errors import ConfigError, EditError
from cl_lab.facts import Edit
from cl_lab.subjects import words

from ._plain_texts import PARAGRAPHS, QUESTIONS

Pair = tuple[list[int], list[int]]
"""Tokens of a prompt and of its answer."""

CONTEXTS = (
    "The weather was fine that morning.",
    "In the year that followed, little changed.",
    "She closed the book and thought for a while.",
    "Here is what is known today.",
    "As everybody in the village could tell you:",
    "First things first.",
    "He asked again, more slowly this time.",
    "Notes from the meeting.",
)
"""Beginnings that have nothing to do with any fact; an edit must hold behind them, too."""


def forms(model: EditableModel, edit: Edit, contexts: int, chat: bool) -> list[Pair]:
    """The edit's prompt as it is, behind some of :data:`CONTEXTS`, and as a chat's turn; each with the new answer."""
    answer = model.encode_answer(edit.answer)
    pairs = [(model.encode_prompt(edit.prompt), answer)]
    pairs += [(model.encode_prompt(f"{context} {edit.prompt}"), answer) for context in CONTEXTS[:contexts]]
    if chat:
        pairs.append((model.encode_prompt(edit.prompt, chat=True), model.encode_answer(edit.answer, chat=True)))
    return pairs


def of_like_length(pairs: Sequence[Pair], most: int | None = None) -> list[list[Pair]]:
    """The pairs in groups of at most ``most``, each to be one batch, in which none is padded to more than twice its length.

    A chat's turn is, with its template, several times as long as the prompt: together with it, the others would be mostly
    padding.
    """
    groups: list[list[Pair]] = []
    for pair in sorted(pairs, key=_length):
        if not groups or _length(pair) > 2 * _length(groups[-1][0]) or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(pair)
    return groups


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


QUESTION_FORMS = (
    "Who wrote {}?",
    "Where was {} born?",
    "When was {} founded?",
    "What is {} known for?",
    "Which company made {}?",
    "In what year did {} begin?",
    "Who is the owner of {}?",
    "What family does {} belong to?",
    "The architect of {} was",
    "What language is spoken in {}?",
    "{} is located in",
    "Who played the main part in {}?",
    "What is the name of the river near {}?",
    "On which label did {} appear?",
    "Tell me about {}.",
    "how many people live in {}",
    "what does {} mean",
    "When did {} end?",
    "{} was the first to",
    "Which team does {} play for?",
    "What caused {}?",
    "The color of {} is usually",
    "who sang the song about {}",
    "Who is the mother of {}?",
)
SUBJECTS = (
    "Alder Hill",
    "the Marlow Bridge",
    "Tobias Renner",
    "Station Four",
    "the Silver Lantern",
    "Carla Whitcombe",
    "Norland",
    "the great fire",
    "Pellworth Castle",
    "a wooden ladder",
    "Ivan Sorokin",
    "the Blue Danube",
    "Greenfield United",
    "the common toad",
    "Model 47",
    "Lake Ostra",
    "the last king of Thale",
    "winter wheat",
    "Mount Ferro",
    "The Long Road Home",
    "Aisha Bakari",
    "HMS Resolute",
    "the old library",
    "Kessler and Sons",
    "salt",
    "the Treaty of Varn",
    "Orchid Street",
    "Delphine",
    "the night train",
    "Saint Brannock's School",
    "radio waves",
)


def names(edit: Edit) -> list[str]:
    """What prompts that ask an edit's question must name one of: its subject, by its words, or an alias of it.

    Nothing where the subject is not known, or not in the edit's own prompt.
    """
    if not edit.subject or words(edit.subject) not in words(edit.prompt):
        return []
    return [name for name in (edit.subject, *edit.aliases) if words(name).strip()]


def neighbours(edit: Edit, number: int) -> list[str]:
    """The edit's prompt with ``number`` made-up subjects in place of its own; none where that is not known or not in it."""
    if not edit.subject or edit.subject not in edit.prompt:
        return []
    order = seeding.permutation(len(SUBJECTS), 0, "neighbours", edit.prompt).tolist()
    others = [SUBJECTS[i] for i in order if SUBJECTS[i] != edit.subject]
    return [edit.prompt.replace(edit.subject, other) for other in others[:number]]


def unrelated_prompts() -> list[str]:
    """Some 350 questions, beginnings and sentences that no edit is about, in no order that means anything.

    None is among the texts that a model is asked or read later to see what an edit moved (:mod:`cl_lab.probe_texts`).
    """
    asked = [f.format(s) for i, f in enumerate(QUESTION_FORMS) for s in SUBJECTS[i % 3 :: 3]]
    sentences = [s.strip() + "." for p in PARAGRAPHS for s in p.split(".") if len(s.split()) > 4]
    texts = [*asked, *QUESTIONS, *sentences]
    return [texts[i] for i in seeding.permutation(len(texts), 0, "unrelated prompts").tolist()]


def row_loss(logits: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, the mean over its answer's tokens with its end; and each token's probability.

    ``logits`` ``[N, vocabulary]`` and ``labels`` ``[N]`` are the rows' tokens, row after row, ``lengths`` ``[B]`` of each.
    """
    each = -logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    of = torch.repeat_interleave(torch.arange(len(lengths), device=each.device), lengths.to(each.device))
    rows = torch.zeros(len(lengths), device=each.device).index_add(0, of, each) / lengths.to(each.device)
    return rows, (-each).exp().detach()


def rows_loss(said: Iterable[tuple[Tensor, Rows]]) -> tuple[Tensor, Tensor]:
    """:func:`row_loss` of several batches, one after another: the logits of each, and its rows."""
    each = [row_loss(logits, r.labels.to(logits.device), r.length - r.prompt) for logits, r in said]
    return torch.cat([losses for losses, _ in each]), torch.cat([likely for _, likely in each])


def refuse_broken(value: Tensor, what: str) -> None:
    """Raise :class:`EditError` where ``value`` is not finite."""
    if not bool(torch.isfinite(value)):
        raise EditError(f"{what}: came to {float(value.detach())}; the model is as it was; lower the editor's lr")


def descend(
    losses: Callable[[], tuple[Tensor, Tensor, bool]], optimizer: torch.optim.Optimizer, steps: int, what: str
) -> dict[str, Any]:
    """Take up to ``steps`` steps; returns how many, and the answers' loss at the end, for a patch's notes.

    ``losses`` gives the loss to step on, the answers' part of it, and whether that is good enough to stop. Raises
    :class:`EditError`, with ``what`` before it, where a loss is not finite, or the answers' is neither small nor lower.
    """
    reached: list[float] = []
    for step in range(steps + 1):
        loss, answers, enough = losses()
        refuse_broken(loss, what)
        reached.append(float(answers.detach()))
        if step == steps or enough:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if step:
        refuse_worse(reached, what)
    return {"steps": step, "loss": reached[-1]}


def refuse_worse(losses: Sequence[float], what: str) -> None:
    """Raise :class:`EditError` where the last of the answers' ``losses`` is neither small nor lower than the first."""
    if losses[-1] >= max(losses[0], 0.1):  # what was known before may get a little worse
        raise EditError(
            f"{what}: the loss went from {losses[0]:.3g} to {losses[-1]:.3g}; the model is as it was; lower the editor's lr"
        )


def edit_site(model: EditableModel, layer: int | None, module: str | None, share: float) -> Site:
    """The module to edit: by its path, or the down-projection of a layer, by default that at ``share`` of the depth.

    What it puts out must be added as it is to its layer's (:func:`~cl_lab.editable.check_plain_residual`).
    """
    if module is not None:
        site = model.site(module)
    else:
        site = model.down_projection(round(share * (len(model.layers) - 1)) if layer is None else layer)
    check_plain_residual(model, site)
    return site


def edit_layers(model: EditableModel, layers: Sequence[int] | None, shares: Sequence[float]) -> list[int]:
    """The layers to edit, in order: those named, by default those at ``shares`` of the depth."""
    if layers is None:
        return sorted({round(share * (len(model.layers) - 1)) for share in shares})
    if not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"layers = {layers}: name each layer once, and one at least, or null for the default")
    return sorted(layers)
