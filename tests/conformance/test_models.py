"""What every registered model keeps: logits for every output, equal weights for equal seeds, something to train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import nn

from cl_lab import knobs, registry
from cl_lab.errors import ConfigError
from cl_lab.protocols import ModelSpec
from cl_lab.records import Stream

NAMES = registry.names("models")
every = pytest.mark.parametrize("name", NAMES)


def build(name: str, on: Stream, seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    own = registry.load("models", name)[0].conformance_knobs()
    try:
        made: nn.Module = registry.create("models", {"name": name, **own, **more}, "model").build(on)
    except ConfigError as error:
        if "needs the package" in str(error):
            pytest.skip(str(error))
        raise
    return made


def suitable(name: str, **more: Any) -> Stream:
    """Images serve every model of one tensor: those that take vectors flatten them."""
    parts = registry.load("models", name)[0].parts
    form = {(): "images", ("image", "question"): "questions", ("prompt", "answer"): "texts"}[parts]
    return toys.stream(form=form, **more)


def logits(model: nn.Module, on: Stream, n: int = 4) -> torch.Tensor:
    data = on.experiences[0].train
    out: torch.Tensor = model(inputs(data.x[:n]), data.t[:n])
    return out


def inputs(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.int32 else x.float() / 255


def test_the_built_ins_are_registered() -> None:
    assert set(NAMES) >= {"mlp", "simple-mlp", "convnet", "resnet18", "slim-resnet18"}


@every
def test_says_what_it_is(name: str) -> None:
    cls, _ = registry.load("models", name)
    assert issubclass(cls, ModelSpec)
    first = (cls.__doc__ or "").partition("\n")[0]
    assert first
    assert {"name": name, "summary": first} in registry.summaries("models")
    assert all(knob["doc"] for knob in knobs.describe(cls))
    with pytest.raises(ConfigError, match=r"^model\.widht: unknown key"):
        registry.create("models", {"name": name, "widht": 1}, "model")


@every
@pytest.mark.parametrize("incremental", ["class", "task", "domain"])
def test_logits_for_every_output(name: str, incremental: str) -> None:
    on = suitable(name, incremental=incremental)
    out = logits(build(name, on), on)
    if on.answers is None:
        assert out.shape == (4, on.n_classes)
    else:  # for every place of the answer, over a vocabulary that holds all of them
        assert out.shape[:2] == (4, *on.layout["answer"])
        assert out.shape[2] > on.answers.max()
        out = out.flatten(1)
    assert out.dtype == torch.float32
    assert not out.isnan().any()
    assert (out > float("-inf")).any(dim=1).all(), "something is possible for every sample"


@every
def test_equal_seeds_give_equal_weights(name: str) -> None:
    on = suitable(name)
    one, two, other = (build(name, on, seed).state_dict() for seed in (1, 1, 2))
    assert not toys.differing(one, two)
    assert toys.differing(one, other) or not any(v.any() for v in one.values()), "drawn, or all zero"


@every
def test_everything_trains(name: str) -> None:
    on = suitable(name)
    model = build(name, on)
    data = on.experiences[0].train
    out = logits(model, on, 8)
    (out if out.dim() == 2 else out[:, 0]).log_softmax(1)[torch.arange(8), data.y[:8]].sum().backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "DDP wants every parameter to take part"


@every
def test_samples_do_not_influence_each_other_in_evaluation(name: str) -> None:
    on = suitable(name)
    model = build(name, on).eval()
    data = on.experiences[0].train
    x = inputs(data.x[:6])
    whole = model(x, data.t[:6])
    assert torch.allclose(whole[2:4], model(x[2:4], data.t[2:4]), atol=1e-5)


@every
def test_trains_in_the_loop(name: str) -> None:
    on = suitable(name, experiences=1, train=40)
    model = {"name": name, **registry.load("models", name)[0].conformance_knobs()}
    trainer = toys.trainer([{"name": "naive"}], on, model=model, training={"iterations": 3, "lr": 0.01})
    record = trainer.run()
    assert len(record.matrix) == 1
    assert all(w.isfinite().all() for w in toys.weights_of(trainer).values())
