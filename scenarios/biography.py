"""Made-up biographies, read first and asked about later: the synthetic stream of the paper on spurious forgetting.

"Spurious forgetting in continual learning of language models" (ICLR 2025, arXiv 2501.13453): who has read about some people
and learnt to answer questions about half of them can answer about the other half, until questions about new people come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.hub import tokens_behind
from cl_lab.knobs import knob
from cl_lab.protocols import Scenario
from cl_lab.records import PAD, Experience, Stream, TensorData
from cl_lab.seeding import permutation

from ._people import ATTRIBUTES, LISTS, MOST_BIOGRAPHIES, Sizes, World, biographies, make_world
from ._tokens import WordTokenizer, ragged, space_between

if TYPE_CHECKING:
    from cl_lab.hub import Tokenizer


@dataclass
class Biography(Scenario):
    """People who do not exist: biographies to read, then questions about them and about new people (arXiv 2501.13453).

    A person has a name of three parts that nobody else has, and six attributes (birthday, birth city, university, major,
    company, and the work city, where the company is). The experiences:

    - *pretraining* (unless ``pretraining=false``): ``biographies`` texts about each of ``persons`` people, six sentences in
      a drawn order, the whole name in each, learnt from the first token to the end. It is tested on a further biography of
      each person, in other sentences, whose last value is to be written: what was read, asked for in the way it was read.
    - *task 0*: one question for each attribute of half of these people, tested on the other half, about whom no question is
      trained: can what was read be used to answer?
    - *task 1* … *task n*: questions about new people, ``persons / 5`` each, nowhere read about, trained and tested on the
      same: memory.

    So the paper's 10 : 5 : 5 : 2 (100,000 people read about, 50,000 asked about in training, 50,000 in the test, 20,000 new
    ones in a task) holds at any size. ``scoring=generation`` is the paper's exact match, the end included; ``opening`` its
    hard first-token accuracy, for which the answer is not written out: the likeliest of all tokens is the right first one.
    To choose among listed answers is not offered: there are as many birthdays as people.

    All depends on ``data_seed`` alone. Sizes of lists may be lowered for small models and few people, who would share no
    word of a name otherwise; the defaults, and the most there can be, are the paper's (264 companies here).

    A sample is int32 ``[P + A]``, prompt and answer; before every prompt stands the end-of-text token, which is the whole
    prompt of a text to be read. ``tokenizer=words`` has the words, marks and numbers of this world as tokens, about 2,400
    at full size, and needs a model of that vocabulary: ``{name: causal-lm, weights: tiny, adapt: full, …}``. Texts to be
    read stand in the stream's table of answers, too: about twenty bytes a token in all, 0.7 GB at the paper's size.
    """

    memorised: ClassVar[bool] = True

    persons: int = knob(1000, "people read about in pretraining: half for questions in task 0, half to test", ge=10)
    tasks: int = knob(5, "tasks of new people behind task 0", ge=0)
    pretraining: bool = knob(True, "begin with the biographies; false: the model has read them already")
    biographies: int = knob(5, "texts about each person", ge=1, le=MOST_BIOGRAPHIES)
    tokenizer: str = knob("words", "words, bytes, or a model's name, folder or hub id (${model.weights})")
    scoring: Literal["generation", "opening"] = knob(
        "generation", "generation: the whole answer, written; opening: its first token is the likeliest of all"
    )
    test_samples: int | None = knob(None, "test rows of an experience, the same for every seed; null: all", ge=1)
    first_names: int = knob(400, "first names", ge=1, le=len(LISTS["first_names"]))
    middle_names: int = knob(400, "middle names", ge=1, le=len(LISTS["middle_names"]))
    last_names: int = knob(1000, "last names", ge=1, le=len(LISTS["last_names"]))
    cities: int = knob(200, "cities, to be born and to work in", ge=2, le=len(LISTS["cities"]))
    universities: int = knob(300, "universities", ge=2, le=len(LISTS["universities"]))
    majors: int = knob(100, "majors", ge=2, le=len(LISTS["majors"]))
    companies: int = knob(263, "companies", ge=2, le=len(LISTS["companies"]))
    years: int = knob(200, "years of birth from 1900 on, twelve months of 28 days each", ge=1, le=200)
    data_seed: int = knob(0, "seed of people, texts and who is in which part", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """Twenty people, four new ones in each of two tasks."""
        return {"persons": 20, "tasks": 2, "biographies": 2}

    def __post_init__(self) -> None:
        if self.persons % 10:
            raise ConfigError(
                f"persons = {self.persons}: must be a multiple of 10, as 10 : 5 : 5 : 2 is its ratio to the other parts; "
                f"take {self.persons // 10 * 10} or {-(-self.persons // 10) * 10}"
            )
        names = self.first_names * self.middle_names * self.last_names
        if names < 2 * self._people:
            raise ConfigError(
                f"first_names = {self.first_names}, middle_names = {self.middle_names}, last_names = {self.last_names}: "
                f"{names} names for {self._people} people; there must be twice as many names: raise one of these, or lower "
                "persons"
            )

    @property
    def _new(self) -> int:
        """People of each task behind task 0."""
        return self.persons // 5

    @property
    def _people(self) -> int:
        return self.persons + self.tasks * self._new

    def world(self) -> World:
        """The people: first those of pretraining (first the half that is asked about), then those of each task."""
        return make_world(self._people, Sizes(*(getattr(self, field) for field in Sizes._fields)), self.data_seed)

    def vocabulary(self, world: World) -> Tokenizer:
        """The tokenizer. Raises :class:`ConfigError` or :class:`~cl_lab.errors.DataError` where there is none such."""
        if self.tokenizer == "words":
            return WordTokenizer.of(world.words())
        from cl_lab.hub import load_tokenizer

        return load_tokenizer(self.tokenizer)

    def stream(self, seed: int) -> Stream:
        """The stream, the same for every seed; see :class:`~cl_lab.protocols.Scenario`. Samples are int32 ``[P + A]``.

        Raises :class:`ConfigError` and :class:`~cl_lab.errors.DataError` for a tokenizer that cannot be had.
        """
        world = self.world()
        rows = _Rows(self.vocabulary(world))
        parts = [self._read(world, rows)] if self.pretraining else []
        new = [range(first, first + self._new) for first in range(self.persons, self._people, self._new)]
        half = self.persons // 2
        for i, people in enumerate([range(half), *new]):
            questions = _questions(world, people)
            tested = _questions(world, range(half, self.persons)) if i == 0 else questions
            name = f"task {i}"
            drawn = self._drawn(len(tested), name)
            trained = rows.asked(questions)
            parts.append(
                _Parts(name, trained, rows.asked([tested[k] for k in drawn.tolist()]), drawn // len(ATTRIBUTES))
            )
        table = rows.table()
        prompt = max(part.longest for _, train, test, _ in parts for part in (train, test))
        return Stream(
            name=type(self).__name__,
            experiences=tuple(
                Experience(
                    i,
                    name,
                    torch.cat([train.y, test.y]).unique().tolist(),
                    partial(train.samples, table, prompt, i),
                    partial(test.samples, table, prompt, i),
                    groups=people,
                )
                for i, (name, train, test, people) in enumerate(parts)
            ),
            input_shape=(prompt + table.shape[1],),
            n_classes=len(table),
            objective="language",
            layout={"prompt": (prompt,), "answer": (table.shape[1],)},
            answers=table,
            scoring=self.scoring,
            vocabulary=rows.tokenizer.size,
            tokenizer=rows.tokenizer,
        )

    def _read(self, world: World, rows: _Rows) -> _Parts:
        """The pretraining."""
        name = "pretraining"
        read = biographies(world, range(self.persons), self.biographies + 1, self.data_seed)
        begun = [(b.text[: b.asked].rstrip(), b.text[b.asked :]) for *_, b in read]
        drawn = self._drawn(len(begun), name)
        trained = rows.told([b.text for own in read for b in own[:-1]])
        return _Parts(name, trained, rows.asked([begun[k] for k in drawn.tolist()]), drawn)

    def _drawn(self, n: int, name: str) -> Tensor:
        """At most ``test_samples`` of ``n`` rows, in their order."""
        return permutation(n, self.data_seed, "test", name)[: self.test_samples].sort().values


_Asked = tuple[str, str]
"""A prompt and its answer."""


def _questions(world: World, people: range) -> list[_Asked]:
    """Every question about ``people``."""
    return [(world.question(p, a), world.value(p, a)) for p in people for a in range(len(ATTRIBUTES))]


class _Part(NamedTuple):
    """Rows in tokens: all prompts, one behind the other, their lengths int64 ``[N]``, and rows of the table of answers."""

    prompts: npt.NDArray[np.int32]
    lengths: Tensor
    y: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max())

    def samples(self, table: Tensor, prompt: int, task: int) -> TensorData:
        """The tensors; ``prompt`` is the column where prompts end."""
        x = torch.full((len(self.y), prompt + table.shape[1]), PAD, dtype=torch.int32)
        x[:, prompt:] = table[self.y]
        # A mask is filled row by row, as the prompts lie.
        x[:, :prompt][torch.arange(prompt) >= prompt - self.lengths[:, None]] = torch.from_numpy(self.prompts)
        return TensorData(x, self.y, torch.full_like(self.y, task))


class _Parts(NamedTuple):
    """An experience's name and rows, and the person, int64 ``[N]``, that each test row asks about."""

    name: str
    train: _Part
    test: _Part
    people: Tensor


class _Rows:
    """What puts texts into tokens and numbers the answers; equal ones are one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._answers: dict[tuple[int, ...], int] = {}

    def told(self, texts: Sequence[str]) -> _Part:
        """Texts to be read: behind the end of another text stands the whole of each."""
        return self._part([[]] * len(texts), self.tokenizer.encode_all(texts))

    def asked(self, rows: Sequence[_Asked]) -> _Part:
        """Prompts with their answers."""
        apart, gap = space_between(self.tokenizer)
        prompts = self.tokenizer.encode_all([prompt + apart for prompt, _ in rows])
        return self._part(prompts, tokens_behind(self.tokenizer, gap, [answer for _, answer in rows]))

    def _part(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> _Part:
        end = self.tokenizer.end
        tokens, starts = ragged([[end, *prompt] for prompt in prompts])
        y = [self._answers.setdefault((*answer, end), len(self._answers)) for answer in answers]
        return _Part(tokens, torch.from_numpy(np.diff(starts)), torch.tensor(y))

    def table(self) -> Tensor:
        """All answers so far, int64 ``[n, longest]``."""
        tokens, starts = ragged(list(self._answers))
        lengths = torch.from_numpy(np.diff(starts))
        table = torch.full((len(lengths), int(lengths.max())), PAD)
        table[torch.arange(table.shape[1]) < lengths[:, None]] = torch.from_numpy(tokens).long()
        return table
