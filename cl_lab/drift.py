"""What learning a stream does to the rest of a language model: probes before it, and after each experience or all.

Two things are asked of the model as it answers the stream, without touching it: how surprising it finds plain text
(perplexity), and whether it still knows what everybody knows (questions of which it must find the right option the
likeliest). The texts are :mod:`cl_lab.probe_texts`', or for the perplexity the user's own.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_lab.errors import ConfigError, DataError
from cl_lab.probe_texts import PARAGRAPHS, QUESTIONS
from cl_lab.records import PAD, Stream, TensorData
from cl_lab.subjects import NamedSubjects

log = logging.getLogger("cl_lab")

_ASKED = "Question: {}\nAnswer:"
_MOST_NATS = 700.0  # of surprise per token, before exp leaves float64


@dataclass(frozen=True)
class Probes:
    """Probes as rows of a stream's shape, so that whatever answers the stream's test sets can be asked.

    They are of no task of the stream; :meth:`of_newest` says which one they pass for.

    ``data`` is int32 ``[N, P + A]``; ``said`` ``[N, A]`` int64 are the tokens whose log-probability counts, then
    :data:`~cl_lab.records.PAD`. A text or option longer than A tokens takes several rows, each with the tokens before it,
    up to P, as its prompt; ``of`` ``[N]`` int64 numbers what a row is part of: first the ``texts``, then for each of
    ``questions`` (its topic, its number of options) the options, the right one first.
    """

    data: TensorData
    said: Tensor
    of: Tensor
    texts: int
    questions: tuple[tuple[str, int], ...]

    def of_newest(self, data: TensorData, learnt: int) -> TensorData:
        """``data``, these probes or their codes, as samples of the newest of ``learnt`` experiences (before all: the first).

        A model in use has the prompt, or what else belongs to a task, of the task that it learnt last.
        """
        return replace(data, t=torch.full_like(data.t, max(learnt - 1, 0)))

    def results(self, log_likelihoods: Tensor) -> dict[str, Any]:
        """Of float64 ``[N]`` log-likelihoods, in nats: ``{"perplexity": …, "general": {topic: share}}``.

        The perplexity is ``exp(−Σ log p / tokens)`` over all tokens of all texts, each given up to P tokens before it in its
        text and the end-of-text token before the first. The share of a topic is that of the questions whose right option
        is likelier than each other one, by the sum over its tokens, its end not included: guessing gives a quarter.
        """
        whole = torch.zeros(int(self.of.max()) + 1, dtype=torch.float64).index_add_(0, self.of, log_likelihoods)
        read = int((self.said[self.of < self.texts] != PAD).sum())
        surprise = -float(whole[: self.texts].sum()) / read
        right: dict[str, list[bool]] = {}
        place = self.texts
        for topic, options in self.questions:
            first, *others = whole[place : place + options].tolist()
            right.setdefault(topic, []).append(first > max(others))
            place += options
        general = {topic: sum(found) / len(found) for topic, found in right.items()}
        return {"perplexity": math.exp(min(surprise, _MOST_NATS)), "general": general}


def make_probes(stream: Stream, probe_text: str | None = None) -> Probes:
    """The probes in the tokens and the shape of ``stream``; ``probe_text`` is a file of paragraphs to read instead of ours.

    Raises :class:`ConfigError` for a stream that is not of texts, whose samples are latents of a frozen model, or whose
    tokenizer has no tokens for plain English, and :class:`DataError` for a file that cannot be read or holds nothing.
    """
    if stream.objective != "language" or stream.tokenizer is None:
        found = f"is a {stream.objective}" if stream.objective != "language" else "has no tokenizer"
        raise ConfigError(
            f"evaluation.drift: probes are texts for a causal language model, but stream '{stream.name}' {found}; "
            "leave it out, or take scenario text-stream with model causal-lm"
        )
    (prompt,), (answer,) = (stream.layout[part] for part in ("prompt", "answer"))
    if stream.input_shape != (prompt + answer,):
        raise ConfigError(
            "evaluation.drift: probes go through the whole model, but model.frozen gives it latents; leave "
            "model.frozen out, or evaluation.drift"
        )
    tokenizer = stream.tokenizer
    paragraphs = list(PARAGRAPHS) if probe_text is None else _paragraphs(Path(probe_text).expanduser())
    every = [(topic, q, options) for topic, own in QUESTIONS.items() for q, options in own]
    edited = [name for e in stream.experiences for edit in e.edits for name in (edit.subject, *edit.aliases) if name]
    named = NamedSubjects([edited]).among([q for _, q, _ in every])[0].tolist()
    if any(named):  # what is to change is no general knowledge, and its new answer not among the options
        log.info("drift: %d of %d questions name what is edited and are not asked", sum(named), len(every))
    asked = [
        (topic, _ASKED.format(q), options) for (topic, q, options), own in zip(every, named, strict=True) if not own
    ]
    try:
        texts = tokenizer.encode_all(paragraphs)
        contexts = tokenizer.encode_all([context for _, context, _ in asked])
        answered = [tokenizer.encode_all([f"{context} {o}" for o in options]) for _, context, options in asked]
    except DataError as error:
        raise ConfigError(
            f"evaluation.drift: stream '{stream.name}' has no tokens for the probes ({error}); leave it out, or take "
            "a model's tokenizer"
        ) from error
    if cut := sum(len(context) > prompt for context in contexts):
        log.warning(
            "drift: prompts of this stream have up to %d tokens: the beginning is left out of %d of %d questions",
            prompt,
            cut,
            len(asked),
        )
    rows = [([tokenizer.end], text) for text in texts]
    rows += [(c, whole[len(c) :]) for c, options in zip(contexts, answered, strict=True) for whole in options]
    x, said, of = _windows(rows, prompt, answer)
    none = torch.zeros(len(x), dtype=torch.int64)
    return Probes(
        TensorData(x, none, none), said, of, len(texts), tuple((topic, len(options)) for topic, _, options in asked)
    )


def _windows(rows: Sequence[tuple[list[int], list[int]]], prompt: int, answer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts and what is said behind them, in pieces of ``answer`` tokens: ``[N, P + A]``, ``[N, A]`` and ``[N]``."""
    pieces = [
        ((context + text[:start])[-prompt:], text[start : start + answer], i)
        for i, (context, text) in enumerate(rows)
        for start in range(0, len(text), answer)
    ]
    x = torch.full((len(pieces), prompt + answer), PAD, dtype=torch.int32)
    for row, (before, text, _) in zip(x, pieces, strict=True):
        row[prompt - len(before) : prompt] = torch.tensor(before)
        row[prompt : prompt + len(text)] = torch.tensor(text)
    return x, x[:, prompt:].long(), torch.tensor([i for *_, i in pieces])


def _paragraphs(path: Path) -> list[str]:
    """The texts of a file, which blank lines divide."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"evaluation.probe_text = '{path}': cannot be read ({why}); give a text file, or leave it out"
        ) from None
    found = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not found:
        raise DataError(
            f"evaluation.probe_text = '{path}': holds no text; write paragraphs divided by blank lines, or leave it out"
        )
    return found
