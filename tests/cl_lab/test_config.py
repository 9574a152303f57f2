"""Configuration files: what is wrong is said in one line, with its place, value and the nearest name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_lab import config, registry
from cl_lab.config import RunConfig, StrategyConfig, dump, label_of, parse, read
from cl_lab.errors import ConfigError

BASE = "scenario: split-digits\nstrategy: {name: ewc, strength: 100.0}\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Reads a configuration from text."""

    def read_text(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return read(path, overrides)

    return read_text


# -- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "why"),
    [
        # misspelt keys
        ("trainig: {epochs: 3}", [], r"trainig: unknown key; did you mean 'training'\?"),
        ("training: {epoch: 3}", [], r"training\.epoch: unknown key; did you mean 'epochs'\?"),
        ("engine: {xyz: 3}", [], r"engine\.xyz: unknown key; known: device, kind, precision, processes, threads, zero"),
        ("", ["training.epoch=3"], r"training\.epoch: unknown key; did you mean 'epochs'\?"),
        # types and ranges
        ("seed: one", [], r"seed = 'one': input should be a valid integer"),
        ("seed: 1.5", [], r"seed = 1\.5: input should be a valid integer"),
        ("seed: true", [], r"seed = True: input should be a valid integer"),
        ("seed: -1", [], r"seed = -1: input should be greater than or equal to 0"),
        ("seed: ???", [], r"seed = '\?\?\?': input should be a valid integer"),
        ("seeds: [0, a]", [], r"seeds\.1 = 'a': input should be a valid integer"),
        ("seeds: [0, 0]", [], r"seeds: a seed stands twice"),
        ("seeds: [0, -1]", [], r"seeds: seeds must be 0 or greater"),
        ("seeds: []", [], r"seeds = \[\]: list should have at least 1 item"),
        ("seeds: 3", [], r"seeds = 3: input should be a valid list"),
        ("training: {lr: fast}", [], r"training\.lr = 'fast': input should be a valid number"),
        ("training: {lr: 0}", [], r"training\.lr = 0: input should be greater than 0"),
        ("training: {lr: .inf}", [], r"training\.lr = inf: input should be a finite number"),
        ("training: {lr: .nan}", [], r"training\.lr = nan: input should be (a finite number|greater than 0)"),
        ("training: {epochs: 2.0}", [], r"training\.epochs = 2\.0: input should be a valid integer"),
        ("training: {optimizer: sdg}", [], r"training\.optimizer = 'sdg': input should be 'sgd', 'adam' or 'adamw'"),
        ("training: {betas: [0.9]}", [], r"training\.betas"),
        ("training: {betas: [0.9, x]}", [], r"training\.betas\.1 = 'x': input should be a valid number"),
        ("training: 3", [], r"training = 3: must be a mapping"),
        ("training:", [], r"training = None: must be a mapping"),
        ("engine: {zero: 4}", [], r"engine\.zero = 4: input should be less than or equal to 3"),
        ("engine: {processes: 0}", [], r"engine\.processes = 0: input should be greater than or equal to 1"),
        ("out: ''", [], r"out = '': string should have at least 1 character"),
        ("1: 2", [], r"1"),
        # what does not go together
        ("engine: {kind: torch, zero: 2}", [], r"engine: zero=2 needs DeepSpeed; set engine\.kind=deepspeed"),
        ("training: {patience: 3}", [], r"training: patience needs a validation split; set training\.validation"),
        ("training: {patience: 3, validation: 0.1, iterations: 9}", [], r"training: patience counts epochs"),
        ("training: {batch_size: 2, accumulate: 3}", [], r"training: accumulate=3 is larger than batch_size=2"),
        # interpolation
        ("seed: ${nope}", [], r"[Ii]nterpolation key 'nope' not found full_key: seed"),
        ("seed: ${seed}", [], r"[Rr]ecursive interpolation"),
        ("seed: ${oc.env:CL_LAB_NO_SUCH}", [], r"'CL_LAB_NO_SUCH' not found"),
        ("seed: ${training.epochs", [], r"cannot be read: .*seed"),
        # overrides
        ("", ["seed"], r"override 'seed': must be key=value, for example training\.epochs=2"),
        ("", ["=3"], r"override '=3': must be key=value"),
        ("", ["--seed=3"], r"override '--seed=3': must be key=value"),
        ("", ["seed=1=2"], r"seed = '1=2': input should be a valid integer"),
        ("", ["seed=[1"], r"override 'seed=\[1': not a valid YAML value"),
        ("", ["training.epochs.x=2"], r"training\.epochs = \{'x': 2\}: input should be a valid integer"),
        ("", ["training..epochs=2"], r"training\.: unknown key"),
        ("", ["checkpoint.weights_at=[5]"], r"checkpoint: weights_at=\[5\] is read with experiences=true only; set it"),
        ("seeds: [1]", ["seeds.x=2"], r"override 'seeds\.x=2': 'seeds\.x' leads nowhere .*count into lists from 0"),
        ("seeds: [1]", ["seeds.4=2"], r"list index out of range"),
    ],
)
def test_one_line_says_what_is_wrong(load: Any, text: str, overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load(BASE + text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "c.yaml: " in message or message.startswith("override ") or "c.yaml;" in message
    assert "pydantic" not in message
    assert "RunConfig" not in message
    assert "instance of" not in message


@pytest.mark.parametrize(
    ("text", "overrides", "why"),
    [
        ("", [], r"scenario: missing; it has no default and must be given"),
        ("model: mlp", [], r"scenario: missing"),
        ("- a\n- b", [], r"must hold a mapping \(scenario, model, strategy, …\), got list"),
        ("- a\n- b", ["seed=1"], r"must hold a mapping"),
        ("a: [1", [], r"not valid YAML: "),
        ("\tscenario: x", [], r"not valid YAML: "),
        ("scenario: a\nscenario: b", [], r"not valid YAML: .*duplicate key scenario"),
        ("scenario: !!python/object:os.system {}", [], r"not valid YAML: "),
        ("scenario: ''", [], r"scenario\.name = '': string should have at least 1 character"),
        ("scenario:", [], r"scenario = None: must be a mapping, or a name"),
        ("scenario: [a]", [], r"scenario = \['a'\]: must be a mapping, or a name"),
        ("scenario: {nam: x}", [], r"scenario\.name: missing"),
        ("scenario: {name: 3}", [], r"scenario\.name = 3: input should be a valid string"),
        ("scenario: x\nstrategy: []", [], r"strategy: an empty chain; name at least one strategy"),
        ("scenario: x\nstrategy: [3]", [], r"strategy\.chain\.0 = 3: must be a mapping, or a name"),
        ("scenario: x\nstrategy: [[naive]]", [], r"strategy\.chain\.0 = \['naive'\]: must be a mapping, or a name"),
        ("scenario: x\nstrategy: [{memory: 3}]", [], r"strategy\.chain\.0\.name: missing"),
        ("scenario: x\nstrategy: {chain: naive}", [], r"strategy\.chain = 'naive': input should be a valid list"),
        ("scenario: x\nstrategy: {strength: 3}", [], r"strategy\.name: missing"),
        ("scenario: x\nstrategies: [naive, 3]", [], r"strategies\.1 = 3: must be a mapping, or a name"),
        ("scenario: x\nstrategies: []", [], r"strategies = \[\]: list should have at least 1 item"),
        ("scenario: x\nstrategy: [naive, ewc]", ["strategy.memory=5"], r"'strategy\.memory' leads nowhere"),
    ],
)
def test_whole_files_that_are_wrong(load: Any, text: str, overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "absent.yaml", "does not exist; shipped examples are in"),
        (tmp_path, "is a folder; give"),
    ):
        with pytest.raises(ConfigError, match=rf"configuration file '{path}' {why}"):
            read(path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError) as caught:
        read(binary)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("document", [None, 3, "x", [1]])
def test_a_document_must_be_a_mapping(document: Any) -> None:
    with pytest.raises(ConfigError, match=r"job\.json: must hold a mapping"):
        parse(document, "job.json")


# -- what is right ---------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    c = parse({"scenario": "split-digits"}, "x")
    assert c.strategy is None
    assert c.model.name == "mlp"
    assert (c.training.epochs, c.training.batch_size, c.training.optimizer) == (1, 64, "sgd")
    assert c.tracking.uri == "sqlite:///mlruns.db"
    assert not c.engine.deepspeed


@pytest.mark.parametrize(("kind", "zero", "deepspeed"), [("auto", 0, False), ("auto", 1, True), ("deepspeed", 0, True)])
def test_deepspeed_when_asked(kind: str, zero: int, deepspeed: bool) -> None:
    assert parse({"scenario": "x", "engine": {"kind": kind, "zero": zero}}, "x").engine.deepspeed == deepspeed


def test_overrides(load: Any) -> None:
    c = load(
        BASE, "training.epochs=7", "strategy.strength=1e5", "seeds=[3, 4]", "tracking.uri=null", "seed=2", "seed=9"
    )
    assert c.training.epochs == 7
    assert c.strategy.knobs == {"strength": 1e5}
    assert c.seeds == [3, 4]
    assert c.tracking.uri is None
    assert c.seed == 9, "the last one counts"
    assert load(BASE, "training={epochs: 2}", "training.lr=0.5").training.lr == 0.5
    assert load(BASE + "training: {lr: 0.5}", "training={epochs: 2}").training.lr == 0.5, "a section is added to"
    assert load(BASE, "scenario.data_dir=/a=b").scenario.knobs == {"data_dir": "/a=b"}


def test_a_plugin_given_anew_keeps_no_knob_of_the_old(load: Any) -> None:
    assert load(BASE, "strategy=replay").strategy == StrategyConfig(name="replay")
    assert load(BASE, "strategy={name: replay, memory: 3}").strategy.knobs == {"memory": 3}
    chained = load(BASE, "strategy=[{name: freeze, modules: [head]}, replay]").strategy
    assert [link.name for link in chained.links] == ["freeze", "replay"]


def test_overrides_reach_names_without_knobs(load: Any) -> None:
    text = "scenario: split-digits\nmodel: mlp\nstrategy: ewc\nstrategies: [naive, ewc, [freeze, replay]]\n"
    c = load(
        text,
        "scenario.experiences=2",
        "model.hidden=[8]",
        "strategy.strength=3",
        "strategies.1.strength=4",
        "strategies.2.1.memory=5",
    )
    assert c.scenario.knobs == {"experiences": 2}
    assert c.model.knobs == {"hidden": [8]}
    assert c.strategy.knobs == {"strength": 3}
    assert c.strategies[1].knobs == {"strength": 4}
    assert c.strategies[2].links[1].knobs == {"memory": 5}
    assert load("scenario: x\nstrategy: [naive, replay]", "strategy.1.memory=5").strategy.links[1].knobs == {
        "memory": 5
    }


def test_interpolation(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_EPOCHS", "4")
    c = load(
        BASE + "seed: 6\ntraining: {batch_size: '${seed}', epochs: '${oc.decode:${oc.env:TOY_EPOCHS}}'}",
        "out=runs/${scenario}-${seed}",
    )
    assert c.training.batch_size == 6
    assert c.training.epochs == 4
    assert c.out == "runs/split-digits-6"
    assert load(BASE + "training: {batch_size: '${seed}'}", "seed=8").training.batch_size == 8, "after the overrides"


@pytest.mark.parametrize(
    "document",
    [
        {"scenario": "x"},
        {"scenario": {"name": "x", "options": {"a": [1, None, {"b": 2.5}]}}, "strategy": "ewc", "seeds": [1, 2]},
        {"scenario": "x", "strategy": ["freeze", {"name": "replay", "memory": 3}], "out": "über/λ"},
        {"scenario": "x", "strategies": ["naive", {"chain": ["a", "b"], "label": "both"}, ["a", {"name": "b"}]]},
        {"scenario": "x", "training": {"betas": [0.8, 0.9], "milestones": [0.1], "lr": 1e-7, "clip_norm": 1}},
        {"scenario": "x", "tracking": {"uri": None}, "evaluation": {"every_steps": 3}, "engine": {"zero": 3}},
    ],
)
def test_what_is_saved_reads_back(document: dict[str, Any], tmp_path: Path) -> None:
    c = parse(document, "x")
    path = tmp_path / "config.yaml"
    path.write_text(dump(c))
    assert read(path) == c
    assert dump(read(path)) == dump(c)


def test_chains_have_names() -> None:
    chain = parse({"scenario": "x", "strategy": ["freeze", {"name": "replay", "memory": 3}]}, "x").strategy
    assert chain is not None
    assert chain.name == "freeze+replay"
    assert [(link.name, link.knobs) for link in chain.links] == [("freeze", {}), ("replay", {"memory": 3})]


def test_labels_tell_namesakes_apart() -> None:
    document = [
        "naive",
        {"name": "ewc", "strength": 1.0},
        {"name": "ewc", "strength": 2.0},
        {"name": "ewc", "label": "mine"},
    ]
    strategies = parse({"scenario": "x", "strategies": document}, "x").strategies
    assert strategies is not None
    assert [label_of(s, strategies) for s in strategies] == ["naive", "ewc(strength=1.0)", "ewc(strength=2.0)", "mine"]


def test_every_key_is_documented() -> None:
    for section in (config.TrainingConfig, config.EvaluationConfig, config.EngineConfig, config.CheckpointConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


# -- what is shipped -------------------------------------------------------------------------------------------------

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yaml"))


@pytest.mark.checkout
def test_there_are_shipped_configs() -> None:
    assert len(SHIPPED) >= 4
    assert "quickstart" in {p.stem for p in SHIPPED}


@pytest.mark.checkout
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    """Down to every plug-in's knobs; no data is read."""
    c = read(path)
    assert c.strategy or c.strategies
    registry.create("scenarios", {"name": c.scenario.name, **c.scenario.knobs}, "scenario")
    registry.create("models", {"name": c.model.name, **c.model.knobs}, "model")
    strategies = [*([c.strategy] if c.strategy else []), *(c.strategies or [])]
    for strategy in strategies:
        links = [registry.create("strategies", {"name": s.name, **s.knobs}, "strategy") for s in strategy.links]
        assert links
    labels = [label_of(s, c.strategies or ()) for s in c.strategies or ()]
    assert len(set(labels)) == len(labels), "strategies of a comparison must be told apart"
    assert parse(yaml.safe_load(dump(c)), "again") == c
    assert re.search(r"cl-lab (run|compare) " + re.escape(f"configs/{path.name}"), path.read_text()), (
        "says how to run it"
    )


@pytest.mark.parametrize("training", [{"betas": [1, 2]}, {"betas": [0.9, -0.1]}, {"milestones": [5]}])
def test_numbers_in_lists_have_bounds_too(training: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"training\.(betas|milestones)\.\d = "):
        parse({"scenario": "x", "training": training}, "test")


# -- a strategy's own training ----------------------------------------------------------------------------------------


def test_a_strategy_may_be_trained_in_its_own_way() -> None:
    document = {
        "scenario": "split-digits",
        "training": {"iterations": 100, "lr": 0.1},
        "strategies": ["naive", {"name": "ewc", "strength": 3.0, "training": {"lr": 0.01, "epochs": 2}}],
    }
    config = parse(document, "test")
    assert config.strategies is not None
    naive, ewc = config.strategies
    assert config.of(naive) is config.training
    own = config.of(ewc)
    assert (own.lr, own.epochs, own.iterations) == (0.01, 2, None)
    assert ewc.knobs == {"strength": 3.0}
    single = config.model_copy(update={"strategy": ewc, "strategies": None}).settled()
    assert single.training == own
    assert single.strategy is not None
    assert single.strategy.training is None
    assert single.settled() is single
    assert parse(yaml.safe_load(dump(config)), "again") == config


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lrr": 1}, r"strategies\.1\.training\.lrr: unknown key; did you mean 'lr'"),
        ({"lr": -1.0}, r"strategies\.1\.training\.lr"),
    ],
)
def test_a_strategys_own_training_is_checked(training: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse({"scenario": "split-digits", "strategies": ["naive", {"name": "ewc", "training": training}]}, "test")
    assert "\n" not in str(caught.value)
