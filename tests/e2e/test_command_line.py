"""The command line as its users type it: the main job, the JSON contract, and every mistake in one line."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import CommandLine

COST = {
    "train_seconds",
    "eval_seconds",
    "samples_per_second",
    "peak_memory_bytes",
    "strategy_state_bytes",
    "trainable_parameters",
}
METRICS = {
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "bwt",
    "fwt",
    "learning_accuracy",
}


@pytest.mark.slow
def test_run_contract(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config(strategy="{name: ewc, strength: 10.0}", tracking='{uri: "sqlite:///mlruns.db"}')
    document = cl_lab.json("run", config, "strategy.strength=20", "training.epochs=1", "seed=3")
    assert document["scenario"] == "split-digits"
    assert document["strategy"] == "ewc"
    assert document["seed"] == 3
    assert len(document["initial"]) == 5
    assert [len(row) for row in document["matrix"]] == [5] * 5
    assert document["metrics"].keys() >= METRICS
    assert document["cost"].keys() >= COST
    mean = sum(document["matrix"][-1]) / 5
    assert document["metrics"]["average_accuracy"] == pytest.approx(mean)
    folder = cl_lab.folder / document["path"]
    assert folder == cl_lab.folder / "runs" / "experiment"
    saved = (folder / "config.yaml").read_text()
    assert "strength: 20" in saved
    assert "epochs: 1" in saved
    environment = json.loads((folder / "environment.json").read_text())
    assert "torch" in environment["packages"]
    assert (cl_lab.folder / "mlruns.db").exists()
    assert document["run_id"] == json.loads((folder / "tracking.json").read_text())["run_id"]
    again = cl_lab.json("run", config, "strategy.strength=20", "training.epochs=1", "seed=3", "--out", "again")
    assert again["matrix"] == document["matrix"], "the same configuration and seed give the same matrix"


@pytest.mark.slow
def test_compare_contract(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config(
        "strategies: [naive, {name: replay, memory: 50}, [{name: freeze, modules: [backbone]}, replay], joint]",
        "seeds: [0, 1]",
        tracking='{uri: "sqlite:///mlruns.db"}',
    )
    document = cl_lab.json("compare", config, "--out", "cmp")
    assert [r["strategy"] for r in document["rows"]] == ["naive", "replay", "freeze+replay", "joint"]
    for row in document["rows"]:
        assert row["seeds"] == [0, 1]
        assert [r["seed"] for r in row["runs"]] == [0, 1]
        for value in row["metrics"].values():
            assert value["ci95"][0] <= value["mean"] <= value["ci95"][1]
        values = [r["metrics"]["average_accuracy"] for r in row["runs"]]
        assert row["metrics"]["average_accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    by_name = {r["strategy"]: r["metrics"] for r in document["rows"]}
    assert by_name["joint"]["average_accuracy"]["mean"] > by_name["naive"]["average_accuracy"]["mean"]
    assert "intransigence" in by_name["naive"], "joint was run, so metrics against it are known"
    page = (cl_lab.folder / "cmp" / "report.html").read_text()
    HTMLParser().feed(page)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "the page needs no network"
    assert (cl_lab.folder / "cmp" / "report.md").exists()
    # Resuming a finished comparison computes nothing anew and changes nothing.
    stamp = (cl_lab.folder / "cmp/runs/naive-seed0/run.json").stat().st_mtime_ns
    again = cl_lab.json("compare", config, "--out", "cmp", "--resume")
    assert (cl_lab.folder / "cmp/runs/naive-seed0/run.json").stat().st_mtime_ns == stamp
    assert [r["metrics"] for r in again["rows"]] == [r["metrics"] for r in document["rows"]]
    in_parallel = cl_lab.json("compare", config, "--out", "parallel", "--jobs", "2", "engine.threads=1")
    assert [[r["matrix"] for r in row["runs"]] for row in in_parallel["rows"]] == [
        [r["matrix"] for r in row["runs"]] for row in document["rows"]
    ]
    report = cl_lab.json("report", "cmp", "--out", "elsewhere")
    assert Path(cl_lab.folder / report["html"]).exists()


@pytest.mark.slow
def test_a_failed_run_leaves_the_others(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config(
        "strategies: [naive, {name: ewc, strength: 1.0e+30, fisher: empirical}]",
        training="{epochs: 1, batch_size: 16, lr: 0.1}",
    )
    line = cl_lab.error("compare", config, "--out", "cmp")
    assert "1 of the 2 runs failed" in line
    comparison = json.loads((cl_lab.folder / "cmp" / "comparison.json").read_text())
    by_name = {r["strategy"]: r["runs"][0] for r in comparison["rows"]}
    assert by_name["naive"]["status"] == "finished"
    assert by_name["ewc"]["status"] == "failed"
    assert len(by_name["ewc"]["matrix"]) == 1, "the rows before the failure are kept"
    assert "lower training.lr" in by_name["ewc"]["error"]
    assert "failed" in (cl_lab.folder / "cmp" / "report.html").read_text()


@pytest.mark.slow
def test_unreachable_tracking_server(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config(tracking='{uri: "http://127.0.0.1:9"}')
    done = cl_lab("run", config, "--out", "offline", "--json")
    assert "warning" in done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert json.loads((cl_lab.folder / "offline" / "tracking.json").read_text())["pushed"] is False
    pushed = cl_lab.json("push", "offline", "--uri", "sqlite:///later.db")
    assert len(pushed["pushed"]) == 1
    assert cl_lab.json("push", "offline", "--uri", "sqlite:///later.db") == {"pushed": []}


@pytest.mark.parametrize(
    ("sections", "overrides", "words"),
    [
        ({"strategy": "ewcc"}, [], ["ewcc", "did you mean 'ewc'"]),
        ({"scenario": "split-digit"}, [], ["split-digit", "did you mean 'split-digits'"]),
        ({"model": "mpl"}, [], ["mpl", "did you mean 'mlp'"]),
        ({"strategy": "{name: ewc, strenght: 3.0}"}, [], ["strategy.strenght", "did you mean 'strength'"]),
        ({"strategy": "{name: ewc, strength: -1.0}"}, [], ["strategy.strength = -1.0"]),
        ({}, ["training.epohcs=3"], ["training.epohcs", "did you mean 'epochs'"]),
        ({}, ["training.epochs=many"], ["training.epochs = 'many'", "integer"]),
        ({}, ["seed=one"], ["seed = 'one'", "integer"]),
        ({}, ["training"], ["key=value"]),
        ({"strategy": "{name: replay, memory: 1000000000000}"}, ["training.epochs=1"], ["memory", "GiB"]),
        ({"strategy": "{name: freeze, modules: [backbone.layer.9]}"}, [], ["backbone.layer.9", "matches no module"]),
        ({"strategy": "missing.py:Mine"}, [], ["missing.py", "does not exist"]),
        ({"scenario": "{name: split-digits, experiences: 3}"}, [], ["experiences", "3"]),
        ({"scenario": "{name: split-mnist, data_dir: nowhere}"}, [], ["mnist", "cl-lab fetch"]),
        ({"scenario": "{name: split-digits, online: true}", "strategy": "ewc"}, ["training.epochs=1"], ["boundaries"]),
        ({"scenario": "{name: split-digits, online: true}"}, ["training.epochs=2"], ["online", "set it to 1"]),
        (
            {"scenario": "{name: split-digits, online: true}"},
            ["training.iterations=300"],
            ["online", "batches of"],
        ),
    ],
)
def test_mistakes_are_one_line(
    cl_lab: CommandLine,
    write_config: Callable[..., str],
    sections: dict[str, str],
    overrides: list[str],
    words: list[str],
) -> None:
    line = cl_lab.error("run", write_config(**sections), *overrides)
    for word in words:
        assert word in line


def test_a_learner_of_its_memory_passes_over_it_as_often_as_it_likes(
    cl_lab: CommandLine, write_config: Callable[..., str]
) -> None:
    online = {"scenario": "{name: split-digits, online: true}", "strategy": "{name: gdumb, memory: 100}"}
    document = cl_lab.json("run", write_config(**online), "training.epochs=10")
    assert document["status"] == "finished"
    assert [len(row) for row in document["matrix"]] == 5 * [5]
    assert sum(document["matrix"][-1]) / 5 > 0.5, "it has learnt all ten classes, of which a guess knows a tenth"


def test_configuration_files(cl_lab: CommandLine) -> None:
    assert "does not exist" in cl_lab.error("run", "none.yaml")
    (cl_lab.folder / "bad.yaml").write_text("scenario: [")
    assert "not valid YAML" in cl_lab.error("run", "bad.yaml")
    (cl_lab.folder / "list.yaml").write_text("- a")
    assert "mapping" in cl_lab.error("run", "list.yaml")


def test_unwritable_output(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    blocked = cl_lab.folder / "file"
    blocked.write_text("a file where a folder should be")
    assert "cannot write" in cl_lab.error("run", write_config(), "--out", "file/run")
    if os.geteuid() != 0:
        locked = cl_lab.folder / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot write" in cl_lab.error("run", write_config(), "--out", "locked/run")


def test_corrupt_data(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    folder = cl_lab.folder / "data" / "mnist"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b not gzip after all")
    line = cl_lab.error("run", write_config(scenario="split-mnist"), "--data-dir", "data")
    assert "ubyte.gz" in line


def test_debug_shows_the_traceback(cl_lab: CommandLine) -> None:
    assert "--debug" in cl_lab("--help").stdout
    process = cl_lab.start("run", "none.yaml", "--debug")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" in err


def test_a_models_own_code_runs_only_where_that_is_typed(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    """No file may ask for it; the flag may stand anywhere on the line."""
    assert "--trust-remote-code" in cl_lab("--help").stdout
    model = cl_lab.folder / "model"
    model.mkdir()
    own = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (model / "config.json").write_text(json.dumps({"model_type": "my-own", "auto_map": own}))
    (model / "mine.py").write_text(f"open({str(cl_lab.folder / 'ran')!r}, 'w')\n")
    (model / "model.safetensors").write_bytes(b"not looked at")
    (cl_lab.folder / "task.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    sections = {
        "scenario": "{name: text-stream, tasks: [task.csv], tokenizer: bytes}",
        "model": "{name: causal-lm, weights: model}",
    }
    assert "type --trust-remote-code if you trust" in cl_lab.error("run", write_config(**sections))
    more = {**sections, "model": "{name: causal-lm, weights: model, trust_remote_code: true}"}
    assert "trust_remote_code: unknown key" in cl_lab.error("run", write_config(**more))
    assert not (cl_lab.folder / "ran").exists()
    cl_lab.error("run", "--trust-remote-code", write_config(**sections))
    assert (cl_lab.folder / "ran").exists()


def test_plugin_from_a_file(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    (cl_lab.folder / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from cl_lab.knobs import knob\n"
        "from cl_lab.protocols import Strategy\n"
        "@dataclass\n"
        "class Louder(Strategy):\n"
        '    """Multiply the loss."""\n'
        '    factor: float = knob(2.0, doc="by this", gt=0)\n'
        "    def adjust_loss(self, loss, *, batch, outputs, learner):\n"
        "        return loss * self.factor\n"
    )
    document = cl_lab.json("run", write_config(strategy="{name: 'mine.py:Louder', factor: 1.5}"))
    assert document["strategy"] == "mine.py:Louder"
    louder = cl_lab.json("run", write_config(strategy="naive"), "training.lr=0.15", "--out", "naive")
    assert document["matrix"] == louder["matrix"], "plain SGD: 1.5 times the loss is 1.5 times the learning rate"
    assert "no class 'Quieter'" in cl_lab.error("run", write_config(strategy="mine.py:Quieter"))


def test_lists_and_shows(cl_lab: CommandLine) -> None:
    for kind, expected in {
        "strategies": {"naive", "joint", "cumulative", "ewc", "replay", "freeze"},
        "scenarios": {"split-digits", "split-mnist", "permuted-mnist", "split-cifar10", "core50", "avalanche"},
        "models": {"mlp", "simple-mlp", "convnet", "resnet18", "slim-resnet18"},
        "metrics": METRICS,
        "editors": set(),
    }.items():
        rows = cl_lab.json("list", kind)
        assert expected <= {r["name"] for r in rows}
        assert all(r["summary"] for r in rows), "every plug-in says in one line what it is"
    shown = cl_lab.json("show", "strategy", "ewc")
    assert shown["name"] == "ewc"
    knobs = {k["name"]: k for k in shown["knobs"]}
    assert knobs["strength"] | {"doc": ""} == {
        "name": "strength",
        "type": "float",
        "range": ">= 0",
        "default": 100.0,
        "doc": "",
    }
    assert all(k["doc"] for k in shown["knobs"])
    assert "did you mean 'strategies'" in cl_lab.error("list", "strategys")


def test_says_what_an_editor_promises(cl_lab: CommandLine) -> None:
    for name, removable in (("grace", True), ("rome", False)):
        assert cl_lab.json("show", "editor", name)["removable"] == removable
        shown = cl_lab("show", "editor", name).stdout
        assert ("Taking an edit away leaves the answers of all others" in shown) == removable
        assert ("Every edit must name its subject" in shown) == (name == "rome")


def test_a_command_that_is_no_command_is_told_on_one_line(cl_lab: CommandLine) -> None:
    for words, expected in (
        (("edit", "score", "facts.jsonl", "--at", "two"), r"'--at'.*\(given: two\); see cl-lab edit score --help"),
        (("edit", "score", "facts.jsonl", "--skip=-1"), r"'--skip'.*\(given: -1\); see cl-lab edit score --help"),
        (("edit", "score", "x", "--at", "1", "--at=two"), r"'--at'.*\(given: 1, two\); see cl-lab edit score --help"),
        (("edit", "score", "--skip"), "'--skip' requires an argument; see cl-lab edit score --help"),
        (("show", "strategy"), "Missing argument 'name'; see cl-lab show --help"),
        (("edit", "scor"), "No such command 'scor'.*; see cl-lab edit --help"),
        (("run", "a.yaml", "--resum"), "No such option: --resum .*; see cl-lab run --help"),
        (("edit", "score"), "Missing argument 'facts'; see cl-lab edit score --help"),
    ):
        assert re.search(expected, cl_lab.error(*words))
    assert "Usage: cl-lab edit" in cl_lab("edit", code=2).stdout, "a group alone shows what it has"


def test_light_commands_do_not_load_torch() -> None:
    code = (
        "import sys; sys.argv = ['cl-lab', 'list', 'strategies']\n"
        "import cl_lab.cli\n"
        "try: cl_lab.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'avalanche', 'mlflow', 'matplotlib', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_diagnose(cl_lab: CommandLine, write_config: Callable[..., str]) -> None:
    config = write_config("strategies: [naive, {name: replay, memory: 50}]", checkpoint="{experiences: true}")
    cl_lab("compare", config, "--out", "cmp")
    document = cl_lab.json("diagnose", "cmp/runs/naive-seed0", "--steps", "12", "--lr", "0.2")
    assert [t["index"] for t in document["tasks"]] == [0, 1, 2, 3]
    assert all((t["steps"], t["lr"]) == (12, 0.2) for t in document["tasks"])
    assert document["report"] == "cmp/report.html", "the page in which the run stands"
    assert "naive, seed 0: of 4 old tasks" in (cl_lab.folder / "cmp" / "report.html").read_text()
    saved = json.loads((cl_lab.folder / "cmp" / "runs" / "naive-seed0" / "diagnosis.json").read_text())
    assert saved == {k: v for k, v in document.items() if k != "report"}

    done = cl_lab("diagnose", "cmp/runs/replay-seed0", "--steps", "2")
    assert "verdict" in done.stdout
    assert "report: cmp/report.html" in done.stdout
    assert done.stderr.count("recovery: ") == 4, "a line for each old task on a pipe"
    page = (cl_lab.folder / "cmp" / "report.html").read_text()
    assert "naive, seed 0: of 4 old tasks" in page
    assert "replay, seed 0: of 4 old tasks" in page

    assert "holds a comparison; name one of its runs" in cl_lab.error("diagnose", "cmp")
    assert "holds no run" in cl_lab.error("diagnose", "nowhere")
    assert "steps = 0" in cl_lab.error("diagnose", "cmp/runs/naive-seed0", "--steps", "0")
