"""KL to the previous model: against the divergence written out, per sample and per token."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import toys
from torch.nn.functional import kl_div

from cl_lab.records import PAD
from cl_lab.trainer import Trainer
from strategies.kl import KL

LM = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"]}


def after_one(form: str, model: dict[str, Any], **knobs: Any) -> tuple[Trainer, KL]:
    """A trainer after its first experience, whose model then moved on."""
    on = toys.stream(form=form, scoring="constrained") if form == "texts" else toys.stream(incremental="domain")
    trainer = toys.trainer([{"name": "kl", **knobs}], on, model=model, training={"lr": 0.1})
    (link,) = trainer.strategy.links
    assert isinstance(link, KL)
    link.before_experience(on.experiences[0], trainer.learner)
    assert not link._previous, "nothing comes before the first"
    link.before_experience(on.experiences[1], trainer.learner)
    trainer.learner.begin(fresh=True)
    data = on.experiences[0].train
    for _ in range(3):
        batch = data.batch(torch.arange(10))
        trainer.learner.backward(trainer.learner.loss(trainer.learner.forward(batch), batch), last=True)
        trainer.learner.step()
    return trainer, link


@pytest.mark.parametrize("towards", ["previous", "current"])
def test_the_term_is_the_divergence_of_the_outputs(towards: Literal["previous", "current"]) -> None:
    trainer, link = after_one("float", toys.MLP, towards=towards, strength=0.7)
    learner, batch = trainer.learner, trainer.stream.experiences[1].train.batch(torch.arange(12))
    outputs = learner.forward(batch)
    plain = learner.loss(outputs, batch)
    assert link._previous._module is not None
    old = link._previous._module(batch.x, batch.t).log_softmax(1)
    new = outputs.log_softmax(1)
    of, at = (new, old) if towards == "previous" else (old, new)
    expected = 0.7 * kl_div(of, at, log_target=True, reduction="batchmean")
    got = link.adjust_loss(plain, batch=batch, outputs=outputs, learner=learner) - plain
    assert got.item() == pytest.approx(expected.item(), rel=1e-3)
    assert got.item() > 1e-5
    (slope,) = torch.autograd.grad(got, outputs)
    assert slope.abs().sum() > 0


def test_of_a_text_it_is_the_mean_over_the_answers_tokens() -> None:
    trainer, link = after_one("texts", LM)
    learner, on = trainer.learner, trainer.stream
    assert on.answers is not None
    batch = on.experiences[1].train.batch(torch.arange(12))
    outputs = learner.forward(batch)
    plain = learner.loss(outputs, batch)
    assert link._previous._module is not None
    with torch.no_grad():
        old = link._previous._module(batch.x, batch.t).log_softmax(2)
    new = outputs.log_softmax(2)
    each = []
    for i, y in enumerate(batch.y.tolist()):
        said = int((on.answers[y] != PAD).sum())
        each.append(kl_div(new[i, :said], old[i, :said], log_target=True, reduction="sum") / said)
    got = link.adjust_loss(plain, batch=batch, outputs=outputs, learner=learner) - plain
    assert got.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-3)


@pytest.mark.parametrize("other", ["lora-inc", "lora-merge", "olora", "reglora"])
def test_beside_what_moves_an_adapter_elsewhere(other: str) -> None:
    """The previous model is the one that was, also where it keeps its last adapter in another place from then on."""
    on = toys.stream(form="texts", scoring="first-token")
    trainer = toys.trainer([{"name": "kl"}, toys.own_settings(other)], on, model=LM, training={"lr": 0.2, "epochs": 4})
    link, learner = trainer.strategy.links[0], trainer.learner
    assert isinstance(link, KL)
    first, second = on.experiences[:2]
    batch = first.train.batch(torch.arange(12))
    trainer.learn(first)
    with torch.no_grad():
        was = learner.forward(batch).float()
    trainer.strategy.before_experience(second, learner)
    assert torch.allclose(link._previous.outputs(batch, learner), was, atol=1e-4)


def test_it_holds_the_model_back() -> None:
    """The stronger, the less is forgotten of what the first experience taught, where labels are shared."""
    kept = []
    for strength in (0.0, 3.0):
        on = toys.stream(incremental="domain")
        record = toys.trainer([{"name": "kl", "strength": strength}], on, training={"epochs": 6, "lr": 0.05}).run()
        kept.append(record.matrix[1][0])
    assert kept[1] >= kept[0]
    on = toys.stream(form="texts", scoring="constrained")
    record = toys.trainer([{"name": "kl", "strength": 0.5}], on, model=LM, training={"lr": 0.2, "epochs": 8}).run()
    assert [len(row) for row in record.matrix] == [3, 3, 3]
