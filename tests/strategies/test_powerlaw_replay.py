"""Power-law replay: shares against the closed form, exact rounding, even draws, one budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.records import Batch, Stream
from cl_lab.trainer import Trainer
from strategies.powerlaw_replay import PowerLawReplay, _Groups, systematic


class Spied(PowerLawReplay):
    """Keeps every mixed batch."""

    def mix(self, batch: Batch, learner: Any) -> Batch:
        mixed = super().mix(batch, learner)
        self.steps = [*getattr(self, "steps", []), mixed]
        return mixed


def run(on: Stream, training: dict[str, Any] | None = None, **knobs: Any) -> tuple[Trainer, Spied]:
    trainer = toys.trainer([{"name": "powerlaw-replay", **knobs}], on, training=training or {})
    (strategy,) = trainer.strategy.links
    strategy.__class__ = Spied
    trainer.run()
    return trainer, strategy


def by_formula(law: str, exponent: float, k: int) -> list[float]:
    """Shares of experiences 1 … k after ``k`` of them."""
    weight = {
        "power": lambda j: (k - j + 1) ** -exponent,
        "exponential": lambda j: math.exp(-exponent * (k - j)),
        "uniform": lambda _: 1.0,
    }[law]
    weights = [weight(j) for j in range(1, k + 1)]
    return [w / sum(weights) for w in weights]


LAWS = [("power", 1.0), ("power", 0.5), ("exponential", 0.7), ("uniform", 3.0)]


@pytest.mark.parametrize(("law", "exponent"), LAWS)
def test_shares_follow_the_law(law: Any, exponent: float) -> None:
    strategy = PowerLawReplay(law=law, exponent=exponent)
    for k in (1, 2, 7):
        assert strategy.shares(torch.arange(k)).tolist() == pytest.approx(by_formula(law, exponent, k))


@pytest.mark.parametrize(("law", "exponent"), LAWS)
def test_rehearsed_rows_follow_the_law(law: str, exponent: float) -> None:
    on = toys.stream(experiences=4)
    _, strategy = run(on, {"epochs": 20}, law=law, exponent=exponent, memory=80, replay_batch_size=7)
    per_experience = 20 * 6
    assert len(strategy.steps) == 4 * per_experience
    for k in range(4):
        steps = strategy.steps[k * per_experience : (k + 1) * per_experience]
        assert {len(mixed) for mixed in steps} == {10 if k == 0 else 17}, "one total for all laws"
        if k == 0:
            continue
        counts = torch.stack([(mixed.y[10:] // 2).bincount(minlength=4) for mixed in steps]).double()
        expected = torch.tensor([*by_formula(law, exponent, k), *[0.0] * (4 - k)], dtype=torch.float64) * 7
        assert bool(((counts - expected).abs() < 1).all()), "each step is the law, rounded"
        # The mean of 120 roundings, each with a variance of at most 1/4.
        assert torch.allclose(counts.mean(0), expected, atol=4 * 0.5 / math.sqrt(per_experience))


def test_rounding_is_exact_in_expectation() -> None:
    rng = torch.Generator().manual_seed(1)
    expected = torch.tensor([3.4, 2.3, 0.3, 1.0, 0.0, 5.0], dtype=torch.float64)
    drawn = torch.stack([systematic(expected, rng) for _ in range(4000)])
    assert drawn.dtype == torch.int64
    assert bool((drawn.sum(1) == 12).all())
    assert bool(((drawn - expected).abs() < 1).all())
    assert torch.allclose(drawn.double().mean(0), expected, atol=4 * 0.5 / math.sqrt(4000))
    assert bool((drawn[:, 3:] == torch.tensor([1, 0, 5])).all()), "whole expectations are met in every draw"


def test_draws_repeat_no_row_before_all_of_its_experience_came() -> None:
    rng = torch.Generator().manual_seed(2)
    owner = torch.tensor([5, 2, 5, 2, 9, 5, 2, 5, 9, 5])
    groups = _Groups(owner)
    assert groups.experiences.tolist() == [2, 5, 9]
    counts = torch.tensor([2, 3, 5])
    times = torch.zeros(10)
    for _ in range(3000):
        index = groups.draw(counts, rng)
        assert owner[index].tolist() == [2] * 2 + [5] * 3 + [9] * 5
        of = index.bincount(minlength=10)
        assert int(of[owner != 9].max()) == 1
        assert sorted(of[owner == 9].tolist()) == [2, 3]
        times += of
    expected = torch.tensor([{2: 2 / 3, 5: 3 / 5, 9: 5 / 2}[int(o)] for o in owner])
    assert torch.allclose(times / 3000, expected, atol=0.04)


def test_memory_is_shared_evenly_whatever_the_law() -> None:
    on = toys.stream(experiences=3)
    for law in ("power", "exponential", "uniform"):
        trainer, _ = run(on, memory=30, law=law, exponent=2.0)
        held: dict[str, Tensor] = trainer.strategy.state_dict()["0-powerlaw-replay"]["memory"]["columns"]
        assert held["y"].bincount().tolist() == [10, 10, 10]
        assert bool((held["label"] // 2 == held["y"]).all())


def test_labels_stay_with_their_samples() -> None:
    on = toys.stream(incremental="domain")
    _, strategy = run(on, memory=60)
    label = {x.numpy().tobytes(): int(y) for e in on.experiences for x, y in zip(e.train.x, e.train.y, strict=True)}
    for mixed in strategy.steps:
        assert all(label[x.numpy().tobytes()] == int(y) for x, y in zip(mixed.x, mixed.y, strict=True))


def test_exponent_zero_is_the_uniform_law_bit_for_bit() -> None:
    on = toys.stream()
    uniform, power, steep = (
        run(on, memory=40, law=law, exponent=a)[0] for law, a in (("uniform", 2.0), ("power", 0.0), ("power", 2.0))
    )
    assert not toys.differing(toys.weights_of(uniform), toys.weights_of(power))
    assert toys.differing(toys.weights_of(uniform), toys.weights_of(steep))


def test_a_memory_smaller_than_the_stream_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^powerlaw-replay: memory = 2: holds less than one sample") as caught:
        run(toys.stream(), memory=2)
    assert "\n" not in str(caught.value)


def test_a_budget_smaller_than_the_stream_is_refused_before_training() -> None:
    per_row = 16 * 4 + 8 + 8 + 8 + 8  # the sample, its label, task and experience, and its key
    with pytest.raises(ConfigError, match=r"^powerlaw-replay: memory_bytes = 287, 2 samples: holds less") as caught:
        toys.trainer([{"name": "powerlaw-replay", "memory_bytes": 3 * per_row - 1}], toys.stream())
    assert str(caught.value).endswith("raise memory_bytes")
    trainer, _ = run(toys.stream(), memory_bytes=3 * per_row)
    held = trainer.strategy.state_dict()["0-powerlaw-replay"]["memory"]["columns"]
    assert held["y"].sort().values.tolist() == [0, 1, 2]
