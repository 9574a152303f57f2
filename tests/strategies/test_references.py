"""Joint and cumulative: the upper bounds, in the samples they see and the steps they take."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import toys

from cl_lab.trainer import Record, Silent, Trainer
from strategies.cumulative import Cumulative
from strategies.joint import Joint
from strategies.naive import Naive


def steps_of(name: str, **training: Any) -> tuple[Trainer, list[int]]:
    """A run, and the optimiser steps of each experience."""
    ends = [0]

    class Note(Silent):
        def scored(self, record: Record) -> None:
            if record.matrix:
                ends.append(record.steps)

    trainer = toys.trainer([{"name": name}], toys.stream(), observer=Note(), training=training)
    trainer.run()
    return trainer, [b - a for a, b in itertools.pairwise(ends)]


def test_joint_takes_all_steps_at_once() -> None:
    trainer, steps = steps_of("joint", iterations=7)
    assert steps == [21, 0, 0], "the steps of all experiences, in the first"
    trainer, steps = steps_of("joint", epochs=2, batch_size=10)
    assert steps == [36, 0, 0], "two passes over 180 samples"
    assert trainer.record.samples == 360
    assert trainer.record.matrix[0] == trainer.record.matrix[1] == trainer.record.matrix[2]


def test_cumulative_grows() -> None:
    _, steps = steps_of("cumulative", iterations=7)
    assert steps == [7, 7, 7], "a budget in steps is the same for every experience"
    trainer, steps = steps_of("cumulative", epochs=2, batch_size=10)
    assert steps == [12, 24, 36], "a budget in passes grows with the samples"
    assert trainer.record.samples == 720


def test_naive_for_comparison() -> None:
    _, steps = steps_of("naive", epochs=2, batch_size=10)
    assert steps == [12, 12, 12]


@pytest.mark.parametrize(("strategy", "seen"), [(Joint(), [180, None, None]), (Cumulative(), [60, 120, 180])])
def test_training_sets(strategy: Any, seen: list[int | None]) -> None:
    on = toys.stream()

    class Host:
        stream = on

    for e, n in zip(on.experiences, seen, strict=True):
        data = strategy.training_set(e, Host())
        assert (None if data is None else len(data)) == n
        if data is not None:
            expected = torch.cat([other.train.y for other in on.experiences])[:n]
            assert torch.equal(data.y, expected)


def test_marked_as_references() -> None:
    assert Joint.reference
    assert Cumulative.reference
    assert not Naive.reference


@pytest.mark.parametrize("name", ["joint", "cumulative"])
def test_upper_bounds_remember(name: str) -> None:
    trainer, _ = steps_of(name, epochs=5)
    assert min(trainer.record.matrix[-1]) >= 0.95
    naive, _ = steps_of("naive", epochs=5)
    assert sum(naive.record.matrix[-1]) / 3 < 0.6


class StopError(Exception):
    """Ends a run after its second experience."""


def test_fresh_starts_every_experience_from_the_first_weights() -> None:
    on = toys.stream()
    starts: list[dict[str, Any]] = []

    class Watch(Cumulative):
        def training_set(self, experience: Any, learner: Any) -> Any:
            starts.append(toys.weights_of(trainer))
            return super().training_set(experience, learner)

    trainer = toys.trainer([{"name": "cumulative", "fresh": True}], on)
    trainer.strategy.links[0].__class__ = Watch  # before the chain has called it
    trainer.run()
    assert len(starts) == 3
    assert not toys.differing(starts[0], starts[1])
    assert not toys.differing(starts[0], starts[2])


def test_fresh_leaves_frozen_layers_as_they_are() -> None:
    seen: list[dict[str, Any]] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            seen.append(toys.weights_of(trainer))

    frozen = {"name": "freeze", "modules": ["backbone.layers.0"], "from_experience": 1}
    trainer = toys.trainer([frozen, {"name": "cumulative", "fresh": True}], toys.stream(), observer=Note())
    trainer.run()
    lower = {"backbone.layers.0.linear.weight", "backbone.layers.0.linear.bias"}
    assert lower <= set(toys.differing(seen[0], seen[1]))
    assert not lower & set(toys.differing(seen[1], seen[-1]))


def test_a_fresh_run_that_was_stopped_goes_on_to_the_same_end() -> None:
    settings: dict[str, Any] = {"model": {**toys.MLP, "head": "growing"}}
    links = [{"name": "cumulative", "fresh": True}]
    whole = toys.trainer(links, toys.stream(), **settings)
    whole.run()

    class Stop(Silent):
        def scored(self, record: Record) -> None:
            if len(record.matrix) == 2:
                raise StopError

    first = toys.trainer(links, toys.stream(), observer=Stop(), **settings)
    with pytest.raises(StopError):
        first.run()
    second = toys.trainer(links, toys.stream(), **settings)
    second.load_state_dict(first.state_dict())
    assert second.run().matrix == whole.record.matrix
    assert not toys.differing(toys.weights_of(whole), toys.weights_of(second))
