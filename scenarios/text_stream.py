"""Texts with answers as a stream: one task after another, tokenised once, for models that answer in words."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_lab.errors import ConfigError, DataError, nearest
from cl_lab.files import cache_root
from cl_lab.hub import tokens_behind
from cl_lab.knobs import knob
from cl_lab.protocols import Scenario
from cl_lab.records import PAD, Experience, Measure, Scoring, Stream, TensorData
from cl_lab.seeding import generator, permutation

from . import _cache
from ._orders import limit_rows
from ._styles import STYLES, Restyled, answers_of, restyle
from ._texts import ORDERS, TEMPLATES, Row, Task, Template, Texts, find_tasks, held_out, how_many, load_template
from ._tokens import ragged, space_between
from .image_folder import place_of

if TYPE_CHECKING:
    from cl_lab.hub import Tokenizer

log = logging.getLogger("cl_lab")

Arrays = Mapping[str, npt.NDArray[Any]]

_PARTS = ("train", "test")


@dataclass
class TextStream(Scenario):
    """Tasks in words, one after another: a prompt, and an answer to write (text-stream:order-1).

    A task is the name of a folder below ``lm/CL_Benchmark``, ``CL_Benchmark``, ``lm/TRACE`` or ``TRACE`` in the data
    folders (``agnews`` finds ``TC/agnews``), the path of such a folder, of a file (.jsonl, .json, .csv, .parquet), or
    ``hub:<id>``. Its rows are ``{sentence, label}`` (``text`` for ``sentence``), with the labels that may be answered in
    ``labels.json``, or ``{prompt, answer}`` with free answers (with a fixed set where there is a ``labels.json``). A file
    is divided by ``test_share``: a row is held out when the SHA-256 of its text, as a number in [0, 1), is below it. Rows
    with the same text stay together, on the side that brings the share of the rows nearer to what is asked. Rows labelled
    ``-`` (MNLI) have no right answer and are left out. ``toy-colours`` and ``toy-sizes`` are made up, for trying things
    out.

    The prompt is worded by a template: ``options`` (an instruction for the kind of task, the options, the text, "Answer:"),
    ``answer`` (the text, "Answer:"), ``plain`` (the text as it is), or a YAML file with ``prompt: "…{instruction}…{options}
    …{text}…"`` and ``instructions`` by task, kind or ``default``. Where a prompt is longer than ``max_prompt`` tokens, the
    middle of its text is left out (reviews conclude at their end, pairs have their second half there), so that all that
    surrounds the text is kept. The answer is tokenised as it stands behind the prompt, after a space where the prompt ends
    without one: `` World`` is one token. A tokenizer that keeps the space apart (bytes) has it in the prompt. Labels must
    fit ``max_answer``; longer free answers are cut.

    Free answers can be worded in many ways. With ``measure`` what the model writes, up to ``max_answer`` tokens, is compared
    as words with the whole right text, also where that was cut to be learnt: ``rouge-l`` (Lin 2004) or ``f1`` (SQuAD's). Of
    answers with reasons behind them (ScienceQA: a letter, then why), ``first-line`` asks for the first line alone. All are
    described in :mod:`cl_lab.overlap`. A task's score is then the mean over its rows, in [0, 1]; no share of valid
    answers is given for a stream that has such a task, there being no set of them.

    ``style_mix`` is SEFE's answer-style diversification (``style-mix``), against forgetting of the form alone: that share
    of each task's training rows is asked for in another way, a quarter of it in each: whether the answer is a given label,
    right or wrong (*yes*, *no*), which letter has it, the label alone, and a sentence (*The answer is World.*). SEFE's fifth
    style, a detailed explanation, needs a model to write it and is not there. Only rows with a label and a text are
    rewritten, drawn with the run's seed, and never test rows; their answers stand in the table, but are no classes of the
    task.

    A sample is int32 ``[P + A]``: the prompt, ending at column P, then the answer with the end-of-text token, the rest
    PAD. Which rows ``train_samples`` takes depends on the run's seed and the task's name, not on its place in the order;
    the test rows are the same for every seed. All is tokenised once; the cache keeps it until a file, the tokenizer or one
    of these settings changes.
    """

    argument: ClassVar[str | None] = "tasks"

    tasks: list[str] | str = knob(doc="tasks in order, by name or path, or a standard order: order-1 … order-6")
    tokenizer: str = knob(
        doc="bytes, or a model's name, folder or hub id: the model that is trained (${model.weights})"
    )
    chat: bool = knob(False, "put prompts through the tokenizer's chat template")
    template: str | None = knob(
        None, "options, answer, plain or a YAML file; null: options for labelled texts, plain for whole prompts"
    )
    scoring: Scoring = knob(
        "generation",
        "generation: the model writes its answer; constrained: the likeliest of the task's labels; first-token: the label "
        "with the likeliest first token; opening: right where the likeliest token of all begins the right answer",
    )
    measure: Measure | dict[str, Measure] = knob(
        "exact",
        "what a freely written answer is worth: exact (1 or 0), rouge-l or f1 (overlap with the whole right text), "
        "first-line (1 where its first line is right); for tasks without labels, or by task: {MeetingBank: rouge-l}",
    )
    train_samples: int | None = knob(
        None,
        "training rows per task, by the run's seed: equally many of each label, free answers as they are; null: all",
        ge=1,
    )
    test_samples: int | None = knob(
        None,
        "test rows per task, the same for every seed: equally many of each label, free answers as they are; null: all",
        ge=1,
    )
    max_prompt: int = knob(128, "tokens of a prompt; of longer ones the middle of the text is left out", ge=1)
    max_answer: int = knob(32, "tokens of an answer, its end included; free answers that are longer are cut", ge=2)
    test_share: float = knob(0.2, "share of the rows held out where a task is one file", gt=0, lt=1)
    holdout: float | None = knob(
        None,
        "share of the training rows that stand in for the test rows, which are then not used: the stream to choose settings "
        "on; chosen by hash, the same for every seed",
        gt=0,
        lt=1,
    )
    style_mix: float = knob(
        0.0,
        "share of each task's training rows rewritten into other styles of answer: yes or no, a letter, the label alone, a "
        "sentence (SEFE takes 0.1 to 0.2); tasks without labels stay as they are",
        ge=0,
        le=1,
    )
    shuffle_tasks: bool = knob(False, "draw the order of the tasks with order_seed; otherwise as listed")
    order_seed: int | None = knob(None, "seed of the order of tasks; null: the run's seed", ge=0)
    online: bool = knob(False, "one pass: each sample is seen once")
    boundaries: bool | None = knob(None, "tell strategies where an experience ends; null: unless online")
    data_dir: str | None = knob(
        None, "folder searched first; then $CL_LAB_DATA, ~/.cache/cl-lab/data ($CL_LAB_CACHE), /usr/share/datasets"
    )

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """The two toys, a few dozen short texts each."""
        return {
            "tasks": ["toy-colours", "toy-sizes"],
            "tokenizer": "bytes",
            "template": "answer",
            "train_samples": 48,
            "test_samples": 24,
        }

    def __post_init__(self) -> None:
        self._names()
        if self.template is not None:
            load_template(self.template)

    def _names(self) -> tuple[str, ...]:
        """The tasks as the user names them, in order. Raises :class:`ConfigError` for an order there is not."""
        if isinstance(self.tasks, str):
            if self.tasks not in ORDERS:
                raise ConfigError(
                    f"tasks = '{self.tasks}': no standard order{nearest(self.tasks, ORDERS)}; for tasks give a list "
                    f"(tasks=[{self.tasks}])"
                )
            return ORDERS[self.tasks]
        if not self.tasks or not all(self.tasks):
            raise ConfigError(f"tasks = {self.tasks!r}: must name one task at least, and none may be empty")
        for i, name in enumerate(self.tasks):
            if name in ORDERS:
                raise ConfigError(f"tasks: '{name}' is a standard order, not a task; give it alone (tasks={name})")
            if name in self.tasks[:i]:
                raise ConfigError(f"tasks: '{name}' is named twice; leave one of them out")
        return tuple(self.tasks)

    def stream(self, seed: int) -> Stream:
        """The stream for one seed; see :class:`~cl_lab.protocols.Scenario`. Samples are int32 ``[P + A]``.

        Raises :class:`ConfigError` for knobs that do not fit the tasks and :class:`DataError` for absent or damaged data.
        """
        from cl_lab.hub import load_tokenizer

        tasks = find_tasks(self._names(), self.data_dir, self.test_share)
        asked = self._asked(tasks)
        tokenizer = load_tokenizer(self.tokenizer)
        if self.shuffle_tasks:
            order = permutation(len(tasks), seed if self.order_seed is None else self.order_seed, "tasks")
            tasks, asked = ([some[i] for i in order.tolist()] for some in (tasks, asked))
        sets = [_TokenSet(task.name, self._tokens(task, tokenizer)) for task in tasks]
        if self.scoring in ("constrained", "first-token"):
            for one in sets:
                if not one.fact("labelled"):
                    raise ConfigError(
                        f"scoring = '{self.scoring}': task '{one.name}' has free answers, no labels to choose from; use "
                        "scoring=generation, or list its answers in labels.json in its folder"
                    )
        measures = self._measures(sets, asked)
        used = _PARTS if self.holdout is None else ("train",)
        self._tell(sets, used)
        sides = [self._sides(one) for one in sets]
        _tell_one_sided(sets, sides)
        chosen = [self._chosen(one, rows, seed) for one, rows in zip(sets, sides, strict=True)]
        answers: dict[_Answer, int] = {}
        outputs = [
            _outputs(one, rows.values(), answers, compared=measure != "exact")
            for one, rows, measure in zip(sets, chosen, measures, strict=True)
        ]
        # Widths are those of whole tasks, whatever was drawn of them: the same for every seed.
        prompt = max(one.longest(part) for one in sets for part in used)
        longest = max(len(a) for one in sets for a in one.answers_of(used))
        restyled: list[_Style | None] = [None] * len(sets)
        if self.style_mix > 0:
            restyled = self._restyle(tasks, [rows["train"] for rows in chosen], tokenizer, seed)
            prompt = self.max_prompt  # whatever was drawn
            for style in restyled:
                for answer in style.answers if style else ():
                    answers.setdefault((answer, ""), len(answers))
                    longest = max(longest, len(answer))
        numbers = {answer: row for (answer, text), row in answers.items() if not text}
        table = torch.full((len(answers), longest), PAD)
        for (answer, _), row in answers.items():
            table[row, : len(answer)] = torch.tensor(answer)
        experiences = [
            Experience(
                i,
                one.name,
                output[output >= 0].unique().tolist(),
                partial(_samples, one, rows["train"], output, table, prompt, i, style.rows(numbers) if style else None),
                partial(_samples, one, rows["test"], output, table, prompt, i),
            )
            for i, (one, rows, output, style) in enumerate(zip(sets, chosen, outputs, restyled, strict=True))
        ]
        return Stream(
            name=type(self).__name__,
            experiences=tuple(experiences),
            input_shape=(prompt + longest,),
            n_classes=len(answers),
            boundaries=not self.online if self.boundaries is None else self.boundaries,
            online=self.online,
            objective="language",
            layout={"prompt": (prompt,), "answer": (longest,)},
            answers=table,
            scoring=self.scoring,
            vocabulary=tokenizer.size,
            tokenizer=tokenizer,
            measures=tuple(measures) if set(measures) != {"exact"} else (),
            references=tuple(text for _, text in answers) if set(measures) != {"exact"} else (),
        )

    def _asked(self, tasks: Sequence[Task]) -> list[Measure | None]:
        """The measure that is asked for each of ``tasks`` by name. Raises :class:`ConfigError` for a name that is none."""
        if not isinstance(self.measure, dict):
            return [None] * len(tasks)
        named = [(name, task.name) for name, task in zip(self._names(), tasks, strict=True)]
        for name in self.measure:
            if not any(name in pair for pair in named):
                there = [name for name, _ in named]
                raise ConfigError(
                    f"measure: '{name}' is none of the tasks{nearest(name, there)}; name one of {', '.join(there)}"
                )
        return [self.measure.get(name, self.measure.get(short)) for name, short in named]

    def _measures(self, sets: Sequence[_TokenSet], asked: Sequence[Measure | None]) -> list[Measure]:
        """How the answers of each task are measured. Raises :class:`ConfigError` where there is nothing to compare."""
        free: Measure = "exact" if isinstance(self.measure, dict) else self.measure
        found: list[Measure] = [
            wanted or ("exact" if one.fact("labelled") else free) for one, wanted in zip(sets, asked, strict=True)
        ]
        compared = next((m for m in found if m != "exact"), None)
        if free != "exact" and compared is None:
            raise ConfigError(
                f"measure = '{free}': compares free answers, but every task has labels; leave it out, or name a task "
                f"(measure={{{sets[0].name}: {free}}})"
            )
        if compared is not None and self.scoring != "generation":
            raise ConfigError(
                f"measure = '{compared}': compares what is written, but scoring is '{self.scoring}'; set "
                "scoring=generation, or measure=exact"
            )
        return found

    def _restyle(
        self, tasks: Sequence[Task], chosen: Sequence[_Rows], tokenizer: Tokenizer, seed: int
    ) -> list[_Style | None]:
        """The training rows to rewrite, of each task; ``None`` where it has no texts with labels.

        Raises :class:`ConfigError` where no task has, and :class:`DataError` for an answer that is too long.
        """
        made: list[_Style | None] = []
        for task, rows in zip(tasks, chosen, strict=True):
            texts = task.read()
            if texts.labels is None or texts.asked or len(texts.labels) < 2:
                made.append(None)
                continue
            own = [texts.train[i] for i in rows.numbers.tolist()]
            instruction = self._templates()[0].instruction(task, texts.labels)
            again = restyle([row.answer for row in own], texts.labels, instruction, self.style_mix, seed, task.name)
            made.append(self._style(task, texts.labels, again, [own[a.number].text for a in again], tokenizer))
        if not any(made):
            raise ConfigError(
                f"style_mix = {self.style_mix}: rewrites texts that have one of several labels, but no task has such; leave "
                "it out"
            )
        told = ", ".join(f"{t.name} {len(s.numbers)}" for t, s in zip(tasks, made, strict=True) if s)
        log.info("text-stream: training rows rewritten into other styles (%s): %s", ", ".join(STYLES), told)
        if left := ", ".join(t.name for t, style in zip(tasks, made, strict=True) if style is None):
            log.warning("text-stream: style_mix: left as they are, having no texts with labels: %s", left)
        return made

    def _style(
        self, task: Task, labels: Sequence[str], again: Sequence[Restyled], texts: Sequence[str], tokenizer: Tokenizer
    ) -> _Style:
        """Rewritten rows in tokens."""
        wrap = tokenizer.chat if self.chat else str
        apart, gap = ("", "") if wrap("x\nAnswer:")[-1:].isspace() else space_between(tokenizer)
        said = answers_of(labels)
        tokens = [(*t, tokenizer.end) for t in tokens_behind(tokenizer, gap, said)]
        worst = max(range(len(said)), key=lambda i: len(tokens[i]))
        if len(tokens[worst]) > self.max_answer:
            raise DataError(
                f"text-stream: max_answer = {self.max_answer}: '{said[worst]}', an answer of style_mix in task "
                f"'{task.name}', takes {len(tokens[worst])} tokens, its end included; raise max_answer to "
                f"{len(tokens[worst])}"
            )

        def word(i: int, text: str) -> str:
            return wrap(f"{again[i].before}{text}{again[i].after}") + apart

        prompts, _ = _prompts(task, texts, word, tokenizer, self.max_prompt)
        by_answer = dict(zip(said, tokens, strict=True))
        return _Style([a.number for a in again], prompts, [by_answer[a.answer] for a in again], tokens)

    def _templates(self) -> list[Template]:
        """For texts with labels, and for whole prompts."""
        return [load_template(self.template)] * 2 if self.template else [TEMPLATES["options"], TEMPLATES["plain"]]

    def _tokens(self, task: Task, tokenizer: Tokenizer) -> Arrays:
        """All rows of a task in tokens, from the cache or made now."""
        templates = self._templates()
        wording = [t.wordings(task) for t in templates]
        key = _cache.key_of(
            repr(part)
            for part in (
                "text-stream 2",
                task.digest(),
                tokenizer.key,
                tokenizer.chat("x") if self.chat else None,
                wording,
                self.max_prompt,
                self.max_answer,
            )
        )

        def fill(create: _cache.Create) -> None:
            texts = task.read()
            template = templates[1 if texts.asked else 0]
            limits = self.max_prompt, self.max_answer
            for name, array in _tokenised(task, texts, template, tokenizer, self.chat, limits).items():
                create(name, array.shape, array.dtype)[...] = array

        return _cache.arrays(cache_root() / "tokens" / f"text-stream-{key}", _ARRAYS, fill)

    def _sides(self, one: _TokenSet) -> dict[str, _Rows]:
        """All that may be trained on and tested on; with a hold-out, both are training rows."""
        if self.holdout is None:
            return {part: _Rows(part, torch.arange(len(one.arrays[f"{part}_y"]))) for part in _PARTS}
        y, places = one.arrays["train_y"], one.arrays["train_place"]
        groups = y if one.fact("labelled") else np.zeros_like(y)
        held = torch.from_numpy(held_out(places, groups, self.holdout))
        if held.all() or not held.any():
            raise DataError(
                f"holdout = {self.holdout}: task '{one.name}' has too few {how_many(places, 'training rows')}; add more, or "
                "leave it out"
            )
        return {p: _Rows("train", (held == (p == "test")).nonzero().flatten()) for p in _PARTS}

    def _chosen(self, one: _TokenSet, sides: Mapping[str, _Rows], seed: int) -> dict[str, _Rows]:
        """What is trained on and what is tested on, of the rows on either side."""
        chosen = dict(sides)
        # Every seed is measured on the same samples.
        for part, limit, drawn in (("train", self.train_samples, seed), ("test", self.test_samples, 0)):
            if limit is not None:
                rows, draw = chosen[part], generator(drawn, f"{part}_samples", one.name)
                labels = one.labels(rows)
                if not one.fact("labelled"):  # equally many of each would be nearly as many rare ones as common ones
                    labels = torch.zeros_like(labels)
                chosen[part] = _Rows(rows.part, limit_rows(rows.numbers, labels, limit, draw))
        return chosen

    def _tell(self, sets: Sequence[_TokenSet], used: Sequence[str]) -> None:
        """Log what of the texts was left out."""

        def counted(fact: str) -> str:
            counts = [(one.name, sum(one.fact(f"{part}_{fact}") for part in used)) for one in sets]
            totals = [sum(len(one.arrays[f"{part}_y"]) for part in used) for one in sets]
            return ", ".join(f"{name} {n} of {total}" for (name, n), total in zip(counts, totals, strict=True) if n)

        if cut := counted("cut"):
            log.warning(
                "text-stream: max_prompt = %d: the middle of a text was left out in %s rows; raise it to keep all",
                self.max_prompt,
                cut,
            )
        if cut := counted("short"):
            log.warning(
                "text-stream: max_answer = %d: the end of a free answer was left out in %s rows; raise it to keep all",
                self.max_answer,
                cut,
            )
        dropped = ", ".join(f"{one.name} {n}" for one in sets if (n := one.fact("dropped")))
        if dropped:
            log.warning("text-stream: rows labelled '-', which have no right answer, were left out: %s", dropped)


def _tell_one_sided(sets: Sequence[_TokenSet], sides: Sequence[Mapping[str, _Rows]]) -> None:
    """Log which labels are learnt and never asked for, or asked for and never learnt."""
    lacking: dict[str, list[str]] = {"test": [], "training": []}
    for one, rows in zip(sets, sides, strict=True):
        if one.fact("labelled"):
            train, test = (one.labels(rows[part]).unique().numpy() for part in _PARTS)
            for part, only in (("test", np.setdiff1d(train, test)), ("training", np.setdiff1d(test, train))):
                if len(only):
                    more = f" and {len(only) - _NAMED} more" if len(only) > _NAMED else ""
                    lacking[part].append(f"{one.name} ({', '.join(map(one.text, only[:_NAMED].tolist()))}{more})")
    for part, told in lacking.items():
        if told:
            log.warning(
                "text-stream: labels without %s rows: %s; add rows with other texts, or leave these labels out",
                part,
                ", ".join(told),
            )


_NAMED = 3  # labels of a task in a message


def describe_row(stream: Stream, tokenizer: Tokenizer, x: Tensor) -> tuple[str, str]:
    """Prompt and answer of one sample ``[P + A]`` in words, without special tokens."""
    prompt = stream.layout["prompt"][0]
    return tokenizer.decode(x[:prompt].tolist()), tokenizer.decode(x[prompt:].tolist())


# -- what an experience is made of ---------------------------------------------------------------------------------

_FACTS = ("labelled", "dropped", "train_cut", "test_cut", "train_short", "test_short")
_ARRAYS = (
    *(f"{part}_{what}" for part in _PARTS for what in ("tokens", "starts", "y")),
    "train_place",
    "answer_tokens",
    "answer_starts",
    "answer_text",
    "answer_text_starts",
    "facts",
)
"""Tokens of all rows one behind the other, int32, with int64 ``[N + 1]`` where each starts; ``y`` ``[N]`` int64 numbers
the task's own answers, whose texts are UTF-8 in ``answer_text``; ``train_place`` ``[N]`` float64 is the place in [0, 1) that
decides on a hold-out."""


class _Rows(NamedTuple):
    """Rows of a task: their ``numbers``, int64, in its part ``train`` or ``test``."""

    part: str
    numbers: Tensor


@dataclass(frozen=True)
class _Style:
    """Training rows in other styles: their places among those that were chosen, prompts and answers in tokens.

    ``answers`` are all that can come in any style.
    """

    numbers: list[int]
    prompts: list[list[int]]
    said: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]

    def rows(self, numbers: Mapping[tuple[int, ...], int]) -> list[tuple[int, list[int], int]]:
        """Of each row its place, its prompt and its answer's row in the stream's table."""
        said = [numbers[answer] for answer in self.said]
        return list(zip(self.numbers, self.prompts, said, strict=True))


@dataclass(frozen=True)
class _TokenSet:
    """A task in tokens."""

    name: str
    arrays: Arrays

    def fact(self, name: str) -> int:
        """One of :data:`_FACTS`."""
        return int(self.arrays["facts"][_FACTS.index(name)])

    def longest(self, part: str) -> int:
        """Tokens of the longest prompt."""
        return int(np.diff(self.arrays[f"{part}_starts"]).max())

    def answer(self, number: int) -> tuple[int, ...]:
        """The tokens of one of its answers."""
        start, end = self.arrays["answer_starts"][number : number + 2]
        return tuple(self.arrays["answer_tokens"][start:end].tolist())

    def text(self, number: int) -> str:
        """The same in words, as it was before it was cut."""
        start, end = self.arrays["answer_text_starts"][number : number + 2]
        return bytes(self.arrays["answer_text"][start:end]).decode("utf-8", "surrogatepass")

    def labels(self, rows: _Rows) -> Tensor:
        """The answers of ``rows``, by the task's own numbers."""
        y: Tensor = torch.from_numpy(self.arrays[f"{rows.part}_y"])[rows.numbers]
        return y

    def met(self, labels: Sequence[Tensor]) -> list[int]:
        """The answers that can come: all where they are labels, else those in ``labels``."""
        if self.fact("labelled"):
            return list(range(len(self.arrays["answer_starts"]) - 1))
        found: list[int] = torch.cat(list(labels)).unique().tolist()
        return found

    def answers_of(self, parts: Iterable[str]) -> Iterator[tuple[int, ...]]:
        """The answers that can come in ``parts``."""
        return map(self.answer, self.met([torch.from_numpy(self.arrays[f"{part}_y"]) for part in parts]))


_Answer = tuple[tuple[int, ...], str]
"""The tokens of an answer, and the text it is compared with; none where it must be exact."""


def _outputs(one: _TokenSet, chosen: Iterable[_Rows], answers: dict[_Answer, int], *, compared: bool) -> Tensor:
    """For each of the task's answers its row in the stream's table, int64, −1 where it does not come; new ones join.

    Answers that are the same in tokens (because they were cut) are one, unless their texts are ``compared``.
    """
    output = torch.full((len(one.arrays["answer_starts"]) - 1,), -1)
    for number in one.met([one.labels(rows) for rows in chosen]):
        answer = one.answer(number), one.text(number) if compared else ""
        output[number] = answers.setdefault(answer, len(answers))
    return output


def _samples(
    one: _TokenSet,
    rows: _Rows,
    output: Tensor,
    table: Tensor,
    prompt: int,
    task: int,
    restyled: Sequence[tuple[int, list[int], int]] | None = None,
) -> TensorData:
    """The tensors of one part of an experience; ``prompt`` is the column where prompts end.

    ``restyled`` are rows with another prompt and answer.
    """
    tokens, starts = (one.arrays[f"{rows.part}_{what}"] for what in ("tokens", "starts"))
    y = output[one.labels(rows)]
    others = {place: (asked, answer) for place, asked, answer in restyled or ()}
    for place, (_, answer) in others.items():
        y[place] = answer
    x = torch.full((len(y), prompt + table.shape[1]), PAD, dtype=torch.int32)
    x[:, prompt:] = table[y]
    filled = x.numpy()
    for row, i in enumerate(rows.numbers.tolist()):
        start, end = starts[i : i + 2]
        asked = others[row][0] if row in others else tokens[start:end]
        filled[row, prompt - len(asked) : prompt] = asked
    return TensorData(x, y, torch.full_like(y, task))


# -- tokens --------------------------------------------------------------------------------------------------------


def _tokenised(
    task: Task, texts: Texts, template: Template, tokenizer: Tokenizer, chat: bool, limits: tuple[int, int]
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a task; ``limits`` are the tokens of a prompt and of an answer."""
    before, after = template.around(task, texts.labels)
    wrap = tokenizer.chat if chat else str
    apart, gap = ("", "") if wrap(f"{before}x{after}")[-1:].isspace() else space_between(tokenizer)

    def word(_: int, text: str) -> str:
        return wrap(f"{before}{text}{after}") + apart

    answers = list(texts.labels or dict.fromkeys(row.answer for part in (texts.train, texts.test) for row in part))
    tokens, cut_answers = _answers(task, answers, texts.labels is not None, gap, tokenizer, limits[1])
    if texts.labels is not None and len(set(tokens)) < len(tokens):
        double = next(a for a, t in zip(answers, tokens, strict=True) if tokens.count(t) > 1)
        raise DataError(
            f"text-stream: label '{double}' of task '{task.name}' has the same tokens as another of its labels; use another "
            "tokenizer, or reword it"
        )
    number = {answer: i for i, answer in enumerate(answers)}
    facts = {"labelled": int(texts.labels is not None), "dropped": texts.dropped}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part, rows in (("train", texts.train), ("test", texts.test)):
        prompts, facts[f"{part}_cut"] = _prompts(task, [row.text for row in rows], word, tokenizer, limits[0])
        facts[f"{part}_short"] = sum(row.answer in cut_answers for row in rows)
        arrays[f"{part}_tokens"], arrays[f"{part}_starts"] = ragged(prompts)
        arrays[f"{part}_y"] = np.array([number[row.answer] for row in rows], np.int64)
    arrays["answer_tokens"], arrays["answer_starts"] = ragged(tokens)
    written = [answer.encode("utf-8", "surrogatepass") for answer in answers]
    arrays["answer_text"] = np.frombuffer(b"".join(written), np.uint8)
    arrays["answer_text_starts"] = np.cumsum([0, *map(len, written)], dtype=np.int64)
    arrays["train_place"] = np.array([_hold_out_place(row) for row in texts.train])
    arrays["facts"] = np.array([facts[name] for name in _FACTS], np.int64)
    return arrays


def _hold_out_place(row: Row) -> float:
    # Another number than that which divides a file, or what is left to train on would all be above the share.
    return place_of(f"holdout\n{row.text}")


def _answers(
    task: Task, answers: Sequence[str], labels: bool, gap: str, tokenizer: Tokenizer, limit: int
) -> tuple[list[tuple[int, ...]], set[str]]:
    """The tokens of each answer as it stands behind a prompt, with the end-of-text token; and which were cut."""
    tokens = tokens_behind(tokenizer, gap, answers)
    long = {a: len(t) + 1 for a, t in zip(answers, tokens, strict=True) if len(t) >= limit}
    if labels and long:
        worst = max(long, key=long.__getitem__)
        raise DataError(
            f"text-stream: max_answer = {limit}: label '{worst}' of task '{task.name}' takes {long[worst]} tokens, its end "
            f"included; raise max_answer to {long[worst]}"
        )
    return [(*t[: limit - 1], tokenizer.end) for t in tokens], set(long)


_PIECES = re.compile(r"\s*[^\s\u2e80-\uffff]{1,16}|\s*\S")
"""What is left out of a text is whole words; of scripts that do not divide them, characters."""
_GAP = " ... "


def _prompts(
    task: Task, texts: Sequence[str], word: Callable[[int, str], str], tokenizer: Tokenizer, limit: int
) -> tuple[list[list[int]], int]:
    """The tokens of each prompt, at most ``limit``, and how many texts were cut for that.

    ``word`` words a prompt, given the number of its text. A long text keeps as many words as fit, half of them at its
    beginning and half at its end.
    """
    prompts = tokenizer.encode_all([word(i, text) for i, text in enumerate(texts)])
    long = [i for i, p in enumerate(prompts) if len(p) > limit]
    pieces = {i: _PIECES.findall(texts[i]) for i in long}

    def try_with(kept: Mapping[int, int]) -> dict[int, list[int]]:
        tried = tokenizer.encode_all([word(i, _without_middle(pieces[i], n)) for i, n in kept.items()])
        return dict(zip(kept, tried, strict=True))

    # Of each text ``least`` pieces fit and ``most`` do not; all texts are searched at once.
    least, most = dict.fromkeys(long, 1), {i: len(pieces[i]) for i in long}
    short, over = {}, {i: len(prompts[i]) for i in long}
    for i, p in try_with(least).items():
        prompts[i], short[i] = p, len(p)
    if (needed := max(short.values(), default=0)) > limit:
        raise ConfigError(
            f"max_prompt = {limit}: a prompt of task '{task.name}' takes {needed} tokens even with one word of its text; "
            f"raise it well above {needed}"
        )
    halve = False
    while tries := {i: most[i] - least[i] for i in long if most[i] - least[i] > 1}:
        for i, room in tries.items():
            # Tokens are nearly in proportion to words; where they are not, halving every other time ends the search.
            share = 0.5 if halve else (limit - short[i]) / max(over[i] - short[i], 1)
            tries[i] = least[i] + min(max(int(room * share), 1), room - 1)
        for i, p in try_with(tries).items():
            if len(p) <= limit:
                least[i], short[i], prompts[i] = tries[i], len(p), p
            else:
                most[i], over[i] = tries[i], len(p)
        halve = not halve
    return prompts, len(long)


def _without_middle(pieces: Sequence[str], kept: int) -> str:
    """The first and the last of ``pieces``, ``kept`` in all."""
    last = kept // 2
    return ("".join(pieces[: kept - last]) + _GAP + "".join(pieces[len(pieces) - last :]).lstrip()).rstrip()
