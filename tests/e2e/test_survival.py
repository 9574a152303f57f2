"""A run survives: killed at any moment, stopped by a signal, or with a damaged checkpoint, it ends in the same matrix."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import CommandLine

pytestmark = pytest.mark.slow

KILLS = 10
SECTIONS = {
    "training": "{epochs: 30, batch_size: 16, lr: 0.01, optimizer: adam, optimizer_state: kept}",
    "model": "{name: mlp, hidden: [64], dropout: 0.2}",
    "checkpoint": "{every_steps: 20}",
}


def wait_for_checkpoints(process: subprocess.Popen[str], run: Path, known: set[str], more: int) -> None:
    """Until ``more`` checkpoints beyond ``known`` have been seen, or the run has ended."""
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while len(seen) < more and process.poll() is None and time.monotonic() < deadline:
        seen |= {p.name for p in run.glob("checkpoints/step-*")} - known
        time.sleep(0.001)


@pytest.mark.parametrize(
    "strategy", ["naive", "{name: ewc, strength: 10.0, fisher: sampled}", "{name: replay, memory: 60}"]
)
def test_killed_at_random_moments(cl_lab: CommandLine, write_config: Callable[..., str], strategy: str) -> None:
    config = write_config(strategy=strategy, **SECTIONS)
    whole = cl_lab.json("run", config, "--out", "whole")
    moments = random.Random(strategy)
    run, kills = cl_lab.folder / "killed", 0
    arguments = ["run", config, "--out", "killed"]
    while kills < KILLS:
        known = {p.name for p in run.glob("checkpoints/step-*")}
        process = cl_lab.start(*arguments, *(["--resume"] if kills else []))
        wait_for_checkpoints(process, run, known, moments.randint(1, 8))
        time.sleep(moments.uniform(0, 0.05))  # in a step, in an evaluation, in the middle of writing
        process.kill()
        process.communicate()
        if json.loads((run / "run.json").read_text())["status"] == "finished":
            break
        kills += 1
    assert kills >= 5, "the run is too short to be killed"
    resumed = cl_lab.json("run", config, "--out", "killed", "--resume")
    assert resumed["status"] == "finished"
    assert resumed["resumed"] >= kills - 1
    assert resumed["initial"] == whole["initial"]
    assert resumed["matrix"] == whole["matrix"]
    assert [p["loss"] for p in resumed["losses"]] == [p["loss"] for p in whole["losses"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_leaves(
    cl_lab: CommandLine, write_config: Callable[..., str], number: signal.Signals, code: int
) -> None:
    config = write_config(strategy="{name: replay, memory: 60}", **SECTIONS)
    run = cl_lab.folder / "stopped"
    process = cl_lab.start("run", config, "--out", "stopped")
    wait_for_checkpoints(process, run, set(), 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "--resume" in err
    assert "Traceback" not in err
    document = json.loads((run / "run.json").read_text())
    assert document["status"] == "interrupted"
    resumed = cl_lab.json("run", config, "--out", "stopped", "--resume")
    whole = cl_lab.json("run", config, "--out", "whole")
    assert resumed["matrix"] == whole["matrix"]
    assert resumed["resumed"] == 1


def test_damaged_checkpoint(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config(strategy="{name: ewc, strength: 10.0}", **SECTIONS)
    run = cl_lab.folder / "damaged"
    process = cl_lab.start("run", config, "--out", "damaged")
    wait_for_checkpoints(process, run, set(), 6)
    process.kill()
    process.communicate()
    newest = max(run.glob("checkpoints/step-*"), key=lambda p: p.name) / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = cl_lab("run", config, "--out", "damaged", "--resume", "--json")
    assert newest.parent.name in resumed.stderr
    assert "damaged" in resumed.stderr
    whole = cl_lab.json("run", config, "--out", "whole")
    assert json.loads(resumed.stdout)["matrix"] == whole["matrix"]


def test_resume_refuses_another_experiment(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config()
    cl_lab("run", config, "--out", "first")
    line = cl_lab.error("run", config, "training.lr=0.2", "--out", "first", "--resume")
    assert "training" in line
    assert "--out" in line


def test_a_second_run_keeps_the_first(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config()
    first = cl_lab.json("run", config, "--out", "again")
    second = cl_lab.json("run", config, "--out", "again", "seed=1")
    assert json.loads((cl_lab.folder / "again.old-1" / "run.json").read_text())["matrix"] == first["matrix"]
    assert second["matrix"] != first["matrix"]
