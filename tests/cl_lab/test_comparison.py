"""Comparisons and the folders they live in: what is resumed, what is set aside, what a broken plug-in costs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from cl_lab import checkpoint, experiment
from cl_lab.comparison import compare
from cl_lab.config import RunConfig, parse
from cl_lab.errors import ConfigError, PluginError, UserError
from cl_lab.experiment import export, run
from cl_lab.files import alone_in, run_folders
from cl_lab.reporting import from_runs


def settings(**changes: object) -> RunConfig:
    document = {
        "scenario": {"name": "split-digits", "experiences": 2, "train_limit": 40, "test_limit": 20},
        "model": {"name": "mlp", "hidden": [4]},
        "strategy": "naive",
        "strategies": ["naive"],
        "engine": {"threads": 1},
        "tracking": {"uri": None},
    }
    return parse({**document, **changes}, "test")


def test_resuming_with_other_settings_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    compare(settings(), tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"'training.epochs' differs .*naive-seed0 \(1 there, 3 now\)"):
        compare(settings(training={"epochs": 3}), tmp_path, resume=True)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_second_comparison_keeps_the_first_whole(tmp_path: Path) -> None:
    first = compare(settings(), tmp_path / "out")
    before = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*"))
    second = compare(settings(training={"lr": 0.2}), tmp_path / "out")
    aside = tmp_path / "out.old-1"
    assert sorted(p.relative_to(aside) for p in aside.rglob("*")) == before
    assert from_runs([aside])["rows"][0]["runs"][0]["matrix"] == first["rows"][0]["runs"][0]["matrix"]
    assert from_runs([tmp_path / "out"])["rows"][0]["runs"][0]["matrix"] == second["rows"][0]["runs"][0]["matrix"]


def test_a_run_that_failed_under_other_settings_makes_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What its message advises, a lower rate, can be followed with --resume; the others stay as they are."""
    wild = {"name": "naive", "label": "wild", "training": {"lr": 1e30}}
    found = compare(settings(strategies=["naive", wild]), tmp_path)
    assert [row["runs"][0]["status"] for row in found["rows"]] == ["finished", "failed"]
    written = (tmp_path / "runs" / "naive-seed0" / "run.json").stat().st_mtime_ns
    tamed = {**wild, "training": {"lr": 0.1}}
    again = compare(settings(strategies=["naive", tamed]), tmp_path, resume=True)
    assert [row["runs"][0]["status"] for row in again["rows"]] == ["finished", "finished"]
    assert "wild-seed0 held a run that failed under other settings; it is kept as wild-seed0.old-1" in caplog.text
    assert (tmp_path / "runs" / "naive-seed0" / "run.json").stat().st_mtime_ns == written
    assert [p.name for p in run_folders(tmp_path)] == ["naive-seed0", "wild-seed0"], (
        "what was set aside is no run of it"
    )
    assert [row["strategy"] for row in from_runs([tmp_path])["rows"]] == ["naive", "wild"]


def test_a_run_keeps_its_results_under_another_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second strategy of one name gives the first a longer one; it is not trained again, and goes by it from then on."""
    small, large = ({"name": "replay", "memory": n} for n in (10, 20))
    first = compare(settings(strategies=["naive", small]), tmp_path)["rows"][1]["runs"][0]
    (tmp_path / "runs" / "stray-seed0").mkdir()
    (tmp_path / "runs" / "stray-seed0" / "run.json").write_text("{damaged")
    caplog.set_level("INFO", "cl_lab")
    for _ in range(2):
        rows = compare(settings(strategies=["naive", small, large]), tmp_path, resume=True)["rows"]
        assert [row["strategy"] for row in rows] == ["naive", "replay(memory=10)", "replay(memory=20)"]
        assert rows[1]["runs"][0] == {
            **first,
            "label": "replay(memory=10)",
            "path": str(tmp_path / "runs" / "replay-memory=10-seed0"),
        }
    assert not (tmp_path / "runs" / "replay-seed0").exists()
    assert caplog.text.count("is called 'replay(memory=10)' now") == 1
    renamed = {**small, "label": "ten kept"}
    rows = compare(settings(strategies=["naive", renamed, large]), tmp_path, resume=True)["rows"]
    assert rows[1]["runs"][0]["matrix"] == first["matrix"]
    assert rows[1]["runs"][0]["finished"] == first["finished"]
    assert (tmp_path / "runs" / "ten-kept-seed0").is_dir()
    assert (tmp_path / "runs" / "stray-seed0" / "run.json").read_text() == "{damaged"


@pytest.mark.parametrize("ends", ["run.json", "config.yaml", "rename"])
def test_a_kill_while_a_run_is_renamed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    small, large = ({"name": "replay", "memory": n} for n in (10, 20))
    first = compare(settings(strategies=[small]), tmp_path)["rows"][0]["runs"][0]
    write, rename, place = experiment.write_atomically, Path.rename, tmp_path / "runs" / "replay-seed0"

    def killed(path: Path, content: str) -> None:
        if path == place / ends:
            raise KeyboardInterrupt
        write(path, content)

    def not_renamed(path: Path, to: Path) -> Path:
        if path == place and ends == "rename":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as broken:
        broken.setattr(experiment, "write_atomically", killed)
        broken.setattr(Path, "rename", not_renamed)
        with pytest.raises(KeyboardInterrupt):
            compare(settings(strategies=[small, large]), tmp_path, resume=True)
    rows = compare(settings(strategies=[small, large]), tmp_path, resume=True)["rows"]
    assert [row["strategy"] for row in rows] == ["replay(memory=10)", "replay(memory=20)"]
    assert rows[0]["runs"][0]["finished"] == first["finished"]


def test_a_run_that_names_a_knob_of_before_can_be_read(tmp_path: Path) -> None:
    compare(settings(), tmp_path)
    file = tmp_path / "runs" / "naive-seed0" / "config.yaml"
    file.write_text(file.read_text().replace("name: mlp", "trust_remote_code: false\n  name: mlp"))
    assert "trust_remote_code" in file.read_text()
    assert compare(settings(), tmp_path, resume=True)["rows"][0]["runs"][0]["status"] == "finished"


def test_a_comparison_leaves_a_single_run_its_settings(tmp_path: Path) -> None:
    run(settings(training={"lr": 0.2}), tmp_path / "out")
    before = (tmp_path / "out" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"out' holds a single run; leave --resume out"):
        compare(settings(), tmp_path / "out", resume=True)
    compare(settings(), tmp_path / "out")
    assert (tmp_path / "out.old-1" / "config.yaml").read_text() == before
    assert (tmp_path / "out.old-1" / "run.json").exists()
    assert not (tmp_path / "out" / "run.json").exists()
    with pytest.raises(ConfigError, match=r"out' holds a comparison; cl-lab compare goes on with it"):
        run(settings(), tmp_path / "out", resume=True)
    with pytest.raises(UserError, match=r"^export: .* holds a comparison; name one of its runs"):
        export(tmp_path / "out", tmp_path / "export")


def test_one_process_at_a_time_in_a_folder(tmp_path: Path) -> None:
    compare(settings(), tmp_path / "out")
    run(settings(), tmp_path / "one")
    before = sorted(tmp_path.rglob("*"))
    for job, folder in ((compare, "out"), (run, "one"), (run, "new")):
        (tmp_path / folder).mkdir(exist_ok=True)
        with alone_in(tmp_path / folder):
            for resume in (False, True):
                with pytest.raises(ConfigError, match=rf"{folder}': process {os.getpid()} is running there; wait"):
                    job(settings(), tmp_path / folder, resume=resume)
    assert sorted(p for p in tmp_path.rglob("*") if "new" not in p.parts) == before
    assert run(settings(), tmp_path / "new")["status"] == "finished", "the lock ends with who held it"


def test_finished_runs_on_other_data_are_refused_where_others_are_to_join_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(settings(), tmp_path)
    place = tmp_path / "runs" / "naive-seed0" / "run.json"
    document = json.loads(place.read_text())
    document["experiences"][1]["train_digest"] = "0" * 16
    place.write_text(json.dumps(document))
    with monkeypatch.context() as patched:
        patched.setattr("cl_lab.experiment.stream_of", lambda *_: pytest.fail("nothing is left to run"))
        compare(settings(), tmp_path, resume=True)
    for more in ({"strategies": ["naive", "joint"]}, {"seeds": [0, 1]}):
        with pytest.raises(UserError, match=r"naive-seed0' ran on other training data .*train_digest of experience 2"):
            compare(settings(**more), tmp_path, resume=True)
    assert [p.name for p in run_folders(tmp_path)] == ["naive-seed0"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scenario": {"name": "split-digits", "experiences": 3}}, "experiences"),
        ({"model": {"name": "mlp", "hidden": [0]}}, "hidden"),
        ({"engine": {"device": "cuda"}}, "torch sees no GPU"),
    ],
)
def test_what_cannot_be_built_moves_nothing(changes: dict[str, object], match: str, tmp_path: Path) -> None:
    if "engine" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for job in (compare, run):
        folder = tmp_path / job.__name__
        job(settings(), folder)
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
        with pytest.raises(UserError, match=match):
            job(settings(**changes), folder)
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare", "run"]


def test_workers_leave_no_stream_behind_with_who_started_them(tmp_path: Path) -> None:
    compare(settings(), tmp_path, jobs=2)
    assert experiment._stream.cache_info().currsize == 0
    compare(settings(strategies=["naive", "joint"]), tmp_path, jobs=2, resume=True)
    assert experiment._stream.cache_info().currsize == 0


def test_a_full_disk_at_the_end_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cl_lab.comparison.write_atomically", full)
        with pytest.raises(
            UserError, match=r"comparison\.json': No space left on device; every run is kept: make room"
        ):
            compare(settings(), tmp_path)
    assert compare(settings(), tmp_path, resume=True)["rows"][0]["runs"][0]["resumed"] == 0, "it had finished"


def test_labels_of_any_script_have_folders_of_their_own(tmp_path: Path) -> None:
    compare(settings(strategies=[{"name": "naive", "label": "基线"}, {"name": "joint", "label": "a, b/c"}]), tmp_path)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["a-b-c-seed0", "基线-seed0"]
    assert [row["strategy"] for row in from_runs([tmp_path])["rows"]] == ["a, b/c", "基线"]


def test_labels_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    two = [{"name": "naive", "label": "ER (500)"}, {"name": "joint", "label": "er-500"}]
    with pytest.raises(ConfigError, match=r"'ER \(500\)' and 'er-500' would share the folder runs/er-500-seed"):
        compare(settings(strategies=two), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resuming_on_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_lab.records import Stream

    run(settings(), tmp_path)
    document = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**document, "status": "interrupted"}))
    with monkeypatch.context() as other:
        other.setattr(Stream, "fingerprint", lambda self: "f" * 64)
        for _ in range(2):
            with pytest.raises(UserError, match=rf"other test data .*{document['fingerprint'][:12]}, now ffffffffffff"):
                run(settings(), tmp_path, resume=True)
    assert run(settings(), tmp_path, resume=True)["matrix"] == document["matrix"]


def test_a_plugin_that_raises_costs_only_its_own_run(tmp_path: Path) -> None:
    plugin = tmp_path / "raises.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom cl_lab.protocols import Strategy\n\n\n@dataclass\nclass Raises(Strategy):\n"
        "    def after_step(self, learner):\n        raise ValueError('boom')\n"
    )
    found = compare(settings(strategies=[f"{plugin}:Raises", "naive"]), tmp_path / "out")
    assert [(r["runs"][0]["status"], r["runs"][0]["error"]) for r in found["rows"]] == [
        ("failed", "boom"),
        ("finished", None),
    ]


def test_a_mistake_leaves_the_earlier_run_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(settings(), folder)
    with pytest.raises(ConfigError, match=r"model\.hidden"):
        run(settings(model={"name": "mlp", "hidden": ["x"]}), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_class_of_another_kind_is_no_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "other.py"
    plugin.write_text("from dataclasses import dataclass\n\n\n@dataclass\nclass Other:\n    pass\n")
    with pytest.raises(PluginError, match="is no strategy: it has no method 'before_experience'"):
        run(settings(strategy=f"{plugin}:Other"), tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content"), [("run.json", "{}"), ("run.json", "[]"), ("run.json", "{x"), ("config.yaml", "{: x")]
)
def test_a_damaged_file_is_named_on_resume(tmp_path: Path, file: str, content: str) -> None:
    run(settings(), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{file}' is damaged"):
        run(settings(), tmp_path, resume=True)


def test_streams_of_one_name_but_other_knobs_are_not_compared(tmp_path: Path) -> None:
    scenario = {"name": "split-digits", "train_limit": 40, "test_limit": 20}
    run(settings(scenario={**scenario, "experiences": 2}), tmp_path / "two")
    run(settings(scenario={**scenario, "experiences": 5}, strategy="joint"), tmp_path / "five")
    run(settings(scenario={**scenario, "experiences": 2, "incremental": "task"}), tmp_path / "task")
    for other in ("five", "task"):
        with pytest.raises(UserError, match="different streams called 'split-digits'"):
            from_runs([tmp_path / "two", tmp_path / other])


def test_early_stopping_leaves_a_kept_optimiser_its_state(tmp_path: Path) -> None:
    training = {"epochs": 3, "validation": 0.2, "patience": 1, "optimizer": "adam", "optimizer_state": "kept"}
    run(settings(training=training), tmp_path)
    found = checkpoint.load_newest(tmp_path / "checkpoints")
    assert found is not None
    learner = found[0]["learner"]
    assert isinstance(learner, dict)
    optimizer = learner["optimizer"]
    assert isinstance(optimizer, dict)
    assert set(optimizer) == set(learner["weights"]), "moments of every parameter"


def test_what_no_strategy_could_mend_is_told_before_any_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^strategy 'hnet' needs the task label of every sample"):
        compare(settings(strategies=["naive", "hnet"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
