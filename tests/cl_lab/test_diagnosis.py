"""``cl-lab diagnose``: knowledge lost or alignment lost, angles of updates, probability moved to later labels."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import checkpoint, diagnosis, experiment, registry, reporting, seeding
from cl_lab.adapters import AdaptedLayer, LowRank
from cl_lab.errors import CheckpointError, ConfigError, TrainingError, UserError
from cl_lab.records import Batch, Experience, TensorData
from cl_lab.trainer import Silent

KEPT = {"experiences": True}


def ran(folder: Path, **sections: Any) -> dict[str, Any]:
    """A finished run of two experiences that kept its weights."""
    scenario = {"name": f"{toys.__file__}:Toy", "experiences": 2, **sections.pop("toy", {})}
    settings = {"scenario": scenario, "checkpoint": KEPT, **sections}
    return experiment.run(toys.config(**settings), folder)


def changed(folder: Path, learnt: int, how: Callable[[dict[str, Tensor]], None], source: int | None = None) -> None:
    """Put weights made by hand in the place of those after ``learnt`` experiences."""
    weights = checkpoint.load_weights(folder / "weights" / f"{learnt if source is None else source}.safetensors")
    how(weights)
    checkpoint.save_weights(folder / "weights" / f"{learnt}.safetensors", weights)


def without_features(weights: dict[str, Tensor]) -> None:
    """Zero every hidden layer: no sample differs from another, and no gradient reaches what comes below."""
    for name, value in weights.items():
        if name.startswith("backbone"):
            value.zero_()


# --- the verdict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "original", "forgotten", "recovered", "control", "ratio", "said"),
    [
        (0.1, 0.9, 0.1, 0.85, 0.2, 0.9375, "alignment lost"),
        (0.1, 0.9, 0.1, 0.6, 0.2, 0.625, "partly"),
        (0.1, 0.9, 0.1, 0.2, 0.1, 0.125, "knowledge lost"),
        (0.1, 0.9, 0.1, 0.2, 0.9, 0.125, "knowledge lost"),
        (0.1, 0.9, 0.1, 0.85, 0.84, 0.9375, "cannot tell"),
        (0.1, 0.9, 0.85, 0.9, 0.2, None, "kept"),  # 0.05 of 100 rows: two standard errors are 0.093
        (0.1, 0.5, 0.9, 0.9, 0.2, None, "kept"),
        (0.0, 1.0, 1.0, 1.0, 1.0, None, "kept"),
        (0.0, 0.0, 0.0, 0.9, 0.9, None, "not learnt"),
        (0.0, 0.0, 0.3, 0.9, 0.9, None, "not learnt"),  # what came later is no memory of it
        (0.5, 0.6, 0.55, 0.9, 0.9, None, "not learnt"),  # 0.1 of 100 rows: two standard errors are 0.140
        (0.5, 0.65, 0.6, 0.9, 0.9, None, "kept"),  # 0.15: they are 0.138
        (0.9, 0.5, 0.45, 0.9, 0.9, None, "not learnt"),
        (0.9, 0.9, 0.1, 0.2, 0.9, 0.125, "knowledge lost"),  # known before, and lost since
    ],
)
def test_verdict(
    before: float,
    original: float,
    forgotten: float,
    recovered: float,
    control: float,
    ratio: float | None,
    said: str,
) -> None:
    found, word = diagnosis.verdict(before, original, forgotten, recovered, control, 100, 0.8)
    assert word == said
    assert found == (None if ratio is None else pytest.approx(ratio))


def test_chance_by_hand() -> None:
    assert diagnosis.chance_of(0.5, 0.5, 200) == pytest.approx(2 * math.sqrt(0.5 / 200))
    assert diagnosis.chance_of(1.0, 0.0, 200) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights tests replace by others; each test writes those that it needs."""
    folder = tmp_path_factory.mktemp("diagnosis") / "run"
    ran(folder, training={"epochs": 6})
    return folder


def test_alignment_alone_comes_back(whole: Path) -> None:
    """Forgetting made by hand: the model right after task 0, but it says the later task's labels."""
    changed(whole, 0, without_features)

    def says_later(weights: dict[str, Tensor]) -> None:
        weights["head.linear.bias"][2:] += 8

    changed(whole, 2, says_later, source=1)
    found = diagnosis.diagnose(whole, steps=30, lr=0.5)["tasks"][0]
    assert (found["original"], found["forgotten"]) == (1.0, 0.0)
    assert found["ratio"] > 0.95
    assert found["control"] <= 0.5, "whoever has no features guesses"
    assert found["verdict"] == "alignment lost"
    assert found["mass"]["before"]["own"] > 0.9
    assert found["mass"]["after"]["later"] > 0.9


def test_knowledge_lost_does_not(whole: Path) -> None:
    changed(whole, 2, without_features, source=1)
    found = diagnosis.diagnose(whole, steps=30, lr=0.5)["tasks"][0]
    assert found["original"] == 1.0
    assert found["ratio"] < 0.5
    assert found["verdict"] == "knowledge lost"


def test_what_the_steps_teach_by_themselves_proves_nothing(tmp_path: Path) -> None:
    ran(tmp_path / "run")
    found = diagnosis.diagnose(tmp_path / "run", steps=60, lr=0.3)["tasks"][0]
    assert found["forgotten"] <= 0.5
    assert found["recovered"] == found["control"] == 1.0
    assert found["verdict"] == "cannot tell"


def test_what_was_never_learnt_is_not_kept(tmp_path: Path) -> None:
    """Task 0 changed no weight; the newest weights are those too, then such as came to answer it later."""
    folder = tmp_path / "run"
    ran(folder, training={"epochs": 6}, checkpoint={**KEPT, "weights_at": [4]})

    def says_later(weights: dict[str, Tensor]) -> None:
        weights["head.linear.bias"][2:] += 50

    trained = checkpoint.load_weights(folder / "weights" / "1.safetensors")
    changed(folder, 0, says_later)
    for n in (1, 2):
        changed(folder, n, lambda _: None, source=0)
    document = diagnosis.diagnose(folder, steps=5)
    task = document["tasks"][0]
    assert [task[k] for k in ("before", "original", "forgotten", "ratio")] == [0, 0, 0, None]
    assert task["verdict"] == "not learnt"
    assert [point["ratio"] for point in task["along"]] == [None, None]
    text = reporting.write_again(folder).read_text()
    for said in (text, (folder / "report.md").read_text()):
        assert "of 1 old task 1 not learnt" in said
        assert "Not learnt: right after it, it was answered no better" in said

    checkpoint.save_weights(folder / "weights" / "2.safetensors", trained)
    task = diagnosis.diagnose(folder, steps=5)["tasks"][0]
    assert (task["before"], task["original"], task["forgotten"]) == (0, 0, 1)
    assert task["verdict"] == "not learnt", "what it can do by now it did not learn there"


def test_diagnoses_of_before_are_reported(tmp_path: Path) -> None:
    """Older documents do not say what was answered before any training."""
    folder = tmp_path / "run"
    ran(folder)
    document = diagnosis.diagnose(folder, steps=5)
    for task in document["tasks"]:
        del task["before"], task["along"]
    (folder / "diagnosis.json").write_text(json.dumps(document))
    assert document["tasks"][0]["verdict"] in reporting.write_again(folder).read_text()


def test_scores_are_the_runs_own_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ran(folder, toy={"experiences": 3}, evaluation={"every_steps": 4})
    run = json.loads((folder / "run.json").read_text())
    before = {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}
    first = diagnosis.diagnose(folder, steps=5)
    text = (folder / "diagnosis.json").read_text()
    assert json.loads(text) == first
    for task, j in zip(first["tasks"], range(2), strict=True):
        assert task["before"] == run["initial"][j]
        assert task["original"] == run["matrix"][j][j]
        assert task["forgotten"] == run["matrix"][-1][j]
        assert task["newest"]["before"] == run["matrix"][-1][-1]
        assert task["first_steps"][0] == [0.0, run["matrix"][j][j]]
        assert task["first_steps"][-1] == [1.0, run["matrix"][j + 1][j]]
        measured = [a["accuracies"][j] for a in run["anytime"] if a["experience"] == j + 1 and a["step"] < 18 * (j + 2)]
        assert [score for _, score in task["first_steps"][1:-1]] == measured
        assert [share for share, _ in task["first_steps"][1:-1]] == pytest.approx([4 / 18, 8 / 18, 12 / 18, 16 / 18])
    diagnosis.diagnose(folder, steps=5)
    assert (folder / "diagnosis.json").read_text() == text, "the same again"
    assert {p: hashlib.sha256(p.read_bytes()).digest() for p in before} == before


def test_along_the_next_task(tmp_path: Path) -> None:
    """Weights kept inside an experience score what the run scored there, and what recovery brings back from them."""
    folder = tmp_path / "run"
    kept = {**KEPT, "weights_at": [4, 8, 18, 400]}  # an experience takes 18 steps: at its end nothing is kept twice
    ran(folder, toy={"experiences": 3}, checkpoint=kept, evaluation={"every_steps": 4})
    inside = {f"{n}+{s}.safetensors" for n in range(3) for s in (4, 8)}
    assert {p.name for p in (folder / "weights").iterdir()} == inside | {f"{n}.safetensors" for n in range(4)}
    run = json.loads((folder / "run.json").read_text())
    document = diagnosis.diagnose(folder, steps=5)
    for j, task in enumerate(document["tasks"]):
        measured = [a["accuracies"][j] for a in run["anytime"] if a["experience"] == j + 1][:2]
        assert [point["forgotten"] for point in task["along"]] == [*measured, run["matrix"][j + 1][j]]
        assert [point["step"] for point in task["along"]] == [4, 8, 18]
        assert [point["share"] for point in task["along"]] == pytest.approx([4 / 18, 8 / 18, 1])
    last = document["tasks"][1]
    assert last["along"][-1]["recovered"] == last["recovered"], "the end of the last is where the model is now"
    for line in ("While the next task was learnt", "22.2 %"):
        assert line in (text := reporting.write_again(folder).read_text())
        assert line in (folder / "report.md").read_text()
    assert "dotted: after recovery from there" in text
    table = reporting.recovery_table(document)
    assert table is not None
    assert table.row_count == 6


def test_what_was_lost_on_the_way_comes_back_by_hand(tmp_path: Path) -> None:
    """The weights four steps into the next task say its labels and nothing else is lost; at its end all is lost."""
    folder = tmp_path / "run"
    ran(folder, training={"epochs": 6}, checkpoint={**KEPT, "weights_at": [4]})
    changed(folder, 0, without_features)
    changed(folder, 2, without_features, source=1)
    weights = checkpoint.load_weights(folder / "weights" / "1.safetensors")
    weights["head.linear.bias"][2:] += 8
    checkpoint.save_weights(folder / "weights" / "1+4.safetensors", weights)
    task = diagnosis.diagnose(folder, steps=30, lr=0.5)["tasks"][0]
    early, end = task["along"]
    assert (early["forgotten"], early["ratio"] > 0.95) == (0.0, True)
    assert end["ratio"] == task["ratio"]
    assert end["ratio"] < 0.5
    assert task["first_steps"][:2] == [[0.0, 1.0], [pytest.approx(4 / 36), 0.0]], "kept weights make the curve, too"
    assert task["half_lost_at"] == pytest.approx(4 / 36)


def test_steps_and_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ran(folder, training={"epochs": 5, "first": {"epochs": 20, "lr": 0.2}})  # 6 steps in an epoch
    told: list[Any] = []

    class Heard:
        def started(self, total: int, done: int) -> None:
            told.append((total, done))

        def stepped(self, experience: Any, step: int, loss: float | None) -> None:
            told.append(step)

        def told(self, text: str) -> None:
            told.append(text)

    found = diagnosis.diagnose(folder, observer=Heard())["tasks"][0]
    assert (found["steps"], found["lr"]) == (12, 0.2), "a tenth of its steps, as it was trained"
    assert told[0] == (24, 0)
    assert told[1:-1] == [*range(1, 13)] * 2
    assert "toy 0: original" in told[-1]
    assert not found["memorised"]
    assert found["rows"] == {"a": 60, "b": 40}
    with pytest.raises(TrainingError, match=r"with lr=1e\+30; give a lower --lr"):
        diagnosis.diagnose(folder, lr=1e30)


def test_steps_of_a_run_that_patience_ended(tmp_path: Path) -> None:
    """Shares of the steps are of those that were taken, not of those up to a log point."""
    folder, taken = tmp_path / "run", [0, 0, 0]

    class Heard(Silent):
        def stepped(self, experience: Any, step: int, loss: float | None) -> None:
            taken[experience.index] = step

    training = {"epochs": 2000, "validation": 0.25, "patience": 2, "lr": 0.5}  # a loss each 200 steps
    scenario = {"name": f"{toys.__file__}:Toy", "experiences": 3}
    config = toys.config(scenario=scenario, checkpoint=KEPT, training=training, evaluation={"every_steps": 1})
    document = experiment.run(config, folder, observer=Heard())
    assert all(0 < n < 200 for n in taken)
    for task, n in zip(diagnosis.diagnose(folder)["tasks"], taken[1:], strict=True):
        assert [share for share, _ in task["first_steps"]] == [k / n for k in range(n + 1)]
    run = diagnosis._Diagnosed(folder)
    assert [run._taken(j) for j in range(3)] == taken

    # As a run from before the last step was always logged.
    (folder / "run.json").write_text(json.dumps(document | {"losses": []}))
    assert [task["first_steps"] for task in diagnosis.diagnose(folder)["tasks"]] == [None, None]


# --- halves -------------------------------------------------------------------------------------------------------------


def test_halves_keep_people_together() -> None:
    spec = {"name": "biography", "persons": 20, "tasks": 1, "biographies": 1, "test_samples": 20}
    on = registry.create("scenarios", spec, "scenario").stream(0)
    read, old, new = on.experiences
    assert not diagnosis._mostly_within(read.test, read.train)
    assert not diagnosis._mostly_within(old.test, old.train), "questions about other people"
    assert diagnosis._mostly_within(new.test, new.train), "asked what was trained"
    a, b = diagnosis._halves(new, 0.5, seed=0)
    assert len(a) + len(b) == len(new.test)

    def names(rows: Tensor) -> set[tuple[int, ...]]:
        """The last three words before the question's end: no two people share a whole name."""
        held = []
        for row, person in zip(new.test.x.tolist(), new.groups.tolist(), strict=True):
            if any(row == other for other in rows.tolist()):
                held.append((person,))
        return set(held)

    assert len(names(a.x)) == len(names(b.x)) == 2
    assert not names(a.x) & names(b.x)
    with pytest.raises(UserError, match=r"share = 0\.01: leaves nothing on one side"):
        diagnosis._halves(new, 0.01, seed=0)


def test_groups_are_people() -> None:
    spec = {"name": "biography", "persons": 20, "tasks": 1, "biographies": 1}
    for e in registry.create("scenarios", spec, "scenario").stream(0).experiences[1:]:
        assert e.groups is not None
        assert len(e.groups) == len(e.test)
        of = {int(g): e.test.x[e.groups == g] for g in e.groups.unique()}
        assert {len(rows) for rows in of.values()} == {6}, "six questions about each"
        shared = [set.intersection(*(set(row.tolist()) for row in rows)) for rows in of.values()]
        assert len({frozenset(s) for s in shared}) == len(shared), "each has the words of a name that no other has"


def experience(rows: list[list[int]], groups: list[int] | None = None) -> Experience:
    x = torch.tensor(rows, dtype=torch.int32)
    data = TensorData(x, torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64))
    given = None if groups is None else torch.tensor(groups)
    return Experience(3, "made", [0], lambda: data, lambda: data, groups=given)


def test_halves_share_no_row() -> None:
    made = experience([[i // 4, 7] for i in range(80)])
    assert diagnosis._mostly_within(made.test, made.train)
    a, b = diagnosis._halves(made, 0.5, seed=0)
    assert (len(a), len(b)) == (40, 40)
    assert not set(map(tuple, a.x.tolist())) & set(map(tuple, b.x.tolist()))
    with pytest.raises(UserError, match="leaves nothing on one side of the 1 parts"):
        diagnosis._halves(experience([[5, 5]] * 6), 0.5, seed=0)


def test_people_who_share_a_row_stay_together() -> None:
    made = experience([[0], [1], [1], [2], [3], [0], [4], [2], [5]], [9, 9, 4, 4, 7, 7, 2, 3, 3])
    assert made.groups is not None
    merged = diagnosis._together(made.groups, made.test.x)
    # 9 and 4 share [1], 9 and 7 share [0], 4 and 3 share [2]; whoever is 2 shares nothing.
    assert merged.tolist() == [3, 3, 3, 3, 3, 3, 2, 3, 3]
    a, b = diagnosis._halves(made, 0.5, seed=0)
    assert sorted((len(a), len(b))) == [1, 8]


@pytest.mark.parametrize("groups", [None, [5, 5, 5, 1, 1, 0, 0, 0, 3, 3, 8, 8]])
def test_halves_without_equal_rows_are_drawn_as_ever(groups: list[int] | None) -> None:
    made = experience([[i] for i in range(12)], groups)
    of = torch.arange(12) if groups is None else torch.tensor(groups)
    there = of.unique()
    drawn = there[seeding.permutation(len(there), 11, "diagnose", "half", 3)][: round(0.4 * len(there))]
    a, b = diagnosis._halves(made, 0.4, seed=11)
    assert a.x.flatten().tolist() == torch.isin(of, drawn).nonzero().flatten().tolist()
    assert sorted([*a.x.flatten().tolist(), *b.x.flatten().tolist()]) == list(range(12))


# --- label mass ---------------------------------------------------------------------------------------------------------


def test_mass_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ran(folder, toy={"experiences": 3})
    found = diagnosis.diagnose(folder, steps=1)["tasks"][1]["mass"]
    made = diagnosis._Diagnosed(folder)
    test = made.trainer.stream.experiences[1].test
    for moment, learnt in (("before", 2), ("after", 3)):
        made.load(learnt)
        with torch.no_grad():
            shares = made.learner.model.eval()(test.x, test.t).softmax(1).mean(0)
        assert found[moment]["own"] == pytest.approx(float(shares[2:4].sum()), rel=1e-5)
        assert found[moment]["later"] == pytest.approx(float(shares[4:].sum()), rel=1e-5)
        assert found[moment]["shared"] == 0


@pytest.mark.parametrize("incremental", ["domain", "task"])
def test_no_mass_where_no_label_is_a_later_tasks_alone(incremental: str, tmp_path: Path) -> None:
    ran(tmp_path / "run", toy={"incremental": incremental})
    document = diagnosis.diagnose(tmp_path / "run", steps=1)
    assert document["tasks"][0]["mass"] is None
    assert "–" in str(reporting._diagnosed_rows(document))


# --- angles -------------------------------------------------------------------------------------------------------------


def test_angles_by_hand() -> None:
    def at(*values: float) -> dict[str, Tensor]:
        return {"w": torch.tensor(values), "v": torch.tensor([values[0]])}

    first, second = diagnosis.change(at(0, 0), at(3, 0), {}), diagnosis.change(at(3, 0), at(4, 1), {})
    assert diagnosis.angle(first, second, ["w"]) == pytest.approx(45)
    assert diagnosis.angle(first, second, ["v"]) == pytest.approx(0)
    assert diagnosis.length(first, ["w", "v"]) == pytest.approx(math.sqrt(18))
    back = diagnosis.change(at(4, 1), at(3, 0), {})
    assert diagnosis.angle(second, back, ["w", "v"]) == pytest.approx(180)
    assert diagnosis.angle(first, diagnosis.change(at(3, 0), at(3, 0), {}), ["w"]) is None
    right_angle = diagnosis.change(at(0, 0), at(0, 2), {})
    assert diagnosis.angle(first, right_angle, ["w"]) == pytest.approx(90)


def test_a_head_that_grew_is_compared_where_both_are() -> None:
    small, large = {"w": torch.zeros(2, 3)}, {"w": torch.ones(4, 3)}
    update = diagnosis.change(small, large, {})
    assert diagnosis.length(update, ["w"]) == pytest.approx(math.sqrt(6))
    later = diagnosis.change(large, {"w": large["w"] + 1}, {})
    assert diagnosis.angle(update, later, ["w"]) == pytest.approx(0, abs=1e-4)


def test_low_rank_updates_are_those_of_the_products() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = AdaptedLayer("a", "b", 2, 0.5)
    states = [{"a": torch.randn(2, 5, generator=rng), "b": torch.randn(4, 2, generator=rng)} for _ in range(3)]
    dense = [{"w": 0.5 * s["b"].double() @ s["a"].double()} for s in states]
    low = [diagnosis.change(s, t, {"q": layer}) for s, t in pairwise(states)]
    full = [diagnosis.change(s, t, {}) for s, t in pairwise(dense)]
    assert isinstance(low[0]["q"], LowRank)
    assert diagnosis.length(low[0], ["q"]) == pytest.approx(diagnosis.length(full[0], ["w"]))
    assert diagnosis.angle(*low, ["q"]) == pytest.approx(diagnosis.angle(*full, ["w"]))
    assert diagnosis.length(diagnosis.change(states[0], states[0], {"q": layer}), ["q"]) == 0


def test_layers_are_stages_and_frozen_ones_have_no_angle(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    strategy = {"name": "freeze", "modules": ["backbone.layers.0"], "from_experience": 1}
    ran(folder, toy={"experiences": 3}, strategy=strategy)
    updates = diagnosis.diagnose(folder, steps=1)["updates"]
    assert updates["layers"] == ["layers.0", "layers.1", "head"]
    states = [checkpoint.load_weights(folder / "weights" / f"{n}.safetensors") for n in range(4)]
    flat = [
        torch.cat([(t[n] - s[n]).flatten() for n in s if n.startswith("backbone.layers.1")]).double()
        for s, t in pairwise(states)
    ]
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], 0)
    assert updates["angles"][0][1] == pytest.approx(math.degrees(math.acos(float(cosine))))
    assert updates["norms"][2][1] == pytest.approx(float(flat[2].norm()), rel=1e-5)
    assert [n[0] > 0 for n in updates["norms"]] == [True, False, False]
    assert [a[0] for a in updates["angles"]] == [None, None]


# --- the weights --------------------------------------------------------------------------------------------------------


def test_resumed_runs_have_the_same_weights(tmp_path: Path) -> None:
    on, naive = toys.stream(), [{"name": "naive"}]
    sections = {**toys.HARD, "checkpoint": {**KEPT, "weights_at": [5], "every_steps": 5}}

    def made(name: str) -> Any:
        place = tmp_path / name
        return toys.trainer(naive, on, checkpoints=place / "checkpoints", weights=place / "weights", **sections)

    made("whole").run()
    toys.stopped_at(25, made("cut"))
    toys.at_newest(made("cut")).run()
    files = sorted(p.name for p in (tmp_path / "whole" / "weights").iterdir())
    assert set(files) == {f"{n}.safetensors" for n in range(4)} | {f"{n}+5.safetensors" for n in range(3)}
    for name in files:
        assert (tmp_path / "cut" / "weights" / name).read_bytes() == (
            tmp_path / "whole" / "weights" / name
        ).read_bytes()


def test_weights_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    made = toys.trainer([{"name": "naive"}], toys.stream(), weights=tmp_path / "weights")
    made.run()
    assert not (tmp_path / "weights").exists()
    with pytest.raises(CheckpointError, match=r"run it again with checkpoint\.experiences=true"):
        checkpoint.load_weights(tmp_path / "weights" / "0.safetensors")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write weights"):
        checkpoint.save_weights(tmp_path / "file" / "0.safetensors", {"w": torch.zeros(1)})


@pytest.mark.parametrize("adapt", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_texts(adapt: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = {"name": "causal-lm", "weights": "tiny", "adapt": adapt, "lora_targets": ["*_proj"]}
    toy = {"experiences": 3, "form": "texts", "train": 30, "test": 20}
    run = ran(folder, toy=toy, model=model, training={"lr": 0.01, "optimizer": "adamw"})
    kept = checkpoint.load_weights(folder / "weights" / "0.safetensors")
    assert all("lora" in name for name in kept) == (adapt == "lora"), "of adapters, these alone"
    document = diagnosis.diagnose(folder, steps=4)
    layers = ["model.layers.0", "model.layers.1"]
    assert document["updates"]["layers"] == (
        layers if adapt == "lora" else ["model.embed_tokens", *layers, "model.norm"]
    )
    assert all(0 < a < 180 for row in document["updates"]["angles"] for a in row)
    task = document["tasks"][0]
    assert task["original"] == run["matrix"][0][0]
    assert task["forgotten"] == run["matrix"][-1][0]
    made = diagnosis._Diagnosed(folder)
    made.load(3)
    test = made.trainer.stream.experiences[0].test
    with torch.no_grad():
        said = made.learner.forward(Batch(test.x, test.y, test.t, 0)).softmax(2)[:, 0].mean(0)
    assert task["mass"]["after"]["own"] == pytest.approx(float(said[10:12].sum()), rel=1e-4)
    assert task["mass"]["after"]["later"] == pytest.approx(float(said[12:16].sum()), rel=1e-4)


def test_frozen_prefix(tmp_path: Path) -> None:
    """Recovery is on latents, as the run was."""
    model = {"name": "causal-lm", "weights": "tiny", "adapt": "full", "frozen": "model.layers.0"}
    run = ran(tmp_path / "run", toy={"form": "texts", "scoring": "first-token"}, model=model)
    document = diagnosis.diagnose(tmp_path / "run", steps=3)
    assert document["updates"]["layers"] == ["model.layers.1", "model.norm"]
    assert document["tasks"][0]["original"] == run["matrix"][0][0]


PROMPTED: dict[str, Any] = {
    "toy": {"experiences": 3, "form": "texts", "scoring": "first-token"},
    "model": {"name": "causal-lm", "weights": "tiny", "adapt": "full"},
    "training": {"lr": 0.05, "optimizer": "adam", "epochs": 1},
}


def test_a_pool_of_soft_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    strategy = {"name": "l2p", "pool": 6, "length": 2, "top": 2}
    run = ran(folder, strategy=strategy, checkpoint={**KEPT, "weights_at": [2]}, **copy.deepcopy(PROMPTED))
    document = diagnosis.diagnose(folder, steps=3)
    assert document["updates"]["layers"] == ["backbone.prefix.pool"]
    states = [checkpoint.load_weights(folder / "weights" / f"{n}.safetensors") for n in range(4)]
    trained = [f"backbone.prefix.pool.{part}" for part in ("prompts", "keys")]
    norms = [math.sqrt(sum(float((t[n] - s[n]).square().sum()) for n in trained)) for s, t in pairwise(states)]
    assert document["updates"]["whole"]["norms"] == pytest.approx(norms, rel=1e-5)
    for j, task in enumerate(document["tasks"]):
        assert (task["before"], task["original"]) == (run["initial"][j], run["matrix"][j][j])
        assert [point["step"] for point in task["along"]] == [2, 6]
        assert task["along"][-1]["forgotten"] == run["matrix"][j + 1][j]
    assert "While the next task was learnt" in reporting.write_again(folder).read_text()


@pytest.mark.parametrize("bottleneck", [None, 8])
def test_prompts_that_only_their_own_task_reads(
    bottleneck: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    strategy = {"name": "progressive-prompts", "length": 2, "bottleneck": bottleneck}
    ran(folder, strategy=strategy, **copy.deepcopy(PROMPTED))

    def refuse(self: Any, *args: Any) -> None:
        raise AssertionError("it was refused too late")

    with monkeypatch.context() as patch:
        for name in ("score", "recover", "mass"):
            patch.setattr(diagnosis._Diagnosed, name, refuse)
        match = (
            "diagnose: strategy 'progressive-prompts' trains parameters of each task's own, and none that 'toy 0' reads "
            "before any training, so its recovery would tell nothing; diagnose a run of a strategy whose tasks share"
        )
        with pytest.raises(UserError, match=match) as caught:
            diagnosis.diagnose(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "diagnosis.json").exists()

    monkeypatch.setattr(diagnosis._Diagnosed, "_check_trains", lambda self: None)
    made = diagnosis._Diagnosed(folder)
    made.load(3)
    tests = [e.test for e in made.trainer.stream.experiences]
    assert [made._reads_trained(test) for test in tests] == [False, False, True], "the newest prompt is the last task's"


def test_tasks_that_are_told_may_share_what_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    strategy = {"name": "hnet", "task_embedding": 4, "chunk": 500, "chunk_embedding": 4}
    ran(folder, toy={"incremental": "task"}, strategy=strategy)
    assert len(diagnosis.diagnose(folder, steps=2)["tasks"]) == 1


# --- the report ---------------------------------------------------------------------------------------------------------


def test_report_has_the_section_once_there_is_a_diagnosis(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ran(folder, toy={"experiences": 3}, evaluation={"every_steps": 4})
    page = reporting.write_again(folder)
    assert page == folder / "report.html"
    assert "Diagnosis" not in page.read_text()
    document = diagnosis.diagnose(folder, steps=5)
    text = reporting.write_again(folder).read_text()
    twin = (folder / "report.md").read_text()
    for name in ("recovery-1", "angles-1", "first-steps-1"):
        assert f'id="{name}-' in text
        assert f"report_files/{name}.svg" in twin
        assert (folder / "report_files" / f"{name}.svg").is_file()
    for task in document["tasks"]:
        assert task["verdict"] in text
        assert task["verdict"] in twin
    (folder / "diagnosis.json").write_text('{"tasks": [{}], "updates": {}}')
    with pytest.raises(UserError, match=r"diagnosis.json' is damaged .*; run cl-lab diagnose again, or delete it"):
        reporting.write_again(folder)


# --- mistakes -----------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    def refused(match: str, folder: Path, kind: type[UserError] = UserError, **settings: Any) -> None:
        with pytest.raises(kind, match=match) as caught:
            diagnosis.diagnose(folder, **settings)
        assert "\n" not in str(caught.value)

    refused("holds no run", tmp_path / "nowhere")
    experiment.run(toys.config(), tmp_path / "bare")
    refused("kept no weights; run it again, without --resume, with checkpoint.experiences=true", tmp_path / "bare")
    whole = tmp_path / "whole"
    ran(whole)
    refused(r"steps = 0: must be 1 or more", whole, ConfigError, steps=0)
    refused(r"lr = -1: must be above 0", whole, ConfigError, lr=-1)
    refused(r"lr = nan: must be above 0", whole, ConfigError, lr=math.nan)
    refused(r"share = 1: must lie between 0 and 1", whole, ConfigError, share=1)
    refused(r"threshold = 0\.3: must lie between 0\.5 and 1", whole, ConfigError, threshold=0.3)
    (whole / "weights" / "1.safetensors").write_bytes(b"damaged")
    refused(r"weights .*1\.safetensors cannot be read", whole, steps=1)
    (whole / "weights" / "1.safetensors").unlink()
    refused("kept no weights after 1 experiences", whole)
    ran(tmp_path / "one", toy={"experiences": 1})
    refused("has learnt 1 of 1 experiences, and two at least are needed", tmp_path / "one")
    ran(tmp_path / "icarl", strategy={"name": "icarl", "memory": 20})
    refused("strategy 'icarl' answers with more than the model's own weights", tmp_path / "icarl")
    (tmp_path / "compared" / "runs" / "naive-seed0").mkdir(parents=True)
    (tmp_path / "compared" / "config.yaml").write_text((whole / "config.yaml").read_text())
    refused("holds a comparison; name one of its runs, for example .*naive-seed0", tmp_path / "compared")
    (tmp_path / "soon").mkdir()
    (tmp_path / "soon" / "config.yaml").write_text((whole / "config.yaml").read_text())
    refused("has not begun", tmp_path / "soon")
    text = (tmp_path / "bare" / "config.yaml").read_text()
    (tmp_path / "bare" / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    (tmp_path / "bare" / "weights").mkdir()
    for n in range(4):
        checkpoint.save_weights(tmp_path / "bare" / "weights" / f"{n}.safetensors", {})
    refused("ran on other test data than are there now", tmp_path / "bare")
    document = json.loads((whole / "run.json").read_text())
    document["experiences"][0]["train_digest"] = "0" * 16
    (whole / "run.json").write_text(json.dumps(document))
    (whole / "weights" / "1.safetensors").touch()
    refused(r"ran on other training data than are there now \(train_digest of experience 1: 0{16}, now", whole)
