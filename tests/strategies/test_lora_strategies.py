"""What strategies that keep past adapters promise on texts: what the conformance suite asks of those that classify."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file

from cl_lab import checkpoint, launch, registry
from cl_lab.errors import ConfigError
from cl_lab.protocols import tensors_of
from cl_lab.trainer import Trainer

NAMES = ["lora-inc", "lora-merge", "olora", "reglora"]
OTHERS = ["kl", "lora-seq", "rehearsal-1pct", "selective"]  # without past adapters
LM = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"], "lora_rank": 4}
TRAINING = {"lr": 0.2, "epochs": 12}
HARD = toys.HARD | {"model": LM | {"lora_dropout": 0.2}}
STREAM = {"form": "texts", "scoring": "first-token"}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "torch"},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}

every = pytest.mark.parametrize("name", NAMES)


def run(name: str, **sections: Any) -> Trainer:
    made = toys.trainer([toys.own_settings(name)], toys.stream(**STREAM), **({"model": LM} | sections))
    made.run()
    return made


@every
def test_learns_the_toy_texts(name: str) -> None:
    matrix = run(name, training=TRAINING).record.matrix
    assert sum(matrix[i][i] for i in range(3)) / 3 >= 0.9, matrix


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_same_seed_same_run(name: str) -> None:
    one, two, other = (run(name, seed=seed, training={"epochs": 1}) for seed in (5, 5, 6))
    toys.assert_same(one, two)
    assert toys.differing(toys.weights_of(one), toys.weights_of(other))


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_accumulation_changes_nothing(name: str) -> None:
    whole, pieces = (run(name, training={"accumulate": k, "lr": 0.05, "clip_norm": 5.0}) for k in (1, 3))
    assert whole.strategy.penalty(whole.learner) == pytest.approx(pieces.strategy.penalty(pieces.learner), abs=1e-4)
    for key, value in toys.weights_of(whole).items():
        assert torch.allclose(value, toys.weights_of(pieces)[key], atol=1e-5), key
    pairs = zip(tensors_of(whole.strategy.state_dict()), tensors_of(pieces.strategy.state_dict()), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs if a.is_floating_point())


@every
@pytest.mark.parametrize("first", [True, False])
def test_naive_beside_it_changes_nothing(name: str, first: bool) -> None:
    alone = run(name, training={"epochs": 1})
    links = [{"name": "naive"}, toys.own_settings(name)]
    chained = toys.trainer(links if first else links[::-1], toys.stream(**STREAM), model=LM, training={"epochs": 1})
    chained.run()
    assert chained.record.matrix == alone.record.matrix
    assert not toys.differing(toys.weights_of(alone), toys.weights_of(chained))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_stopped_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    def resumed() -> Trainer:
        links = [toys.own_settings(name)]
        return toys.at_newest(toys.trainer(links, toys.stream(**STREAM), checkpoints=tmp_path, **HARD))

    whole = run(name, **HARD)
    assert whole.record.steps == (69 if name == "rehearsal-1pct" else 54)
    for at in (1, 18, 19, 25, 40, 53):  # in the middle, at the last step of an experience, at the first of the next
        toys.stopped_at(at, resumed())
    trainer = resumed()
    trainer.run()
    toys.assert_same(trainer, whole)


@every
def test_state_survives_the_disk(name: str, tmp_path: Path) -> None:
    done = run(name, training={"epochs": 1})
    state = done.strategy.state_dict()
    read = checkpoint.read(checkpoint.save(tmp_path, 1, state, keep=1))
    assert checkpoint.equal(read, state)
    fresh = toys.trainer([toys.own_settings(name)], toys.stream(**STREAM), model=LM).strategy
    beginner = checkpoint.read(checkpoint.save(tmp_path, 2, fresh.state_dict(), keep=1))
    fresh.load_state_dict(read)
    assert checkpoint.equal(fresh.state_dict(), state)
    fresh.load_state_dict(beginner)
    assert not list(tensors_of(fresh.state_dict()))


@every
def test_a_model_without_adapters_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"but Classifier has none; use model causal-lm with adapt: lora$") as caught:
        run(name, model=LM | {"adapt": "full"})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="but Linear has none"):
        registry.create("strategies", {"name": name}, "strategy").prepare(torch.nn.Linear(2, 2), toys.stream(**STREAM))


@every
def test_two_that_say_which_adapters_answer_are_refused(name: str) -> None:
    links = [{"name": "ilora", "memory": 20}, toys.own_settings(name)]
    with pytest.raises(ConfigError, match=f"ilora and {name} both decide which adapters answer; keep one"):
        toys.trainer(links, toys.stream(**STREAM), model=LM)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_process(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(toys.__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    kind = ENGINES[engine]
    classes = {n: registry.load("strategies", n)[0] for n in NAMES}
    assert {n for n, c in classes.items() if c.whole_parameters} == {"olora", "reglora"}
    names = [n for n in NAMES if kind.get("zero") != 3 or not classes[n].whole_parameters]
    sections: dict[str, Any] = {"model": LM, "training": {"lr": 0.05, "epochs": 1}}
    jobs = [
        {
            "key": name,
            "links": [toys.own_settings(name)],
            "stream": STREAM,
            "sections": {**sections, "engine": {**kind, "processes": 2, "threads": 1}},
        }
        for name in names
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    assert launch.run_ranks("two_ranks", [str(tmp_path)], 2, 1) == 0
    matrices = json.loads((tmp_path / "matrices.json").read_text())
    for name in names:
        alone = run(name, **sections)
        theirs = load_file(tmp_path / f"{name}.safetensors")
        for key, value in toys.weights_of(alone).items():
            assert torch.allclose(value, theirs[key], atol=1e-5), (name, key)
        for mine, other in zip([alone.record.initial, *alone.record.matrix], matrices[name], strict=True):
            assert mine == pytest.approx(other, abs=1 / 40 + 1e-9), name
