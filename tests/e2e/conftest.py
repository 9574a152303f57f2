"""Running the command line as a user does: a process of its own, in an empty folder, with one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class CommandLine:
    """``cl-lab`` in a working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "CL_LAB_CACHE": str(folder / "cache")}
        self.environment.pop("CL_LAB_DATA", None)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The process, running."""
        return subprocess.Popen(
            [sys.executable, "-m", "cl_lab", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run to the end and expect an exit code."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: str) -> Any:
        """Run with ``--json`` and read stdout, which must hold that document alone."""
        return json.loads(self(*arguments, "--json").stdout)

    def error(self, *arguments: str) -> str:
        """Run something that must fail as the user's mistake: exit code 2, one line, no traceback. Returns that line."""
        done = self(*arguments, code=2)
        assert "Traceback" not in done.stderr, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        assert done.stderr.rstrip().endswith(lines[0]), done.stderr
        return lines[0]


@pytest.fixture
def cl_lab(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., str]:
    """Writes a small experiment on split-digits and returns its path; keyword arguments are YAML of whole sections."""

    def write(*lines: str, **sections: str) -> str:
        settings = {
            "scenario": "{name: split-digits, experiences: 5, train_limit: 120, test_limit: 60}",
            "model": "{name: mlp, hidden: [32]}",
            "strategy": "naive",
            "training": "{epochs: 2, batch_size: 16, lr: 0.1}",
            "tracking": "{uri: null}",
        } | sections
        text = "\n".join([*(f"{key}: {value}" for key, value in settings.items()), *lines])
        path = tmp_path / "experiment.yaml"
        path.write_text(text + "\n")
        return path.name

    return write
