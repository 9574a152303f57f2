"""What is edited in a model: the records, the layouts in which they are published, and whether they contradict.

A file is read whole or not at all, unless the caller asks for bad records to be left out. Whatever is wrong with a record
becomes a :class:`BadLine`, whatever is wrong with a file one :class:`~cl_lab.errors.DataError`.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cl_lab.errors import ConfigError, DataError, nearest, shortened


@dataclass(frozen=True)
class Probe:
    """A question that is asked beside an edit, and its right answer.

    ``answer`` is None where only agreement with the unedited model can be asked. ``also`` are further answers that are
    right: one that is written may be any of them, the one that is forced is ``answer``.
    """

    prompt: str
    answer: str | None = None
    also: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """``prompt``, and ``answer`` and ``also`` where there are any."""
        given = {"prompt": self.prompt, "answer": self.answer, "also": list(self.also)}
        return {key: value for key, value in given.items() if value}


@dataclass(frozen=True)
class Edit:
    """One fact to be put into a model, and what to ask afterwards.

    Texts have no space at their ends; the one between prompt and answer is the editor's to add.

    ``prompt``, ``answer``
        What is asked, and the new answer.
    ``old``
        What was true before, or what the model believed.
    ``subject``, ``relation``
        Whom the fact is about, and what it says of them (a name or Wikidata's number).
    ``aliases``
        What else the subject is called.
    ``paraphrases``
        The prompt in other words; the new answer holds.
    ``ood``
        Passages in which the fact is written about, begun as the prompt or otherwise: to be read, not asked (WISE's
        ``ood_rephrase``).
    ``reverse``
        The fact asked from its object, whose answer is the subject.
    ``one_hop``
        What follows from the fact: further hops, aliases of the subject.
    ``unrelated``, ``same_relation``, ``same_subject``
        What must not change: any other question, the relation for other subjects, other relations of the subject.
    ``irrelevant``
        Texts with which an editor may train to keep unrelated prompts apart (WISE's ``loc_prompt_train``).
    ``source``
        Where it was read, ``facts.jsonl:17``, for messages.
    """

    prompt: str
    answer: str
    old: str | None = None
    subject: str | None = None
    relation: str | None = None
    aliases: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    ood: tuple[str, ...] = ()
    reverse: tuple[Probe, ...] = ()
    one_hop: tuple[Probe, ...] = ()
    unrelated: tuple[Probe, ...] = ()
    same_relation: tuple[Probe, ...] = ()
    same_subject: tuple[Probe, ...] = ()
    irrelevant: tuple[str, ...] = ()
    source: str = ""

    @property
    def shown(self) -> str:
        """The prompt as messages have it."""
        return shortened(self.prompt)

    def as_json(self) -> dict[str, Any]:
        """All fields that are not empty, as the plain layout has them."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: [v.as_json() if isinstance(v, Probe) else v for v in value] if isinstance(value, tuple) else value
            for name, value in given.items()
            if value
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, max_answer: int | None = None) -> Edit:
        """The edit in a record of the plain layout. Raises :class:`DataError` for one that is none.

        An answer of more than ``max_answer`` characters (None: 400) is none, as in a file of the plain layout.
        """
        limit = _limit("plain", max_answer)
        try:
            return _within(_plain(record), limit)
        except _Bad as bad:
            raise DataError(f"edit: {bad}; correct it") from bad


GROUPS: dict[str, Callable[[Edit], Sequence[Probe]]] = {
    "reliability": lambda e: [Probe(e.prompt, e.answer)],
    "generality": lambda e: [Probe(p, e.answer) for p in e.paraphrases],
    "reverse": lambda e: e.reverse,
    "one_hop": lambda e: e.one_hop,
    "unrelated": lambda e: e.unrelated,
    "same_relation": lambda e: e.same_relation,
    "same_subject": lambda e: e.same_subject,
}
"""The questions of an edit by what they ask for."""

LOCAL = ("unrelated", "same_relation", "same_subject")
"""Groups that an edit must leave as they are: for them agreement with the unedited model counts, too."""


@dataclass(frozen=True)
class BadLine:
    """A record that is no edit: its ``place`` (``facts.jsonl:17``), and the ``reason``."""

    place: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """What a file holds: its ``edits`` in order, and the ``bad`` records that were left out."""

    edits: tuple[Edit, ...]
    bad: tuple[BadLine, ...] = ()


# -- a record's values ---------------------------------------------------------------------------------------------


class _Bad(Exception):
    """Why a record is no edit."""


def _kind(value: object) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _checked(value: object, name: str) -> str:
    """``value`` without space at its ends, if it is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise _Bad(f"{name} is {_kind(value)}, not a text")
    if "\0" in value:
        raise _Bad(f"{name} holds a null character")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise _Bad(f"{name} holds half of a surrogate pair")
    return value.strip()


def _needed(record: Mapping[str, Any], key: str, name: str = "") -> str:
    name = name or key
    if record.get(key) is None:
        raise _Bad(f"has no {name}")
    text = _checked(record[key], name)
    if not text:
        raise _Bad(f"{name} is empty")
    return text


def _optional(record: Mapping[str, Any], key: str, name: str = "") -> str | None:
    value = record.get(key)
    return None if value is None else _checked(value, name or key) or None


def _answers(record: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The answers under ``keys``, however deep in lists they stand: all that differ, in order."""
    found = (_checked(value, key) for key in keys for value in _flat(record.get(key)))
    return tuple(dict.fromkeys(text for text in found if text))


def _first(record: Mapping[str, Any], key: str) -> str | None:
    """The first of the answers under ``key``; what stands behind it is not looked at."""
    value = next(_flat(record.get(key)), None)
    return None if value is None else _checked(value, key) or None


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    elif value is not None:
        yield value


def _listed(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _Bad(f"{key} is {_kind(value)}, not a list")
    return value


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{name} is {_kind(value)}, not an object")
    return value


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The texts of the list under ``key``, without empty ones."""
    texts = (_checked(value, f"{key}[{i}]") for i, value in enumerate(_listed(record, key), 1))
    return tuple(text for text in texts if text)


def _some(*texts: str | None) -> tuple[str, ...]:
    return tuple(text for text in texts if text)


def _asked(prompt: str | None, answers: Sequence[str]) -> tuple[Probe, ...]:
    """A probe that may go without an answer, if there is one."""
    return (Probe(prompt, next(iter(answers), None), tuple(answers[1:])),) if prompt else ()


def _told(prompt: str | None, answers: Sequence[str]) -> tuple[Probe, ...]:
    """A probe of what the edit changes: without an answer nothing can be asked."""
    return _asked(prompt, answers) if answers else ()


# -- layouts -------------------------------------------------------------------------------------------------------

_FIELDS = tuple(f.name for f in dataclasses.fields(Edit))
_OPTIONAL = ("old", "subject", "relation")
_TEXTS = ("aliases", "paraphrases", "ood", "irrelevant")
_PROBES = ("reverse", "one_hop", "unrelated", "same_relation", "same_subject")
_ASKED = ("prompt", "answer", "also")
_BETWEEN = " | "


_MEANT = {"question": "prompt", "query": "prompt", "target": "answer", "new": "answer", "alias": "aliases"}
"""What people call a field."""


def _plain(record: Mapping[str, Any]) -> Edit:
    for key in record:
        if key not in _FIELDS:
            meant = _MEANT.get(key.strip().casefold())
            hint = f"; did you mean '{meant}'?" if meant else nearest(key, _FIELDS)
            raise _Bad(f"unknown key '{_short(key)}'{hint}")
    given: dict[str, Any] = {key: _optional(record, key) for key in _OPTIONAL}
    given |= {key: _texts(record, key) for key in _TEXTS}
    given |= {
        key: tuple(_probe(value, f"{key}[{i}]") for i, value in enumerate(_listed(record, key), 1)) for key in _PROBES
    }
    prompt, answer = _needed(record, "prompt"), _needed(record, "answer")
    return Edit(prompt, answer, source=_optional(record, "source") or "", **given)


def _probe(value: object, name: str) -> Probe:
    if isinstance(value, list):
        if len(value) not in (1, 2):
            raise _Bad(f"{name} has {len(value)} values, not prompt and answer")
        value = dict(zip(("prompt", "answer"), value, strict=False))
    given = _object(value, name)
    for key in given:
        if key not in _ASKED:
            raise _Bad(f"{name} has the unknown key '{_short(key)}'{nearest(key, _ASKED)}")
    answer, also = (
        _optional(given, "answer", f"{name}.answer"),
        _texts({f"{name}.also": given.get("also")}, f"{name}.also"),
    )
    if also and answer is None:
        raise _Bad(f"{name}.also has answers and {name}.answer none; write the first as the answer")
    return Probe(_needed(given, "prompt", f"{name}.prompt"), answer, also)


def _from_cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table as the plain layout: texts apart at ``" | "``, probes as JSON."""
    out: dict[str, Any] = dict(record)
    if "" in out:
        raise _Bad(f"has '{_short(out[''].strip())}' in a column without a name; name the column or empty the cell")
    for key in {*_TEXTS, *_PROBES} & out.keys():
        cell = out[key].strip()
        if not cell:
            del out[key]
        elif key in _TEXTS:
            out[key] = cell.split(_BETWEEN)
        else:
            try:
                out[key] = _parsed(cell)
            except _Bad as bad:
                raise _Bad(f'{key} is {bad}; write [["question", "answer"]]') from bad
    return out


def _with_lists(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table of a published layout: answers that were written as a list, by Python or as JSON, are one."""
    out: dict[str, Any] = dict(record)
    for key in _LISTS & out.keys():
        if (cell := out[key].strip()).startswith("["):
            try:
                out[key] = ast.literal_eval(cell)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise _Bad(f"{key} = '{_short(cell)}' is no list; write ['one', 'other'], or one answer") from None
    return out


_LISTS = frozenset({"answers", "ground_truth", "loc_ans", "locality_ground_truth"})


def _zsre(record: Mapping[str, Any]) -> list[Edit]:
    return [
        Edit(
            _needed(record, "src"),
            _needed(record, "alt"),
            old=_first(record, "answers"),
            subject=_optional(record, "subject"),
            paraphrases=_some(_optional(record, "rephrase")),
            unrelated=_asked(_optional(record, "loc"), _answers(record, "loc_ans")),
            irrelevant=_some(_optional(record, "loc_prompt_train")),
        )
    ]


def _rewrite(value: object, name: str) -> Edit:
    """The edit that CounterFact and MQuAKE request: the subject fills the prompt's ``{}``."""
    asked = _object(value, name)
    new, true = (
        {"str": target} if isinstance(target, str) else _object({} if target is None else target, f"{name}.{key}")
        for key, target in ((key, asked.get(key)) for key in ("target_new", "target_true"))
    )
    prompt, subject = _needed(asked, "prompt", f"{name}.prompt"), _needed(asked, "subject", f"{name}.subject")
    return Edit(
        prompt.replace("{}", subject, 1),
        _needed(new, "str", f"{name}.target_new.str"),
        old=_optional(true, "str", f"{name}.target_true.str"),
        subject=subject,
        relation=_optional(asked, "relation_id", f"{name}.relation_id"),
        paraphrases=_some(_optional(asked, "question", f"{name}.question")),
    )


def _counterfact(record: Mapping[str, Any]) -> list[Edit]:
    edit = _rewrite(record.get("requested_rewrite"), "requested_rewrite")
    return [
        dataclasses.replace(
            edit,
            paraphrases=_texts(record, "paraphrase_prompts"),
            # The right answer of attribute_prompts is the edit's new one: whoever gives it to everything has them right.
            same_relation=tuple(Probe(prompt, edit.old) for prompt in _texts(record, "neighborhood_prompts")),
        )
    ]


def _mquake(record: Mapping[str, Any]) -> list[Edit]:
    rewrites = enumerate(_listed(record, "requested_rewrite"), 1)
    edits = [_rewrite(value, f"requested_rewrite[{i}]") for i, value in rewrites]
    if not edits:
        raise _Bad("requested_rewrite is empty")
    answers = _answers(record, "new_answer", "new_answer_alias")
    hops = tuple(p for question in _texts(record, "questions") for p in _told(question, answers))
    return [*edits[:-1], dataclasses.replace(edits[-1], one_hop=hops)]


def _easyedit(record: Mapping[str, Any]) -> Edit:
    """What EasyEdit's layouts share."""
    return Edit(
        _needed(record, "prompt"),
        _needed(record, "target_new"),
        old=_first(record, "ground_truth"),
        subject=_optional(record, "subject"),
    )


def _beside(record: Mapping[str, Any]) -> tuple[Probe, ...]:
    return _asked(_optional(record, "locality_prompt"), _answers(record, "locality_ground_truth"))


def _counterfact_easyedit(record: Mapping[str, Any]) -> list[Edit]:
    rephrased = _some(_optional(record, "rephrase_prompt"))
    return [dataclasses.replace(_easyedit(record), paraphrases=rephrased, same_relation=_beside(record))]


def _hallucination(record: Mapping[str, Any]) -> list[Edit]:
    return [dataclasses.replace(_easyedit(record), unrelated=_beside(record))]


def _temporal(record: Mapping[str, Any]) -> list[Edit]:
    beyond = _some(_optional(record, "ood_rephrase"))
    return [dataclasses.replace(_easyedit(record), ood=beyond, unrelated=_beside(record))]


def _knowedit(record: Mapping[str, Any]) -> list[Edit]:
    probes: dict[str, list[Probe]] = {key: [] for key in _PROBES}
    for key in ("portability", "locality"):
        groups = record.get(key)
        for name, group in _object({} if groups is None else groups, key).items():
            place = f"{key}.{_short(name)}"
            into, make = _group(key, name)
            for i, value in enumerate(_as_list(group), 1):
                asked = _object(value, f"{place}[{i}]")
                prompt = next(iter(_as_list(asked.get("prompt"))), None)
                told = None if prompt is None else _checked(prompt, f"{place}[{i}].prompt") or None
                probes[into] += make(told, _answers(asked, "ground_truth"))
    rephrased = (_checked(value, key) for key in ("rephrase", "rephrase_prompt") for value in _as_list(record.get(key)))
    given: dict[str, Any] = {key: tuple(value) for key, value in probes.items()}
    return [dataclasses.replace(_easyedit(record), paraphrases=_some(*rephrased), **given)]


def _wikibio(record: Mapping[str, Any]) -> list[Edit]:
    """KnowEdit's texts that are continued: the same, but for the names of three fields."""
    named = {"text": "prompt", "labels": "target_new", "concept": "subject"}
    for key in ("text", "labels"):
        _needed(record, key)
    return _knowedit({named.get(key, key): value for key, value in record.items()})


def _group(key: str, name: str) -> tuple[str, Callable[[str | None, Sequence[str]], tuple[Probe, ...]]]:
    """Where KnowEdit's group ``name`` goes, and how its probes are made."""
    lower = name.lower()
    if key == "portability":
        return ("reverse" if "reverse" in lower else "one_hop"), _told
    kept = {"relation_specificity": "same_subject", "forgetfulness": "same_relation"}
    return kept.get(lower, "unrelated"), _asked


def _as_list(value: object) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _halluedit(record: Mapping[str, Any]) -> list[Edit]:
    subject = _needed(record, "subject")
    believed = next((key for key in record if key.startswith("output_")), None)
    hops = (
        (_optional(record, f"question_{n}hop"), _some(_optional(record, f"answer_{n}hop")))
        for n in range(1, 10)  # the set has 2 to 6
    )
    return [
        Edit(
            _needed(record, "question"),
            _needed(record, "object" if "object" in record else "label"),
            old=None if believed is None else _optional(record, believed),
            subject=subject,
            relation=_optional(record, "relation"),
            paraphrases=_some(_optional(record, "paraphrased_question")),
            reverse=_told(_optional(record, "reversed_relation_question"), (subject,)),
            one_hop=tuple(probe for question, answers in hops for probe in _told(question, answers)),
            same_subject=_asked(_optional(record, "locality_question"), ()),
        )
    ]


class _Layout(NamedTuple):
    """A layout: what a record of it has, how one is read, and the most characters of an answer."""

    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], list[Edit]]
    limit: int = 400


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: all(key in record for key in keys)


_LAYOUTS: dict[str, _Layout] = {
    "mquake": _Layout(lambda r: isinstance(r.get("requested_rewrite"), list), _mquake),
    "counterfact": _Layout(_has("requested_rewrite"), _counterfact),
    "zsre": _Layout(_has("src", "alt"), _zsre),
    "temporal": _Layout(_has("target_new", "ood_rephrase"), _temporal, 4000),
    "halluedit": _Layout(lambda r: _has("subject", "question")(r) and ("object" in r or "label" in r), _halluedit),
    "knowedit": _Layout(
        lambda r: "target_new" in r and ("portability" in r or "locality" in r or "locality_prompt" not in r), _knowedit
    ),
    "wikibio": _Layout(_has("text", "labels", "concept"), _wikibio, 4000),
    "counterfact-easyedit": _Layout(
        lambda r: "target_new" in r and ("ground_truth" in r or "rephrase_prompt" in r), _counterfact_easyedit
    ),
    "hallucination": _Layout(_has("target_new"), _hallucination, 4000),
    "plain": _Layout(lambda r: not r or any(key in _FIELDS for key in r), lambda r: [_plain(r)]),
}
"""By name, in the order in which they are tried."""

LAYOUTS = ("auto", *sorted(_LAYOUTS))
"""What may be given as ``layout``."""


# -- reading -------------------------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""The formats a file may have."""

_SHOWN = 3


@dataclass(frozen=True)
class _Records:
    """What a file holds: its records with their numbers (a :class:`_Bad` where one cannot be parsed)."""

    rows: list[tuple[int, Any]]
    table: bool = False


def read_facts(
    path: Path,
    *,
    layout: str = "auto",
    skip_bad: bool = False,
    max_answer: int | None = None,
    to_skip: str = "--skip-bad",
) -> Facts:
    """The edits of a file: JSON lines, a JSON list, CSV or TSV, in any of :data:`LAYOUTS`.

    ``layout="auto"`` goes by the keys of the first record. An answer of more than ``max_answer`` characters is bad (None:
    400, for texts that are continued 4,000). A place counts lines, or the records of a JSON list. Raises
    :class:`ConfigError` for an unknown layout, and :class:`DataError` for a file that cannot be read, holds nothing, or
    has bad records, unless ``skip_bad`` leaves them out; ``to_skip`` is how the user says so, for the message, and empty
    where that cannot be said.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout = '{layout}': unknown{nearest(layout, LAYOUTS)}; give one of {', '.join(LAYOUTS)}")
    records = _read(path)
    if not records.rows:
        raise DataError(f'{path}: holds no edits; write {{"prompt": "...", "answer": "..."}}, one a line')
    name = _layout_of(path, records) if layout == "auto" else layout
    limit = _limit(name, max_answer)
    edits: list[Edit] = []
    bad: list[BadLine] = []
    for number, record in records.rows:
        place = f"{path.name}:{number}"
        try:
            read = _edits(record, name, records.table, limit)
        except _Bad as reason:
            bad.append(BadLine(place, str(reason)))
        else:
            edits += [edit if edit.source else dataclasses.replace(edit, source=place) for edit in read]
    if bad and not (skip_bad and edits):
        raise DataError(_complaint(path, bad, len(records.rows), "" if skip_bad else to_skip))
    return Facts(tuple(edits), tuple(bad))


def _edits(record: object, name: str, table: bool, limit: int) -> list[Edit]:
    if isinstance(record, _Bad):
        raise record
    given = _object(record, "the record")
    if table:
        given = _from_cells(given) if name == "plain" else _with_lists(given)
    edits = _LAYOUTS[name].read(given)
    return [_within(edit, limit) for edit in edits]


def _limit(name: str, max_answer: int | None) -> int:
    """The most characters of an answer: what is asked for, or else what the layout ``name`` allows."""
    if max_answer is not None and max_answer < 1:
        raise ConfigError(f"max_answer = {max_answer}: must be at least 1; give the most characters of an answer")
    return _LAYOUTS[name].limit if max_answer is None else max_answer


def _within(edit: Edit, limit: int) -> Edit:
    if len(edit.answer) > limit:
        raise _Bad(f"answer has {len(edit.answer)} characters, more than max_answer = {limit}")
    return edit


def _complaint(path: Path, bad: Sequence[BadLine], total: int, to_skip: str) -> str:
    shown = "; ".join(f"{line.place}: {line.reason}" for line in bad[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    counted = f"{len(bad)} of {total} record{'s' if total != 1 else ''} {'is' if len(bad) == 1 else 'are'} bad"
    fix = f"correct them, or leave them out with {to_skip}" if to_skip and len(bad) < total else "correct them"
    return f"{path}: {counted}: {shown}{more}; nothing was applied; {fix}"


def _layout_of(path: Path, records: _Records) -> str:
    first = next((record for _, record in records.rows if isinstance(record, dict)), {})
    found = next((name for name, layout in _LAYOUTS.items() if layout.fits(first)), None)
    if found is None:
        keys = ", ".join(f"'{_short(key)}'" for key in list(first)[:8])
        raise DataError(
            f"{path}: unknown layout, its first record has {keys}; give prompt and answer, or the keys of "
            f"{', '.join(sorted(_LAYOUTS.keys() - {'plain'}))}"
        )
    return found


def _short(text: str) -> str:
    """``text`` for a message: 40 characters, all printable."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= 40 else f"{clean[:39]}…"


def _read(path: Path) -> _Records:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown format '{suffix}'; give {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert it") from error
    if suffix in (".csv", ".tsv"):
        return _Records(list(_table(path, text, "\t" if suffix == ".tsv" else ",")), table=True)
    return _Records(_json_records(path, text, lines=suffix == ".jsonl"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, no key of which is given twice: which of the two was meant nobody knows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Bad(f"has '{_short(next(key for key in keys if keys.count(key) > 1))}' twice; leave one of them out")
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _Bad(f"broken JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    except ValueError as error:
        raise _Bad("broken JSON (a number of too many digits)") from error
    except RecursionError as error:
        raise _Bad("broken JSON (nested too deeply)") from error


def _parsed_line(text: str) -> Any:
    try:
        return _parsed(text)
    except _Bad as bad:
        # One line: its number is in the place.
        return _Bad(str(bad).replace("at line 1, column", "at column"))


def _json_records(path: Path, text: str, lines: bool) -> list[tuple[int, Any]]:
    """The records of a JSON list, of one object, or of lines; what a file is called decides only where it may be both."""
    start = text.lstrip()[:1]
    # str.splitlines would also divide at separators that may stand inside a JSON text.
    numbered = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
    rows = [(i, line) for i, line in numbered if line.strip()]
    if rows and (not lines or start == "["):
        try:
            value = _parsed(text)
        except _Bad as bad:
            if not lines and not (start == "{" and isinstance(_parsed_line(rows[0][1]), dict)):
                raise DataError(f"{path}: {bad}; correct it, or call it .jsonl if each line is a record") from bad
        else:
            if isinstance(value, dict):
                return [(1, value)]
            if not isinstance(value, list):
                raise DataError(f"{path}: holds {_kind(value)}, not a list of edits; write [{{...}}, ...]")
            return list(enumerate(value, 1))
    return [(i, _parsed_line(line)) for i, line in rows]


def _table(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """The rows of a table by the names of its header, each with the number of its first line.

    Spreadsheets write commas behind the last column: an empty cell that no column has, or one without a name, is nothing.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    needed = before = 0
    while True:
        line = before + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Where a row of one line is broken, the next begins behind it. Of several nobody knows where they end.
            if not header or reader.line_num > line:
                raise DataError(f"{path}, line {line}: {_broken(error)}") from error
            before = reader.line_num
            yield line, _Bad(_broken(error))
            continue
        before = reader.line_num
        if not any(cell.strip() for cell in row):
            continue
        if not header:
            header = [cell.strip() for cell in row]
            needed = max(i for i, name in enumerate(header, 1) if name)
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}: column '{_short(twice)}' is there twice; rename one of them")
        elif len(row) < needed or any(cell.strip() for cell in row[len(header) :]):
            yield line, _Bad(f"has {len(row)} columns, the header {len(header)}")
        else:
            yield line, {name: cell for name, cell in zip(header, row, strict=False) if name or cell.strip()}


def _broken(error: csv.Error) -> str:
    """What is wrong with a row, and the fix: mostly a cell that begins with a quoted title."""
    said = str(error).replace("\t", "tab")
    if "larger" in said:
        return f"broken table ({said}); shorten it"
    return f'broken table ({said}); double the quotes of a cell and put it in quotes: """Hamlet"" was written by"'


# -- conflicts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conflict:
    """Two edits of one fact: ``edit`` came after ``other``; ``why`` says by what they are one, and names ``other``.

    A ``contradiction`` has another answer, a ``duplicate`` the same. Of a ``suspect`` (:func:`suspects`) it is not known
    whether the fact is one.
    """

    kind: Literal["contradiction", "duplicate", "suspect"]
    edit: Edit
    other: Edit
    why: str

    @property
    def told(self) -> str:
        """``why``, behind the name of ``edit``."""
        return f"{_named(self.edit)}: {self.why}"


class _Seen:
    """The edits seen under one key: the last of each answer, and the last two that differ."""

    def __init__(self) -> None:
        self.by_answer: dict[str, Edit] = {}
        self.last: str | None = None
        self.last_other: str | None = None

    def add(self, answer: str, edit: Edit) -> None:
        self.by_answer[answer] = edit
        if answer != self.last:
            self.last, self.last_other = answer, self.last

    def against(self, answer: str) -> Edit | None:
        """The last edit with another answer."""
        other = self.last if self.last != answer else self.last_other
        return None if other is None else self.by_answer[other]


_Key = tuple[str, ...]
_WORD = re.compile(r"[^\W_]+")


def conflicts(new: Sequence[Edit], earlier: Sequence[Edit] = ()) -> list[Conflict]:
    """Where an edit of ``new`` says something of a fact of which ``earlier``, or one of ``new`` before it, spoke already.

    A fact is the same if the prompts are (but for case, space and final punctuation), if one prompt is the other's
    paraphrase, if they share one, or if subject and relation are. Of several that are so by one of these, the last of each
    kind is named. Takes time in proportion to the edits; sorted as ``new``.
    """
    seen: dict[_Key, _Seen] = {}
    found: list[Conflict] = []
    for i, edit in enumerate((*earlier, *new)):
        prompt, answer = _same("prompt", edit.prompt), normalised(edit.answer)
        paraphrases = [_same("paraphrase", text) for text in edit.paraphrases]
        fact = [_same("fact", edit.subject, edit.relation)] if edit.subject and edit.relation else []
        if i >= len(earlier):
            ways = [
                (prompt, "the same prompt as"),
                (("paraphrase", *prompt[1:]), "its prompt is a paraphrase of"),
                *((("prompt", *key[1:]), "a paraphrase of it is the prompt of") for key in paraphrases),
                *((key, "shares a paraphrase with") for key in paraphrases),
                *((key, "the same subject and relation as") for key in fact),
            ]
            named: set[int] = set()
            for key, way in ways:
                for conflict in _found(edit, answer, seen.get(key), way):
                    if id(conflict.other) not in named:
                        named.add(id(conflict.other))
                        found.append(conflict)
        for key in (prompt, *paraphrases, *fact):
            seen.setdefault(key, _Seen()).add(answer, edit)
    return found


def _found(edit: Edit, answer: str, seen: _Seen | None, way: str) -> Iterator[Conflict]:
    if seen is None:
        return
    against, twin = seen.against(answer), seen.by_answer.get(answer)
    if against is not None:
        answers = f"'{_short(edit.answer)}', not '{_short(against.answer)}'"
        yield Conflict("contradiction", edit, against, f"{way} {_named(against)}, with another answer: {answers}")
    if twin is not None:
        yield Conflict("duplicate", edit, twin, f"{way} {_named(twin)}, with the same answer '{_short(twin.answer)}'")


# Words that questions share whatever they ask for.
_EMPTY = frozenset(
    _WORD.findall(
        "a an and are as at be been being by called can could did do does for from had has have he her his how in into is "
        "it its me name named of on or please she tell that the their there these they this those to was were what when "
        "where which who whom whose why will with would you"
    )
)
_STEM = 5
"""Letters by which words are compared: *manufactured* and *manufacturer* are one."""


def suspects(new: Sequence[Edit], earlier: Sequence[Edit] = ()) -> list[Conflict]:
    """Where an edit of ``new`` may contradict one of ``earlier``, or one of ``new`` before it, in other words.

    Of one subject (but for case), with another answer, and their questions, paraphrases among them, share a word besides
    the subject's own and those that say nothing; what :func:`conflicts` finds is left out, and so are pairs whose relations
    are both given. No model is asked: "Who is her mother?" and "Which lady bore her?" share no word and are missed, "the
    largest city" and "the capital city" share one and are named. Of the pairs of one subject with two answers that
    :func:`conflicts` leaves it names 27 of 34 in the first hundred edits of ZsRE, 186 of 214 in five hundred (all ask the
    same); of pairs that ask for different relations, 33 of LRE's 1,386 and 153 of PARAREL's 1,709.
    Takes time in proportion to the pairs of edits that share a subject; sorted as ``new``, then as the other.
    """
    by_subject: dict[str, list[tuple[Edit, str, dict[str, str], set[_Key]]]] = {}
    found: list[Conflict] = []
    for i, edit in enumerate((*earlier, *new)):
        if not edit.subject:
            continue
        answer, words = normalised(edit.answer), _content(edit)
        texts = {_same("", text) for text in (edit.prompt, *edit.paraphrases)}
        known = by_subject.setdefault(normalised(edit.subject), [])
        if i >= len(earlier):
            for other, its_answer, its_words, its_texts in known:
                certain = not texts.isdisjoint(its_texts)
                shared = next((word for stem, word in words.items() if stem in its_words), None)
                if answer != its_answer and shared and not certain and not (edit.relation and other.relation):
                    why = (
                        f"the same subject as {_named(other)} and perhaps the same question ('{shared}'), with "
                        f"another answer: '{_short(edit.answer)}', not '{_short(other.answer)}'"
                    )
                    found.append(Conflict("suspect", edit, other, why))
        known.append((edit, answer, words, texts))
    return found


def _content(edit: Edit) -> dict[str, str]:
    """The words of an edit's questions that say what is asked, by their first letters."""
    subject = normalised(edit.subject or "")
    texts = (normalised(text).replace(subject, " ") for text in (edit.prompt, *edit.paraphrases))
    own = {*_WORD.findall(subject), *_EMPTY}
    words = (word for text in texts for word in _WORD.findall(text))
    return {word[:_STEM]: word for word in words if len(word) > 1 and word not in own}


def _named(edit: Edit) -> str:
    return edit.source or f"'{_short(edit.prompt)}'"


def _same(what: str, *texts: str) -> _Key:
    return (what, *(normalised(text) for text in texts))


def normalised(text: str) -> str:
    """``text`` without what two writings of one thing may differ in: case, space, final punctuation."""
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return words.rstrip(" .,:;?!…") or words
