"""The shipped experiments on texts, on a tiny model and made-up tasks of the same names: every strategy in them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cl_lab.config import label_of, read

if TYPE_CHECKING:
    from tests.e2e.conftest import CommandLine

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["model.weights=tiny", "training.batch_size=16", "evaluation.batch_size=100", "seeds=[0]", "tracking.uri=null"]
TASKS = [
    "scenario.tokenizer=bytes",
    "scenario.train_samples=8",
    "scenario.test_samples=4",
    "scenario.max_answer=8",
    "scenario.max_prompt=140",
]
DEEP = ["model.layers=16", "model.width=16", "model.heads=2"]


def labelled_task(folder: Path, labels: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(labels))
    for part, first in (("train", 0), ("test", 100)):
        rows = [{"label": label, "sentence": f"{first + i} on {label}"} for label in labels for i in range(8)]
        (folder / f"{part}.json").write_text(json.dumps(rows))


def free_task(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part, first in (("train", 0), ("test", 100)):
        rows = [{"prompt": f"{i} and 1 make\nAnswer:", "answer": f"{i + 1}"} for i in range(first, first + 8)]
        (folder / f"{part}.json").write_text(json.dumps(rows))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Small tasks under the names that the shipped experiments give."""
    data = tmp_path / "data"
    for name in ("dbpedia", "yahoo", "agnews"):
        labelled_task(data / "CL_Benchmark" / "TC" / name, ["Plant", "Film"])
    for name in ("amazon", "SST-2"):
        labelled_task(data / "CL_Benchmark" / "SC" / name, ["good", "bad"])
    for name in ("FOMC", "NumGLUE-cm", "ScienceQA"):
        free_task(data / "TRACE" / name)
    return data


@pytest.mark.slow
@pytest.mark.checkout
@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("language-order-1", [*TASKS, *DEEP, "training.epochs=1"]),
        ("language-mixed", [*TASKS, *DEEP, "training.epochs=1"]),
        (
            "edit-stream",
            [
                *("scenario.tokenizer=bytes", "scenario.experiences=2", "scenario.per_experience=2"),
                *(*DEEP, "training.epochs=1"),
            ],
        ),
        ("remind-smollm2", [*TASKS, "model.frozen=model.layers.0", "model.keep_latents=false"]),
        (
            "biography",
            [
                *(
                    "scenario.persons=10",
                    "scenario.tasks=1",
                    "scenario.first_names=6",
                    "scenario.middle_names=6",
                    "scenario.last_names=8",
                ),
                *("scenario.test_samples=6", "training.epochs=1", "training.first={epochs: 1}"),
                *("model.layers=4", "model.width=16", "model.heads=2"),
            ],
        ),
    ],
)
def test_every_strategy_of_a_shipped_experiment(
    cl_lab: CommandLine, texts: Path, name: str, smaller: list[str]
) -> None:
    file = CONFIGS / f"{name}.yaml"
    shipped = read(file).strategies
    assert shipped
    document = cl_lab.json("compare", str(file), *TINY, *smaller, "--data-dir", str(texts), "--out", "out")
    assert [row["strategy"] for row in document["rows"]] == [label_of(s, shipped) for s in shipped]
    for (run,) in (row["runs"] for row in document["rows"]):
        assert run["status"] == "finished", run["error"]
        assert len(run["matrix"]) == len(run["initial"]) > 1
        assert all(0 <= score <= 1 for scores in run["matrix"] for score in scores)
