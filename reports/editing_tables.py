"""Prints the tables of reports/editing.md from reports/results/editing-*.json: `python reports/editing_tables.py`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
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


def _answers(value: float | None) -> str:
    """The perplexity of learnt answers, which is near 1: ``1.02``."""
    return f"{value:.2f}" if value is not None and value < 100 else perplexity(value)


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
        cost = [f"{_seconds(found):.1f}", f"{found['bytes_per_edit'] / 2**20:.2f}"]
        lines.append(f"| {name} | {' | '.join([*cells(found['after']), *cost])} |")
    return lines


def ladder(
    rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str], steps: Sequence[int], aside: Mapping[str, str]
) -> list[str]:
    """Lines of Markdown: each measure (its name in the documents: its head) after each of ``steps`` edits that there is.

    An editor a line, by the first measure of the longest stream, of which alone the measures ``aside`` are.
    """
    found = {n: told for n in steps if (told := dict(after(rows, n)))}
    steps = list(found)
    last = found[steps[-1]]
    heads = [f"{head}, T = {n}" if i == 0 else str(n) for head in measures.values() for i, n in enumerate(steps)]
    heads += [*aside.values(), "s an edit", "MiB an edit"]
    lines = [f"| | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]

    def cells(of: Mapping[int, Mapping[str, Any]]) -> list[str]:
        asked = [(of[n].get(measure), measure) for measure in measures for n in steps]
        asked += [(of[steps[-1]].get(measure), measure) for measure in aside]
        return [
            _answers(value)
            if measure.startswith("reliability_p")
            else perplexity(value)
            if measure.endswith("perplexity")
            else share(value, 2 if "free" in measure else 3)
            for value, measure in asked
        ]

    first = next(iter(measures))
    before = {n: next(iter(found[n].values()))["before"] for n in steps}
    lines.append(f"| before | {' | '.join(cells(before))} | | |")
    order = sorted(last, key=lambda name: float(last[name]["after"][first]), reverse=not first.endswith("perplexity"))
    for name in order:
        cost = [f"{_seconds(last[name]):.1f}", f"{last[name]['bytes_per_edit'] / 2**20:.2f}"]
        lines.append(f"| {name} | {' | '.join([*cells({n: found[n][name]['after'] for n in steps}), *cost])} |")
    return lines


def _seconds(found: Mapping[str, Any]) -> float:
    return float(found.get("median_seconds_per_edit", found["seconds_per_edit"]))


def comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown of the runs of ``configs/edit-stream.yaml``: means over seeds; of what held the least and the most.

    Editors and strategies stand by what held, references last.
    """
    groups = ("generality", "unrelated_opening", "same_relation_opening", "same_subject_opening")
    heads = ["held", "least–most", "in other words", "unrelated", "same relation", "same subject"]
    heads += ["perplexity", "general knowledge", "s an edit"]
    lines = [f"| | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    def beside(runs: Sequence[Mapping[str, Any]], place: int) -> list[str]:
        """What else was asked, before all edits (0) or behind them (-1)."""
        cells = [share(mean(run["asides"][place]["scores"][group] for run in runs), 2) for group in groups]
        known = (mean(run["drift"][place]["general"].values()) for run in runs)
        return [*cells, perplexity(mean(run["drift"][place]["perplexity"] for run in runs)), share(mean(known), 2)]

    def held(row: Mapping[str, Any]) -> float:
        return mean(run["average_accuracy"] for run in row["runs"])

    lines.append(f"| before | | | {' | '.join(beside(rows[0]['runs'], 0))} | |")
    for row in sorted(rows, key=lambda row: (row["reference"], -held(row))):
        runs = row["runs"]
        each = [run["average_accuracy"] for run in runs]
        name = f"{row['label']}, a reference" if row["reference"] else row["label"]
        cells = [share(held(row), 2), f"{share(min(each), 2)}–{share(max(each), 2)}", *beside(runs, -1)]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean(run['train_seconds'] for run in runs) / EDITS:.1f} |")
    return lines


EDITS = 60
"""In a run of ``configs/edit-stream.yaml``."""


def tables() -> dict[str, list[str]]:
    """All tables by their headings."""
    zsre = [row for n in (500, 100, 10) for row in documents(f"editing-zsre-{n}")]
    made = {f"ZsRE, T = {n}": table(after(zsre, n), LOCAL[:1], False) for n in (500, 100, 10, 1)}
    made["Known facts, T = 50"] = table(after(documents("editing-known"), 50), LOCAL, True)
    made["Hallucination"] = ladder(
        documents("editing-hallucination"),
        {"reliability_perplexity": "perplexity of the answers", "unrelated_agreement": "unrelated"},
        (1, 10, 100),
        {"reliability": "reliability", "reliability_free": "free", "perplexity": "perplexity"},
    )
    made["In a comparison"] = comparison(documents("editing-comparison"))
    made["Temporal"] = ladder(
        documents("editing-temporal"),
        {"reliability": "reliability", "ood": "OOD", "unrelated_agreement": "unrelated"},
        (10, 75),
        {"reliability_perplexity": "perplexity of the answers", "perplexity": "perplexity"},
    )
    return made


if __name__ == "__main__":
    for heading, lines in tables().items():
        sys.stdout.write("\n".join([heading, "", *lines, "", ""]))
