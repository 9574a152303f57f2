"""One process equals two: plain torch, DDP and DeepSpeed ZeRO 0–3 give every strategy's score matrix.

Equal global batches and plain SGD, so that only the order of summation differs: final weights agree to 1e-5, scores to one
test sample. All strategies of an engine share one launch, because starting ranks costs more than training toys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import toys
from safetensors.torch import load_file

from cl_lab import experiment, launch, registry

NAMES = registry.names("strategies")
STREAM = {"incremental": "task"}
SHORTER = {"incremental": "task", "experiences": 2}  # DeepSpeed is made anew for each experience, which takes its time
PLAIN: dict[str, Any] = {"training": {"lr": 0.05, "batch_size": 15, "epochs": 2}}
# 60 rows make a batch of 59, whose ranks and pieces differ in size, and one of 1, which leaves a rank without rows.
UNEVEN: dict[str, Any] = {"training": {"lr": 0.05, "batch_size": 59, "epochs": 2, "accumulate": 2, "clip_norm": 1.0}}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "torch"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero": stage} for stage in range(4)},
}
ONE_SAMPLE = 1 / 40


def jobs(engine: dict[str, Any]) -> list[dict[str, Any]]:
    classes = {n: registry.load("strategies", n)[0] for n in NAMES}
    names = [n for n, c in classes.items() if "classification" in c.objectives]  # which the toys are
    names = [n for n in names if engine.get("zero") != 3 or not classes[n].whole_parameters]
    stream = STREAM if engine["kind"] == "torch" else SHORTER
    made = [{"key": name, "links": [toys.own_settings(name)], "stream": stream, "sections": PLAIN} for name in names]
    frozen = {"name": "freeze", "modules": ["backbone.layers.0"]}
    chain = [frozen, toys.own_settings("replay"), toys.own_settings("ewc")]
    made.append({"key": "chain-uneven", "links": chain, "stream": stream, "sections": UNEVEN})
    growing = {**PLAIN, "model": {**toys.MLP, "head": "growing"}}
    hidden = {**stream, "incremental": "class", "boundaries": False}
    made.append({"key": "hidden", "links": [toys.own_settings("replay")], "stream": hidden, "sections": growing})
    for job in made:
        job["sections"] = {**job["sections"], "engine": engine}
    return made


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_process(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(toys.__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    ranks = {**ENGINES[engine], "processes": 2, "threads": 1}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs(ranks)))
    assert launch.run_ranks("two_ranks", [str(tmp_path)], 2, 1) == 0
    matrices = json.loads((tmp_path / "matrices.json").read_text())

    wrong = []
    for job in jobs(ranks):
        job["sections"] = {**job["sections"], "engine": {"kind": "torch"}}
        alone = toys.trainer(job["links"], toys.stream(**job["stream"]), **job["sections"])
        record = alone.run()
        key = job["key"]
        worst = max(
            abs(a - b)
            for one, two in zip([record.initial, *record.matrix], matrices[key], strict=True)
            for a, b in zip(one, two, strict=True)
        )
        weights = toys.weights_of(alone)
        theirs = load_file(tmp_path / f"{key}.safetensors")
        assert weights.keys() == theirs.keys()
        apart = max(float((weights[n].double() - theirs[n].double()).abs().max()) for n in weights)
        if worst > ONE_SAMPLE + 1e-9 or apart > 1e-5:
            wrong.append(f"{key}: scores differ by {worst:.3f}, weights by {apart:.1e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"kind": "deepspeed", "zero": 2}], ids=["ddp", "zero2"])
def test_a_run_starts_its_own_ranks(engine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
    sections = {"scenario": {"name": f"{toys.__file__}:Toy"}, "strategy": {"name": "replay", "memory": 40}}
    one = experiment.run(toys.config(**sections), tmp_path / "one")
    two = experiment.run(toys.config(**sections, engine={**engine, "processes": 2, "threads": 1}), tmp_path / "two")
    assert two["status"] == one["status"] == "finished"
    assert len(two["matrix"]) == 3
    for row, other in zip(one["matrix"], two["matrix"], strict=True):
        assert row == pytest.approx(other, abs=ONE_SAMPLE + 1e-9)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["matrix"] == two["matrix"]
    assert not compiled.exists(), "a compiler's lock outlives a killed run, and the next one would wait for it for ever"
