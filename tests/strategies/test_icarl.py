"""iCaRL: herding against a search by its definition, the loss written out, exemplars and budget, the nearest mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.records import Batch, Stream, TensorData
from cl_lab.trainer import Record, Silent, Trainer
from strategies._features import features_of, herd
from strategies.icarl import ICaRL


def ran(on: Stream, *, sections: dict[str, Any] | None = None, **knobs: Any) -> tuple[Trainer, Any]:
    trainer = toys.trainer([{"name": "icarl", "memory": 24, **knobs}], on, **(sections or {}))
    trainer.run()
    (strategy,) = trainer.strategy.links
    return trainer, strategy


# -- herding -------------------------------------------------------------------------------------------------------


def by_definition(features: Tensor, n: int) -> list[int]:
    """At each turn every candidate is tried: the mean with it, scaled to unit length, against the scaled class mean."""
    target = F.normalize(features.mean(dim=0), dim=0)
    chosen: list[int] = []
    for _ in range(n):
        distances = []
        for i in range(len(features)):
            mean = F.normalize(features[[*chosen, i]].mean(dim=0), dim=0)
            distances.append(math.inf if i in chosen else float((target - mean).norm()))
        chosen.append(distances.index(min(distances)))
    return chosen


def test_herding_is_the_greedy_search() -> None:
    rng = torch.Generator().manual_seed(4)
    for spread in (0.3, 3.0):
        features = F.normalize(1 + spread * torch.randn(25, 6, generator=rng, dtype=torch.float64), dim=1)
        assert herd(features, 12).tolist() == by_definition(features, 12)


def test_herding_is_a_ranking() -> None:
    features = F.normalize(1 + torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    ranked = herd(features, 60)
    assert len(set(ranked.tolist())) == 60, "each row once"
    assert torch.equal(herd(features, 20), ranked[:20])
    target = F.normalize(features.mean(dim=0), dim=0)

    def apart(rows: Tensor) -> float:
        return float((F.normalize(features[rows].mean(dim=0), dim=0) - target).norm())

    at_random = [apart(torch.randperm(200, generator=torch.Generator().manual_seed(s))[:20]) for s in range(20)]
    assert apart(ranked[:20]) < 0.2 * min(at_random)
    assert sorted(herd(features, 500).tolist()) == list(range(200)), "all of them where fewer are held"


def test_herding_stands_duplicates_and_dead_features() -> None:
    dead = torch.zeros(5, 4)
    assert sorted(herd(dead, 3).tolist()) == [0, 1, 2]
    same = F.normalize(torch.ones(5, 4), dim=1)
    assert len(set(herd(same, 5).tolist())) == 5


def test_features_are_what_the_head_sees() -> None:
    trainer, _ = ran(toys.stream())
    data = trainer.stream.experiences[0].train
    model = trainer.learner.replica()
    found = features_of(model, data, trainer.learner)
    with torch.no_grad():
        assert torch.equal(found, model.features(data.x))


# -- exemplars -----------------------------------------------------------------------------------------------------


def test_exemplars_share_the_budget_and_shrink_by_priority() -> None:
    on = toys.stream()
    held: list[TensorData] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            if record.matrix:
                held.append(strategy._exemplars)

    trainer = toys.trainer([{"name": "icarl", "memory": 25}], on, observer=Note())
    (strategy,) = trainer.strategy.links
    trainer.run()
    for i, (exemplars, each) in enumerate(zip(held, (12, 6, 4), strict=True)):
        assert exemplars.y.tolist() == [c for c in range(2 * (i + 1)) for _ in range(each)]
        if i:
            for c in range(2 * i):
                before, now = (e.x[e.y == c] for e in (held[i - 1], exemplars))
                assert torch.equal(now, before[:each]), "the most important stay, in their order"
    for c in range(2):
        own = on.experiences[0].train.x[on.experiences[0].train.y == c]
        assert bool((own.unsqueeze(1) == held[0].x[held[0].y == c]).all(dim=2).any(dim=0).all())


def test_trains_on_samples_and_exemplars() -> None:
    on = toys.stream()
    trainer, strategy = ran(on)
    whole = strategy.training_set(on.experiences[2], trainer.learner)
    assert len(whole) == 60 + 24
    assert torch.equal(whole.x[:60], on.experiences[2].train.x)
    assert trainer.record.steps == 3 * (6 + 2 * 9), "84 rows make 9 batches of 10"


def test_new_exemplars_are_herded_by_the_new_network() -> None:
    on = toys.stream(experiences=1)
    trainer, strategy = ran(on, memory=10)
    data = on.experiences[0].train
    with torch.no_grad():
        features = F.normalize(trainer.learner.replica().features(data.x), dim=1)
    for c in range(2):
        own = data.y == c
        expected = data.x[own][herd(features[own], 5)]
        assert torch.equal(strategy._exemplars.x[strategy._exemplars.y == c], expected)


def test_a_class_met_again_is_herded_from_old_and_new() -> None:
    on = toys.stream(incremental="domain")
    trainer, strategy = ran(on, memory=20)
    assert strategy._exemplars.y.tolist() == [0] * 10 + [1] * 10
    assert trainer.record.steps == 3 * (6 + 8 + 8)
    assert not strategy._teacher


def test_refuses_a_memory_smaller_than_the_classes() -> None:
    with pytest.raises(ConfigError, match=r"memory = 3 leaves no exemplar for each of 4 classes; give at least 6") as e:
        ran(toys.stream(), memory=3)
    assert "\n" not in str(e.value)


# -- the loss ------------------------------------------------------------------------------------------------------


def written_out(outputs: Tensor, before: Tensor | None, y: Tensor, new: set[int], known: set[int]) -> Tensor:
    """``ℓ`` of each row, term by term in float64."""
    values = []
    for i, row in enumerate(outputs.double()):
        total = torch.zeros((), dtype=torch.float64)
        for c in known:
            if row[c] == -math.inf:
                continue
            g = torch.sigmoid(row[c])
            if c in new:
                total = total - (torch.log(g) if c == int(y[i]) else torch.log(1 - g))
            else:
                assert before is not None
                q = torch.sigmoid(before[i, c].double())
                total = total - q * torch.log(g) - (1 - q) * torch.log(1 - g)
        values.append(total)
    return torch.stack(values)


@pytest.mark.parametrize(("head", "incremental"), [("single", "class"), ("growing", "class"), ("multi", "task")])
@pytest.mark.parametrize(("weighted", "temperature"), [(False, 1.0), (True, 1.0), (False, 2.0)])
def test_loss_is_the_papers_written_out(head: str, incremental: str, weighted: bool, temperature: float) -> None:
    on = toys.stream(experiences=2, incremental=incremental)
    trainer = toys.trainer([{"name": "icarl", "temperature": temperature}], on, model={**toys.MLP, "head": head})
    trainer.run()
    (strategy,) = trainer.strategy.links
    learner = trainer.learner
    strategy._known, strategy._new = [0, 1], [0, 1]
    learner.observe([2, 3])
    strategy.before_experience(on.experiences[1], learner)
    data = strategy.training_set(on.experiences[1], learner)
    index = torch.arange(0, len(data), 5)
    batch = data.batch(index)
    if weighted:
        batch.weight = torch.rand(len(batch), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = learner.replica()(batch.x, batch.t) / temperature
        for p in learner.parameters().values():  # the network moves on, the teacher stays
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    outputs = learner.forward(batch).detach().requires_grad_()
    loss = strategy.adjust_loss(learner.loss(outputs, batch), batch=batch, outputs=outputs, learner=learner)
    values = written_out(outputs, before, batch.y, {2, 3}, {0, 1, 2, 3})
    expected = (values * batch.weight).sum() if batch.weight is not None else values.mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, outputs)
    (reference,) = torch.autograd.grad(expected, outputs)
    assert bool(gradient.isfinite().all())
    assert torch.allclose(gradient, reference.nan_to_num(0.0), atol=1e-6)


def test_loss_keeps_what_a_chain_added() -> None:
    on = toys.stream(experiences=1)
    trainer, strategy = ran(on)
    batch = on.experiences[0].train.batch(torch.arange(8))
    outputs = trainer.learner.forward(batch).detach()
    plain = trainer.learner.loss(outputs, batch)
    own = strategy.adjust_loss(plain, batch=batch, outputs=outputs, learner=trainer.learner)
    more = strategy.adjust_loss(plain + 3, batch=batch, outputs=outputs, learner=trainer.learner)
    assert float(more - own) == pytest.approx(3.0, abs=1e-5)


def test_outputs_of_classes_to_come_are_left_alone() -> None:
    on = toys.stream()
    seen: list[Tensor] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            seen.append(trainer.learner.weights()["head.linear.weight"])

    trainer = toys.trainer([{"name": "icarl"}], on, observer=Note())
    trainer.run()
    start, first, second, _ = seen
    assert torch.allclose(start[2:], first[2:], atol=1e-6)
    assert torch.allclose(first[4:], second[4:], atol=1e-6)
    assert not torch.allclose(first[2:4], second[2:4], atol=1e-2)


def test_plain_cross_entropy_has_no_teacher() -> None:
    on = toys.stream()
    trainer, strategy = ran(on, loss="cross-entropy")
    strategy.before_experience(on.experiences[2], trainer.learner)
    assert not strategy._teacher
    batch = on.experiences[2].train.batch(torch.arange(4))
    loss = torch.tensor(2.0)
    assert strategy.adjust_loss(loss, batch=batch, outputs=torch.zeros(4, 6), learner=trainer.learner) is loss


# -- the answer ----------------------------------------------------------------------------------------------------


def test_answers_with_the_nearest_mean_of_exemplars() -> None:
    on = toys.stream()
    trainer, strategy = ran(on)
    model, exemplars = trainer.learner.replica(), strategy._exemplars
    test = TensorData.concat([e.test for e in on.experiences])
    with torch.no_grad():
        queries = F.normalize(model.features(test.x), dim=1)
        means = torch.stack(
            [
                F.normalize(F.normalize(model.features(exemplars.x[exemplars.y == c]), dim=1).mean(dim=0), dim=0)
                for c in range(6)
            ]
        )
        trainer.learner.model.eval()
        scores = strategy.predict(Batch(test.x, test.y, test.t, 0), trainer.learner)
    assert torch.equal(scores.argmax(dim=1), torch.cdist(queries, means).argmin(dim=1))
    assert torch.allclose(strategy._means, means, atol=1e-5)


def test_answers_with_outputs_while_there_is_no_mean() -> None:
    on = toys.stream(incremental="task")
    trainer = toys.trainer([{"name": "icarl"}], on)
    (strategy,) = trainer.strategy.links
    test = on.experiences[2].test
    batch = Batch(test.x, test.y, test.t, 0)
    with torch.no_grad():
        assert torch.equal(strategy.predict(batch, trainer.learner), trainer.learner.forward(batch))
        strategy._means = torch.zeros(6, 24)
        strategy._means[:4] = 1.0
        scores = strategy.predict(batch, trainer.learner)
        assert torch.equal(scores, trainer.learner.forward(batch)), "the task's own classes have no mean yet"
        old = on.experiences[1].test
        scores = strategy.predict(Batch(old.x, old.y, old.t, 0), trainer.learner)
    assert bool(scores[:, 2:4].isfinite().all())
    assert bool(scores[:, [0, 1, 4, 5]].isneginf().all()), "of another task, or without a mean"


def test_forgets_less_than_naive() -> None:
    on = toys.stream()
    last = {n: toys.trainer([{"name": n}], on).run().matrix[-1] for n in ("naive", "icarl")}
    assert sum(last["icarl"]) / 3 > 0.9 > 0.6 > sum(last["naive"]) / 3


def test_knows_its_memory_by_default() -> None:
    assert ICaRL().memory == 2000


def test_within_an_experience_the_outputs_answer() -> None:
    """The new classes have no mean before its end: anytime scores and early stopping must not count them all as wrong."""
    settings = {"evaluation": {"every_steps": 6}, "training": {"epochs": 8}}
    trainer, strategy = ran(toys.stream(), sections=settings)
    last = {a["experience"]: a["accuracies"][-1] for a in trainer.record.anytime}
    assert min(last.values()) > 0.8
    assert strategy._means is not None, "after it the nearest mean does"
