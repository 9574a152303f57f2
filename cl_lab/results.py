"""Bringing runs together: from the documents of single runs to the document of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl_lab.metrics import interval, summary


def assemble(scenario: str, path: str, labels: Sequence[str], documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The comparison of ``documents`` (of ``run.json``), one row per label: mean and interval over its finished runs.

    Where ``joint`` was run with the same seed, metrics against it (intransigence, Ω) are added to a run's own.
    """
    ideal = {d["seed"]: d["matrix"][-1] for d in documents if d["strategy"] == "joint" and _finished(d)}
    rows = []
    for label in labels:
        runs = [_against(d, ideal.get(d["seed"])) for d in documents if d["label"] == label]
        done = [d for d in runs if _finished(d)]
        rows.append(
            {
                "strategy": label,
                "seeds": [d["seed"] for d in runs],
                "reference": any(d.get("reference") for d in runs),
                "metrics": _intervals([d["metrics"] for d in done]),
                "cost": _intervals([d["cost"] for d in done]),
                "runs": runs,
            }
        )
    chances = {d["chance"] for d in documents if d.get("chance")}
    chance = chances.pop() if len(chances) == 1 else None
    return {"scenario": scenario, "path": path, "chance": chance, "rows": rows}


def _finished(document: dict[str, Any]) -> bool:
    return bool(document["status"] == "finished")


def _against(document: dict[str, Any], joint: list[float] | None) -> dict[str, Any]:
    if joint is None or not _finished(document):
        return document
    tests = [e["test_samples"] for e in document["experiences"]]
    against = summary(document["matrix"], document["initial"], test_samples=tests, joint=joint)
    return {**document, "metrics": against | document["metrics"]}


def _intervals(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and interval by name, over the documents that have a number for it."""
    names = {name: None for d in documents for name in d}  # in order of appearance
    columns = {name: [d[name] for d in documents if d.get(name) is not None] for name in names}
    return {name: interval(values) for name, values in columns.items() if values}
