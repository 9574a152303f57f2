"""The tables of reports/editing.md are those that its documents give."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.checkout

REPORTS = Path(__file__).parents[1] / "reports"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("editing_tables", REPORTS / "editing_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_has_what_was_measured(script: ModuleType) -> None:
    told = (REPORTS / "editing.md").read_text("utf-8").splitlines()
    tables = script.tables()
    assert sum(len(lines) - 3 for lines in tables.values()) > 20, "rows, but for two of heads and that before any edit"
    for lines in tables.values():
        assert [line for line in lines if line not in told] == []


def row(name: str, reliability: float, **more: Any) -> dict[str, Any]:
    found = {"reliability": reliability, "reliability_free": 0.5, "unrelated_agreement": 0.25, "unrelated_free": 0.75}
    scored = {"edits": 10, "before": found | {"reliability": 0.1}, "after": found | {"perplexity": 1234.5}}
    return (
        {"editor": {"name": name}, "batch_size": 1, "seconds_per_edit": 2.0, "bytes_per_edit": 2.0**19} | scored | more
    )


def test_a_table_of_hand_made_documents(script: ModuleType) -> None:
    part = row("rome", 1.0)
    rows = [
        row("wise", 0.2, older=True),
        row("wise", 0.3),
        row("grace", 0.9, older=True),
        row("wise", 0.4, editor={"name": "wise", "steps": 5}, batch_size=10),
        row("rome", 0.0, edits=50, at=[part]),
    ]
    known = script.after(rows, 10)
    assert [name for name, _ in known] == [
        "`rome`",
        "`grace`, an earlier version",
        "`wise`, `steps=5`, 10 at once",
        "`wise`",
    ]
    assert [name for name, _ in script.after(rows, 50)] == ["`rome`"]
    lines = script.table(known[-1:], ("unrelated",), True)
    assert lines[2:] == [
        "| before | .100 |  | .250 | .50 |  | .75 |  | | |",
        "| `wise` | .300 |  | .250 | .50 |  | .75 | 1234 | 2.0 | 0.50 |",
    ]
    assert script.table(known[-1:], ("unrelated",), False)[3].split("|")[7].strip() == "", (
        "agreement, of which there is none"
    )
    assert [script.perplexity(v) for v in (22.61, 5e15, None)] == ["22.6", "5e+15", ""]
    assert [script.share(v, 2) for v in (1.0, 0.0, 0.345, None)] == ["1.00", ".00", ".34", ""]


def test_a_ladder_of_hand_made_documents(script: ModuleType) -> None:
    """A measure's columns stand side by side, of the streams that there are; what is broken is the last."""

    def found(edits: int, value: float | None) -> dict[str, Any]:
        scored = {"reliability": 0.25, "ood": 0.5, "reliability_perplexity": value}
        return {"edits": edits, "before": scored | {"reliability_perplexity": 27.4}, "after": scored}

    rows = [
        row("wise", 0.0) | found(10, 1.14) | {"at": [found(1, 1.0)]},
        row("memit", 0.0) | found(10, 5e15) | {"at": [found(1, 2.5)]},
    ]
    lines = script.ladder(rows, {"reliability_perplexity": "PPL", "ood": "OOD"}, (1, 10, 100), {"reliability": "held"})
    assert lines[0] == "| | PPL, T = 1 | 10 | OOD, T = 1 | 10 | held | s an edit | MiB an edit |"
    assert lines[2:] == [
        "| before | 27.40 | 27.40 | .500 | .500 | .250 | | |",
        "| `wise` | 1.00 | 1.14 | .500 | .500 | .250 | 2.0 | 0.50 |",
        "| `memit` | 2.50 | 5e+15 | .500 | .500 | .250 | 2.0 | 0.50 |",
    ]
