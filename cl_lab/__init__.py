"""cl-lab: a laboratory for continual learning and model editing.

Importing this package is cheap: nothing heavy (torch, Avalanche, MLflow) is loaded until a run needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cl_lab.editable import EditableModel

__version__ = "0.1.0"


def load(folder: str | Path) -> EditableModel:
    """A deployed model with its edits, from the folder of a deployment or of ``cl-lab edit export``.

    ``load(folder).answer(["The capital of Peru is"])`` asks it. Raises as :func:`cl_lab.deployment.load_exported`.
    """
    import pathlib

    from cl_lab.deployment import load_exported

    return load_exported(pathlib.Path(folder))
