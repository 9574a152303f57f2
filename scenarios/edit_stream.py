"""Facts to be changed, some at a time: one stream on which editors and strategies are ranked alike."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cl_lab.errors import DataError
from cl_lab.facts import GROUPS, Edit, conflicts, read_facts
from cl_lab.hub import tokens_behind
from cl_lab.knobs import knob
from cl_lab.protocols import Scenario
from cl_lab.records import PAD, Aside, Experience, Scoring, Stream, TensorData
from cl_lab.seeding import permutation

from ._sources import roots

if TYPE_CHECKING:
    from cl_lab.hub import Tokenizer

log = logging.getLogger("cl_lab")

OWN_FACTS = Path(__file__).with_name("edit_facts.json")
"""Sixty capitals, languages and largest cities, each with an answer that is not true."""

_ASKED = {"prompts": "reliability", "paraphrases": "generality", "unrelated": "unrelated"}
_TOLD = ("reliability", "generality")
"""Groups that ask for what was edited, whose answers' end is learnt with them."""

_LONG = 512
"""Tokens of a prompt beside the stream, at most, where its own are shorter: every row has the columns of the longest."""


@dataclass
class EditStream(Scenario):
    """Facts to be changed, some in each experience and all asked again ever after (edit-stream:facts.jsonl).

    An experience is ``per_experience`` edits of a file of facts, drawn and shuffled with the run's seed. Its training texts
    are the edits' prompts with the new answers, for strategies that train; an editor takes the edits themselves
    (``Experience.edits``). It is tested on the same prompts, so R[t, j] says how well, after t experiences, the edits of
    experience j hold: its diagonal is reliability when an edit is made, its last row retention by age. With
    ``asked=paraphrases`` the test asks in other words, and R is generality; with ``unrelated`` it asks what no edit is
    about, and R[t, j] is the share of these answers that are right: the row before training says how many were
    (``scoring=opening`` for these: a model that was not told to ends no answer).

    Whatever else can be asked about the edits (:data:`cl_lab.facts.GROUPS`, questions whose answer is known; of several
    answers the first) is an aside of the stream, scored before training and after the last experience: an editor that holds
    its facts and moves all others is seen to. The edits themselves, also in other words, are scored there as ``scoring``
    says, all others as ``opening`` does (``same_subject_opening``).

    A sample is int32 ``[P + A]``, as editors read one: the prompt's tokens, then those of a blank, the answer and its end.
    ``scoring=generation`` wants the whole answer written, its end included.
    """

    argument: ClassVar[str | None] = "facts"
    memorised: ClassVar[bool] = True

    tokenizer: str = knob(doc="bytes, or a model's name, folder or hub id: the model that is edited (${model.weights})")
    facts: str | None = knob(
        None,
        "file of facts (any that `cl-lab edit score` reads), in a data folder or by its path; null: sixty of our own",
    )
    experiences: int = knob(6, "number of experiences", ge=1)
    per_experience: int = knob(10, "edits in each", ge=1)
    asked: Literal["prompts", "paraphrases", "unrelated"] = knob(
        "prompts", "what tests ask: the edits' prompts, these in other words, or what must not change"
    )
    scoring: Scoring = knob(
        "generation",
        "generation: the model writes the answer; constrained: the likeliest of the experience's new answers; first-token: "
        "that with the likeliest first token; opening: right where the likeliest token of all begins the answer",
    )
    chat: bool = knob(False, "ask as a user's turn of the tokenizer's chat template")
    asides: bool = knob(True, "also ask the edits' other questions, before training and after the last experience")
    room: int = knob(
        1, "columns for prompts, at least, and half as many for answers: evaluation.drift reads longer texts", ge=1
    )
    layout: str = knob("auto", "how the file is laid out; auto: by the keys of its first record")
    skip_bad: bool = knob(False, "leave bad records out instead of refusing the file")
    data_dir: str | None = knob(
        None, "folder searched first; then $CL_LAB_DATA, ~/.cache/cl-lab/data ($CL_LAB_CACHE), /usr/share/datasets"
    )

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """Three experiences of four of our own facts."""
        return {"tokenizer": "bytes", "experiences": 3, "per_experience": 4}

    def edits(self, seed: int) -> list[Edit]:
        """The edits of all experiences, in order. Raises :class:`DataError` where the file has too few, or they conflict."""
        file = self._file()
        known = read_facts(file, layout=self.layout, skip_bad=self.skip_bad, to_skip="skip_bad=true").edits
        wanted = self.experiences * self.per_experience
        if wanted > len(known):
            raise DataError(
                f"edit-stream: {file.name} holds {len(known)} edits, but experiences = {self.experiences} of "
                f"per_experience = {self.per_experience} take {wanted}; lower one of them"
            )
        drawn = [known[i] for i in permutation(len(known), seed, "edits").tolist()[:wanted]]
        if against := [c for c in conflicts(drawn) if c.kind == "contradiction"]:
            log.warning(
                "edit-stream: %d of %d edits contradict an earlier one, which will not hold: %s %s",
                len({id(c.edit) for c in against}),
                wanted,
                against[0].edit.source,
                against[0].why,
            )
        return drawn

    def stream(self, seed: int) -> Stream:
        """The stream for one seed; see :class:`~cl_lab.protocols.Scenario`. Samples are int32 ``[P + A]``.

        Raises :class:`ConfigError` for a tokenizer that cannot be had, and :class:`DataError` for facts that cannot be read,
        or are too few.
        """
        from cl_lab.hub import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer)
        edits, size = self.edits(seed), self.per_experience
        parts = [edits[first : first + size] for first in range(0, len(edits), size)]
        trained = [[_Row(e.prompt, e.answer) for e in some] for some in parts]
        tested: dict[str, _Rows] = {
            group: [[row for e in some for row in _questions(e, group)] for some in parts] for group in GROUPS
        }
        main = _ASKED[self.asked]
        if not all(tested[main]):
            empty = next(i for i, rows in enumerate(tested[main]) if not rows)
            raise DataError(
                f"edit-stream: no edit of experience {empty} has {self.asked} with an answer; take asked=prompts, or raise "
                "per_experience"
            )
        tested = tested if self.asides else {main: tested[main]}
        rows = [row for own in (trained, *tested.values()) for part in own for row in part]
        prompts = _prompts(tokenizer, self.chat, [row.prompt for row in rows])
        longest = max(_LONG, *(len(prompts[row.prompt]) for part in (*trained, *tested[main]) for row in part))
        if long := sum(len(tokens) > longest for tokens in prompts.values()):
            log.warning(
                "edit-stream: %d of %d prompts are longer than %d tokens and not asked", long, len(prompts), longest
            )
            tested = {
                group: [[row for row in part if len(prompts[row.prompt]) <= longest] for part in own]
                for group, own in tested.items()
            }
        every = [row for own in (trained, *tested.values()) for part in own for row in part]
        table = _Table(tokenizer, self.chat, every, prompts, self.room)

        def experiences(group: str) -> tuple[Experience, ...]:
            return tuple(
                Experience(
                    i,
                    f"edits {i * size} to {i * size + len(some) - 1}",
                    table.numbers([*train, *test]).tolist(),
                    partial(table.samples, train, i),
                    partial(table.samples, test, i),
                    edits=some,
                )
                for i, (some, train, test) in enumerate(zip(parts, trained, tested[group], strict=True))
            )

        stream = Stream(
            name=type(self).__name__,
            experiences=experiences(main),
            input_shape=(table.prompt + table.answers.shape[1],),
            n_classes=len(table.answers),
            objective="language",
            layout={"prompt": (table.prompt,), "answer": (table.answers.shape[1],)},
            answers=table.answers,
            scoring=self.scoring,
            vocabulary=tokenizer.size,
            tokenizer=tokenizer,
        )
        asides = {}
        for group in (group for group, own in tested.items() if group != main and any(own)):
            asked = [(rows, i) for i, rows in enumerate(tested[group]) if rows]
            told = group in _TOLD
            asides[group if told else f"{group}_opening"] = Aside(
                replace(stream, experiences=experiences(group), scoring=self.scoring if told else "opening"),
                partial(table.all_samples, asked),
            )
        return replace(stream, asides=asides)

    def _file(self) -> Path:
        if self.facts is None:
            return OWN_FACTS
        given = Path(self.facts).expanduser()
        places = [given, *(root / given for root in roots(self.data_dir))]  # a path from the root stays itself
        found = next((p for p in places if p.is_file()), None)
        if found is None:
            searched = ", ".join(str(r) for r in roots(self.data_dir))
            raise DataError(
                f"edit-stream: facts '{self.facts}' are not here, nor in {searched}; give a path, or name the folder of the "
                "data with CL_LAB_DATA=... or data_dir"
            )
        return found


def _questions(edit: Edit, group: str) -> list[_Row]:
    """What a test asks about an edit."""
    return [_Row(probe.prompt, probe.answer) for probe in GROUPS[group](edit) if probe.answer]


class _Row(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


_Rows: TypeAlias = Sequence[Sequence[_Row]]
"""Rows by experience."""


def _prompts(tokenizer: Tokenizer, chat: bool, asked: Iterable[str]) -> dict[str, list[int]]:
    """The tokens of each prompt."""
    texts = list(dict.fromkeys(asked))
    return dict(zip(texts, tokenizer.encode_all([tokenizer.chat(p) if chat else p for p in texts]), strict=True))


class _Table:
    """Rows in tokens, as :class:`~cl_lab.editable.EditableModel` reads them, and the answers by number."""

    def __init__(
        self, tokenizer: Tokenizer, chat: bool, rows: Sequence[_Row], prompts: Mapping[str, list[int]], room: int = 1
    ) -> None:
        said = dict.fromkeys(row.answer for row in rows)
        answers = tokens_behind(tokenizer, "" if chat else " ", [a.strip() for a in said])
        self._prompts = prompts
        ended = [(*tokens, tokenizer.end) for tokens in answers]
        number = {tokens: i for i, tokens in enumerate(dict.fromkeys(ended))}
        self._numbers = {a: number[tokens] for a, tokens in zip(said, ended, strict=True)}
        self.prompt = max(room, *(len(prompts[row.prompt]) for row in rows))
        self.answers = torch.full((len(number), max(room // 2, *map(len, number))), PAD)
        for tokens, i in number.items():
            self.answers[i, : len(tokens)] = torch.tensor(tokens)

    def numbers(self, rows: Sequence[_Row]) -> Tensor:
        """The answers' rows of the table, int64, each once."""
        return torch.tensor(sorted({self._numbers[row.answer] for row in rows}))

    def all_samples(self, asked: Sequence[tuple[Sequence[_Row], int]]) -> TensorData:
        """The tensors of rows of several experiences."""
        return TensorData.concat([self.samples(rows, task) for rows, task in asked])

    def samples(self, rows: Sequence[_Row], task: int) -> TensorData:
        """The tensors of some rows."""
        y = torch.tensor([self._numbers[row.answer] for row in rows])
        x = torch.full((len(rows), self.prompt + self.answers.shape[1]), PAD, dtype=torch.int32)
        x[:, self.prompt :] = self.answers[y]
        for line, row in zip(x, rows, strict=True):
            tokens = self._prompts[row.prompt]
            line[self.prompt - len(tokens) : self.prompt] = torch.tensor(tokens, dtype=torch.int32)
        return TensorData(x, y, torch.full_like(y, task))
