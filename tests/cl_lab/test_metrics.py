"""Metrics: hand-computed matrices, laws that hold for any matrix, published matrices, and Avalanche as an oracle."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_lab import metrics as m

GOLDEN = Path(__file__).parents[1] / "golden"

# Row i: after learning experience i. Experience 0 is best after experience 1, not after its own.
R = [
    [0.8, 0.3, 0.1],
    [0.9, 0.7, 0.2],
    [0.5, 0.6, 0.9],
]
INITIAL = [0.1, 0.2, 0.3]


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-12)


def test_hand_computed_values() -> None:
    assert m.average_accuracy(R) == near((0.5 + 0.6 + 0.9) / 3)
    assert m.weighted_average_accuracy(R, [1, 1, 2]) == near((0.5 + 0.6 + 1.8) / 4)
    assert m.average_incremental_accuracy(R) == near((0.8 + 0.8 + 2.0 / 3) / 3)
    assert m.bwt(R) == near((-0.3 - 0.1) / 2)
    assert m.fwt(R, INITIAL) == near(((0.3 - 0.2) + (0.2 - 0.3)) / 2)
    assert m.forgetting(R) == near((0.4 + 0.1) / 2)
    assert m.first_minus_last_forgetting(R) == near((0.3 + 0.1) / 2)
    assert m.max_including_last_forgetting(R) == near((0.4 + 0.1) / 2)
    assert m.learning_accuracy(R) == near((0.8 + 0.7 + 0.9) / 3)
    assert m.intransigence(R, [0.9, 0.9, 0.9]) == near((0.1 + 0.2 + 0.0) / 3)
    assert m.min_accuracy(R) == near((0.5 + 0.6) / 2)
    assert m.worst_case_accuracy(R) == near(0.9 / 3 + 2 / 3 * 0.55)
    assert m.omega_base(R, [0.8, 1, 1]) == near((0.9 / 0.8 + 0.5 / 0.8) / 2)
    assert m.omega_new(R) == near((0.7 + 0.9) / 2)
    assert m.omega_all(R, [0.8, 1, 1]) == near((0.8 + 2 / 3) / 0.8 / 2)
    assert m.omega_all(R, [0.8, 1, 1], [1, 3, 4]) == near((3.0 / 4 + 5.9 / 8) / 0.8 / 2)
    assert m.omega_streaming(R, [1.0, 0.9, 0.8]) == near((0.8 / 1.0 + 0.8 / 0.9 + (2 / 3) / 0.8) / 3)


def test_three_definitions_of_forgetting_differ() -> None:
    # Experience 0 falls and recovers beyond its first score; experience 1 gains at the end.
    wavy = [[0.6, 0.0, 0.0], [0.5, 0.6, 0.0], [0.7, 0.8, 0.9]]
    assert m.forgetting(wavy) == near((-0.1 - 0.2) / 2)
    assert m.max_including_last_forgetting(wavy) == 0.0
    falling = [[0.5, 0.0, 0.0], [0.9, 0.6, 0.0], [0.7, 0.6, 0.9]]
    assert m.forgetting(falling) == near((0.2 + 0.0) / 2)
    assert m.first_minus_last_forgetting(falling) == near((-0.2 + 0.0) / 2)


def test_forgetting_looks_at_every_earlier_row() -> None:
    # The paper's maximum runs over l ∈ {1, …, k−1}: a good score before an experience's own training counts too.
    assert m.forgetting([[0.2, 0.9, 0.0], [0.2, 0.5, 0.0], [0.2, 0.4, 0.5]]) == near((0.0 + 0.5) / 2)


ANYTIME = [
    {"step": 1, "experience": 0, "accuracies": [0.4, 0.0, 0.0]},
    {"step": 2, "experience": 1, "accuracies": [0.2, 0.5, 0.0]},
    {"step": 3, "experience": 2, "accuracies": [0.6, 0.1, 0.7]},
    {"step": 4, "experience": 2, "accuracies": [0.3, 0.8, 0.9]},
]


def test_anytime_metrics() -> None:
    assert m.average_anytime_accuracy(ANYTIME) == near((0.4 + 0.35 + 1.4 / 3 + 2.0 / 3) / 4)
    # Experience 0 after learning it: 0.2 at step 2; experience 1: 0.1 at step 3 (its 0.5 came while learning it).
    assert m.min_accuracy(R, ANYTIME) == near((0.2 + 0.1) / 2)
    assert m.worst_case_accuracy(R, ANYTIME) == near(0.9 / 3 + 2 / 3 * 0.15)
    # Of a run stopped in experience 2, what was measured there does not count towards its two rows.
    assert m.min_accuracy(R[:2], ANYTIME) == near(0.2)
    assert math.isnan(m.average_anytime_accuracy([]))


def test_area_under_the_accuracy_curve() -> None:
    heights = [0.4, 0.35, 1.4 / 3, 2.0 / 3]
    # Evenly spaced (by step, where a record does not tell samples): the ends weigh half.
    assert m.a_auc(ANYTIME) == near((heights[0] / 2 + heights[1] + heights[2] + heights[3] / 2) / 3)
    at = [10, 20, 50, 60]
    uneven = [{**record, "samples": s} for record, s in zip(ANYTIME, at, strict=True)]
    area = 10 * (heights[0] + heights[1]) / 2 + 30 * (heights[1] + heights[2]) / 2 + 10 * (heights[2] + heights[3]) / 2
    assert m.a_auc(uneven) == near(area / 50)
    assert m.a_auc(uneven) == near(np.trapezoid(heights, at) / 50)
    assert m.average_anytime_accuracy(uneven) == m.average_anytime_accuracy(ANYTIME), "that one does not see samples"
    assert m.a_auc(ANYTIME[:1]) == 0.4
    assert math.isnan(m.a_auc([]))
    flat = [{**record, "accuracies": [0.3] * 3} for record in uneven]
    assert m.a_auc(flat) == near(0.3)
    with pytest.raises(ValueError, match=r"anytime\[2\]: its samples do not come after"):
        m.a_auc([uneven[0], uneven[2], uneven[1]])


def test_offline_references() -> None:
    """Kemker divides by one score of one model, REMIND by what a model of the same data scores at each point."""
    cumulative = [[0.9, 0.0, 0.0], [0.8, 0.6, 0.1], [0.7, 0.8, 0.9]]
    got = m.summary(R, INITIAL, test_samples=[1, 3, 4], joint=cumulative[-1], cumulative=cumulative)
    seen, curve = [0.8, 3.0 / 4, 5.9 / 8], [0.9, 2.6 / 4, 6.7 / 8]
    assert got["omega_streaming"] == near(sum(a / b for a, b in zip(seen, curve, strict=True)) / 3)
    assert got["omega_base"] == near((0.9 + 0.5) / 2 / 0.7)
    assert got["omega_new"] == near((0.7 + 0.9) / 2)
    assert got["omega_all"] == near((seen[1] + seen[2]) / 2 / 0.7)
    assert m.summary(cumulative, None, cumulative=cumulative)["omega_streaming"] == near(1.0)


def test_losses_are_scores_with_a_minus() -> None:
    losses = np.array([[0.1, 2.0, 1.0], [0.4, 0.2, 1.5], [0.6, 0.1, 0.3]])
    got = m.summary(-losses, None, joint=[-0.2, -0.1, -0.3], cumulative=-losses)
    assert got["first_minus_last_forgetting"] == near(((0.6 - 0.1) + (0.1 - 0.2)) / 2), "how much the losses grew"
    assert got["average_accuracy"] == near(-losses[-1].mean())
    assert got["intransigence"] == near(((0.1 - 0.2) + (0.2 - 0.1) + (0.3 - 0.3)) / 3)
    assert [got[name] for name in ("omega_base", "omega_all", "omega_streaming")] == [None] * 3, "no share of a loss"


@pytest.mark.parametrize(
    "record",
    [
        {"step": 1, "experience": 2, "accuracies": [0.5]},
        {"step": 1, "experience": -1, "accuracies": [0.5]},
        {"step": 1, "experience": 0, "accuracies": [math.nan]},
    ],
)
def test_bad_anytime_records_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"anytime\[0\]"):
        m.average_anytime_accuracy([record])


def test_unlearnt_experiences_may_be_unmeasured_in_anytime_records() -> None:
    assert m.average_anytime_accuracy([{"step": 1, "experience": 0, "accuracies": [0.5, None, None]}]) == 0.5


UNDEFINED_FOR_ONE = {
    "bwt", "fwt", "forgetting", "first_minus_last_forgetting", "max_including_last_forgetting", "min_accuracy",
    "omega_base", "omega_new", "omega_all",
}  # fmt: skip


def test_one_experience_leaves_differences_undefined() -> None:
    values = m.summary([[0.7]], [0.1], test_samples=[5], joint=[0.9])
    assert {k for k, v in values.items() if v is None} == UNDEFINED_FOR_ONE
    assert values["average_accuracy"] == values["worst_case_accuracy"] == values["learning_accuracy"] == 0.7
    assert math.isnan(m.bwt([[0.7]]))
    assert math.isnan(m.forgetting([[0.7]]))


def test_a_stopped_run_is_the_run_over_what_was_learnt() -> None:
    cut = [row[:2] for row in R[:2]]
    assert m.summary(R[:2], INITIAL, test_samples=[1, 2, 3], joint=[1, 0.5, 2]) == m.summary(
        cut, INITIAL[:2], test_samples=[1, 2], joint=[1, 0.5]
    )


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        ([], "at least one row"),
        ([[]], "at least one row"),
        ([0.5, 0.5], "at least one row"),
        ([[0.5], [0.5]], "more rows than experiences"),
        ([[0.5, 0.1], [0.5]], "equally long"),
        ([["a", "b"]], "numbers"),
        ([[0.5, math.nan], [0.5, 0.5]], r"R\[0\]\[1\] is nan"),
        ([[0.5, None], [0.5, 0.5]], r"R\[0\]\[1\]"),
        ([[0.5, 0.5], [math.inf, 0.5]], r"R\[1\]\[0\] is inf"),
    ],
)
def test_malformed_matrices_are_refused(matrix: Any, why: str) -> None:
    for function in (m.average_accuracy, m.bwt, m.forgetting, m.max_including_last_forgetting, m.omega_new):
        with pytest.raises(ValueError, match=why):
            function(matrix)
    with pytest.raises(ValueError, match=why):
        m.summary(matrix, None)


def test_malformed_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"initial of shape \[2\]: needs \[3\]"):
        m.fwt(R, [0.1, 0.2])
    with pytest.raises(ValueError, match="joint: entry 1"):
        m.intransigence(R, [0.1, math.nan, 0.2])
    with pytest.raises(ValueError, match="offline: must be"):
        m.omega_base(R, ["a", "b", "c"])
    for weights in ([-1, 2, 3], [0, 2, 3]):
        with pytest.raises(ValueError, match="test_samples"):
            m.weighted_average_accuracy(R, weights)
    assert math.isnan(m.omega_base(R, [0, 1, 1]))
    assert math.isnan(m.omega_all(R, [-1, 1, 1]))
    assert math.isnan(m.omega_streaming(R, [1, 0, 1]))


@pytest.mark.parametrize("seed", range(20))
def test_laws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    T = int(rng.integers(2, 9))
    matrix = rng.normal(size=(T, T)) * 10  # any score will do
    before, joint = rng.normal(size=T), rng.normal(size=T)
    copy = matrix.copy()
    anytime = [
        {"step": n, "experience": int(e), "accuracies": rng.normal(size=T)}
        for n, e in enumerate(rng.integers(0, T, 12))
    ]

    assert m.first_minus_last_forgetting(matrix) == near(-m.bwt(matrix))
    assert m.max_including_last_forgetting(matrix) >= 0
    assert m.max_including_last_forgetting(matrix) >= m.forgetting(matrix) >= m.first_minus_last_forgetting(matrix)
    assert m.average_accuracy(matrix) == near(m.learning_accuracy(matrix) + (T - 1) / T * m.bwt(matrix))
    assert m.weighted_average_accuracy(matrix, [7] * T) == near(m.average_accuracy(matrix))
    assert m.worst_case_accuracy(matrix) <= m.average_accuracy(matrix) + 1e-12
    assert m.worst_case_accuracy(matrix, anytime) <= m.worst_case_accuracy(matrix) + 1e-12
    assert m.intransigence(matrix, joint) == near(joint.mean() - m.learning_accuracy(matrix))
    rows = [{"step": i, "experience": i, "accuracies": row} for i, row in enumerate(matrix)]
    assert m.average_anytime_accuracy(rows) == near(m.average_incremental_accuracy(matrix))
    assert m.min_accuracy(matrix, rows) == near(m.min_accuracy(matrix))

    # Differences ignore a common offset, and everything but the omegas scales with the scores.
    shifted = m.summary(matrix + 3, before + 3)
    doubled = m.summary(matrix * 2, before * 2)
    for name, value in m.summary(matrix, before).items():
        assert value is not None
        offset = 3 if "accuracy" in name else 0
        assert shifted[name] == pytest.approx(value + offset, abs=1e-9)
        assert doubled[name] == pytest.approx(value * 2, abs=1e-9)

    assert m.summary(matrix.tolist(), before.tolist(), anytime=anytime, joint=joint.tolist()) == m.summary(
        matrix, before, anytime=anytime, joint=joint
    )
    assert (matrix == copy).all()


def test_a_model_that_never_changes_forgets_nothing() -> None:
    values = m.summary([[0.3, 0.6, 0.9]] * 3, [0.3, 0.6, 0.9], joint=[0.3, 0.6, 0.9])
    for name in ("bwt", "fwt", "forgetting", "first_minus_last_forgetting", "max_including_last_forgetting"):
        assert values[name] == 0
        assert math.copysign(1, values[name] or 0.0) == 1  # no "-0.0" in reports
    assert values["intransigence"] == near(0)


def test_summary_holds_what_its_inputs_allow() -> None:
    least = m.summary(R, None)
    assert set(least) == {
        "average_accuracy", "average_incremental_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy",
        "first_minus_last_forgetting", "max_including_last_forgetting", "min_accuracy", "worst_case_accuracy",
    }  # fmt: skip
    assert least["fwt"] is None
    most = m.summary(R, INITIAL, test_samples=[1, 2, 3], anytime=ANYTIME, joint=[0.9, 0.9, 0.9], cumulative=R)
    assert set(most) - set(least) == {
        "weighted_average_accuracy", "average_anytime_accuracy", "a_auc", "intransigence",
        "omega_base", "omega_new", "omega_all", "omega_streaming",
    }  # fmt: skip
    assert all(type(v) is float for v in most.values())
    assert json.loads(json.dumps(most, allow_nan=False)) == most


def test_every_metric_is_listed_with_one_line() -> None:
    tree = ast.parse(Path(m.__file__).read_text(encoding="utf-8"))
    public = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    given = {"test_samples": [1, 2, 3], "anytime": ANYTIME, "joint": INITIAL, "cumulative": R, "valid": R, "general": R}
    reported = set(m.summary(R, INITIAL, **given))
    assert reported == set(public) - {"summary", "interval"}
    for name, node in public.items():
        first, _, rest = (ast.get_docstring(node) or "").partition("\n")
        assert first.endswith("."), name
        assert "Raises" in rest, name


def test_metrics_do_not_load_torch() -> None:
    code = "import sys, cl_lab.metrics; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_interval() -> None:
    got = m.interval([1.0, 2.0, 3.0, 4.0])
    assert got["mean"] == 2.5
    assert got["std"] == pytest.approx(math.sqrt(5 / 3))
    half = 3.182446305284263 * math.sqrt(5 / 3) / 2  # t table: 0.975 quantile for 3 degrees of freedom
    assert got["ci95"] == pytest.approx([2.5 - half, 2.5 + half])
    assert m.interval([0.5]) == {"mean": 0.5, "std": 0.0, "ci95": [0.5, 0.5]}
    assert m.interval([0.5, 0.5]) == {"mean": 0.5, "std": 0.0, "ci95": [0.5, 0.5]}
    for bad in ([], [0.1, math.nan]):
        with pytest.raises(ValueError, match="value"):
            m.interval(bad)


@pytest.mark.parametrize(
    "run", ["order1_seqft", "order1_icrlora", "order1_olora", "long_seqlora", "long_icrlora", "long_olora"]
)
def test_published_matrices_of_olora(run: str) -> None:
    golden = json.loads((GOLDEN / "olora_matrices.json").read_text(encoding="utf-8"))
    data = golden["runs"][run]
    T = len(data["tasks"])
    matrix = [row + [0.0] * (T - len(row)) for row in data["R"]]  # the logs hold the lower triangle only
    samples = [golden["test_samples"][task] for task in data["tasks"]]
    got = m.summary(matrix, None, test_samples=samples)
    assert got["weighted_average_accuracy"] == pytest.approx(data["logged_weighted_final"], abs=1.01e-4)
    assert len(data["derived"]) == 5
    for name, value in data["derived"].items():
        assert got[name] == pytest.approx(value, abs=1.01e-4), name


def test_published_changes_of_trace() -> None:
    # A chat model that had learnt M abilities (diagonal) before TRACE and holds the last row after it: BWT is the
    # published mean change. Two of the fifteen printed numbers contradict the table's own scores.
    golden = json.loads((GOLDEN / "trace_table2.json").read_text(encoding="utf-8"))
    assert len(golden["rows"]) == 15
    for name, row in golden["rows"].items():
        base = golden["base"][name.split()[0]]
        matrix = np.vstack([np.tile([*base, 0.0], (len(base), 1)), [*row["scores"], 0.0]])
        agrees = m.bwt(matrix) == pytest.approx(row["published"], abs=0.014)
        assert agrees != (name in golden["misprints"]), name


def test_general_ability_delta_is_that_of_trace() -> None:
    golden = json.loads((GOLDEN / "trace_table2.json").read_text(encoding="utf-8"))
    for name, row in golden["rows"].items():
        base = golden["base"][name.split()[0]]
        agrees = m.general_ability_delta([base, row["scores"]]) == pytest.approx(row["published"], abs=0.014)
        assert agrees != (name in golden["misprints"]), name


def test_general_ability_delta_by_hand() -> None:
    general = [[0.5, 0.2], [0.9, 0.9], [0.25, 0.3]]
    assert m.general_ability_delta(general) == pytest.approx((-0.25 + 0.1) / 2), "what was between does not count"
    assert m.general_ability_delta(general[:1]) == 0
    assert m.summary([[1.0]], [0.0], general=general)["general_ability_delta"] == pytest.approx(-0.075)
    assert "general_ability_delta" not in m.summary([[1.0]], [0.0])
    for wrong in ([], [[]], [[0.1], [0.1, 0.2]], [0.1], [[math.nan]], [["a"]]):
        with pytest.raises(ValueError, match="general"):
            m.general_ability_delta(wrong)


def avalanche(module: str) -> Any:
    """Avalanche's module, imported in spite of what it warns about, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cl_lab.compat import import_torchvision

        import_torchvision()
        pytest.importorskip("avalanche")
        return import_module(module)


@pytest.mark.slow
def test_avalanche_agrees() -> None:
    forgetting = avalanche("avalanche.evaluation.metrics.forgetting_bwt")
    transfer = avalanche("avalanche.evaluation.metrics.forward_transfer")
    rng = np.random.default_rng(0)
    for T in (2, 3, 7):
        matrix, before = rng.random((T, T)), rng.random(T)
        first_last, backward, forward = forgetting.Forgetting(), forgetting.BWT(), transfer.ForwardTransfer()
        for j in range(T):
            forward.update(j, before[j], initial=True)
            if j > 0:
                forward.update(j, matrix[j - 1, j])
            for metric in (first_last, backward):
                metric.update(j, matrix[j, j], initial=True)
                if j < T - 1:
                    metric.update(j, matrix[T - 1, j])
        mean = {name: float(np.mean(list(v.result().values()))) for name, v in
                {"forgetting": first_last, "bwt": backward, "fwt": forward}.items()}  # fmt: skip
        assert m.first_minus_last_forgetting(matrix) == near(mean["forgetting"])
        assert m.bwt(matrix) == near(mean["bwt"])
        assert m.fwt(matrix, before) == near(mean["fwt"])


def test_format_and_knowledge_are_told_apart() -> None:
    matrix, valid = [[0.9, 0.0], [0.3, 0.8]], [[1.0, 0.0], [0.4, 1.0]]
    assert m.valid_output_rate(valid) == pytest.approx(0.7)
    assert m.accuracy_given_valid(matrix, valid) == pytest.approx((0.3 / 0.4 + 0.8) / 2)
    assert math.isnan(m.accuracy_given_valid([[0.0]], [[0.0]]))
    lost = m.accuracy_given_valid([[0.9, 0.1], [0.0, 0.8]], [[1.0, 0.5], [0.0, 1.0]])
    assert lost == pytest.approx(0.8), "a task whose answers are all invalid says nothing about knowledge"
    found = m.summary(matrix, None, valid=valid)
    assert (found["valid_output_rate"], found["accuracy_given_valid"]) == (pytest.approx(0.7), pytest.approx(0.775))
    assert "valid_output_rate" not in m.summary(matrix, None)
    with pytest.raises(ValueError, match="do not go together"):
        m.accuracy_given_valid(matrix, [[0.5]])
