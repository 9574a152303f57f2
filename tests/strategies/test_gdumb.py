"""GDumb: what its greedy memory keeps, and that its model knows nothing but that memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.records import Experience, Stream, TensorData
from cl_lab.trainer import Record, Silent, Trainer
from strategies.gdumb import GDumb


def run(on: Stream, **knobs: Any) -> tuple[Trainer, list[TensorData]]:
    """A run, and the memory at the end of each experience."""
    memories: list[TensorData] = []
    sections = knobs.pop("sections", {})

    class Note(Silent):
        def scored(self, record: Record) -> None:
            if record.matrix:
                (strategy,) = trainer.strategy.links
                data = strategy.training_set(on.experiences[0], trainer.learner)
                memories.append(data.map(torch.clone))

    trainer = toys.trainer([{"name": "gdumb", **knobs}], on, observer=Note(), **sections)
    trainer.run()
    return trainer, memories


def names(data: TensorData, label: int | None = None) -> set[bytes]:
    rows = data.x if label is None else data.x[data.y == label]
    return {x.numpy().tobytes() for x in rows}


@pytest.mark.parametrize("head", ["single", "growing"])
def test_is_naive_training_of_a_fresh_model_on_the_memory(head: str) -> None:
    on = toys.stream()
    settings: dict[str, Any] = {"model": {**toys.MLP, "head": head}, "training": {"optimizer": "adam", "lr": 0.01}}
    trainer, memories = run(on, memory=30, sections=settings)
    last = Experience(2, "the memory", range(6), lambda: memories[-1], lambda: on.experiences[2].test)
    naive = toys.trainer([{"name": "naive"}], dataclasses.replace(on, experiences=(last,)), **settings)
    naive.run()
    assert not toys.differing(toys.weights_of(naive), toys.weights_of(trainer))


def test_is_balanced_between_the_classes_met() -> None:
    on = toys.stream()
    _, memories = run(on, memory=32)
    assert [m.y.bincount(minlength=6).tolist() for m in memories] == [
        [16, 16, 0, 0, 0, 0],
        [8, 8, 8, 8, 0, 0],
        [6, 6, 5, 5, 5, 5],
    ]
    for e, held in zip(on.experiences, memories, strict=True):
        pairs = {(x.numpy().tobytes(), int(y)) for x, y in zip(e.train.x, e.train.y, strict=True)}
        mine = {(x.numpy().tobytes(), int(y)) for x, y in zip(held.x, held.y, strict=True) if int(y) // 2 == e.index}
        assert mine <= pairs


def test_room_is_made_by_leaving_never_by_changing() -> None:
    """As new classes come, an old class only loses samples, and not the last that came."""
    _, memories = run(toys.stream(), memory=32)
    for label in (0, 1):
        first, second, third = (names(m, label) for m in memories)
        assert third < second < first


def test_greedy_keeps_what_came_first() -> None:
    on = toys.stream(incremental="domain")
    _, memories = run(on, memory=30)
    assert names(memories[0]) == names(memories[1]) == names(memories[2])
    assert names(memories[0]) < names(on.experiences[0].train)


def test_greedy_fills_what_is_free() -> None:
    on = toys.stream(incremental="domain")
    _, memories = run(on, memory=100)
    first, second = (names(e.train) for e in on.experiences[:2])
    assert [len(m) for m in memories] == [60, 100, 100]
    assert first < names(memories[1]) < first | second
    assert names(memories[1]) == names(memories[2])


def test_reservoir_keeps_a_uniform_sample_of_all() -> None:
    on = toys.stream(incremental="domain")
    _, memories = run(on, memory=60, sampler="reservoir")
    held = names(memories[-1])
    shares = [len(held & names(e.train)) for e in on.experiences]
    assert sum(shares) == 60
    assert all(10 <= s <= 30 for s in shares), shares


def test_starts_every_experience_from_the_first_weights() -> None:
    starts: list[dict[str, Tensor]] = []

    class Noted(GDumb):
        def before_experience(self, experience: Experience, learner: Any) -> None:
            super().before_experience(experience, learner)
            starts.append(learner.weights())

    on = toys.stream(form="images")
    model = {"name": "convnet", "channels": [4], "batch_norm": True, "hidden": [8], "head": "growing"}
    trainer = toys.trainer([{"name": "gdumb", "memory": 30}], on, model=model)
    trainer.strategy.links[0].__class__ = Noted
    trainer.run()
    assert any("running_mean" in n for n in starts[0])
    for i, start in enumerate(starts):
        assert set(toys.differing(starts[0], start)) <= {"head.seen"}
        assert start["head.seen"].tolist() == [c < 2 * (i + 1) for c in range(6)], "classes once met stay possible"
    assert len(toys.differing(starts[0], toys.weights_of(trainer))) == len(starts[0])


def test_classes_without_a_sample_stay_possible() -> None:
    trainer, memories = run(toys.stream(), memory=3, sections={"model": {**toys.MLP, "head": "growing"}})
    assert len(memories[-1]) == 3
    assert bool(toys.weights_of(trainer)["head.seen"].all())


def test_learns_when_it_is_asked_where_boundaries_are_hidden() -> None:
    """As with boundaries, to the bit: when it is scored is all it has to know. Beside another strategy it would tell it."""
    settings = {"training": {"epochs": 3}}
    told, _ = run(toys.stream(), memory=30, sections=settings)
    hidden, _ = run(toys.stream(boundaries=False, online=True), memory=30, sections=settings)
    assert hidden.record.matrix == told.record.matrix
    assert not toys.differing(toys.weights_of(told), toys.weights_of(hidden))
    with pytest.raises(ConfigError, match="'gdumb' learns when it is scored"):
        toys.trainer([{"name": "gdumb"}, {"name": "naive"}], toys.stream(boundaries=False))
