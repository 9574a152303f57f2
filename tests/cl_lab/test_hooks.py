"""What the trainer and the learner do for a strategy beyond the plain step: each hook by a strategy made for the test."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import toys
from torch import Tensor, nn

from cl_lab.chain import Chain
from cl_lab.errors import ConfigError
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, DataError, Experience, Stream, TensorData
from cl_lab.trainer import Trainer

NAIVE = [{"name": "naive"}]


def trainer_of(link: Strategy, on: Stream, **sections: Any) -> Trainer:
    """A trainer whose one link is an object made by the test."""

    class One(Chain):
        def __init__(self, links: Any, names: Any, stream: Stream) -> None:
            super().__init__([link], ["own"], stream)

    return toys.trainer(NAIVE, on, chain=One, **sections)


@dataclass
class Observe(Strategy):
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def observe_outputs(self, batch: Batch, outputs: Tensor, learner: Learner) -> None:
        self.seen.append((batch.y, outputs))
        assert not outputs.requires_grad


def test_outputs_are_those_of_the_whole_batch_in_its_order() -> None:
    whole, pieces = Observe(), Observe()
    for link, accumulate in ((whole, 1), (pieces, 3)):
        trainer_of(link, toys.stream(), training={"epochs": 1, "accumulate": accumulate}).run()
    assert len(whole.seen) == 3 * 6
    for (y, one), (_, many) in zip(whole.seen, pieces.seen, strict=True):
        assert one.shape == (len(y), 6)
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


@dataclass
class Skip(Strategy):
    """Takes no step on the second experience, and half a rate on the third."""

    rates: list[float] = field(default_factory=list, init=False)

    def mix(self, batch: Batch, learner: Learner) -> Batch | None:
        return None if int(batch.y[0]) in (2, 3) else batch

    def learning_rate(self, batch: Batch, learner: Learner) -> float | None:
        return 0.05 if int(batch.y[0]) in (4, 5) else None

    def after_step(self, learner: Learner) -> None:
        self.rates.append(learner.lr)


def test_a_batch_may_be_skipped_and_a_rate_set() -> None:
    link, kept = Skip(), []
    trainer = trainer_of(link, toys.stream(), training={"lr": 0.1})

    class Keep(type(trainer.observer)):  # type: ignore[misc]
        def scored(self, record: Any) -> None:
            kept.append(trainer.learner.weights())

    trainer.observer = Keep()
    record = trainer.run()
    assert not toys.differing(kept[1], kept[2]), "nothing was learnt in the second experience"
    assert toys.differing(kept[2], kept[3])
    assert link.rates == pytest.approx([0.1] * 18 + [0.05] * 18)
    assert record.steps == 54


@dataclass
class Answer(Strategy):
    """Answers with the label that the samples were given, out of an encoding that it counts."""

    version: int = field(default=0, init=False)
    encoded: int = field(default=0, init=False)

    def encoding(self) -> Hashable:
        return self.version or None

    def encode(self, data: TensorData, learner: Learner) -> TensorData:
        self.encoded += 1
        return TensorData(nn.functional.one_hot(data.y, 6).float(), data.y, data.t, raw=False)

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        return learner.forward(batch) if batch.raw else batch.x

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self.version = 1 if experience.index < 2 else 2


def test_test_sets_are_encoded_once_for_each_encoding_and_answered_by_the_strategy() -> None:
    link = Answer()
    record = trainer_of(link, toys.stream(), training={"iterations": 1, "lr": 1e-6}).run()
    assert link.encoded == 2 * 3
    assert record.matrix == [[1.0] * 3] * 3
    assert sum(record.initial) < 2


def test_only_one_link_may_answer() -> None:
    with pytest.raises(ConfigError, match=r"^strategy chain: a and b both encode the samples; keep one of them"):
        Chain([Answer(), Answer()], ["a", "b"], toys.stream())


@dataclass
class Features(Strategy):
    uses_features: ClassVar[bool] = True

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        h = learner.features(batch)
        torch.testing.assert_close(learner_model(learner).head.linear(h), outputs)  # the pass's own
        return loss + learner.average(0.1 * h.square().sum(dim=1), batch)


def learner_model(learner: Learner) -> Any:
    return vars(learner)["_plain"]


def test_features_are_those_of_the_training_pass() -> None:
    """With dropout a second pass would give others; and the loss reaches the backbone through them."""
    trainer = trainer_of(Features(), toys.stream(), model={**toys.MLP, "dropout": 0.5}, training={"lr": 0.01})
    trainer.run()
    batch = toys.stream().experiences[0].test.batch(torch.arange(5))
    trainer.learner.model.eval()
    expected = trainer.learner.model.backbone(batch.x)
    torch.testing.assert_close(trainer.learner.features(batch), expected)


def test_features_need_a_head() -> None:
    trainer = toys.trainer(NAIVE, toys.stream())
    trainer.learner._plain = nn.Linear(16, 6)
    batch = toys.stream().experiences[0].test.batch(torch.arange(5))
    with pytest.raises(ConfigError, match="needs features, but Linear has no 'head'"):
        trainer.learner.features(batch)


@pytest.mark.parametrize("engine", [{"kind": "torch"}], ids=["torch"])
def test_gradients_of_a_batch(engine: dict[str, Any]) -> None:
    on = toys.stream(form="images")
    trainer = toys.trainer(NAIVE, on, model={"name": "slim-resnet18", "filters": 2}, engine=engine)
    learner = trainer.learner
    learner.begin(fresh=True)
    learner.train_mode()
    batch = on.experiences[0].train.batch(torch.arange(8))
    before = learner.weights()
    found = learner.gradients_of(batch)
    assert not toys.differing(before, learner.weights()), "running statistics stay"
    assert all(p.grad is None for p in learner.model.parameters())
    learner.loss(learner.forward(batch), batch).backward()
    with learner.gradients() as gradients:
        assert gradients.keys() == found.keys()
        for name, g in gradients.items():
            torch.testing.assert_close(found[name], g)


def test_a_replica_is_brought_up_to_date() -> None:
    on = toys.stream(form="images")
    trainer = toys.trainer(NAIVE, on, model={"name": "slim-resnet18", "filters": 2})
    replica = trainer.learner.replica()
    trainer.run()
    assert toys.differing(replica.state_dict(), trainer.learner.weights())
    trainer.learner.refresh(replica)
    assert not toys.differing(replica.state_dict(), trainer.learner.weights())


def test_what_needs_task_labels_or_whole_parameters_says_so() -> None:
    @dataclass
    class Needy(Strategy):
        task_conditioned: ClassVar[bool] = True
        whole_parameters: ClassVar[bool] = True

    with pytest.raises(ConfigError, match=r"^strategy 'own' needs the task label of every sample, but stream 'toy'"):
        trainer_of(Needy(), toys.stream())
    trainer = trainer_of(Needy(), toys.stream(incremental="task"))
    config = trainer.config.model_copy(
        update={"engine": trainer.config.engine.model_copy(update={"zero": 3, "kind": "deepspeed"})}
    )
    with pytest.raises(ConfigError, match=r"^engine\.zero = 3: strategy 'own' calls parts of the model"):
        Trainer(trainer.stream, trainer.learner, trainer.strategy, config, 0)


def test_codes_are_not_scaled_and_not_mixed_with_pictures() -> None:
    on = toys.stream(form="bytes")
    trainer = toys.trainer(NAIVE, on)
    data = on.experiences[0].test
    codes = TensorData(data.x.float() / 255, data.y, data.t, raw=False)
    with pytest.raises(ValueError, match="latents were given to a model that is not split"):
        trainer.learner.forward(codes.batch(torch.arange(4)))
    assert trainer.learner.model.split("flatten") == []
    raw = trainer.learner.forward(data.batch(torch.arange(4)))
    torch.testing.assert_close(trainer.learner.forward(codes.batch(torch.arange(4))), raw)
    assert not codes.take(torch.arange(2)).raw
    assert not replace(codes).batch(torch.arange(2)).to(torch.device("cpu")).rows(torch.arange(1), None).raw
    with pytest.raises(DataError, match="cannot be put into one set"):
        TensorData.concat([data, codes])


# -- a base session with settings of its own -------------------------------------------------------------------------

BASE = {"epochs": 1, "lr": 0.02, "first": {"epochs": 4, "batch_size": 20, "lr": 0.3, "optimizer": "adam"}}


@dataclass
class Rates(Strategy):
    rates: list[tuple[float, int]] = field(default_factory=list, init=False)
    size: int = field(default=0, init=False)

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        self.size = len(batch)
        return batch

    def after_step(self, learner: Learner) -> None:
        self.rates.append((learner.lr, self.size))


def test_the_first_experience_may_have_settings_of_its_own() -> None:
    for boundaries in (True, False):
        link = Rates()
        trainer_of(link, toys.stream(boundaries=boundaries), training=BASE).run()
        assert link.rates == [(0.3, 20)] * 12 + [(0.02, 10)] * 12


def test_a_base_session_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = toys.trainer(NAIVE, toys.stream(), training=BASE)
    whole.run()

    def resumed() -> Trainer:
        return toys.at_newest(toys.trainer(NAIVE, toys.stream(), training=BASE, checkpoints=tmp_path))

    for at in (5, 12, 15):
        toys.stopped_at(at, resumed())
    last = resumed()
    assert last.record.steps == 15
    last.run()
    assert last.record.matrix == whole.record.matrix
    assert not toys.differing(toys.weights_of(last), toys.weights_of(whole))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"epoch": 3}, r"first\.epoch: unknown key; did you mean 'epochs'\?"),
        ({"clip_norm": 3}, r"first\.clip_norm: unknown key"),
        ({"lr": -1}, r"first\.lr"),
    ],
)
def test_settings_of_the_first_are_checked(first: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        toys.config(training={"first": first})
    assert "\n" not in str(caught.value)


def test_settings_of_the_first_need_a_fresh_optimizer() -> None:
    with pytest.raises(ConfigError, match=r"first starts another optimiser; set training\.optimizer_state=fresh"):
        toys.config(training={"first": {"lr": 1.0}, "optimizer_state": "kept"})
