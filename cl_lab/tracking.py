"""Experiment tracking: the run folder on disk is the truth, and MLflow is fed from it.

A :class:`Tracker` sends what happens while it happens, and at the end all that the folder holds and MLflow lacks. When
MLflow cannot be reached the run goes on: one warning, ``"pushed": false`` in the folder's ``tracking.json``, and
:func:`push` sends the folder later. Sending is idempotent: a run that MLflow holds is continued, never duplicated, and
a point that it holds (a metric at a step) is not sent again. That is how a resumed run goes on under its old run id.
What sums up a run or a comparison (metrics, cost, means over seeds) can change with no new step: it is sent again where
MLflow's latest value is another.

This is the only module that imports mlflow, and only when a tracker starts: the import alone takes a second. It never
touches MLflow's global state (active run, tracking URI), so that threads and processes may each track their own run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cl_lab.errors import UserError
from cl_lab.files import run_folders, write_atomically

log = logging.getLogger("cl_lab")

STATUSES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "running": "RUNNING"}
"""The status of a run on disk, and what MLflow calls it."""

_ERROR = "cl_lab.error"
_PROBE_SECONDS = 3.0
_LOCKED_SECONDS = 60.0  # how long to wait for other processes that write to the same sqlite file
_FLUSH_POINTS = 500
_FLUSH_SECONDS = 5.0
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_KEY_LENGTH = 250
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_QUIET = {
    # MLflow prints a link to stdout when a run ends, where `--json` promises one document and nothing else.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
    # A server that dies in the middle of a run costs seconds, not MLflow's default of many minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def resolve(uri: str | None) -> str | None:
    """``uri`` with local paths made absolute, so that it means the same from every folder; ``None`` for no tracking."""
    if uri is None or uri.strip().lower() in ("", "none", "null"):
        return None
    uri = uri.strip()
    if uri.startswith("sqlite:///") and ":memory:" not in uri:
        path, question, query = uri.removeprefix("sqlite:///").partition("?")
        return f"sqlite:///{Path(path).expanduser().absolute()}{question}{query}"
    if (not urlsplit(uri).scheme and uri not in ("databricks", "databricks-uc")) or (
        os.name == "nt" and Path(uri).is_absolute()
    ):
        return Path(uri).expanduser().absolute().as_uri()
    return uri


class Tracker:
    """One MLflow run, fed live and from a run folder; never raises on MLflow's account once it is open.

    ``Tracker.open(uri, experiment, …)`` decides where to; :meth:`start_run` begins or continues the run of a folder;
    ``log_*`` send while training; :meth:`finish` sends what is still missing and closes the run. With no ``uri`` every
    method does nothing. Methods may be called from several threads.
    """

    def __init__(
        self, uri: str | None, experiment: str, parent: str | None, name: str, tags: Mapping[str, object] | None
    ) -> None:
        self.uri = resolve(uri)
        self.experiment = experiment
        self.parent = parent
        self.name = name
        self.run_id: str | None = None
        """MLflow's id of this run; ``None`` where MLflow was never reached."""
        self.error: str | None = None
        """Why MLflow cannot be reached; ``None`` as long as it can."""
        self._tags = {k: str(v) for k, v in (tags or {}).items()}
        self._folder: Path | None = None
        self._client: Any = None
        self._seen: dict[str, dict[int, tuple[int, float]]] = {}  # by metric and step: time and value
        self._continued = False
        self._sent: str | None = None  # the stamp of what was sent last
        self._quiet = False
        self._points: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        uri: str | None,
        experiment: str,
        *,
        parent: str | None = None,
        name: str = "",
        tags: Mapping[str, object] | None = None,
    ) -> Tracker:
        """A tracker that will write to ``uri`` (``None``, ``""`` and ``"none"``: tracking is off). Touches no network.

        ``parent`` is the run id under which this run appears as a child; ``name`` is shown in MLflow's list of runs.
        """
        return cls(uri, experiment, parent, name, tags)

    @property
    def enabled(self) -> bool:
        """Whether tracking is on and MLflow has answered so far."""
        return self.uri is not None and self.error is None

    def start_run(
        self, folder: Path, *, config: Mapping[str, Any] | None = None, resumed: int = 0, fresh: bool = False
    ) -> str | None:
        """Begin the run of ``folder``, or continue the one its ``tracking.json`` names; returns MLflow's run id.

        ``config`` is logged as parameters. ``fresh`` begins a new run even if the folder has one. ``None`` comes back
        where tracking is off or MLflow cannot be reached; then nothing else happens and the run goes on.
        """
        with self._lock:
            self._folder = Path(folder)
            if self.uri is None:
                return None
            self._tags |= {"cl_lab.path": str(self._folder.absolute()), "cl_lab.resumed": str(resumed)}
            self._attempt(lambda: self._begin(fresh))
            self._note(pushed=False)
            if config is not None:
                self.log_params(config)
            return self.run_id

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log a nested configuration as flat parameters (``training.lr``); what is logged already stays as it is."""
        with self._lock:
            self._attempt(lambda: self._send_params(config))

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Log values at a step; they are sent in batches, at the latest with :meth:`flush` or :meth:`finish`."""
        with self._lock:
            if self.run_id is None or not self.enabled:
                return
            now = _milliseconds()
            self._points += [(k, float(v), step, now) for k, v in metrics.items() if v is not None]
            late = time.monotonic() - self._flushed > _FLUSH_SECONDS
            if len(self._points) >= _FLUSH_POINTS or late:
                self.flush()

    def log_row(self, experience: int, row: Sequence[float | None], score: str = "accuracy") -> None:
        """Log one row of the score matrix: ``<score>/exp_<j>`` at step ``experience`` (counted from 0)."""
        key = _score_key(score)
        self.log_metrics({f"{key}/exp_{j}": value for j, value in enumerate(row)}, step=experience)
        self.flush()

    def log_drift(self, results: Mapping[str, Any]) -> None:
        """Log what the drift probes found, at the number of experiences learnt: ``drift/perplexity``, ``drift/general`` …"""
        self.log_metrics(drift_numbers(results), step=results["learnt"])

    def log_asides(self, found: Mapping[str, Any]) -> None:
        """Log what the stream's asides were worth, at the number of experiences learnt: ``aside/<name>``."""
        self.log_metrics(aside_numbers(found), step=found["learnt"])

    def flush(self) -> None:
        """Send what is waiting."""
        with self._lock:
            points, self._points = self._points, []
            self._flushed = time.monotonic()
            self._attempt(lambda: self._send_points(points))

    def finish(self, status: str | None = None) -> None:
        """Send everything that the folder holds and MLflow lacks, then close the run; writes ``tracking.json``.

        ``status`` is one of :data:`STATUSES` and by default what the folder says. A server that was away and is back
        gets the whole run.
        """
        with self._lock:
            if self.uri is None or self._folder is None:
                return
            away, self.error = self.error, None
            self._quiet |= away is not None
            if self._attempt(lambda: self._complete(status)):
                self._note(pushed=True)
            else:
                self.error = away or self.error
                self._note(pushed=False)

    # -- what goes over the wire; each may raise anything ------------------------------------------------------------

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do ``action`` unless MLflow is off or away; its first failure is one warning and the last thing tried."""
        if not self.enabled:
            return False
        try:
            action()
        # MLflow's clients raise their own errors, those of requests, SQLAlchemy and every artifact store, and bare
        # Exceptions; none of them may cost a training run.
        except Exception as error:  # noqa: BLE001
            self.error = _one_line(error)
            self._points.clear()
            if not self._quiet:
                log.warning(
                    "MLflow at %s: %s. The run goes on and is kept in %s; send it later with: cl-lab push %s",
                    without_password(self.uri or ""),
                    self.error,
                    self._folder,
                    self._folder,
                )
            return False
        return True

    def _begin(self, fresh: bool) -> None:
        """Connect, then continue the folder's run or create one."""
        assert self.uri is not None
        assert self._folder is not None
        if self._client is None:
            self._client = _connect(self.uri)
        client, known = self._client, read_note(self._folder)
        if not fresh and known.get("uri") == without_password(self.uri) and known.get("run_id"):
            run = _run_or_none(client, known["run_id"])
            if run is not None and run.info.lifecycle_stage == "active":
                self.run_id, self._continued, self._seen = known["run_id"], True, {}
                client.update_run(self.run_id, status="RUNNING")
                self._send_tags(self._tags)
                return
        doc = _read_json(self._folder / "run.json")
        tags = {"mlflow.source.name": "cl-lab", "mlflow.user": _user(), **self._tags}
        if self.parent:
            tags["mlflow.parentRunId"] = self.parent
        run = client.create_run(
            _experiment_id(client, self.uri, self.experiment),
            start_time=_milliseconds(doc.get("started")),
            run_name=self.name or self._folder.name,
            tags={k[:_KEY_LENGTH]: v[:5000] for k, v in tags.items()},
        )
        self.run_id, self._continued, self._seen = run.info.run_id, False, {}

    def _send_params(self, config: Mapping[str, Any]) -> None:
        if self.run_id is None:
            return
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        logged = self._client.get_run(self.run_id).data.params
        flat = {_key(k): v for k, v in flatten(config)}
        params = [Param(k, _cut(v, MAX_PARAM_VAL_LENGTH)) for k, v in flat.items() if k not in logged]
        for part in _chunks(params, _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=part)

    def _send_points(self, points: Sequence[tuple[str, float, int, int]], *, latest: bool = False) -> None:
        """Send metric points ``(key, value, step, time)``, leaving out those that MLflow holds.

        With ``latest`` each becomes the value that MLflow shows, whatever it holds at that step or a later one.
        """
        if not points or self.run_id is None:
            return
        from mlflow.entities import Metric

        fresh = []
        for key, value, step, when in points:
            key = _key(key)
            if key not in self._seen:
                history = self._client.get_metric_history(self.run_id, key) if self._continued else []
                history = sorted(history, key=lambda m: (m.timestamp, m.value))
                self._seen[key] = {m.step: (m.timestamp, m.value) for m in history}
            seen = self._seen[key]
            if latest:
                step = max([step, *seen])
            if step in seen:
                then, known = seen[step]
                if not latest or value == known:
                    continue
                when = max(when, then + 1)  # of several values at a step MLflow shows that of the latest time
            seen[step] = (when, value)
            fresh.append(Metric(key, value, when, step))
        try:
            for part in _chunks(fresh, _METRICS_PER_BATCH):
                self._client.log_batch(self.run_id, metrics=part)
        except BaseException:
            self._seen, self._continued = {}, True  # what arrived is unknown: ask again before sending again
            raise

    def _send_tags(self, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(_key(k), _cut(str(v), 5000)) for k, v in tags.items()]
        for part in _chunks(rows, _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=part)

    def _complete(self, status: str | None) -> None:
        """Bring MLflow level with the folder: parameters, points, tags, status, artifacts."""
        assert self._folder is not None
        assert self.uri is not None
        if self._client is None or self.run_id is None:
            self._begin(fresh=False)
        points, self._points = self._points, []
        self._send_points(points)
        folder = self._folder
        self._sent = _stamp(folder)  # before reading: what is written meanwhile must count as not sent
        run, comparison = _read_json(folder / "run.json"), _read_json(folder / "comparison.json")
        environment = _read_json(folder / "environment.json")
        self._send_params(_read_config(folder / "config.yaml"))
        if run:
            self._send_points(list(_points_of_run(run)))
            self._send_points(list(_summary_of_run(run)), latest=True)
        elif comparison:
            self._send_points(list(_summary_of_comparison(comparison)), latest=True)
        self._send_tags(_tags_of(run or comparison, environment))
        if self._continued and not run.get("error") and _ERROR in self._client.get_run(self.run_id).data.tags:
            self._client.delete_tag(self.run_id, _ERROR)  # of an earlier attempt
        if run.get("fingerprint"):
            self._send_dataset(str(run.get("scenario", "stream")), str(run["fingerprint"]))
        state = status or run.get("status") or ("finished" if comparison else "running")
        end = None if state == "running" else _milliseconds(run.get("finished"))
        self._client.set_terminated(self.run_id, STATUSES.get(state, "FAILED"), end)
        self._send_artifacts(folder, run)

    def _send_dataset(self, name: str, fingerprint: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE

        digest = fingerprint[:MAX_DATASET_DIGEST_SIZE]
        inputs = self._client.get_run(self.run_id).inputs.dataset_inputs
        if all(i.dataset.digest != digest for i in inputs):
            source = json.dumps({"scenario": name, "sha256": fingerprint})
            dataset = Dataset(name=name[:500] or "stream", digest=digest, source_type="local", source=source)
            tags = [InputTag("mlflow.data.context", "evaluation")]
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def _send_artifacts(self, folder: Path, run: Mapping[str, Any]) -> None:
        for name in ("config.yaml", "environment.json", "run.json", "comparison.json", "report.html", "report.md"):
            if (folder / name).is_file():
                self._client.log_artifact(self.run_id, str(folder / name))
        if (folder / "report_files").is_dir():
            self._client.log_artifacts(self.run_id, str(folder / "report_files"), "report_files")
        if run.get("matrix"):
            matrix = {"initial": run.get("initial"), "matrix": run["matrix"]}
            self._client.log_dict(self.run_id, matrix, "matrix.json")
            title = f"{run.get('strategy', '')} on {run.get('scenario', '')}, seed {run.get('seed', '')}"
            self._client.log_figure(self.run_id, _picture(run["matrix"], title, _score_of(run)), "matrix.png")

    def _note(self, *, pushed: bool) -> None:
        """Write ``tracking.json``, the folder's memory of where it was sent."""
        assert self._folder is not None
        note = {
            "uri": without_password(self.uri or ""),
            "experiment": self.experiment,
            "run_id": self.run_id,
            "parent_run_id": self.parent,
            "pushed": pushed,
            "sent": self._sent if pushed else None,
            "error": self.error,
        }
        known = read_note(self._folder)
        if self.run_id is None and known.get("run_id") and known.get("uri") == note["uri"]:
            note["run_id"], note["parent_run_id"] = known["run_id"], known.get("parent_run_id")
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / "tracking.json", json.dumps(note, indent=2))


def push(folder: Path, uri: str | None, *, experiment: str | None = None, force: bool = False) -> list[str]:
    """Send an earlier run, or a comparison with all its runs, to ``uri``; returns the ids of the MLflow runs it sent.

    What was sent to ``uri`` before is left alone, so calling twice gives an empty list; a run that was sent in part, or
    went on since, is completed; ``force`` sends everything again, as new runs. ``experiment`` is by default the one the
    folder remembers. Raises :class:`UserError` where the folder holds no run, tracking is off, or MLflow cannot be reached.
    """
    folder = Path(folder)
    target = resolve(uri)
    if target is None:
        raise UserError(f"tracking uri '{uri}' means no tracking; give one, for example sqlite:///mlruns.db")
    if (folder / "comparison.json").is_file():
        children = [p for p in run_folders(folder) if (p / "run.json").is_file()]
    elif (folder / "run.json").is_file():
        children = []
    else:
        raise UserError(f"'{folder}' holds neither run.json nor comparison.json; give a run's or a comparison's folder")
    sent: list[str] = []
    parent = _push_one(folder, target, None, experiment, force, sent)
    for child in children:
        _push_one(child, target, parent, experiment, force, sent)
    return sent


def _push_one(
    folder: Path, uri: str, parent: str | None, experiment: str | None, force: bool, sent: list[str]
) -> str | None:
    """Send one folder unless it is there as it is now; appends to ``sent`` and returns its run id."""
    note = read_note(folder)
    here = note.get("uri") == without_password(uri)
    # Notes of older versions have no stamp: whether such a run went on is unknown, and sending it again harmless.
    if here and note.get("pushed") and note.get("sent") == _stamp(folder) and not force:
        return str(note["run_id"])
    if parent is None and here:
        parent = note.get("parent_run_id")
    settings = _read_config(folder / "config.yaml").get("tracking") or {}
    doc = _read_json(folder / "run.json") or _read_json(folder / "comparison.json")
    if not doc:
        raise UserError(f"'{folder}': run.json or comparison.json is not valid JSON; it cannot be sent")
    tracker = Tracker.open(
        uri,
        experiment or note.get("experiment") or settings.get("experiment") or "cl-lab",
        parent=parent,
        name=folder.name,
    )
    tracker._quiet = True  # the same message follows as an error
    tracker.start_run(folder, resumed=int(doc.get("resumed") or 0), fresh=force)
    tracker.finish()
    if tracker.error is not None or tracker.run_id is None:
        raise UserError(
            f"MLflow at {without_password(uri)}: {tracker.error}; nothing is lost, '{folder}' can be pushed again"
        )
    sent.append(tracker.run_id)
    return tracker.run_id


_SERVABLE = ("sqlite", "postgresql", "mysql", "mssql", "file")


def serve_ui(uri: str | None, port: int = 5000, host: str = "127.0.0.1") -> int:
    """Run MLflow's own page on ``uri`` until Ctrl-C; returns its exit code.

    Raises :class:`UserError` where there is nothing to serve, or where ``uri`` is a server that has a page already.
    """
    target = resolve(uri)
    if target is None:
        raise UserError("tracking is off (tracking.uri is null); give --uri, for example sqlite:///mlruns.db")
    if target.startswith(("http://", "https://")):
        raise UserError(f"{target} is a tracking server with its own page; open it in a browser")
    if (scheme := urlsplit(target).scheme.partition("+")[0]) not in _SERVABLE:
        raise UserError(f"--uri '{uri}': MLflow cannot show a '{scheme}' store; give one of {', '.join(_SERVABLE)}")
    root = _artifact_root(target)
    if target.startswith("sqlite:///") and not Path(_sqlite_path(target)).is_file():
        raise UserError(f"'{_sqlite_path(target)}' does not exist; run something first, or give --uri")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", target, "--host", host, "--port", str(port)]
    command += ["--workers", "1", "--uvicorn-opts=--log-level=warning"]  # not a line per request
    if root is not None:
        command += ["--default-artifact-root", root]
    environment = {**_QUIET, **os.environ}
    log.info("MLflow shows %s at http://%s:%s (stop with Ctrl-C)", without_password(target), host, port)
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            return 0


def read_note(folder: Path) -> dict[str, Any]:
    """What ``tracking.json`` in ``folder`` says; empty where there is none."""
    return _read_json(Path(folder) / "tracking.json")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and printed values of a nested configuration; lists of plain values stay one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{prefix}.{i}" if prefix else str(i))
    else:
        yield prefix, without_password(value if isinstance(value, str) else json.dumps(value, default=str))


def drift_numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """What the drift probes found, as MLflow's numbers: the perplexity, the share of each topic, and their mean."""
    general: Mapping[str, float] = results["general"]
    return {
        "drift/perplexity": results["perplexity"],
        "drift/general": sum(general.values()) / len(general),
        **{f"drift/general_{topic}": share for topic, share in general.items()},
    }


def aside_numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """What a stream's asides were worth, as MLflow's numbers."""
    return {f"aside/{name}": value for name, value in found["scores"].items()}


# -- what a folder says, as MLflow's points and tags -----------------------------------------------------------------


def _score_of(run: Mapping[str, Any]) -> str:
    """What the run's matrix holds."""
    return str(run.get("score") or "accuracy")


def _score_key(score: str) -> str:
    return score.replace(" ", "_")


def _points_of_run(run: Mapping[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """The points of a run document that belong to one step for good: matrix, losses, anytime curve and the like."""
    when = _milliseconds(run.get("finished"))
    rows: list[tuple[str, Any, int]] = []
    key = _score_key(_score_of(run))
    rows += [(f"initial_{key}/exp_{j}", v, 0) for j, v in enumerate(run.get("initial") or [])]
    for i, row in enumerate(run.get("matrix") or []):
        rows += [(f"{key}/exp_{j}", v, i) for j, v in enumerate(row)]
    for i, measures in enumerate(run.get("measures") or []):
        rows += [(name, v, i) for name, v in measures.items()]
    for i, drift in enumerate(run.get("drift") or []):  # older runs do not say when: the first is that before training
        rows += [(name, v, drift.get("learnt", i)) for name, v in drift_numbers(drift).items()]
    for asides in run.get("asides") or []:
        rows += [(name, v, asides["learnt"]) for name, v in aside_numbers(asides).items()]
    for point in run.get("losses") or []:
        rows.append(("loss", point.get("loss"), point.get("step", 0)))
    for point in run.get("anytime") or []:
        rows += [(f"anytime/exp_{j}", v, point.get("step", 0)) for j, v in enumerate(point.get("accuracies") or [])]
    for key, value, step in rows:
        if _is_number(value):
            yield key, float(value), int(step), when


def _summary_of_run(run: Mapping[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """Metrics and cost of a run document, at its last row."""
    when = _milliseconds(run.get("finished"))
    last = max(len(run.get("matrix") or []) - 1, 0)
    for group, prefix in (("metrics", ""), ("cost", "cost/")):
        for name, value in (run.get(group) or {}).items():
            if _is_number(value):
                yield f"{prefix}{name}", float(value), last, when


def _summary_of_comparison(comparison: Mapping[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """The means over seeds, as ``<metric>/<strategy>``: MLflow's chart of the parent run then compares strategies."""
    when = _milliseconds()
    for row in comparison.get("rows") or []:
        for group, prefix in (("metrics", ""), ("cost", "cost/")):
            for name, value in (row.get(group) or {}).items():
                mean: Any = value.get("mean") if isinstance(value, Mapping) else value
                if _is_number(mean):
                    yield f"{prefix}{name}/{row.get('strategy')}", float(mean), 0, when


def _tags_of(doc: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, object]:
    names = ("scenario", "strategy", "label", "seed", "reference", "fingerprint", "error", "status", "resumed")
    tags = {f"cl_lab.{name}": doc[name] for name in names if doc.get(name) is not None}
    if environment.get("git_commit"):
        tags["mlflow.source.git.commit"] = environment["git_commit"]
    if "rows" in doc:
        runs = [run for row in doc["rows"] for run in row.get("runs") or []]
        tags["cl_lab.runs"] = len(runs)
        tags["cl_lab.unfinished"] = sum(run.get("status") != "finished" for run in runs)
    return tags


def _picture(matrix: Sequence[Sequence[float | None]], title: str, score: str) -> Any:
    """The score matrix as a matplotlib figure: accuracies in per cent, other scores as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    percent = score == "accuracy"
    rows = [[math.nan if v is None else 100 * v if percent else v for v in row] for row in matrix]
    known = [v for row in rows for v in row if math.isfinite(v)] or [0.0]
    low, high = (0.0, 100.0) if percent else (min(known), max(known))
    width = max(len(row) for row in rows)
    figure = Figure(figsize=(min(1.8 + 0.5 * width, 9), min(1.4 + 0.5 * len(rows), 9)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=low, vmax=high, cmap="Blues", aspect="auto")
    if width <= 10:
        for i, row in enumerate(rows):
            for j, v in enumerate(row):
                if math.isfinite(v):
                    colour = "white" if v > low + 0.55 * (high - low) else "black"
                    axes.text(j, i, f"{v:.0f}" if percent else f"{v:.2g}", ha="center", va="center", color=colour)
    axes.set_xlabel("tested on experience")
    axes.set_ylabel("after experience")
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    figure.colorbar(image, ax=axes, label="accuracy, %" if percent else score)
    return figure


# -- MLflow's end ----------------------------------------------------------------------------------------------------

_connecting = threading.Lock()


def _connect(uri: str) -> Any:
    """A client of the store at ``uri``; raises quickly where it cannot be reached."""
    _probe(uri)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _connecting, _alone(uri), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between MLflow and its own dependencies: nothing we can change
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        return _Patient(_patiently(MlflowClient, tracking_uri=uri))


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keep other processes out while a sqlite store is opened: two that create its tables at once break each other.

    The lock is on the store's folder, so that no file is left behind; where folders cannot be locked there is none.
    """
    if not uri.startswith("sqlite:///") or ":memory:" in uri:
        yield
        return
    handle = -1
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        handle = os.open(Path(_sqlite_path(uri)).parent, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _probe(uri: str) -> None:
    """Raise :class:`OSError` within seconds where nothing answers at ``uri``; MLflow itself would try for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()  # it answered; what it thinks of the request is for MLflow to say
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # certificates are MLflow's settings
                raise OSError(f"no answer ({error.reason})") from None
    elif parts.scheme == "sqlite" and ":memory:" not in uri:
        import sqlite3

        path = Path(_sqlite_path(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=_PROBE_SECONDS)) as database:
            database.execute("PRAGMA schema_version")
    elif parts.hostname and (port := parts.port or _PORTS.get(parts.scheme.partition("+")[0])):
        socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()


def _experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of the experiment, created where it is missing, with its artifacts beside a local store."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # Without its kind, MLflow 3 opens an experiment on a page about traces of language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=_artifact_root(uri), tags=kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found.lifecycle_stage != "active":
        raise OSError(f"experiment '{name}' was deleted; restore it, or set tracking.experiment to another name")
    return str(found.experiment_id)


def _artifact_root(uri: str) -> str | None:
    """Where a local sqlite store keeps files: ``mlartifacts`` beside it; other stores know their own place."""
    if uri.startswith("sqlite:///") and ":memory:" not in uri:
        return (Path(_sqlite_path(uri)).parent / "mlartifacts").as_uri()
    return None


def _sqlite_path(uri: str) -> str:
    return uri.removeprefix("sqlite:///").partition("?")[0]


def _run_or_none(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


class _Patient:
    """MLflow's client, each call of which waits for other processes that write to the same sqlite file."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return functools.partial(_patiently, getattr(self._client, name))


def _patiently(action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``action``, again while another process holds sqlite's lock (a call that met the lock changed nothing)."""
    deadline = time.monotonic() + _LOCKED_SECONDS
    pause = 0.05
    while True:
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if "database is locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


# -- small things ----------------------------------------------------------------------------------------------------


def without_password(text: str) -> str:
    """``text`` with the password in every ``scheme://user:password@host`` blotted out, fit to be kept and shown."""
    return re.sub(r"(://[^\s:/@]*):[^\s/@]*@", r"\1:***@", text)


def _stamp(folder: Path) -> str | None:
    """The SHA-256 of the folder's document, which is written anew whenever its run goes on; ``None`` without one."""
    for name in ("run.json", "comparison.json"):
        with contextlib.suppress(OSError):
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _key(name: str) -> str:
    """A name that MLflow takes for a parameter, metric or tag."""
    return re.sub(r"[^\w.\- /]", "_", name)[:_KEY_LENGTH].strip("/ ") or "_"


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 1] + "…"


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _milliseconds(moment: str | None = None) -> int:
    """An ISO time (now, where there is none) as MLflow counts time."""
    try:
        seconds = datetime.fromisoformat(moment).timestamp() if moment else time.time()
    except ValueError:
        seconds = time.time()
    return int(seconds * 1000)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return _cut(without_password(text), 200)
