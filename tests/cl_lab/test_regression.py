"""Streams whose targets are numbers: the loss, the score, what works on them, and what refuses them in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from cl_lab import experiment, registry
from cl_lab.comparison import compare
from cl_lab.errors import ConfigError, DataError, TrainingError
from cl_lab.records import Experience, Stream, TensorData
from cl_lab.reporting import from_runs, headline, write_report

SCENARIO = {"name": "linear-theory", "experiences": 3, "features": 12, "samples": 20, "noise": 0.1, "similar": 0.5}
SCORE = "negative squared error"


def stream(**knobs: Any) -> Stream:
    made: Stream = registry.create("scenarios", {**SCENARIO, **knobs}, "scenario").stream(0)
    return made


def score_by_hand(model: torch.nn.Module, data: TensorData) -> float:
    model.eval()
    with torch.no_grad():
        return -float((model(data.x, data.t)[:, 0] - data.y).double().square().mean())


def test_the_score_is_minus_the_squared_error() -> None:
    on = stream()
    trainer = toys.trainer([{"name": "naive"}], on, training={"lr": 0.02}, evaluation={"every_steps": 2})
    untrained = [score_by_hand(trainer.learner.model, e.test) for e in on.experiences]
    record = trainer.run()
    assert record.initial == pytest.approx(untrained, rel=1e-5)
    assert record.matrix[-1] == pytest.approx([score_by_hand(trainer.learner.model, e.test) for e in on.experiences])
    assert record.score == on.score == SCORE
    assert [(a["samples"], len(a["accuracies"])) for a in record.anytime] == [
        (20 * s, 1 + i) for i in range(3) for s in (1 + 3 * i, 2 + 3 * i, 3 + 3 * i)
    ]


def test_one_step_is_gradient_descent_on_the_mean_squared_error() -> None:
    on = stream(experiences=1)
    trainer = toys.trainer(
        [{"name": "naive"}], on, model={"name": "linear"}, training={"epochs": 1, "batch_size": 20, "lr": 0.05}
    )
    trainer.run()
    data = on.experiences[0].train
    towards = 2 / 20 * data.x.T @ data.y  # minus the gradient at w = 0
    torch.testing.assert_close(toys.weights_of(trainer)["head.linear.weight"][0], 0.05 * towards)


def test_pieces_of_a_batch_add_up() -> None:
    runs = []
    for accumulate in (1, 3):
        training = {"lr": 0.02, "batch_size": 8, "accumulate": accumulate}
        trainer = toys.trainer([{"name": "replay", "memory": 10}], stream(), training=training)
        trainer.run()
        runs.append(toys.weights_of(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-6)


# Plenty of samples of one and the same task: whoever learns ends near its optimum.
EASY = {"samples": 100, "similar": 1.0}


@pytest.mark.parametrize("name", ["naive", "replay", "cumulative", "joint"])
def test_learns(name: str) -> None:
    on = stream(**EASY)
    assert name == "naive" or "regression" in registry.load("strategies", name)[0].objectives
    record = toys.trainer([{"name": name}], on, model={"name": "linear"}, training={"epochs": 20, "lr": 0.02}).run()
    assert max(record.initial) == pytest.approx(-1.0, rel=1e-5)
    assert min(record.matrix[-1]) > -0.02


def test_early_stopping_takes_the_best_epoch_of_scores_below_minus_one() -> None:
    on = stream(experiences=1, samples=60, noise=3.0)
    training = {"epochs": 60, "validation": 0.5, "patience": 3, "lr": 0.02}
    record = toys.trainer([{"name": "naive"}], on, model={"name": "linear"}, training=training).run()
    assert 3 < record.steps < 60 * 3


def test_hidden_boundaries_are_no_matter() -> None:
    on = replace(stream(**EASY), boundaries=False)
    for link in ({"name": "naive"}, {"name": "replay", "memory": 20}):
        record = toys.trainer([link], on, training={"epochs": 10, "lr": 0.02}).run()
        assert min(record.matrix[-1]) > -0.5


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    links = [{"name": "replay", "memory": 30}]
    whole = toys.trainer(links, stream(), training={"lr": 0.02})
    whole.run()
    cut = toys.trainer(links, stream(), training={"lr": 0.02})
    cut.stop = lambda: "SIGTERM" if cut.record.steps >= 4 else None
    with pytest.raises(BaseException, match="SIGTERM"):
        cut.run()
    again = toys.trainer(links, stream(), training={"lr": 0.02})
    again.load_state_dict(cut.state_dict())
    assert again.run().matrix == whole.record.matrix
    assert not toys.differing(toys.weights_of(again), toys.weights_of(whole))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "model", "why"),
    [
        ({"name": "ewc"}, {}, "strategy 'ewc' learns classification or language only, but stream 'LinearTheory' is"),
        (
            {"name": "replay", "policy": "class-balanced"},
            {},
            "policy = 'class-balanced': shares the memory out by class",
        ),
        ({"name": "naive"}, {"head": "growing"}, "model.head = 'growing': stream 'LinearTheory' is a regression"),
        ({"name": "naive"}, {"head": "multi"}, "model.head = 'multi': stream 'LinearTheory' is a regression"),
    ],
)
def test_what_needs_classes_says_so(link: dict[str, Any], model: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        toys.trainer([link], stream(), model={**toys.MLP, **model})
    assert str(caught.value).startswith(why)
    assert "\n" not in str(caught.value)


def test_a_regression_has_one_output_and_no_tasks() -> None:
    for change in ({"n_classes": 2}, {"task_labels": True}):
        with pytest.raises(DataError, match=r"a regression has one output and no task labels"):
            replace(stream(), **change)


@pytest.mark.parametrize("regression", [True, False])
def test_targets_must_be_of_the_streams_kind(regression: bool) -> None:
    numbers, labels = stream(experiences=1).experiences[0].test, toys.stream().experiences[0].test
    data = labels if regression else numbers
    shape = tuple(data.x.shape[1:])
    wrong = Experience(0, "e", [0], lambda: data, lambda: data)
    on = Stream("s", (wrong,), shape, 1, objective="regression" if regression else "classification")
    kind = (
        "regression, but its targets are torch.int64" if regression else "classification, but its targets are torch.f"
    )
    with pytest.raises(DataError, match=f"stream 's' is a {kind}"):
        toys.trainer([{"name": "naive"}], on).run()


def test_divergence_is_noticed() -> None:
    with pytest.raises(TrainingError, match=r"lower training\.lr"):
        toys.trainer([{"name": "naive"}], stream(), training={"lr": 1e20}).run()


# -- what a person sees ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("regression")
    config = toys.config(
        scenario=SCENARIO,
        model={"name": "linear"},
        strategies=["min-norm", "naive", "joint", "cumulative"],
        seeds=[0, 1],
        training={"epochs": 3, "lr": 0.02},
        evaluation={"every_steps": 2},
        engine={"threads": 1},
    )
    return compare(config, folder), folder


def test_documents_name_the_score(compared: tuple[dict[str, Any], Path]) -> None:
    found, folder = compared
    assert (found["score"], found["chance"]) == (SCORE, None)
    run = json.loads((folder / "runs" / "naive-seed0" / "run.json").read_text())
    assert (run["status"], run["score"], run["chance"], run["encoding"]) == ("finished", SCORE, None, None)
    assert run["metrics"]["average_accuracy"] < 0
    naive = next(row for row in found["rows"] if row["strategy"] == "naive")
    assert "intransigence" in naive["metrics"]
    assert not {"omega_base", "omega_all", "omega_streaming"} & set(naive["metrics"]), "no share of a loss"
    assert from_runs([folder])["score"] == SCORE


def test_the_report_prints_plain_numbers(compared: tuple[dict[str, Any], Path]) -> None:
    found, folder = compared
    page, twin = write_report(found, folder)
    mean = next(row for row in found["rows"] if row["strategy"] == "min-norm")["metrics"]["average_accuracy"]["mean"]
    number = f"{mean:.4g}".replace("-", "−")
    for text in (page.read_text("utf-8"), twin.read_text("utf-8")):
        told, _, settings = text.partition("Measure it again")
        assert settings
        assert number in told
        assert f"Average {SCORE}" in told
        assert f"plain numbers, the {SCORE}" in told
        # Of an interval and of Student's t, but of no score.
        assert "per cent" not in told
        assert told.count("%") == told.count("95 %") + told.count("100%"), "styles and intervals aside"
        assert "Guessing" not in told
        assert "ccuracy" not in told.replace("average_accuracy", "").replace("_accuracy", "")
    assert f"average {SCORE}" in headline(found) or "No clear winner" in headline(found)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    sections = {"scenario": SCENARIO, "strategy": {"name": "replay", "memory": 15}, "training": {"lr": 0.02}}
    one = experiment.run(toys.config(**sections), tmp_path / "one")
    two = experiment.run(toys.config(**sections, engine={"processes": 2, "threads": 1}), tmp_path / "two")
    for row, other in zip([one["initial"], *one["matrix"]], [two["initial"], *two["matrix"]], strict=True):
        assert row == pytest.approx(other, rel=1e-4)
