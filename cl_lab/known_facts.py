"""Facts that a model knows, so that an edit replaces what it believes and does not only add to it.

Of facts with several wordings each those are kept that the model writes by itself in two of them, is sure of, and does not
write of every subject alike (a prior: *Europe*, *English*). Each gets an answer that is not true and that the model holds
unlikely, drawn from the other answers of its relation. Known facts that are not edited are what to ask beside: of the same
relation, of the same subject, and of neither.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_lab import edit_scores
from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError, DataError, nearest
from cl_lab.facts import Edit, Probe, read_facts
from cl_lab.files import write_atomically
from cl_lab.seeding import permutation

log = logging.getLogger("cl_lab")

OWN = Path(__file__).with_name("known_facts.json")
"""Some five hundred well known facts of thirteen relations, three wordings each."""

WORDINGS = 4
"""Wordings of a fact that are asked, at most."""

SURE, LIFT, UNLIKELY = 0.2, 3.0, 1e-2
"""The first token of a known answer has at least this probability, and so many times what it has for the relation's other
subjects; that of a counterfactual one has less than the last."""

SHARE, HELD_BACK, BESIDE = 0.3, 0.2, 2
"""Share of a relation's edits that may get one answer; share of its known facts that are not edited, one at least where
there are two; and how many of these are asked beside each edit, of each kind."""

_CHUNK = 128  # prompts whose probabilities of all tokens are in memory at once


@dataclass(frozen=True)
class Fact:
    """What may be known: ``objects`` are the right answers, ``prompts`` the wordings, each up to where the answer begins."""

    relation: str
    subject: str
    objects: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """A fact that a model knows.

    ``prompt`` (a number) is the wording under which it is surest, ``answer`` what it says there, ``unlikely`` the answers of
    the relation that it holds improbable there, and of which another is the first token.
    """

    fact: Fact
    prompt: int
    answer: str
    unlikely: tuple[str, ...]

    @property
    def probe(self) -> Probe:
        """The fact as a question whose answer must stay."""
        return Probe(self.fact.prompts[self.prompt], self.answer)


# -- sets of facts -------------------------------------------------------------------------------------------------


def read_relations(source: Path | None = None) -> list[Fact]:
    """The facts of ``source``; without one, our own.

    A JSON file or a folder of them with ``name``, ``prompt_templates`` and ``samples`` (ours, and that of LRE, Hernandez et
    al. 2024), PARAREL's folder (``facts``, ``patterns``; Elazar et al. 2021), or any file of edits with relation, subject
    and ``old``, whose prompt and paraphrases are the wordings. Of a subject with several objects each is a right answer.
    Raises :class:`DataError` for what is none of these.
    """
    source = source or OWN
    if (source / "patterns").is_dir():
        found = [fact for file in _files(source / "patterns", "*.jsonl") for fact in _pararel(file)]
    elif source.is_dir():
        found = [fact for file in _files(source, "**/*.json") for fact in _relations(file, _json(file))]
    elif source.suffix == ".json" and _is_relation(document := _json(source)):
        found = _relations(source, document)
    else:
        found = [_from_edit(edit) for edit in read_facts(source, to_skip="").edits]
    return found


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"'{folder}': holds no {pattern.rpartition('/')[2]}; give a file, or a folder of relations")
    return found


def _text(file: Path, fix: str = "give a file that can be read") -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"'{file}': {error.strerror}; {fix}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"'{file}', line {line}: not UTF-8 ({error.reason}); convert it") from None


def _json(file: Path) -> Any:
    text = _text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{file}': is no JSON ({error}); correct it") from None


def _is_relation(document: object) -> bool:
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, dict) and "samples" in first


def _relations(file: Path, document: Any) -> list[Fact]:
    found: list[Fact] = []
    for relation in document if isinstance(document, list) else [document]:
        try:
            for key, kind in (("prompt_templates", list), ("name", str)):
                if not isinstance(relation[key], kind):
                    raise TypeError(f"{key} is no {'text' if kind is str else 'list'}")
            templates = [*relation["prompt_templates"], *relation.get("prompt_templates_zs", ())]
            pairs = [(pair["subject"], pair["object"]) for pair in relation["samples"]]
            found += _filled(relation["name"], [str(t) for t in templates], pairs)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"'{file}': is no relation ({type(error).__name__}: {error}); it needs name, prompt_templates and samples "
                "of subject and object"
            ) from None
    return found


def _pararel(patterns: Path) -> list[Fact]:
    facts = patterns.parent.parent / "facts" / patterns.name
    # A wording must end with the answer.
    said = [row["pattern"].rstrip(" .") for row in _lines(patterns, "pattern")]
    templates = [p.removesuffix("[Y]").replace("[X]", "{}") for p in said if p.endswith("[Y]")]
    pairs = [(row["sub_label"], row["obj_label"]) for row in _lines(facts, "sub_label", "obj_label")]
    return _filled(patterns.stem, templates, pairs)


def _lines(file: Path, *keys: str) -> Iterator[Mapping[str, str]]:
    # str.splitlines would also divide at separators that may stand inside a JSON text.
    lines = enumerate(_text(file, "PARAREL has facts and patterns of one name").split("\n"), 1)
    for number, line in ((n, line) for n, line in lines if line.strip()):
        try:
            row = json.loads(line)
            yield {key: str(row[key]) for key in keys}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"'{file}', line {number}: needs {', '.join(keys)} ({error}); correct it") from None


def _filled(relation: str, templates: Iterable[str], pairs: Iterable[tuple[str, str]]) -> list[Fact]:
    """The facts of one relation, each subject once; templates that are not asked are dropped."""
    wordings = list(dict.fromkeys(t.strip() for t in templates if t.count("{}") == 1))[:WORDINGS]
    objects: dict[str, list[str]] = defaultdict(list)
    for subject, answer in pairs:
        objects[subject.strip()].append(answer.strip())
    return [
        Fact(relation, subject, tuple(dict.fromkeys(said)), tuple(t.replace("{}", subject) for t in wordings))
        for subject, said in objects.items()
        if wordings and subject and all(said)
    ]


def _from_edit(edit: Edit) -> Fact:
    if not edit.subject or not edit.relation or not edit.old:
        lacks = next(name for name in ("subject", "relation", "old") if not getattr(edit, name))
        raise DataError(
            f"{edit.source}: has no {lacks}; known facts need subject, relation and old, the answer that may be known"
        )
    return Fact(edit.relation, edit.subject, (edit.old,), (edit.prompt, *edit.paraphrases)[:WORDINGS])


# -- what a model knows --------------------------------------------------------------------------------------------


def recall(model: EditableModel, facts: Sequence[Fact], *, chat: bool = False) -> tuple[list[Known], dict[str, int]]:
    """Which of the ``facts`` of *one* relation the model knows, in their order, and how many came how far.

    ``asked``; ``chosen``: of the relation's answers the right one's first token is the likeliest, in two wordings (in all,
    where there are fewer); ``sure``: in some wording this token has the probability :data:`SURE`, and :data:`LIFT` times its
    mean over the subjects with other answers; ``written``: of the sure, what the model writes by itself begins with the
    answer in two wordings, one of which it is sure in. These are ``known``; with ``chat``, of these those alone whose answer
    it also says when a wording, as a user's turn, is put to it: in one, as to a chat the beginning of a sentence is no
    question. What falls out is asked no further.
    """
    answers = _Answers(model, facts)
    counts = {"asked": len(facts), "chosen": 0, "sure": 0}
    doubted: dict[int, list[int]] = {}  # to each fact in question the wordings it is sure in, the surest first
    for i, fact in enumerate(facts):
        right = torch.tensor([o in fact.objects for o in answers.objects])
        table = answers.likely[i]
        own = torch.where(right, table, -1).max(1)
        counts["chosen"] += int((own.values >= table.max(1).values).sum()) >= _needed(fact)
        sure = (own.values >= SURE) & (own.values >= LIFT * answers.elsewhere[range(len(table)), own.indices])
        if sure.any():
            counts["sure"] += 1
            doubted[i] = own.values.masked_fill(~sure, -1).argsort(descending=True)[: int(sure.sum())].tolist()
    written: dict[int, tuple[int, str]] = {}
    texts = _said(model, [facts[i] for i in doubted], answers.longest + 2, chat=False)
    for (i, sure_in), said in zip(doubted.items(), texts, strict=True):
        begun = [_begins(text, facts[i].objects) for text in said]
        places = [(n, answer) for n in sure_in if (answer := begun[n]) is not None]
        if places and sum(b is not None for b in begun) >= _needed(facts[i]):
            written[i] = places[0]
    counts["written"] = len(written)
    if chat:
        most = edit_scores.budget(model, answers.objects, chat=True)
        texts = _said(model, [facts[i] for i in written], most, chat=True)
        for i, said in zip(list(written), texts, strict=True):
            if not any(edit_scores.is_right(text, o) for o in facts[i].objects for text in said):
                del written[i]
    found = [Known(facts[i], n, answer, answers.unlikely(i, n)) for i, (n, answer) in written.items()]
    return found, counts | {"known": len(found)}


def _needed(fact: Fact) -> int:
    return min(2, len(fact.prompts))


def _said(model: EditableModel, facts: Sequence[Fact], budget: int, *, chat: bool) -> list[list[str]]:
    """What the model writes to each wording of each fact."""
    prompts = [p for fact in facts for p in fact.prompts]
    texts = iter(model.answer(prompts, max_new_tokens=budget, chat=chat))
    return [[next(texts) for _ in fact.prompts] for fact in facts]


def _begins(text: str, objects: Sequence[str]) -> str | None:
    """That of ``objects`` with whose words a text begins, initials together or apart."""
    both = [(read, f"{edit_scores.normal(read(text))} ") for read in (str, edit_scores.joined)]
    for o in objects:
        for read, words in both:
            if (wanted := edit_scores.normal(read(o))) and words.startswith(f"{wanted} "):
                return o
    return None


class _Answers:
    """How likely a model holds the first tokens of a relation's answers, for each fact and wording.

    ``objects`` are all answers, each once, ``longest`` the most tokens that one has. ``likely`` has for each fact a float32
    ``[wordings, objects]``; ``elsewhere`` ``[wordings, objects]`` is the mean of these over the facts whose answers begin
    otherwise, 0 where there are none. A blank that is a token by itself (bytes) is read with the prompt.
    """

    def __init__(self, model: EditableModel, facts: Sequence[Fact]) -> None:
        self.objects = list(dict.fromkeys(o for fact in facts for o in fact.objects))
        encoded = [model.encode_answer(o, end=False) for o in self.objects]
        self.longest = max(map(len, encoded))
        blanks = 0
        while all(len(e) > blanks + 1 and not model.tokenizer.decode([e[blanks]]).strip() for e in encoded):
            blanks += 1
        first = torch.tensor([e[blanks] for e in encoded])
        prompts = [model.read_prompt(p, room=blanks + 1) + encoded[0][:blanks] for fact in facts for p in fact.prompts]
        parts = []
        for begin in range(0, len(prompts), _CHUNK):
            rows = model.rows([(p, [model.tokenizer.end]) for p in prompts[begin : begin + _CHUNK]])
            parts.append(model.logits(rows).softmax(1)[:, first])
        self.likely: list[Tensor] = list(torch.cat(parts).split([len(fact.prompts) for fact in facts]))
        own = [first[[o in fact.objects for o in self.objects]] for fact in facts]
        self._owned = torch.stack([torch.isin(first, some) for some in own])  # [facts, objects]
        others = torch.nn.utils.rnn.pad_sequence(self.likely, batch_first=True, padding_value=torch.nan)
        self.elsewhere = others.masked_fill(self._owned[:, None], torch.nan).nanmean(0).nan_to_num(0)

    def unlikely(self, i: int, number: int) -> tuple[str, ...]:
        """The answers that may be put in place of the ``i``-th fact's, in its wording ``number``."""
        free = ~self._owned[i] & (self.likely[i][number] < UNLIKELY)
        return tuple(o for o, is_free in zip(self.objects, free.tolist(), strict=True) if is_free)


# -- edits ---------------------------------------------------------------------------------------------------------


def counterfactuals(known: Sequence[Known], *, seed: int = 0, limit: int | None = None) -> list[Edit]:
    """An edit for each fact, but for those held back (:data:`HELD_BACK` of each relation), in an order of ``seed``.

    At most ``limit``; subjects that had none come first. The answer is drawn from the relation's unlikely ones, none for
    more than :data:`SHARE` of its edits; a fact for which none is left is not edited. Asked beside, of what is known and not
    edited: facts of the same relation, of the same subject, and of neither, where there are such. A pure function.
    """
    order = [known[i] for i in permutation(len(known), seed, "known facts").tolist()]
    # A subject's second fact is edited last, so that it rather stays to be asked beside its first.
    rank: Counter[str] = Counter()
    ranked = []
    for one in order:
        ranked.append((rank[one.fact.subject.casefold()], one))
        rank[one.fact.subject.casefold()] += 1
    order = [one for _, one in sorted(ranked, key=lambda pair: pair[0])]
    many = Counter(one.fact.relation for one in order)
    editable = {relation: n - max(round(HELD_BACK * n), int(n > 1)) for relation, n in many.items()}
    given: dict[str, Counter[str]] = defaultdict(Counter)
    edited: list[tuple[Known, str]] = []
    for one in order:
        relation = one.fact.relation
        answers, most = given[relation], max(1, int(SHARE * editable[relation]))
        free = [a for a in one.unlikely if answers[a] < most]
        if len(edited) == limit or answers.total() == editable[relation] or not free:
            continue
        drawn = free[int(permutation(len(free), seed, relation, one.fact.subject)[0])]
        answers[drawn] += 1
        edited.append((one, drawn))
    changed = {id(one) for one, _ in edited}
    kept = [one for one in order if id(one) not in changed]
    return [_edit(one, answer, kept, seed) for one, answer in edited]


def _edit(one: Known, answer: str, kept: Sequence[Known], seed: int) -> Edit:
    """The edit of a fact, with questions on some of the ``kept``, which are not edited."""
    fact, subject = one.fact, one.fact.subject.casefold()

    def drawn(some: Sequence[Known], what: str) -> tuple[Probe, ...]:
        order = permutation(len(some), seed, what, fact.relation, fact.subject).tolist()
        return tuple(some[i].probe for i in order[:BESIDE])

    own = [k for k in kept if k.fact.subject.casefold() == subject and k.fact.relation != fact.relation]
    others = [k for k in kept if k.fact.subject.casefold() != subject]
    return Edit(
        one.probe.prompt,
        answer,
        old=one.answer,
        subject=fact.subject,
        relation=fact.relation,
        paraphrases=tuple(p for n, p in enumerate(fact.prompts) if n != one.prompt),
        unrelated=drawn([k for k in others if k.fact.relation != fact.relation], "unrelated"),
        same_relation=drawn([k for k in others if k.fact.relation == fact.relation], "same relation"),
        same_subject=drawn(own, "same subject"),
    )


def write_known_facts(
    out: Path,
    model: str,
    source: Path | None = None,
    *,
    relations: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> dict[str, Any]:
    """Write to ``out`` (JSON lines, :class:`~cl_lab.facts.Edit`) edits of what ``model`` knows of ``source``.

    ``relations`` asks these alone; ``chat`` as :func:`recall`. Returns ``asked``, ``known``, ``edits``, and for each
    relation the counts of :func:`recall` and its edits. The folder of ``out`` is made where it is missing. Raises
    :class:`ConfigError` for an ``out`` that is taken, no ``.jsonl`` or in a folder that cannot be written to, and for an
    unknown relation; :class:`DataError` where nothing is known, or the file cannot be written.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"'{out}': must end with .jsonl; name the file of edits to write")
    if out.exists():
        raise ConfigError(f"'{out}': is there already; choose another name")
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in read_relations(source):
        by_relation[fact.relation].append(fact)
    if unknown := [r for r in relations if r not in by_relation]:
        raise ConfigError(f"--relations '{unknown[0]}': is not in the facts{nearest(unknown[0], by_relation)}")
    try:  # now: asking takes long
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ConfigError(f"'{out}': cannot be written ({error.strerror}); choose another place") from None
    target = load_editable(model)
    if chat:
        target.tokenizer.chat("")  # says at once where there is no template
    known: list[Known] = []
    table: dict[str, dict[str, int]] = {}
    for relation in dict.fromkeys(relations) or by_relation:
        some, table[relation] = recall(target, by_relation[relation], chat=chat)
        known += some
        log.info("%s: %d of %d known", relation, len(some), len(by_relation[relation]))
    edits = counterfactuals(known, seed=seed, limit=limit)
    asked = sum(counts["asked"] for counts in table.values())
    if not edits:
        raise DataError(
            f"model '{model}': of {asked} facts it knows {len(known)}, too few to put others in their place; nothing was "
            "written; ask more with --facts"
        )
    made = Counter(edit.relation for edit in edits)
    try:
        write_atomically(out, "".join(json.dumps(e.as_json(), ensure_ascii=False) + "\n" for e in edits))
    except OSError as error:
        raise DataError(f"'{out}' cannot be written ({error.strerror}); choose another place") from error
    return {
        "model": model,
        "facts": (source or OWN).name,
        "seed": seed,
        "chat": chat,
        "asked": asked,
        "known": len(known),
        "edits": len(edits),
        "relations": {relation: counts | {"edits": made[relation]} for relation, counts in table.items()},
    }
