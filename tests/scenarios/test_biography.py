"""The biographies: who is in which part, and every answer read out of the texts by a reader that knows the sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from scipy.stats import chi2_contingency, chisquare

from cl_lab import registry
from cl_lab.errors import ConfigError, DataError
from cl_lab.records import PAD, Experience, Stream, TensorData
from scenarios import _people
from scenarios._people import ATTRIBUTES, LISTS, QUESTIONS, TEMPLATES, Sizes, World, make_world
from scenarios._tokens import WordTokenizer
from scenarios.biography import Biography

FULL = Sizes(400, 400, 1000, 200, 300, 100, 263, 200)
NAME = r"(?P<name>\w+ \w+ \w+)"


def scenario(**knobs: Any) -> Biography:
    made: Biography = registry.create(
        "scenarios", {"name": "biography", "persons": 40, "tasks": 2, **knobs}, "scenario"
    )
    return made


class Reader:
    """Turns a stream back into words, and words into what they say."""

    def __init__(self, of: Biography) -> None:
        self.stream: Stream = of.stream(0)
        self.tokenizer = of.vocabulary(of.world())
        self.prompt = self.stream.layout["prompt"][0]

    def rows(self, data: TensorData) -> list[tuple[str, str]]:
        """Prompts and answers in words."""
        return [
            (self.tokenizer.decode(x[: self.prompt].tolist()), self.tokenizer.decode(x[self.prompt :].tolist()))
            for x in data.x
        ]

    def questions(self, data: TensorData) -> Iterator[tuple[str, str, str]]:
        """Name, attribute and answer of every question."""
        for prompt, answer in self.rows(data):
            question, _, rest = prompt.partition("\n")
            assert rest.strip() == "Answer:"
            ((attribute, name),) = [
                (a, m["name"]) for a, q in QUESTIONS.items() if (m := re.fullmatch(pattern(q), question))
            ]
            yield name, attribute, answer.strip()

    def people(self, data: TensorData) -> set[str]:
        return {name for name, _, _ in self.questions(data)}


def pattern(sentence: str) -> str:
    return re.escape(sentence).replace(r"\{name\}", NAME).replace(r"\{value\}", r"(?P<value>[\w ,]+)")


def read(text: str) -> list[tuple[str, str, str, str]]:
    """Name, attribute, value and the form of every sentence of ``text``."""
    found = []
    for sentence in re.findall(r"[^.]+\.", text):
        ((form, attribute, m),) = [
            (form, attribute, m)
            for attribute, forms in TEMPLATES.items()
            for form in forms
            if (m := re.fullmatch(pattern(form), sentence.strip()))
        ]
        found.append((m["name"], attribute, m["value"], form))
    return found


# -- lists and sentences -------------------------------------------------------------------------------------------


def test_lists_are_as_long_as_the_papers_and_tell_people_apart() -> None:
    assert all(len(LISTS[field]) >= size for field, size in FULL._asdict().items() if field != "years")
    assert all(len(set(words)) == len(words) for words in LISTS.values())
    words = {field: {w for text in texts for w in text.split()} for field, texts in LISTS.items()}
    for a in words:
        for b in words:
            assert a == b or not words[a] & words[b], "a word says which list it is from"


def test_sentences_name_the_person_before_the_value_and_say_one_thing() -> None:
    everything = [form for forms in TEMPLATES.values() for form in forms]
    assert len(set(everything)) == len(everything)
    assert tuple(TEMPLATES) == tuple(QUESTIONS) == ATTRIBUTES
    assert all(len(forms) >= 10 for forms in TEMPLATES.values())
    for attribute, forms in TEMPLATES.items():
        for form in forms:
            assert (form.count("{name}"), form.count("{value}"), form.count(".")) == (1, 1, 1)
            assert form.index("{name}") < form.index("{value}")
            assert form.endswith(".")
            said = form.format(name="Ala Abace Ashberry", value="New Zelma")
            assert [r[1:3] for r in read(said)] == [(attribute, "New Zelma")]


# -- people --------------------------------------------------------------------------------------------------------


def test_nobody_shares_a_name() -> None:
    world = make_world(20_000, FULL, 0)
    assert len({world.name(p) for p in range(20_000)}) == 20_000
    crowded = make_world(500, FULL._replace(first_names=10, middle_names=10, last_names=10), 1)
    assert len({crowded.name(p) for p in range(500)}) == 500


def test_more_people_change_nothing_for_those_before() -> None:
    few, many = make_world(300, FULL, 4), make_world(9000, FULL, 4)
    assert np.array_equal(few.names, many.names[:300])
    assert np.array_equal(few.attributes, many.attributes[:300])
    one, two = scenario(tasks=1).stream(0), scenario(tasks=2).stream(0)
    assert [e.name for e in two.experiences[:3]] == [e.name for e in one.experiences]
    assert torch.equal(one.experiences[1].train.x[:, : one.layout["prompt"][0]], prompts(two, two.experiences[1].train))


def prompts(stream: Stream, data: TensorData) -> torch.Tensor:
    return data.x[:, : stream.layout["prompt"][0]]


def test_attributes_are_even_and_independent() -> None:
    world = make_world(30_000, FULL, 2)
    kinds = [len(values) for values in world.value_lists]
    assert kinds == [200 * 12 * 28, 200, 300, 100, 263, 200]
    birthday, city, university, major, company, work = world.attributes.T
    for values, n in (
        *((birthday // 336, 200), (birthday // 28 % 12, 12), (birthday % 28, 28)),
        *((city, 200), (university, 300), (major, 100), (company, 263)),
    ):
        assert chisquare(np.bincount(values, minlength=n)).pvalue > 1e-4
    pairs = [(city, university), (university, major), (major, company), (city, company), (birthday, city)]
    for a, b in pairs:
        table = np.zeros((10, 10))
        np.add.at(table, (a % 10, b % 10), 1)
        assert chi2_contingency(table).pvalue > 1e-4
    seats = {c: set(work[company == c].tolist()) for c in range(263)}
    assert all(len(cities) == 1 for cities in seats.values()), "who works for a company works where it is"
    assert len({next(iter(s)) for s in seats.values()}) > 100


# -- the stream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persons", [10, 40])
def test_who_is_in_which_part(persons: int) -> None:
    """10 : 5 : 5 : 2; the test half of task 0 is never asked about in training, new people are nowhere read about."""
    reader = Reader(scenario(persons=persons))
    pretraining, first, *later = reader.stream.experiences
    assert [e.name for e in reader.stream.experiences] == ["pretraining", "task 0", "task 1", "task 2"]
    readings = {name for _, text in reader.rows(pretraining.train) for name, *_ in read(text)}
    trained, tested = reader.people(first.train), reader.people(first.test)
    assert (len(readings), len(trained), len(tested)) == (persons, persons // 2, persons // 2)
    assert trained | tested == readings
    assert not trained & tested
    new = [reader.people(e.train) for e in later]
    assert [len(people) for people in new] == [persons // 5] * 2
    assert not new[0] & new[1]
    assert not (new[0] | new[1]) & readings
    for e in later:
        assert e.train.digest() == e.test.digest()
    for data in (first.train, first.test, *(e.train for e in later)):
        asked = [(name, attribute) for name, attribute, _ in reader.questions(data)]
        assert len(set(asked)) == len(asked) == 6 * len({name for name, _ in asked})


def test_biographies_say_everything_in_different_words_and_orders() -> None:
    reader = Reader(scenario(biographies=4))
    experience = reader.stream.experiences[0]
    texts: dict[str, list[list[tuple[str, str, str, str]]]] = {}
    for prompt, text in reader.rows(experience.train):
        assert prompt == "", "nothing but the end of another text"
        said = read(text)
        assert len({name for name, *_ in said}) == 1, "the whole name in every sentence"
        assert sorted(attribute for _, attribute, _, _ in said) == sorted(ATTRIBUTES)
        texts.setdefault(said[0][0], []).append(said)
    assert len(texts) == 40
    for prompt, rest in reader.rows(experience.test):
        said = read(f"{prompt} {rest}")
        assert len(said) == 6
        assert rest.startswith(said[-1][2]), "what is left to say begins with the last value"
        assert said[-1][2] not in prompt or said[-1][1] in ("birth city", "work city")
        texts[said[0][0]].append(said)
    orders = set()
    for own in texts.values():
        assert len(own) == 5
        forms = [form for said in own for *_, form in said]
        assert len(set(forms)) == len(forms), "no two texts about a person share a sentence"
        assert len({frozenset((attribute, value) for _, attribute, value, _ in said) for said in own}) == 1
        orders |= {tuple(attribute for _, attribute, _, _ in said) for said in own}
    assert len(orders) > 100


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_every_answer_is_what_the_biographies_say(tokenizer: str) -> None:
    reader = Reader(scenario(tokenizer=tokenizer))
    pretraining, first, *later = reader.stream.experiences
    known: dict[tuple[str, str], str] = {}
    for _, text in reader.rows(pretraining.train):
        for name, attribute, value, _ in read(text):
            assert known.setdefault((name, attribute), value) == value
    asked = [*reader.questions(first.train), *reader.questions(first.test)]
    assert len(asked) == len(known) == 6 * 40
    assert {(name, attribute): answer for name, attribute, answer in asked} == known
    companies = {name: answer for name, attribute, answer in asked if attribute == "company"}
    seat = {companies[name]: answer for name, attribute, answer in asked if attribute == "work city"}
    for e in later:
        told = {(name, attribute): answer for name, attribute, answer in reader.questions(e.train)}
        for (name, attribute), answer in told.items():
            if attribute == "company" and answer in seat:
                assert told[name, "work city"] == seat[answer]


def test_tokens_are_those_of_the_words_and_of_the_table() -> None:
    for tokenizer in ("words", "bytes"):
        of = scenario(tokenizer=tokenizer)
        reader = Reader(of)
        stream, encode, end = reader.stream, reader.tokenizer.encode, reader.tokenizer.end
        assert stream.answers is not None
        assert stream.vocabulary == reader.tokenizer.size > int(stream.answers.max())
        assert stream.input_shape == (sum(n for (n,) in stream.layout.values()),)
        world = of.world()
        for e in stream.experiences:
            for data in (e.train, e.test):
                assert torch.equal(stream.answers[data.y], data.x[:, reader.prompt :].long())
                assert bool((data.t == e.index).all())
        held = [[t for t in x.tolist() if t != PAD] for x in stream.experiences[0].test.x]
        texts = _people.biographies(world, range(40), 6, 0)
        assert held == [[end, *encode(own[-1].text), end] for own in texts], "prompt and answer are the whole text"
        trained = [[t for t in x.tolist() if t != PAD] for x in stream.experiences[0].train.x]
        assert trained == [[end, *encode(b.text), end] for own in texts for b in own[:-1]]
        for own in texts:
            assert reader.tokenizer.decode(encode(own[0].text)) == own[0].text
        for prompt, answer in reader.rows(stream.experiences[1].train):
            assert (prompt.endswith("Answer:"), answer[0].isspace()) in ((True, False), (False, False))


def test_the_vocabulary_is_that_of_the_world() -> None:
    of = scenario(
        first_names=20, middle_names=20, last_names=20, cities=5, universities=5, majors=5, companies=5, years=3
    )
    tokenizer = of.vocabulary(of.world())
    assert isinstance(tokenizer, WordTokenizer)
    assert list(tokenizer.words) == sorted(set(tokenizer.words))
    assert {"1900", "1902", "January", "28"} <= set(tokenizer.words)
    assert "1903" not in tokenizer.words
    assert tokenizer.size < 600
    text = "On which date was Ala born?\nAnswer: May 3, 1901"
    small = WordTokenizer.of([text])
    assert small.decode(small.encode(text)) == text
    assert small.decode([small.end, PAD, *small.encode("born")]) == "born"
    with pytest.raises(
        DataError, match=r"^tokenizer 'words': 'Answr' is none of its \d+ words; did you mean .Answer.\?"
    ):
        small.encode("Answr: May")
    with pytest.raises(ConfigError, match="leave chat off"):
        small.chat("Ala")


def test_one_seed_decides() -> None:
    assert scenario().stream(0).fingerprint() == scenario().stream(1).fingerprint()
    one, two = scenario().stream(0), scenario(data_seed=1).stream(0)
    assert one.fingerprint() != two.fingerprint()
    assert not {bytes(x) for x in rows_of(one.experiences[0])} & {bytes(x) for x in rows_of(two.experiences[0])}


def rows_of(e: Experience) -> list[bytes]:
    return [x.numpy().tobytes() for x in e.train.x]


def test_parts_can_be_left_out() -> None:
    whole, asked = scenario(), scenario(pretraining=False, tasks=0)
    (only,) = asked.stream(0).experiences
    assert (only.name, only.index) == ("task 0", 0)
    assert list(Reader(asked).questions(only.train)) == list(
        Reader(whole).questions(whole.stream(0).experiences[1].train)
    )
    few = scenario(test_samples=7).stream(0)
    assert [len(e.test) for e in few.experiences] == [7] * 4
    full = whole.stream(0)
    for a, b in zip(few.experiences, full.experiences, strict=True):
        assert len(a.train) == len(b.train)
        mine, all_of_them = (Reader(s).rows(e.test) for s, e in ((scenario(test_samples=7), a), (whole, b)))
        assert [row for row in all_of_them if row in mine] == mine


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"persons": 45}, r"^scenario\.persons = 45: must be a multiple of 10, .*; take 40 or 50$"),
        ({"persons": 0}, r"^scenario\.persons = 0: input should be greater than or equal to 10$"),
        ({"biographies": 14}, r"^scenario\.biographies = 14: input should be less than or equal to 13$"),
        ({"cities": 201}, r"^scenario\.cities = 201: input should be less than or equal to 200$"),
        ({"citys": 20}, r"^scenario\.citys: unknown key; did you mean 'cities'\?$"),
        (
            {"first_names": 2, "middle_names": 5, "last_names": 10},
            r"^scenario\.first_names = 2, middle_names = 5, last_names = 10: 100 names for 56 people; .* lower persons$",
        ),
        ({"scoring": "constrained"}, r"^scenario\.scoring = 'constrained': input should be 'generation' or 'opening'$"),
    ],
)
def test_errors_are_one_line(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        scenario(**knobs)


def test_a_tokenizer_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*no-such-model[^\n]*$"):
        scenario(tokenizer="./no-such-model").stream(0)


# -- with a model --------------------------------------------------------------------------------------------------


def test_a_model_of_that_vocabulary_learns_from_it() -> None:
    """Questions about four new people, learnt by heart; the model fits the world's words, also those of training alone."""
    stream = scenario(
        persons=20, tasks=1, first_names=9, middle_names=9, last_names=9, cities=9, universities=9, majors=9, companies=9,
        years=9, pretraining=False,
    ).stream(0)  # fmt: skip
    model = {"name": "causal-lm", "weights": "tiny", "layers": 1, "width": 48, "heads": 2, "adapt": "full"}
    training = {"epochs": 40, "batch_size": 8, "lr": 0.01, "optimizer": "adamw"}
    done = toys.trainer([{"name": "naive"}], stream, model=model, training=training)
    record = done.run()
    assert record.initial == [0.0, 0.0]
    assert record.matrix[1][1] > 0.8
    opening = replace(stream, scoring="opening")
    assert opening.chance is None
    again = toys.trainer([{"name": "naive"}], opening, model=model, training=training).run()
    assert again.matrix[1][1] >= record.matrix[1][1], "whoever has the whole answer right has its first token right"


def test_worlds_agree_with_their_questions() -> None:
    world: World = make_world(10, FULL, 0)
    assert world.question(0, 3) == f"Which subject did {world.name(0)} major in?\nAnswer:"
    assert world.value(0, 0) in world.value_lists[0]
