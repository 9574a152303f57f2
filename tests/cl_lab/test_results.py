"""From runs to a comparison: which metrics the offline references add, and what is said of those references."""

from __future__ import annotations

from typing import Any

import pytest

from cl_lab import metrics
from cl_lab.results import assemble

NAIVE = [[0.9, 0.1], [0.3, 0.8]]
JOINT = [[0.8, 0.7]] * 2
CUMULATIVE = [[0.9, 0.0], [0.75, 0.7]]


def document(strategy: str, matrix: list[list[float]], seed: int = 0, **more: Any) -> dict[str, Any]:
    samples = [(30, 10), (50, 20)]
    return {
        "strategy": strategy,
        "label": strategy,
        "seed": seed,
        "status": "finished",
        "initial": [0.1, 0.1],
        "matrix": matrix,
        "metrics": {"average_accuracy": -1.0},
        "cost": {},
        "chance": 0.25,
        "experiences": [{"train_samples": n, "test_samples": t} for n, t in samples],
        **more,
    }


def rows_of(*documents: dict[str, Any]) -> dict[str, dict[str, Any]]:
    labels = list(dict.fromkeys(d["label"] for d in documents))
    return {row["strategy"]: row for row in assemble("s", "p", labels, documents)["rows"]}


def test_each_reference_adds_its_own_metrics() -> None:
    naive, joint, cumulative = (
        document("naive", NAIVE),
        document("joint", JOINT),
        document("cumulative", CUMULATIVE, encoding="codes"),
    )
    (alone,) = rows_of(naive)["naive"]["runs"]
    assert "offline" not in alone
    assert set(alone["metrics"]) == {"average_accuracy"}
    (run,) = rows_of(naive, joint, cumulative)["naive"]["runs"]
    expected = metrics.summary(NAIVE, [0.1, 0.1], test_samples=[10, 20], joint=[0.8, 0.7], cumulative=CUMULATIVE)
    assert run["metrics"] == {**expected, "average_accuracy": -1.0}, "a run's own numbers stay"
    curve = [0.9, (0.75 + 2 * 0.7) / 3]
    assert run["metrics"]["omega_streaming"] == pytest.approx((0.9 / curve[0] + (0.3 + 2 * 0.8) / 3 / curve[1]) / 2)
    assert run["offline"] == {
        "joint": {"label": "joint", "encoding": None, "train_samples": [80, 80]},
        "cumulative": {"label": "cumulative", "encoding": "codes", "train_samples": [30, 80]},
    }
    (only,) = rows_of(naive, cumulative)["naive"]["runs"]
    assert "omega_all" not in only["metrics"]
    assert set(only["offline"]) == {"cumulative"}


def test_references_count_for_their_seed_and_when_finished() -> None:
    rows = rows_of(
        document("naive", NAIVE),
        document("naive", NAIVE, 1),
        document("naive", NAIVE[:1], 2, status="failed"),
        document("cumulative", CUMULATIVE, 1),
        document("cumulative", CUMULATIVE, 2),
        document("joint", JOINT, status="interrupted"),
    )
    assert [set(run.get("offline", {})) for run in rows["naive"]["runs"]] == [set(), {"cumulative"}, set()]


def test_references_count_under_their_own_conditions() -> None:
    other = [[0.5, 0.4]] * 2
    runs = [
        document("naive", NAIVE),
        document("joint", JOINT),
        document("naive", NAIVE, label="naive (2)"),
        document("joint", other, label="joint (2)"),
        document("replay", NAIVE),
    ]
    labels = [d["label"] for d in runs]
    rows = {r["strategy"]: r for r in assemble("s", "p", labels, runs, ["a", "a", "b", "b", "c"])["rows"]}
    summary = {name: row["runs"][0]["metrics"] for name, row in rows.items()}
    assert summary["joint"]["intransigence"] == summary["joint (2)"]["intransigence"] == 0
    assert summary["naive"]["intransigence"] == pytest.approx(((0.8 - 0.9) + (0.7 - 0.8)) / 2)
    assert summary["naive (2)"]["intransigence"] == pytest.approx(((0.5 - 0.9) + (0.4 - 0.8)) / 2)
    assert [row["runs"][0].get("offline", {}).get("joint", {}).get("label") for row in rows.values()] == [
        "joint",
        "joint",
        "joint (2)",
        "joint (2)",
        None,
    ]


def test_the_score_is_the_runs() -> None:
    assert assemble("s", "p", ["naive"], [document("naive", NAIVE)])["score"] == "accuracy"
    regression = document("naive", NAIVE, score="negative squared error", chance=None)
    found = assemble("s", "p", ["naive"], [regression])
    assert (found["score"], found["chance"]) == ("negative squared error", None)
