"""Chains: order, hooks that cost nothing, and links that do not go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from cl_lab.chain import Chain
from cl_lab.errors import ConfigError
from cl_lab.protocols import Strategy
from cl_lab.records import Batch, Experience, State, Stream, TensorData

LOG: list[str] = []


@dataclass
class Loud(Strategy):
    """Says what it is asked, in every hook."""

    letter: str = "a"
    _count: int = field(default=0, init=False)

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        LOG.append(f"{self.letter}:prepare")
        return nn.Sequential(model)

    def before_experience(self, experience: Experience, learner: Any) -> None:
        LOG.append(f"{self.letter}:before")

    def mix(self, batch: Batch, learner: Any) -> Batch:
        LOG.append(f"{self.letter}:mix")
        return Batch(torch.cat([batch.x, batch.x]), batch.y.repeat(2), batch.t.repeat(2), batch.current)

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Any) -> Tensor:
        LOG.append(f"{self.letter}:loss")
        return loss * 2 + 1

    def adjust_gradients(self, learner: Any) -> None:
        LOG.append(f"{self.letter}:gradients")

    def after_step(self, learner: Any) -> None:
        LOG.append(f"{self.letter}:step")

    def after_experience(self, experience: Experience, learner: Any) -> None:
        LOG.append(f"{self.letter}:after")
        self._count += 1

    def budget(self, experience: Experience, learner: Any) -> int:
        return {"a": 2, "b": 3}[self.letter]

    def penalty(self, learner: Any) -> float:
        return 0.5

    def state_dict(self) -> State:
        return {"count": self._count}

    def load_state_dict(self, state: State) -> None:
        assert isinstance(state["count"], int)
        self._count = state["count"]


@dataclass
class Chooser(Strategy):
    """Chooses the training set."""

    def training_set(self, experience: Experience, learner: Any) -> TensorData | None:
        return None


@dataclass
class Needy(Strategy):
    """Needs boundaries."""

    needs_boundaries = True
    reference = True


HOOKS = ["prepare", "mix", "adjust_loss", "adjust_gradients", "after_step", "training_set", "budget", "penalty"]


def test_links_are_called_in_order() -> None:
    LOG.clear()
    on = toys.stream()
    chain = Chain([Loud("a"), Strategy(), Loud("b")], ["a", "quiet", "b"], on)
    host: Any = None
    model = chain.prepare(nn.Identity(), on)
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], nn.Sequential)
    experience = on.experiences[0]
    chain.before_experience(experience, host)
    batch = experience.train.batch(torch.arange(2))
    assert len(chain.mix(batch, host)) == 8, "the second link mixes what the first gave"
    assert float(chain.adjust_loss(torch.tensor(1.0), batch=batch, outputs=torch.zeros(1), learner=host)) == 7.0
    chain.adjust_gradients(host), chain.after_step(host), chain.after_experience(experience, host)
    hooks = ["prepare", "before", "mix", "loss", "gradients", "step", "after"]
    assert [f"{letter}:{hook}" for hook in hooks for letter in "ab"] == LOG
    assert chain.penalty(host) == 1.0
    assert chain.budget(experience, host) == 3, "the largest budget"
    assert chain.training_set(experience, host) is experience.train
    assert all(chain.overrides(hook) for hook in HOOKS if hook != "training_set")


def test_hooks_nobody_overrides_cost_nothing() -> None:
    on = toys.stream()
    chain = Chain([Strategy(), Strategy()], ["a", "b"], on)
    assert not any(chain.overrides(hook) for hook in HOOKS)
    assert chain.budget(on.experiences[0], None) == 1
    assert chain.penalty(None) == 0.0
    assert not chain.reference


def test_state_of_equal_links_stays_apart() -> None:
    on = toys.stream()
    chain = Chain([Loud("a"), Loud("b"), Strategy()], ["x/y.py:Loud", "x/y.py:Loud", "naive"], on)
    chain.links[1].after_experience(on.experiences[0], None)
    state = chain.state_dict()
    assert state == {"0-x/y.py:Loud": {"count": 0}, "1-x/y.py:Loud": {"count": 1}, "2-naive": {}}
    other = Chain([Loud("a"), Loud("b"), Strategy()], ["x/y.py:Loud", "x/y.py:Loud", "naive"], on)
    other.load_state_dict(state)
    assert other.state_dict() == state


def test_two_choosers_clash() -> None:
    on = toys.stream()
    chain = Chain([Strategy(), Chooser()], ["naive", "one"], on)
    assert chain.training_set(on.experiences[0], None) is None
    with pytest.raises(ConfigError, match=r"^strategy chain: one and two both choose the training set; keep one"):
        Chain([Chooser(), Strategy(), Chooser()], ["one", "naive", "two"], on)


@pytest.mark.parametrize("replacing", ["er-ace", "der", "icarl"])
def test_a_loss_is_replaced_before_it_is_scaled(replacing: str) -> None:
    """Whatever order they are given in; the other way round training would go up what is left of the loss."""
    links = [{"name": replacing, "memory": 20}, {"name": "lwf", "weighting": "experiences"}]
    weights = []
    for order in (links, links[::-1]):
        trainer = toys.trainer(order, toys.stream(), training={"epochs": 3})
        record = trainer.run()
        assert all(0 <= p["loss"] < 20 for p in record.losses)
        weights.append(toys.weights_of(trainer))
    assert not toys.differing(*weights)


@pytest.mark.parametrize("renewing", ["lora-inc", "olora", "reglora", "lora-merge"])
@pytest.mark.parametrize("remembering", [{"name": "ewc", "fisher": "batched"}, {"name": "si"}])
def test_what_is_begun_anew_is_not_held_to_what_it_was(renewing: str, remembering: dict[str, Any]) -> None:
    links = [{"name": renewing}, remembering]
    for order in (links, links[::-1]):
        with pytest.raises(
            ConfigError, match=f"{renewing} begins adapters anew .* what {remembering['name']} remembers"
        ):
            toys.trainer(order, toys.stream(form="texts"), model={"name": "causal-lm", "weights": "tiny"})


def test_a_refusal_names_the_strategys_like() -> None:
    with pytest.raises(
        ConfigError, match=r"'lwf' learns classification only, .* is a language; take kl, its like there"
    ):
        toys.trainer([{"name": "lwf"}], toys.stream(form="texts"), model={"name": "causal-lm", "weights": "tiny"})


def test_one_loss_is_put_in_place_of_the_training_loss() -> None:
    with pytest.raises(ConfigError, match=r"^strategy chain: icarl and er-ace both put a loss of their own in place"):
        toys.trainer([{"name": "icarl", "memory": 20}, {"name": "er-ace", "memory": 20}], toys.stream())


def test_boundaries_are_asked_for() -> None:
    assert Chain([Strategy(), Needy()], ["naive", "needy"], toys.stream()).reference
    with pytest.raises(ConfigError, match=r"^strategy 'needy' needs to know where an experience ends"):
        Chain([Strategy(), Needy()], ["naive", "needy"], toys.stream(boundaries=False))
