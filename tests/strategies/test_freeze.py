"""Freezing: bit-identical whatever the optimiser, chosen by path structure, and never by accident nothing or everything."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.module_paths import matching
from cl_lab.records import Stream
from cl_lab.trainer import Record, Silent, Trainer
from strategies.freeze import released


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
    with pytest.raises(
        ConfigError, match=f"pattern '{pattern}' matches no module or parameter; .*the model has: "
    ) as e:
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
    with pytest.raises(
        ConfigError, match=r"strategy\.0\.modules: nothing to freeze; give modules, layers or embeddings$"
    ):
        toys.trainer([{"name": "freeze"}], toys.stream())
    with pytest.raises(ConfigError, match=r"strategy\.0\.modules: nothing to freeze"):
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


# -- layers from the bottom, and what they make kept -------------------------------------------------------------------

TINY = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}
LORA = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"]}
TEXTS = {"training": {"epochs": 3, "batch_size": 12, "lr": 0.02, "optimizer": "adamw", "weight_decay": 0.1}}


def frozen_by(model: dict[str, Any], on: Stream, **knobs: Any) -> set[str]:
    trainer = toys.trainer([{"name": "freeze", "from_experience": 0, **knobs}], on, model=model)
    (link,) = trainer.strategy.links
    link.before_experience(on.experiences[0], trainer.learner)
    return set(link.state_dict()["frozen"])


@pytest.mark.parametrize(
    ("model", "form", "knobs", "prefixes"),
    [
        ({"name": "mlp", "hidden": [8] * 12}, "float", {"layers": 2}, ["layers.0.", "layers.1."]),
        ({"name": "slim-resnet18"}, "images", {"layers": 3}, ["layer1.0.", "layer1.1.", "layer2.0."]),
        ({"name": "slim-resnet18"}, "images", {"embeddings": True}, ["conv1.", "bn1."]),
        ({"name": "slim-resnet18"}, "images", {"layers": 1, "embeddings": True}, ["conv1.", "bn1.", "layer1.0."]),
        (TINY, "texts", {"layers": 1}, ["model.layers.0."]),
        (TINY, "texts", {"layers": 2, "embeddings": True}, ["model.embed_tokens.", "model.layers."]),
        (LORA, "texts", {"layers": 1}, ["model.layers.0."]),
    ],
)
def test_layers_are_counted_from_the_bottom(
    model: dict[str, Any], form: str, knobs: dict[str, Any], prefixes: list[str]
) -> None:
    on = toys.stream(form=form)
    built = toys.trainer([{"name": "naive"}], on, model=model).learner.model
    wanted = {n for n, _ in built.named_parameters() if any(n.startswith(f"backbone.{p}") for p in prefixes)}
    assert frozen_by(model, on, **knobs) == wanted
    assert wanted


@pytest.mark.parametrize(
    ("blocks", "layers", "frozen"),
    [
        (12, 3, {0, 1, 2, 10, 11}),
        (12, 7, {*range(7), 10, 11}),
        (30, 2, {0, 1, *range(10, 20)}),
        (32, 3, {0, 1, 2, *range(10, 30)}),
        (12, 1, {0}),
    ],
)
def test_the_released_code_freezes_what_its_search_in_names_finds(blocks: int, layers: int, frozen: set[int]) -> None:
    """Pythia-160m has 12 layers, LLaMA-2 has 32."""
    model = {"name": "mlp", "hidden": [4] * blocks}
    names = frozen_by(model, toys.stream(), layers=layers, variant="released")
    assert {int(n.split(".")[2]) for n in names} == frozen
    assert len(names) == 2 * len(frozen), "weight and bias"


def test_the_released_codes_counts_for_llama() -> None:
    assert [len(released(k, 32)) for k in (2, 3, 6, 9)] == [12, 23, 28, 31]
    assert set(range(32)) - set(released(6, 32)) == {6, 7, 8, 9}
    assert set(range(32)) - set(released(9, 32)) == {9}


def test_of_a_set_with_gaps_the_bottom_is_cached() -> None:
    """Of the frozen blocks 0, 1, 10 and 11 the model is cut behind 1, and training goes as it does without a cache."""
    on = toys.stream()
    model = {"name": "mlp", "hidden": [16] * 12, "activation": "tanh"}
    link = {"name": "freeze", "layers": 2, "variant": "released"}
    training = {"lr": 0.05, "epochs": 1}
    plain = run([link], on, model=model, training=training)
    kept = run([{**link, "cache": "memory"}], on, model=model, training=training)
    cut: Any = kept.learner.model
    assert cut.cut == "layers.1"
    assert kept.record.measures[-1]["freeze/cached_samples"] == 120
    for name, value in toys.weights_of(plain).items():
        assert torch.allclose(value, toys.weights_of(kept)[name], atol=1e-5), name


def run(links: list[dict[str, Any]], on: Stream, **sections: Any) -> Trainer:
    trainer = toys.trainer(links, on, **sections)
    trainer.run()
    return trainer


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize(
    ("model", "form", "knobs"),
    [
        ({**toys.MLP, "dropout": 0.2}, "float", {"layers": 1}),
        ({"name": "convnet", "channels": [4, 4], "batch_norm": True, "hidden": [8]}, "images", {"layers": 2}),
        (LORA, "texts", {"layers": 1}),
        (TINY, "texts", {"layers": 1, "embeddings": True}),
    ],
)
def test_what_the_bottom_makes_is_made_once(
    cache: str,
    model: dict[str, Any],
    form: str,
    knobs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal losses and weights to those without a cache; samples of the past and of later epochs come out of it."""
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path))
    on = toys.stream(form=form, scoring="constrained") if form == "texts" else toys.stream(form=form)
    replay = {"name": "replay", "memory": 60}
    freeze = {"name": "freeze", **knobs}
    plain = run([replay, freeze], on, model=model, **TEXTS)
    kept = run([replay, {**freeze, "cache": cache}], on, model=model, **TEXTS)
    for one, two in zip(plain.record.losses, kept.record.losses, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
    for name, value in toys.weights_of(plain).items():
        assert torch.allclose(value.float(), toys.weights_of(kept)[name].float(), atol=2e-3), name
    met = kept.record.measures[-1]["freeze/cached_samples"]
    assert 120 < met <= 180, "all samples of experiences 1 and 2, those of 0 that were rehearsed"
    assert kept.record.measures[-1]["freeze/cached_bytes"] % (4 * met) == 0
    assert not list(tmp_path.iterdir()), "a file without a name goes with its process"


def test_a_killed_run_goes_on_to_the_same_weights_with_a_cache(tmp_path: Path) -> None:
    on = toys.stream(form="texts", scoring="constrained")
    links = [{"name": "replay", "memory": 60}, {"name": "freeze", "layers": 1, "cache": "memory"}]
    whole = run(links, on, model=LORA, **TEXTS)

    def resumed() -> Trainer:
        return toys.at_newest(toys.trainer(links, on, model=LORA, checkpoints=tmp_path, **TEXTS))

    for at in (17, 23, 38):
        toys.stopped_at(at, resumed())
    last = resumed()
    assert last.record.steps == 38
    last.run()
    assert not toys.differing(toys.weights_of(whole), toys.weights_of(last))
    assert last.record.matrix == whole.record.matrix


@pytest.mark.parametrize(
    ("links", "model", "says"),
    [
        ([{"name": "freeze"}], toys.MLP, "nothing to freeze; give modules, layers or embeddings"),
        ([{"name": "freeze", "layers": 3}], toys.MLP, r"layers = 3: the model has 2 blocks \(layers.0 to layers.1\)"),
        ([{"name": "freeze", "modules": ["x"], "cache": "memory"}], toys.MLP, "give layers = 1 or more"),
        (
            [{"name": "freeze", "modules": ["backbone.layer.1"]}],
            toys.MLP,
            r"'backbone.layer.1' matches no module or parameter; did you mean 'backbone.layers.1'\?; the model has: back",
        ),
        ([{"name": "freeze", "embeddings": True, "variant": "released"}], toys.MLP, "variant = 'released': says which"),
        ([{"name": "freeze", "embeddings": True}], toys.MLP, "nothing comes before the model's first block"),
        (
            [
                {"name": "remind", "split": "layers.0", "codebooks": None},
                {"name": "freeze", "layers": 1, "cache": "memory"},
            ],
            toys.MLP,
            "another strategy cut it behind 'layers.0'; leave cache out",
        ),
    ],
)
def test_what_cannot_be_frozen_is_one_line(links: list[dict[str, Any]], model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        run(links, toys.stream(), model=model)
    assert "\n" not in str(caught.value)


def test_mistakes_in_paths_are_told_before_anything_is_learnt() -> None:
    with pytest.raises(ConfigError, match="matches no module or parameter"):
        toys.trainer([{"name": "freeze", "modules": ["backbone.layers.7"], "from_experience": 2}], toys.stream())


def test_a_tensor_that_two_modules_share_is_frozen_by_either_name() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    for path in ("head", "head.linear", "backbone.model.embed_tokens"):
        trainer = run([{"name": "freeze", "modules": [path], "from_experience": 0}], on, model=TINY)
        (link,) = trainer.strategy.links
        assert link.state_dict() == {"frozen": ["backbone.model.embed_tokens.weight"]}


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples as there is room for are kept, in place of twice as many as before."""
    cached = [{"name": "freeze", "layers": 1, "cache": "memory"}]
    whole = run(cached, toys.stream(), model=toys.MLP)
    row = int(whole.record.measures[-1]["freeze/cached_bytes"] / whole.record.measures[-1]["freeze/cached_samples"])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10 * row))
    little = run(cached, toys.stream(), model=toys.MLP)
    assert not toys.differing(toys.weights_of(whole), toys.weights_of(little))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=row - 1))
    with pytest.raises(ConfigError, match=r"cache = 'memory': 0 samples are kept, another takes .*; set cache=disk"):
        run(cached, toys.stream(), model=toys.MLP)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_in_bf16_what_is_kept_is_what_would_be_made(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path))
    on = toys.stream(form="texts", scoring="first-token")
    how = {"model": TINY, "engine": {"precision": "bf16"}, "training": {"batch_size": 1, "iterations": 20}}
    freeze = {"name": "freeze", "layers": 1, "embeddings": True}
    plain, kept = (run([{**freeze, **more}], on, **how) for more in ({}, {"cache": cache}))
    assert [one["loss"] for one in plain.record.losses] == [two["loss"] for two in kept.record.losses]
    assert not toys.differing(toys.weights_of(plain), toys.weights_of(kept))


def test_a_cache_wants_all_below_it_frozen_and_to_stand_last() -> None:
    on = toys.stream(form="images")
    cached = {"name": "freeze", "layers": 1, "cache": "memory"}
    with pytest.raises(ConfigError, match=r"conv1.weight below the frozen layers goes on learning.*embeddings=true"):
        run([cached], on, model={"name": "slim-resnet18"})
    with pytest.raises(ConfigError, match=r"training.augmentation changes samples.*cache=none"):
        run(
            [{**cached, "embeddings": True}],
            on,
            model={"name": "slim-resnet18"},
            training={"augmentation": "crop-flip"},
        )
    with pytest.raises(ConfigError, match="a freeze that caches stands last"):
        run([cached, {"name": "replay", "memory": 60}], toys.stream())
