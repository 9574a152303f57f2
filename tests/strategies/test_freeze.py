"""Freezing: bit-identical whatever the optimiser, chosen by path structure, and never by accident nothing or everything."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.models import matching
from cl_lab.records import Stream
from cl_lab.trainer import Record, Silent, Trainer


def weights_after_each(modules: list[str], on: Stream, **sections: Any) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """The weights before training and after each experience."""
    seen: list[dict[str, Tensor]] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            seen.append(trainer.learner.weights())

    start = sections.pop("from_experience", 1)
    links = [{"name": "freeze", "modules": modules, "from_experience": start}]
    trainer = toys.trainer(links, on, observer=Note(), **sections)
    trainer.run()
    return trainer, seen


OPTIMISERS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "weight_decay": 0.1, "optimizer_state": "kept", "lr": 0.01},
    {"optimizer": "adam", "weight_decay": 0.1, "optimizer_state": "fresh", "lr": 0.01},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "optimizer_state": "kept", "lr": 0.02},
]


@pytest.mark.parametrize("training", OPTIMISERS, ids=lambda t: f"{t['optimizer']}-{t['optimizer_state']}")
def test_frozen_is_bit_identical(training: dict[str, Any]) -> None:
    """Weights and running statistics of everything below a match stand still; everything else goes on moving."""
    on = toys.stream(form="images")
    model = {"name": "convnet", "channels": [4, 4], "batch_norm": True, "hidden": [8]}
    trainer, (start, *after) = weights_after_each(
        ["backbone.blocks.0"], on, model=model, training=training | {"epochs": 2}
    )
    frozen = {n for n in start if n.startswith("backbone.blocks.0.")}
    assert {"backbone.blocks.0.norm.running_mean", "backbone.blocks.0.norm.num_batches_tracked"} <= frozen
    assert set(toys.differing(start, after[0])) >= frozen, "not yet frozen in the first experience"
    for before, later in itertools.pairwise(after):
        assert set(toys.differing(before, later)) == set(start) - frozen
    assert trainer.record.trainable_parameters == sum(
        v.numel() for n, v in trainer.learner.model.named_parameters() if n not in frozen
    )


def test_a_single_norm_keeps_its_statistics() -> None:
    on = toys.stream(form="images")
    model = {"name": "convnet", "channels": [4, 4], "batch_norm": True, "hidden": []}
    _, (_, one, *later) = weights_after_each(["backbone.blocks.*.norm"], on, model=model, training={"epochs": 1})
    for after in later:
        moved = toys.differing(one, after)
        assert not [n for n in moved if ".norm." in n]
        assert "backbone.blocks.0.conv.weight" in moved


def test_dropout_of_a_frozen_part_is_off_only_there() -> None:
    model = {**toys.MLP, "dropout": 0.5}
    trainer, _ = weights_after_each(["backbone.layers.0"], toys.stream(), model=model)
    trainer.learner.train_mode()
    modes = {n: m.training for n, m in trainer.learner.model.named_modules() if isinstance(m, nn.Dropout)}
    assert modes == {"backbone.layers.0.dropout": False, "backbone.layers.1.dropout": True}


def test_starts_when_told() -> None:
    for start in (0, 2):
        _, seen = weights_after_each(["backbone.layers.0"], toys.stream(), from_experience=start)
        for i, (before, after) in enumerate(itertools.pairwise(seen)):
            moved = any(n.startswith("backbone.layers.0.") for n in toys.differing(before, after))
            assert moved == (i < start)


def test_a_parameter_may_be_frozen_alone() -> None:
    _, (start, *after) = weights_after_each(["head.linear.bias"], toys.stream(), from_experience=0)
    moved = toys.differing(start, after[-1])
    assert "head.linear.bias" not in moved
    assert "head.linear.weight" in moved


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
        self.norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("layers.1", ["layers.1"]),
        ("layers.1?", ["layers.10", "layers.11"]),
        ("layers.[0-2]", ["layers.0", "layers.1", "layers.2"]),
        ("layers", ["layers"]),
        ("layers.*.bias", [f"layers.{i}.bias" for i in range(12)]),
        ("*", ["layers", "norm"]),
        ("norm.weight", ["norm.weight"]),
        ("layer", []),
        ("1", []),
        ("layers.1.", []),
        ("Layers.1", []),
        ("", []),
    ],
)
def test_patterns_match_by_structure(pattern: str, matches: list[str]) -> None:
    model = Deep()
    there = [n for n, _ in (*model.named_modules(), *model.named_parameters()) if n]
    assert matching(pattern, there) == matches


@pytest.mark.parametrize("pattern", ["backbone.layers.7", "layers.0", "backbone.layer", "head.linear.weights"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"pattern '{pattern}' matches no module or parameter; the model has: ") as e:
        weights_after_each(["backbone.layers.0", pattern], toys.stream(), from_experience=0)
    assert "backbone.layers.0.linear" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_match_without_parameters_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"pattern 'backbone\.layers\.0\.activation' .*"):
        weights_after_each(["backbone.layers.0.activation"], toys.stream(), from_experience=0)


@pytest.mark.parametrize("modules", [["*"], ["backbone", "head"]])
def test_freezing_everything_is_an_error(modules: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"leaves no trainable parameter; freeze fewer modules"):
        weights_after_each(modules, toys.stream())


def test_modules_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.0\.modules: missing"):
        toys.trainer([{"name": "freeze"}], toys.stream())
    with pytest.raises(ConfigError, match=r"strategy\.0\.modules = \[\]: .*at least 1"):
        toys.trainer([{"name": "freeze", "modules": []}], toys.stream())


def test_two_freezes_add_up() -> None:
    on = toys.stream()
    links = [
        {"name": "freeze", "modules": ["backbone.layers.0"], "from_experience": 1},
        {"name": "freeze", "modules": ["backbone.layers.1"], "from_experience": 2},
    ]
    seen: list[dict[str, Tensor]] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            seen.append(trainer.learner.weights())

    trainer = toys.trainer(links, on, observer=Note(), training=OPTIMISERS[0])
    trainer.run()
    moved = [{n.rpartition(".linear")[0] for n in toys.differing(a, b)} for a, b in itertools.pairwise(seen)]
    assert moved == [{"backbone.layers.0", "backbone.layers.1", "head"}, {"backbone.layers.1", "head"}, {"head"}]


def test_momentum_of_the_rest_is_kept() -> None:
    """Freezing rebuilds the optimiser; with kept state, the moments of what still trains must come through."""
    on = toys.stream(experiences=2)
    training = {"optimizer": "adam", "optimizer_state": "kept", "lr": 0.01}
    trainer = toys.trainer(
        [{"name": "freeze", "modules": ["backbone.layers.0"], "from_experience": 1}], on, training=training
    )
    trainer.run()
    optimizer = trainer.learner.state_dict()["optimizer"]
    assert {n.rpartition(".linear")[0] for n in optimizer} == {"backbone.layers.1", "head"}
    assert {float(entry["step"]) for entry in optimizer.values()} == {36.0}
    assert all(isinstance(entry["exp_avg"], torch.Tensor) for entry in optimizer.values())


def test_layers_of_a_language_model_and_the_head_that_shares_its_embedding() -> None:
    model = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}
    patterns = ["backbone.model.embed_tokens", "backbone.model.layers.0"]
    _, (_, first, second, *_) = weights_after_each(patterns, toys.stream(form="texts"), model=model)
    moved = toys.differing(first, second)
    assert moved
    assert all(name.startswith(("backbone.model.layers.1.", "backbone.model.norm.")) for name in moved)
