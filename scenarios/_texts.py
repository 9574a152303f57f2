"""Texts with answers: finding a task on disk or on the hub, reading any usual layout, wording a prompt.

Whatever is wrong with a task becomes one :class:`~cl_lab.errors.DataError` that names the file and the row.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cl_lab.errors import ConfigError, DataError, nearest

from ._sources import roots
from .image_folder import place_of

ORDERS: dict[str, tuple[str, ...]] = {
    name: tuple(tasks.split())
    for name, tasks in {
        "order-1": "dbpedia amazon yahoo agnews",
        "order-2": "dbpedia amazon agnews yahoo",
        "order-3": "yahoo amazon agnews dbpedia",
        "order-4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        "order-5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        "order-6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    }.items()
}
"""The orders of tasks that papers share (Wang et al. 2023, O-LoRA; 4 to 6 are Razdaibiedina et al. 2023's)."""

NO_LABEL = "-"
"""What MNLI has where its annotators did not agree; such rows have no right answer."""


class Row(NamedTuple):
    """One text and its answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Texts:
    """A task as it was read. ``labels`` are all its answers, in order, where it has a fixed set of them.

    ``asked`` says that a text is a whole prompt already; ``dropped`` counts the rows that had no answer.
    """

    train: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    asked: bool
    dropped: int = 0


@dataclass(frozen=True)
class Task:
    """Where a task is: ``digest`` names what lies there, ``read`` reads it. ``kind`` chooses the instruction.

    Two tasks with the same ``identity`` are the same. A kind that was guessed from a name holds for ``labels`` alone, in
    lower case: whoever calls a file of shoes amazon.csv does not ask for opinions.
    """

    name: str
    kind: str
    identity: str
    digest: Callable[[], str]
    read: Callable[[], Texts]
    labels: frozenset[str] | None = None

    def kind_with(self, labels: Iterable[str] | None) -> str:
        """Its kind, given all its answers; ``None`` where they are free."""
        if self.labels is None or (labels is not None and self.labels.issuperset(label.lower() for label in labels)):
            return self.kind
        return "default"


# -- wording -------------------------------------------------------------------------------------------------------

REPLY = "Reply with one of the options."
INSTRUCTIONS = {
    "TC": "Which subject does this text belong to? " + REPLY,
    "SC": "How does the author feel? " + REPLY,
    "NLI": "How is the second sentence related to the first? " + REPLY,
    "QQP": "Do the two questions ask the same thing? " + REPLY,
    "BoolQA": "Read the passage and decide on the question. " + REPLY,
    "MultiRC": "Read the paragraph and judge the proposed answer to the question. " + REPLY,
    "WiC": "Does the word mean the same in both sentences? " + REPLY,
    "COPA": "Which of the two is the more plausible? " + REPLY,
    "toy-colours": "Name its colour.",
    "toy-sizes": "Name its size.",
    "default": "Read the text. " + REPLY,
}
"""The instruction for each kind of task: a folder of CL_Benchmark, or the name of a task."""

_FOLDERS = ("TC", "SC", "NLI")
"""The folders of CL_Benchmark that hold several tasks of a kind."""

_STARS = "very negative/negative/neutral/positive/very positive"
_KNOWN: dict[str, tuple[str, frozenset[str]]] = {
    name: (kind, frozenset(labels.split("/")))
    for name, kind, labels in (
        ("agnews", "TC", "world/sports/business/science or technology"),
        (
            "dbpedia",
            "TC",
            "company/educational institution/artist/athlete/office holder/mean of transportation/building/natural place/"
            "village/animal/plant/album/film/written work",
        ),
        (
            "yahoo",
            "TC",
            "society & culture/science & mathematics/health/education & reference/computers & internet/sports/"
            "business & finance/entertainment & music/family & relationships/politics & government",
        ),
        ("amazon", "SC", _STARS),
        ("yelp", "SC", _STARS),
        ("imdb", "SC", "good/bad/neg/pos"),  # CL_Benchmark's, and the hub's
        ("sst-2", "SC", "good/bad"),
        ("mnli", "NLI", "entailment/neutral/contradiction"),
        ("cb", "NLI", "entailment/neutral/contradiction"),
        ("rte", "NLI", "entailment/contradiction"),
        ("qqp", "QQP", "true/false"),
        ("boolqa", "BoolQA", "true/false"),
        ("multirc", "MultiRC", "true/false"),
        ("wic", "WiC", "true/false"),
        ("copa", "COPA", "a/b"),
    )
}
"""Tasks that are known by name: their kind, and their labels in lower case."""

PLACEHOLDERS = ("instruction", "options", "text", "prompt")


@dataclass(frozen=True)
class Template:
    """How a prompt is worded: a text in which ``{instruction}``, ``{options}`` and ``{text}`` (once) are filled in."""

    name: str
    text: str
    instructions: Mapping[str, str] = field(default_factory=lambda: INSTRUCTIONS)

    def instruction(self, task: Task, labels: Sequence[str] | None) -> str:
        """That for the task's name, if the user gives one, else for its kind, else the one for all others."""
        known = {k.lower(): v for k, v in self.instructions.items()}
        named = () if self.instructions is INSTRUCTIONS else (task.name.lower(),)
        return next((known[k] for k in (*named, task.kind_with(labels).lower(), "default") if k in known), "")

    def wordings(self, task: Task) -> tuple[str, ...]:
        """Its text, and the instructions that may come into it, whatever the task's labels are."""
        possible = (self.instruction(task, labels) for labels in (tuple(task.labels or ()), None))
        return (self.text, *dict.fromkeys(possible))

    def around(self, task: Task, labels: Sequence[str] | None) -> tuple[str, str]:
        """What stands before the text, and what behind it. Raises :class:`ConfigError` for options that are not there."""
        if labels is None and "{options}" in self.text:
            raise ConfigError(
                f"template = '{self.name}': lists options, but task '{task.name}' has free answers; use template=plain, or "
                "leave it out"
            )
        filled = {"{instruction}": self.instruction(task, labels), "{options}": ", ".join(labels or ())}
        before, _, after = _PLACEHOLDER.sub(lambda m: filled.get(m[0], "\0"), self.text).partition("\0")
        return before, after


_PLACEHOLDER = re.compile(r"\{(\w+)\}")

TEMPLATES = {
    t.name: t
    for t in (
        Template("options", "{instruction}\nOption: {options}\n{text}\nAnswer:"),
        Template("answer", "{text}\nAnswer:"),
        Template("plain", "{prompt}"),
    )
}
"""The built-in templates by name."""


def load_template(name: str) -> Template:
    """A built-in template, or one from a YAML file: ``prompt``, and if wanted ``instructions`` by task or kind.

    Raises :class:`ConfigError` on one line.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"template = '{name}': no built-in template and no file{nearest(name, TEMPLATES)}; give one of "
            f"{', '.join(TEMPLATES)}, or the path of a YAML file"
        )
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"template = '{name}': cannot be read as YAML ({error}); correct it") from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ConfigError(
            f"template = '{name}': has no key 'prompt' with a text; write prompt: \"{{text}}\\nAnswer:\", say"
        )
    for key in given:
        if key not in ("prompt", "instructions"):
            raise ConfigError(
                f"template = '{name}': unknown key '{key}'{nearest(str(key), ('prompt', 'instructions'))}"
            )
    wording, instructions = given["prompt"], given.get("instructions", INSTRUCTIONS)
    if not isinstance(instructions, dict) or not all(isinstance(v, str) for pair in instructions.items() for v in pair):
        raise ConfigError(f"template = '{name}': instructions must be texts by name of a task or kind; correct them")
    used = _PLACEHOLDER.findall(wording)
    for placeholder in used:
        if placeholder not in PLACEHOLDERS:
            raise ConfigError(
                f"template = '{name}': unknown placeholder {{{placeholder}}}{nearest(placeholder, PLACEHOLDERS)}"
            )
    if sum(p in ("text", "prompt") for p in used) != 1:
        raise ConfigError(f"template = '{name}': must hold {{text}} once, for the text of a row; correct its prompt")
    return Template(name, wording, instructions)


# -- finding -------------------------------------------------------------------------------------------------------

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""The formats a task may be stored in."""

_SHELVES = ("lm/CL_Benchmark", "CL_Benchmark", "lm/TRACE", "TRACE")
_DEPTH = 3  # CL_Benchmark/BoolQA/BoolQA/train.json, with one folder to spare


def find_tasks(names: Sequence[str], data_dir: str | None, test_share: float) -> list[Task]:
    """The tasks called ``names``, in order.

    Raises :class:`DataError` for one that is not there and :class:`ConfigError` for one that is named twice.
    """
    tasks: list[Task] = []
    for name in names:
        task = find_task(name, data_dir, test_share)
        same = next((i for i, t in enumerate(tasks) if t.identity == task.identity), None)
        if same is not None:
            raise ConfigError(
                f"tasks: '{names[same]}' and '{name}' are the same task ({task.identity}); leave one of them out"
            )
        tasks.append(task)
    short = [t.name for t in tasks]
    # Two folders of one name are told apart by what the user wrote.
    return [replace(t, name=name) if short.count(t.name) > 1 else t for t, name in zip(tasks, names, strict=True)]


def find_task(name: str, data_dir: str | None, test_share: float) -> Task:
    """The task called ``name``: a toy, ``hub:<id>``, a path, or a folder in one of the data folders.

    ``test_share`` is what is held out of a file that has no test rows of its own.
    """
    if name in TOYS:
        return Task(name, name, name, lambda: digest_of([f"{name} 1"]), functools.partial(_toy, name))
    if name.startswith("hub:"):
        return _hub_task(name, test_share)
    path = Path(name).expanduser()
    if "/" in name or path.suffix in SUFFIXES or name.startswith("~"):
        if path.is_file():
            return _file_task(path, test_share)
        if path.is_dir():
            return _folder_task(path)
    wanted = [part for part in name.lower().split("/") if part]
    known: set[str] = set()
    for shelf in _shelves(data_dir):
        found = [f for f in shelf if [p.lower() for p in f.parts[-len(wanted) :]] == wanted] if wanted else []
        if len(found) > 1:
            some = " and ".join(str(f) for f in found)
            raise DataError(f"text-stream: task '{name}' is there {len(found)} times ({some}); name its folder, too")
        if found:
            return _folder_task(found[0])
        known |= {f.name for f in shelf}
    if path.is_dir():  # a bare name is looked for among the data alone, or one in the working directory would hide it
        raise DataError(
            f"text-stream: task '{name}' is none of the data; for the folder of that name that is here write ./{name}"
        )
    searched = ", ".join(str(r) for r in roots(data_dir))
    raise DataError(
        f"text-stream: task '{name}' not found below {searched} (nor there in {', '.join(_SHELVES)})"
        f"{nearest(name, {*known, *TOYS})}; name the folder of the data with CL_LAB_DATA=... or data_dir, or give a path "
        f"({', '.join(SUFFIXES)}, or a folder with train and test)"
    )


def _shelves(data_dir: str | None) -> Iterator[list[Path]]:
    """The folders of tasks in one place after another."""
    for root in roots(data_dir):
        itself = root.name.lower() in {Path(s).name.lower() for s in _SHELVES}
        for place, depth in (
            *((root / s, _DEPTH) for s in _SHELVES),
            (root / "lm", 1),
            (root, _DEPTH if itself else 1),
        ):
            if place.is_dir():
                yield list(_task_folders(place, depth))


def _task_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"text-stream: {folder} cannot be read ({error}); check its permissions") from error
    for f in inside:
        if _part(f, "train") is not None:
            yield f
        elif depth > 1:
            yield from _task_folders(f, depth - 1)


def _part(folder: Path, part: str) -> Path | None:
    return next((folder / f"{part}{s}" for s in SUFFIXES if (folder / f"{part}{s}").is_file()), None)


def _kind(name: str, parent: str = "") -> tuple[str, frozenset[str] | None]:
    """The kind of a task in a folder, and the labels that it holds for; ``None`` for any."""
    if parent.upper() in _FOLDERS:
        return parent.upper(), None
    return _KNOWN.get(parent.lower()) or _KNOWN.get(name.lower()) or ("default", None)


def _folder_task(folder: Path) -> Task:
    train, test, labels = _part(folder, "train"), _part(folder, "test"), folder / "labels.json"
    if train is None:
        raise DataError(
            f"text-stream: {folder} has no train.json (or {', '.join(SUFFIXES[1:])}); give a folder that has"
        )
    if test is None:
        raise DataError(
            f"text-stream: {folder} has no test.json beside {train.name}; add one, or give {train} itself, of which "
            "test_share is then held out"
        )
    files = [train, test, *([labels] if labels.is_file() else [])]
    folder = folder.resolve()
    kind, known = _kind(folder.name, folder.parent.name)
    return Task(
        folder.name,
        kind,
        str(folder),
        lambda: digest_of(_bytes(f) for f in files),
        lambda: _read_folder(train, test, labels if labels.is_file() else None),
        known,
    )


def _file_task(path: Path, test_share: float) -> Task:
    if path.suffix not in SUFFIXES:
        raise DataError(f"text-stream: {path}: unknown format '{path.suffix}'; give {', '.join(SUFFIXES)}")
    kind, known = _kind(path.stem)
    return Task(
        path.stem,
        kind,
        str(path.resolve()),
        lambda: digest_of([_bytes(path), repr(test_share), _DIVISION]),
        lambda: _texts({"train": _Table(str(path), read_table(path))}, test_share=test_share),
        known,
    )


_DIVISION = "whole texts"
"""Names what :func:`held_out` does: what is kept of files that were divided in another way must not be found."""


def digest_of(parts: Iterable[str | bytes]) -> str:
    """SHA-256 over ``parts`` and where each ends."""
    sha = hashlib.sha256()
    for part in parts:
        whole = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(f"{len(whole)} ".encode())
        sha.update(whole)
    return sha.hexdigest()


# -- reading -------------------------------------------------------------------------------------------------------

_PAIRS = (("prompt", "answer"), ("sentence", "label"), ("text", "label"))
_NEEDED = "prompt and answer, or label and sentence (or text)"


@dataclass(frozen=True)
class _Table:
    """Rows, each with the place it stands at (``row 3``), of the source called ``name`` in messages."""

    name: str
    rows: list[tuple[str, Any]]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"text-stream: {path} cannot be read ({error}); check its permissions") from error


def _decoded(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"text-stream: {path} is not UTF-8 ({error}); convert it") from error


def read_table(path: Path) -> list[tuple[str, Any]]:
    """All rows of a file, each with its place; what a row holds is not checked."""
    if path.suffix == ".parquet":
        return _parquet(path)
    text = _decoded(path)
    if path.suffix == ".csv":
        return _csv(path, text)
    if path.suffix == ".jsonl":
        return _json_lines(path, text)
    value = _json(path, text)
    if not isinstance(value, list):
        raise DataError(
            f"text-stream: {path}: holds a {type(value).__name__}, not a list of rows; write [{{...}}, ...]"
        )
    return [(f"row {i}", row) for i, row in enumerate(value, 1)]


def _json(path: Path, text: str, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"text-stream: {path}, line {line + error.lineno}: broken JSON ({error.msg} at column {error.colno}); correct it"
            f"{', or call it .jsonl' if error.msg == 'Extra data' and not line else ''}"
        ) from error
    except (RecursionError, ValueError) as error:
        what = "brackets are nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise DataError(
            f"text-stream: {path}{f', line {line + 1}' if line else ''}: {what} to be read; write rows such as "
            '{"text": "...", "label": "..."}'
        ) from None


def _json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    # str.splitlines would also divide at separators that may stand inside a JSON text.
    lines = enumerate(text.split("\n"))
    return [(f"line {i + 1}", _json(path, line, i)) for i, line in lines if line.strip()]


def _csv(path: Path, text: str) -> list[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    # The module's limit for a field is 131,072 characters, for all that read tables in this process: it is put back.
    usual = csv.field_size_limit(max(len(text), 1))
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        header = [name for name in reader.fieldnames if name]
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise DataError(f"text-stream: {path}: column '{twice}' is there twice; rename one of them")
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError(f"text-stream: {path}, line {reader.line_num}: broken CSV ({error}); correct it") from error
    finally:
        csv.field_size_limit(usual)
    known = len(reader.fieldnames)
    for place, row in rows:
        if short := sum(value is None for value in row.values()):  # what DictReader puts where a line ends early
            raise DataError(
                f"text-stream: {path}, {place}: has {known - short} columns, the header {known}; give the line all of them"
            )
        if None in row:  # where DictReader keeps what the header has no name for
            raise DataError(
                f"text-stream: {path}, {place}: has {known + len(row[None])} columns, the header {known}; put a text that "
                "holds a comma in quotes"
            )
    return rows


def _parquet(path: Path) -> list[tuple[str, Any]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(f"tasks: '{path}' needs the package pyarrow; pip install pyarrow, or use .jsonl") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, LookupError) as error:  # Arrow's errors are of these
        raise DataError(f"text-stream: {path}: cannot be read as parquet ({error}); replace it") from error
    return [(f"row {i}", row) for i, row in enumerate(rows, 1)]


def _read_folder(train: Path, test: Path, labels: Path | None) -> Texts:
    tables = {part: _Table(str(path), read_table(path)) for part, path in (("train", train), ("test", test))}
    return _texts(tables, None if labels is None else _read_labels(labels), str(labels or train))


def _read_labels(path: Path) -> tuple[str, ...]:
    value = _json(path, _decoded(path))
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise DataError(f'text-stream: {path}: must hold a list of labels, ["World", "Sports"] say; correct it')
    return tuple(dict.fromkeys(_clean(v) for v in value))


def _texts(
    tables: Mapping[str, _Table],
    labels: tuple[str, ...] | None = None,
    told: str = "",
    test_share: float = 0,
) -> Texts:
    """The checked rows of ``tables`` (``train``, maybe ``test``); ``told`` is the file that lists ``labels``."""
    pair = _columns(tables["train"])
    asked = pair == _PAIRS[0]
    parts: dict[str, list[Row]] = {}
    dropped = 0
    for part, table in tables.items():
        read = [(place, _row(table, place, row, pair)) for place, row in table.rows]
        if not asked and NO_LABEL not in (labels or ()):
            having = [(place, row) for place, row in read if row.answer != NO_LABEL]
            dropped += len(read) - len(having)
            read = having
        if not read:
            raise _empty(table)
        if labels is None and not asked:
            labels = tuple(sorted({row.answer for _, row in read}))
        for place, row in read:
            if labels is not None and row.answer not in labels:
                raise DataError(
                    f"text-stream: {table.name}, {place}: '{row.answer}' is no label of {told or table.name}"
                    f"{nearest(row.answer, labels)}; correct it, or list it in labels.json"
                )
        parts[part] = [row for _, row in read]
    if "test" not in parts:
        places = np.array([place_of(row.text) for row in parts["train"]])
        groups = np.array([0 if labels is None else labels.index(row.answer) for row in parts["train"]])
        held = held_out(places, groups, test_share)
        if held.all() or not held.any():
            raise DataError(
                f"text-stream: {tables['train'].name}: too few {how_many(places, 'rows')} to hold some out for testing; add "
                "more"
            )
        both = parts["train"]
        parts = {p: [row for row, h in zip(both, held, strict=True) if h == (p == "test")] for p in ("train", "test")}
    return Texts(parts["train"], parts["test"], labels, asked, dropped)


def _columns(table: _Table) -> tuple[str, str]:
    if not table.rows:
        raise _empty(table)
    place, row = table.rows[0]
    if isinstance(row, dict):
        for pair in _PAIRS:
            if all(column in row for column in pair):
                return pair
    raise _lacking(table, place, row, _NEEDED)


def _empty(table: _Table) -> DataError:
    return DataError(f"text-stream: {table.name}: holds no rows with an answer; fill it, or leave the task out")


def _lacking(table: _Table, place: str, row: Any, needed: str) -> DataError:
    has = f"columns {', '.join(repr(c) for c in row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    return DataError(f"text-stream: {table.name}, {place}: has {has}; needs {needed}; name the columns so")


def _row(table: _Table, place: str, row: Any, pair: tuple[str, str]) -> Row:
    if not isinstance(row, dict) or any(column not in row for column in pair):
        raise _lacking(table, place, row, " and ".join(pair))
    for column in pair:
        value = row[column]
        # A number that is none (pandas writes NaN where nothing was) would become the class 'nan'.
        none = isinstance(value, float) and not math.isfinite(value)
        if none or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise DataError(
                f"text-stream: {table.name}, {place}: {column} = {value!r}; every row needs a text there: fill it in, "
                "or remove the row"
            )
    return Row(*(_clean(str(row[column])) for column in pair))


def _clean(text: str) -> str:
    # JSON can hold half of a surrogate pair, which no tokenizer takes.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def held_out(places: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Which rows are held out, bool ``[N]``: those whose place in [0, 1) is below ``share``. One place is one text.

    Rows of one text stay together. Of a group with repeats, as many rows are held out as it has texts below ``share``, and
    that share of the repeats: whole texts by their places, without those that would be too many, and one more where that
    comes nearer. Of each group of two texts or more, at least one is held out, and one is not: of the lightest the one
    nearest to the share. A text of several groups goes with the first.
    """
    texts, of = np.unique(places, return_inverse=True)
    side = np.zeros(len(texts), np.int8)  # 1 is held out, −1 is not, 0 is still open
    for group in np.unique(groups):
        own, rows = np.unique(of[groups == group], return_counts=True)
        open_, held = side[own] == 0, side[own] == 1
        wanted = np.count_nonzero(texts[own] < share) + share * (rows.sum() - len(own))
        room = wanted - rows[held].sum()
        while len(fitting := np.flatnonzero(open_ & ~held & (rows <= room))):
            taken = fitting[: np.searchsorted(rows[fitting].cumsum(), room, "right")]
            held[taken] = True
            room -= rows[taken].sum()
        if len(left := np.flatnonzero(open_ & ~held)):
            lightest = left[rows[left].argmin()]
            held[lightest] = rows[lightest] - room < room
        if len(own) > 1 and open_.any() and held.all() == held.any():
            lightest = np.flatnonzero(open_ & (rows == rows[open_].min()))[-1 if held.all() else 0]
            held[lightest] = not held[lightest]
        side[own] = np.where(held, 1, -1)
    of_rows: npt.NDArray[np.bool_] = side[of] == 1
    return of_rows


def how_many(places: npt.NDArray[np.float64], rows: str) -> str:
    """How many rows there are, and how many texts where some come again: ``rows (3)``."""
    texts = len(np.unique(places))
    return f"{rows} ({len(places)})" if texts == len(places) else f"different texts ({texts} in {len(places)} {rows})"


# -- the hub -------------------------------------------------------------------------------------------------------


def _hub_task(name: str, test_share: float) -> Task:
    """``hub:<id>`` or ``hub:<id>:<configuration>``, through the package datasets."""
    identifier, _, configuration = name.removeprefix("hub:").partition(":")
    load = functools.cache(functools.partial(_load_hub, name, identifier, configuration or None))

    def digest() -> str:
        rows = (json.dumps(row, default=str).encode() for t in load().values() for _, row in t.rows)
        return digest_of([digest_of(rows), ",".join(load()), repr(test_share), _DIVISION])

    short = identifier.rpartition("/")[2]
    kind, known = _kind(short)
    return Task(short, kind, name, digest, lambda: _texts(load(), test_share=test_share), known)


def _load_hub(name: str, identifier: str, configuration: str | None) -> dict[str, _Table]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"tasks: '{name}' needs the package datasets; pip install datasets, or save the set as .jsonl and give its path"
        ) from error
    try:
        # Versions that can run a script that comes with a set do so unless they are told not to.
        can = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
        loaded = datasets.load_dataset(identifier, configuration, **({"trust_remote_code": False} if can else {}))
        names = {"train": "train", "test": next((p for p in ("test", "validation") if p in loaded), "")}
        if "train" not in loaded:
            raise DataError(f"text-stream: '{name}' has no split train, only {', '.join(loaded)}; save it as .jsonl")
        return {part: _hub_table(name, split, loaded[split]) for part, split in names.items() if split}
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"text-stream: '{name}' cannot be loaded ({reason}); check its name and the network, or give a file"
        ) from error


def _hub_table(name: str, split: str, rows: Any) -> _Table:
    names = getattr(rows.features.get("label"), "names", None)
    read = [dict(row) for row in rows]
    if names is not None:  # classes are stored by number; −1 stands where a test set keeps them secret
        read = [{**row, "label": NO_LABEL if row["label"] in (None, -1) else names[row["label"]]} for row in read]
    return _Table(f"{name} ({split})", [(f"row {i}", row) for i, row in enumerate(read, 1)])


# -- toys ----------------------------------------------------------------------------------------------------------

TOYS: dict[str, dict[str, str]] = {
    "toy-colours": {
        "red": "tomato strawberry ruby ladybird cherry brick",
        "green": "cucumber frog lime meadow emerald cactus",
        "yellow": "lemon banana canary daffodil sunflower corn",
        "white": "swan snowflake milk salt daisy igloo",
    },
    "toy-sizes": {
        "huge": "elephant mountain whale cathedral glacier stadium",
        "medium": "chair sheep barrel bicycle suitcase goat",
        "tiny": "ant pea needle crumb flea seed",
    },
}
"""Made-up tasks for trying things out: things by their label."""

_WHERE = (
    "near the road",
    "in a book",
    "on the old map",
    "behind my house",
    "at noon",
    "in this film",
    "after the rain",
    "by the river",
    "for the children",
    "in our village",
    "last summer",
    "on television",
)


def _toy(name: str) -> Texts:
    """Every thing at every place; a quarter is the test set, by hash."""
    rows = [
        Row(f"the {thing} {where}", label)
        for label, things in TOYS[name].items()
        for thing in things.split()
        for where in _WHERE
    ]
    test = [place_of(row.text) < 0.25 for row in rows]
    train_rows, test_rows = ([r for r, t in zip(rows, test, strict=True) if t is part] for part in (False, True))
    return Texts(train_rows, test_rows, tuple(TOYS[name]), asked=False)
