"""cl-lab: a laboratory for continual learning and model editing.

Importing this package is cheap: nothing heavy (torch, Avalanche, MLflow) is loaded until a run needs it.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

__version__ = "0.1.0"


def load(folder: str | pathlib.Path) -> Any:
    """A deployed model with its edits, an :class:`~cl_lab.editable.EditableModel`, from a deployment's folder or its export.

    ``load(folder).answer(["The capital of Peru is"])`` asks it. Raises as :func:`cl_lab.deployment.load_exported`.
    """
    return importlib.import_module("cl_lab.deployment").load_exported(pathlib.Path(folder))
