"""LwF: its divergence and loss against direct sums, the teacher it keeps, and one pass for all tasks against one each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from cl_lab.records import Batch, Experience, Stream, TensorData
from cl_lab.trainer import Record, Silent, Trainer
from strategies._distillation import Teacher, Unmasked, divergence
from strategies.lwf import LwF

NOTHING = float("-inf")


def softened(z: Tensor, outputs: list[int], temperature: float) -> Tensor:
    e = (z[outputs].double() / temperature).exp()
    return e / e.sum()


def kl(teacher: Tensor, learner: Tensor, known: list[int], possible: list[int], temperature: float) -> float:
    """One sample's ``KL(p ‖ q)``, written out: ``p`` over ``known`` outputs, ``q`` over ``possible`` ones."""
    p = softened(teacher, known, temperature)
    q = softened(learner, possible, temperature)[[possible.index(k) for k in known]]
    return float((p * (p.log() - q.log())).sum())


# -- the divergence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_is_the_sum_written_out(temperature: float) -> None:
    torch.manual_seed(0)
    z, target = torch.randn(6, 4) * 3, torch.randn(6, 4) * 3
    z[1, 3] = target[1, 3] = NOTHING  # impossible in both
    target[2, 0] = NOTHING  # not known to the teacher
    z[3, 1] = NOTHING  # known to the teacher, impossible now
    found = divergence(z, target, temperature)
    everything, expected = [0, 1, 2, 3], []
    for i, (known, possible) in enumerate(
        [
            (everything, everything),
            ([0, 1, 2], [0, 1, 2]),
            ([1, 2, 3], everything),
            ([0, 2, 3], [0, 2, 3]),
            (everything, everything),
            (everything, everything),
        ]
    ):
        expected.append(kl(target[i], z[i], known, possible, temperature))
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_divergence_is_zero_at_agreement_and_where_nothing_is_shared() -> None:
    z = torch.tensor([[1.0, 2.0, NOTHING, 4.0], [3.0, NOTHING, NOTHING, 1.0], [NOTHING] * 4])
    other = torch.tensor([[1.0, 2.0, NOTHING, 4.0], [NOTHING, 2.0, 1.0, NOTHING], [1.0, 2.0, 3.0, 4.0]])
    z.requires_grad_()
    found = divergence(z, other, 2.0)
    assert found.tolist() == [0.0, 0.0, 0.0]
    found.sum().backward()
    assert float(z.grad.abs().max()) < 1e-7


def test_gradient_of_the_divergence() -> None:
    """``∂ T² KL / ∂z = T (q − p)``, zero for impossible outputs."""
    torch.manual_seed(1)
    z, target = torch.randn(5, 4), torch.randn(5, 4)
    z[:, 2] = NOTHING
    target[:, 2] = NOTHING
    z.requires_grad_()
    (4.0 * divergence(z, target, 2.0)).sum().backward()
    expected = 2.0 * ((z.detach() / 2).softmax(1) - (target / 2).softmax(1))
    assert torch.allclose(z.grad, expected, atol=1e-6)
    assert not z.grad[:, 2].any()


def test_divergence_by_finite_differences() -> None:
    torch.manual_seed(2)
    z, target = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: divergence(v, target, 2.0), (z,))


# -- the loss ------------------------------------------------------------------------------------------------------


def learning(
    incremental: str, head: str, tasks: int = 3, precision: str = "fp32", **knobs: Any
) -> tuple[Trainer, LwF, Batch]:
    """A trainer in the middle of its last experience: the past learnt, the teacher taken, the model moved on since."""
    on = toys.stream(incremental=incremental, experiences=tasks)
    how = {"model": {**toys.MLP, "head": head}, "engine": {"precision": precision}}
    trainer = toys.trainer([{"name": "lwf", **knobs}], on, **how)
    (strategy,) = trainer.strategy.links
    assert isinstance(strategy, LwF)
    learner = trainer.learner
    rng = torch.Generator().manual_seed(3)
    learner.begin(fresh=False)
    for e in on.experiences:
        learner.observe(e.classes)
        strategy.before_experience(e, learner)
        with torch.no_grad():
            for p in learner.parameters().values():
                p.add_(0.3 * torch.randn(p.shape, generator=rng))
        if e.index < tasks - 1:
            strategy.after_experience(e, learner)
    return trainer, strategy, on.experiences[-1].train.batch(torch.arange(7))


def unmasked(model: nn.Module, batch: Batch) -> Tensor:
    """Every output of the last layer."""
    with torch.no_grad():
        return F.linear(model.backbone(batch.x), model.head.linear.weight, model.head.linear.bias)


def reference(trainer: Trainer, strategy: LwF, batch: Batch) -> tuple[float, list[list[float]]]:
    """The cross-entropy, and each sample's divergence within each group of outputs."""
    learner, on = trainer.learner, trainer.stream
    old, new = unmasked(strategy._teacher._ready(learner), batch), unmasked(learner.model, batch)
    past = [list(e.classes) for e in on.experiences[:-1]]
    present = list(on.experiences[-1].classes)
    known = sorted({c for classes in past for c in classes})
    groups = [(c, c) for c in past] if on.task_labels else [(known, known)]
    if strategy.outputs == "seen" and not on.task_labels:
        groups = [(known, sorted({*known, *present}))]
    terms = [[kl(o, n, k, p, strategy.temperature) for k, p in groups] for o, n in zip(old, new, strict=True)]
    outputs = learner.forward(batch)
    return float(F.cross_entropy(outputs, batch.y).detach()), terms


CASES = [("class", "single"), ("class", "growing"), ("task", "multi"), ("task", "single"), ("domain", "single")]


@pytest.mark.parametrize(("incremental", "head"), CASES)
@pytest.mark.parametrize("weighting", ["sum", "experiences"])
@pytest.mark.parametrize("outputs", ["old", "seen"])
def test_loss_is_the_sum_written_out(incremental: str, head: str, weighting: str, outputs: str) -> None:
    knobs = {"weighting": weighting, "outputs": outputs, "strength": 0.7, "temperature": 3.0}
    trainer, strategy, batch = learning(incremental, head, **knobs)
    ce, terms = reference(trainer, strategy, batch)
    learner = trainer.learner
    logits = learner.forward(batch)
    loss = strategy.adjust_loss(learner.loss(logits, batch), batch=batch, outputs=logits, learner=learner)
    found = float(loss.detach())
    n = len(batch)
    if weighting == "sum":
        expected = ce + 0.7 * 9 * sum(map(sum, terms)) / n
    else:  # third experience
        expected = ce / 3 + (2 / 3) * 0.7 * 9 * sum(sum(t) / len(t) for t in terms) / n
    assert sum(map(sum, terms)) > 0.01
    assert found == pytest.approx(expected, rel=1e-4)


def test_weights_of_a_batch_count() -> None:
    """A rank's rows are weighted so that ranks and pieces add up; the distillation must follow."""
    trainer, strategy, batch = learning("class", "single")
    learner = trainer.learner
    weight = torch.rand(len(batch))
    weighted = replace(batch, weight=weight)
    _, terms = reference(trainer, strategy, batch)
    logits = learner.forward(weighted)
    found = strategy.adjust_loss(torch.zeros(()), batch=weighted, outputs=logits, learner=learner)
    assert float(found.detach()) == pytest.approx(
        4 * sum(w * t[0] for w, t in zip(weight.tolist(), terms, strict=True)), rel=1e-4
    )


@pytest.mark.parametrize("outputs", ["old", "seen"])
def test_new_outputs_learn_from_the_distillation_only_where_they_are_in_its_softmax(outputs: str) -> None:
    trainer, strategy, batch = learning("class", "growing", outputs=outputs)
    learner = trainer.learner
    logits = learner.forward(batch)
    strategy.adjust_loss(torch.zeros(()), batch=batch, outputs=logits, learner=learner).backward()
    rows = learner.model.head.linear.bias.grad
    new = list(trainer.stream.experiences[-1].classes)
    assert rows.isfinite().all()
    assert bool((rows[new] > 0).all()) == (outputs == "seen"), "towards 0: gradient descent lowers them"
    assert bool((rows[new] == 0).all()) == (outputs == "old")


# -- old tasks' outputs --------------------------------------------------------------------------------------------


def gradients(trainer: Trainer, strategy: LwF, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    learner = trainer.learner
    for p in learner.model.parameters():
        p.grad = None
    logits = learner.forward(batch)
    loss = strategy.adjust_loss(learner.loss(logits, batch), batch=batch, outputs=logits, learner=learner)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in learner.model.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_pass_equals_one_pass_per_task(precision: str) -> None:
    trainer, strategy, batch = learning("task", "multi", tasks=4, precision=precision)
    passes: list[int] = []
    trainer.learner.model.register_forward_hook(lambda *_: passes.append(1))
    loss, short = gradients(trainer, strategy, batch)
    assert strategy._one_pass is True
    assert len(passes) == 1
    strategy._one_pass = False
    loss_too, long = gradients(trainer, strategy, batch)
    assert len(passes) == 1 + 4
    exact = precision == "fp32"
    assert loss == pytest.approx(loss_too, rel=1e-6 if exact else 1e-2)
    for name, value in short.items():
        assert torch.allclose(value, long[name], atol=1e-6 if exact else 0.05), name
    old = [c for e in trainer.stream.experiences[:-1] for c in e.classes]
    assert short["head.linear.weight"][old].abs().sum() > 0, "old heads learn, too"


class Conditioned(nn.Module):
    """A task label that reaches further down than the head: the head's layer alone cannot answer for another task."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.backbone(x * (1 + t).unsqueeze(1)), t)


def test_a_model_whose_features_depend_on_the_task_is_asked_task_by_task() -> None:
    trainer, strategy, batch = learning("task", "multi")
    learner = trainer.learner
    model = Conditioned(learner.model.backbone, learner.model.head)
    learner._plain = learner._template = learner._wrapped = model
    strategy._teacher = Teacher()
    strategy._teacher.take(learner)
    with torch.no_grad():
        model.head.linear.weight.add_(torch.randn(model.head.linear.weight.shape))
    strategy._unmasked = Unmasked()
    strategy._unmasked.watch(model)
    strategy._teacher = teacher = Teacher()
    teacher.take(learner)
    with torch.no_grad():
        model.head.linear.weight.add_(torch.randn(model.head.linear.weight.shape))
    loss, _ = gradients(trainer, strategy, batch)
    assert strategy._one_pass is False
    expected = float(learner.loss(learner.forward(batch), batch).detach())
    for e in trainer.stream.experiences[:-1]:
        asked = replace(batch, t=torch.full_like(batch.t, e.index))
        old, new = teacher.outputs(asked, learner), learner.forward(asked).detach()
        c = list(e.classes)
        expected += 4 * sum(kl(o, n, c, c, 2.0) for o, n in zip(old, new, strict=True)) / len(batch)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_tasks_of_different_size() -> None:
    """Groups are padded; padding must not count."""
    strategy = LwF()
    strategy._past = [{"task": 0, "classes": [0, 1, 2]}, {"task": 1, "classes": [4]}, {"task": 2, "classes": [3, 5]}]

    class Told:
        stream = toys.stream(incremental="task")
        device = torch.device("cpu")

    columns, possible, taught = strategy._grouped(Told())
    assert [columns[g][possible[g]].tolist() for g in range(3)] == [[0, 1, 2], [4], [3, 5]]
    assert torch.equal(possible, taught)
    z = torch.where(possible, torch.randn(2, 6)[:, columns.flatten()].view(2, 3, 3), NOTHING)
    target = torch.where(taught, torch.randn(2, 3, 3), NOTHING)
    assert (divergence(z, target, 2.0)[:, 1] == 0).all(), "one output has nothing to be told"
    assert (divergence(z, target, 2.0)[:, [0, 2]] > 0).all()


def test_unmasked_knows_whose_outputs_it_holds() -> None:
    trainer, strategy, batch = learning("task", "multi")
    learner, seen = trainer.learner, strategy._unmasked
    outputs = learner.forward(batch)
    assert torch.equal(seen.of(outputs).detach(), unmasked(learner.model, batch))
    assert seen.of(outputs) is None, "told once"
    outputs = learner.forward(batch)
    learner.forward(batch)
    assert seen.of(outputs) is None, "another pass came between"


# -- the teacher ---------------------------------------------------------------------------------------------------


def learnt(on: Stream, epochs: int = 3, **knobs: Any) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """A run, and the model's weights after each experience."""
    ends: list[dict[str, Tensor]] = []

    class Note(Silent):
        def scored(self, record: Record) -> None:
            ends.append(trainer.learner.weights())

    training = {"lr": 0.05, "epochs": epochs}
    trainer = toys.trainer([{"name": "lwf", **knobs}], on, observer=Note(), training=training)
    trainer.run()
    return trainer, ends[1:]


def test_teacher_is_the_model_before_the_experience() -> None:
    trainer, ends = learnt(toys.stream())
    teacher = trainer.strategy.state_dict()["0-lwf"]["teacher"]
    assert not toys.differing(ends[-2], teacher)
    assert toys.differing(ends[-1], teacher)


def test_a_restored_teacher_answers_the_same() -> None:
    trainer, strategy, batch = learning("class", "growing")
    fresh = LwF()
    fresh.load_state_dict(strategy.state_dict())
    logits = trainer.learner.forward(batch)
    one, two = (
        s.adjust_loss(torch.zeros(()), batch=batch, outputs=logits, learner=trainer.learner) for s in (strategy, fresh)
    )
    assert one.item() == two.item() > 0


@pytest.mark.parametrize("knobs", [{"strength": 0.0}, {"strength": 0.0, "outputs": "seen"}], ids=str)
def test_strength_zero_is_naive_bit_for_bit(knobs: dict[str, Any]) -> None:
    on = toys.stream()
    naive, lwf = (toys.trainer([link], on) for link in ({"name": "naive"}, {"name": "lwf", **knobs}))
    assert naive.run().matrix == lwf.run().matrix
    assert not toys.differing(toys.weights_of(naive), toys.weights_of(lwf))


def test_protects_old_answers() -> None:
    """Two tasks on the same inputs: the first task's outputs go on saying there what they said, where naive's move."""
    first = toys.stream(incremental="task", experiences=2)
    inputs = first.experiences[0].train
    relabelled = TensorData(inputs.x, 2 + (inputs.x[:, 0] > 0).long(), torch.ones_like(inputs.t))
    second = Experience(1, "same inputs", (2, 3), lambda: relabelled, lambda: relabelled)
    on = replace(first, experiences=(first.experiences[0], second))
    moved = {}
    for strength in (0.0, 5.0):
        trainer, ends = learnt(on, epochs=30, strength=strength)
        model, said = trainer.learner.replica(), []
        for weights in ends:
            model.load_state_dict(weights)
            with torch.no_grad():
                said.append(model(inputs.x, inputs.t))
        moved[strength] = float(divergence(said[1], said[0], 2.0).mean())
    assert moved[5.0] < 0.3 * moved[0.0]
