"""Streams of texts: every layout, prompts and answers token by token, what is cut, held out, kept, and refused."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cl_lab import hub, knobs
from cl_lab.answers import grade_answers
from cl_lab.errors import ConfigError, DataError, UserError
from cl_lab.records import PAD, Experience, Stream, TensorData
from cl_lab.seeding import generator
from scenarios import _texts, text_stream
from scenarios._orders import limit_rows
from scenarios._texts import ORDERS, held_out
from scenarios.text_stream import TextStream, describe_row

SHARED = Path(os.environ.get("CL_LAB_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()

NEWS = ("World", "Sports", "Business", "Science or Technology")
LABELS_OF = {"QQP": ("True", "False"), "RTE": ("contradiction", "entailment"), "CB": ("neutral", "entailment")}
MOODS = ("bad", "good")


class Words:
    """A tokenizer that takes a word with the space before it as one token, as byte-pair encodings do."""

    end, size, key = 0, 1 << 30, "words"
    mark: tuple[int, ...] = ()
    pattern = r" ?\w+| ?[^\w\s]|\s"

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.asked = 0

    def encode(self, text: str) -> list[int]:
        self.asked += 1
        pieces = re.findall(self.pattern, text)
        assert "".join(pieces) == text
        tokens = [1000 + zlib.crc32(p.encode()) % (self.size - 1000) for p in pieces]
        self.known.update(zip(tokens, pieces, strict=True))
        return [*self.mark, *tokens]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(t) for t in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.known.get(t, "") for t in tokens)

    def chat(self, said: object) -> str:
        return f"[user] {said}\n[model]\n"


class Marked(Words):
    """A tokenizer that begins every text with a mark, as SentencePiece does."""

    key, mark = "marked", (7,)


TOKENIZERS: dict[str, Callable[[], Words]] = {"words": Words, "marked": Marked}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Words:
    """Data and cache are folders of the test; ``words`` and ``marked`` are tokenizers, this one the first."""
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CL_LAB_DATA", str(tmp_path / "data"))
    real, words = hub.load_tokenizer, Words()

    def load(name: str) -> Any:
        if name == "words":
            return words
        return TOKENIZERS[name]() if name in TOKENIZERS else real(name)

    monkeypatch.setattr(hub, "load_tokenizer", load)
    return words


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def labelled(labels: Sequence[str], each: int, words: str = "story", first: int = 0) -> list[dict[str, Any]]:
    """``each`` rows of each label, label by label, no text twice."""
    return [
        {"label": label, "sentence": f"{words} {i} on {label.lower()}"}
        for label in labels
        for i in range(first, first + each)
    ]


def label_task(folder: Path, labels: Sequence[str] = NEWS, train: int = 8, test: int = 3) -> Path:
    """A folder as CL_Benchmark has them."""
    write(folder / "labels.json", list(labels))
    write(folder / "train.json", labelled(labels, train, folder.name))
    write(folder / "test.json", labelled(labels, test, folder.name, first=1000))
    return folder


def question(i: int) -> dict[str, Any]:
    return {"prompt": f"What is {i} plus one?\nAnswer:", "answer": f"It is {i + 1}."}


def free_task(folder: Path, train: int = 12, test: int = 4) -> Path:
    """A folder as TRACE has them."""
    write(folder / "train.json", [question(i) for i in range(train)])
    write(folder / "test.json", [question(i) for i in range(train - 1, train - 1 + test)])
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """CL_Benchmark with two tasks, TRACE with one."""
    root = tmp_path / "data"
    label_task(root / "lm" / "CL_Benchmark" / "TC" / "agnews")
    label_task(root / "lm" / "CL_Benchmark" / "SC" / "Moods", MOODS)
    free_task(root / "lm" / "TRACE" / "Sums")
    return root


def made(tasks: Any, **settings: Any) -> Stream:
    scenario = knobs.build(TextStream, {"tasks": tasks, "tokenizer": "words", **settings}, "scenario")
    assert isinstance(scenario, TextStream)
    return scenario.stream(0)


def drawn(seed: int, tasks: Any, **settings: Any) -> Stream:
    return TextStream(tasks=tasks, tokenizer="words", **settings).stream(seed)


def said(stream: Stream, tokenizer: Any, part: TensorData) -> list[tuple[str, str]]:
    return [describe_row(stream, tokenizer, x) for x in part.x]


def names(stream: Stream) -> list[str]:
    return [e.name for e in stream.experiences]


# -- samples -------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_prompt_and_the_answer_behind_it(data: Path, tokenizer: Words) -> None:
    stream = made(["agnews", "Moods"])
    prompt, answer = (stream.layout[k][0] for k in ("prompt", "answer"))
    assert (stream.objective, stream.input_shape, stream.score) == ("language", (prompt + answer,), "accuracy")
    assert stream.answers is not None
    assert (stream.answers.shape, stream.answers.dtype) == ((6, answer), torch.int64)
    assert stream.answers[:4, 0].tolist() == [tokenizer.encode(f" {label.split()[0]}")[0] for label in NEWS]
    assert answer == 4, "' Science', ' or', ' Technology', end"
    assert stream.answers[0].tolist() == [*tokenizer.encode(" World"), tokenizer.end, PAD, PAD], "one token"
    for i, e in enumerate(stream.experiences):
        assert e.classes == ((0, 1, 2, 3), (4, 5))[i]
        for part in (e.train, e.test):
            assert (part.x.dtype, part.y.dtype) == (torch.int32, torch.int64)
            assert set(part.t.tolist()) == {i}
            for x, y in zip(part.x.tolist(), part.y.tolist(), strict=True):
                begins = next(k for k, token in enumerate(x) if token != PAD)
                assert PAD not in x[begins:prompt], "padding on the left only"
                assert x[prompt:] == stream.answers[y].tolist()
    rows = stream.experiences[0].train.x[:, :prompt]
    assert bool((rows[:, 0] != PAD).any()), "the longest prompt fills its columns"
    assert said(stream, tokenizer, stream.experiences[0].train)[8] == (
        f"Which subject does this text belong to? Reply with one of the options.\nOption: {', '.join(NEWS)}\n"
        "agnews 0 on sports\nAnswer:",
        " Sports",
    )
    assert said(stream, tokenizer, stream.experiences[1].test)[0][0].startswith("How does the author feel?"), "SC"


def test_one_wording_is_one_answer(data: Path) -> None:
    label_task(data / "lm" / "CL_Benchmark" / "SC" / "again", ("good", "Sports"))
    stream = made(["agnews", "moods", "again"])
    assert [e.classes for e in stream.experiences] == [(0, 1, 2, 3), (4, 5), (1, 5)]
    assert stream.n_classes == 6


def test_free_answers_are_those_met(data: Path, tokenizer: Words) -> None:
    stream = made(["Sums"])
    (e,) = stream.experiences
    assert e.classes == tuple(range(15)), "twelve trained on, of four tested on one of them"
    assert said(stream, tokenizer, e.train)[2] == ("What is 2 plus one?\nAnswer:", " It is 3.")
    assert said(stream, tokenizer, e.test)[0] == said(stream, tokenizer, e.train)[11]
    fewer = made(["Sums"], train_samples=5, test_samples=1)
    assert fewer.input_shape == stream.input_shape
    assert fewer.experiences[0].classes == tuple(range(fewer.n_classes))
    assert fewer.n_classes in (5, 6)


def test_an_answer_is_tokenised_as_it_stands_behind_the_prompt(data: Path) -> None:
    marked = Marked()
    stream = made(["agnews"], tokenizer="marked")
    assert stream.answers is not None
    assert stream.answers[1].tolist() == [marked.encode(" Sports")[1], 0, PAD, PAD], "the mark begins texts only"
    assert 7 in stream.experiences[0].train.x[0].tolist()


def test_a_tokenizer_that_keeps_the_space_apart_has_it_in_the_prompt(data: Path) -> None:
    stream = made(["Moods"], tokenizer="bytes", max_prompt=400, scoring="first-token")
    prompt, answer = describe_row(stream, hub.load_tokenizer("bytes"), stream.experiences[0].train.x[0])
    assert prompt.endswith("Answer: ")
    assert answer == "bad"


def test_the_chat_template_goes_around_the_prompt(data: Path, tokenizer: Words) -> None:
    stream = made(["agnews"], chat=True, template="answer", max_prompt=16)
    rows = said(stream, tokenizer, stream.experiences[0].train)
    around = "[user] {}\nAnswer:\n[model]\n"
    assert rows[0] == (around.format("agnews 0 on world"), "World"), (
        "the answer begins a line, no space is put before it"
    )
    assert rows[24] == (around.format("agnews ... technology"), "Science or Technology"), "the turns count and are kept"
    refused(
        {"tasks": ["agnews"], "chat": True, "tokenizer": "bytes"},
        ConfigError,
        "tokenizer 'bytes': has no chat template",
    )


# -- templates and cutting -----------------------------------------------------------------------------------------


def test_a_long_text_loses_its_middle(tmp_path: Path, tokenizer: Words, caplog: pytest.LogCaptureFixture) -> None:
    folder = label_task(tmp_path / "long", MOODS)
    words = " ".join(f"w{i}" for i in range(300))
    write(folder / "train.json", [*labelled(MOODS, 2), {"label": "bad", "sentence": words}])
    for _ in range(2):  # made, and from the cache
        caplog.clear()
        stream = made([str(folder)], max_prompt=50)
        (record,) = caplog.records
        assert record.getMessage() == (
            "text-stream: max_prompt = 50: the middle of a text was left out in long 1 of 11 rows; raise it to keep all"
        )
    assert stream.layout["prompt"] == (50,), "as many words are kept as fit"
    prompt, _ = said(stream, tokenizer, stream.experiences[0].train)[4]
    found = re.fullmatch(r".*\.\nOption: bad, good\n(w.*) \.\.\. (w.*)\nAnswer:", prompt)
    assert found is not None, prompt
    head, tail = (part.split(" ") for part in found.groups())
    assert head == [f"w{i}" for i in range(len(head))]
    assert tail == [f"w{i}" for i in range(300 - len(tail), 300)]
    assert len(head) - len(tail) in (0, 1)
    with pytest.raises(
        ConfigError, match=r"^max_prompt = 20: a prompt of task 'long' takes (\d+) tokens even with one .* above \1$"
    ):
        made([str(folder)], max_prompt=20)


def test_whole_prompts_keep_what_they_begin_and_end_with(tmp_path: Path, tokenizer: Words) -> None:
    long = {"prompt": f"Add them.\n{' + '.join(map(str, range(200)))}\nAnswer:", "answer": "19900"}
    folder = free_task(tmp_path / "free")
    write(folder / "train.json", [long, question(1)])
    stream = made([str(folder)], max_prompt=30)
    prompt, answer = said(stream, tokenizer, stream.experiences[0].train)[0]
    assert prompt.startswith("Add them.\n0 + 1")
    assert " ... " in prompt
    assert prompt.endswith("199\nAnswer:")
    assert answer == " 19900"


def test_a_script_without_spaces_is_cut_between_characters(tmp_path: Path) -> None:
    folder = free_task(tmp_path / "zh")
    write(folder / "train.json", [{"prompt": "判断以下文本的态度" * 20 + "\n态度：", "answer": "A"}])
    stream = made([str(folder)], tokenizer="bytes", max_prompt=60)
    prompt, _ = describe_row(stream, hub.load_tokenizer("bytes"), stream.experiences[0].train.x[0])
    assert prompt.startswith("判断以下文本")
    assert prompt.endswith("态度： ")
    assert "�" not in prompt
    assert len(prompt.encode()) > 55, "as much as fits"


def test_long_free_answers_are_cut_and_told(tmp_path: Path, tokenizer: Words, caplog: pytest.LogCaptureFixture) -> None:
    stream = made([str(free_task(tmp_path / "sums"))], max_answer=3)
    assert stream.layout["answer"] == (3,)
    assert stream.n_classes == 1, "what is left of them is the same"
    assert stream.answers is not None
    assert stream.answers.tolist() == [[*tokenizer.encode(" It is"), tokenizer.end]]
    assert "max_answer = 3: the end of a free answer was left out in sums 16 of 16 rows" in caplog.text


def test_templates(data: Path, tmp_path: Path, tokenizer: Words) -> None:
    def first(**settings: Any) -> str:
        stream = made(["agnews"], **settings)
        return said(stream, tokenizer, stream.experiences[0].train)[0][0]

    assert first(template="answer") == "agnews 0 on world\nAnswer:"
    assert first(template="plain") == "agnews 0 on world"
    own = write(tmp_path / "own.yaml", 'prompt: "{instruction} {text} [{options}] {{x}:"\ninstructions: {TC: "Topic?"}')
    with pytest.raises(ConfigError, match=r"unknown placeholder \{x\}; known: instruction"):
        first(template=str(own))
    write(own, 'prompt: "{instruction} {text} [{options}] is"\ninstructions: {TC: "Topic?", default: "Hm?"}')
    assert first(template=str(own)) == f"Topic? agnews 0 on world [{', '.join(NEWS)}] is"
    write(own, 'prompt: "{instruction} {text} ="\ninstructions: {AGnews: "News:", TC: "Topic?"}')
    assert first(template=str(own)) == "News: agnews 0 on world =", "a changed template is read again"
    write(own, 'prompt: "{text} ="\n')
    assert first(template=str(own)) == "agnews 0 on world ="


# -- finding tasks -------------------------------------------------------------------------------------------------


def test_a_task_is_found_by_its_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(made(["AGNEWS", "sc/moods", "sums"])) == ["agnews", "Moods", "Sums"]
    label_task(tmp_path / "other" / "CL_Benchmark" / "TC" / "agnews", train=2)
    stream = made(["agnews", "moods"], data_dir=str(tmp_path / "other"))
    assert [len(e.train) for e in stream.experiences] == [8, 16], "data_dir is searched first, then $CL_LAB_DATA"
    monkeypatch.delenv("CL_LAB_DATA")
    assert len(made(["agnews"], data_dir=str(data / "lm" / "CL_Benchmark")).experiences[0].train) == 32
    assert names(made(["mine"], data_dir=str(label_task(tmp_path / "more" / "mine").parent))) == ["mine"]


def test_a_task_is_a_folder_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = label_task(tmp_path / "one" / "news"), free_task(tmp_path / "two" / "sums")
    stream = made([str(one), str(two)])
    assert names(stream) == ["news", "sums"]
    monkeypatch.chdir(tmp_path)
    assert made(["one/news", "./two/sums/"]).fingerprint() == stream.fingerprint()
    free_task(tmp_path / "three" / "news")
    assert names(made(["one/news", "three/news"])) == ["one/news", "three/news"], "told apart by what was written"


def test_standard_orders(data: Path, tokenizer: Words) -> None:
    assert {len(ORDERS[f"order-{i}"]) for i in (1, 2, 3)} == {4}
    assert all(len(set(ORDERS[f"order-{i}"])) == 15 for i in (4, 5, 6))
    for name in ORDERS["order-4"]:
        label_task(data / "CL_Benchmark" / "some" / name, LABELS_OF.get(name, MOODS), train=2, test=1)
    for order, tasks in ORDERS.items():
        stream = made(order)
        assert names(stream) == list(tasks)
    assert ORDERS["order-1"] == ("dbpedia", "amazon", "yahoo", "agnews")
    asked = {e.name: said(stream, tokenizer, e.test)[0][0].partition("?")[0] for e in stream.experiences}
    assert asked["QQP"] == "Do the two questions ask the same thing"
    assert asked["RTE"] == asked["CB"] == "How is the second sentence related to the first", "known by name as well"
    assert asked["WiC"].startswith("Read the text. Reply"), "but these are not its labels"
    mixed = {tuple(names(drawn(seed, "order-1", shuffle_tasks=True))) for seed in range(5)}
    assert len(mixed) > 1
    assert len({tuple(names(drawn(seed, "order-1", shuffle_tasks=True, order_seed=1))) for seed in range(5)}) == 1


def as_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    # A line separator inside a text is no end of a line.
    return write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")


def as_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [*rows[0], "id"])  # the mark of UTF-8 stands before the first
        writer.writeheader()
        writer.writerows([{"id": i, **row} for i, row in enumerate(rows)])
    return path


def as_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize(
    ("suffix", "save"), [("json", write), ("jsonl", as_jsonl), ("csv", as_csv), ("parquet", as_parquet)]
)
def test_a_task_is_one_file(tmp_path: Path, tokenizer: Words, suffix: str, save: Callable[..., Path]) -> None:
    rows = [{"text": f'a "{i}",\nof two\u2028lines', "label": MOODS[i % 2]} for i in range(60)]
    stream = made([str(save(tmp_path / f"notes.{suffix}", rows))], template="plain", test_share=0.3)
    (e,) = stream.experiences
    assert e.name == "notes"
    tests = {p for p, _ in said(stream, tokenizer, e.test)}
    assert tests == {r["text"] for r in rows if text_stream.place_of(r["text"]) < 0.3}, "held out by hash"
    assert {p for p, _ in said(stream, tokenizer, e.train)} == {r["text"] for r in rows} - tests
    assert stream.answers is not None
    assert [tokenizer.decode(a.tolist()) for a in stream.answers] == [" bad", " good"], "labels in alphabetical order"


def test_spaces_around_the_names_of_columns_do_not_count(tmp_path: Path, tokenizer: Words) -> None:
    (e,) = (
        stream := made(
            [
                str(
                    write(
                        tmp_path / "a.csv", "text , label\n" + "".join(f"text {i}, {MOODS[i % 2]}\n" for i in range(8))
                    )
                )
            ]
        )
    ).experiences
    assert {answer for _, answer in said(stream, tokenizer, e.train)} == {" good", " bad"}


@pytest.mark.parametrize(
    ("name", "labels", "asked"),
    [
        ("amazon.csv", ("shoes", "hats"), "Read the text."),
        ("amazon.csv", ("Very positive", "very negative"), "How does the author feel?"),
        ("qqp.csv", ("yes", "no"), "Read the text."),
        ("qqp.csv", ("True", "False"), "Do the two questions ask the same thing?"),
        ("sc.csv", MOODS, "Read the text."),
        ("toy-colours.csv", ("red", "green"), "Read the text."),
    ],
)
def test_a_name_chooses_the_instruction_for_its_labels_alone(
    tmp_path: Path, tokenizer: Words, name: str, labels: tuple[str, str], asked: str
) -> None:
    """Whatever was kept of a file of the same name: what is asked is part of what is looked for."""
    path = as_csv(tmp_path / name, labelled(labels, 6))
    (e,) = (stream := made([str(path)])).experiences
    assert said(stream, tokenizer, e.train)[0][0].startswith(asked)
    folder = label_task(tmp_path / path.stem, labels)
    (e,) = (stream := made([str(folder)])).experiences
    assert said(stream, tokenizer, e.train)[0][0].startswith(asked)
    own = write(tmp_path / "own.yaml", f'prompt: "{{instruction}} {{text}}"\ninstructions: {{{path.stem}: "Hm?"}}')
    (e,) = (stream := made([str(path)], template=str(own))).experiences
    assert said(stream, tokenizer, e.train)[0][0].startswith("Hm?"), "who names a task means it"


def test_a_field_of_a_table_may_be_long(tmp_path: Path) -> None:
    """Python's own limit is 131,072 characters; it holds for other tables as before."""
    long, usual = "word " * 40_000, csv.field_size_limit()
    path = as_csv(tmp_path / "notes.csv", [{"text": long, "label": "good"}, {"text": "short", "label": "bad"}])
    assert [row["text"] for _, row in _texts.read_table(path)] == [long, "short"]
    assert csv.field_size_limit() == usual
    refused({"tasks": [str(write(tmp_path / "a.csv", 'text,label\na,"b\n'))]}, DataError, "broken CSV")
    assert csv.field_size_limit() == usual


def test_few_rows_are_divided_by_label(tmp_path: Path) -> None:
    path = write(tmp_path / "few.json", labelled(MOODS, 2))
    (e,) = made([str(path)], test_share=0.01).experiences
    assert e.train.y.tolist() == [0, 1]
    assert e.test.y.tolist() == [0, 1]
    (e,) = made([str(path)], test_share=0.99).experiences
    assert (len(e.train), len(e.test)) == (2, 2)


def test_rows_of_one_text_stay_on_one_side(tmp_path: Path, tokenizer: Words, caplog: pytest.LogCaptureFixture) -> None:
    """“ok” is below the share, and all of a label."""
    rows = [{"text": f"parcel {i}", "label": "delivery"} for i in range(100)]
    path = as_csv(tmp_path / "talk.csv", [*rows, *[{"text": "ok", "label": "smalltalk"}] * 100])
    for _ in range(2):  # made, and from the cache
        caplog.clear()
        (e,) = (stream := made([str(path)], template="plain")).experiences
        tests = [p for p, _ in said(stream, tokenizer, e.test)]
        assert sorted(tests) == sorted(r["text"] for r in rows if text_stream.place_of(r["text"]) < 0.2)
        assert len(e.train) == 200 - len(tests)
        (record,) = caplog.records
        assert record.getMessage().startswith("text-stream: labels without test rows: talk (smalltalk); add rows with ")
    free = as_jsonl(tmp_path / "f.jsonl", [question(i) for i in range(100)] + [{"prompt": "ok", "answer": "ok"}] * 100)
    (e,) = (stream := made([str(free)])).experiences
    tests = [p for p, _ in said(stream, tokenizer, e.test)]
    assert not set(tests) & {p for p, _ in said(stream, tokenizer, e.train)}
    assert abs(len(tests) - 40) < 10, "all of the repeats at once would be too many: other texts stand in for them"
    caplog.clear()
    (e,) = (stream := made([str(free)], holdout=0.3)).experiences
    tests = [p for p, _ in said(stream, tokenizer, e.test)]
    assert not set(tests) & {p for p, _ in said(stream, tokenizer, e.train)}
    assert 0.2 < len(tests) / (len(e.train) + len(tests)) < 0.4
    assert not caplog.records


def test_a_label_that_is_never_learnt_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = label_task(tmp_path / "news")
    write(folder / "train.json", labelled(NEWS[2:], 3))
    made([str(folder)])
    assert "text-stream: labels without training rows: news (World, Sports); add rows" in caplog.text
    caplog.clear()
    many = tuple(f"label {i}" for i in range(9))
    write((folder := label_task(tmp_path / "many", many)) / "test.json", labelled(many[:1], 3))
    made([str(folder)])
    assert "without test rows: many (label 1, label 2, label 3 and 5 more); add" in caplog.text


Division = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def texts_in_groups(seed: int, repeats: float) -> Division:
    """Places and groups of a few rows; that share of them is one text, and texts come in several groups."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    places = rng.random(n)
    if repeats:
        places = places[rng.integers(0, n, n)]
        places[rng.random(n) < repeats] = places[0]
    return places, rng.integers(0, rng.integers(1, 5), n)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_which_rows_are_held_out(share: float) -> None:
    for seed in range(200):
        places, groups = texts_in_groups(seed, 0)
        plain = places < share
        for group in np.unique(groups):  # published figures are of rows that were chosen so
            rows = np.flatnonzero(groups == group)
            if len(rows) > 1 and plain[rows].all():
                plain[rows[places[rows].argmax()]] = False
            elif len(rows) > 1 and not plain[rows].any():
                plain[rows[places[rows].argmin()]] = True
        assert (held_out(places, groups, share) == plain).all(), "without repeats: by the place alone"
    for seed in range(200):
        places, groups = texts_in_groups(seed, seed % 4 / 5)
        held = held_out(places, groups, share)
        sides = set(zip(places.tolist(), held.tolist(), strict=True))
        assert len(sides) == len(np.unique(places)), "a text of two labels is on one side as well"
        alone = held_out(places, np.zeros_like(groups), share)
        texts, times = np.unique(places, return_counts=True)
        if len(texts) > 1:
            assert 0 < alone.sum() < len(alone)
            chance = abs((texts < share).sum() - share * len(texts))
            assert abs(alone.sum() - share * len(alone)) <= chance + times.max(), "as near as whole texts can"
            # One more text, which is not held out where it need not be.
            more = held_out(np.append(places, 1.0), np.zeros(len(places) + 1, np.int64), share)
            assert (more[:-1] != alone).sum() <= 2 * times.max(), "hardly any other row moves"


def test_one_text_cannot_be_divided(tmp_path: Path) -> None:
    for labels in (("a",), ("a", "b")):
        rows = [{"text": f"of {label}", "label": label} for label in labels for _ in range(20)]
        path = write(tmp_path / "same.json", rows)
        told = f"same.json: too few different texts ({len(labels)} in {len(rows)} rows) to hold some out for testing"
        refused({"tasks": [str(path)]}, DataError, told)
    folder = free_task(tmp_path / "free")
    write(folder / "train.json", [question(1)] * 5)
    refused(
        {"tasks": [str(folder)], "holdout": 0.5},
        DataError,
        "holdout = 0.5: task 'free' has too few different texts (1 in 5 training rows); add more",
    )


def test_a_set_of_the_hub(tmp_path: Path, tokenizer: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(list[dict[str, Any]]):
        features: ClassVar[dict[str, Any]] = {"text": None, "label": types.SimpleNamespace(names=["neg", "pos"])}

    def load(identifier: str, configuration: str | None) -> dict[str, Split]:
        if identifier != "some/films":
            raise FileNotFoundError(f"no set '{identifier}'")
        rows = Split({"text": f"film {i}", "label": i % 2} for i in range(20))
        if configuration == "secret":
            return {"train": rows, "test": Split([{"text": "film", "label": -1}])}
        return {"train": rows} if configuration else {"train": rows, "validation": Split(rows[:4])}

    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"^tasks: 'hub:some/films' needs the package datasets; pip install"):
        made(["hub:some/films"])
    module: Any = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    stream = made(["hub:some/films"])
    (e,) = stream.experiences
    assert (e.name, len(e.train), len(e.test)) == ("films", 20, 4)
    assert said(stream, tokenizer, e.train)[1][1] == " pos"
    assert len(made(["hub:some/films:alone"]).experiences[0].train) < 20, "no test split: test_share holds some out"
    with pytest.raises(DataError, match=r"hub:some/films:secret \(test\): holds no rows with an answer"):
        made(["hub:some/films:secret"])
    with pytest.raises(DataError, match=r"'hub:nothing' cannot be loaded \(FileNotFoundError: no set 'nothing'\)"):
        made(["hub:nothing"])


# -- samples drawn, held out, kept ---------------------------------------------------------------------------------


def test_samples_are_drawn_evenly(data: Path, tokenizer: Words) -> None:
    def counts(part: TensorData) -> list[int]:
        return part.y.bincount(minlength=6).tolist()

    stream = drawn(0, ["agnews", "Moods"], train_samples=10, test_samples=4)
    assert sorted(counts(stream.experiences[0].train)) == [0, 0, 2, 2, 3, 3]
    assert counts(stream.experiences[0].test) == [1, 1, 1, 1, 0, 0]
    assert counts(stream.experiences[1].train) == [0, 0, 0, 0, 5, 5]
    other = drawn(1, ["agnews", "Moods"], train_samples=10, test_samples=4)
    assert other.fingerprint() == stream.fingerprint(), "the test rows are the same for every seed"
    assert said(other, tokenizer, other.experiences[0].train) != said(stream, tokenizer, stream.experiences[0].train)
    turned = drawn(0, ["Moods", "agnews"], train_samples=10)
    assert said(turned, tokenizer, turned.experiences[1].train) == said(stream, tokenizer, stream.experiences[0].train)
    assert [len(e.train) for e in drawn(0, ["agnews"], train_samples=999).experiences] == [32]


def test_free_answers_are_drawn_as_they_are(tmp_path: Path, tokenizer: Words) -> None:
    """Equally many of each would be 1 in 200 of the commonest: a test set of none but rarities."""
    rows = [{"prompt": f"{i}?", "answer": "yes" if i % 5 < 3 else f"on day {i}"} for i in range(1000)]
    folder = tmp_path / "free"
    for part in ("train", "test"):
        write(folder / f"{part}.json", rows)
    sizes: dict[str, Any] = {"train_samples": 200, "test_samples": 200}
    stream, other = (drawn(seed, [str(folder)], **sizes) for seed in (0, 1))
    for some in (stream, other):
        for rows_of in (some.experiences[0].train, some.experiences[0].test):
            common = sum(answer == " yes" for _, answer in said(some, tokenizer, rows_of))
            assert abs(common / 200 - 0.6) < 4 * (0.6 * 0.4 / 200) ** 0.5
    (one,), (two,) = stream.experiences, other.experiences
    assert said(stream, tokenizer, one.test) == said(other, tokenizer, two.test), "the same for every seed"
    assert said(stream, tokenizer, one.train) != said(other, tokenizer, two.train)
    write(folder / "labels.json", sorted({row["answer"] for row in rows}))
    (e,) = drawn(0, [str(folder)], template="plain", **sizes).experiences
    assert e.train.y.bincount().max() == 1, "with a fixed set they are labels"


def test_labels_are_drawn_as_ever(data: Path, tokenizer: Words) -> None:
    """Which rows they are is part of published figures."""
    train = json.loads((data / "lm" / "CL_Benchmark" / "TC" / "agnews" / "train.json").read_text())
    y = torch.tensor([NEWS.index(row["label"]) for row in train])
    rows = limit_rows(torch.arange(len(y)), y, 10, generator(3, "train_samples", "agnews"))
    stream = drawn(3, ["agnews"], train_samples=10, template="plain")
    assert [p for p, _ in said(stream, tokenizer, stream.experiences[0].train)] == [train[i]["sentence"] for i in rows]


def test_equal_files_give_equal_streams_wherever_they_lie(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs: dict[str, Any] = {"train_samples": 9, "holdout": 0.3}
    one = drawn(3, ["agnews", "Sums"], **knobs)
    data.rename(tmp_path / "moved")
    monkeypatch.setenv("CL_LAB_DATA", str(tmp_path / "moved"))
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path / "nothing kept"))
    two = drawn(3, ["agnews", "Sums"], **knobs)
    assert one.fingerprint() == two.fingerprint()
    for a, b in zip(one.experiences, two.experiences, strict=True):
        assert a.train.digest() == b.train.digest()


def test_what_is_tokenised_is_kept(data: Path, tokenizer: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(["agnews", "Sums"])
    asked = tokenizer.asked
    assert asked > 50
    with monkeypatch.context() as patch:
        patch.setattr(_texts, "read_table", lambda path: pytest.fail(f"{path} was read again"))
        two = made(["Sums", "agnews"])
        assert tokenizer.asked == asked, "nothing is tokenised again, in another order either"
        made(["agnews"], train_samples=4, holdout=0.2, scoring="constrained")
        assert tokenizer.asked == asked
    assert one.experiences[0].train.x.sort(1).values.tolist() == two.experiences[1].train.x.sort(1).values.tolist()
    train = data / "lm" / "TRACE" / "Sums" / "train.json"
    write(train, [question(100), *json.loads(train.read_text())[1:]])
    assert said(made(["Sums"]), tokenizer, made(["Sums"]).experiences[0].train)[0][1] == " It is 101."
    for settings in ({"max_answer": 9}, {"max_prompt": 90}, {"template": "answer"}, {"chat": True}):
        asked = tokenizer.asked
        made(["agnews"], **settings)
        assert tokenizer.asked > asked, settings


def test_a_cache_that_cannot_be_written_is_done_without(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one = made(["agnews"])
    monkeypatch.setenv("CL_LAB_CACHE", str(write(tmp_path / "file", "")))
    assert made(["agnews"]).fingerprint() == one.fingerprint()


@pytest.mark.parametrize("name", ["agnews", "Sums", "one file"])
def test_a_hold_out_divides_the_training_rows(data: Path, tmp_path: Path, tokenizer: Words, name: str) -> None:
    if name == "one file":
        name = str(write(tmp_path / "file.json", labelled(NEWS, 30)))
    whole = made([name])
    stream = drawn(5, [name], holdout=0.25)

    def rows(experience: Experience, part: str, of: Stream) -> set[tuple[str, str]]:
        return set(said(of, tokenizer, getattr(experience, part)))

    (all_,), (e,) = whole.experiences, stream.experiences
    train, test = rows(e, "train", stream), rows(e, "test", stream)
    assert train
    assert test
    assert not train & test
    assert train | test == rows(all_, "train", whole)
    if name != "Sums":
        assert set(e.test.y.tolist()) == set(e.classes), "some of each label"
        assert not test & rows(all_, "test", whole)
    else:
        assert stream.n_classes == 12, "answers of the test rows alone are not there"
    assert drawn(6, [name], holdout=0.25).fingerprint() == stream.fingerprint()


def test_held_out_rows_do_not_come_from_those_that_divided_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "file.json", labelled(MOODS, 200))
    (e,) = made([str(path)], test_share=0.3, holdout=0.3).experiences
    assert 0.2 < len(e.test) / (len(e.train) + len(e.test)) < 0.4, "another hash: all that is left is above the share"


def test_with_a_hold_out_the_test_rows_are_not_looked_at(data: Path) -> None:
    test = data / "lm" / "TRACE" / "Sums" / "test.json"
    stream = made(["Sums"], holdout=0.3)
    write(test, [{"prompt": "long " * 200, "answer": "one two three four five six seven eight"}])
    assert made(["Sums"], holdout=0.3).fingerprint() == stream.fingerprint()
    assert made(["Sums"], holdout=0.3).layout == stream.layout
    assert made(["Sums"]).layout["prompt"] == (128,)


def test_rows_without_a_right_answer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = label_task(tmp_path / "mnli", MOODS)
    write(folder / "test.json", [{"label": "-", "sentence": "unclear"}, *labelled(MOODS, 2)])
    assert len(made([str(folder)]).experiences[0].test) == 4
    assert "which have no right answer, were left out: mnli 1" in caplog.text


def test_the_toys_need_nothing() -> None:
    stream = TextStream(**(TextStream.conformance_knobs() or {})).stream(0)
    assert names(stream) == ["toy-colours", "toy-sizes"]
    assert [(len(e.train), len(e.test), len(e.classes)) for e in stream.experiences] == [(48, 24, 4), (48, 24, 3)]
    assert sum(stream.input_shape) < 60
    for scoring in ("constrained", "first-token"):
        made(["toy-colours", "toy-sizes"], tokenizer="bytes", scoring=scoring)
    prompt, answer = describe_row(stream, hub.load_tokenizer("bytes"), stream.experiences[1].train.x[0])
    assert answer in ("huge", "medium", "tiny")
    assert prompt.split()[1] in _texts.TOYS["toy-sizes"][answer]


# -- free answers that are compared --------------------------------------------------------------------------------


def test_free_answers_are_compared_with_their_whole_text(data: Path, tmp_path: Path, tokenizer: Words) -> None:
    """Two answers that are the same once they are cut are one where they must be exact, and two where they are compared."""
    rows = [{"prompt": f"{i}?", "answer": f"one two three {'four' if i % 2 else 'five'}"} for i in range(8)]
    folder = tmp_path / "alike"
    for part in ("train", "test"):
        write(folder / f"{part}.json", rows)
    exact = made([str(folder), "agnews"], max_answer=4)
    assert len(exact.experiences[0].classes) == 1
    assert exact.measures == exact.references == ()
    stream = made([str(folder), "agnews"], max_answer=4, measure="rouge-l")
    assert stream.measures == ("rouge-l", "exact"), "a task with labels has right answers and wrong ones"
    assert stream.score == "answer score"
    first, second = stream.experiences
    assert [stream.references[y] for y in first.test.y.tolist()] == [row["answer"] for row in rows]
    assert {stream.references[y] for y in second.test.y.tolist()} == {""}
    assert {answer for _, answer in said(stream, tokenizer, first.test)} == {" one two three"}
    assert made([str(folder)], measure="f1").score == "word F1"
    assert made([str(folder)], measure="f1").fingerprint() != made([str(folder)], measure="rouge-l").fingerprint()


def test_of_an_answer_with_reasons_the_first_line_counts(data: Path, tmp_path: Path) -> None:
    """As TRACE scores ScienceQA: reasons are learnt as far as they fit, the choice before them is what is right or wrong."""
    rows = [{"prompt": f"{i}?", "answer": f"{'AB'[i % 2]}\nfor reason {i} of many"} for i in range(8)]
    for part in ("train", "test"):
        write(tmp_path / "chosen" / f"{part}.json", rows)
    stream = made([str(tmp_path / "chosen"), "agnews"], max_answer=6, measure={"chosen": "first-line"})
    assert stream.measures == ("first-line", "exact")
    assert stream.score == "accuracy", "both count right answers"

    class Lines(Words):
        def decode(self, tokens: Sequence[int]) -> str:
            return "b\nanother reason" if tokens else ""

    stream = replace(stream, tokenizer=Lines())
    batch = stream.experiences[0].test.batch(torch.arange(8))
    grades = grade_answers(batch, lambda some: torch.eye(3)[0].expand(len(some), 6, -1), stream)
    assert grades.value.tolist() == [0.0, 1.0] * 4
    assert not grades.valid.any()
    assert not grades.broken.any()


def test_a_measure_for_each_task(data: Path) -> None:
    tasks = ["agnews", "Sums", "Moods"]
    stream = made(tasks, measure={"Sums": "f1", "Moods": "rouge-l"}, shuffle_tasks=True, order_seed=1)
    assert dict(zip(names(stream), stream.measures, strict=True)) == {
        "agnews": "exact",
        "Sums": "f1",
        "Moods": "rouge-l",
    }
    moods = stream.experiences[names(stream).index("Moods")]
    assert {stream.references[c] for c in moods.classes} == set(MOODS)


def test_a_run_is_scored_by_overlap(data: Path, tmp_path: Path) -> None:
    """From the configuration to the document: scores are shares of words, the table of answers is not listed."""
    from cl_lab import experiment
    from cl_lab.config import parse

    config = parse(
        {
            "scenario": {
                "name": "text-stream",
                "tasks": ["Sums"],
                "tokenizer": "bytes",
                "max_answer": 16,
                "measure": "rouge-l",
            },
            "model": {"name": "causal-lm", "weights": "tiny", "adapt": "full"},
            "strategy": "naive",
            "training": {"lr": 0.02, "optimizer": "adam", "epochs": 40, "batch_size": 6},
            "tracking": {"uri": None},
        },
        "test",
    )
    document = experiment.run(config, tmp_path / "run")
    assert document["score"] == "ROUGE-L"
    (told,) = document["experiences"]
    assert told["measure"] == "rouge-l"
    assert told["answers"] == 15
    assert "classes" not in told
    assert 0 <= document["initial"][0] < 0.2
    assert document["matrix"][0][0] > 0.5, "“It is 5.” has two words of three in “It is 12.”"
    assert document["valid"] == []


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(settings: dict[str, Any], kind: type[UserError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        made(**settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": "order-7"}, "scenario.tasks = 'order-7': no standard order; did you mean 'order-"),
        (
            {"tasks": ["agnews"], "measure": "f1"},
            "measure = 'f1': compares free answers, but every task has labels; leave it out, or name a task "
            "(measure={agnews: f1})",
        ),
        (
            {"tasks": ["agnews"], "measure": {"agnew": "f1"}},
            "measure: 'agnew' is none of the tasks; did you mean 'agnews'?",
        ),
        (
            {"tasks": ["agnews"], "measure": {"agnews": "f1"}, "scoring": "constrained"},
            "measure = 'f1': compares what is written, but scoring is 'constrained'; set scoring=generation",
        ),
        ({"tasks": ["agnews"], "measure": "rouge"}, "scenario.measure = 'rouge': "),
        ({"tasks": "agnews"}, "for tasks give a list (tasks=[agnews])"),
        ({"tasks": []}, "scenario.tasks = []: must name one task at least"),
        ({"tasks": ["agnews", "agnews"]}, "scenario.tasks: 'agnews' is named twice"),
        ({"tasks": ["agnews", "order-1"]}, "scenario.tasks: 'order-1' is a standard order, not a task; give it alone"),
        ({"tasks": ["agnews", "TC/AGnews"]}, "tasks: 'agnews' and 'TC/AGnews' are the same task ("),
        (
            {"template": "option"},
            "scenario.template = 'option': no built-in template and no file; did you mean 'options'?",
        ),
        ({"template": "no.yaml"}, "or the path of a YAML file"),
        (
            {"tasks": ["Sums"], "template": "options"},
            "lists options, but task 'Sums' has free answers; use template=plain",
        ),
        (
            {"tasks": ["agnews", "Sums"], "scoring": "constrained"},
            "scoring = 'constrained': task 'Sums' has free answers",
        ),
        ({"tasks": ["Sums"], "scoring": "first-token"}, "use scoring=generation, or list its answers in labels.json"),
        ({"scoring": "exact"}, "scenario.scoring = 'exact'"),
        ({"holdout": 1.0}, "scenario.holdout = 1.0"),
        ({"tokenizer": "/no/such/tokenizer"}, "/no/such/tokenizer"),
    ],
)
def test_settings_that_cannot_be(data: Path, settings: dict[str, Any], says: str) -> None:
    refused({"tasks": ["agnews"], **settings}, ConfigError, says)


def test_labels_that_begin_alike_have_no_first_token(data: Path, tmp_path: Path) -> None:
    task = str(label_task(tmp_path / "alike", ("very good", "very bad")))
    refused({"tasks": [task], "scoring": "first-token"}, DataError, "answers of 'alike' begin with the same token")
    made([task], scoring="constrained")


def test_a_task_that_is_not_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        {"tasks": ["agnew"], "data_dir": str(tmp_path / "elsewhere")},
        DataError,
        f"task 'agnew' not found below {tmp_path / 'elsewhere'}, {tmp_path / 'data'}, ",
        "lm/CL_Benchmark",
        "did you mean 'agnews'?",
        "CL_LAB_DATA=",
    )
    label_task(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    refused({"tasks": ["here"]}, DataError, "for the folder of that name that is here write ./here")
    assert made(["./here"])
    refused({"tasks": ["xyz"]}, DataError, "known: Moods, Sums, agnews, toy-colours, toy-sizes")
    refused({"tasks": [str(tmp_path / "no.jsonl")]}, DataError, "no.jsonl' not found")
    refused(
        {"tasks": [str(write(tmp_path / "notes.txt", ""))]}, DataError, "notes.txt: unknown format '.txt'; give .json"
    )
    label_task(data / "lm" / "CL_Benchmark" / "NLI" / "agnews")
    refused({"tasks": ["agnews"]}, DataError, "task 'agnews' is there 2 times (", "name its folder, too")
    made(["tc/agnews"])


def test_a_folder_without_both_parts(data: Path) -> None:
    folder = data / "lm" / "CL_Benchmark" / "TC" / "agnews"
    (folder / "test.json").unlink()
    refused(
        {"tasks": ["agnews"]}, DataError, "agnews has no test.json beside train.json; add one, or give ", "test_share"
    )
    assert len(made([str(folder / "train.json")]).experiences[0].test) > 0, "what the message proposes"
    (folder / "train.json").unlink()
    refused({"tasks": [str(folder)]}, DataError, "agnews has no train.json (or .jsonl, .csv, .parquet)")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.json", [], "train.json: holds no rows"),
        ("test.json", [], "test.json: holds no rows"),
        ("test.json", [{"label": "-", "sentence": "x"}], "test.json: holds no rows with an answer"),
        ("train.json", {"label": "World"}, "train.json: holds a dict, not a list of rows"),
        ("train.json", '[\n{"label": "World", "sentence": "a"},\n{"label" "b"}]', "train.json, line 3: broken JSON ("),
        (
            "train.json",
            '{"a": 1}\n{"a": 2}',
            "line 2: broken JSON (Extra data at column 1); correct it, or call it .jsonl",
        ),
        (
            "train.json",
            [{"topic": "World", "body": "a"}],
            "train.json, row 1: has columns 'topic', 'body'; needs prompt and answer, or label and sentence (or text)",
        ),
        (
            "train.json",
            [{"label": "World", "sentence": "a"}, {"label": "World", "sentense": "a"}],
            "train.json, row 2: has columns 'label', 'sentense'; needs sentence and label",
        ),
        ("train.json", ["World"], "train.json, row 1: has a str; needs prompt and answer"),
        (
            "test.json",
            [{"label": None, "sentence": "a"}],
            "test.json, row 1: label = None; every row needs a text there",
        ),
        ("test.json", [{"label": "World", "sentence": " "}], "test.json, row 1: sentence = ' '; every row needs"),
        (
            "train.json",
            [{"label": "World", "sentence": "a"}, {"label": "Wolrd", "sentence": "a"}],
            "train.json, row 2: 'Wolrd' is no label of ",
        ),
        ("train.json", [{"label": "Wolrd", "sentence": "a"}], "labels.json; did you mean 'World'?; correct it"),
        (
            "test.json",
            [{"prompt": "a", "answer": "b"}],
            "test.json, row 1: has columns 'prompt', 'answer'; needs sentence and",
        ),
        ("labels.json", {"World": 0}, "labels.json: must hold a list of labels"),
        ("labels.json", "[", "labels.json, line 1: broken JSON"),
    ],
)
def test_files_that_are_not_as_they_should_be(data: Path, name: str, content: Any, says: str) -> None:
    write(data / "lm" / "CL_Benchmark" / "TC" / "agnews" / name, content)
    refused({"tasks": ["agnews"]}, DataError, "text-stream: ", says)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "a", "label": "b"}\n\n{"text": "a"\n', "a.jsonl, line 3: broken JSON ("),
        (
            "a.jsonl",
            '{"text": "a", "label": "b"}\n{"text": "a"}\n',
            "a.jsonl, line 2: has columns 'text'; needs text and label",
        ),
        ("a.csv", "text,label\na,b\nc\n", "a.csv, line 3: has 1 columns, the header 2; give the line all of them"),
        ("a.csv", "text;label\na;b\n", "a.csv, line 2: has columns 'text;label'; needs prompt and answer"),
        (
            "a.jsonl",
            '{"text": "a", "label ": "b"}\n',
            "a.jsonl, line 1: has columns 'text', 'label '; needs prompt and answer",
        ),
        ("a.csv", "text,label, text\na,b,c\n", "a.csv: column 'text' is there twice; rename one of them"),
        ("a.json", "[" * 50_000, "a.json: brackets are nested too deeply to be read; write rows such as {"),
        ("a.jsonl", '{"text": 1, "label": 1}\n' + '{"a":' * 50_000, "a.jsonl, line 2: brackets are nested too deeply"),
        ("a.json", f"[{'1' * 5000}]", "a.json: a number has too many digits to be read"),
        ("a.csv", "text,label\nhello,b\n", "a.csv: too few rows (1) to hold some out for testing; add more"),
        ("a.csv", 'text,label\na,"b\n', "broken CSV (unexpected end of data)"),
        ("a.csv", "", "a.csv: holds no rows"),
        (
            "a.csv",
            "text,label\na,b\none, two,b\n",
            "a.csv, line 3: has 3 columns, the header 2; put a text that holds a comma in quotes",
        ),
        ("a.csv", "text,label,text\na,b,c\n", "a.csv: column 'text' is there twice; rename one of them"),
        (
            "a.jsonl",
            '{"text": "a", "label": "b"}\n{"text": "a", "label": NaN}\n',
            "a.jsonl, line 2: label = nan; every row needs a text there",
        ),
        ("a.json", '[{"text": "a", "label": -Infinity}]', "a.json, row 1: label = -inf; every row needs a text there"),
        ("a.parquet", "text", "a.parquet: cannot be read as parquet ("),
        ("a.json", [{"text": "a", "label": "b"}], "a.json: too few rows (1) to hold some out for testing"),
    ],
)
def test_single_files_that_are_not_as_they_should_be(tmp_path: Path, name: str, content: Any, says: str) -> None:
    refused({"tasks": [str(write(tmp_path / name, content))]}, DataError, "text-stream: ", says)


def test_other_bytes_than_text(tmp_path: Path, tokenizer: Words) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ncafé,b\n".encode("latin-1"))
    refused({"tasks": [str(path)]}, DataError, "latin.csv is not UTF-8 (")
    half = write(tmp_path / "half.json", '[{"prompt": "a\\ud83d", "answer": "b"}, {"prompt": "c", "answer": "b"}]')
    stream = made([str(half)], test_share=0.5)
    rows = said(stream, tokenizer, stream.experiences[0].train) + said(stream, tokenizer, stream.experiences[0].test)
    assert {p for p, _ in rows} == {"a�", "c"}, "half of a surrogate pair is no character"


def test_labels_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    refused(
        {"tasks": ["agnews"], "max_answer": 3},
        DataError,
        "max_answer = 3: label 'Science or Technology' of task 'agnews' takes 4 tokens, its end included; raise max_answer "
        "to 4",
    )
    assert made(["agnews"], max_answer=4).layout["answer"] == (4,)
    one = label_task(tmp_path / "one", MOODS)
    write(one / "train.json", labelled(MOODS[:1], 1))
    for share in (0.01, 0.99):  # on either side there would be none
        says = f"holdout = {share}: task 'one' has too few training rows (1)"
        refused({"tasks": [str(one)], "holdout": share}, DataError, says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "cannot be read as YAML"),
        ("text: x", "has no key 'prompt' with a text"),
        ('prompt: "{text}"\ninstruction: x', "unknown key 'instruction'; did you mean 'instructions'?"),
        ('prompt: "{text}"\ninstructions: x', "instructions must be texts by name"),
        ('prompt: "{txt}"', "unknown placeholder {txt}; did you mean 'text'?"),
        ('prompt: "{text} {prompt}"', "must hold {text} once"),
        ('prompt: "Answer:"', "must hold {text} once"),
    ],
)
def test_templates_that_cannot_be(data: Path, tmp_path: Path, content: str, says: str) -> None:
    path = write(tmp_path / "own.yaml", content)
    refused({"tasks": ["agnews"], "template": str(path)}, ConfigError, f"scenario.template = '{path}': ", says)


# -- the sets themselves -------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (SHARED / "lm" / "CL_Benchmark").is_dir(), reason=f"no {SHARED}/lm/CL_Benchmark on this machine"
)
def test_the_sets_themselves() -> None:
    stream = made("order-1", tokenizer="bytes", max_prompt=384, train_samples=40, test_samples=20, data_dir=str(SHARED))
    assert names(stream) == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert [len(e.classes) for e in stream.experiences] == [14, 5, 10, 4]
    assert stream.n_classes == 32, "Sports is a label of yahoo and of agnews"
    assert {(len(e.train), len(e.test)) for e in stream.experiences} == {(40, 20)}
    for e in stream.experiences:
        for x, y in zip(e.test.x, e.test.y.tolist(), strict=True):
            prompt, answer = describe_row(stream, hub.load_tokenizer("bytes"), x)
            assert prompt.endswith("\nAnswer: ")
            options = prompt.partition("Option: ")[2].partition("\n")[0].split(", ")
            assert answer in options
            assert y in e.classes
    free = made(["FOMC"], tokenizer="bytes", data_dir=str(SHARED), train_samples=10)
    assert free.n_classes == 3


@pytest.mark.skipif(
    not (SHARED / "lm" / "CL_Benchmark").is_dir(), reason=f"no {SHARED}/lm/CL_Benchmark on this machine"
)
def test_the_sets_have_their_instructions() -> None:
    """As folders of the benchmark, and as those of the same name elsewhere."""
    kinds = {
        **dict.fromkeys(("agnews", "dbpedia", "yahoo"), "TC"),
        **dict.fromkeys(("amazon", "yelp", "SST-2"), "SC"),
        "MNLI": "NLI",
        **{name: name for name in ("QQP", "BoolQA", "WiC")},
    }
    for task in _texts.find_tasks(tuple(kinds), str(SHARED), 0.2):
        texts = task.read()
        assert task.kind_with(texts.labels) == kinds[task.name]
        kind, known = _texts._kind(task.name)
        assert kind == kinds[task.name]
        assert known == frozenset(label.lower() for label in texts.labels or ())
