"""Strategies × seeds on one stream: run them, bring them together, report."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cl_lab import environment, experiment
from cl_lab.config import RunConfig, StrategyConfig, label_of
from cl_lab.display import StepProgress, configure_logging
from cl_lab.errors import ConfigError, Interrupted, UserError
from cl_lab.files import run_folders, write_atomically

log = logging.getLogger("cl_lab")

COMPARISON_FILE = "comparison.json"


def compare(config: RunConfig, folder: Path, *, jobs: int = 1, resume: bool = False) -> dict[str, Any]:
    """Run ``config.strategies`` × ``config.seeds`` in ``folder``; returns the document of ``comparison.json``.

    Runs that failed are listed with their error and the others go on. With ``resume``, finished runs are kept and
    unfinished ones continued, also where a label has changed: of two strategies of one name each is called by its knobs,
    and the first was not while it was the only one. ``jobs`` runs go on at once, each with its share of the cores.
    """
    from cl_lab.reporting import write_report
    from cl_lab.results import assemble
    from cl_lab.tracking import Tracker

    strategies = config.strategies or ([config.strategy] if config.strategy else None)
    if not strategies:
        raise ConfigError(
            "strategies: missing; list what to compare, for example strategies: [naive, ewc, replay, joint]"
        )
    seeds = config.seeds if config.seeds is not None else [config.seed]
    labels = _labels(strategies)
    slugs = _slugs(labels)
    experiment.check_plugins(config, strategies)
    threads = environment.threads_for(jobs * config.engine.processes, config.engine.threads)
    crossed = [
        (_single(config, strategy, seed, threads), folder / "runs" / f"{slug}-seed{seed}", label)
        for seed in seeds  # all strategies of a seed one after the other: they share the stream in memory
        for strategy, label, slug in zip(strategies, labels, slugs, strict=True)
    ]
    moved = _moved(folder, crossed) if resume else {}
    if resume:  # or results of other settings, or of other data, would stand in the report under these
        _check_resumable([(settings, place) for settings, place, _ in crossed], moved)
    else:
        experiment.check_buildable(crossed[0][0], strategies)
    if jobs > 1:
        experiment.forget_streams()  # what was read for the checks; each worker reads its own
    with experiment.ready(folder, config, resume, comparison=True, threads=threads):
        tracker = Tracker.open(config.tracking.uri, config.tracking.experiment, name=folder.name)
        parent = tracker.start_run(folder, config=config.model_dump(mode="json", exclude={"out"}), fresh=not resume)
        for settings, place, label in crossed:
            if place in moved:
                _move(moved[place], place, settings, label)
        plan = [_Job(settings, place, label, parent, resume) for settings, place, label in crossed]
        documents = _run_all(plan, jobs)
        comparison = assemble(config.scenario.name, str(folder), labels, documents)
        try:
            write_atomically(folder / COMPARISON_FILE, json.dumps(comparison, indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write '{folder / COMPARISON_FILE}': {error.strerror}; every run is kept: make room, then --resume"
            ) from error
        write_report(comparison, folder)
        tracker.finish()
    return comparison


def _moved(folder: Path, crossed: Sequence[tuple[RunConfig, Path, str]]) -> dict[Path, Path]:
    """Where the runs lie that are called otherwise than they were: the place that each is to have, and that it has."""
    planned = {place for _, place, _ in crossed}
    others = [p for p in run_folders(folder) if p not in planned]
    found: dict[Path, Path] = {}
    for settings, place, _ in crossed:
        if others and not place.exists():
            there = next((p for p in others if experiment.is_run_of(p, settings)), None)
            if there is not None:
                found[place] = there
                others.remove(there)
    return found


def _move(there: Path, place: Path, settings: RunConfig, label: str) -> None:
    try:
        experiment.rename(there, place, settings, label)
    except OSError as error:
        raise UserError(f"cannot move '{there}' to '{place}': {error.strerror}; mend it, then --resume") from error
    log.info("%s is called '%s' now; it lies in %s", there, label, place)


def _check_resumable(runs: Sequence[tuple[RunConfig, Path]], moved: Mapping[Path, Path]) -> None:
    """Raise :class:`UserError` where one of ``runs`` cannot be gone on with, or stands on other data than there are now.

    Data are looked at only where something is left to run on them.
    """
    goes_on = [experiment.check_resumable(place, settings) for settings, place in runs]
    runs = [(settings, moved.get(place, place)) for settings, place in runs]
    finished = [(experiment.read_document(place) or {}).get("status") == "finished" for _, place in runs]
    if not all(finished):
        for (settings, place), here, done in zip(runs, goes_on, finished, strict=True):
            if here and done:
                experiment.check_data(place, settings)


class _Job:
    """One run of a comparison; travels to a worker process."""

    def __init__(self, config: RunConfig, folder: Path, label: str, parent: str | None, resume: bool) -> None:
        self.config, self.folder, self.label, self.parent, self.resume = config, folder, label, parent, resume

    def __call__(self, prefix: str) -> dict[str, Any]:
        progress = StepProgress(prefix)
        try:
            with progress:
                return experiment.run(
                    self.config,
                    self.folder,
                    resume=self.resume,
                    label=self.label,
                    observer=progress,
                    parent=self.parent,
                )
        except Exception as error:
            document = experiment.read_document(self.folder)
            if isinstance(error, Interrupted) or document is None:  # none: a mistake that no run could mend
                raise
            defect = not isinstance(error, UserError)  # of a plug-in, say: its author wants to see where
            log.warning("%s seed %d failed: %s", self.label, self.config.seed, error, exc_info=defect)
            return document


def _run_all(plan: list[_Job], jobs: int) -> list[dict[str, Any]]:
    prefixes = [f"[{i + 1}/{len(plan)}] {job.label} seed {job.config.seed}: " for i, job in enumerate(plan)]
    if jobs == 1:
        return [job(prefix) for job, prefix in zip(plan, prefixes, strict=True)]
    documents: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet_worker) as pool:
        waiting: dict[Future[dict[str, Any]], int] = {
            pool.submit(job, p): i for i, (job, p) in enumerate(zip(plan, prefixes, strict=True))
        }
        try:
            for future in as_completed(waiting):
                i = waiting[future]
                documents[i] = future.result()
                average = documents[i]["metrics"].get("average_accuracy")
                shown = "" if average is None else f", average {documents[i].get('score', 'accuracy')} {average:.4f}"
                log.info("%s%s%s", prefixes[i], documents[i]["status"], shown)
        except (UserError, Interrupted, KeyboardInterrupt):
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [documents[i] for i in range(len(plan))]


def _quiet_worker() -> None:
    configure_logging(logging.WARNING)


def _single(config: RunConfig, strategy: StrategyConfig, seed: int, threads: int) -> RunConfig:
    engine = config.engine.model_copy(update={"threads": threads})
    update = {"strategy": strategy, "strategies": None, "seed": seed, "seeds": None, "engine": engine, "out": None}
    return config.model_copy(update=update).settled()


def _labels(strategies: Sequence[StrategyConfig]) -> list[str]:
    labels = [label_of(s, strategies) for s in strategies]
    twice = next((name for name in labels if labels.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"strategies: '{twice}' stands twice; remove one, or tell them apart with label: …")
    return labels


def _slugs(labels: Sequence[str]) -> list[str]:
    """A folder's name for each label: letters and digits of any script stay."""
    slugs = [re.sub(r"[^\w.+=-]+", "-", label).strip("-") or "strategy" for label in labels]
    met: dict[str, str] = {}
    for label, slug in zip(labels, slugs, strict=True):
        other = met.setdefault(slug.casefold(), label)  # some file systems do not tell capitals apart
        if other != label:
            raise ConfigError(
                f"strategies: '{other}' and '{label}' would share the folder runs/{slug}-seed…; give one another label: …"
            )
    return slugs
