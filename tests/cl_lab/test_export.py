"""``cl-lab export``: what a run has learnt, as files that other programs read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file

from cl_lab import experiment, hub, registry, seeding
from cl_lab.config import RunConfig
from cl_lab.errors import UserError

LM = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"]}
TEXTS = {"name": f"{toys.__file__}:Toy", "form": "texts", "scoring": "first-token"}


def of_texts(strategy: Any) -> RunConfig:
    return toys.config(scenario=TEXTS, model=LM, strategy=strategy, training={"lr": 0.02, "epochs": 2})


@pytest.mark.parametrize("strategy", ["naive", {"name": "olora"}, {"name": "ilora", "memory": 30}])
def test_peft_answers_as_the_run_does(strategy: Any, tmp_path: Path) -> None:
    config = of_texts(strategy)
    document = experiment.run(config, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_text()
    made = experiment.export(tmp_path / "run", tmp_path / "adapter")
    assert made == {"format": "peft", "path": str(tmp_path / "adapter"), "experiences": 3}
    assert (tmp_path / "run" / "run.json").read_text() == before, "the run stays as it is"

    on = experiment.stream_of(config.scenario, 0)
    seeding.seed_everything(seeding.derive(0, "model"))
    highest = max(int(on.answers.max()), *(int(e.test.x.max()) for e in on.experiences))
    base: Any = hub.tiny_causal_lm(highest + 1)
    from peft import PeftModel  # only where the model's libraries have been made ready

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's, about how it asks transformers
        model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    for e, accuracy in zip(on.experiences, document["matrix"][-1], strict=True):
        right = 0
        for row, y in zip(e.test.x, e.test.y.tolist(), strict=True):
            prompt = row[: toys.PROMPT][row[: toys.PROMPT] >= 0].long()
            with torch.no_grad():
                first = model(input_ids=prompt[None]).logits[0, -1]
            classes = list(e.classes)
            right += classes[int(first[on.answers[classes, 0]].argmax())] == y
        assert right / len(e.test) == accuracy


def test_other_models_give_their_weights(tmp_path: Path) -> None:
    config = toys.config(strategy={"name": "replay", "memory": 30})
    experiment.run(config, tmp_path / "run")
    made = experiment.export(tmp_path / "run", tmp_path / "out")
    assert made["format"] == "weights"
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    on = experiment.stream_of(config.scenario, 0)
    model = registry.create("models", {"name": "mlp", **config.model.knobs}, "model").build(on)
    model.load_state_dict(weights)
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    with torch.no_grad():
        for e, accuracy in zip(on.experiences, document["matrix"][-1], strict=True):
            found = model(e.test.x, e.test.t).argmax(1)
            assert float((found == e.test.y).float().mean()) == pytest.approx(accuracy)


def test_frozen_layers_are_among_the_weights(tmp_path: Path) -> None:
    network = {"name": "efficientnet-lite0", "weights": "random"}
    config = toys.config(
        scenario={"name": f"{toys.__file__}:Toy", "form": "images", "train": 20, "test": 10},
        model={**network, "frozen": "blocks.3"},
        training={"epochs": 1, "batch_size": 10, "lr": 0.01},
    )
    document = experiment.run(config, tmp_path / "run")
    torch.manual_seed(5)  # of no matter
    experiment.export(tmp_path / "run", tmp_path / "out")
    on = experiment.stream_of(config.scenario, 0)
    model = registry.create("models", network, "model").build(on)
    model.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    model.eval()
    with torch.no_grad():
        for e, accuracy in zip(on.experiences, document["matrix"][-1], strict=True):
            found = model(e.test.x.float() / 255, e.test.t).argmax(1)
            assert float((found == e.test.y).float().mean()) == pytest.approx(accuracy)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refused(match: str, folder: Path, to: Path = tmp_path / "out") -> None:
        with pytest.raises(UserError, match=match) as caught:
            experiment.export(folder, to)
        assert "\n" not in str(caught.value)

    refused("holds no run", tmp_path)
    experiment.run(toys.config(checkpoint={"enabled": False}), tmp_path / "fleeting")
    refused("holds no checkpoint; run it with checkpoint.enabled=true", tmp_path / "fleeting")
    experiment.run(toys.config(strategy={"name": "icarl", "memory": 30}), tmp_path / "means")
    (tmp_path / "file").write_text("")
    refused("cannot write to", tmp_path / "means", tmp_path / "file" / "below")
    experiment.export(tmp_path / "means", tmp_path / "out")
    assert "icarl answers in place of the model" in caplog.text
