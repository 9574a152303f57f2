"""The set of versions that `make` installs, which must be one that every Python we promise can install."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PLACE = Path(__file__).parents[1] / "constraints.txt"
OLDEST = "3.11.0"

pytestmark = pytest.mark.checkout


def pins() -> dict[str, str]:
    lines = (line for line in PLACE.read_text().splitlines() if line and not line.startswith("#"))
    return {str(canonicalize_name(name)): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_version_that_is_pinned_admits_the_oldest_python() -> None:
    """A pin that wants a later patch of Python leaves pip searching for minutes, and then at a loss."""
    wanted, looked_at, wrong = pins(), 0, []
    for found in importlib.metadata.distributions():
        name = str(canonicalize_name(found.metadata["Name"]))
        if wanted.get(name) == found.version.partition("+")[0]:
            looked_at += 1
            needs = str(found.metadata.json.get("requires_python", ""))
            if not SpecifierSet(needs).contains(OLDEST):
                wrong.append(f"{name}=={found.version} needs Python {needs}")
    assert not wrong
    assert looked_at > 0.8 * len(wanted), "this environment is another"
