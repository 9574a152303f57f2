"""The report: what it says, that it says it honestly, and that its page stands alone."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cl_lab import metrics
from cl_lab.errors import UserError
from cl_lab.reporting import (
    _bytes,
    _chosen,
    _fenced,
    _markdown,
    _seconds,
    findings,
    from_runs,
    headline,
    rich_table,
    write_report,
)

HOSTILE = "<script>alert('x')</script> | *ewc* `a`"
T = 5


def made_up_matrix(kept: float, learnt: float, noise: float, rng: random.Random, n: int = T) -> list[list[float]]:
    """A matrix of a learner that gets ``learnt`` on what is new and keeps the share ``kept`` of it per experience."""

    def clip(v: float) -> float:
        return min(1.0, max(0.0, v + rng.gauss(0, noise)))

    return [[clip(learnt * kept ** (i - j)) if j <= i else 0.02 for j in range(n)] for i in range(n)]


def made_up_run(
    label: str,
    seed: int,
    *,
    kept: float = 0.9,
    learnt: float = 0.95,
    noise: float = 0.01,
    reference: bool = False,
    status: str = "finished",
    n: int = T,
    seconds: float = 2.0,
    state: float = 0.0,
    anytime: bool = False,
    **more: Any,
) -> dict[str, Any]:
    rng = random.Random(f"{label}{seed}")
    matrix = made_up_matrix(kept, learnt, noise, rng, n)
    if status != "finished":
        matrix = matrix[:2]
    initial = [0.1] * n
    curve = [
        {"step": 40 * i + s, "experience": i, "accuracies": [v * (0.6 if s == 10 and i else 1) for v in matrix[i]]}
        for i in range(len(matrix))
        for s in (10, 20, 40)
    ]
    return {
        "scenario": "split-digits",
        "strategy": label,
        "label": label,
        "seed": seed,
        "status": status,
        "resumed": 0,
        "reference": reference,
        "initial": initial,
        "matrix": matrix,
        "metrics": metrics.summary(matrix, initial) if status == "finished" else {"average_accuracy": 0.001},
        "cost": {
            "train_seconds": seconds * rng.uniform(0.95, 1.05),
            "eval_seconds": 0.31,
            "samples_per_second": 7185 / seconds,
            "peak_memory_bytes": 312e6 + state,
            "strategy_state_bytes": state,
            "trainable_parameters": 19210,
        },
        "run_id": f"{label}{seed}",
        "path": f"runs/{label}-seed{seed}",
        "experiences": [
            {"index": i, "name": f"digits {2 * i} {2 * i + 1}", "classes": [], "train_samples": 287, "test_samples": 72}
            for i in range(n)
        ],
        "anytime": curve if anytime else [],
        "losses": [],
        "chance": 0.1,
        "fingerprint": f"{seed:064x}",
        "error": "loss is nan at step 61; lower training.lr" if status == "failed" else None,
        "started": "2025-11-20T10:00:00+00:00",
        "finished": None if status == "running" else "2025-11-20T10:01:00+00:00",
        **more,
    }


def made_up_comparison(*rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A comparison as the runner makes it, of lists of runs."""
    made = []
    for runs in rows:
        done = [r for r in runs if r["status"] == "finished"]
        row: dict[str, Any] = {"strategy": runs[0]["label"], "seeds": [r["seed"] for r in runs], "runs": runs}
        row["reference"] = runs[0]["reference"]
        for group in ("metrics", "cost"):
            names = {k for r in done for k in r[group]}
            values = {k: [r[group][k] for r in done if r[group].get(k) is not None] for k in names}
            row[group] = {k: metrics.interval(v) for k, v in values.items() if v}
        made.append(row)
    return {"scenario": "split-digits", "path": "runs/quickstart", "rows": made, "chance": 0.1, **more}


def made_up_row(label: str, accuracies: list[float], *, reference: bool = False, **cost: float) -> list[dict[str, Any]]:
    """Runs with given average accuracies, for the logic of the headline."""
    runs = []
    for seed, accuracy in enumerate(accuracies):
        run = made_up_run(label, seed, reference=reference)
        run["metrics"] = {"average_accuracy": accuracy, "forgetting": 1 - accuracy}
        run["cost"] = {"train_seconds": 1.0, "strategy_state_bytes": 0, **cost}
        runs.append(run)
    return runs


def full_comparison() -> dict[str, Any]:
    """Four strategies, three seeds; one run failed, one was interrupted, one label is hostile."""
    return made_up_comparison(
        [made_up_run("naive", s, kept=0.15) for s in range(3)],
        [
            made_up_run(HOSTILE, s, kept=0.45, state=154_000, seconds=3.2, status="failed" if s == 1 else "finished")
            for s in range(3)
        ],
        [made_up_run("replay", s, kept=0.95, state=66_560, seconds=3.7, anytime=True) for s in range(3)],
        [
            made_up_run("freeze+replay", s, kept=0.93, state=66_560, status="interrupted" if s == 2 else "finished")
            for s in range(3)
        ],
        [made_up_run("joint", s, kept=1.0, learnt=0.975, noise=0.004, reference=True, seconds=6.0) for s in range(3)],
    )


class Page(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})
    SELF_CLOSING = frozenset({"path", "use", "image", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    folder = tmp_path_factory.mktemp("report")
    (folder / "config.yaml").write_text(
        "scenario: {name: split-digits}\nstrategies: [naive]\n"
        "tracking: {uri: 'postgresql://me:secret@host/db'}\n# ```\n# </pre><script>alert(1)</script>\n"
    )
    environment = {"packages": {"torch": "2.13"}, "git_commit": "abc123+changes", "python": "3.11.9", "threads": 2}
    (folder / "environment.json").write_text(json.dumps(environment))
    page, twin = write_report(full_comparison(), folder)
    assert (page, twin) == (folder / "report.html", folder / "report.md")
    return folder, page.read_text("utf-8"), twin.read_text("utf-8")


def test_page_is_well_formed_and_has_every_section(written: tuple[Path, str, str]) -> None:
    page = Page(written[1])
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    sections = ["results", "unfinished", "average", "matrices", "tasks", "anytime", "cost", "metrics", "reproduce"]
    assert set(sections) <= set(ids)
    assert len(ids) == len(set(ids)), "an id stands twice"
    assert [t for t, _ in page.tags].count("h1") == 1
    drawings = [a for t, a in page.tags if t == "svg" and a.get("aria-hidden") != "true"]
    assert len(drawings) == 1 + 5 + T + 1 + 2
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_page_asks_the_network_for_nothing(written: tuple[Path, str, str]) -> None:
    page = Page(written[1])
    for tag, attrs in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name, value in attrs.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", written[1])
    assert not re.search(r"https?://", written[1])


def test_references_within_drawings_resolve(written: tuple[Path, str, str]) -> None:
    ids = {a["id"] for _, a in Page(written[1]).tags if a.get("id")}
    used = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^)"]+)', written[1])
    assert used
    assert set(used) <= ids


def test_what_users_provide_is_escaped(written: tuple[Path, str, str]) -> None:
    _, page, twin = written
    assert "<script" not in page.lower()
    assert HOSTILE in Page(page).text
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", twin, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    row = next(line for line in outside.splitlines() if line.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 9, "a bar in a label opens a new cell"
    assert "secret" not in page + twin
    assert "me:***@host" in page


def test_failed_runs_are_listed_and_count_in_no_number(written: tuple[Path, str, str]) -> None:
    _, page, twin = written
    for text in (page, twin):
        assert "loss is nan at step 61" in text
        assert "2 of 5 experiences" in text
        assert "interrupted" in text
        assert "2 of 15 runs did not finish; they count in no number here." in text
        assert "2 of 3" in text


def test_twin_holds_the_same_numbers(written: tuple[Path, str, str]) -> None:
    folder, page, twin = written
    assert html_headline(page) in twin.replace("\\", "")
    numbers = set(re.findall(r"−?\d+\.\d ± \d+\.\d", Page(page).text))
    assert len(numbers) > 20
    assert numbers <= set(re.findall(r"−?\d+\.\d ± \d+\.\d", twin))
    for name in re.findall(r"\]\(([^)]+)\)", twin):
        assert (folder / name).is_file(), name
    assert len(list((folder / "report_files").glob("*.svg"))) == twin.count("](report_files/")


def html_headline(page: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", page)
    assert found
    return found.group(1)


def test_reports_of_the_same_runs_are_equal(written: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, page, twin = written
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "old.svg").write_text("left by an earlier report")
    write_report(full_comparison(), tmp_path)
    again = (tmp_path / "report.html").read_text("utf-8")
    assert again.replace(str(tmp_path), str(folder)) == page
    assert (tmp_path / "report.md").read_text("utf-8").replace(str(tmp_path), str(folder)) == twin
    assert not (tmp_path / "report_files" / "old.svg").exists()


def test_settings_environment_and_command(written: tuple[Path, str, str]) -> None:
    folder, page, twin = written
    for text in (page, twin):
        assert f"cl-lab compare {folder / 'config.yaml'}" in text
        assert "git checkout abc123  # with local changes" in text
        assert "3.11.9" in text
        assert f"{1:064x}" in text


@pytest.mark.parametrize("count", [1, 2, 24])
def test_other_shapes_of_stream(tmp_path: Path, count: int) -> None:
    runs = [made_up_run("naive", 0, n=count, anytime=count == 2)]
    page, twin = write_report(made_up_comparison(runs, chance=None), tmp_path)
    parsed = Page(page.read_text("utf-8"))
    assert "One seed, no interval" in parsed.text
    assert "±" not in parsed.text.replace("± half", "")
    assert "one seed, no interval" in headline(made_up_comparison(runs))
    assert twin.read_text("utf-8").count("task-") == min(count, 12)


def test_nothing_finished_still_makes_a_report(tmp_path: Path) -> None:
    failed = made_up_comparison([made_up_run("naive", 0, status="failed")])
    page, _ = write_report(failed, tmp_path / "new" / "folder")
    assert "No run on split-digits finished" in html_headline(page.read_text("utf-8"))
    assert "loss is nan" in Page(page.read_text("utf-8")).text
    empty, _ = write_report({"scenario": "s", "path": "", "rows": []}, tmp_path)
    assert "nothing to compare" in Page(empty.read_text("utf-8")).text


def test_a_failed_metric_leaves_a_dash(tmp_path: Path) -> None:
    run = made_up_run("naive", 0)
    run["metrics"]["fwt"] = None
    run["cost"] = {}
    found = made_up_comparison([run, made_up_run("naive", 1)])
    found["rows"][0]["metrics"]["bwt"] = {"mean": float("nan"), "std": 0.0, "ci95": [float("nan"), float("nan")]}
    page, _ = write_report(found, tmp_path)
    assert "nan" not in Page(page.read_text("utf-8")).text


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(made_up_comparison(made_up_row("naive", [0.5])), tmp_path / "file")


# -- the headline ----------------------------------------------------------------------------------------------------


def test_clear_winner() -> None:
    found = made_up_comparison(
        made_up_row("naive", [0.20, 0.19, 0.21]),
        made_up_row("replay", [0.90, 0.91, 0.92], train_seconds=1.5, strategy_state_bytes=2048),
        made_up_row("joint", [0.96, 0.97, 0.98], reference=True),
    )
    text = headline(found)
    assert text == ("replay (91.0 % ± 2.5 average accuracy) clearly beats naive (20.0 % ± 2.5) on split-digits.")
    told = " ".join(findings(found))
    assert "joint, which sees all data at once, reaches 97.0 % ± 2.5; replay is 6.0 points below it." in told
    assert "replay loses 9.0 ± 2.5 points of accuracy on earlier experiences (naive training: 80.0 ± 2.5)." in told
    assert "replay needs 1.5× naive's training time (1.5 s against 1 s) and 2 KiB of its own state." in told
    assert "finish" not in told
    assert "chance" not in told


def test_one_seed_is_neither_beaten_nor_passed_over() -> None:
    above, below = made_up_row("c", [0.79]), made_up_row("b", [0.801, 0.799, 0.8])
    text = headline(made_up_comparison(made_up_row("a", [0.901, 0.899, 0.9]), below, above))
    assert "a (90.0 % ± 0.2 average accuracy) clearly beats b (80.0 % ± 0.2) on split-digits; c (79.0 %" in text
    assert text.endswith("has one seed and no interval.")
    assert "the rest" not in text
    unclear = made_up_comparison(made_up_row("a", [0.8, 0.9, 0.85]), above, made_up_row("b", [0.79, 0.89, 0.83]))
    assert re.search(r"between a .* and b .* overlap; c .* has one seed and no interval\.$", headline(unclear))


def test_the_curve_between_steps_has_all_that_every_seed_has() -> None:
    """Experiences of 18 and of 20 steps, scored every 8: the k-th score of each stands beside the k-th."""
    from matplotlib.figure import Figure

    from cl_lab.reporting import _draw_anytime, _rows

    runs = []
    for seed, steps in enumerate((18, 20)):
        curve = [
            {"step": steps * i + k, "experience": i, "accuracies": [0.1 * (i + 1), 0.3]}
            for i in (0, 1)
            for k in (8, 16)
        ]
        losses = [{"step": steps * (i + 1), "experience": i, "epoch": 0, "loss": 1.0} for i in (0, 1)]
        run = made_up_run("a", seed, n=2)
        runs.append({**run, "anytime": curve, "losses": losses, "matrix": [[0.5, 0.0], [0.25, 0.75]]})
    axes = Figure().subplots()
    _draw_anytime(axes, _rows(made_up_comparison(runs)))
    line, end = axes.lines[0], axes.lines[-1]
    assert list(line.get_xdata()) == [8, 16, 19, 27, 35, 38]
    assert list(line.get_ydata()) == pytest.approx([10, 10, 50, 25, 25, 50])
    assert list(end.get_xdata()) == [19, 19], "where the first experience ends"


def test_overlap_is_no_winner() -> None:
    text = headline(
        made_up_comparison(
            made_up_row("a", [0.80, 0.90, 0.85]),
            made_up_row("b", [0.82, 0.88, 0.83]),
            made_up_row("c", [0.30, 0.31, 0.32]),
        )
    )
    assert text.startswith("No clear winner between a (85.0 % ± 12.4) and b (84.3 % ± 8.0) on split-digits")
    many = made_up_comparison(*(made_up_row(name, [0.80, 0.90, 0.85]) for name in "abcd"))
    assert "among a (85.0 % ± 12.4), b (85.0 % ± 12.4) and 2 more" in headline(many)


def test_one_seed_claims_nothing() -> None:
    text = headline(made_up_comparison(made_up_row("a", [0.8]), made_up_row("b", [0.2])))
    assert "is ahead of b (20.0 %)" in text
    assert "one seed, no interval: it may be chance" in text
    mixed = headline(made_up_comparison(made_up_row("a", [0.8, 0.81]), made_up_row("b", [0.2])))
    assert "b has one seed, no interval" in mixed
    assert "clearly" not in mixed
    level = headline(made_up_comparison(made_up_row("a", [0.8]), made_up_row("b", [0.8])))
    assert level.startswith("a and b are level")


def test_one_strategy_and_only_references() -> None:
    alone = made_up_comparison(made_up_row("ewc", [0.5, 0.52, 0.51]))
    assert headline(alone) == "ewc reaches 51.0 % ± 2.5 average accuracy on split-digits."
    only = made_up_comparison(made_up_row("joint", [0.97], reference=True))
    assert headline(only).startswith("Only references ran on split-digits: joint reaches 97.0 %")
    assert not [s for s in findings(only) if "chance" in s]


def test_a_reference_is_never_the_winner() -> None:
    found = made_up_comparison(
        made_up_row("joint", [0.99, 0.99, 0.99], reference=True), made_up_row("ewc", [0.2, 0.2, 0.2])
    )
    assert headline(found).startswith("ewc reaches")


def test_what_a_reference_is_ahead_of_by_chance_is_told_so() -> None:
    """Its interval is looked at as any other's, and it may have guessed as well as any."""
    found = made_up_comparison(
        made_up_row("joint", [0.1, 0.5], reference=True), made_up_row("replay", [0.34, 0.36]), chance=0.1
    )
    told = " ".join(findings(found))
    assert "replay is 5.0 points above it, which may be chance." in told
    assert "Guessing gives 10.0 %: joint is not clearly above chance." in told
    both = made_up_comparison(
        made_up_row("joint", [0.1, 0.5], reference=True), made_up_row("replay", [0.1, 0.5]), chance=0.1
    )
    assert "even replay and joint are not clearly above chance." in " ".join(findings(both))


def test_a_noisy_strategy_makes_no_winner_of_one_that_another_beats() -> None:
    """The widest interval overlaps both others, which do not overlap each other."""
    noisy, sure, naive = [1.0, 0.4, 0.57], [0.5, 0.6, 0.65], [0.2, 0.2, 0.2]
    found = made_up_comparison(*map(made_up_row, ("new", "replay", "naive"), (noisy, sure, naive)), chance=0.2)
    assert headline(found) == (
        "No clear winner between new (65.7 % ± 76.8) and replay (58.3 % ± 19.0) on split-digits: their 95 % intervals "
        "overlap; replay clearly beats naive (20.0 % ± 0.0), new does not."
    )
    assert "Guessing gives 20.0 %: new and naive are not clearly above chance." in findings(found)
    more = made_up_comparison(*map(made_up_row, ("new", "replay", "ewc", "naive"), (noisy, sure, sure, naive)))
    assert headline(more).endswith("replay and ewc clearly beat naive (20.0 % ± 0.0), new does not.")


def test_forgetting_is_told_with_its_interval() -> None:
    def told(*values: float) -> str:
        runs = made_up_row("ewc", [0.5] * len(values))
        for run, value in zip(runs, values, strict=True):
            run["metrics"]["forgetting"] = value
        return next(s for s in findings(made_up_comparison(runs)) if s.startswith("Forgetting: "))

    assert told(0.5, -0.5, 0.2) == (
        "Forgetting: ewc shows no clear forgetting (6.7 ± 127.5 points lost on earlier experiences)."
    )
    assert "no clear forgetting (6.7 ± 127.5 points gained on" in told(-0.5, 0.5, -0.2)
    assert "no clear forgetting (0.0 ± 127.1 points" in told(-0.1, 0.1)
    assert "ewc loses 20.0 ± 2.5 points of accuracy" in told(0.2, 0.19, 0.21)
    assert "ewc forgets nothing on average (earlier experiences gain 20.0 ± 2.5 points)" in told(-0.2, -0.19, -0.21)
    assert "ewc loses 20.0 points of accuracy" in told(0.2)
    assert told(0.0, 0.0) == told(0.0, 1e-9) == "Forgetting: ewc forgets nothing on average."


@pytest.mark.parametrize(
    ("own", "base", "told"),
    [
        (400, 200, " and 2.0× naive's memory beyond model and data (400 MiB against 200 MiB)"),
        (50, 200, " and 0.2× naive's memory beyond model and data (50 MiB against 200 MiB)"),
        (220, 200, " and about as much memory beyond model and data as naive"),
        (300, 4, " and 300 MiB of memory beyond model and data (naive: 4 MiB)"),
        (12, 4, ""),
        (None, 200, ""),
    ],
)
def test_memory_is_told_where_it_is_no_noise(own: int | None, base: int, told: str) -> None:
    """Never the whole peak: it grows with every run in the process, whatever the strategy."""
    cost = {} if own is None else {"own_memory_bytes": own * 2.0**20}
    rows = [
        made_up_row("ewc", [0.9, 0.91], **cost, peak_memory_bytes=9e9),
        made_up_row("naive", [0.2, 0.21], own_memory_bytes=base * 2.0**20, peak_memory_bytes=5e8),
    ]
    sentence = next(s for s in findings(made_up_comparison(*rows)) if s.startswith("Cost: "))
    assert sentence.endswith(f"no state of its own{told}.") or (told and sentence.endswith(f"of its own state{told}."))
    assert ("memory" in sentence) is bool(told)


def test_weaknesses_are_said() -> None:
    rows = [made_up_row("a", [0.05, 0.12, 0.11]), made_up_row("b", [0.04, 0.05])]
    told = " ".join(findings(made_up_comparison(*rows)))
    assert "Guessing gives 10.0 %: even a is not clearly above chance." in told
    assert "not all measured on the same seeds" in told
    assert "different data" not in told


# -- runs on different data ------------------------------------------------------------------------------------------


def with_data(runs: list[dict[str, Any]], changed: dict[str, Any], seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Give every run a fingerprint and digests as of a stream without a seed in it, and some ``changed`` of the third."""
    for run in runs:
        run["fingerprint"] = "same"
        run["experiences"] = [{**e, "train_digest": f"d{e['index']}"} for e in run["experiences"]]
        if run["seed"] in seeds:
            run["experiences"][2] |= {k: v for k, v in changed.items() if k != "fingerprint"}
            run["fingerprint"] = changed.get("fingerprint", "same")


def two_rows() -> list[list[dict[str, Any]]]:
    return [made_up_row("naive", [0.20, 0.19, 0.21]), made_up_row("replay", [0.90, 0.91, 0.92])]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"fingerprint": "other"},
            "tested on different data (seed 0: fingerprint same for naive, fingerprint other for",
        ),
        ({"train_samples": 13}, "trained on different data (seed 0, digits 4 5, train samples: 287 for naive, 13 for"),
        (
            {"train_digest": "x"},
            "trained on different data (seed 0, digits 4 5, train digest: d2 for naive, x for replay)",
        ),
    ],
)
def test_strategies_on_different_data_are_not_compared(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    rows = two_rows()
    for runs in rows:
        with_data(runs, {})
    assert "clearly beats" in headline(made_up_comparison(*rows))
    assert not re.search("different data|changed", " ".join(findings(made_up_comparison(*rows))))
    with_data(rows[1], changed)
    found = made_up_comparison(*rows)
    assert headline(found) == (
        "No verdict on replay (91.0 % ± 2.5) and naive (20.0 % ± 2.5) on split-digits: not all runs saw the same data."
    )
    assert findings(found)[0].startswith(f"Runs with one seed were {told}")
    assert not [s for s in findings(found) if s.startswith(("Forgetting", "Cost"))]
    assert 'class="best"' not in write_report(found, tmp_path)[0].read_text("utf-8")
    assert "Not all runs saw the same data" in " ".join(printed(found).split())


def test_older_runs_that_kept_no_digest_are_compared() -> None:
    rows = two_rows()
    with_data(rows[1], {})
    rows[0][0]["fingerprint"] = rows[0][1]["fingerprint"] = rows[0][2]["fingerprint"] = "same"
    assert "clearly beats" in headline(made_up_comparison(*rows))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"fingerprint": "other"}, "fingerprint same for seed 0 and seed 1, fingerprint other for seed 2"),
        ({"train_digest": "x"}, "training data d0d1d2d3d4 for seed 0 and seed 1, training data d0d1xd3d4 for seed 2"),
        ({"train_digest": "x", "train_samples": 13}, "1161 training samples for seed 2"),
        ({"train_digest": "x", "test_samples": 13}, "digits 4 5, test samples: 72 for seed 0, 13 for seed 2"),
    ],
)
def test_data_that_changed_between_seeds_are_told(changed: dict[str, Any], told: str) -> None:
    """Of three seeds by what the others share; of two by sizes that no seed should change."""
    rows = two_rows()
    for runs in rows:
        with_data(runs, changed, seeds=(2,))
        if set(changed) - {"fingerprint", "train_digest"}:
            del runs[1]
    found = made_up_comparison(*rows)
    assert headline(found).endswith("not all runs saw the same data.")
    assert findings(found)[0].startswith("The data changed between seeds (naive: ")
    assert told in findings(found)[0]
    alone = made_up_comparison(rows[0])
    assert headline(alone).startswith("naive reaches 20.")
    assert headline(alone).endswith("on split-digits, but not all runs saw the same data.")


@pytest.mark.parametrize("stream", ["drawn", "permuted", "shuffled", "recordings"])
def test_a_seeds_own_data_are_no_change(stream: str) -> None:
    """Draws, permutations (the first is none), orders of classes, and pieces of unequal length in another order."""
    rows = two_rows()
    for run in (run for runs in rows for run in runs):
        seed, experiences = run["seed"], [dict(e) for e in run["experiences"]]
        run["fingerprint"] = "same" if stream in ("drawn", "recordings") else f"f{seed}"
        for e in experiences:
            kept = e["index"] == 0 and stream != "drawn"
            e["train_digest"] = "d0" if kept else f"d{e['index']} {seed}"
        if stream == "shuffled":
            run["fingerprint"] = "f0" if seed < 2 else "f2"  # there are few orders of few classes
            experiences[1] |= {
                "name": f"digits {seed // 2}",
                "train_samples": 280 + seed // 2,
                "test_samples": 70 + seed // 2,
            }
        if stream == "recordings":
            experiences[1]["train_samples"] += seed
            experiences[2]["train_samples"] -= seed
        run["experiences"] = experiences
    assert "clearly beats" in headline(made_up_comparison(*rows))


def test_above_joint_and_no_forgetting() -> None:
    runs = made_up_row("freeze", [0.95, 0.95])
    for run in runs:
        run["metrics"]["forgetting"] = -0.01
    told = " ".join(findings(made_up_comparison(runs, made_up_row("joint", [0.9, 0.9], reference=True))))
    assert "freeze is 5.0 points above it" in told
    assert "freeze forgets nothing on average (earlier experiences gain 1.0 ± 0.0 points)" in told


# -- reading runs ----------------------------------------------------------------------------------------------------


def save_runs(folder: Path, runs: list[dict[str, Any]]) -> list[Path]:
    paths = []
    for run in runs:
        path = folder / "runs" / f"{run['label']}-seed{run['seed']}"
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps({**run, "path": str(path)}))
        (path / "config.yaml").write_text(f"scenario: split-digits\nstrategy: {run['label']}\n")
        paths.append(path)
    return paths


def test_from_runs_groups_by_label(tmp_path: Path) -> None:
    runs = [made_up_run("naive", s) for s in range(3)] + [made_up_run("ewc", s) for s in range(2)]
    runs.append(made_up_run("ewc", 2, status="failed"))
    paths = save_runs(tmp_path, runs)
    found = from_runs(paths)
    assert [(r["strategy"], r["seeds"]) for r in found["rows"]] == [("naive", [0, 1, 2]), ("ewc", [0, 1, 2])]
    expected = metrics.interval([r["metrics"]["average_accuracy"] for r in runs[3:5]])
    assert found["rows"][1]["metrics"]["average_accuracy"] == expected
    page, _ = write_report(found, tmp_path / "report")
    text = Page(page.read_text("utf-8")).text
    assert f"cl-lab run {paths[0] / 'config.yaml'}" in text
    assert "strategy: ewc" in text


def test_from_runs_reads_a_comparison_and_counts_a_run_once(tmp_path: Path) -> None:
    runs = [made_up_run("naive", s) for s in range(2)]
    paths = save_runs(tmp_path, runs)
    (tmp_path / "comparison.json").write_text(json.dumps({"scenario": "split-digits", "rows": []}))
    found = from_runs([tmp_path, paths[0]])
    assert [(r["strategy"], r["seeds"]) for r in found["rows"]] == [("naive", [0, 1])]
    assert found["chance"] == 0.1


def test_from_runs_tells_namesakes_apart(tmp_path: Path) -> None:
    first = save_runs(tmp_path / "a", [made_up_run("ewc", 0)])
    second = save_runs(tmp_path / "b", [made_up_run("ewc", 0), made_up_run("ewc", 1)])
    assert [(r["strategy"], r["seeds"]) for r in from_runs([*first, *second])["rows"]] == [
        ("ewc", [0, 1]),
        ("ewc (2)", [0]),
    ]


def test_from_runs_takes_what_a_comparison_names(tmp_path: Path) -> None:
    """Runs of seeds or strategies that it had before stay in its folder and out of its report."""
    save_runs(tmp_path, [made_up_run(label, s) for label in ("naive", "ewc", "old") for s in range(3)])
    (tmp_path / "config.yaml").write_text(
        "scenario: split-digits\nstrategies: [naive, {name: ewc, strength: 3}]\nseeds: [0]\n"
    )
    found = from_runs([tmp_path])
    assert [(r["strategy"], r["seeds"]) for r in found["rows"]] == [("ewc", [0]), ("naive", [0])]


def test_from_runs_averages_no_two_settings(tmp_path: Path) -> None:
    paths = save_runs(tmp_path, [made_up_run("ewc", s) for s in range(3)])
    (paths[1] / "config.yaml").write_text("scenario: split-digits\nstrategy: ewc\ntraining: {epochs: 7}\n")
    assert [(r["strategy"], r["seeds"]) for r in from_runs(paths)["rows"]] == [("ewc", [0, 2]), ("ewc (2)", [1])]


def test_from_runs_measures_each_comparison_against_its_own_references(tmp_path: Path) -> None:
    """Where models differ, so do references; a reference with training settings of its own is still one."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, hidden, learnt in zip(folders, (8, 64), (0.5, 0.95), strict=True):
        runs = [
            made_up_run("naive", 0, noise=0),
            made_up_run("joint", 0, noise=0, kept=1, learnt=learnt, reference=True),
        ]
        shared = f"scenario: split-digits\nmodel: {{name: mlp, hidden: [{hidden}]}}\n"
        for path, (label, epochs) in zip(save_runs(folder, runs), (("naive", 2), ("joint", 9)), strict=True):
            (path / "config.yaml").write_text(f"{shared}strategy: {label}\ntraining: {{epochs: {epochs}}}\n")
        (folder / "environment.json").write_text("{}")
        (folder / "config.yaml").write_text(
            f"{shared}strategies: [naive, {{name: joint, training: {{epochs: 9}}}}]\nseeds: [0]\ntraining: {{epochs: 2}}\n"
        )

    def intransigence(*paths: Path) -> dict[str, Any]:
        rows = from_runs(paths)["rows"]
        return {r["strategy"]: pytest.approx(r["metrics"]["intransigence"]["mean"]) for r in rows}

    # Without noise, a run scores the same on every experience just after it: 0.95, and the references what is given.
    expected = {"naive": 0.5 - 0.95, "joint": 0, "naive (2)": 0, "joint (2)": 0}
    assert intransigence(*folders) == {k: pytest.approx(v, abs=1e-9) for k, v in expected.items()}
    alone = {k: v for k, v in expected.items() if "2" not in k}
    assert intransigence(folders[0]) == {k: pytest.approx(v, abs=1e-9) for k, v in alone.items()}
    rows = from_runs([folders[0] / "runs" / "naive-seed0", folders[1] / "runs" / "joint-seed0"])["rows"]
    assert all("intransigence" not in r["metrics"] for r in rows if r["strategy"] == "naive")


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"scenario": "s"}', '{"scenario": "s", "strategy": "a", "seed": "x"}']
)
def test_damaged_run_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError) as caught:
        from_runs([tmp_path])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_different_scenarios_are_not_compared(tmp_path: Path) -> None:
    paths = save_runs(tmp_path, [made_up_run("a", 0), made_up_run("b", 0, scenario="core50")])
    with pytest.raises(UserError, match="core50, split-digits"):
        from_runs(paths)
    with pytest.raises(UserError, match="no runs given"):
        from_runs([])


def test_from_runs_refuses_other_training_data(tmp_path: Path) -> None:
    """With one seed; with an ``order_seed`` of its own a run may have other data."""
    rows = two_rows()
    for runs in rows:
        with_data(runs, {})
    with_data(rows[1], {"train_digest": "x"}, seeds=(1,))
    paths = save_runs(tmp_path, [*rows[0], *rows[1]])
    with pytest.raises(UserError, match=r"train_digest of experience 3: d2\) and .* 3: x\) ran on different"):
        from_runs(paths)
    for path in paths[3:]:
        (path / "config.yaml").write_text("scenario: {name: split-digits, order_seed: 1}\nstrategy: replay\n")
    for path in paths[:3]:
        (path / "config.yaml").write_text("scenario: {name: split-digits}\nstrategy: naive\n")
    assert [r["strategy"] for r in from_runs(paths)["rows"]] == ["naive", "replay"]


# -- terminal and small things ---------------------------------------------------------------------------------------


def printed(comparison: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(rich_table(comparison))
    return capture.get()


def test_rich_table() -> None:
    comparison = full_comparison()
    comparison["rows"][1]["strategy"] = "[red]ewc[/red]"
    text = printed(comparison)
    assert "[red]ewc[/red]" in text, "markup in a label must not be interpreted"
    lines = text.splitlines()
    assert "of 3 runs)" in text
    order = [
        next(i for i, line in enumerate(lines) if line.strip().startswith(x)) for x in ("replay", "naive", "joint *")
    ]
    assert order == sorted(order)
    assert "65 KiB" in lines[order[0]]
    assert "one seed, no interval" in printed(made_up_comparison([made_up_run("naive", 0)]))
    assert printed({"rows": []})


def test_words() -> None:
    assert [_bytes(v) for v in (0, 12, 1536, 66_560, 5 * 2**30)] == ["0", "12 B", "1.5 KiB", "65 KiB", "5 GiB"]
    assert [_seconds(v) for v in (0.1234, 12.0, 61.2, 4000)] == ["0.123 s", "12 s", "61.2 s", "1 h 6 min"]
    assert _chosen(3) == [0, 1, 2]
    assert len(_chosen(100)) == 12
    assert _chosen(100)[0] == 0
    assert _chosen(100)[-1] == 99
    assert _markdown("a|b\n<i>*c*") == r"a\|b &lt;i&gt;\*c\*"
    assert _fenced("x ```` y").startswith("`````\n")


def test_what_else_was_asked_is_told(tmp_path: Path) -> None:
    """Means over seeds, before and after, with the interval of what was left; a run without asides has no row."""
    runs = [
        made_up_run(
            "wise",
            s,
            asides=[
                {"learnt": 0, "scores": {"generality": 0.0, "same_subject_opening": 0.8}},
                {"learnt": 3, "scores": {"generality": 0.5 + 0.1 * s}},
            ],
        )
        for s in (0, 1)
    ]
    page, twin = write_report(made_up_comparison(runs, [made_up_run("naive", 0)]), tmp_path)
    told = twin.read_text("utf-8")
    assert "| Strategy | generality | same subject opening |" in told
    half = 12.706204736432095 * 0.1 / 2  # Student's t of one degree of freedom, times std/√2
    assert f"| wise | 0.0 → 55.0 ± {100 * half:.1f} | 80.0 → – |" in told
    assert (
        f"Also asked, in per cent, before → after: wise: generality 0.0 → 55.0 ± {100 * half:.1f}, same subject" in told
    )
    assert "What else was asked" in Page(page.read_text("utf-8")).text
    alone = write_report(made_up_comparison([made_up_run("naive", 0)]), tmp_path / "alone")[1].read_text("utf-8")
    assert "What else was asked" not in alone


def test_what_strategies_measured_themselves_is_told(tmp_path: Path) -> None:
    """Means over seeds after the first and the last experience; single experiences are left to run.json."""
    key = "ilora/fast_accuracy"
    runs = [
        made_up_run("ilora", s, measures=[{key: 0.5, f"{key}_exp_0": 0.5}, {key: 0.25 + 0.1 * s, "kept": 1200.0}])
        for s in (0, 1)
    ]
    page, twin = write_report(made_up_comparison(runs, [made_up_run("naive", 0, measures=[{}, {}])]), tmp_path)
    told = twin.read_text("utf-8")
    assert "| ilora | ilora/fast\\_accuracy | 0.5 | 0.3 |" in told
    assert "| ilora | kept | – | 1\u202f200 |" in told
    assert "exp\\_0" not in told
    assert "ilora/fast_accuracy" in Page(page.read_text("utf-8")).text
