"""Which answer a language model gives: written freely, the likeliest of a task's answers, or that by its first token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cl_lab.overlap import OVERLAPS
from cl_lab.records import PAD, Batch, Stream

_PLACES = 1024  # answers' places with logits over the whole vocabulary at a time

NONE, BROKEN = -1, -2
"""In place of an answer: what was written is none of the stream's answers; logits were not finite."""

Say = Callable[[Batch], Tensor]
"""Logits ``[B, A', vocabulary]`` at the answer's places, given the tokens that stand before each.

A batch may hold m answers behind each prompt, ``[B, P + m·A]``, and gets ``[B, m·A', vocabulary]``.
"""


class Grades(NamedTuple):
    """What the answers to a batch are worth, ``[B]`` each.

    ``value`` float64 in [0, 1], ``valid`` whether it is one of the task's answers (where texts are compared: never), and
    ``broken`` whether logits were not finite.
    """

    value: Tensor
    valid: Tensor
    broken: Tensor


def grade_answers(batch: Batch, say: Say, stream: Stream, longest: int | None = None) -> Grades:
    """How good the answers are that are given to ``batch``: 1 or 0 for those that :func:`find_answers` finds.

    Where :attr:`Stream.measures` has a task's answers compared, what is written, likeliest token after likeliest token, up
    to the longest answer of the stream, is decoded, and worth as much as the measure says against the whole reference.
    """
    if not stream.measures:
        answers = find_answers(batch, say, stream, longest)
        return Grades((answers == batch.y).double(), answers >= 0, answers == BROKEN)
    value = torch.zeros(len(batch), dtype=torch.float64, device=batch.x.device)
    valid, broken = (torch.zeros_like(value, dtype=torch.bool) for _ in range(2))
    for task in batch.t.unique().tolist():
        rows = (batch.t == task).nonzero().squeeze(1)
        some = _rows(batch, rows)
        if (measure := stream.measures[task]) == "exact":
            answers = find_answers(some, say, stream, longest)
            value[rows], valid[rows], broken[rows] = (answers == some.y).double(), answers >= 0, answers == BROKEN
            continue
        written, broken[rows] = write_answers(some, say, stream)
        assert stream.tokenizer is not None
        texts = [stream.tokenizer.decode([t for t in row if t != PAD]) for row in written.tolist()]
        pairs = zip(texts, some.y.tolist(), strict=True)
        worth = [OVERLAPS[measure](text, stream.references[y]) for text, y in pairs]
        value[rows] = torch.tensor(worth, dtype=torch.float64, device=value.device)
    return Grades(value, valid, broken)


def write_answers(batch: Batch, say: Say, stream: Stream) -> tuple[Tensor, Tensor]:
    """What is written to ``batch``, ``[B, A]`` int64 up to its end and then :data:`PAD`; and which ``[B]`` are broken."""
    assert stream.answers is not None
    return _written(batch, say, stream.answers.to(batch.x.device), stream.layout["prompt"][0])


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.x[rows], batch.y[rows], batch.t[rows], 0, epoch=batch.epoch, raw=batch.raw)


def find_answers(batch: Batch, say: Say, stream: Stream, longest: int | None = None) -> Tensor:
    """The answers found for ``batch``, ``[B]`` int64 rows of ``stream.answers``, else :data:`NONE` or :data:`BROKEN`.

    As :attr:`Stream.scoring` says: ``generation`` takes the likeliest token after another until the answer's end, and is
    right only where all tokens are those of an answer; ``constrained`` takes the task's answer with the highest
    log-probability, its end included, so that a long answer is not put before its own beginning; ``first-token`` the
    task's answer whose first token is the likeliest; ``opening`` the right answer where it begins with the likeliest of all
    tokens (where that is but a blank, the next ones are, too: :attr:`Stream.openings`). What stands in the answer's columns
    of ``batch`` is not looked at.

    What ``generation`` writes is looked for among the task's answers of up to ``longest`` tokens, all of them by default,
    and writing stops there: a stream may hold whole texts beside short answers. Where they are few it need not write: all
    of them stand behind the prompt at once, and the one that would be written, if any, is that whose every token is the
    likeliest behind those before it.
    """
    assert stream.answers is not None
    answers = stream.answers.to(batch.x.device)
    prompt = stream.layout["prompt"][0]
    if stream.scoring == "opening":
        return _opens(batch, say, answers[batch.y], stream.openings.to(batch.x.device)[batch.y], prompt)
    found = torch.full_like(batch.y, NONE)
    for task in batch.t.unique().tolist():
        rows = (batch.t == task).nonzero().squeeze(1)
        classes = torch.tensor(stream.experiences[task].classes, device=batch.x.device)
        some = _rows(batch, rows)
        own = answers[classes]
        if stream.scoring == "generation":
            place = _freely(some, say, own, prompt, longest or own.shape[1])
        else:
            score = _first_tokens if stream.scoring == "first-token" else _likelihoods
            best, place = score(some, say, own, prompt).max(1)
            place = torch.where(best.isfinite(), place, BROKEN)
        found[rows] = torch.where(place >= 0, classes[place.clamp(min=0)], place)
    return found


def _asked(batch: Batch, prompt: int, answer: Tensor | None = None) -> Batch:
    """The batch with ``answer`` ``[a]`` or ``[B, a]`` behind its prompts, or with nothing there."""
    if not batch.raw or batch.x.is_floating_point():  # latents: what is said first depends on the prompt alone
        return batch
    x = batch.x.clone()
    x[:, prompt:] = PAD
    if answer is not None:
        x[:, prompt : prompt + answer.shape[-1]] = answer.to(x.dtype)
    return replace(batch, x=x)


def _opens(batch: Batch, say: Say, right: Tensor, depth: Tensor, prompt: int) -> Tensor:
    """``batch.y`` where each of the first ``depth`` ``[B]`` tokens of ``right`` ``[B, A]`` is the likeliest in its place."""
    most = int(depth.max())
    best, token = say(_asked(batch, prompt, right[:, : most - 1]))[:, :most].float().max(2)
    asked = torch.arange(most, device=depth.device) < depth[:, None]
    same = ((token == right[:, :most]) | ~asked).all(1)
    return torch.where((~best.isfinite() & asked).any(1), BROKEN, torch.where(same, batch.y, NONE))


def _first_tokens(batch: Batch, say: Say, answers: Tensor, prompt: int) -> Tensor:
    """``[B, K]`` logits of the answers' first tokens."""
    return say(_asked(batch, prompt))[:, 0].float()[:, answers[:, 0]]


def _few_rows(batch: Batch, answers: Tensor) -> Iterator[Batch]:
    """``batch`` in parts of so few rows that all of ``answers`` ``[K, A]`` may stand behind each prompt at once.

    Prompts are long and answers short, so a prompt that is read again for other answers costs most.
    """
    places = len(answers) * _longest(answers)
    for rows in torch.arange(len(batch), device=batch.x.device).split(max(1, _PLACES // places)):
        yield _rows(batch, rows)


def _longest(answers: Tensor) -> int:
    """How many tokens the longest of ``answers`` ``[K, A]`` has."""
    return int((answers != PAD).sum(1).max())


def _together(batch: Batch, say: Say, answers: Tensor, prompt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of ``answers`` ``[k, A']`` after another, and the logits ``[B, k, A', vocabulary]`` at their places.

    As many answers as :data:`_PLACES` allows stand behind each prompt at once, so that it is read but once for them.
    """
    n = len(batch)
    for some in answers.split(max(1, _PLACES // (n * _longest(answers)))):
        x = torch.cat([batch.x[:, :prompt], some.flatten().expand(n, -1).to(batch.x.dtype)], 1)
        said = say(replace(batch, x=x)).unflatten(1, (len(some), -1)).float()
        yield some[:, : said.shape[2]], said


def _likelihoods(batch: Batch, say: Say, answers: Tensor, prompt: int) -> Tensor:
    """``[B, K]`` log-probabilities of the answers, their end included."""
    rows = []
    for part in _few_rows(batch, answers):
        values = []
        for tokens, said in _together(part, say, answers, prompt):
            given = tokens.clamp(min=0).expand(len(part), -1, -1)[..., None]
            picked = said.log_softmax(3).gather(3, given).squeeze(3)
            values.append((picked * (tokens != PAD)).sum(2))
        rows.append(torch.cat(values, 1))
    return torch.cat(rows)


def _freely(batch: Batch, say: Say, answers: Tensor, prompt: int, longest: int) -> Tensor:
    """Which of ``answers`` would be written, ``[B]``, among those of up to ``longest`` tokens."""
    lengths = (answers != PAD).sum(1)
    kept = (lengths <= longest).nonzero().squeeze(1)
    some, longest = answers[kept], int(lengths[kept].max())
    if len(some) * longest <= (longest - 1) * prompt:  # columns of one pass against those of a pass for each token
        found = _compare(batch, say, some, prompt)
    else:
        found = _write(batch, say, some[:, :longest], prompt)
    return torch.where(found >= 0, kept[found.clamp(min=0)], found)


def _compare(batch: Batch, say: Say, answers: Tensor, prompt: int) -> Tensor:
    """What :func:`_write` finds, without writing."""
    found = []
    for part in _few_rows(batch, answers):
        written, broken = [], torch.zeros(len(part), dtype=torch.bool, device=batch.x.device)
        for tokens, said in _together(part, say, answers, prompt):
            best, token = said.max(3)
            asked = tokens != PAD
            written.append(((token == tokens) | ~asked).all(2))
            broken |= (~best.isfinite() & asked).flatten(1).any(1)
        same = torch.cat(written, 1)  # [B, K]; one at most, as no answer is the beginning of another
        some = torch.where(same.any(1), same.int().argmax(1), NONE)
        found.append(torch.where(broken, BROKEN, some))
    return torch.cat(found)


def _write(batch: Batch, say: Say, answers: Tensor, prompt: int) -> Tensor:
    """The answers that are written, one likeliest token after another: ``[B]`` rows of ``answers``."""
    written, broken = _written(batch, say, answers, prompt)
    same = (written[:, None] == answers).all(2)  # [B, K]
    found = torch.where(same.any(1), same.int().argmax(1), NONE)
    return torch.where(broken, BROKEN, found)


def _written(batch: Batch, say: Say, answers: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """One likeliest token after another, ``[B, A]`` for ``answers`` ``[K, A]``, and which logits were not finite."""
    n, longest = len(batch), answers.shape[1]
    ends = answers.gather(1, (answers != PAD).sum(1, keepdim=True) - 1).unique()  # the end-of-text token
    written = torch.full((n, longest), PAD, dtype=torch.int64, device=batch.x.device)
    going = torch.ones(n, dtype=torch.bool, device=batch.x.device)
    broken = torch.zeros_like(going)
    for place in range(longest):
        rows = going.nonzero().squeeze(1)
        if not len(rows):
            break
        best, token = say(_asked(_rows(batch, rows), prompt, written[rows, :place]))[:, place].float().max(1)
        broken[rows] |= ~best.isfinite()
        written[rows, place] = token
        going[rows] = ~torch.isin(token, ends)
    return written, broken
