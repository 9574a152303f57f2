"""Streaming LDA: batches against the sequential formulas, exact scatter, the classifier in closed form, what is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import checkpoint
from cl_lab.errors import ConfigError
from cl_lab.records import Batch, Stream, TensorData
from cl_lab.trainer import Record, Silent, Trainer
from strategies import slda
from strategies.slda import SLDA

C, D = 5, 7


def samples(n: int = 300) -> tuple[Tensor, Tensor]:
    """Features around means far from the origin, labels in no order, one class met late and one never."""
    rng = torch.Generator().manual_seed(8)
    y = torch.randint(0, C - 2, (n,), generator=rng)
    y[n // 2 :: 3] = C - 2
    z = 4 + 3 * torch.randn(C, D, generator=rng)[y] + torch.randn(n, D, generator=rng)
    return z.double(), y


def one_by_one(z: Tensor, y: Tensor, weighting: str) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and Σ by the update formulas, a sample at a time."""
    counts, means = torch.zeros(C, dtype=torch.float64), torch.zeros(C, D, dtype=torch.float64)
    sigma = torch.zeros(D, D, dtype=torch.float64)
    for t, (zi, yi) in enumerate(zip(z, y.tolist(), strict=True)):
        c = counts[yi]
        w = c / (c + 1) if weighting == "class" else t / (t + 1)
        apart = zi - means[yi]
        sigma = (t * sigma + w * torch.outer(apart, apart)) / (t + 1)
        means[yi] = (c * means[yi] + zi) / (c + 1)
        counts[yi] += 1
    return counts, means, sigma


class Fake:
    """As much of a learner as the statistics need."""

    device = torch.device("cpu")

    class stream:  # noqa: N801
        n_classes = C
        boundaries = True
        task_labels = False


@pytest.mark.parametrize("weighting", ["class", "total"])
@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 100, 1, 192]], ids=["whole", "single", "mixed"])
def test_batches_equal_the_sequential_formulas(
    weighting: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, y = samples()
    strategy: Any = SLDA(weighting=weighting)
    monkeypatch.setattr(slda, "_CHUNK", 64)  # a batch may be taken in by parts
    for zi, yi in zip(z.split(sizes), y.split(sizes), strict=True):
        strategy._take(zi, yi, Fake)
    counts, means, sigma = one_by_one(z, y, weighting)
    assert torch.equal(strategy._counts, counts)
    assert torch.allclose(strategy._means, means, rtol=1e-12)
    assert strategy._seen == 300
    assert torch.allclose(strategy._scatter / strategy._seen, sigma, rtol=1e-6)  # products of float32 samples


def test_by_class_it_is_the_exact_scatter_within_classes() -> None:
    z, y = samples()
    strategies: dict[str, Any] = {w: SLDA(weighting=w) for w in ("class", "total")}
    for s in strategies.values():
        s._take(z, y, Fake)
    centred = torch.cat([z[y == c] - z[y == c].mean(dim=0) for c in range(C) if bool((y == c).any())])
    scatter = centred.T @ centred
    assert torch.allclose(strategies["class"]._scatter, scatter, rtol=1e-10)
    # The paper's weights count each class's first sample (but the very first of all) with its distance from 0.
    more = strategies["total"]._scatter - scatter
    assert float(more.diagonal().sum()) > 20


def test_classifier_is_the_closed_form() -> None:
    z, y = samples()
    strategy: Any = SLDA(shrinkage=0.05)
    strategy._take(z, y, Fake)
    _, means, sigma = one_by_one(z, y, "class")
    precision = torch.linalg.inv(0.95 * sigma + 0.05 * torch.eye(D, dtype=torch.float64))
    batch = Batch(z[:40].float(), y[:40], y[:40], 0, raw=False)
    scores = strategy.predict(batch, Fake)
    for k in range(C - 1):
        expected = batch.x.double() @ (precision @ means[k]) - 0.5 * means[k] @ precision @ means[k]
        assert torch.allclose(scores[:, k], expected, rtol=1e-6)
    assert bool(scores[:, C - 1].isneginf().all()), "a class never met is no answer"
    # The same answers as the smallest Mahalanobis distance.
    apart = batch.x.double().unsqueeze(1) - means[: C - 1]
    distances = torch.einsum("bkd,de,bke->bk", apart, precision, apart)
    assert torch.equal(scores.argmax(dim=1), distances.argmin(dim=1))


def test_oas_is_the_limit_of_its_iteration() -> None:
    """OAS estimates the oracle's ρ with its own last estimate in place of the truth, over and over."""
    rng = torch.Generator().manual_seed(0)
    d = 12
    for n in (8, 40, 400):
        x = torch.randn(n, d, generator=rng, dtype=torch.float64) * torch.linspace(0.2, 3, d)
        s = x.T @ x / n
        identity = s.diagonal().mean() * torch.eye(d, dtype=torch.float64)
        estimate = s
        for _ in range(5000):
            mixed, trace = float((estimate @ s).trace()), float(estimate.trace())
            rho = ((1 - 2 / d) * mixed + trace**2) / ((n + 1 - 2 / d) * mixed + (1 - n / d) * trace**2)
            estimate = (1 - rho) * s + rho * identity
        assert 0.01 < rho < 1
        assert torch.allclose(slda.oas(s, n), estimate, rtol=1e-6)
    sphere = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(slda.oas(sphere, 10), sphere)


# -- in a run ------------------------------------------------------------------------------------------------------


def ran(
    on: Stream, *, observer: Any = None, sections: dict[str, Any] | None = None, **knobs: Any
) -> tuple[Trainer, Any]:
    trainer = toys.trainer([{"name": "slda", **knobs}], on, observer=observer, **(sections or {}))
    trainer.run()
    (strategy,) = trainer.strategy.links
    return trainer, strategy


class Weights(Silent):
    """Keeps the weights after each evaluation."""

    trainer: Trainer

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def scored(self, record: Record) -> None:
        self.seen.append(self.trainer.learner.weights())


class Sigma(Silent):
    """Keeps the covariance after each experience."""

    trainer: Trainer

    def __init__(self, held: list[Tensor]) -> None:
        self.held = held

    def scored(self, record: Record) -> None:
        (strategy,) = self.trainer.strategy.links
        if record.matrix:
            self.held.append(strategy._scatter / strategy._seen)


@pytest.mark.parametrize("base", ["train", "frozen"])
@pytest.mark.parametrize("insert", ["experience", "stream"])
def test_only_the_base_experience_trains(base: str, insert: str) -> None:
    observer = Weights()
    trainer = toys.trainer([{"name": "slda", "base": base, "insert": insert}], toys.stream(), observer=observer)
    observer.trainer = trainer
    trainer.run()
    start, first, second, third = observer.seen
    assert bool(toys.differing(start, first)) == (base == "train")
    assert not toys.differing(first, second)
    assert not toys.differing(first, third)
    assert min(trainer.record.matrix[-1]) >= 0.9, "nothing is forgotten"
    steps = {("train", "experience"): 18, ("frozen", "experience"): 0}
    assert trainer.record.steps == steps.get((base, insert), 54)


def test_statistics_are_those_of_all_samples_with_the_frozen_network() -> None:
    on = toys.stream()
    trainer, strategy = ran(on, base_covariance="sample")
    data = TensorData.concat([e.train for e in on.experiences])
    with torch.no_grad():
        z = trainer.learner.replica().features(data.x).double()
    centred = torch.cat([z[data.y == c] - z[data.y == c].mean(dim=0) for c in range(6)])
    assert torch.allclose(strategy._scatter, centred.T @ centred, rtol=1e-6, atol=1e-9)
    assert torch.allclose(strategy._means, torch.stack([z[data.y == c].mean(dim=0) for c in range(6)]), atol=1e-9)
    assert strategy._counts.tolist() == [30] * 6


def test_as_they_pass_or_afterwards_is_the_same() -> None:
    (_, after), (_, passing) = (ran(toys.stream(), insert=i) for i in ("experience", "stream"))
    for name in ("_counts", "_means", "_scatter"):
        # Features of a batch and of a whole set differ in their last bits.
        assert torch.allclose(getattr(after, name), getattr(passing, name), rtol=1e-4, atol=1e-5), name


def test_dropout_does_not_reach_the_features() -> None:
    model = {**toys.MLP, "dropout": 0.5}
    (_, after), (_, passing) = (
        ran(toys.stream(), insert=i, base="frozen", sections={"model": model}) for i in ("experience", "stream")
    )
    assert torch.allclose(after._means, passing._means, atol=1e-5)


def test_fixed_covariance_stays_after_the_base() -> None:
    kept: dict[str, list[Tensor]] = {}
    for covariance in ("fixed", "streaming"):
        held = kept[covariance] = []
        trainer = toys.trainer([{"name": "slda", "covariance": covariance}], toys.stream(), observer=Sigma(held))
        Sigma.trainer = trainer
        trainer.run()
        assert trainer.strategy.links[0]._counts.tolist() == [30] * 6, "means stream either way"
    assert torch.equal(kept["fixed"][0], kept["streaming"][0])
    assert torch.equal(kept["fixed"][0], kept["fixed"][2])
    assert not torch.allclose(kept["streaming"][0], kept["streaming"][2])


def test_base_covariance_is_shrunk_once() -> None:
    on = toys.stream(experiences=1)
    (_, shrunk), (_, plain) = (ran(on, base_covariance=b) for b in ("oas", "sample"))
    expected = slda.oas(plain._scatter / 60, 60) * 60
    assert torch.allclose(shrunk._scatter, expected, rtol=1e-12)
    assert not torch.allclose(shrunk._scatter, plain._scatter, rtol=1e-3)


def test_the_order_of_classes_does_not_matter() -> None:
    """Statistics of frozen features are sums: any stream of the same samples ends in the same classifier."""
    on, several = toys.stream(experiences=1), {}
    whole = on.experiences[0].train
    for name, order in {"mixed": torch.arange(60), "sorted": torch.argsort(whole.y, stable=True)}.items():
        strategy: Any = SLDA()
        strategy._take(
            whole.x.take_along_dim(order[:, None], 0), whole.y[order], toys.trainer([{"name": "slda"}], on).learner
        )
        several[name] = strategy._classifier()
    assert torch.allclose(several["mixed"][0], several["sorted"][0], rtol=1e-8)


def test_test_sets_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = SLDA.encode

    def counted(self: SLDA, data: TensorData, learner: Any) -> TensorData:
        calls.append(data)
        return whole(self, data, learner)

    monkeypatch.setattr(SLDA, "encode", counted)
    ran(toys.stream(), insert="experience")
    assert len(calls) == 3, "one for each test set, over three evaluations"


@pytest.mark.parametrize("head", ["multi", "single"])
def test_task_labels_count_as_they_do_for_the_head(head: str) -> None:
    on = toys.stream(incremental="task")
    trainer, strategy = ran(on, sections={"model": {**toys.MLP, "head": head}})
    trainer.learner.model.eval()
    data = strategy.encode(on.experiences[1].test, trainer.learner)
    with torch.no_grad():
        scores = strategy.predict(Batch(data.x, data.y, data.t, 0, raw=False), trainer.learner)
        other = strategy.predict(Batch(data.x, data.y, torch.zeros_like(data.t), 0, raw=False), trainer.learner)
    allowed = {c for c in range(6) if bool(scores[:, c].isfinite().all())}
    assert allowed == ({2, 3} if head == "multi" else set(range(6)))
    if head == "multi":
        assert set(other.argmax(dim=1).tolist()) <= {0, 1}


def test_early_stopping_may_ask_with_raw_samples() -> None:
    training = {"validation": 0.2, "patience": 1}
    trainer, _ = ran(toys.stream(), insert="stream", sections={"training": training})
    assert min(trainer.record.matrix[-1]) >= 0.9


@pytest.mark.parametrize("at", [1, 2])
def test_resumes_between_experiences_that_take_no_steps(at: int, tmp_path: Path) -> None:
    on = toys.stream()
    whole, strategy = ran(on, insert="experience")

    class Stop(Silent):
        def scored(self, record: Record) -> None:
            if len(record.matrix) == at:
                raise KeyboardInterrupt

    first = toys.trainer([{"name": "slda"}], on, checkpoints=tmp_path, observer=Stop())
    with pytest.raises(KeyboardInterrupt):
        first.run()
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    again = toys.trainer([{"name": "slda"}], on)
    again.load_state_dict(found[0])
    again.run()
    assert again.record.matrix == whole.record.matrix
    assert checkpoint.equal(again.strategy.state_dict()["0-slda"], strategy.state_dict())


@pytest.mark.parametrize("knob", [{"base": "train"}, {"covariance": "fixed"}, {"insert": "experience"}], ids=str)
def test_refuses_what_needs_boundaries(knob: dict[str, str]) -> None:
    ((name, value),) = knob.items()
    with pytest.raises(ConfigError, match=f"^{name}={value} needs to know where an experience ends") as caught:
        toys.trainer([{"name": "slda", **knob}], toys.stream(boundaries=False))
    assert "\n" not in str(caught.value)
