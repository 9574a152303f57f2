"""The life of one run: what stands in the way of resuming it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys

from cl_lab import experiment
from cl_lab.errors import UserError
from cl_lab.records import Experience, Stream, TensorData


def changed(stream: Stream, rows: slice, shift: float) -> Stream:
    """The stream with the training samples ``rows`` of its second experience, each moved by ``shift``."""

    def experience(e: Experience) -> Experience:
        def train() -> TensorData:
            kept = e.train.map(lambda v: v[rows])
            return replace(kept, x=kept.x + shift)

        return Experience(e.index, e.name, e.classes, train if e.index == 1 else lambda: e.train, lambda: e.test)

    return replace(stream, experiences=tuple(experience(e) for e in stream.experiences))


@pytest.mark.parametrize("digested", [True, False], ids=["now", "of an older version"])
def test_resuming_on_other_training_data_is_refused(
    digested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toys.config()
    finished = experiment.run(config, tmp_path)
    document: dict[str, Any] = {**finished, "status": "interrupted"}
    if not digested:
        document["experiences"] = [{k: v for k, v in e.items() if k != "train_digest"} for e in finished["experiences"]]
    (tmp_path / "run.json").write_text(json.dumps(document))
    stream = experiment.stream_of(config.scenario, config.seed)

    def refused(other: Stream, match: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(experiment, "stream_of", lambda *_: other)
            for _ in range(2):  # nor does a refusal make the other data the run's own
                with pytest.raises(UserError, match=f"began on other training data .*{match}") as caught:
                    experiment.run(config, tmp_path, resume=True)
                assert "\n" not in str(caught.value)

    refused(changed(stream, slice(0, 59), 0.0), r"\(train_samples of experience 2: 60, now 59\)")
    if digested:
        refused(changed(stream, slice(0, 60), 0.1), r"\(train_digest of experience 2: [0-9a-f]{16}, now [0-9a-f]{16}\)")
    resumed = experiment.run(config, tmp_path, resume=True)
    assert resumed["matrix"] == finished["matrix"]
    assert resumed["experiences"] == finished["experiences"]
