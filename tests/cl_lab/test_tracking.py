"""Tracking: what MLflow holds afterwards, and that nothing MLflow does can stop a run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cl_lab import tracking
from cl_lab.errors import UserError
from cl_lab.tracking import Tracker, flatten, push, read_note, resolve, serve_ui, without_password

T = 3
UNREACHABLE = "http://127.0.0.1:9"
CONFIG = {
    "scenario": {"name": "split-digits", "experiences": T},
    "training": {"lr": 0.05, "betas": [0.9, 0.999]},
    "strategies": [{"name": "ewc", "strength": 100.0}],
    "note": "x" * 10_000,
    "tracking": {"uri": "postgresql://me:secret@host/db"},
}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for all tests (its creation takes seconds); each test uses an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlruns.db'}"


def client(uri: str) -> Any:
    return tracking._connect(uri)


def runs_of(uri: str, experiment: str) -> list[Any]:
    c = client(uri)
    found = c.get_experiment_by_name(experiment)
    return [] if found is None else list(c.search_runs([found.experiment_id]))


def artifacts_of(uri: str, run_id: str) -> set[str]:
    return {a.path for a in client(uri).list_artifacts(run_id)}


def save_run(
    folder: Path, *, status: str = "finished", label: str = "ewc", seed: int = 0, **more: Any
) -> dict[str, Any]:
    """A run folder as the runner leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "scenario": "split-digits",
        "strategy": "ewc",
        "label": label,
        "seed": seed,
        "status": status,
        "resumed": 0,
        "reference": False,
        "initial": [0.1] * T,
        "matrix": [[0.9, 0.0, 0.0], [0.5, 0.9, 0.0], [0.3, 0.6, 0.9]][: T if status == "finished" else 1],
        "asides": [{"learnt": 0, "scores": {"generality": 0.1}}, {"learnt": T, "scores": {"generality": 0.7}}][
            : 2 if status == "finished" else 1
        ],
        "metrics": {"average_accuracy": 0.6, "fwt": None},
        "cost": {"train_seconds": 1.5, "strategy_state_bytes": 4096},
        "run_id": "local",
        "path": str(folder),
        "experiences": [],
        "anytime": [{"step": 5, "experience": 0, "accuracies": [0.4, 0.0, 0.0]}],
        "losses": [{"step": s, "experience": 0, "epoch": 0, "loss": 2.0 - s / 1000} for s in range(1200)],
        "fingerprint": "ab" * 32,
        "error": "loss is nan; lower training.lr" if status == "failed" else None,
        "started": "2025-11-20T10:00:00+00:00",
        "finished": "2025-11-20T10:01:00+00:00",
        **more,
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text("scenario: {name: split-digits}\ntracking: {experiment: from-config}\n")
    (folder / "environment.json").write_text(json.dumps({"packages": {}, "git_commit": "abc123"}))
    return run


def send_run(folder: Path, uri: str, experiment: str, *, status: str) -> str:
    """A run that began, ended with ``status`` and is with MLflow: its id there."""
    tracker = Tracker.open(uri, experiment)
    run_id = tracker.start_run(folder)
    assert run_id is not None
    save_run(folder, status=status)
    tracker.finish()
    return run_id


def save_comparison(folder: Path, *, mean: float = 0.6) -> None:
    runs = [save_run(folder / "runs" / f"ewc-seed{s}", seed=s, status="failed" if s else "finished") for s in range(2)]
    row = {"strategy": "ewc (λ)", "seeds": [0, 1], "runs": runs, "reference": False}
    row["metrics"] = {"average_accuracy": {"mean": mean, "std": 0.0, "ci95": [mean, mean]}}
    row["cost"] = {"train_seconds": {"mean": 1.5}}
    (folder / "comparison.json").write_text(
        json.dumps({"scenario": "split-digits", "path": str(folder), "rows": [row]})
    )
    (folder / "config.yaml").write_text("seeds: [0, 1]\n")
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "report_files").mkdir(exist_ok=True)
    (folder / "report_files" / "average.svg").write_text("<svg/>")


@pytest.mark.slow
def test_a_run_is_all_there(store: str, tmp_path: Path) -> None:
    tracker = Tracker.open(store, "all-there", name="ewc-seed0", tags={"cl_lab.seed": 0})
    run_id = tracker.start_run(tmp_path, config=CONFIG)
    assert run_id
    assert tracker.enabled
    assert read_note(tmp_path)["pushed"] is False
    assert client(store).get_run(run_id).info.status == "RUNNING"
    for step in range(600):
        tracker.log_metrics({"loss": 2.0 - step / 1000}, step)
    tracker.log_asides({"learnt": 0, "scores": {"generality": 0.1}})
    tracker.log_row(0, [0.9, 0.0, None])
    tracker.log_row(1, [0.5, 0.9, 0.0])
    save_run(tmp_path)
    tracker.finish()

    run = client(store).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "ewc-seed0"
    assert run.info.end_time == 1763632860000
    params = run.data.params
    assert params["training.lr"] == "0.05"
    assert params["training.betas"] == "[0.9, 0.999]"
    assert params["strategies.0.strength"] == "100.0"
    assert len(params["note"]) == 6000
    assert "secret" not in params["tracking.uri"]
    assert run.data.metrics["average_accuracy"] == 0.6
    assert run.data.metrics["cost/strategy_state_bytes"] == 4096
    assert "fwt" not in run.data.metrics

    def history(key: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client(store).get_metric_history(run_id, key))

    assert history("accuracy/exp_0") == [(0, 0.9), (1, 0.5), (2, 0.3)]
    assert history("initial_accuracy/exp_2") == [(0, 0.1)]
    assert history("anytime/exp_0") == [(5, 0.4)]
    assert history("aside/generality") == [(0, 0.1), (3, 0.7)], "by the experiences learnt"
    losses = history("loss")
    assert [step for step, _ in losses] == list(range(1200)), "each step once, live ones and those from the folder"
    tags = run.data.tags
    assert tags["mlflow.source.git.commit"] == "abc123"
    assert tags["cl_lab.path"] == str(tmp_path)
    assert tags["cl_lab.fingerprint"] == "ab" * 32
    assert tags["cl_lab.resumed"] == "0"
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["split-digits"]
    expected = {"config.yaml", "environment.json", "run.json", "matrix.json", "matrix.png"}
    assert artifacts_of(store, run_id) == expected
    here = Path(client(store).download_artifacts(run_id, "matrix.json"))
    assert json.loads(here.read_text())["matrix"][2] == [0.3, 0.6, 0.9]
    assert run.info.artifact_uri.startswith((Path(store.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri())
    note = read_note(tmp_path)
    assert note == {
        "uri": store,
        "experiment": "all-there",
        "run_id": run_id,
        "parent_run_id": None,
        "pushed": True,
        "sent": hashlib.sha256((tmp_path / "run.json").read_bytes()).hexdigest(),
        "error": None,
    }


@pytest.mark.slow
def test_a_resumed_run_goes_on_under_its_id(store: str, tmp_path: Path) -> None:
    first = Tracker.open(store, "resumed", name="r")
    run_id = first.start_run(tmp_path, config={"lr": 1})
    first.log_metrics({"loss": 1.0}, 0)
    first.log_metrics({"loss": 0.9}, 1)
    first.log_row(0, [0.9, 0.0, 0.0])
    del first  # killed: never finished

    second = Tracker.open(store, "resumed", name="r")
    assert second.start_run(tmp_path, config={"lr": 2}, resumed=1) == run_id
    second.log_metrics({"loss": 0.91}, 1)
    second.log_metrics({"loss": 0.8}, 2)
    save_run(tmp_path, status="interrupted", resumed=1, losses=[])
    second.finish()
    run = client(store).get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["cl_lab.resumed"] == "1"
    assert run.data.params["lr"] == "1"
    history = client(store).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.9), (2, 0.8)]
    assert len(runs_of(store, "resumed")) == 1


@pytest.mark.slow
def test_status_and_error_of_a_failed_run(store: str, tmp_path: Path) -> None:
    run_id = send_run(tmp_path, store, "failed", status="failed")
    run = client(store).get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["cl_lab.error"] == "loss is nan; lower training.lr"


@pytest.mark.slow
def test_a_comparison_has_children(store: str, tmp_path: Path) -> None:
    save_comparison(tmp_path)
    parent = Tracker.open(store, "family", name="compare")
    parent_id = parent.start_run(tmp_path)
    children = []
    for seed in range(2):
        child = Tracker.open(store, "family", parent=parent_id, name=f"ewc-seed{seed}")
        children.append(child.start_run(tmp_path / "runs" / f"ewc-seed{seed}"))
        child.finish()
    parent.finish()
    tags = [client(store).get_run(c).data.tags["mlflow.parentRunId"] for c in children]
    assert tags == [parent_id, parent_id]
    run = client(store).get_run(parent_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"average_accuracy/ewc _λ_": 0.6, "cost/train_seconds/ewc _λ_": 1.5}
    assert run.data.tags["cl_lab.unfinished"] == "1"
    expected = {"comparison.json", "config.yaml", "report.html", "report_files"}
    assert artifacts_of(store, parent_id) == expected
    assert push(tmp_path, store) == [], "all of it is there already"


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.7, 0.5])
def test_a_resumed_comparison_shows_its_new_means(store: str, tmp_path: Path, mean: float) -> None:
    def send() -> str:
        tracker = Tracker.open(store, "new means", name="compare")
        run_id = tracker.start_run(tmp_path)
        tracker.finish()
        assert run_id
        return run_id

    def history(key: str) -> list[float]:
        return [m.value for m in client(store).get_metric_history(run_id, key)]

    save_comparison(tmp_path)
    run_id = send()
    save_comparison(tmp_path, mean=mean)
    assert send() == run_id
    key, same = "average_accuracy/ewc _λ_", "cost/train_seconds/ewc _λ_"
    assert client(store).get_run(run_id).data.metrics[key] == mean
    send()
    assert sorted(history(key)) == sorted([0.6, mean]), "sent once"
    assert history(same) == [1.5], "what has not changed is not sent again"
    save_comparison(tmp_path)
    send()
    assert client(store).get_run(run_id).data.metrics[key] == 0.6, "back to what was sent first"


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 2])
def test_the_latest_summary_of_a_run_is_the_folders(store: str, tmp_path: Path, rows: int) -> None:
    """Also where a resumed run has as many rows as before, or fewer: its checkpoint may be older than its last row."""
    document = save_run(tmp_path)
    (run_id,) = push(tmp_path, store, experiment="summary")
    matrix, metrics = document["matrix"][:rows], {"average_accuracy": 0.55}
    save_run(tmp_path, status="interrupted", matrix=matrix, metrics=metrics, cost={"train_seconds": 1.25})
    tracker = Tracker.open(store, "summary")
    assert tracker.start_run(tmp_path) == run_id
    tracker.finish()
    tracker.finish()
    found = client(store).get_run(run_id).data.metrics
    assert (found["average_accuracy"], found["cost/train_seconds"]) == (0.55, 1.25)
    assert len(client(store).get_metric_history(run_id, "average_accuracy")) == 2


@pytest.mark.slow
def test_unreachable_server_costs_a_warning_and_the_run_is_pushed_later(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker = Tracker.open(UNREACHABLE, "later", name="r")
        assert tracker.start_run(tmp_path, config=CONFIG) is None
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.log_row(0, [0.5])
        tracker.flush()
        save_run(tmp_path)
        tracker.finish()
    assert time.monotonic() - began < 10
    assert not tracker.enabled
    assert len(caplog.records) == 1
    assert "The run goes on" in caplog.text
    assert f"cl-lab push {tmp_path}" in caplog.text
    note = read_note(tmp_path)
    assert (note["pushed"], note["run_id"], note["uri"]) == (False, None, UNREACHABLE)
    assert note["error"]

    with pytest.raises(UserError, match="nothing is lost"):
        push(tmp_path, UNREACHABLE)
    sent = push(tmp_path, store)
    assert len(sent) == 1
    assert read_note(tmp_path)["pushed"] is True
    run = client(store).get_run(sent[0])
    assert run.data.params["scenario.name"] == "split-digits"
    assert len(client(store).get_metric_history(sent[0], "loss")) == 1200
    assert push(tmp_path, store) == []
    assert len(runs_of(store, "later")) == 1
    assert push(tmp_path, store, force=True) != sent
    assert len(runs_of(store, "later")) == 2


@pytest.mark.slow
def test_push_a_comparison_once_and_complete_what_was_sent_in_part(store: str, tmp_path: Path) -> None:
    save_comparison(tmp_path)
    (tmp_path / "runs" / "ewc-seed1" / "run.json").rename(tmp_path / "kept")
    assert len(push(tmp_path, store, experiment="pushed")) == 2
    (tmp_path / "kept").rename(tmp_path / "runs" / "ewc-seed1" / "run.json")
    assert len(push(tmp_path, store, experiment="pushed")) == 1
    found = runs_of(store, "pushed")
    assert len(found) == 3
    parent = read_note(tmp_path)["run_id"]
    assert sum(r.data.tags.get("mlflow.parentRunId") == parent for r in found) == 2

    child = tmp_path / "runs" / "ewc-seed0"
    note = {**read_note(child), "pushed": False}
    (child / "tracking.json").write_text(json.dumps(note))
    assert push(child, store) == [note["run_id"]]
    assert len(client(store).get_metric_history(note["run_id"], "loss")) == 1200
    assert client(store).get_run(note["run_id"]).data.tags["mlflow.parentRunId"] == parent


@pytest.mark.slow
def test_push_sends_a_run_that_went_on_after_it_was_sent(store: str, tmp_path: Path) -> None:
    run_id = send_run(tmp_path, store, "went on", status="failed")
    assert "cl_lab.error" in client(store).get_run(run_id).data.tags
    assert read_note(tmp_path)["pushed"] is True
    assert push(tmp_path, store) == []

    save_run(tmp_path, resumed=1, finished="2025-11-20T11:00:00+00:00")  # with tracking off
    assert push(tmp_path, store) == [run_id]
    run = client(store).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["cl_lab.resumed"] == "1"
    assert "cl_lab.error" not in run.data.tags
    history = client(store).get_metric_history(run_id, "accuracy/exp_0")
    assert [(m.step, m.value) for m in history] == [(0, 0.9), (1, 0.5), (2, 0.3)]
    assert push(tmp_path, store) == []
    assert len(runs_of(store, "went on")) == 1

    note = read_note(tmp_path)
    del note["sent"]  # as older versions wrote it
    (tmp_path / "tracking.json").write_text(json.dumps(note))
    assert push(tmp_path, store) == [run_id]
    assert push(tmp_path, store) == []


@pytest.mark.slow
def test_push_sends_what_went_on_in_a_comparison(store: str, tmp_path: Path) -> None:
    save_comparison(tmp_path)
    parent, _, failed = push(tmp_path, store, experiment="resumed comparison")
    save_comparison(tmp_path, mean=0.7)
    save_run(tmp_path / "runs" / "ewc-seed1", seed=1, resumed=1)
    assert push(tmp_path, store) == [parent, failed]
    assert client(store).get_run(parent).data.metrics["average_accuracy/ewc _λ_"] == 0.7
    assert client(store).get_run(failed).info.status == "FINISHED"
    assert push(tmp_path, store) == []


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker.open(store, "dies")
    run_id = tracker.start_run(tmp_path)
    real = tracker._client

    class Dead:
        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                raise ConnectionError("gone")

            return call

    monkeypatch.setattr(tracker, "_client", Dead())
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
        tracker.flush()
    assert tracker.error == "gone"
    assert len(caplog.records) == 1
    save_run(tmp_path)
    tracker.finish()
    assert read_note(tmp_path)["pushed"] is False
    assert len(caplog.records) == 1, "one warning for the whole run"
    monkeypatch.setattr(tracker, "_client", real)
    tracker.finish()
    assert read_note(tmp_path)["pushed"] is True
    assert read_note(tmp_path)["run_id"] == run_id
    assert client(store).get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_several_processes_share_a_new_store(tmp_path: Path) -> None:
    code = """
import sys, warnings
from pathlib import Path
from cl_lab.tracking import Tracker
tracker = Tracker.open(sys.argv[1], "shared", name=sys.argv[2])
tracker.start_run(Path(sys.argv[2]), config={"seed": sys.argv[2]})
for step in range(300):
    tracker.log_metrics({"loss": 1.0}, step)
    if step % 20 == 0:
        tracker.flush()
tracker.finish("finished")
print(tracker.error)
"""
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, str(tmp_path / f"run{i}")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])},
        )
        for i in range(3)
    ]
    told = [worker.communicate(timeout=120)[0] for worker in workers]
    assert told == ["None\n"] * 3
    found = runs_of(uri, "shared")
    assert len(found) == 3
    assert all(len(client(uri).get_metric_history(r.info.run_id, "loss")) == 300 for r in found)


@pytest.mark.slow
def test_threads_may_log_together(store: str, tmp_path: Path) -> None:
    tracker = Tracker.open(store, "threads")
    run_id = tracker.start_run(tmp_path)

    def work(k: int) -> None:
        for step in range(400):
            tracker.log_metrics({f"m{k}": float(step)}, step)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracker.finish("finished")
    assert [len(client(store).get_metric_history(run_id, f"m{k}")) for k in range(3)] == [400] * 3


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    import socket

    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up_soon(silent_server: str, tmp_path: Path) -> None:
    began = time.monotonic()
    tracker = Tracker.open(silent_server, "x")
    assert tracker.start_run(tmp_path) is None
    assert time.monotonic() - began < 10


def test_a_server_that_answers_anything_counts_as_there() -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        tracking._probe(f"http://127.0.0.1:{server.server_port}")
        thread.join()


def test_a_store_that_is_no_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlruns.db").write_text("no database " * 100)
    tracker = Tracker.open(f"sqlite:///{tmp_path / 'mlruns.db'}", "x")
    assert tracker.start_run(tmp_path / "run") is None
    assert "not a database" in caplog.text
    (tmp_path / "file").write_text("")
    assert Tracker.open(f"sqlite:///{tmp_path}/file/mlruns.db", "x").start_run(tmp_path / "run") is None


@pytest.mark.parametrize("uri", [None, "", "none", " None "])
def test_tracking_off(uri: str | None, tmp_path: Path) -> None:
    tracker = Tracker.open(uri, "x")
    assert not tracker.enabled
    assert tracker.start_run(tmp_path / "run", config=CONFIG) is None
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_row(0, [1.0])
    tracker.finish()
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no tracking"):
        push(tmp_path, uri)


def test_mlflow_is_imported_only_when_needed() -> None:
    code = "import sys, cl_lab.tracking, cl_lab.reporting; print([m for m in sys.modules if m in %r])"
    heavy = ["mlflow", "torch", "matplotlib", "jinja2", "rich", "numpy"]
    told = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("sqlite:///mlruns.db") == f"sqlite:///{tmp_path}/mlruns.db"
    assert resolve("sqlite:////abs/x.db?timeout=5") == "sqlite:////abs/x.db?timeout=5"
    assert resolve("http://host:5000") == "http://host:5000"
    assert resolve("databricks") == "databricks"
    assert resolve("./mlruns") == (tmp_path / "mlruns").as_uri()
    assert without_password("at postgresql://me:p@host/db") == "at postgresql://me:***@host/db"
    assert without_password("http://host:5000/a@b") == "http://host:5000/a@b"


def test_flatten() -> None:
    found = dict(flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": [{"f": "x"}], "g": {}, "h": [[1], [2]]}))
    assert found == {"a.b": "1", "a.c": "null", "d": "[1, 2]", "e.0.f": "x", "g": "{}", "h.0": "[1]", "h.1": "[2]"}


def test_push_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        push(tmp_path, "sqlite:///x.db")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        push(tmp_path, "sqlite:///x.db")


def test_ui_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        serve_ui(f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(UserError, match="its own page"):
        serve_ui("http://127.0.0.1:5000")
    with pytest.raises(UserError, match="tracking is off"):
        serve_ui(None)


def test_ui_runs_mlflow_on_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.db").write_text("")
    seen: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append(command)
            assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert serve_ui(f"sqlite:///{tmp_path / 'a.db'}", 5055, "127.0.0.1") == 0
    command = " ".join(seen[0])
    assert f"-m mlflow ui --backend-store-uri sqlite:///{tmp_path}/a.db --host 127.0.0.1 --port 5055" in command
    assert f"--default-artifact-root {(tmp_path / 'mlartifacts').as_uri()}" in command


def test_ui_refuses_a_store_it_cannot_show() -> None:
    with pytest.raises(UserError, match="cannot show a 'foo' store"):
        tracking.serve_ui("foo://bar")
