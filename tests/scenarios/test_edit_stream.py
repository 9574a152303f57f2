"""Edits as a stream: rows as editors read them, what is drawn, what a test asks, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import toys
from typer.testing import CliRunner

from cl_lab import hub, knobs, registry
from cl_lab.cli import app
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, DataError
from cl_lab.facts import conflicts, read_facts
from cl_lab.records import PAD, Stream, TensorData
from scenarios import edit_stream
from scenarios.edit_stream import OWN_FACTS, EditStream

BYTES = hub.load_tokenizer("bytes")


def made(**knobs: Any) -> EditStream:
    scenario = registry.create("scenarios", {"name": "edit-stream", "tokenizer": "bytes", **knobs}, "scenario")
    assert isinstance(scenario, EditStream)
    return scenario


def written(folder: Path, *facts: dict[str, Any]) -> str:
    file = folder / "facts.jsonl"
    file.write_text("\n".join(json.dumps(fact) for fact in facts))
    return str(file)


def texts(stream: Stream, data: TensorData) -> list[tuple[str, str]]:
    prompt = stream.layout["prompt"][0]
    return [(BYTES.decode(x[:prompt].tolist()), BYTES.decode(x[prompt:].tolist())) for x in data.x]


def test_our_own_facts_are_whole_and_do_not_conflict() -> None:
    edits = read_facts(OWN_FACTS).edits
    assert len(edits) == 60
    assert not conflicts(edits)
    for edit in edits:
        assert edit.subject
        assert edit.subject in edit.prompt
        assert edit.answer != edit.old
        assert len(edit.paraphrases) == len(edit.unrelated) == len(edit.same_relation) == len(edit.same_subject) == 1
        assert edit.subject in edit.paraphrases[0]
        assert edit.unrelated[0].answer
        assert edit.subject.removeprefix("the ") in edit.same_subject[0].prompt
        others = [other.subject for other in edits if other.subject and other.subject in edit.same_relation[0].prompt]
        assert not others, "of a country that nothing is changed about"
    edited = {edit.prompt for edit in edits}
    asked = [probe for edit in edits for probe in (*edit.unrelated, *edit.same_relation, *edit.same_subject)]
    assert not edited & {probe.prompt for probe in asked}, "they must not change"
    assert not {edit.answer for edit in edits} & {probe.answer for probe in asked}, (
        "nor is one right that was put there"
    )
    assert all(probe.answer for probe in asked)
    for group in ("same_relation", "same_subject"):
        assert len({getattr(edit, group)[0].prompt for edit in edits}) == len(edits)
    assert {edit.relation for edit in edits} == {"capital", "language", "largest city"}


def test_rows_are_what_editors_read() -> None:
    stream = made(experiences=2, per_experience=3).stream(0)
    model = EditableModel(toys.language_model(), BYTES)
    for e in stream.experiences:
        assert len(e.edits) == len(e.train) == len(e.test) == 3
        for row, edit in zip(e.train.x.tolist(), e.edits, strict=True):
            assert [t for t in row if t != PAD] == [
                *model.encode_prompt(edit.prompt),
                *model.encode_answer(edit.answer),
            ]
        assert e.test.digest() == e.train.digest()


def test_every_edit_comes_once_in_an_order_of_its_seed() -> None:
    one, two = ([e for x in made().stream(seed).experiences for e in x.edits] for seed in (0, 1))
    assert len(one) == len({e.prompt for e in one}) == 60
    assert one != two
    assert {e.prompt for e in one} == {e.prompt for e in two}


def test_tests_may_ask_in_other_words() -> None:
    stream = made(experiences=2, per_experience=3, asked="paraphrases").stream(0)
    for e in stream.experiences:
        assert texts(stream, e.test) == [(edit.paraphrases[0], f" {edit.answer}") for edit in e.edits]
        assert texts(stream, e.train) == [(edit.prompt, f" {edit.answer}") for edit in e.edits]


def test_tests_may_ask_what_must_not_change(tmp_path: Path) -> None:
    aside = [{"prompt": "Where is it?", "answer": "N"}, {"prompt": "And then?"}]
    facts = written(
        tmp_path, {"prompt": "One is", "answer": "1", "unrelated": aside}, {"prompt": "Two is", "answer": "2"}
    )
    knobs: dict[str, Any] = {"facts": facts, "asked": "unrelated"}
    stream = made(experiences=1, per_experience=2, **knobs).stream(0)
    assert texts(stream, stream.experiences[0].test) == [("Where is it?", " N")], "those whose answer is known"
    with pytest.raises(DataError, match=r"no edit of experience \d has unrelated with an answer"):
        made(experiences=2, per_experience=1, **knobs).stream(0)


WHOLE: dict[str, Any] = {
    "prompt": "One is",
    "answer": "1",
    "paraphrases": ["Who is one?", "One?"],
    "reverse": [{"prompt": "1 is", "answer": "One"}],
    "one_hop": [{"prompt": "Next to one", "answer": "2"}, {"prompt": "Nobody knows"}],
    "unrelated": [{"prompt": "A long way round to where it is said to be, they say,", "answer": "north"}],
    "same_relation": [{"prompt": "Two is", "answer": "2"}],
}


def test_what_else_can_be_asked_is_an_aside(tmp_path: Path) -> None:
    facts = written(tmp_path, {"prompt": "Three is", "answer": "3"}, WHOLE)
    stream = made(facts=facts, experiences=2, per_experience=1, scoring="constrained").stream(0)
    told = {name: texts(stream, aside.questions) for name, aside in stream.asides.items()}
    assert told == {
        "generality": [("Who is one?", " 1"), ("One?", " 1")],
        "reverse_opening": [("1 is", " One")],
        "one_hop_opening": [("Next to one", " 2")],
        "unrelated_opening": [("A long way round to where it is said to be, they say,", " north")],
        "same_relation_opening": [("Two is", " 2")],
    }, "with a known answer; nothing of the subject's own is asked"
    scoring = {name: aside.stream.scoring for name, aside in stream.asides.items()}
    assert scoring == dict.fromkeys(told, "opening") | {"generality": "constrained"}
    place = next(i for i, e in enumerate(stream.experiences) if e.edits[0].prompt == "One is")
    for aside in stream.asides.values():
        assert set(aside.questions.t.tolist()) == {place}, "a task's own questions"
        assert set(aside.questions.y.tolist()) <= set(aside.stream.experiences[place].classes)
    assert [len(e.classes) for e in stream.experiences] == [1, 1], (
        "whose answers none of its own edits may be taken for"
    )
    bare = made(facts=facts, experiences=2, per_experience=1, asides=False).stream(0)
    assert not bare.asides
    assert bare.fingerprint() != stream.fingerprint()
    others = made(facts=facts, experiences=1, per_experience=2, asked="paraphrases").stream(0).asides
    assert list(others) == [
        "reliability",
        *(f"{g}_opening" for g in ("reverse", "one_hop", "unrelated", "same_relation")),
    ]


def test_what_would_widen_every_row_is_not_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [{"prompt": "So it is said " * 40, "answer": "yes"}, {"prompt": "Is it?", "answer": "yes"}]
    facts = written(tmp_path, {"prompt": "One is", "answer": "1", "unrelated": long})
    knobs: dict[str, Any] = {"facts": facts, "experiences": 1, "per_experience": 1}
    stream = made(**knobs).stream(0)
    assert texts(stream, stream.asides["unrelated_opening"].questions) == [("Is it?", " yes")]
    assert stream.layout == {"prompt": (6,), "answer": (5,)}
    assert "1 of 3 prompts are longer than 512 tokens and not asked" in caplog.text
    wide = made(room=20, **knobs).stream(0)
    assert wide.layout == {"prompt": (20,), "answer": (10,)}
    assert texts(wide, wide.experiences[0].test) == texts(stream, stream.experiences[0].test)


def test_facts_are_found_in_a_data_folder(tmp_path: Path) -> None:
    written(tmp_path, {"prompt": "One is", "answer": "1"})
    knobs: dict[str, Any] = {"experiences": 1, "per_experience": 1}
    scenario = registry.create(
        "scenarios",
        {"name": "edit-stream:facts.jsonl", "tokenizer": "bytes", "data_dir": str(tmp_path), **knobs},
        "scenario",
    )
    assert scenario.stream(0).experiences[0].edits[0].prompt == "One is"
    with pytest.raises(DataError, match=r"facts 'other\.jsonl' are not here, nor in .*; give a path"):
        made(facts="other.jsonl", data_dir=str(tmp_path), **knobs).stream(0)


def test_its_knobs_name_commands_that_there_are() -> None:
    said = " ".join(k["doc"] for k in knobs.describe(EditStream))
    named = re.findall(r"`cl-lab ([^`]+)`", said)
    assert named == ["edit score"]
    for words in named:
        assert CliRunner().invoke(app, [*words.split(), "--help"]).exit_code == 0


def test_too_few_facts_are_told(tmp_path: Path) -> None:
    facts = written(tmp_path, {"prompt": "One is", "answer": "1"})
    with pytest.raises(
        DataError, match=r"facts\.jsonl holds 1 edits, but experiences = 6 of per_experience = 10 take 60"
    ):
        made(facts=facts).stream(0)


def test_bad_facts_are_told_or_left_out(tmp_path: Path) -> None:
    facts = written(tmp_path, {"prompt": "One is", "answer": ""}, {"prompt": "Two is", "answer": "2"})
    knobs: dict[str, Any] = {"facts": facts, "experiences": 1, "per_experience": 1}
    with pytest.raises(DataError, match=r"facts\.jsonl:1: answer is empty; .* leave them out with skip_bad=true$"):
        made(**knobs).stream(0)
    assert made(skip_bad=True, **knobs).stream(0).experiences[0].edits[0].prompt == "Two is"


def test_edits_that_contradict_each_other_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = written(tmp_path, {"prompt": "One is", "answer": "1"}, {"prompt": "One is", "answer": "2"})
    made(facts=facts, experiences=2, per_experience=1).stream(0)
    assert "1 of 2 edits contradict an earlier one, which will not hold: facts.jsonl:" in caplog.text


def test_a_tokenizer_without_turns_cannot_chat() -> None:
    with pytest.raises(ConfigError, match="chat"):
        made(chat=True).stream(0)


def test_answers_are_tokenised_as_they_stand_behind_prompts() -> None:
    """A tokenizer's mark at a text's beginning is no part of an answer, or it would be learnt, and counted as right."""

    class Marked(hub.ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [ord("_"), *super().encode(text)]

    rows = [edit_stream._Row("It is", "Lyon"), edit_stream._Row("Is it", "no")]
    prompts = edit_stream._prompts(Marked(), False, [row.prompt for row in rows])
    table = edit_stream._Table(Marked(), False, rows, prompts)
    assert table.answers.tolist() == [[*b" Lyon", 256], [*b" no", 256, PAD, PAD]]
