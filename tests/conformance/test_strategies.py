"""What every registered strategy keeps, built-in or a stranger's: learning, determinism, resuming, leaving its host alone.

A strategy brings its own test settings with ``conformance_knobs()``; nothing here asks for a name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from cl_lab import checkpoint, knobs, registry, seeding
from cl_lab.chain import Chain
from cl_lab.errors import ConfigError
from cl_lab.protocols import Learner, Strategy, tensors_of
from cl_lab.records import Batch, Experience, Stream
from cl_lab.trainer import Record, Silent, Trainer

NAMES = registry.names("strategies")
SIX = {"naive", "joint", "cumulative", "ewc", "replay", "freeze"}

every = pytest.mark.parametrize("name", NAMES)


def strategy_class(name: str) -> type[Strategy]:
    cls, _ = registry.load("strategies", name)
    assert issubclass(cls, Strategy)
    return cls


def skip_unless_it_classifies(*names: str) -> None:
    for name in names:
        if "classification" not in strategy_class(name).objectives:
            pytest.skip(f"{name} does not learn classification, which the toys are")


def stream_for(*names: str, **knobs: Any) -> Stream:
    """A toy stream that these strategies accept: one that tells task labels where one of them needs those."""
    skip_unless_it_classifies(*names)
    if any(strategy_class(n).task_conditioned for n in names):
        knobs.setdefault("incremental", "task")
    return toys.stream(**knobs)


def run(name: str, on: Stream, **settings: Any) -> Trainer:
    skip_unless_it_classifies(name)
    trainer = toys.trainer([toys.own_settings(name)], on, **settings)
    trainer.run()
    return trainer


def test_the_built_ins_are_registered() -> None:
    assert set(NAMES) >= SIX


# -- knobs ---------------------------------------------------------------------------------------------------------


@every
def test_says_what_it_is(name: str) -> None:
    cls = strategy_class(name)
    assert dataclasses.is_dataclass(cls)
    first = (cls.__doc__ or "").partition("\n")[0]
    assert first
    assert not first.startswith(f"{cls.__name__}("), "a docstring of its own, not the dataclass's"
    assert {"name": name, "summary": first} in registry.summaries("strategies")
    for knob in knobs.describe(cls):
        assert knob["doc"], f"{name}.{knob['name']} has no documentation"
        assert knob["type"] not in ("Any", "object"), f"{name}.{knob['name']} takes anything"


@every
def test_fields_are_knobs_or_state(name: str) -> None:
    for field in dataclasses.fields(strategy_class(name)):
        assert field.init != field.name.startswith("_"), f"{field.name}: knobs are public, state is _underscored"


@every
def test_refuses_unknown_knobs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.strenght: unknown key") as caught:
        registry.create("strategies", {**toys.own_settings(name), "strenght": 1}, "strategy")
    assert "\n" not in str(caught.value)


# -- learning ------------------------------------------------------------------------------------------------------


@every
def test_learns_a_toy_stream(name: str) -> None:
    record = run(name, toys.stream(incremental="task")).record
    last = len(record.matrix) - 1
    if strategy_class(name).reference:
        assert sum(record.matrix[last]) / (last + 1) >= 0.9
    else:
        assert sum(record.matrix[i][i] for i in range(last + 1)) / (last + 1) >= 0.9


@every
@pytest.mark.parametrize(
    ("head", "incremental", "form"),
    [
        ("single", "class", "bytes"),
        ("growing", "class", "float"),
        ("multi", "task", "float"),
        ("single", "domain", "float"),
    ],
)
def test_works_with_every_head(name: str, head: str, incremental: str, form: str) -> None:
    on = toys.stream(incremental=incremental, form=form)
    if strategy_class(name).task_conditioned and incremental != "task":
        with pytest.raises(ConfigError, match=f"strategy '{name}' needs the task label of every sample") as caught:
            run(name, on)
        assert "\n" not in str(caught.value)
        return
    done = run(name, on, model={**toys.MLP, "head": head}, training={"iterations": 5})
    assert [len(row) for row in done.record.matrix] == [3, 3, 3]
    assert all(w.isfinite().all() for w in toys.weights_of(done).values())
    assert all(t.isfinite().all() for t in tensors_of(done.strategy.state_dict()))


@every
def test_knows_what_it_needs_of_boundaries(name: str) -> None:
    hidden = stream_for(name, boundaries=False)
    if strategy_class(name).needs_boundaries:
        with pytest.raises(ConfigError, match=f"strategy '{name}' needs to know where an experience ends") as caught:
            run(name, hidden)
        assert "\n" not in str(caught.value)
    else:
        head = "multi" if hidden.task_labels else "growing"
        # From a memory that holds a few samples of each class, a pass over it is not enough.
        passes = {"training": {"epochs": 5}} if strategy_class(name).learns_when_asked else {}
        done = run(name, hidden, model={**toys.MLP, "head": head}, **passes)
        assert sum(done.record.matrix[i][i] for i in range(3)) / 3 >= 0.9


@every
def test_same_seed_same_run(name: str) -> None:
    on = stream_for(name)
    one, two, other = (run(name, on, seed=seed) for seed in (5, 5, 6))
    toys.assert_same(one, two)
    assert toys.differing(toys.weights_of(one), toys.weights_of(other))


@every
def test_accumulation_changes_nothing(name: str) -> None:
    on = stream_for(name)
    whole, pieces = (run(name, on, training={"accumulate": k, "lr": 0.02, "clip_norm": 5.0}) for k in (1, 3))
    for key, value in toys.weights_of(whole).items():
        assert torch.allclose(value, toys.weights_of(pieces)[key], atol=1e-5), key


# -- chains --------------------------------------------------------------------------------------------------------


@every
def test_naive_beside_it_changes_nothing(name: str) -> None:
    on = stream_for(name)
    alone = run(name, on)
    for links in ([{"name": "naive"}, toys.own_settings(name)], [toys.own_settings(name), {"name": "naive"}]):
        chained = toys.trainer(links, on)
        chained.run()
        assert chained.record.matrix == alone.record.matrix
        assert not toys.differing(toys.weights_of(alone), toys.weights_of(chained))


@every
def test_freeze_before_it_holds(name: str) -> None:
    on = stream_for(name)
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(Silent):
        def scored(self, record: Record) -> None:
            seen.append(trainer.learner.weights())

    links = [{"name": "freeze", "modules": ["backbone.layers.0"], "from_experience": 1}, toys.own_settings(name)]
    try:
        trainer = toys.trainer(links, on, observer=Watch())
    except ConfigError as error:
        if "pattern 'backbone.layers.0' matches no module or parameter" not in str(error):
            raise
        pytest.skip(f"{name} puts another model in place of the MLP, and is refused before it learns")
    trainer.run()
    start, *after = seen
    first = {n for n in start if n.startswith("backbone.layers.0.")}
    assert first <= set(toys.differing(start, after[0])), "the first experience trains everything"
    for later in after[1:]:
        assert not first & set(toys.differing(after[0], later)), "from the second on, the first layer stands still"


@pytest.mark.slow
@every
@pytest.mark.parametrize("partner", NAMES)
def test_chains_work_or_say_why_not(name: str, partner: str) -> None:
    links = [toys.own_settings(name), toys.own_settings(partner)]
    try:
        trainer = toys.trainer(links, stream_for(name, partner), training={"iterations": 3})
        trainer.run()
    except ConfigError as error:
        # Or a link that puts another model in place of the MLP took away what the other one names.
        assert "chain" in str(error) or "matches no module" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert [len(row) for row in trainer.record.matrix] == [3, 3, 3]


# -- survival ------------------------------------------------------------------------------------------------------

# Everything that a resumed run could forget, dropout's generator besides.
HARD = toys.HARD | {"model": {**toys.MLP, "dropout": 0.2, "head": "growing"}}


class Killed(BaseException):
    """Stands for kill −9: nothing is saved on the way out."""


class KillAt(Silent):
    """Kills the run at a step."""

    trainer: Trainer

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
        if self.trainer.record.steps >= self.at:
            raise Killed


def same_outcome(one: Trainer, two: Trainer) -> None:
    assert one.record.matrix == two.record.matrix
    assert one.record.initial == two.record.initial
    assert one.record.anytime == two.record.anytime
    assert (one.record.steps, one.record.samples) == (two.record.steps, two.record.samples)
    assert not toys.differing(toys.weights_of(one), toys.weights_of(two))
    assert checkpoint.equal(one.strategy.state_dict(), two.strategy.state_dict())


def resumed(name: str, on: Stream, folder: Path, **settings: Any) -> Trainer:
    return toys.at_newest(toys.trainer([toys.own_settings(name)], on, checkpoints=folder, **settings))


def variants(name: str) -> list[Stream]:
    told = stream_for(name)
    return [told] if strategy_class(name).needs_boundaries else [told, stream_for(name, boundaries=False)]


@pytest.mark.slow
@every
def test_stopped_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    for i, on in enumerate(variants(name)):
        folder = tmp_path / str(i)
        whole = run(name, on, **HARD)
        assert whole.record.steps >= 54
        # In the middle, at the last step of an experience, at the first of the next, at every_steps itself.
        for at in (1, 7, 18, 19, 20, whole.record.steps - 1):
            toys.stopped_at(at, resumed(name, on, folder, **HARD, checkpoint={"every_steps": 10}))
        trainer = resumed(name, on, folder, **HARD)
        trainer.run()
        same_outcome(trainer, whole)


@pytest.mark.slow
@every
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    for i, on in enumerate(variants(name)):
        folder = tmp_path / str(i)
        whole = run(name, on, **HARD)
        for at in (3, 9, 25, 38, 52):  # never where a checkpoint was written
            observer = KillAt(at)
            trainer = resumed(name, on, folder, **HARD, checkpoint={"every_steps": 5}, observer=observer)
            observer.trainer = trainer
            with pytest.raises(Killed):
                trainer.run()
        trainer = resumed(name, on, folder, **HARD)
        trainer.run()
        same_outcome(trainer, whole)


@every
def test_state_survives_the_disk(name: str, tmp_path: Path) -> None:
    done = run(name, stream_for(name))
    state = done.strategy.state_dict()
    flat, _ = checkpoint.flatten(state)
    assert len(flat) == len(list(tensors_of(state)))
    assert checkpoint.equal(checkpoint.unflatten(*checkpoint.flatten(state)), state)
    read = checkpoint.read(checkpoint.save(tmp_path, 1, state, keep=1))
    assert checkpoint.equal(read, state)
    fresh = toys.trainer([toys.own_settings(name)], stream_for(name)).strategy
    fresh.load_state_dict(read)
    assert checkpoint.equal(fresh.state_dict(), state)


@every
def test_state_of_a_beginner_survives(name: str, tmp_path: Path) -> None:
    make = lambda: toys.trainer([toys.own_settings(name)], stream_for(name)).strategy  # noqa: E731
    state = make().state_dict()
    fresh = make()
    fresh.load_state_dict(checkpoint.read(checkpoint.save(tmp_path, 0, state, keep=1)))
    assert checkpoint.equal(fresh.state_dict(), state)


# -- the host ------------------------------------------------------------------------------------------------------

PROTOCOL = {n for n in vars(Learner) if not n.startswith("_")}


class Narrow:
    """A learner that shows the protocol and nothing else, and takes no assignment."""

    def __init__(self, learner: Any) -> None:
        object.__setattr__(self, "_learner", learner)
        object.__setattr__(self, "asked_for", set())

    def __getattr__(self, name: str) -> Any:
        assert name in PROTOCOL, f"learner.{name} is not part of what a strategy may use"
        object.__getattribute__(self, "asked_for").add(name)
        return getattr(object.__getattribute__(self, "_learner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError(f"assigned learner.{name}")


class Watched(Chain):
    """A chain that looks, around every hook, whether weights, generators, batches and experiences were left alone."""

    def _hook(self, hook: str, *arguments: Any, learner: Any, **named: Any) -> Any:
        watched = [a for a in (*arguments, *named.values()) if isinstance(a, (Batch, Experience, torch.Tensor))]
        before = [_copy(a) for a in watched]
        weights, rng = learner.weights(), seeding.global_state()
        narrow = Narrow(learner)
        result = getattr(super(), hook)(*arguments, learner=narrow, **named)
        if "set_weights" in narrow.asked_for:
            assert hook in ("before_experience", "after_experience"), f"{hook} sets weights in the midst of training"
        else:
            assert not toys.differing(weights, learner.weights()), f"{hook} changed weights"
        assert checkpoint.equal(rng, seeding.global_state()), f"{hook} drew from a global generator, not learner.rng"
        for value, old in zip(watched, before, strict=True):
            assert _same(value, old), f"{hook} changed what it was given"
        return result

    def before_experience(self, experience: Experience, learner: Any) -> None:
        self._hook("before_experience", experience, learner=learner)

    def training_set(self, experience: Experience, learner: Any) -> Any:
        return self._hook("training_set", experience, learner=learner)

    def mix(self, batch: Batch, learner: Any) -> Batch | None:
        return self._hook("mix", batch, learner=learner)

    def learning_rate(self, batch: Batch, learner: Any) -> float | None:
        return self._hook("learning_rate", batch, learner=learner)

    def observe_outputs(self, batch: Batch, outputs: torch.Tensor, learner: Any) -> None:
        self._hook("observe_outputs", batch, outputs, learner=learner)

    def encode(self, data: Any, learner: Any) -> Any:
        return self._hook("encode", data, learner=learner)

    def predict(self, batch: Batch, learner: Any) -> torch.Tensor:
        return self._hook("predict", batch, learner=learner)

    def adjust_loss(self, loss: torch.Tensor, *, batch: Batch, outputs: torch.Tensor, learner: Any) -> torch.Tensor:
        return self._hook("adjust_loss", loss, batch=batch, outputs=outputs, learner=learner)

    def adjust_gradients(self, learner: Any) -> None:
        self._hook("adjust_gradients", learner=learner)

    def after_step(self, learner: Any) -> None:
        super().after_step(Narrow(learner))

    def after_experience(self, experience: Experience, learner: Any) -> None:
        self._hook("after_experience", experience, learner=learner)

    def penalty(self, learner: Any) -> float:
        return self._hook("penalty", learner=learner)


def _copy(value: Any) -> Any:
    if isinstance(value, Batch):
        held = Batch(value.x.clone(), value.y.clone(), value.t.clone(), value.current, value.weight, dict(value.extra))
        held.epoch, held.raw = value.epoch, value.raw
        return held
    if isinstance(value, Experience):
        return {k: v for k, v in vars(value).items() if k != "_made"}
    return value.detach().clone()


def _same(value: Any, old: Any) -> bool:
    if isinstance(value, Batch):
        pairs = ((value.x, old.x), (value.y, old.y), (value.t, old.t))
        same = all(torch.equal(a, b) for a, b in pairs) and value.extra.keys() == old.extra.keys()
        same = same and all(value.extra[k] is old.extra[k] for k in old.extra)
        return same and (value.current, value.epoch, value.raw) == (old.current, old.epoch, old.raw)
    if isinstance(value, Experience):
        return {k: v for k, v in vars(value).items() if k != "_made"} == old
    return torch.equal(value.detach(), old)


def in_turn(on: Stream, turn: list[int]) -> Stream:
    """The stream, whose training samples can be had in their own experience only."""

    def guarded(e: Experience) -> Experience:
        def train() -> Any:
            assert turn[0] == e.index, f"looked at experience {e.index} during experience {turn[0]}"
            return e.train

        return Experience(e.index, e.name, e.classes, train, lambda: e.test)

    return dataclasses.replace(on, experiences=tuple(guarded(e) for e in on.experiences))


@every
def test_leaves_its_host_alone(name: str) -> None:
    turn = [0]

    class Count(Silent):
        def scored(self, record: Record) -> None:
            turn[0] = len(record.matrix)

    for on in variants(name):
        turn[0] = 0
        if not strategy_class(name).reference:
            on = in_turn(on, turn)
        run(name, on, chain=Watched, observer=Count())


@every
def test_says_whether_it_gathers_samples_of_several_experiences(name: str) -> None:
    """What it brings together is shuffled, what is one experience's own keeps the order of an ordered stream."""
    on = stream_for(name)
    own = {id(e): {tuple(row) for row in e.train.x.flatten(1).tolist()} for e in on.experiences}
    mixed, orders = [], []

    class Looking(Chain):
        def training_set(self, experience: Experience, learner: Learner) -> Any:
            data = super().training_set(experience, learner)
            if data is not None and data.raw:
                rows = {tuple(row) for row in data.x.flatten(1).tolist()}
                mixed.append(bool(rows - own[id(experience)]))
            return data

        def mix(self, batch: Batch, learner: Learner) -> Batch | None:
            if batch.raw:
                orders.append(batch.y[: batch.current].clone())
            return super().mix(batch, learner)

        def overrides(self, hook: str) -> bool:
            return hook == "mix" or super().overrides(hook)

    for e in on.experiences:
        e.ordered = True
        e.train.y.copy_(e.train.y.sort().values)
        own[id(e)] = {tuple(row) for row in e.train.x.flatten(1).tolist()}
    gathers = strategy_class(name).gathers
    run(name, on, chain=Looking, training={"epochs": 1, "batch_size": 12})
    assert any(mixed) == gathers
    if orders and gathers:
        assert any(bool((y.diff() < 0).any()) for y in orders)
    elif orders:
        assert all(bool((y.diff() >= 0).all()) for y in orders)


@every
def test_prepare_gives_a_model_to_train(name: str) -> None:
    on = stream_for(name)
    trainer = toys.trainer([toys.own_settings(name)], on)
    assert isinstance(trainer.learner.model, torch.nn.Module)
    assert trainer.learner.trainable_parameters > 0


@every
def test_is_not_moved_by_test_samples(name: str) -> None:
    on = stream_for(name)
    blind = dataclasses.replace(
        on,
        experiences=tuple(
            Experience(e.index, e.name, e.classes, lambda e=e: e.train, lambda e=e: e.test.take(torch.arange(3)))
            for e in on.experiences
        ),
    )
    assert not toys.differing(toys.weights_of(run(name, on)), toys.weights_of(run(name, blind)))
