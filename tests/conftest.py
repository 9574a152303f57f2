"""What all tests share: toy streams and runs on them, importable as ``toys``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _share(name: str) -> None:
    """Make ``tests/<name>.py`` importable by its bare name without putting the folder on ``sys.path``."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_share("toys")
