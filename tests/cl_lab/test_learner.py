"""The learner's own doings: how convolutions lie in memory, and that no layout changes what is learnt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import registry
from cl_lab.models import channels_last
from cl_lab.trainer import Trainer

CONVOLUTIONS = {"name": "convnet", "channels": [5, 6], "hidden": [8]}  # no count that kernels are made for


def training(optimizer: str) -> dict[str, Any]:
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    return {"epochs": 1, "batch_size": 10, "lr": 0.01, "optimizer": optimizer, "optimizer_state": "kept", **momentum}


def inner(p: Tensor) -> bool:
    """Whether the channel is the innermost dimension, and only so."""
    return p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()


@pytest.mark.parametrize("links", [["naive"], ["ewc"], ["si"], ["mas"], ["lwf"], ["agem"], ["mir"], ["ewc", "derpp"]])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_convolutions_resume_bit_for_bit(links: list[str], optimizer: str, tmp_path: Path) -> None:
    """Importances, moments and memories come back as they lay: in another layout sums would round otherwise."""

    def made(**more: Any) -> Trainer:
        chain = [{"name": name, **toys.own_settings(name)} for name in links]
        return toys.trainer(chain, toys.stream(form="images"), model=CONVOLUTIONS, training=training(optimizer), **more)

    whole = made()
    assert all(inner(p) for p in whole.learner.model.parameters() if p.dim() == 4)
    whole.run()
    for at in (4, 9, 14):
        toys.stopped_at(at, toys.at_newest(made(checkpoints=tmp_path)))
    resumed = toys.at_newest(made(checkpoints=tmp_path))
    resumed.run()
    toys.assert_same(resumed, whole)
    assert all(inner(p) for p in resumed.learner.model.parameters() if p.dim() == 4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_moments_in_another_layout_are_the_same_moments(optimizer: str) -> None:
    """Fused optimisers read a parameter and its moments by address: laid out otherwise they would be other moments."""
    weights = []
    for other in (False, True):
        trainer = toys.trainer(
            [{"name": "naive"}], toys.stream(form="images"), model=CONVOLUTIONS, training=training(optimizer)
        )
        toys.stopped_at(7, trainer)
        if other:
            state = trainer.learner.state_dict()
            moments = state["optimizer"]
            assert isinstance(moments, dict)
            assert any(inner(v) for entry in moments.values() for v in entry.values())
            for entry in moments.values():
                entry |= {k: v.contiguous() for k, v in entry.items()}
            trainer.learner.load_state_dict(state)
        trainer.stop = lambda: None
        trainer.run()
        weights.append(toys.weights_of(trainer))
    assert not toys.differing(*weights)


@pytest.mark.parametrize("name", ["convnet", "slim-resnet18"])
def test_a_layout_changes_no_value(name: str) -> None:
    on = toys.stream(form="images")
    spec = registry.create("models", {"name": name}, "model")
    plain = spec.build(on).double()
    laid = copy.deepcopy(plain)
    channels_last(laid)
    for (n, p), q in zip(plain.named_parameters(), laid.parameters(), strict=True):
        assert torch.equal(p, q), n
        assert p.dim() < 4 or p[0, 0].numel() == 1 or inner(q), n
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(6, dtype=torch.int64)
    for model in (plain, laid):
        model(x, t).square().sum().backward()
    torch.testing.assert_close(plain(x, t), laid(x, t), rtol=1e-10, atol=1e-10)
    for (n, p), q in zip(plain.named_parameters(), laid.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.stride() == q.stride(), n
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "training",
    [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adamw"}],
)
def test_weights_in_16_bits_take_the_step_of_those_in_32(training: dict[str, Any]) -> None:
    """Torch's fused SGD leaves most of them where they are."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        model = {"name": "causal-lm", "weights": "tiny", "adapt": "full", "dtype": dtype}
        on = toys.stream(form="texts", scoring="first-token")
        learner = toys.trainer([{"name": "naive"}], on, model=model, training=training).learner
        learner.begin(fresh=True)
        learner.set_lr(0.1)
        before = {n: p.float().clone() for n, p in learner.parameters().items()}
        batch = on.experiences[0].train.batch(torch.arange(16))
        learner.backward(learner.loss(learner.forward(batch), batch), last=True)
        learner.step()
        moved[dtype] = torch.cat([(p.float() - before[n]).flatten() for n, p in learner.parameters().items()])
    exact, rounded = moved.values()
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert rounded.norm() == pytest.approx(exact.norm().item(), rel=0.05)
