"""The report of a comparison: one HTML page that answers first, its Markdown twin, and a table for the terminal.

Everything is computed from the run documents (``run.json``) and from nothing else, so that a report can be written
again at any time, and two reports of the same runs are equal byte for byte. The page holds its pictures and its style;
it asks the network for nothing. What users provide (labels, names, errors, settings) is escaped everywhere.

A "row" below is one strategy of a comparison, a "leader" one of the strategies that lie clearly below no other.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import math
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_lab.environment import CHANGES
from cl_lab.errors import UserError
from cl_lab.files import run_folders, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

METRICS: dict[str, tuple[str, str]] = {
    "average_accuracy": (
        "Average accuracy",
        "Share of right answers after the last experience, averaged over all experiences. The main result.",
    ),
    "weighted_average_accuracy": (
        "Sample-weighted accuracy",
        "The same with every test sample weighing alike, so that larger test sets count more.",
    ),
    "valid_output_rate": (
        "Valid answers",
        "Share of freely written answers that are an answer of their task, right or wrong, after the last experience. "
        "Where it falls, the format was lost; where only accuracy falls, it was knowledge.",
    ),
    "accuracy_given_valid": (
        "Accuracy if valid",
        "Accuracy among the freely written answers that are one of their task's.",
    ),
    "general_ability_delta": (
        "General ability",
        "How the share of right answers to questions of general knowledge, asked beside the stream, changed from before "
        "training to its end, averaged over topics. Negative: lost. (TRACE.)",
    ),
    "average_incremental_accuracy": (
        "Average incremental accuracy",
        "Accuracy on everything learnt so far, averaged over the whole stream: how good the model was along the way.",
    ),
    "average_anytime_accuracy": (
        "Average anytime accuracy",
        "The same, measured during training as well and not only between experiences.",
    ),
    "a_auc": (
        "Accuracy per training sample",
        "Area under the curve of accuracy during training over the samples seen, per sample. (A_AUC, Koh et al. 2022.)",
    ),
    "learning_accuracy": (
        "Learning accuracy",
        "Accuracy on each experience just after learning it: how well the model still learns new things.",
    ),
    "forgetting": (
        "Forgetting",
        "How far accuracy on earlier experiences fell from the best it had been before the last one. Lower is better; "
        "0 is none. (Chaudhry et al. 2018.)",
    ),
    "first_minus_last_forgetting": (
        "Drop since learnt",
        "Accuracy just after learning minus accuracy at the end. Avalanche calls this forgetting.",
    ),
    "max_including_last_forgetting": (
        "Drop from best ever",
        "The best accuracy of the whole run minus accuracy at the end. Mammoth and PyCIL call this forgetting.",
    ),
    "bwt": (
        "Backward transfer",
        "How learning later experiences changed accuracy on earlier ones. Negative means forgetting.",
    ),
    "fwt": (
        "Forward transfer",
        "Accuracy on experiences not yet learnt, above that of the untrained model. Positive: earlier learning helps.",
    ),
    "intransigence": (
        "Intransigence",
        "How much better a model trained on everything at once does on each experience than this one just after "
        "learning it. Lower is better.",
    ),
    "min_accuracy": (
        "Minimum accuracy",
        "The worst accuracy each earlier experience went through after it had been learnt, averaged.",
    ),
    "worst_case_accuracy": (
        "Worst-case accuracy",
        "Accuracy on the newest experience, averaged with the worst that the earlier ones went through.",
    ),
    "omega_base": ("Ω base", "How much of the first experience is kept, relative to a model trained on everything."),
    "omega_new": ("Ω new", "Accuracy on each new experience just after learning it, the first left out."),
    "omega_all": (
        "Ω all",
        "Accuracy on all learnt so far, relative to that of a model trained on everything on the first experience.",
    ),
    "omega_streaming": (
        "Ω streaming",
        "Accuracy on all learnt so far, relative to a model trained on all of that (the cumulative run of the same seed), "
        "averaged over the stream. (REMIND.)",
    ),
}
"""Heading and definition in plain words of each metric (formulas and sources: :mod:`cl_lab.metrics`)."""

_MAIN = (
    "average_accuracy",
    "average_incremental_accuracy",
    "learning_accuracy",
    "forgetting",
    "bwt",
    "fwt",
)
_COSTS: dict[str, str] = {
    "train_seconds": "Training",
    "eval_seconds": "Evaluation",
    "samples_per_second": "Samples/s",
    "peak_memory_bytes": "Peak memory",
    "own_memory_bytes": "Beyond model and data",
    "strategy_state_bytes": "Strategy state",
    "trainable_parameters": "Trainable parameters",
}
_NOISE_BYTES, _NOISE_RATIO = 32 * 2**20, 1.25
"""Less memory than that, and a smaller ratio, two runs of one strategy may differ by."""

_BYTE_UNITS = (("GiB", 1024.0**3), ("MiB", 1024.0**2), ("KiB", 1024.0), ("bytes", 1.0))
_TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
DIAGNOSIS_FILE = "diagnosis.json"
"""What :mod:`cl_lab.diagnosis` writes beside ``run.json``."""

_FOUR = {"original": "#0072b2", "forgotten": "#b0b0b0", "recovered": "#009e73", "control": "#e69f00"}
"""The scores of a diagnosis and their colours."""
_VERDICTS: dict[str, str] = {
    "alignment lost": "a few steps brought it back, more than they teach a model that never knew it",
    "partly": "a few steps brought some of it back",
    "knowledge lost": "a few steps did not bring it back (ratio below 0.5; where the control is higher, the model by now "
    "learns worse than an untrained one)",
    "cannot tell": "it came back, but the same steps teach as much to a model that never knew it (the control)",
    "kept": "it fell by no more than chance may do",
    "not learnt": "right after it, it was answered no better, beyond chance, than before any training: nothing that it "
    "taught could be kept or lost",
}
_MOST_PANELS = 12
_NUMBERED_CELLS = 10
_VECTOR_CELLS = 20

# Okabe and Ito's palette (yellow, invisible on white, replaced by a brown): told apart by colour-blind readers, and by
# everybody else in print, since each line also has its own marker and dashes.
_COLOURS = (
    ("#0072b2", "blue"),
    ("#d55e00", "vermilion"),
    ("#009e73", "green"),
    ("#cc79a7", "pink"),
    ("#e69f00", "orange"),
    ("#56b4e9", "light blue"),
    ("#7a5230", "brown"),
    ("#000000", "black"),
)
_GREYS = (("#555555", "dark grey"), ("#8a8a8a", "grey"), ("#b0b0b0", "light grey"))
_MARKERS = (
    ("o", "circles", "M10.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z"),
    ("s", "squares", "M10.8 2.8h6.4v6.4h-6.4z"),
    ("^", "triangles", "M14 2l4 7.4h-8z"),
    ("D", "diamonds", "M14 1.6l4 4.4-4 4.4-4-4.4z"),
    ("v", "triangles pointing down", "M14 10l4-7.4h-8z"),
    ("P", "crosses", "M12.7 2h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z"),
    ("<", "triangles pointing left", "M10 6l7.4-4v8z"),
    (">", "triangles pointing right", "M18 6l-7.4-4v8z"),
)
_DASHES = (("solid", ""), ("dashed", "6 3"), ("dotted", "2 2"), ("dash-dotted", "6 2 2 2"))


@dataclass(frozen=True)
class Style:
    """How one strategy is drawn in every chart."""

    colour: str
    marker: str
    dashes: str
    path: str
    words: str

    @property
    def line(self) -> Any:
        """The dashes as matplotlib writes them."""
        return (0, tuple(float(v) for v in self.dashes.split())) if self.dashes else "solid"


@dataclass(frozen=True)
class Score:
    """What the score matrices hold, and how it is told: accuracies in per cent, any other score as a plain number."""

    name: str = "accuracy"

    @property
    def percent(self) -> bool:
        return self.name == "accuracy"

    @property
    def factor(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def title(self) -> str:
        return self.name[:1].upper() + self.name[1:]

    @property
    def axis(self) -> str:
        return f"{self.name}, %" if self.percent else self.name

    @property
    def told(self) -> str:
        """How the numbers of a table are to be read."""
        if self.percent:
            return "In per cent; forgetting and transfer in percentage points."
        return f"Scores are plain numbers, the {self.name}: higher is better."

    @property
    def unit(self) -> str:
        return "per cent" if self.percent else "plain numbers"

    @property
    def colours(self) -> str:
        if self.percent:
            return "one colour scale from 0 (white) to 100 (dark)"
        return "each on a colour scale from its lowest (white) to its highest (dark)"

    def number(self, value: float) -> str:
        """``91.3`` or ``−0.4764``, without a unit."""
        text = f"{100 * value:.1f}" if self.percent else f"{value:.4g}"
        text = text.replace("-", "−")
        return "0.0" if text == "−0.0" else text

    def whole(self, value: float) -> str:
        """The same with as few digits as a cell of a drawing holds."""
        return f"{100 * value:.0f}" if self.percent else f"{value:.2g}".replace("-", "−")

    def stat(self, stat: Stat | None) -> str:
        """``91.3 ± 0.8``, or a dash."""
        if stat is None:
            return "–"
        mean = self.number(stat.mean)
        return mean if stat.half is None else f"{mean} ± {self.number(stat.half)}"

    def words(self, stat: Stat | None) -> str:
        """``91.3 % ± 0.8``: a score inside a sentence."""
        mean, sign, half = self.stat(stat).partition(" ± ")
        return f"{mean}{' %' * self.percent}{sign}{half}"

    def difference(self, value: float, half: float | None = None) -> str | None:
        """``6.0 ± 0.8 points``: a difference of scores inside a sentence; ``None`` where it is none to speak of."""
        if not max(abs(value), half or 0.0) >= (0.0005 if self.percent else 1e-12):
            return None
        return f"{self.stat(Stat(abs(value), 1, half))}{' points' * self.percent}"

    def explained(self, metric: str) -> tuple[str, str]:
        """Heading and definition of a metric."""
        heading, words = METRICS.get(metric, (metric, "Described by: cl-lab list metrics"))
        if self.percent:
            return heading, words
        return self._own(heading), self._own(words.replace("Share of right answers", "Accuracy"))

    def _own(self, text: str) -> str:
        return text.replace("accuracy", self.name).replace("Accuracy", self.title)


@dataclass(frozen=True)
class Stat:
    """A mean over ``n`` runs and the half width of its 95 % interval (``None`` with one run)."""

    mean: float
    n: int
    half: float | None = None

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


@dataclass
class Row:
    """One strategy of a comparison, as the report sees it."""

    label: str
    reference: bool
    runs: list[dict[str, Any]]
    metrics: dict[str, Stat]
    cost: dict[str, Stat]
    style: Style
    score: Score
    done: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy(self) -> Stat | None:
        """Average accuracy over the finished runs."""
        return self.metrics.get("average_accuracy")


@dataclass(frozen=True)
class Picture:
    """A chart: its caption and description, its SVG for the page, and its file for the Markdown twin."""

    name: str
    caption: str
    alt: str
    inline: str
    file: str


# -- the three doors -------------------------------------------------------------------------------------------------


def write_report(comparison: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html``, ``report.md`` and ``report_files/`` into ``folder``; returns the paths of the first two.

    ``comparison`` is what ``comparison.json`` holds (or :func:`from_runs` makes). Settings and environment are looked
    up in ``folder`` and in the folders of the runs, and left out where they are gone. Each file is replaced atomically.
    Raises :class:`UserError` where ``folder`` cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(folder)
    view, pictures = _view(comparison, folder)
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    options: dict[str, Any] = {
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
        "loader": loader,
    }
    page = Environment(autoescape=True, **options)
    # Markdown lets HTML through, so there every value is escaped for both; what is marked safe (fenced code) is not.
    twin = Environment(autoescape=False, finalize=lambda v: v if isinstance(v, Markup) else _markdown(v), **options)
    page.filters["svg"] = Markup
    twin.filters["file"] = Markup
    twin.filters["fenced"] = lambda text: Markup(_fenced(str(text)))
    files = folder / "report_files"
    try:
        files.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            write_atomically(files / f"{picture.name}.svg", picture.file)
        for stale in set(files.glob("*.svg")) - {files / f"{p.name}.svg" for p in pictures}:
            stale.unlink()
        write_atomically(folder / "report.html", page.get_template("report.html.j2").render(view))
        write_atomically(folder / "report.md", twin.get_template("report.md.j2").render(view))
    except OSError as error:
        raise UserError(f"the report cannot be written to '{folder}': {error}; give another folder") from None
    return folder / "report.html", folder / "report.md"


def write_again(run: Path) -> Path:
    """Write again the report in which the run in folder ``run`` stands: its comparison's, or its own. Returns the page.

    Raises :class:`UserError` where a document is damaged or the folder cannot be written.
    """
    place = run if run.parent.name == "runs" else run.resolve()
    home = place.parent.parent
    if place.parent.name == "runs" and (home / "comparison.json").is_file():
        comparison = _document(home / "comparison.json")
        runs = [r for row in comparison.get("rows") or [] for r in row.get("runs") or []]
        if any(_run_folder(r, home).resolve() == place.resolve() for r in runs):
            return write_report(comparison, home)[0]
    return write_report(from_runs([run]), run)[0]


def from_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """A comparison made of run folders and comparison folders, grouped by label.

    Of a comparison those runs are taken that its settings name: others in its folder are of earlier ones. A run given
    twice counts once; runs with one label that share a seed, or whose settings differ, become two strategies, told apart
    by a number. Each is measured against the references of its own settings. Raises :class:`UserError` for a folder
    without runs, a damaged ``run.json``, and runs on several streams.
    """
    runs: dict[str, dict[str, Any]] = {}
    from cl_lab.results import assemble

    if not paths:
        raise UserError("no runs given; name at least one folder of a run or a comparison")
    for path in map(Path, paths):
        folders = [path]
        if (path / "comparison.json").is_file() or (path / "runs").is_dir():
            folders = _runs_of(path)
            if not folders:
                raise UserError(f"comparison '{path}' holds no runs; run cl-lab compare again")
        for folder in folders:
            runs[str(folder.resolve())] = _run_document(folder)
    scenarios = sorted({str(run["scenario"]) for run in runs.values()})
    if len(scenarios) > 1:
        raise UserError(f"runs on different scenarios cannot be compared: {', '.join(scenarios)}; give runs on one")
    _check_same_stream(list(runs.values()))
    groups: dict[str, dict[Any, dict[str, Any]]] = {}
    meant: dict[str, Any] = {}
    for run in runs.values():
        label, number, settings = str(run["label"]), 1, _what_decides(run)
        while run["seed"] in groups.get(label, {}) or meant.setdefault(label, settings) != settings:
            number += 1
            label = f"{run['label']} ({number})"
        groups.setdefault(label, {})[run["seed"]] = {**run, "label": label}
    documents = [group[seed] for group in groups.values() for seed in sorted(group)]
    only = str(paths[0]) if len(paths) == 1 else ""
    return assemble(scenarios[0], only, list(groups), documents, [_conditions(d) for d in documents])


def _runs_of(comparison: Path) -> list[Path]:
    """The folders of the runs that a comparison's settings name; others in its folder are of earlier settings."""
    from cl_lab.config import label_of, parse

    folders, saved = run_folders(comparison), _saved(comparison)
    if saved is None:
        return folders
    config = parse(saved, str(comparison / "config.yaml"))
    strategies = config.strategies or ([config.strategy] if config.strategy else [])
    labels = {label_of(s, strategies) for s in strategies}
    seeds = config.seeds if config.seeds is not None else [config.seed]
    runs = {folder: _run_document(folder) for folder in folders}
    return [folder for folder, run in runs.items() if run["label"] in labels and run["seed"] in seeds]


def _saved(folder: Path) -> dict[str, Any] | None:
    """The settings kept with a run or a comparison; ``None`` where there are none that can be read."""
    return _parsed(_text(folder / "config.yaml") or "")


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> dict[str, Any] | None:
    """Settings as they are saved. Asked for several times a run, and a parse takes milliseconds: to be read alone."""
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        saved = yaml.safe_load(text)
        if isinstance(saved, dict):
            return saved
    return None


def _what_decides(run: Mapping[str, Any]) -> Any:
    """The settings of a run that its scores depend on, its seed aside; nothing where they were not kept."""
    saved = _saved(Path(run["path"]))
    return saved and {key: saved.get(key) for key in ("scenario", "model", "strategy", "training", "evaluation")}


def _conditions(run: Mapping[str, Any]) -> str:
    """The settings that a run shares with its references: all that decides but strategy, seed and the one stream.

    A run keeps its strategy's own training settings as its training. Of a comparison's runs what counts is what the
    comparison says, as a reference may train in a way of its own there.
    """
    folder = Path(run["path"]).resolve()
    saved, around = _saved(folder) or {}, folder.parent.parent
    settings = {key: saved.get(key) for key in ("model", "training", "evaluation")}
    # A folder called runs need not be a comparison's, which keeps its environment beside its settings.
    if folder.parent.name == "runs" and (around / "environment.json").is_file():
        settings["training"] = (_saved(around) or saved).get("training")
    return json.dumps(settings, sort_keys=True, default=str)


_NOT_THE_STREAM = ("data_dir", "order_seed")
"""Knobs of a scenario that may differ between runs on one stream, as the seed may."""

_TRAINED_ON = ("train_samples", "train_digest")
"""What a run says of the training data of each experience."""


def _check_same_stream(runs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs on streams of one name but other knobs (five experiences and ten, class- and task-incremental)."""
    met: dict[Any, tuple[str, Any]] = {}
    for run in runs:
        if not run.get("experiences"):  # failed before there was a stream
            continue
        seed, section = run["seed"], (_saved(Path(run["path"])) or {}).get("scenario")
        order = section.get("order_seed") if isinstance(section, dict) else None
        facts: list[tuple[Any, str]] = [
            ("shape", f"{len(run['experiences'])} experiences, chance {run.get('chance')}"),
            (seed, f"fingerprint {str(run.get('fingerprint'))[:12]}"),
        ]
        for i, e in enumerate(run["experiences"]):
            for name in _TRAINED_ON:
                if name in e:  # older runs kept no digest
                    facts.append(((seed, order, i, name), f"{name} of experience {i + 1}: {e[name]}"))
        # Another seed may rightly mean other data; the number of experiences and what guessing gives stay.
        for key, found in facts:
            path, other = met.setdefault(key, (run["path"], found))
            if found != other:
                raise UserError(
                    f"'{path}' ({other}) and '{run['path']}' ({found}) ran on different streams called "
                    f"'{run['scenario']}'; give runs on one"
                )
    knobs: dict[str, tuple[str, Any]] = {}
    for run in runs:
        section = (_saved(Path(run["path"])) or {}).get("scenario")
        for name, value in section.items() if isinstance(section, dict) else ():
            path, other = knobs.setdefault(name, (run["path"], value))
            if value != other and name not in _NOT_THE_STREAM:
                raise UserError(
                    f"'{path}' (scenario.{name} = {other}) and '{run['path']}' ({value}) ran on different streams called "
                    f"'{run['scenario']}'; give runs on one"
                )


def rich_table(comparison: Mapping[str, Any]) -> Table:
    """The results as a table for the terminal (80 columns suffice); references come last, below a line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = _rows(comparison)
    learners, references = _sorted(rows, False), _sorted(rows, True)
    mixed = bool(_mixed_data(rows))
    leaders = set() if mixed else {r.label for r in _leaders(learners)}
    several = any(r.accuracy and r.accuracy.n > 1 for r in rows)
    score = _score(comparison)
    table = Table(title=Text(_title(comparison)), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    table.add_column("strategy", overflow="fold", min_width=14)
    for head in ("accuracy" if score.percent else "score", "forgetting", "bwt", "learning", "training", "state"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in [*learners, *references]:
        means = [score.stat(row.metrics.get(m)).partition(" ± ")[0] for m in ("forgetting", "bwt", "learning_accuracy")]
        whole = len(row.done) == len(row.runs)
        cells = [score.stat(row.accuracy), *means]
        cells += [_cost(row, "train_seconds"), _cost(row, "strategy_state_bytes")]
        table.add_row(
            Text(row.label + (" *" if row.reference else "") + ("" if whole else f" ({_count(row)} runs)")),
            *map(Text, cells),
            style="bold" if row.label in leaders else "dim" if row.reference else "",
            end_section=bool(references) and row is (learners or references)[-1],
        )
    notes = [
        ("Accuracies in per cent, " if score.percent else f"Scores: {score.name}, ")
        + (
            "± 95 % confidence interval over seeds."
            if several
            else "one seed, no interval."
            if any(r.accuracy for r in rows)
            else "but no run finished."
        )
    ]
    if mixed:
        notes.append("Not all runs saw the same data: not comparable.")
    if references:
        notes.append("* reference: sees more than a continual learner may.")
    table.caption = Text(" ".join(notes))
    return table


def diagnosis_table(document: Mapping[str, Any]) -> Table:
    """A diagnosis (``diagnosis.json``) as a table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{document['label']} on {document['scenario']}, seed {document['seed']}: {_counted(document)}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    heads = [h for h in _DIAGNOSIS_HEADS if h != "First half lost within" or _sampled(document)]
    table.add_column("old task", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for head in heads[2:]:
        table.add_column(head.lower(), justify="right")
    for name, cells, verdict in _diagnosed_rows(document):
        table.add_row(Text(name), Text(verdict), *map(Text, cells))
    table.caption = Text("In per cent. " + _verdicts_note(document))
    return table


def recovery_table(document: Mapping[str, Any]) -> Table | None:
    """What came back from weights kept while the next task was learnt, for the terminal; ``None``: none were kept."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = _along_rows(document)
    if not rows:
        return None
    table = Table(title=Text(_ALONG), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    for i, head in enumerate(_ALONG_HEADS):
        table.add_column(head.lower(), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# -- what was found --------------------------------------------------------------------------------------------------


def headline(comparison: Mapping[str, Any]) -> str:
    """One sentence that says what was found, and no more than the numbers bear out.

    The best strategy is the one with the highest mean average accuracy, references aside. It is called best only if its
    95 % interval lies above those of all others; with one seed it is merely ahead, and of runs on different data none is.
    """
    rows = _rows(comparison)
    learners = [r for r in _sorted(rows, False) if r.accuracy]
    where = f"on {comparison.get('scenario') or 'this stream'}"
    average = f"average {_score(comparison).name}"
    if not learners:
        references = [r for r in _sorted(rows, True) if r.accuracy]
        if not references:
            return f"No run {where} finished, so there is nothing to compare."
        first = references[0]
        return (
            f"Only references ran {where}: {first.label} reaches {_in_words(first)} {average}. "
            "No continual learner was measured."
        )
    best, mixed = learners[0], bool(_mixed_data(rows))
    if len(learners) == 1:
        tail = "" if best.accuracy and best.accuracy.n > 1 else " (one seed, no interval)"
        tail += ", but not all runs saw the same data" * mixed
        return f"{best.label} reaches {_in_words(best)} {average} {where}{tail}."
    if mixed:
        return f"No verdict on {_few(map(_told, learners))} {where}: not all runs saw the same data."
    leaders, second = _leaders(learners), learners[1]
    if len(leaders) > 1:
        return (
            f"No clear winner {'between' if len(leaders) == 2 else 'among'} {_few(map(_told, leaders))} {where}: their 95 % "
            f"intervals overlap{_beaten_by_some(leaders, learners)}{_of_one_seed(learners)}."
        )
    compared = f"{best.label} ({_in_words(best)} {average})"
    single = [r.label for r in (best, second) if r.accuracy and r.accuracy.n < 2]
    if single:
        if second.accuracy and best.accuracy and second.accuracy.mean == best.accuracy.mean:
            return (
                f"{best.label} and {second.label} are level {where} ({_in_words(best)}), with one seed and no interval."
            )
        which = "one seed, no interval" if len(single) == 2 else f"{single[0]} has one seed, no interval"
        return f"{compared} is ahead of {second.label} ({_in_words(second)}) {where}, but {which}: it may be chance."
    several = sum(r.accuracy is not None and r.accuracy.n > 1 for r in learners)
    rivals = _told(second) + (" and the rest" if several > 2 else "")
    return f"{compared} clearly beats {rivals} {where}{_of_one_seed(learners)}."


def _of_one_seed(learners: Sequence[Row]) -> str:
    """What a sentence on intervals must add about those that have none."""
    alone = [_told(r) for r in learners if r.accuracy and r.accuracy.n < 2]
    return f"; {_list(alone)} {'has' if len(alone) == 1 else 'have'} one seed and no interval" if alone else ""


def _beaten_by_some(leaders: Sequence[Row], learners: Sequence[Row]) -> str:
    """What a sentence on overlapping intervals must add about those below some leaders', but not below the others'."""
    beaten: dict[tuple[str, ...], list[str]] = {}
    for row in learners:
        winners = tuple(r.label for r in leaders if _clearly_above(r, row))
        if 0 < len(winners) < len(leaders):
            beaten.setdefault(winners, []).append(_told(row))
    told = ""
    for winners, rows in beaten.items():
        others = [r.label for r in leaders if r.label not in winners]
        told += f"; {_few(winners)} clearly {'beats' if len(winners) == 1 else 'beat'} {_few(rows)}, "
        told += f"{_few(others)} {'does' if len(others) == 1 else 'do'} not"
    return told


def findings(comparison: Mapping[str, Any]) -> list[str]:
    """The sentences that follow the headline: gap to the upper bound, forgetting, what else was asked, cost, and what
    weakens the result.

    Of runs on different data the first says so, and strategies are not told against each other.
    """
    rows = _rows(comparison)
    learners = [r for r in _sorted(rows, False) if r.accuracy]
    found = _mixed_data(rows)
    if not found:
        leaders = (_leaders(learners) or learners[:1])[:3]
        found += _gap(leaders, [r for r in _sorted(rows, True) if r.accuracy])
        found += _forgot(leaders, learners)
        found += _asked_beside(leaders)
        found += _price(leaders, learners)
    chance = _number(comparison.get("chance"))
    if chance is not None:
        found += _not_above(chance, learners, [r for r in _sorted(rows, True) if r.accuracy])
    runs = [run for row in rows for run in row.runs]
    missing = len(runs) - sum(len(row.done) for row in rows)
    if missing:
        verb = "did" if missing > 1 else "has"
        rest = "not finish; they count" if missing > 1 else "not finished; it counts"
        found.append(f"{missing} of {len(runs)} runs {verb} {rest} in no number here.")
    seeds = {tuple(sorted(str(run.get("seed")) for run in row.done)) for row in rows if row.done}
    if len(seeds) > 1:
        found.append("The strategies were not all measured on the same seeds, so compare them with care.")
    return found


def _mixed_data(rows: Sequence[Row]) -> list[str]:
    """How it shows that the finished runs did not all see the same data; nothing where it does not."""
    by_seed: dict[Any, list[tuple[str, Any]]] = {}
    for row in rows:
        for run in row.done:
            by_seed.setdefault(run.get("seed"), []).append((row.label, run))
    tested = (
        f"seed {seed}: {told}"
        for seed, runs in by_seed.items()
        if (told := _parted((f"fingerprint {str(run.get('fingerprint') or '')[:12]}", of) for of, run in runs))
    )
    trained = (
        f"seed {seed}, {told}"
        for seed, runs in by_seed.items()
        for i in range(max(len(run.get("experiences") or []) for _, run in runs))
        for name in _TRAINED_ON
        if (told := _parted_in(runs, i, name))
    )
    between = (f"{row.label}: {told}" for row in rows if (told := _changed_between_seeds(row.done)))
    sentences = (
        ("Runs with one seed were tested on different data ({}): not comparable.", tested),
        ("Runs with one seed were trained on different data ({}): not comparable.", trained),
        ("The data changed between seeds ({}): means and intervals are of different things.", between),
    )
    return [sentence.format(first) for sentence, all_told in sentences if (first := next(all_told, None))]


def _changed_between_seeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """How it shows that one strategy's ``runs`` saw data that do not differ for their seeds' sake; ``""`` where not.

    Another seed may rightly mean another order and other draws, and so other data. But what some seeds share has nothing
    of the seed in it, so that all should; and where they all share an experience, the others should keep their sizes.
    """
    plans: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        plan = [(e.get("name"), e.get("classes")) for e in run.get("experiences") or []]
        if plan:
            plans.setdefault(json.dumps(plan), []).append(run)
    for same in plans.values():
        seeds = [f"seed {run.get('seed')}" for run in same]
        experiences = [run["experiences"] for run in same]
        digests = [[str(e.get("train_digest") or "") for e in es] for es in experiences]
        tests = [str(run.get("fingerprint") or "")[:12] for run in same]
        for what, values in (("fingerprint", tests), ("training data", ["".join(d) for d in digests])):
            if all(values) and 1 < len(set(values)) < len(values):
                return _parted((f"{what} {value[:12]}", seed) for value, seed in zip(values, seeds, strict=True))
        if any(d[0] and len(set(d)) == 1 for d in zip(*digests, strict=True)):
            for i in range(len(digests[0])):
                if told := _parted_in(zip(seeds, same, strict=True), i, "test_samples"):
                    return told
            # Of all: a stream that is cut at recordings has pieces of other sizes in another order.
            sums = (sum(e["train_samples"] for e in es) for es in experiences)
            if told := _parted((f"{n} training samples", seed) for n, seed in zip(sums, seeds, strict=True)):
                return told
    return ""


def _parted_in(runs: Iterable[tuple[str, Mapping[str, Any]]], i: int, name: str) -> str:
    """``classes 0 1, train samples: 27 for …, 13 for …``; runs that do not say count with any, as older ones hold less."""
    found, where = [], ""
    for whose, run in runs:
        experiences = run.get("experiences") or []
        if i < len(experiences) and experiences[i].get(name) is not None:
            found.append((str(experiences[i][name]), whose))
            where = str(experiences[i].get("name") or f"experience {i + 1}")
    told = _parted(found)
    return f"{where}, {name.replace('_', ' ')}: {told}" if told else ""


def _parted(found: Iterable[tuple[str, str]]) -> str:
    """``27 for naive and replay, 13 for ewc``: of values and whose they are; ``""`` where there is one value."""
    met: dict[str, dict[str, None]] = {}
    for value, whose in found:
        if value:
            met.setdefault(value, {})[whose] = None
    return ", ".join(f"{value} for {_few(whose)}" for value, whose in met.items()) if len(met) > 1 else ""


def _not_above(chance: float, learners: Sequence[Row], references: Sequence[Row]) -> Iterator[str]:
    """Who may as well have guessed."""
    low, beside = (
        [r.label for r in some if r.accuracy and r.accuracy.low <= chance] for some in (learners, references)
    )
    if low and len(low) == len(learners):
        low = [f"even {learners[0].label}"]
    if low or beside:
        are = "is" if len(low + beside) == 1 else "are"
        yield f"Guessing gives {100 * chance:.1f} %: {_few([*low, *beside])} {are} not clearly above chance."


def _gap(leaders: Sequence[Row], references: Sequence[Row]) -> Iterator[str]:
    """How far the leaders are from joint training (or from the best reference there is)."""
    joint = next((r for r in references if r.label.startswith("joint")), references[0] if references else None)
    if joint is None or joint.accuracy is None or not leaders:
        return
    parts = []
    for row in leaders:
        assert row.accuracy is not None
        missing = joint.accuracy.mean - row.accuracy.mean
        points = row.score.difference(missing)
        if points is None:
            parts.append(f"{row.label} reaches it")
        else:
            unsure = min(row.accuracy.n, joint.accuracy.n) > 1 and not (
                _clearly_above(row, joint) or _clearly_above(joint, row)
            )
            side = "below" if missing > 0 else "above"
            parts.append(f"{row.label} is {points} {side} it{', which may be chance' * unsure}")
    told = ", which sees all data at once," if joint.label.startswith("joint") else ", a reference,"
    yield f"{joint.label}{told} reaches {_in_words(joint)}; {_list(parts)}."


def _forgot(leaders: Sequence[Row], learners: Sequence[Row]) -> Iterator[str]:
    naive = _naive(learners)
    parts = []
    for row in leaders:
        stat = row.metrics.get("forgetting")
        if stat is None:
            continue
        points = row.score.difference(stat.mean, stat.half)
        if points and stat.half and stat.low <= 0 <= stat.high:
            lost = "lost" if stat.mean > 0 else "gained"
            parts.append(f"{row.label} shows no clear forgetting ({points} {lost} on earlier experiences)")
        elif points and stat.mean > 0:
            parts.append(f"{row.label} loses {points} of {row.score.name} on earlier experiences")
        else:
            gain = f" (earlier experiences gain {points})" if points else ""
            parts.append(f"{row.label} forgets nothing on average{gain}")
    if not parts:
        return
    against = ""
    if naive and naive not in leaders and "forgetting" in naive.metrics:
        against = f" (naive training: {naive.score.stat(naive.metrics['forgetting'])})"
    yield f"Forgetting: {_list(parts)}{against}."


def _asked_beside(leaders: Sequence[Row]) -> Iterator[str]:
    """What the stream's other questions were worth: who leads on what was learnt may have lost the rest."""
    if told := _asides(leaders):
        each = (
            f"{row['label']}: {', '.join(map(' '.join, zip(told['heads'], row['cells'], strict=True)))}"
            for row in told["rows"]
        )
        unit = " in per cent," if leaders[0].score.percent else ""
        yield f"Also asked,{unit} before → after: {'; '.join(each)}."


def _price(leaders: Sequence[Row], learners: Sequence[Row]) -> Iterator[str]:
    naive = _naive(learners)
    parts = []
    for row in leaders:
        words = []
        seconds = row.cost.get("train_seconds")
        base = naive.cost.get("train_seconds") if naive and naive is not row else None
        if seconds and base and base.mean > 0:
            words.append(
                f"{seconds.mean / base.mean:.1f}× naive's training time ({_seconds(seconds.mean)} "
                f"against {_seconds(base.mean)})"
            )
        elif seconds:
            words.append(f"{_seconds(seconds.mean)} of training")
        state = row.cost.get("strategy_state_bytes")
        if state:
            words.append(f"{_bytes(state.mean)} of its own state" if state.mean else "no state of its own")
        if naive and naive is not row:
            words += _memory(row, naive)
        if words:
            parts.append(f"{row.label} needs {_list(words)}")
    if parts:
        yield f"Cost: {'; '.join(parts)}."


def _memory(row: Row, naive: Row) -> Iterator[str]:
    """What ``row`` needs beyond model and data, against naive; nothing where that drowns in what every run differs by.

    The whole peak would not do: it is that of the process, which grows with every run in it.
    """
    mine, base = row.cost.get("own_memory_bytes"), naive.cost.get("own_memory_bytes")
    if mine is None or base is None or max(mine.mean, base.mean) < _NOISE_BYTES:
        return
    if base.mean < _NOISE_BYTES:
        yield f"{_bytes(mine.mean)} of memory beyond model and data (naive: {_bytes(base.mean)})"
        return
    ratio = mine.mean / base.mean
    if 1 / _NOISE_RATIO <= ratio <= _NOISE_RATIO:
        yield "about as much memory beyond model and data as naive"
    else:
        yield f"{ratio:.1f}× naive's memory beyond model and data ({_bytes(mine.mean)} against {_bytes(base.mean)})"


def _naive(rows: Sequence[Row]) -> Row | None:
    return next((r for r in rows if r.label == "naive" or any(run.get("strategy") == "naive" for run in r.runs)), None)


def _leaders(learners: Sequence[Row]) -> list[Row]:
    """Those of ``learners`` (sorted) whose 95 % interval lies below no other's; just the best where that has one seed.

    The best is one of them, and the intervals of any two overlap.
    """
    measured = [r for r in learners if r.accuracy]
    if not measured or (measured[0].accuracy and measured[0].accuracy.n < 2):
        return measured[:1]
    several = [r for r in measured if r.accuracy and r.accuracy.n > 1]
    return [r for r in several if not any(_clearly_above(other, r) for other in several)]


def _clearly_above(row: Row, other: Row) -> bool:
    """Whether the interval of ``row`` lies above that of ``other``; both have one."""
    mine, its = row.accuracy, other.accuracy
    return mine is not None and its is not None and mine.n > 1 and its.n > 1 and mine.low > its.high


# -- reading ---------------------------------------------------------------------------------------------------------


def _document(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path.parent}' holds no {path.name}; give the folder of a run or a comparison") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}); repeat the run, or leave it out") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is damaged (not a JSON object); repeat the run, or leave it out")
    return value


def _run_document(folder: Path) -> dict[str, Any]:
    run = _document(folder / "run.json")
    for key, kind in (("scenario", str), ("strategy", str), ("seed", int), ("matrix", list)):
        if not isinstance(run.get(key), kind):
            raise UserError(f"'{folder / 'run.json'}' is damaged ('{key}' is missing or wrong); repeat the run")
    return {"status": "finished", **run, "label": run.get("label") or run["strategy"], "path": str(folder)}


def _rows(comparison: Mapping[str, Any]) -> list[Row]:
    """The strategies of a comparison in its order, which also gives each its colour."""
    rows, counts, score = [], {False: 0, True: 0}, _score(comparison)
    for raw in comparison.get("rows") or []:
        runs = [dict(run) for run in raw.get("runs") or []]
        done = [run for run in runs if run.get("status", "finished") == "finished"]
        reference = bool(raw.get("reference"))
        stats: dict[str, dict[str, Stat]] = {}
        for group in ("metrics", "cost"):
            stats[group] = {}
            for name, value in (raw.get(group) or {}).items():
                values = [_number((run.get(group) or {}).get(name)) for run in done]
                n = sum(v is not None for v in values) if runs else len(raw.get("seeds") or [])
                stat = _stat(value, n)
                if stat is not None:
                    stats[group][name] = stat
        style = _style(counts[reference], reference)
        counts[reference] += 1
        label = str(raw.get("strategy"))
        rows.append(Row(label, reference, runs, stats["metrics"], stats["cost"], style, score, done))
    return rows


def _score(comparison: Mapping[str, Any]) -> Score:
    return Score(str(comparison.get("score") or "accuracy"))


def _stat(value: Any, n: int) -> Stat | None:
    if not isinstance(value, Mapping):
        value = {"mean": value}
    mean = _number(value.get("mean"))
    if mean is None or n == 0:
        return None
    bounds = [_number(v) for v in value.get("ci95") or []]
    half = None
    if n > 1 and len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None:
        half = (bounds[1] - bounds[0]) / 2
    return Stat(mean, n, half)


def _style(index: int, reference: bool) -> Style:
    if reference:
        (colour, name), (marker, shape, path) = _GREYS[index % len(_GREYS)], _MARKERS[(index + 3) % len(_MARKERS)]
        dash, dashes = _DASHES[1 + index % 3]
    else:
        again = index // len(_COLOURS)
        (colour, name), (marker, shape, path) = (
            _COLOURS[index % len(_COLOURS)],
            _MARKERS[(index + again) % len(_MARKERS)],
        )
        dash, dashes = _DASHES[again % len(_DASHES)]
    return Style(colour, marker, dashes, path, f"{name}, {dash} with {shape}")


def _sorted(rows: Sequence[Row], reference: bool) -> list[Row]:
    """Best first; strategies without a finished run last."""
    chosen = [r for r in rows if r.reference is reference]
    return sorted(chosen, key=lambda r: -r.accuracy.mean if r.accuracy else math.inf)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# -- the page's contents ---------------------------------------------------------------------------------------------


def _view(comparison: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[Picture]]:
    """All that the templates print, as text, and the pictures."""
    rows = _rows(comparison)
    learners, references = _sorted(rows, False), _sorted(rows, True)
    shown = [r for r in [*learners, *references] if r.done]
    leaders = set() if _mixed_data(rows) else {r.label for r in _leaders(learners)}
    names = _experience_names(rows)
    charts = _draw(shown, names)
    diagnoses = [_diagnosed(d, n) for n, d in enumerate(_diagnoses(rows, folder), 1)]
    several = any(r.accuracy and r.accuracy.n > 1 for r in rows)
    metrics = [m for m in _MAIN if any(m in r.metrics for r in rows)]
    every = sorted(
        {m for r in rows for m in r.metrics}, key=lambda m: (list(METRICS).index(m) if m in METRICS else 99, m)
    )
    costs = [c for c in _COSTS if any(c in r.cost for r in rows)]
    settings, environment = _settings(comparison, folder), _environment(comparison, folder)
    score = _score(comparison)
    view = {
        "score": score,
        "title": _title(comparison),
        "facts": _facts(comparison, rows, names),
        "headline": headline(comparison),
        "findings": findings(comparison),
        "interval_note": (
            "Mean over the seeds ± half the width of its 95 % confidence interval (Student's t)."
            if several
            else "One seed, no interval: differences between strategies may be chance."
        ),
        "chance": _number(comparison.get("chance")),
        "heads": [score.explained(m)[0] for m in metrics],
        "groups": [
            {
                "reference": group is references,
                "rows": [
                    {
                        "label": r.label,
                        "best": r.label in leaders,
                        "count": _count(r),
                        "cells": [score.stat(r.metrics.get(m)) for m in metrics],
                    }
                    for r in group
                ],
            }
            for group in (learners, references)
            if group
        ],
        "unfinished": _unfinished(rows),
        "legend": [{"label": r.label, "style": r.style, "reference": r.reference} for r in shown],
        "anytime_legend": [
            {"label": r.label, "style": r.style, "reference": r.reference}
            for r in shown
            if any(run.get("anytime") for run in r.done)
        ],
        "charts": charts,
        "tables": [_matrix_table(r, names) for r in shown if _mean_matrix(r)],
        "panels_note": _panels_note(names),
        "diagnoses": diagnoses,
        "cost_heads": [_COSTS[c] for c in costs],
        "cost_note": "Mean over seeds. Times depend on the machine and on what else ran on it."
        + (
            " Beyond model and data: what the run added to all that was held just before its first step. The whole peak "
            "holds libraries, too, and what earlier runs left in the process."
            if "own_memory_bytes" in costs
            else ""
        ),
        "cost_rows": [
            {"label": r.label, "cells": [_cost(r, c) for c in costs], "ratio": _ratio_to_naive(r, learners)}
            for r in shown
        ],
        "drift": [drift for r in shown if (drift := _drift(r)) is not None],
        "asides": _asides(shown),
        "measures": [row for r in shown for row in _measures(r)],
        "metric_labels": [r.label for r in shown],
        "metric_rows": [{"name": m, "cells": [score.stat(r.metrics.get(m)) for r in shown]} for m in every],
        "definitions": [(m, *score.explained(m)) for m in every if m in METRICS or m not in _MAIN],
        "settings": settings,
        "environment": environment,
        **_reproduction(comparison, settings, environment, folder),
    }
    return view, [p for group in [*charts.values(), *(d["charts"] for d in diagnoses)] for p in group]


def _title(comparison: Mapping[str, Any]) -> str:
    labels = [str(r.get("strategy")) for r in comparison.get("rows") or []]
    scenario = comparison.get("scenario") or "unnamed stream"
    return f"{_list(labels) if len(labels) <= 4 else f'{len(labels)} strategies'} on {scenario}"


def _facts(comparison: Mapping[str, Any], rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The line above the headline: what was run."""
    seeds = sorted(
        {run["seed"] for row in rows for run in row.runs if "seed" in run}, key=lambda s: (len(str(s)), str(s))
    )
    facts = [str(comparison.get("scenario") or "unnamed stream")]
    if names:
        facts.append(_plural(len(names), "experience"))
    facts.append(_plural(len(rows), "strategy", "strategies"))
    if seeds:
        listed = ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{seeds[0]} … {seeds[-1]}"
        facts.append(f"{_plural(len(seeds), 'seed')} ({listed})" if len(seeds) > 1 else f"seed {listed}")
    ended = max((str(run["finished"]) for row in rows for run in row.runs if run.get("finished")), default="")
    if ended:
        facts.append(ended[:10])
    return facts


def _experience_names(rows: Sequence[Row]) -> list[str]:
    """What the experiences are called, as the first run that knows says."""
    for run in (run for row in rows for run in [*row.done, *row.runs]):
        if run.get("experiences"):
            return [str(e.get("name") or f"experience {i + 1}") for i, e in enumerate(run["experiences"])]
        if run.get("matrix"):
            return [f"experience {i + 1}" for i in range(len(run["matrix"][0]))]
    return []


def _unfinished(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The runs that count in no number, with how far they came and why they stopped."""
    found = []
    for row in rows:
        for run in row.runs:
            if run in row.done:
                continue
            status = str(run.get("status"))
            total = len(run.get("experiences") or []) or (len(run["matrix"][0]) if run.get("matrix") else 0)
            why = {"interrupted": "stopped by a signal", "running": "still running, or killed without a word"}
            found.append(
                {
                    "label": row.label,
                    "seed": run.get("seed"),
                    "status": status,
                    "progress": f"{len(run.get('matrix') or [])} of {total or '?'} experiences",
                    "error": run.get("error") or why.get(status, "no reason recorded"),
                    "path": run.get("path") or "",
                }
            )
    return found


def _mean_matrix(row: Row, part: str = "matrix") -> list[list[float]]:
    """The score matrix averaged over the finished runs (``initial``: the row before training, as one row)."""
    import numpy as np

    matrices = [np.asarray(m) for m in _matrices(row, part)]
    same = [m for m in matrices if m.shape == matrices[0].shape]
    return [[float(v) for v in r] for r in np.mean(same, axis=0)] if same else []


def _matrix_table(row: Row, names: Sequence[str]) -> dict[str, Any]:
    rows = [("before", r) for r in _mean_matrix(row, "initial")]
    rows += [(f"after {i + 1}", r) for i, r in enumerate(_mean_matrix(row))]
    return {
        "label": row.label,
        "heads": list(names),
        "rows": [
            {"head": head, "cells": [row.score.number(v) if math.isfinite(v) else "–" for v in r]} for head, r in rows
        ],
    }


def _drift(row: Row) -> dict[str, str] | None:
    """What became of the rest of a language model, before training and at its end: means over the finished runs."""
    from cl_lab.metrics import interval

    runs = [run for run in row.done if run.get("drift")]
    if not runs:
        return None

    def told(values: Sequence[float | None], number: Callable[[float], str]) -> str:
        some = [v for v in values if v is not None]
        return number(interval(some)["mean"]) if some else "–"

    def before_and_after(values: Sequence[Sequence[float | None]], number: Callable[[float], str]) -> str:
        ends = [told([v[i] for v in values], number) for i in (0, -1)]
        return "–" if ends == ["–", "–"] else " → ".join(ends)

    def mean(values: Iterable[Any] | None) -> float | None:
        some = [v for v in map(_number, values or []) if v is not None]
        return sum(some) / len(some) if some else None

    def percent(value: float) -> str:
        return f"{100 * value:.1f}".replace("-", "−")

    delta = row.metrics.get("general_ability_delta")
    return {
        "label": row.label,
        "perplexity": before_and_after([[_number(d.get("perplexity")) for d in run["drift"]] for run in runs], _plain),
        "general": before_and_after([[mean(d["general"].values()) for d in run["drift"]] for run in runs], percent),
        "delta": "–"
        if delta is None
        else percent(delta.mean) + ("" if delta.half is None else f" ± {percent(delta.half)}"),
        "valid": before_and_after(
            [[mean(run.get("initial_valid")), mean((run.get("valid") or [None])[-1])] for run in runs], percent
        ),
    }


def _asides(rows: Sequence[Row]) -> dict[str, Any] | None:
    """What the stream's other questions were worth, before training and at its end: means over the finished runs."""
    from cl_lab.metrics import interval

    asked = [
        (row, [[a["scores"] for a in run["asides"]] for run in row.done if len(run.get("asides") or []) == 2])
        for row in rows
    ]
    names = list(dict.fromkeys(name for _, runs in asked for run in runs for name in run[0]))

    def worth(row: Row, runs: Sequence[Any], name: str) -> str:
        ends = []
        for i in (0, 1):
            values = [v for run in runs if (v := _number(run[i].get(name))) is not None]
            ends.append(_stat(interval(values), len(values)) if values else None)
        before, after = ends
        return "–" if before is None else f"{row.score.number(before.mean)} → {row.score.stat(after)}"

    if not names:
        return None
    return {
        "heads": [name.replace("_", " ") for name in names],
        "rows": [{"label": row.label, "cells": [worth(row, runs, n) for n in names]} for row, runs in asked if runs],
    }


def _measures(row: Row) -> list[dict[str, str]]:
    """What a strategy measured itself, after the first experience and after the last: means over the finished runs.

    Numbers of a single experience (``…_exp_0``) are left to ``run.json``.
    """
    runs = [run["measures"] for run in row.done if run.get("measures")]
    found = []
    for name in {name: None for measures in runs for m in measures for name in m}:
        if re.search(r"_exp_\d+$", name):
            continue
        ends = []
        for i in (0, -1):
            values = [v for measures in runs if (v := _number(measures[i].get(name))) is not None]
            ends.append(_plain(sum(values) / len(values)) if values else "–")
        found.append({"label": row.label, "name": name, "first": ends[0], "last": ends[1]})
    return found


def _plain(value: float) -> str:
    """A number of no known unit in a table."""
    whole = value == int(value) and abs(value) < 1e15
    return (f"{int(value):,}".replace(",", "\u202f") if whole else f"{value:.4g}").replace("-", "−")


def _ratio_to_naive(row: Row, learners: Sequence[Row]) -> str:
    naive = _naive(learners)
    mine, base = row.cost.get("train_seconds"), naive.cost.get("train_seconds") if naive else None
    return f"{mine.mean / base.mean:.2f}×" if mine and base and base.mean > 0 else "–"


def _folders(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Where settings and environment may lie: here, in the comparison's folder, in those of its runs."""
    found = [folder]
    if comparison.get("path"):
        found.append(Path(str(comparison["path"])))
    return found


def _settings(comparison: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """The resolved configuration: the comparison's, or the first run's of each strategy."""
    for place in _folders(comparison, folder):
        text = _text(place / "config.yaml")
        if text is not None:
            return [{"label": "config.yaml", "text": _without_password(text), "path": str(place / "config.yaml")}]
    found = []
    for row in comparison.get("rows") or []:
        for run in row.get("runs") or []:
            text = _text(_run_folder(run, folder) / "config.yaml")
            if text is not None:
                path = str(_run_folder(run, folder) / "config.yaml")
                label = f"{row.get('strategy')}, seed {run.get('seed')}"
                found.append({"label": label, "text": _without_password(text), "path": path})
                break
    return found


def _environment(comparison: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Facts and package versions of the machine, and the fingerprints of the data; says where runs differ."""
    places = _folders(comparison, folder)
    runs = [run for row in comparison.get("rows") or [] for run in row.get("runs") or []]
    places += [_run_folder(run, folder) for run in runs]
    found: list[dict[str, Any]] = []
    for place in dict.fromkeys(places):
        text = _text(place / "environment.json")
        with contextlib.suppress(ValueError):
            value = json.loads(text) if text else None
            if isinstance(value, dict):
                found.append(value)
    prints = {f"seed {run.get('seed')}": str(run["fingerprint"]) for run in runs if run.get("fingerprint")}
    if len(set(prints.values())) == 1:
        prints = {"data fingerprint": next(iter(prints.values()))}
    else:
        prints = {f"data fingerprint, {seed}": value for seed, value in prints.items()}
    first = found[0] if found else {}
    packages = first.get("packages") if isinstance(first.get("packages"), dict) else {}
    facts = {str(k).replace("_", " "): v for k, v in first.items() if k != "packages" and v not in (None, "", {}, [])}
    return {
        "facts": [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in facts.items()] + sorted(prints.items()),
        "packages": sorted((str(k), str(v)) for k, v in (packages or {}).items()),
        "commit": str(first.get("git_commit") or ""),
        "differs": any(other.get("packages") != first.get("packages") for other in found[1:]),
    }


def _reproduction(
    comparison: Mapping[str, Any], settings: Sequence[Mapping[str, str]], environment: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The commands that measure this again, and that write this page again."""
    commands = []
    if environment["commit"]:
        commit = environment["commit"].removesuffix(CHANGES)
        note = "  # with local changes, which were not kept" if commit != environment["commit"] else ""
        commands.append(f"git checkout {shlex.quote(commit)}{note}")
    for setting in settings:
        compare = re.search(r"^(strategies|seeds):\s*(\n|\[)", setting["text"], re.MULTILINE) is not None
        commands.append(f"cl-lab {'compare' if compare else 'run'} {shlex.quote(setting['path'])}")
    return {"commands": commands, "folder": str(comparison.get("path") or folder)}


def _run_folder(run: Mapping[str, Any], folder: Path) -> Path:
    """A run's folder, also where the comparison was moved or copied since."""
    path = Path(str(run.get("path") or ""))
    moved = folder / "runs" / path.name
    return moved if path.name and moved.is_dir() else path


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _without_password(text: str) -> str:
    from cl_lab.tracking import without_password

    return without_password(text)


# -- diagnoses -------------------------------------------------------------------------------------------------------

_DIAGNOSIS_HEADS = (
    "Old task",
    "Verdict",
    "Original",
    "Forgotten",
    "Recovered",
    "Control",
    "Ratio",
    "Its labels",
    "Later labels",
    "Newest task",
    "First half lost within",
)
_ALONG = "While the next task was learnt: what was answered, and what came back after recovery from there, %"
_ALONG_HEADS = ("Old task", "Steps of the next", "Of all its steps", "Answered", "Recovered", "Ratio")


def _diagnoses(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """The diagnoses that lie in the folders of the runs. Raises :class:`UserError` for one that is damaged."""
    found = []
    for run in (run for row in rows for run in row.runs):
        path = _run_folder(run, folder) / DIAGNOSIS_FILE
        if not path.is_file():
            continue
        document = _document(path)
        try:
            _diagnosed_rows(document)
            _along_rows(document)
            _counted(document)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"'{path}' is damaged ({type(error).__name__}: {error}); run cl-lab diagnose again, or delete it"
            ) from None
        found.append({**document, "label": run.get("label"), "seed": run.get("seed")})
    return found


def _diagnosed(document: Mapping[str, Any], n: int) -> dict[str, Any]:
    """One diagnosis as the page shows it; ``n`` tells its pictures from others'."""
    tasks, updates = document["tasks"], document["updates"]
    who = f"{document['label']}, seed {document['seed']}"
    told = _list([f"{t['name']} " + ", ".join(f"{k} {100 * t[k]:.0f} %" for k in _FOUR) for t in tasks])
    width = min(6.6, 1.8 + 1.1 * len(tasks))
    charts = [
        _picture(
            f"recovery-{n}",
            "Accuracy on old tasks, %",
            f"Bar chart: {told}.",
            (width, 3.1),
            partial(_draw_recovery, tasks=tasks),
        )
    ]
    if updates["angles"]:
        rows, columns = len(updates["layers"]) + 1, len(updates["angles"])
        whole = ", ".join("none" if v is None else f"{v:.0f}" for v in updates["whole"]["angles"])
        charts.append(
            _picture(
                f"angles-{n}",
                "Angle between the weight updates of successive tasks, degrees",
                f"Heat map by layer. Of the whole model: {whole} degrees.",
                (2.6 + 0.5 * min(columns, 10), 1.2 + 0.24 * min(rows, 40)),
                partial(_draw_angles, updates=updates),
            )
        )
    sampled = _sampled(document)
    if sampled:
        charts.append(
            _picture(
                f"first-steps-{n}",
                "Accuracy on an old task while the next one is learnt, %"
                + ("; dotted: after recovery from there" if _along_rows(document) else ""),
                "Line chart over the share of the next task's training.",
                (4.2, 3.1),
                partial(_draw_first_steps, tasks=sampled),
            )
        )
    return {
        "who": who,
        "counted": _counted(document),
        "heads": [h for h in _DIAGNOSIS_HEADS if h != "First half lost within" or sampled],
        "rows": [{"name": name, "cells": cells, "verdict": v} for name, cells, v in _diagnosed_rows(document)],
        "verdicts": _verdicts_note(document),
        "legend": [
            {"label": f"{t['index'] + 1}. {t['name']}", "style": _style(i, False), "reference": False}
            for i, t in enumerate(sampled)
        ],
        "charts": charts,
        "along": {"title": _ALONG, "heads": _ALONG_HEADS, "rows": _along_rows(document)},
        "masses": any(t["mass"] for t in tasks),
    }


def _diagnosed_rows(document: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """Each old task's name, the cells behind its verdict, and that verdict."""
    score, sampled, found = Score(), _sampled(document), []
    for t in document["tasks"]:
        cells = [score.number(t[k]) for k in _FOUR]
        cells.append(_ratio(t["ratio"]))
        mass = t["mass"]
        for whose in ("own", "later"):
            cells.append(
                "–" if mass is None else f"{score.number(mass['before'][whose])} → {score.number(mass['after'][whose])}"
            )
        cells.append(f"{score.number(t['newest']['before'])} → {score.number(t['newest']['after'])}")
        if sampled:
            cells.append("–" if t["half_lost_at"] is None else f"{100 * t['half_lost_at']:.1f} %")
        found.append((f"{t['index'] + 1}. {t['name']}", cells, str(t["verdict"])))
    return found


def _along_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """What came back from weights kept while the next task was learnt; diagnoses of before have none."""
    number = Score().number
    return [
        [
            f"{t['index'] + 1}. {t['name']}",
            str(point["step"]),
            f"{100 * point['share']:.1f} %",
            number(point["forgotten"]),
            number(point["recovered"]),
            _ratio(point["ratio"]),
        ]
        for t in document["tasks"]
        for point in t.get("along") or ()
    ]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _sampled(document: Mapping[str, Any]) -> list[Any]:
    """The old tasks that were scored while the next one was learnt."""
    return [t for t in document["tasks"] if t["first_steps"]]


def _counted(document: Mapping[str, Any]) -> str:
    """``of 3 old tasks 2 alignment lost, 1 kept``."""
    verdicts = [str(t["verdict"]) for t in document["tasks"]]
    counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys([*_VERDICTS, *verdicts]) if v in verdicts]
    return f"of {_plural(len(verdicts), 'old task')} {', '.join(counts)}"


def _verdicts_note(document: Mapping[str, Any]) -> str:
    met = {str(t["verdict"]) for t in document["tasks"]}
    note = "; ".join(f"{verdict}: {meaning}" for verdict, meaning in _VERDICTS.items() if verdict in met)
    return f"{note[:1].upper()}{note[1:]}."


def _draw_recovery(axes: Axes, tasks: Sequence[Mapping[str, Any]]) -> None:
    for i, (name, colour) in enumerate(_FOUR.items()):
        xs = [k + 0.2 * (i - 1.5) for k in range(len(tasks))]
        axes.bar(xs, [100 * t[name] for t in tasks], width=0.18, color=colour, label=name)
    axes.set_xticks(range(len(tasks)), [str(t["index"] + 1) for t in tasks])
    _score_axis(axes, Score())
    axes.set_ylim(0, 103)
    axes.set_xlabel("old task")
    axes.set_ylabel(Score().axis)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)


def _draw_angles(axes: Axes, updates: Mapping[str, Any]) -> None:
    """Rows: layers from the input on, then all of them; columns: a task and the next. White is orthogonal."""
    import numpy as np

    rows = [list(row) for row in zip(*updates["angles"], strict=True)] + [updates["whole"]["angles"]]
    values = np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float)
    height, width = values.shape
    axes.set_facecolor("#e6e6e6")
    axes.pcolormesh(
        np.arange(width + 1) - 0.5,
        np.arange(height + 1) - 0.5,
        np.ma.masked_invalid(values),
        vmin=0,
        vmax=180,
        cmap="PuOr",
        edgecolors="white",
        linewidth=0.8,
    )
    if width <= _NUMBERED_CELLS:
        for i, j in np.ndindex(height, width):
            text = "–" if math.isnan(values[i, j]) else f"{values[i, j]:.0f}"
            dark = abs(values[i, j] - 90) > 55
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="#ffffff" if dark else "#222222")
    axes.invert_yaxis()
    every = max(1, math.ceil(height / 40))
    names = [*updates["layers"], "all layers"]
    axes.set_yticks(range(0, height, every))
    # Paths of modules are the model's own words: escaped by the drawing, and never read as formulas.
    axes.set_yticklabels(names[::every], parse_math=False, fontsize=8)
    step = max(1, math.ceil(width / 10))
    axes.set_xticks(range(0, width, step), [f"{k + 1}→{k + 2}" for k in range(0, width, step)])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("tasks")


def _draw_first_steps(axes: Axes, tasks: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import NullLocator

    for i, t in enumerate(tasks):
        style = _style(i, False)
        back, points = t.get("along") or (), t["first_steps"]
        if back and t["memorised"]:  # of the same rows as what came back, which are not all of the test set
            points = [[0.0, t["original"]], *([point["share"], point["forgotten"]] for point in back)]
        xs, ys = ([100 * point[side] for point in points] for side in (0, 1))
        axes.plot(xs, ys, color=style.colour, linestyle=style.line, marker=style.marker, markersize=3.5, linewidth=1.3)
        xs, ys = ([100 * point[side] for point in back] for side in ("share", "recovered"))
        axes.plot(
            xs, ys, color=style.colour, linestyle=":", marker=style.marker, markersize=3.5, linewidth=1.1, mfc="none"
        )
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)  # what happens in the first per cents is the question
    axes.set_xlim(-0.05, 110)
    ticks = (0, 1, 3, 10, 30, 100)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _score_axis(axes, Score())
    axes.set_xlabel("training of the next task, %")
    axes.set_ylabel(Score().axis)


# -- pictures --------------------------------------------------------------------------------------------------------


def _draw(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Picture]]:
    """Every chart, by the section it stands in; a section without data gets an empty list."""
    charts: dict[str, list[Picture]] = {"average": [], "matrices": [], "tasks": [], "anytime": [], "cost": []}
    measured = [r for r in rows if _mean_matrix(r)]
    if not measured:
        return charts
    score = measured[0].score
    finals = _list([f"{r.label} {_in_words(r)}" for r in measured if r.accuracy])
    charts["average"].append(
        _picture(
            "average",
            f"Average {score.name} on all experiences learnt so far{', %' * score.percent}",
            f"Line chart. After the last experience: {finals}.",
            (6.6, 3.5),
            partial(_draw_average, rows=measured),
        )
    )
    for n, row in enumerate(measured, 1):
        matrix = _mean_matrix(row)
        size = 2.1 + 0.28 * min(len(matrix[0]), 5)
        last = ", ".join(score.whole(v) for v in matrix[-1])
        charts["matrices"].append(
            _picture(
                f"matrix-{n}",
                row.label,
                f"Heat map of {row.label}. Last row, {score.name} in {score.unit} per experience: {last}.",
                (size, size * 0.92),
                partial(_draw_matrix, initial=_mean_matrix(row, "initial"), matrix=matrix, score=score),
            )
        )
    for j in _chosen(len(names)):
        ends = [
            f"{r.label} {score.whole(_mean_matrix(r)[-1][j])}{' %' * score.percent}"
            for r in measured
            if j < len(_mean_matrix(r)[-1])
        ]
        charts["tasks"].append(
            _picture(
                f"task-{j + 1}",
                f"{j + 1}. {names[j]}",
                f"Line chart of the {score.name} on experience {j + 1}. At the end: {_list(ends)}.",
                (2.7, 1.9),
                partial(_draw_task, rows=measured, j=j),
            )
        )
    sampled = [r for r in measured if any(run.get("anytime") for run in r.done)]
    if sampled:
        charts["anytime"].append(
            _picture(
                "anytime",
                f"Average {score.name} on the experiences met so far, during training{', %' * score.percent}",
                f"Line chart over training steps of {_list([r.label for r in sampled])}.",
                (6.6, 3.3),
                partial(_draw_anytime, rows=sampled),
            )
        )
    for name, caption in (
        ("train_seconds", f"Average {score.name} against training time"),
        ("strategy_state_bytes", f"Average {score.name} against bytes of strategy state"),
    ):
        placed = [r for r in measured if r.accuracy and name in r.cost]
        if placed:
            told = _list([f"{r.label} {_in_words(r)} at {_cost(r, name)}" for r in placed])
            charts["cost"].append(
                _picture(
                    f"cost-{name.replace('_', '-')}",
                    caption,
                    f"Scatter chart: {told}.",
                    (4.2, 3.1),
                    partial(_draw_cost, rows=placed, name=name),
                )
            )
    return charts


def _picture(name: str, caption: str, alt: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> Picture:
    """Draw on fresh axes and keep the SVG twice: as a part of the page, and as a file.

    No text that users provide stands inside the drawing, but for paths of modules; captions and legends are the page's,
    which escapes them.
    """
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": f"cl-lab-{name}",
        "svg.fonttype": "none",
        "font.size": 10,
        "font.family": ["DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.labelcolor": "#333333",
        "xtick.color": "#888888",
        "ytick.color": "#888888",
        "xtick.labelcolor": "#333333",
        "ytick.labelcolor": "#333333",
        "axes.grid": False,
        "grid.color": "#e6e6e6",
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
    }
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        warnings.filterwarnings("ignore", "Matplotlib is currently using", UserWarning)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].strip()
    # On one page with others: ids of its own, no style that would reach beyond it, no declarations HTML does not need.
    inline = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    inline = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', inline)
    inline = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", inline)
    inline = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', inline)
    inline = re.sub(r'xlink:href="', 'href="', inline)
    inline = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", inline)
    inline = re.sub(
        r'(<svg)( width="[\d.]+pt")( height="[\d.]+pt")',
        rf'\1 role="img" aria-label="{html.escape(alt)}"',
        inline,
        count=1,
    )
    return Picture(name, caption, alt, inline, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def _band(
    axes: Axes, row: Row, xs: Sequence[float], samples: Sequence[Sequence[float]], *, small: bool = False
) -> None:
    """One strategy's mean curve over its runs (``samples[x]``: the values at one x), with its interval as a band."""
    from cl_lab.metrics import interval

    stats = [interval(values) for values in samples]
    colour = row.style.colour
    factor = row.score.factor
    means = [factor * s["mean"] for s in stats]
    every = max(1, len(xs) // 12)
    axes.plot(
        xs,
        means,
        color=colour,
        linestyle=row.style.line,
        marker=row.style.marker,
        markevery=every,
        markersize=3.5 if small else 5.5,
        linewidth=1.3 if small else 1.8,
        zorder=2 if row.reference else 3,
    )
    if any(len(values) > 1 for values in samples):
        low, high = ([factor * s["ci95"][side] for s in stats] for side in (0, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _score_axis(axes: Axes, score: Score, ticks: Sequence[float] = (0, 25, 50, 75, 100)) -> None:
    if score.percent:
        axes.set_ylim(-3, 103)
        axes.set_yticks(ticks)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _draw_average(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = 1
    for row in rows:
        matrices = _matrices(row)
        count = min(len(m) for m in matrices)
        longest = max(longest, count)
        samples = [[_seen(m, i) for m in matrices] for i in range(count)]
        _band(axes, row, list(range(1, count + 1)), samples)
    _score_axis(axes, rows[0].score)
    axes.set_xlim(0.8, longest + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("experiences learnt")
    axes.set_ylabel(rows[0].score.axis)


def _draw_matrix(
    axes: Axes, initial: Sequence[Sequence[float]], matrix: Sequence[Sequence[float]], score: Score
) -> None:
    """Rows: before training, then after each experience; columns: the experience tested on; a stair on the diagonal."""
    import numpy as np

    extra = len(initial)
    values = np.asarray([*initial, *matrix])
    height, width = values.shape
    finite = values[np.isfinite(values)]
    low, high = (0.0, 1.0) if score.percent or not finite.size else (float(finite.min()), float(finite.max()))
    many = max(height, width) > _VECTOR_CELLS
    axes.pcolormesh(
        np.arange(width + 1) - 0.5,
        np.arange(height + 1) - 0.5,
        np.ma.masked_invalid(values),
        vmin=low,
        vmax=high,
        cmap="Blues",
        edgecolors="none" if many else "white",
        linewidth=0 if many else 0.8,
        rasterized=many,
    )
    if width <= _NUMBERED_CELLS and height <= _NUMBERED_CELLS + 1:
        for i in range(height):
            for j in range(width):
                if math.isfinite(values[i, j]):
                    colour = "#ffffff" if values[i, j] > low + 0.55 * (high - low) else "#222222"
                    size = 9 if width <= 6 else 7
                    text = score.whole(values[i, j])
                    axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    stair = min(width, height - extra)
    xs = [x for k in range(stair) for x in (k - 0.5, k + 0.5)]
    ys = [y for k in range(stair) for y in (k + extra - 0.5,) * 2]
    axes.plot(xs, ys, color="#d55e00", linewidth=1.4, solid_capstyle="butt")
    axes.invert_yaxis()
    step = max(1, math.ceil(width / 10))
    axes.set_xticks(range(0, width, step), [str(j + 1) for j in range(0, width, step)])
    labels = (["–"] if extra else []) + [str(i + 1) for i in range(height - extra)]
    keep = sorted({*range(extra, height, step), *range(extra)})
    axes.set_yticks(keep, [labels[i] for i in keep])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("tested on")
    axes.set_ylabel("after learning")


def _draw_task(axes: Axes, rows: Sequence[Row], j: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for row in rows:
        matrices = [m for m in _matrices(row) if j < len(m[0])]
        if not matrices:
            continue
        count = min(len(m) for m in matrices)
        samples = [[m[i][j] for m in matrices] for i in range(count)]
        xs = list(range(1, count + 1))
        initial = [r[0][j] for r in _matrices(row, "initial") if j < len(r[0])]
        if len(initial) == len(matrices):
            xs, samples = [0, *xs], [initial, *samples]
        _band(axes, row, xs, samples, small=True)
    axes.axvline(j + 1, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    _score_axis(axes, rows[0].score, (0, 50, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _draw_anytime(axes: Axes, rows: Sequence[Row]) -> None:
    ends: set[float] = set()
    for row in rows:
        curves = [curve for run in row.done if (curve := _between(run))]
        # The k-th evaluation of an experience is the same one in every seed; how long experiences are may differ.
        places = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
        if not places:
            continue
        steps = [sum(c[p][0] for c in curves) / len(curves) for p in places]
        _band(axes, row, steps, [[c[p][1] for c in curves] for p in places], small=True)
        ends |= {x for x, (_, k) in zip(steps[:-1], places, strict=False) if k == math.inf}
    if len(ends) <= 50:
        for end in sorted(ends):
            axes.axvline(end, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    _score_axis(axes, rows[0].score)
    axes.set_xlabel("training steps")
    axes.set_ylabel(rows[0].score.axis)


def _between(run: Mapping[str, Any]) -> dict[tuple[int, float], tuple[int, float]]:
    """``(step, mean score on what was met)`` of a run's evaluations between steps, by experience and number in it.

    The scores after an experience come last in it, at infinity, where its last logged loss says its last step.
    """
    found: dict[tuple[int, float], tuple[int, float]] = {}

    def enter(place: tuple[int, float], step: int, scores: Sequence[Any]) -> None:
        values = [v for v in map(_number, scores[: place[0] + 1]) if v is not None]
        if values:
            found[place] = step, sum(values) / len(values)

    counts: dict[int, int] = {}
    for point in run.get("anytime") or []:
        current = int(point.get("experience", 0))
        counts[current] = counts.get(current, 0) + 1
        enter((current, counts[current]), int(point.get("step", 0)), point.get("accuracies") or [])
    ends = {int(p.get("experience", 0)): int(p.get("step", 0)) for p in run.get("losses") or []}
    for current, scores in enumerate(run.get("matrix") or []):
        if current in ends and counts:
            enter((current, math.inf), ends[current], scores)
    return found


def _draw_cost(axes: Axes, rows: Sequence[Row], name: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    positive = [r.cost[name].mean for r in rows if r.cost[name].mean > 0]
    top = max(positive, default=1.0)
    units = _BYTE_UNITS if name.endswith("bytes") else _TIME_UNITS
    unit, size = next((u for u in units if top >= u[1]), units[-1])
    for row in rows:
        assert row.accuracy is not None
        axes.errorbar(
            row.cost[name].mean / size,
            row.score.factor * row.accuracy.mean,
            yerr=None if row.accuracy.half is None else row.score.factor * row.accuracy.half,
            color=row.style.colour,
            marker=row.style.marker,
            markersize=8,
            capsize=3,
            elinewidth=1.2,
            linestyle="none",
            zorder=3,
        )
    if len(positive) > 1 and top / min(positive) > 30:
        axes.set_xscale("symlog", linthresh=min(positive) / size)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=-0.2 * min(positive) / size)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlim(-0.05 * top / size, 1.1 * top / size)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v >= 0 else ""))
    _score_axis(axes, rows[0].score)
    axes.set_xlabel(f"{'strategy state' if name.endswith('bytes') else 'training time'}, {unit}")
    axes.set_ylabel(rows[0].score.axis)


def _matrices(row: Row, part: str = "matrix") -> list[list[list[float]]]:
    """The matrices of the finished runs that are whole (``initial``: the row before training, as one row)."""
    found = []
    for run in row.done:
        matrix = run.get(part) or []
        if part == "initial":
            matrix = [matrix] if matrix else []
        if matrix and all(_number(v) is not None for r in matrix for v in r):
            found.append(matrix)
    return found


def _seen(matrix: Sequence[Sequence[float]], i: int) -> float:
    learnt = matrix[i][: i + 1]
    return sum(learnt) / len(learnt)


def _chosen(count: int) -> list[int]:
    """The experiences that get a panel: all, or evenly spaced ones with the first and the last among them."""
    if count <= _MOST_PANELS:
        return list(range(count))
    return sorted({round(k * (count - 1) / (_MOST_PANELS - 1)) for k in range(_MOST_PANELS)})


def _panels_note(names: Sequence[str]) -> str:
    if len(names) <= _MOST_PANELS:
        return ""
    return f"{len(_chosen(len(names)))} of the {len(names)} experiences are shown, evenly spaced."


# -- words and numbers -----------------------------------------------------------------------------------------------


def _in_words(row: Row) -> str:
    """``91.3 % ± 0.8``: a row's average score inside a sentence."""
    return row.score.words(row.accuracy)


def _told(row: Row) -> str:
    """``ewc (91.3 % ± 0.8)``: a row inside a sentence."""
    return f"{row.label} ({_in_words(row)})"


def _cost(row: Row, name: str) -> str:
    stat = row.cost.get(name)
    if stat is None:
        return "–"
    if name.endswith("_bytes"):
        return _bytes(stat.mean)
    if name == "samples_per_second" or name.endswith("parameters"):
        return f"{stat.mean:,.0f}".replace(",", "\u202f")
    return _seconds(stat.mean)


def _count(row: Row) -> str:
    return str(len(row.done)) if len(row.done) == len(row.runs) else f"{len(row.done)} of {len(row.runs)}"


def _bytes(value: float) -> str:
    """Human-readable bytes."""
    if value < 1024:
        return f"{value:.0f} B" if value else "0"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024 or unit == "GiB":
            break
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def _seconds(value: float) -> str:
    """Human-readable seconds."""
    if value < 100:
        return f"{value:.3g} s" if value < 1 else f"{value:.1f} s".replace(".0 s", " s")
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"


def _plural(count: int, word: str, words: str | None = None) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {words or word + 's'}"


def _list(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(items) if len(items) < 3 else f"{', '.join(items[:-1])} and {items[-1]}"


def _few(items: Iterable[str]) -> str:
    """``a, b and c``, or of more ``a, b and 7 more``."""
    items = list(items)
    return _list(items if len(items) <= 3 else [*items[:2], f"{len(items) - 2} more"])


def _markdown(value: Any) -> str:
    """Any value as Markdown that shows it literally: no HTML, no emphasis, no link, no cell border, on one line."""
    text = " ".join(html.escape(str(value), quote=False).split(" ")).replace("\r", "").replace("\n", " ")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _fenced(text: str) -> str:
    """``text`` as a code block that it cannot break out of."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
