"""What edits are worth: whether they held, in other words too, and what else they moved; as papers count it and honestly.

Two ways of asking. *Teacher-forced*, as the papers do: the right answer's tokens are given one by one, and each counts that
is the likeliest behind those before it. *Free*: the model writes, to its own end or a budget that is the same for all and so
tells no answer's length (:func:`budget`), and what it wrote is compared with the answer. Neither changes the model, and
asking twice gives the same.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cl_lab.editable import EditableModel
from cl_lab.errors import EditError
from cl_lab.facts import GROUPS, LOCAL, Edit, Probe
from cl_lab.overlap import ALONE, ARTICLES, matches
from cl_lab.probe_texts import PARAGRAPHS

BUDGET, SPARE = 24, 8
"""Tokens of a free answer, at most, and so many more than the longest wanted one has, where that is longer."""

WRITTEN, LENGTH = 16, 64
"""Prompts that fluency is taken from, and tokens behind each."""

_PASSAGES = 4
"""Passages in a pass: the logits of all their tokens are in memory."""

RELIABILITY = "reliability"
"""The group of the edits' own prompts."""

OOD, CERTAIN = "ood", 0.8
"""The group of an edit's passages, which are read and not asked, and the probability above which a token of one counts."""


@dataclass(frozen=True)
class Asked:
    """What a model said to the questions of some edits, ready to be compared: by group, and in a group by edit.

    ``tokens`` are the likeliest tokens at the answers' places, answer given; ``texts`` what it wrote by itself, in
    ``budget`` tokens at most. ``ood`` has for each edit the shares of its passages (:func:`scores`), ``surprise`` the mean
    surprise, in nats, of its own answer's tokens, each behind the right ones before it.
    """

    tokens: dict[str, list[list[list[int]]]]
    texts: dict[str, list[list[str]]] = field(default_factory=dict)
    budget: int = BUDGET
    ood: list[list[float]] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)


def budget(model: EditableModel, answers: Iterable[str | None], *, chat: bool = False) -> int:
    """How many tokens the model may write to each of some prompts, one of whose wanted answers may be any of ``answers``.

    :data:`BUDGET`, or :data:`SPARE` more than the longest of them has, where that is more: a right answer has room.
    """
    lengths = (len(model.encode_answer(a, chat=chat, end=False)) for a in dict.fromkeys(answers) if a)
    return max(BUDGET, SPARE + max(lengths, default=0))


def ask(
    model: EditableModel,
    edits: Sequence[Edit],
    *,
    free: bool = True,
    chat: bool = False,
    groups: Sequence[str] = (*GROUPS, OOD),
    batch_size: int = 32,
) -> Asked:
    """Put every question of ``edits`` to ``model`` as it stands.

    With ``chat`` as a user's turns, but for passages, which are plain texts; without ``free`` nothing is written. Raises
    :class:`~cl_lab.errors.TooLong` where a question with its answer, given or to be written, is longer than the model reads.
    """
    tokens: dict[str, list[list[list[int]]]] = {}
    texts: dict[str, list[list[str]]] = {}
    surprise: list[float] = []
    # Of all groups, whichever are asked, so that a part of the questions is answered as it is among all.
    asked = (p for e in edits for own in GROUPS.values() for p in own(e))
    most = budget(model, (answer for p in asked for answer in (p.answer, *p.also)), chat=chat)
    for group in (g for g in groups if g != OOD):
        probes = [list(GROUPS[group](edit)) for edit in edits]
        flat = [p for own in probes for p in own]
        sizes = [len(own) for own in probes]
        if flat:
            best, nats = _forced(model, flat, chat, batch_size)
            tokens[group] = _divided(best, sizes)
            if group == RELIABILITY:
                surprise = nats  # an edit has one prompt
            if free:
                said = model.answer([p.prompt for p in flat], max_new_tokens=most, chat=chat, batch_size=batch_size)
                texts[group] = _divided(said, sizes)
    return Asked(tokens, texts, most, _sure_of(model, edits) if OOD in groups else [], surprise)


def scores(
    model: EditableModel, edits: Sequence[Edit], after: Asked, before: Asked, *, chat: bool = False
) -> dict[str, Any]:
    """What ``after`` is worth for ``edits``, each value a mean over the edits that have such questions, in [0, 1].

    For each group ``<group>``: the share of the right answer's tokens, teacher-forced, its end not counted (rows whose
    answer is not known count nothing), ``<group>_free`` the share of written answers that are right (:func:`is_right`; of
    several right answers any, where the first is the one that is forced), ``<group>_exact`` the share that say nothing else
    (:func:`is_exact`): between the two lie those that go on, or say more than was asked. For those that must not move also
    ``<group>_agreement`` and ``<group>_free_agreement``, with ``before``. ``ood``: the share of the tokens of a passage
    (``Edit.ood``) that have, those before them given, a probability above :data:`CERTAIN`, as WISE counts it; the edit's
    prompt, where the passage begins with it, is not counted, else its first token is not. A passage that is longer than the
    model reads is cut at its end. Beside these ``answer_tokens``, the most that a written answer could have
    (:func:`budget`), where any was written; and ``reliability_perplexity``, at least 1: the mean over edits of ``exp`` of
    the mean surprise, in nats, of the new answer's tokens, teacher-forced, which WISE's table of hallucinations has in place
    of reliability. One answer that the model holds impossible decides that mean; where it is not finite it is left out.
    """
    found: dict[str, Any] = {}
    for group, said in after.tokens.items():
        probes = [list(GROUPS[group](edit)) for edit in edits]
        each = _each(model, probes, said, chat)
        found[group] = _mean(each)
        if group in after.texts:
            pairs = zip(probes, after.texts[group], edits, strict=True)
            old = [e.old if group in (RELIABILITY, "generality") else None for e in edits]
            judged = [
                [
                    [
                        any(is_right(text, answer, was) for answer in (p.answer, *p.also)),
                        any(is_exact(text, answer) for answer in (p.answer, *p.also)),
                    ]
                    for p, text in zip(own, texts, strict=True)
                    if p.answer is not None
                ]
                for (own, texts, _), was in zip(pairs, old, strict=True)
            ]
            for i, way in enumerate(("free", "exact")):
                found[f"{group}_{way}"] = _mean([[float(one[i]) for one in own] for own in judged])
        if group in LOCAL:
            same = [
                [_share(a, b) for a, b in zip(now, then, strict=True)]
                for now, then in zip(said, before.tokens[group], strict=True)
            ]
            found[f"{group}_agreement"] = _mean(same)
            if group in after.texts and group in before.texts:
                found[f"{group}_free_agreement"] = _mean(
                    [
                        [float(a == b) for a, b in zip(now, then, strict=True)]
                        for now, then in zip(after.texts[group], before.texts[group], strict=True)
                    ]
                )
    found[OOD] = _mean(after.ood)
    found["answer_tokens"] = after.budget if after.texts else None
    if after.surprise:
        found[f"{RELIABILITY}_perplexity"] = finite(torch.tensor(after.surprise).double().exp().mean())
    return {name: value for name, value in found.items() if value is not None}


def finite(value: Tensor | float) -> float | None:
    """A number that JSON can hold; ``None`` for one that is not finite, as a broken model's perplexity may be."""
    return float(value) if math.isfinite(value) else None


def retention(model: EditableModel, edits: Sequence[Edit], after: Asked, *, chat: bool = False) -> list[float]:
    """Each edit's own reliability, teacher-forced, in the order of ``edits``: by age, the newest last."""
    found = by_edit(model, edits, after, RELIABILITY, chat=chat)
    return [own for own in found if own is not None]  # an edit always says its answer


def by_edit(
    model: EditableModel, edits: Sequence[Edit], after: Asked, group: str, *, chat: bool = False
) -> list[float | None]:
    """Each edit's own score in a group, teacher-forced; None where it has no question there whose answer is known."""
    if group not in after.tokens:
        return [None] * len(edits)
    probes = [list(GROUPS[group](edit)) for edit in edits]
    return [_mean([own]) for own in _each(model, probes, after.tokens[group], chat)]


def written_right(edits: Sequence[Edit], after: Asked) -> list[bool]:
    """Whether each edit's own prompt was answered rightly (:func:`is_right`) when the model wrote by itself."""
    texts = after.texts[RELIABILITY]
    return [is_right(own[0], edit.answer, edit.old) for edit, own in zip(edits, texts, strict=True)]


def perplexity(model: EditableModel, texts: Sequence[str] = PARAGRAPHS) -> float:
    """``exp`` of the mean surprise, in nats a token, of the second halves of plain texts.

    The first half of each is its prompt, so that what answers for some prompts alone may take it for one of them, and what
    puts something before prompts may do so.
    """
    pairs = []
    for text in texts:
        words = text.split(" ")
        first, second = (" ".join(part) for part in (words[: len(words) // 2], words[len(words) // 2 :]))
        behind = model.encode_answer(second, end=False)
        pairs.append((model.read_prompt(first, room=len(behind)) or [model.tokenizer.end], behind))
    rows = model.rows(pairs)
    logits = model.logits(rows, batch_size=4)
    nats = -logits.log_softmax(1).gather(1, rows.labels[:, None])
    return float(nats.double().mean().exp())


def fluency(model: EditableModel, edits: Sequence[Edit], *, seed: int = 0, chat: bool = False) -> float | None:
    """How varied what the model writes behind the edits' prompts is: the mean :func:`ngram_entropy`, in bits.

    The first :data:`WRITTEN` prompts behind which there is room, :data:`LENGTH` tokens behind each, drawn from the five
    likeliest with a ``seed``. ``None`` where the model reads too little to write so much behind any, or what it puts out is
    not finite. What was broken repeats itself.
    """
    most = model.context
    room = (
        e.prompt
        for e in edits
        if most is None or len(model.read_prompt(e.prompt, chat=chat, room=LENGTH)) + LENGTH <= most
    )
    prompts = list(islice(room, WRITTEN))
    if not prompts:
        return None
    try:
        texts = model.write(prompts, tokens=LENGTH, seed=seed, chat=chat)
    except EditError:
        return None
    return sum(map(ngram_entropy, texts)) / len(texts)


def ngram_entropy(text: str) -> float:
    """How varied a text is: the weighted mean of the entropies, in bits, of its pairs (2/3) and triples (4/3) of words.

    Zhang et al. 2018's, with the weights of Meng et al. 2022: repetition lowers it. 0 for texts of fewer than three words.
    """
    words = text.split()
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        if not grams:
            return 0.0
        counts = torch.tensor([grams.count(g) for g in dict.fromkeys(grams)], dtype=torch.float64)
        share = counts / counts.sum()
        total += weight * float(-(share * share.log2()).sum()) / 2
    return total


def normal(text: str) -> str:
    """A text for comparing answers: case, articles, punctuation and extra blanks do not count.

    What belongs to a number does, its sign and its point (1.5, −5), and to a name (C++, F#). Each Chinese or Japanese
    character is a word. However a letter is composed, it is one.
    """
    return " ".join(word for word in _words(text) if word not in ARTICLES)


def joined(text: str) -> str:
    """A text with initials written together, J.R.R. Tolkien for J. R. R. Tolkien: single letters, each with its full stop.

    Another reading of a text, not the only one: "Choose A. B. is wrong" has no initials.
    """
    return _APART.sub("", text)


_INSIDE = re.compile(
    r"(?<=\w)['’](?=\w)|(?<=\d),(?=\d{3}(?!\d))|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b)"
)  # John's, 1,000, U.S.
_APART = re.compile(r"(?<=\b[^\W\d_]\.)\s+(?=[^\W\d_]\.)")
_SPOKEN = re.compile(rf"[{ALONE}]|(?:(?<!\w)[-−](?=\d))?(?:\d+(?:\.\d+)+|[^\W_{ALONE}]+)(?:\+\+|\#(?!\w))?")


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text).casefold()
    return [word.replace("−", "-") for word in matches(_SPOKEN, _INSIDE.sub("", text))]


def is_right(said: str, answer: str, old: str | None = None) -> bool:
    """Whether what was written gives the answer and not the old one: the answer's words stand in it, in order.

    A text that also says the ``old`` answer, where that is another, is not right; nor is an empty one. An answer that is
    but an article (blood group A) must be all that is said, and one that only marks tell from the old, or that has no words
    (€), must be said as it is. Whether more is said, and what, does not count: "It is not Paris" gives Paris.
    Initials may stand together or apart (:func:`joined`): the answer must be said in one of these readings, and the old one
    in none that says it.
    """
    texts = [unicodedata.normalize("NFC", text) for text in (said, answer, old or "")]
    seen = [_says(*texts), _says(*map(joined, texts))]
    return any(only is not None for only in seen) and all(only is not False for only in seen)


def is_exact(said: str, answer: str) -> bool:
    """Whether what was written is the answer and nothing else, up to what :func:`normal` leaves out; not an empty one."""
    one, other = (unicodedata.normalize("NFC", text).strip() for text in (said, answer))
    if any(normal(way(one)) == normal(way(other)) != "" for way in (str, joined)):
        return True
    ends = " .,:;!?"
    one, other = (text.rstrip(ends).casefold() or text for text in (one, other))
    return bool(other) and not normal(other) and one == other


def _says(said: str, answer: str, old: str) -> bool | None:
    """Whether a text that says ``answer`` does not say ``old`` as well; ``None`` for one that does not say it."""
    words, wanted = f" {normal(said)} ", f" {normal(answer)} "
    if _words(answer) and not wanted.strip():
        return True if _words(said) == _words(answer) else None
    was = f" {normal(old)} "
    if was == wanted or not wanted.strip():
        words, wanted, was = (text.casefold().strip() for text in (said, answer, old))
    if not wanted or wanted not in words:
        return None
    if not was.strip() or was == wanted:
        return True
    # Where the new answer holds the old one (New York City), the old one counts only if it also stands by itself.
    return was not in (words.replace(wanted, "  ") if was in wanted else words)


def _forced(
    model: EditableModel, probes: Sequence[Probe], chat: bool, batch_size: int
) -> tuple[list[list[int]], list[float]]:
    """At the places of each probe's answer, its end not among them, the likeliest tokens, and the answer's mean surprise."""
    answers = [_answer_tokens(model, p, chat) for p in probes]
    pairs = [(model.read_prompt(p.prompt, chat=chat, room=len(a)), a) for p, a in zip(probes, answers, strict=True)]
    best: list[list[int]] = []
    surprise: list[float] = []
    for first in range(0, len(pairs), batch_size):
        rows = model.rows(pairs[first : first + batch_size])
        logits = model.logits(rows, batch_size)
        lengths = [len(a) for a in answers[first : first + batch_size]]
        best += _divided(logits.argmax(1).tolist(), lengths)
        # One by one, since the logarithms of all their likelihoods would take as much memory as the logits once more.
        told = zip(logits.split(lengths), rows.labels.split(lengths), strict=True)
        surprise += [float(torch.nn.functional.cross_entropy(*own)) for own in told]
    return best, surprise


def _sure_of(model: EditableModel, edits: Sequence[Edit]) -> list[list[float]]:
    """The shares of tokens that are all but certain, of each edit's passages but those with nothing to predict."""
    pairs = [[_passage(model, edit.prompt, text) for text in edit.ood] for edit in edits]
    flat = [pair for own in pairs for pair in own if pair[1]]
    shares: list[float] = []
    for first in range(0, len(flat), _PASSAGES):
        some = flat[first : first + _PASSAGES]
        rows = model.rows(some)
        likely = model.logits(rows).softmax(1).gather(1, rows.labels[:, None]).squeeze(1)
        shares += [float((own > CERTAIN).double().mean()) for own in likely.split([len(rest) for _, rest in some])]
    return _divided(shares, [sum(bool(rest) for _, rest in own) for own in pairs])


def _passage(model: EditableModel, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """What of a passage is given, and what is to be predicted, as far as the model reads."""
    rest = text.removeprefix(prompt)
    if rest != text and rest[:1].isspace():
        tokens = model.encode_answer(rest, end=False)
        given = model.read_prompt(prompt, room=1)  # what of the passage finds none is cut
    else:
        ids = model.encode_prompt(text)
        given, tokens = ids[:1], ids[1:]
    room = len(tokens) if model.context is None else max(model.context - len(given), 0)
    return given, tokens[:room]


def _answer_tokens(model: EditableModel, probe: Probe, chat: bool) -> list[int]:
    # Where no answer is known, what is compared is the token behind the prompt.
    return model.encode_answer(probe.answer, chat=chat, end=False) if probe.answer else [model.tokenizer.end]


def _each(
    model: EditableModel, probes: Sequence[Sequence[Probe]], said: Sequence[Sequence[list[int]]], chat: bool
) -> list[list[float]]:
    return [
        [
            _share(tokens, _answer_tokens(model, p, chat))
            for p, tokens in zip(own, texts, strict=True)
            if p.answer is not None
        ]
        for own, texts in zip(probes, said, strict=True)
    ]


def _share(one: Sequence[int], two: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(one, two, strict=True)) / len(two)


def _mean(values: Sequence[Sequence[float]]) -> float | None:
    """Over edits, of the means over each one's questions; ``None`` where no edit has any."""
    means = [sum(own) / len(own) for own in values if own]
    return sum(means) / len(means) if means else None


def _divided(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    it = iter(values)
    return [[next(it) for _ in range(n)] for n in sizes]
