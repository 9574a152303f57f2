"""What a run ran on: package versions, git commit, machine. Saved with every run, and what ``cl-lab doctor`` shows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "cl-lab",
    "accelerate",
    "avalanche-lib",
    "deepspeed",
    "mlflow",
    "numpy",
    "omegaconf",
    "peft",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
    "torchvision",
    "transformers",
)
CHANGES = "+changes"
"""Behind the commit of a checkout whose files differ from it."""


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(processes: int, asked: int | None = None) -> int:
    """CPU threads for each of ``processes``: more than cores // processes and they wait for each other, spinning.

    ``OMP_NUM_THREADS`` lowers it, as it does for every program on torch; ``asked`` goes before both.
    """
    own = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return asked or max(1, min(cores() // processes, int(own) if own.isdecimal() and int(own) else cores()))


@cache
def versions() -> dict[str, str]:
    """Installed versions of the packages a result may depend on; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Commit of the checkout this code runs from, with ``+changes`` where files differ; ``None`` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (CHANGES if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def snapshot(threads: int | None = None) -> dict[str, Any]:
    """The environment as it goes beside a run's results."""
    return {
        "packages": versions(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": cores(),
        "threads": threads,
    }
