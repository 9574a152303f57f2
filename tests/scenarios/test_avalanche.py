"""The bridge: divisions are right, and importing Avalanche leaves the process as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scenarios import _avalanche

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_classes_are_divided_without_loss_or_overlap() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = {"train": torch.randint(0, 6, (500,), generator=rng), "test": torch.randint(0, 6, (90,), generator=rng)}
    parts = _avalanche.by_classes(labels, [3, 0, 5, 1, 2, 4], [1, 2, 3])
    for name, y in labels.items():
        rows = [p[name] for p in parts]
        assert [sorted(set(y[r].tolist())) for r in rows] == [[3], [0, 5], [1, 2, 4]]
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(len(y)))
        assert all(bool((r.diff() > 0).all()) for r in rows)


def test_given_rows_come_back() -> None:
    labels = {"train": torch.arange(10) % 2, "test": torch.arange(4) % 2}
    rows = [{"train": torch.arange(5), "test": torch.arange(4)}, {"train": torch.arange(3, 9), "test": torch.arange(4)}]
    parts = _avalanche.by_rows(labels, rows)
    assert [p["train"].tolist() for p in parts] == [list(range(5)), list(range(3, 9))]
    assert _avalanche.task_labels(labels, rows) == [0, 1]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    _avalanche.by_classes({"train": torch.arange(4), "test": torch.arange(4)}, [3, 2, 1, 0], [2, 2])
    assert torch.equal(before, torch.get_rng_state())


def test_vision_imports_neither_avalanche_nor_torchvision() -> None:
    code = (
        "import sys, scenarios.vision; print([m for m in ('avalanche', 'torchvision', 'sklearn') if m in sys.modules])"
    )
    assert run(code) == "[]"


@pytest.mark.slow
def test_imports_undo_what_avalanche_does_to_torch() -> None:
    output = run(
        "import sys, torch\n"
        "from torch.distributed import distributed_c10d as c10d\n"
        "from torch.utils.data import Dataset\n"
        "before = c10d._unpickler, Dataset.__add__\n"
        "from scenarios import _avalanche\n"
        "slim = _avalanche.generators()\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'avalanche'])\n"
        "module = _avalanche.import_avalanche()\n"
        "print((c10d._unpickler, Dataset.__add__) == before)\n"
        "print(module.__version__, module.benchmarks.class_incremental_benchmark.__name__)\n"
        "_avalanche.generators.cache_clear(), _avalanche._column.cache_clear()\n"
        "whole = _avalanche.generators()\n"
        "labels = {'train': torch.arange(4), 'test': torch.arange(4)}\n"
        "print([p['train'].tolist() for p in _avalanche.by_classes(labels, [3, 2, 1, 0], [1, 3])])\n"
        "print(whole.DataAttribute is module.benchmarks.utils.DataAttribute)\n"
    )
    lines = output.splitlines()
    assert lines[0] == "[]"
    assert lines[1] == "True"
    assert lines[2].endswith("class_incremental_benchmark")
    assert lines[3:] == ["[[3], [0, 1, 2]]", "True"]


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file, in which no folder can be made, not even by root")
    output = run(
        "import os\n"
        "from scenarios import _avalanche\n"
        "_avalanche.import_avalanche()\n"
        "from avalanche.benchmarks.datasets.dataset_utils import default_dataset_location\n"
        "print(os.environ['HOME'], default_dataset_location('mnist'))",
        HOME=str(home),
        CL_LAB_CACHE=str(tmp_path / "cache"),
        MPLCONFIGDIR=str(tmp_path),
    )
    assert output == f"{home} {tmp_path / 'cache' / 'data' / 'mnist'}"
