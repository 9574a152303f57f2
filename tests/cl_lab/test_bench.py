"""The benchmarks run, at toy size, and their contestants learn the same thing; how fast they are is not asserted."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cl_lab import bench, bench_serving, registry
from cl_lab.errors import ConfigError, DataError
from strategies.wise import Wise

pytestmark = pytest.mark.slow

TINY = {"train_samples": 300, "test_samples": 100}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small workloads on made-up data; and no benchmark may leave another thread count behind."""
    for name, work in bench.WORKLOADS.items():
        small = replace(work, scenario=None, lr=0.1, **TINY)
        if name == "resnet":
            small = replace(small, experiences=2, classes=4, shape=(3, 8, 8), train_samples=20, test_samples=10)
        monkeypatch.setitem(bench.WORKLOADS, name, small)
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def race(name: str) -> dict[str, dict[str, Any]]:
    rows = bench.run(name, [1], 1)
    for row in rows:
        for contestant in ("ours", "avalanche", "avalanche_lean", "bare"):
            assert row[f"{contestant}_s"] > 0
            assert 0 <= row[f"accuracy_{contestant}"] <= 1
        assert math.isclose(row["speedup"], row["avalanche_s"] / row["ours_s"])
        assert math.isclose(row["over_bare"], row["ours_s"] / row["bare_s"])
        assert (row["threads"], row["repeats"], row["data"]) == (1, 1, "made-up")
    return {row["strategy"]: row for row in rows}


def test_loop() -> None:
    rows = race("loop")
    assert list(rows) == ["naive", "replay", "ewc", "ewc-1000"]
    assert {"strategy", "threads", "ours_s", "avalanche_s", "bare_s", "accuracy_ours", "accuracy_avalanche"} <= set(
        rows["naive"]
    )
    # The same batches and the same arithmetic: equal but for rounding.
    assert rows["naive"]["accuracy_ours"] == pytest.approx(rows["naive"]["accuracy_bare"], abs=0.01)
    assert rows["ewc"]["accuracy_ours"] == pytest.approx(rows["ewc"]["accuracy_bare"], abs=0.01)
    # Different draws of the memory, and of the order in Avalanche's case.
    for contestant in ("ours", "avalanche", "avalanche_lean", "bare"):
        assert rows["naive"][f"accuracy_{contestant}"] <= 0.25
        assert rows["replay"][f"accuracy_{contestant}"] > 0.5


def test_online() -> None:
    rows = race("online")
    assert list(rows) == ["naive", "replay"]
    assert rows["naive"]["accuracy_ours"] == pytest.approx(rows["naive"]["accuracy_bare"], abs=0.01)
    assert min(rows["replay"][f"accuracy_{c}"] for c in ("ours", "avalanche", "avalanche_lean", "bare")) > 0.5


def test_resnet() -> None:
    assert list(race("resnet")) == ["naive", "replay"]


def test_the_same_weights_come_out_of_ours_and_the_bare_loop() -> None:
    """Not only the accuracy: naive and EWC end in the same parameters."""
    work = bench.WORKLOADS["loop"]
    stream, _ = bench._stream(work)
    torch.manual_seed(0)
    start = registry.create("models", work.model, "model").build(stream)
    floats = bench._kept(stream, lambda d: type(d)(bench._as_input(d.x, start), d.y, d.t))
    for strategy in ("naive", "ewc"):
        ours, bare = copy.deepcopy(start), copy.deepcopy(start)
        bench._ours(work, stream, ours, strategy)
        bench._bare(work, floats, bare, strategy)
        for name, value in ours.state_dict().items():
            assert not torch.equal(value, start.state_dict()[name])
            torch.testing.assert_close(value, bare.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FISHER_SAMPLES", 40)
    monkeypatch.setattr(bench, "VMAP_SAMPLES", 20)
    (row,) = bench.run("fisher", [1], 1)
    assert (row["samples"], row["vmap_samples"]) == (40, 20)
    assert row["max_relative_difference"] < 1e-5
    assert row["ours_s"] > 0
    assert row["ratio"] == pytest.approx(row["vmap_s"] / row["ours_s"])


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COMMANDS", (("--version",),))
    (row,) = bench.run("startup", [1, 2], 1)
    assert row["command"] == "cl-lab --version"
    assert 0 < row["seconds"] < 60


def test_absent_data_is_replaced_by_made_up_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> Any:
        raise DataError("fashion-mnist: not found")

    monkeypatch.setattr(registry, "create", absent)
    stream, data = bench._stream(replace(bench.WORKLOADS["loop"], scenario="split-fashion-mnist"))
    assert data == "made-up"
    assert [e.classes for e in stream.experiences] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert all(set(e.train.y.tolist()) == set(e.classes) for e in stream.experiences)
    assert stream.experiences[0].train.x.dtype == torch.uint8


def test_unknown_names_and_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'loop'"):
        bench.run("lop", [1], 1)
    with pytest.raises(ConfigError, match="threads = 0"):
        bench.run("loop", [0], 1)


SMALL_TEXTS = {"weights": "tiny", "texts": 20, "tokens": 8, "batch_size": 6}


def test_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TEXTS", SMALL_TEXTS)
    monkeypatch.setattr(bench, "FROZEN", 1)
    (row,) = bench.run("prefix", [1], 2)
    assert row["loss_kept"] == pytest.approx(row["loss_run"], rel=1e-4)
    assert all(row[f"{way}_{epoch}_s"] > 0 for way in ("run", "kept") for epoch in ("first", "later"))
    assert row["speedup_later"] == pytest.approx(row["run_later_s"] / row["kept_later_s"])


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TEXTS", SMALL_TEXTS)
    (row,) = bench.run("precision", [1], 2)
    assert row["loss_bf16"] == pytest.approx(row["loss_fp32"], rel=0.02)
    assert row["loss_bf16"] != row["loss_fp32"], "the setting did something"
    assert row["speedup"] == pytest.approx(row["fp32_step_s"] / row["bf16_step_s"])


@pytest.mark.slow
def test_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = {"name": "ft-m", "lr": 0.02, "steps": 60, "contexts": 0}
    small = {"model": "tiny", "editor": editor, "clients": 3, "tokens": 8, "edits": 3, "seconds": 1.0}
    monkeypatch.setattr(bench_serving, "SERVING", small)
    (row,) = bench.run("serving", [1], 1)
    assert (row["failed"], row["mixed"], row["edits"], row["clients"]) == (0, 0, 3, 3)
    assert row["answers"] > 20
    assert row["ratio of p95"] == pytest.approx(row["p95 with"] / row["p95 without"])
    assert 0 < row["first token p95 with"] <= row["p95 with"]
    assert row["p50 without"] <= row["p95 without"]
    assert min(row["tokens/s without"], row["tokens/s with"], row["GiB before"]) > 0


def test_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {
        "weights": "tiny",
        "layer": 2,
        "contexts": 2,
        "steps": 2,
        "rho": 0.2,
        "edits": 12,
        "tokens": 4,
    }
    small["together"] = 3
    monkeypatch.setattr(bench, "EDITS", small)
    (row,) = bench.run("edits", [1], 2)
    assert row["speedup"] == pytest.approx(row["whole_model_s"] / row["same_work_s"])
    assert row["speedup_own"] == pytest.approx(row["whole_model_s"] / row["wise_s"])
    assert row["routing"] == pytest.approx(row["routed_answer_s"] / row["answer_s"])
    assert row["memories"] == -(-12 // Wise.edits_per_shard)
    assert min(row["wise_s"], row["ultraedit_s"], row["ultraedit_together_s"], row["answer_s"]) > 0


def test_until_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways are measured on the same facts, beside the loop that stops as early as can be."""
    monkeypatch.setattr(bench, "EDITS", bench.EDITS | {"weights": "tiny", "layer": 2, "rho": 0.5})
    facts = (("The capital of {} is", "Kenya", "B"), ("The capital of {} is", "Chile", "7"))
    small = {
        "loop": {"contexts": 1, "steps": 4, "lr": 0.01},
        "wise": {"contexts": 0, "chat": False, "stop_at": 0.5, "lr": 0.05, "steps": 150},
        "its_margin": {"sampled": 1, "neighbours": 0},
        "facts": facts,
    }
    monkeypatch.setattr(bench, "UNTIL_RIGHT", small)
    whole, loop, *ours = bench.run("until-right", [1], 1)
    assert whole["steps"] == 4, "the released code's loop does not stop"
    assert 0 <= loop["steps"] <= 4
    assert loop["speedup"] == 1
    assert [row["way"] for row in ours] == [
        f"wise, {margin}, {how}"
        for margin in ("its own margin", "the loop's margin")
        for how in ("one at a time", "in one shard")
    ]
    for row in ours:
        assert row["held"] == "2 of 2", row
        assert row["speedup"] == pytest.approx(loop["seconds"] / row["seconds"])


def test_remind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a streamed picture's time add up, and where no codes are made none are counted."""
    small = {
        "model": {"name": "convnet"},
        "split": "layers.0",
        "base_samples": 40,
        "streamed_samples": 4,
        "rows": (("remind", {"codebooks": 2, "codebook_size": 8}), ("remind", {"codebooks": None}), ("slda", {})),
    }
    monkeypatch.setattr(bench, "REMIND", small)
    coded, plain, slda = bench.run("remind", [1], 1)
    for row in (coded, plain, slda):
        assert row["frozen_ms"] + row["codes_ms"] + row["other_ms"] == pytest.approx(row["all_ms"])
        assert row["pictures_per_second"] == pytest.approx(1000 / row["all_ms"])
        assert row["other_ms"] > 0
    assert coded["frozen_ms"] > 0
    assert coded["codes_ms"] > plain["codes_ms"]
    assert slda["frozen_ms"] == 0
