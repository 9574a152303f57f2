"""Prints the tables of reports/editing.md from reports/results/editing-*.json: `python reports/editing_tables.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
GROUPS = ("reliability", "generality")
LOCAL = ("unrelated", "same_relation", "same_subject")
_NAMES = {"unrelated": "unrelated", "same_relation": "same relation", "same_subject": "same subject"}


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of ``cl-lab edit score`` that ``results/<name>.json`` keeps."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    return rows


def after(rows: Sequence[Mapping[str, Any]], edits: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Who edited, and what was found after so many edits, in the end of a run or on its way.

    Of runs of an ``older`` version only those whose editor has no other.
    """
    found = [
        (row, part) for row in rows for part in (row, *row.get("at", ())) if part["edits"] == edits and "after" in part
    ]
    known = {(row["editor"]["name"], row["batch_size"]) for row, _ in found if not row.get("older")}
    told: dict[str, Mapping[str, Any]] = {}
    for row, part in found:
        name = label(row)
        if not row.get("older"):
            told.setdefault(name, part)  # a run's own end and the last of what it was scored at are the same
        elif (row["editor"]["name"], row["batch_size"]) not in known:
            told[f"{name}, an earlier version"] = part
    return sorted(told.items(), key=lambda one: -float(one[1]["after"]["reliability"]))


def label(row: Mapping[str, Any]) -> str:
    """An editor as a table names it: with the knobs that are not its own, and edits that share a patch."""
    settings = (f"`{knob}={json.dumps(value)}`" for knob, value in row["editor"].items() if knob != "name")
    together = [f"{row['batch_size']} at once"] if row["batch_size"] > 1 else []
    return ", ".join([f"`{row['editor']['name']}`", *settings, *together])


def share(value: float | None, digits: int) -> str:
    """``.585`` or ``1.000``; nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}".removeprefix("0")


def perplexity(value: float | None) -> str:
    """``22.6``, ``9194`` or ``5e+15``; nothing where it is not finite."""
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.0e}"


def table(rows: Sequence[tuple[str, Mapping[str, Any]]], local: Sequence[str], correct: bool) -> list[str]:
    """Lines of Markdown. Localities are agreement with the unedited model; free ones right answers if ``correct``."""
    asked = [*GROUPS, *local]
    heads = [_NAMES.get(g, g) for g in asked]
    heads += [f"{head}, free" for head in heads] + ["perplexity", "s an edit", "MiB an edit"]
    lines = [f"| | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]

    def cells(found: Mapping[str, Any]) -> list[str]:
        forced = [share(found.get(g if g in GROUPS else f"{g}_agreement"), 3) for g in asked]
        way = "free" if correct else "free_agreement"
        free = [share(found.get(f"{g}_free" if g in GROUPS else f"{g}_{way}"), 2) for g in asked]
        return [*forced, *free, perplexity(found.get("perplexity"))]

    if rows:
        lines.append(f"| before | {' | '.join(cells(rows[0][1]['before']))} | | |")
    for name, found in rows:
        seconds = found.get("median_seconds_per_edit", found["seconds_per_edit"])
        cost = [f"{seconds:.1f}", f"{found['bytes_per_edit'] / 2**20:.2f}"]
        lines.append(f"| {name} | {' | '.join([*cells(found['after']), *cost])} |")
    return lines


def tables() -> dict[str, list[str]]:
    """All tables by their headings."""
    zsre = [row for n in (500, 100, 10) for row in documents(f"editing-zsre-{n}")]
    made = {f"ZsRE, T = {n}": table(after(zsre, n), LOCAL[:1], False) for n in (500, 100, 10, 1)}
    made["Known facts, T = 50"] = table(after(documents("editing-known"), 50), LOCAL, True)
    return made


if __name__ == "__main__":
    for heading, lines in tables().items():
        sys.stdout.write("\n".join([heading, "", *lines, "", ""]))
