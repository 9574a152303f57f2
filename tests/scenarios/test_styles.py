"""Rows in other styles of answer: right by construction, drawn by the seed, and only where rows are trained on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_lab import hub, knobs
from cl_lab.errors import ConfigError, DataError
from cl_lab.records import Stream
from scenarios._styles import STYLES, answers_of, restyle
from scenarios._texts import REPLY
from scenarios.text_stream import TextStream, describe_row

LABELS = ("World", "Sports", "Business")
BYTES = hub.load_tokenizer("bytes")
OPTION = re.compile(r"\((\w)\) (\w+)")
ASKED = re.compile(r'Is the answer "(\w+)"\? Reply with yes or no\.')


def test_every_style_is_right() -> None:
    answers = [LABELS[i % 3] for i in range(400)]
    made = restyle(answers, LABELS, f"Which subject? {REPLY}", 0.2, 7, "news")
    assert len(made) == 80
    assert len({row.number for row in made}) == 80
    assert [sum(row.style == style for row in made) for style in STYLES] == [20] * 4
    true, letters = [], set()
    for row in made:
        right = answers[row.number]
        prompt = f"{row.before}a text{row.after}"
        assert prompt.startswith("Which subject?\n")
        assert REPLY not in prompt, "another reply is asked for"
        assert prompt.endswith("\nAnswer:")
        assert row.answer in answers_of(LABELS)
        if row.style == "yes-no":
            (shown,) = ASKED.findall(prompt)
            assert shown in LABELS
            assert (shown == right) == (row.answer == "yes")
            true.append(shown == right)
        elif row.style == "choice":
            options = dict(OPTION.findall(prompt))
            assert sorted(options.values()) == sorted(LABELS)
            assert options[row.answer] == right
            letters.add(row.answer)
        elif row.style == "short":
            assert row.answer == right
        else:
            assert row.answer == f"The answer is {right}."
    assert sum(true) == 10, "half are asked about a wrong label"
    assert letters == {"A", "B", "C"}


def test_rows_are_drawn_by_seed_and_task() -> None:
    answers = ["World", "Sports"] * 50
    one = restyle(answers, LABELS, "", 0.3, 1, "news")
    assert restyle(answers, LABELS, "", 0.3, 1, "news") == one
    assert restyle(answers, LABELS, "", 0.3, 2, "news") != one
    assert restyle(answers, LABELS, "", 0.3, 1, "old news") != one
    state = torch.get_rng_state()
    restyle(answers, LABELS, "", 0.3, 1, "news")
    assert torch.equal(torch.get_rng_state(), state)
    assert restyle(answers, LABELS, "", 0.0, 1, "news") == []


def test_more_labels_than_letters() -> None:
    labels = tuple(f"label{i}" for i in range(40))
    for row in restyle(list(labels), labels, "", 1.0, 0, "many"):
        if row.style == "choice":
            options = dict(OPTION.findall(row.before))
            assert len(options) == 26
            assert options[row.answer] == labels[row.number]
    assert len(answers_of(labels)) == 2 + 26 + 40 + 40


# -- in a stream ---------------------------------------------------------------------------------------------------

TASKS = ["toy-colours", "toy-sizes"]


def made(seed: int = 0, **settings: Any) -> Stream:
    values = {"tasks": TASKS, "tokenizer": "bytes", "train_samples": 60, "test_samples": 20, **settings}
    scenario = knobs.build(TextStream, values, "scenario")
    assert isinstance(scenario, TextStream)
    return scenario.stream(seed)


def test_the_only_label_is_never_asked_for_as_a_wrong_one() -> None:
    made = restyle(["World"] * 40, ["World"], "", 1.0, 7, "news")
    assert {row.answer for row in made if row.style == "yes-no"} == {"yes"}


def test_a_share_of_the_training_rows_is_in_other_styles(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cl_lab"):
        mixed = made(style_mix=0.2, max_prompt=200)
    assert "rewritten into other styles (yes-no, choice, short, brief): toy-colours 12, toy-sizes 12" in caplog.text
    plain = made()
    for one, other in zip(mixed.experiences, plain.experiences, strict=True):
        words = [[describe_row(s, BYTES, x) for x in e.train.x] for s, e in ((mixed, one), (plain, other))]
        changed = [(a, b) for a, b in zip(*words, strict=True) if a != b]
        assert len(changed) == 12
        for (prompt, _), (before, _) in changed:
            text = before.split("\n")[-2]
            assert text.startswith("the ")
            assert f"\n{text}\n" in prompt, "the same thing is asked about"
            assert "Name its" in prompt
        assert one.train.y.shape == other.train.y.shape
        assert (one.train.t == one.index).all()
        table = mixed.answers
        assert table is not None
        assert torch.equal(one.train.x[:, -table.shape[1] :], table[one.train.y].to(torch.int32))


def test_test_rows_and_classes_stay_as_they_are() -> None:
    mixed, plain = made(style_mix=0.5, scoring="constrained"), made(scoring="constrained")
    for one, other in zip(mixed.experiences, plain.experiences, strict=True):
        tested = [[describe_row(s, BYTES, x) for x in e.test.x] for s, e in ((mixed, one), (plain, other))]
        assert tested[0] == tested[1]
        assert len(one.classes) == len(other.classes)
        assert set(one.test.y.tolist()) <= set(one.classes)
        assert set(one.train.y.tolist()) - set(one.classes), "answers of other styles are none of the task's labels"
    assert mixed.chance == plain.chance


def test_the_seed_decides_on_rows_and_nothing_else() -> None:
    one, again, other = made(1, style_mix=0.3), made(1, style_mix=0.3), made(2, style_mix=0.3)
    assert one.answers is not None
    assert other.answers is not None
    assert torch.equal(one.answers, other.answers)
    assert one.layout == other.layout
    assert one.fingerprint() == other.fingerprint()
    for a, b, c in zip(one.experiences, again.experiences, other.experiences, strict=True):
        assert a.train.digest() == b.train.digest() != c.train.digest()
        first = a.train.digest()
        a.release()
        assert a.train.digest() == first


def test_tasks_without_labels_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = tmp_path / "free.jsonl"
    free.write_text("\n".join(f'{{"prompt": "What is {i}?", "answer": "It is {i}."}}' for i in range(20)))
    mixed, plain = made(tasks=[str(free), "toy-sizes"], style_mix=0.2), made(tasks=[str(free), "toy-sizes"])
    assert "style_mix: left as they are, having no texts with labels: free" in caplog.text
    words = [[describe_row(s, BYTES, x) for x in s.experiences[0].train.x] for s in (mixed, plain)]
    assert words[0] == words[1]
    with pytest.raises(ConfigError, match=r"style_mix = 0\.2: rewrites texts .* but no task has such; leave it out"):
        made(tasks=[str(free)], style_mix=0.2)


def test_what_does_not_fit_is_told() -> None:
    # "The answer is yellow." in bytes, and its end.
    with pytest.raises(
        DataError, match=r"max_answer = 12: 'The answer is yellow\.', an answer .* raise max_answer to 22"
    ):
        made(style_mix=0.2, max_answer=12)
    assert made(style_mix=0.2, max_answer=22).layout["answer"] == (22,)
    with pytest.raises(ConfigError, match=r"max_prompt = 60: a prompt of task 'toy-colours' takes .* raise it"):
        made(style_mix=1.0, max_prompt=60)
    with pytest.raises(ConfigError, match=r"scenario\.style_mix = 2: "):
        made(style_mix=2)
