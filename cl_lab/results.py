"""Bringing runs together: from the documents of single runs to the document of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from cl_lab.metrics import interval, summary

_OFFLINE = ("joint", "cumulative")
"""Strategies that are references for others, by the names of :func:`cl_lab.metrics.summary`'s arguments."""


def assemble(
    scenario: str,
    path: str,
    labels: Sequence[str],
    documents: Sequence[dict[str, Any]],
    conditions: Sequence[str] = (),
) -> dict[str, Any]:
    """The comparison of ``documents`` (of ``run.json``), one row per label: mean and interval over its finished runs.

    Offline references run with the same seed add metrics to a run's own: ``joint``, one model of everything (intransigence
    and Kemker's Ω), and ``cumulative``, whose row i is a model of experiences up to i (REMIND's Ω, against the curve of
    its scores on those; it goes on from row i − 1 and does not start afresh). ``offline`` of a run then says what they
    saw: their label, how they encode samples (``None``: as they are), and the training samples behind each row of theirs.
    ``conditions``, one for each document, tell comparisons apart: a reference counts for runs under its own only.
    """
    under = list(zip(conditions or [""] * len(documents), documents, strict=True))
    offline = {
        (c, d["seed"], d["strategy"]): d for c, d in reversed(under) if d["strategy"] in _OFFLINE and _finished(d)
    }
    rows = []
    for label in labels:
        runs = [
            _against(d, {name: offline[key] for name in _OFFLINE if (key := (c, d["seed"], name)) in offline})
            for c, d in under
            if d["label"] == label
        ]
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
    score = next((d["score"] for d in documents if d.get("score")), "accuracy")
    return {"scenario": scenario, "path": path, "score": score, "chance": chance, "rows": rows}


def _finished(document: dict[str, Any]) -> bool:
    return bool(document["status"] == "finished")


def _against(document: dict[str, Any], offline: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if not offline or not _finished(document):
        return document
    tests = [e["test_samples"] for e in document["experiences"]]
    matrices: dict[str, Any] = {name: d["matrix"] for name, d in offline.items()}
    if "joint" in matrices:
        matrices["joint"] = matrices["joint"][-1]
    against = summary(document["matrix"], document["initial"], test_samples=tests, **matrices)
    saw = {
        name: {"label": d["label"], "encoding": d.get("encoding"), "train_samples": _samples_behind(name, d)}
        for name, d in offline.items()
    }
    return {**document, "metrics": against | document["metrics"], "offline": saw}


def _samples_behind(reference: str, document: dict[str, Any]) -> list[int]:
    """The number of training samples of each row's model."""
    so_far = list(accumulate(e["train_samples"] for e in document["experiences"]))
    return so_far if reference == "cumulative" else so_far[-1:] * len(so_far)


def _intervals(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and interval by name, over the documents that have a number for it."""
    names = {name: None for d in documents for name in d}  # in order of appearance
    columns = {name: [d[name] for d in documents if d.get(name) is not None] for name in names}
    return {name: interval(values) for name, values in columns.items() if values}
