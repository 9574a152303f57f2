"""Probes beside a stream: against sums over whole texts, models that say known things, and runs without probes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import experiment, hub
from cl_lab.config import parse
from cl_lab.drift import Probes, make_probes
from cl_lab.errors import ConfigError, DataError, UserError
from cl_lab.probe_texts import PARAGRAPHS, QUESTIONS
from cl_lab.records import PAD, Batch, Stream
from cl_lab.tracking import drift_numbers
from scenarios.biography import Biography
from scenarios.edit_stream import EditStream
from scenarios.text_stream import TextStream

BYTES = hub.load_tokenizer("bytes")
LM = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}
TRAINING = {"lr": 0.01, "optimizer": "adam", "epochs": 1, "batch_size": 24}


def on(**settings: Any) -> Stream:
    return TextStream(**{**(TextStream.conformance_knobs() or {}), "scoring": "first-token", **settings}).stream(0)


def test_the_set_is_well_made() -> None:
    assert len(QUESTIONS) == 4
    asked = [question for own in QUESTIONS.values() for question, _ in own]
    assert len(asked) == len(set(asked)) == 40
    for own in QUESTIONS.values():
        for _, options in own:
            assert len(set(options)) == 4
            assert max(map(len, options)) <= 2.5 * min(map(len, options)), "no option wins by being short"
    assert len(set(PARAGRAPHS)) == 10


def test_every_token_is_asked_for_once(tmp_path: Path) -> None:
    """Pieces of A tokens, each behind up to P tokens of its own text."""
    path = tmp_path / "own.txt"
    path.write_text("One text that is longer than a row.\nStill the first.\n\n \n\nzwei\n", encoding="utf-8")
    stream = on()
    probes = make_probes(stream, str(path))
    (prompt,), (answer,) = stream.layout["prompt"], stream.layout["answer"]
    assert probes.texts == 2
    for i, text in enumerate(("One text that is longer than a row.\nStill the first.", "zwei")):
        rows = (probes.of == i).nonzero().flatten()
        assert len(rows) == math.ceil(len(text) / answer)
        tokens = probes.said[rows]
        assert BYTES.decode(tokens[tokens != PAD].tolist()) == text
        for k, row in enumerate(rows.tolist()):
            before = [256, *text[: k * answer].encode()][-prompt:]
            x = probes.data.x[row].tolist()
            assert [t for t in x[:prompt] if t != PAD] == before
            assert x[prompt - len(before) : prompt] == before
    options = probes.said[probes.of == 2]
    assert BYTES.decode(options[options != PAD].tolist()) == " Paris"
    assert len(probes.questions) == 40


def by_hand(made: Any, probes: Probes, row: int) -> float:
    """Of one row: its tokens alone, with nothing masked, through the decoder and the head."""
    x = probes.data.x[row]
    tokens = x[x != PAD].long()
    said = probes.said[row]
    said = said[said != PAD]
    model = made.learner.model
    with torch.no_grad():
        h = model.backbone.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        log_p = model.head.linear(h).double().log_softmax(1)
    places = torch.arange(len(tokens) - len(said), len(tokens))
    return float(log_p[places - 1, said].sum())


@pytest.mark.parametrize("batch_size", [7, 500])
def test_log_likelihoods_are_those_of_the_texts_alone(batch_size: int) -> None:
    stream = on()
    made = toys.trainer([{"name": "naive"}], stream, model=LM)
    probes = make_probes(stream)
    some = torch.arange(0, len(probes.of), 97)
    found = made.learner.log_likelihoods(probes.data.take(some), probes.said[some], batch_size)
    expected = [by_hand(made, probes, row) for row in some.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_model_that_guesses_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    stream = on()
    made = toys.trainer([{"name": "naive"}], stream, model=LM)
    probes = make_probes(stream)

    def uniform(batch: Batch) -> Tensor:
        return torch.zeros(len(batch), stream.layout["answer"][0], BYTES.size)

    results = probes.results(made.learner.log_likelihoods(probes.data, probes.said, 500, uniform))
    assert results["perplexity"] == pytest.approx(BYTES.size)
    shares = {
        topic: sum(all(len(options[0]) < len(o) for o in options[1:]) for _, options in own) / len(own)
        for topic, own in QUESTIONS.items()
    }
    assert results["general"] == shares, "where all tokens are alike the shortest is likeliest, and no tie is right"


def test_right_is_what_is_likelier_than_every_other() -> None:
    data = make_probes(on()).data.take(torch.arange(5))
    said = torch.tensor([[1, 1], [1, PAD], [1, 1], [1, 1], [1, 1]])
    probes = Probes(data, said, torch.tensor([0, 0, 1, 2, 2]), 1, (("a", 2),))
    right = probes.results(torch.tensor([-1.0, -2.0, -3.0, -1.0, -2.1], dtype=torch.float64))
    assert right == {"perplexity": pytest.approx(math.e), "general": {"a": 1.0}}, "3 nats over 3 tokens; −3 > −3.1"
    tie = probes.results(torch.tensor([-1.0, -2.0, -3.0, -1.0, -2.0], dtype=torch.float64))
    assert tie["general"] == {"a": 0.0}
    far = probes.results(torch.tensor([-1e9, -2.0, -3.0, -1.0, -2.0], dtype=torch.float64))
    assert math.isfinite(far["perplexity"])
    assert drift_numbers({"perplexity": 2.0, "general": {"a": 0.5, "b": 1.0}}) == {
        "drift/perplexity": 2.0,
        "drift/general": 0.75,
        "drift/general_a": 0.5,
        "drift/general_b": 1.0,
    }


def test_what_is_edited_is_no_general_knowledge(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "cl_lab")
    stream = EditStream(tokenizer="bytes", experiences=6, per_experience=10).stream(0)
    subjects = {edit.subject.removeprefix("the ") for e in stream.experiences for edit in e.edits if edit.subject}
    left = [q for own in QUESTIONS.values() for q, _ in own if not any(name in q for name in subjects)]
    assert 30 < len(left) < 40
    assert len(make_probes(stream).questions) == len(left)
    assert f"{40 - len(left)} of 40 questions name what is edited" in caplog.text


@pytest.mark.parametrize("links", [[{"name": "naive"}], [{"name": "ilora", "memory": 20}]])
def test_training_does_not_notice(links: list[dict[str, Any]]) -> None:
    stream = on()
    with_probes = toys.trainer(links, stream, model=LM, training=TRAINING, evaluation={"drift": True})
    without = toys.trainer(links, stream, model=LM, training=TRAINING)
    state = torch.get_rng_state()
    record = with_probes.run()
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    plain = without.run()
    assert record.matrix == plain.matrix
    assert record.initial == plain.initial
    assert record.losses == plain.losses
    assert not toys.differing(toys.weights_of(with_probes), toys.weights_of(without))
    assert torch.equal(with_probes.learner.rng.get_state(), without.learner.rng.get_state())
    assert plain.drift == []
    assert len(record.drift) == 3, "before, and after each of two experiences"
    assert record.drift[0] != record.drift[-1]
    assert all(set(d["general"]) == set(QUESTIONS) for d in record.drift)
    ends = toys.trainer(links, stream, model=LM, training=TRAINING, evaluation={"drift": "ends"}).run()
    assert ends.drift == [record.drift[0], record.drift[-1]]


def test_the_newest_prompt_is_what_probes_are_read_behind() -> None:
    """Of the first task the prompt stays as it ended, so read behind that alone nothing would ever change again."""
    stream = on()
    links = [{"name": "progressive-prompts", "length": 3}]
    training = TRAINING | {"lr": 0.3}
    made = toys.trainer(links, stream, model=LM, training=training, evaluation={"drift": True})
    drift = made.run().drift
    assert len({d["perplexity"] for d in drift}) == 3, "before, and after each of two experiences"
    probes = make_probes(stream)
    for learnt, d in ((1, drift[1]), (2, drift[2])):
        data = probes.of_newest(probes.data, learnt)
        found = made.learner.log_likelihoods(data, probes.said, 500)
        assert probes.results(found)["perplexity"] == pytest.approx(d["perplexity"], rel=1e-4)


def test_of_which_task_probes_are() -> None:
    probes = make_probes(on())
    for learnt, task in ((0, 0), (1, 0), (2, 1), (9, 8)):
        data = probes.of_newest(probes.data, learnt)
        assert set(data.t.tolist()) == {task}
        assert data.x is probes.data.x
    codes = replace(probes.data, x=probes.data.x[:, :3].clone(), raw=False)
    assert not probes.of_newest(codes, 2).raw


@pytest.mark.parametrize("codebooks", [None, 8])
def test_a_strategy_is_asked_as_it_answers(codebooks: int | None) -> None:
    """REMIND's test sets are codes: without a quantiser the numbers are the model's own."""
    stream = on()
    knobs = {"name": "remind", "split": "model.layers.0", "base": "pretrained", "codebook_size": 16}
    made = toys.trainer(
        [knobs | {"codebooks": codebooks}], stream, model=LM, training=TRAINING, evaluation={"drift": True}
    )
    record = made.run()
    probes = make_probes(stream)
    raw = probes.results(made.learner.log_likelihoods(probes.data, probes.said, 500))
    same = record.drift[-1]["perplexity"] == pytest.approx(raw["perplexity"], rel=1e-4)
    assert same == (codebooks is None)


def test_a_run_that_was_stopped_has_every_moment(tmp_path: Path) -> None:
    stream = on()
    sections: dict[str, Any] = {"model": LM, "training": TRAINING, "evaluation": {"drift": True}}
    whole = toys.trainer([{"name": "naive"}], stream, **sections).run()

    def again() -> Any:
        return toys.trainer([{"name": "naive"}], stream, checkpoints=tmp_path, **sections)

    toys.stopped_at(3, again())
    assert toys.at_newest(again()).run().drift == whole.drift


def run(folder: Path, drift: bool | str = True, **engine: Any) -> dict[str, Any]:
    document = {
        "scenario": {"name": "text-stream", **(TextStream.conformance_knobs() or {})},
        "model": LM,
        "strategy": "naive",
        "training": TRAINING,
        "evaluation": {"drift": drift, "batch_size": 64},
        "tracking": {"uri": None},
        "engine": engine,
    }
    return experiment.run(parse(document, "test"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"zero": 2}])
def test_two_ranks_measure_what_one_does(tmp_path: Path, engine: dict[str, Any]) -> None:
    alone = run(tmp_path / "alone", kind="torch")["drift"]
    together = run(tmp_path / "together", processes=2, threads=1, **engine)["drift"]
    for one, two in zip(alone, together, strict=True):
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
        assert drift_numbers(two)["drift/general"] == pytest.approx(drift_numbers(one)["drift/general"], abs=0.026)


@pytest.mark.parametrize("drift", [True, "ends"])
def test_what_is_logged_at_once_is_what_the_document_has(
    drift: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cl_lab.tracking import Tracker, _points_of_run

    logged: list[tuple[str, int, float]] = []
    monkeypatch.setattr(
        Tracker, "log_metrics", lambda _, found, step: logged.extend((k, step, v) for k, v in found.items())
    )
    document = run(tmp_path / "run", drift)
    told = {(key, step, value) for key, value, step, _ in _points_of_run(document) if key.startswith("drift/")}
    assert len(told) == 6 * (2 if drift == "ends" else 3)
    assert sorted(told) == sorted(point for point in logged if point[0].startswith("drift/")), "each once"


def test_the_document_and_the_report_tell_it(tmp_path: Path) -> None:
    from cl_lab.reporting import from_runs, write_report
    from cl_lab.tracking import _points_of_run

    document = run(tmp_path / "run")
    drift = document["drift"]
    assert len(drift) == 3
    delta = [drift[-1]["general"][topic] - drift[0]["general"][topic] for topic in QUESTIONS]
    assert document["metrics"]["general_ability_delta"] == pytest.approx(sum(delta) / 4)
    points = {(key, step): value for key, value, step, _ in _points_of_run(document)}
    assert points["drift/perplexity", 0] == drift[0]["perplexity"]
    assert points["drift/general_capitals", 2] == drift[2]["general"]["capitals"]
    _, twin = write_report(from_runs([tmp_path / "run"]), tmp_path)
    told = twin.read_text("utf-8")
    ends = " → ".join(f"{d['perplexity']:.4g}" for d in (drift[0], drift[-1]))
    (row,) = (line for line in told.splitlines() if line.startswith("| naive |") and "→" in line)
    assert f"| naive | {ends} |" in row
    assert row.count("→") == 3, "the share of valid answers stands there, too"
    assert "general\\_ability\\_delta" in told


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(kind: type[UserError], stream: Stream, text: str | None, *parts: str) -> None:
    with pytest.raises(kind) as caught:
        make_probes(stream, text)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_what_cannot_be_probed_is_told_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(ConfigError, toys.stream(), None, "evaluation.drift: ", "stream 'toy' is a classification; leave it out")
    refused(ConfigError, toys.stream(form="texts"), None, "stream 'toy' has no tokenizer")
    people = Biography(**(Biography.conformance_knobs() or {})).stream(0)
    refused(ConfigError, people, None, "has no tokens for the probes (tokenizer 'words': ", "take a model's tokenizer")
    stream = on()
    refused(ConfigError, replace(stream, input_shape=(999,)), None, "model.frozen gives it latents")
    refused(
        DataError, stream, str(tmp_path / "none.txt"), "evaluation.probe_text = '", "No such file", "give a text file"
    )
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xff")
    refused(DataError, stream, str(tmp_path / "bad"), "cannot be read (not UTF-8)")
    (tmp_path / "empty").write_text(" \n\n")
    refused(DataError, stream, str(tmp_path / "empty"), "holds no text; write paragraphs")
    with pytest.raises(ConfigError, match=r"evaluation.*set evaluation\.drift=true, or leave it out"):
        toys.config(evaluation={"probe_text": "x.txt"})


def test_questions_that_do_not_fit_are_told(caplog: pytest.LogCaptureFixture) -> None:
    stream = on()
    make_probes(stream)
    prompt = stream.layout["prompt"][0]
    assert f"prompts of this stream have up to {prompt} tokens: the beginning is left out of" in caplog.text
    caplog.clear()
    answer = stream.layout["answer"][0]
    wide = replace(stream, layout={"prompt": (200,), "answer": (answer,)}, input_shape=(200 + answer,))
    make_probes(wide)
    assert not caplog.text
