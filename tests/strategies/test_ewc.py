"""EWC: the running quadratic against the explicit sum of penalties, its gradient against autograd, and what it protects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.records import TensorData
from cl_lab.trainer import Record, Silent, Trainer
from strategies import _fisher
from strategies.ewc import EWC

Snapshot = tuple[dict[str, Tensor], dict[str, Tensor]]


def learnt(**knobs: Any) -> tuple[Trainer, EWC, list[Snapshot]]:
    """A run over three experiences, and each one's ``(F_t, θ*_t)``, computed apart from the strategy."""
    on = toys.stream(incremental="task")
    snapshots: list[Snapshot] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            if record.matrix:
                data = on.experiences[len(record.matrix) - 1].train
                model = trainer.learner.replica()
                summed = _fisher.diagonal(model, data, "exact", prepare=trainer.learner.prepare_input, batch_size=1000)
                theta = {n: p.clone() for n, p in trainer.learner.parameters().items()}
                snapshots.append(({n: v / len(data) for n, v in summed.items()}, theta))

    links = [{"name": "ewc", "strength": 5.0, **knobs}]
    trainer = toys.trainer(links, on, observer=Note(), training={"lr": 0.05})
    trainer.run()
    (strategy,) = trainer.strategy.links
    assert isinstance(strategy, EWC)
    return trainer, strategy, snapshots


def elsewhere(trainer: Trainer) -> None:
    """Move the parameters away from where they were left."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in trainer.learner.parameters().values():
            p.add_(torch.randn(p.shape, generator=rng) * 0.3)


def explicit(knobs: dict[str, Any], snapshots: list[Snapshot], theta: dict[str, Tensor]) -> Tensor:
    """``λ/2 Σ_t F_t (θ − θ*_t)²``, term by term; online: ``λ/2 (Σ_t γ^(T−t) F_t) (θ − θ*_T)²``."""
    total = torch.zeros((), dtype=torch.float64)
    last = len(snapshots) - 1
    for i, (fisher, anchor) in enumerate(snapshots):
        if knobs.get("mode") == "online":
            anchor = snapshots[last][1]
            fisher = {n: v * knobs.get("gamma", 1.0) ** (last - i) for n, v in fisher.items()}
        for name, p in theta.items():
            total = total + (fisher[name].double() * (p.double() - anchor[name].double()).square()).sum()
    return 5.0 / 2 * total


KNOBS: list[dict[str, Any]] = [
    {},
    {"mode": "online"},
    {"mode": "online", "gamma": 0.5},
    {"mode": "online", "gamma": 0.0},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_running_quadratic_is_the_sum_of_penalties(knobs: dict[str, Any]) -> None:
    trainer, strategy, snapshots = learnt(**knobs)
    assert len(snapshots) == 3
    for _ in range(2):  # where training ended, and anywhere else
        theta = {n: p.clone() for n, p in trainer.learner.parameters().items()}
        expected = float(explicit(knobs, snapshots, theta))
        assert expected > 0 or knobs
        assert strategy.penalty(trainer.learner) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        elsewhere(trainer)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_gradient_is_autograd_of_the_penalty(knobs: dict[str, Any]) -> None:
    trainer, strategy, snapshots = learnt(**knobs)
    elsewhere(trainer)
    theta = {n: p.clone().requires_grad_() for n, p in trainer.learner.parameters().items()}
    explicit(knobs, snapshots, theta).backward()
    own = {}
    for name, p in trainer.learner.model.named_parameters():
        p.grad = torch.full_like(p, 0.25)  # the penalty's gradient comes on top of the loss's
        own[name] = p
    strategy.adjust_gradients(trainer.learner)
    for name, p in own.items():
        assert p.grad is not None
        assert torch.allclose(p.grad - 0.25, theta[name].grad, rtol=1e-3, atol=1e-5), name


def test_penalty_is_zero_while_nothing_was_learnt() -> None:
    trainer = toys.trainer([{"name": "ewc"}], toys.stream())
    assert trainer.strategy.penalty(trainer.learner) == 0


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_strength_zero_is_naive_bit_for_bit(mode: str) -> None:
    on = toys.stream()
    naive, ewc = (
        toys.trainer([link], on) for link in ({"name": "naive"}, {"name": "ewc", "strength": 0.0, "mode": mode})
    )
    assert naive.run().matrix == ewc.run().matrix
    assert not toys.differing(toys.weights_of(naive), toys.weights_of(ewc))


def test_first_experience_is_naive_bit_for_bit() -> None:
    on = toys.stream(experiences=1)
    naive, ewc = (toys.trainer([link], on) for link in ({"name": "naive"}, {"name": "ewc", "strength": 1e6}))
    naive.run(), ewc.run()
    assert not toys.differing(toys.weights_of(naive), toys.weights_of(ewc))


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_protects_an_old_task(mode: str) -> None:
    """A linear model, two domains: EWC holds the first task's loss where naive loses it."""
    on = toys.stream(experiences=2, incremental="domain")
    model = {"name": "mlp", "hidden": []}
    losses = {}
    for strength in (0.0, 20.0):
        trainer = toys.trainer(
            [{"name": "ewc", "strength": strength, "mode": mode}], on, model=model, training={"epochs": 20, "lr": 0.05}
        )
        trainer.run()
        first = on.experiences[0].train
        with torch.no_grad():
            logits = trainer.learner.replica()(first.x, first.t)
        losses[strength] = float(torch.nn.functional.cross_entropy(logits, first.y))
    assert losses[20.0] < 0.5 * losses[0.0]


@pytest.mark.parametrize("variant", ["exact", "sampled", "empirical", "batched"])
def test_every_fisher_variant_feeds_it(variant: str) -> None:
    on = toys.stream()
    trainer = toys.trainer([{"name": "ewc", "strength": 1.0, "fisher": variant}], on)
    trainer.run()
    precision = trainer.strategy.state_dict()["0-ewc"]["precision"]
    assert precision.keys() == trainer.learner.parameters().keys()
    assert all(bool((v >= 0).all()) for v in precision.values())
    assert any(bool((v > 0).any()) for v in precision.values())


def test_fisher_is_a_mean_over_samples() -> None:
    """Doubling the data doubles no penalty; a smaller draw estimates the same."""
    on = toys.stream(experiences=1)
    trainer = toys.trainer([{"name": "naive"}], on)
    trainer.run()
    experience = on.experiences[0]

    def estimate(**knobs: Any) -> dict[str, Tensor]:
        return EWC(**knobs)._estimate(experience, trainer.learner)

    whole = estimate()
    model, data = trainer.learner.replica(), experience.train
    twice = TensorData.concat([data, data])
    again = _fisher.diagonal(model, twice, "exact", prepare=trainer.learner.prepare_input, batch_size=7)
    for name, value in whole.items():
        assert torch.allclose(again[name] / len(twice), value, rtol=1e-4, atol=1e-9)
    mean = sum(float(v.sum()) for v in whole.values())
    assert sum(float(v.sum()) for v in estimate(fisher_samples=40).values()) == pytest.approx(mean, rel=0.6)
    few, drawn_again = estimate(fisher_samples=5), estimate(fisher_samples=5)
    assert any(not torch.equal(few[n], drawn_again[n]) for n in few), "drawn anew each time"
    assert not toys.differing(estimate(fisher_samples=10_000), whole)


def test_batched_divides_by_the_number_of_batches() -> None:
    on = toys.stream(experiences=1)
    trainer = toys.trainer([{"name": "naive"}], on, training={"batch_size": 7})
    trainer.run()
    by_training_batch = EWC(fisher="batched")._estimate(on.experiences[0], trainer.learner)
    by_knob = EWC(fisher="batched", fisher_batch_size=7)._estimate(on.experiences[0], trainer.learner)
    assert not toys.differing(by_training_batch, by_knob)
    one_each = EWC(fisher="batched", fisher_batch_size=1)._estimate(on.experiences[0], trainer.learner)
    empirical = EWC(fisher="empirical")._estimate(on.experiences[0], trainer.learner)
    for name, value in empirical.items():
        assert torch.allclose(one_each[name], value, rtol=1e-4, atol=1e-9)
    assert sum(float(v.sum()) for v in by_knob.values()) < sum(float(v.sum()) for v in empirical.values())


def test_keeps_two_numbers_per_parameter_however_long_the_stream() -> None:
    sizes = []
    for n in (1, 3):
        trainer = toys.trainer(
            [{"name": "ewc"}], toys.stream(experiences=n, incremental="domain"), training={"lr": 0.01}
        )
        sizes.append(trainer.run().strategy_state_bytes)
        assert sizes[-1] == 2 * 4 * trainer.learner.trainable_parameters
    assert sizes[0] == sizes[1]


TINY = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}


@pytest.mark.parametrize("size", [1, 25, None])
def test_of_texts_the_gradient_of_the_loss_is_squared(size: int | None) -> None:
    """Against a gradient of each batch of rows, taken by hand from the mean over tokens."""
    on = toys.stream(form="texts", experiences=2, train=30)
    assert on.answers is not None
    knobs = {"name": "ewc", "fisher": "batched", "fisher_batch_size": size}
    trainer = toys.trainer([knobs], on, model=TINY, training={"epochs": 1})
    strategy = trainer.strategy.links[0]
    assert isinstance(strategy, EWC)
    learner, data = trainer.learner, on.experiences[0].train
    learner.begin(fresh=True)
    found = strategy._estimate(on.experiences[0], learner)
    model = learner.replica()
    expected: dict[str, Tensor] = {}
    batches = torch.arange(30).split(size or 10)
    for rows in batches:
        log_p = model(data.x[rows], data.t[rows]).log_softmax(2)
        losses = []
        for said, answer in zip(log_p, on.answers[data.y[rows]], strict=True):
            tokens = answer[answer >= 0]
            losses.append(-said[torch.arange(len(tokens)), tokens].mean())
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for name, g in zip(named, torch.autograd.grad(torch.stack(losses).mean(), list(named.values())), strict=True):
            expected[name] = expected.get(name, torch.zeros(())) + g.square() / len(batches)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-9), name


def test_of_weights_in_16_bits_the_sum_is_in_32() -> None:
    """A running sum of 16 bits stands still once it is 256 times what is added."""
    on = toys.stream(form="texts", experiences=1, train=400)
    knobs = {"name": "ewc", "fisher": "batched", "fisher_batch_size": 1}
    trainer = toys.trainer([knobs], on, model={**TINY, "dtype": "bfloat16"})
    strategy = trainer.strategy.links[0]
    assert isinstance(strategy, EWC)
    trainer.learner.begin(fresh=True)
    found = strategy._estimate(on.experiences[0], trainer.learner)
    exact: dict[str, Tensor] = {}
    for row in range(400):
        for name, g in trainer.learner.gradients_of(on.experiences[0].train.batch(torch.tensor([row]))).items():
            assert g.dtype == torch.bfloat16
            exact[name] = exact.get(name, torch.zeros(())) + g.double().square() / 400
    for name, value in exact.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-3), name
    strategy.after_experience(on.experiences[0], trainer.learner)
    assert {v.dtype for part in (strategy._precision, strategy._anchor) for v in part.values()} == {torch.float32}
    trainer.learner.begin(fresh=True)
    batch = on.experiences[0].train.batch(torch.arange(4))
    trainer.learner.backward(trainer.learner.loss(trainer.learner.forward(batch), batch), last=True)
    strategy.adjust_gradients(trainer.learner)  # 32 bits are added to gradients of 16
    trainer.learner.set_lr(1.0)
    trainer.learner.step()
    assert strategy.penalty(trainer.learner) > 0


def test_of_texts_other_fisher_variants_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^fisher = 'exact': asks for .*; set fisher=batched$"):
        toys.trainer([{"name": "ewc"}], toys.stream(form="texts"), model=TINY)


def moved(strength: float) -> float:
    """How far the second of two experiences in words took the model, measured by the Fisher of the first."""
    knobs = {"name": "ewc", "fisher": "batched", "fisher_batch_size": 1, "strength": strength}
    first: Snapshot = ({}, {})

    class Note(Silent):
        def scored(self, record: Record) -> None:
            if len(record.matrix) == 1:
                for kept, now in zip(first, (strategy._precision, strategy._anchor), strict=True):
                    kept.update({n: v.clone() for n, v in now.items()})

    training = {"epochs": 3, "lr": 0.005, "optimizer": "adam"}
    on = toys.stream(form="texts", experiences=2)
    trainer = toys.trainer([knobs], on, observer=Note(), model=TINY, training=training)
    (strategy,) = trainer.strategy.links
    assert isinstance(strategy, EWC)
    trainer.run()
    precision, anchor = first
    theta = trainer.learner.parameters()
    assert theta.keys() == anchor.keys()
    return sum(float((precision[n] * (p - anchor[n]).square()).sum()) for n, p in theta.items())


def test_pulls_what_was_learnt_in_words_back() -> None:
    assert 0 < moved(1e4) < moved(1e-9) / 10
