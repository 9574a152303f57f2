"""Past adapters: what the hooks add, that it never moves, and each method's formula against one written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from cl_lab import registry
from cl_lab.adapters import LowRank
from cl_lab.errors import ConfigError
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, Experience, Objective, Stream
from cl_lab.trainer import Trainer

RANK, ALPHA = 3, 7.5
LOWER = "backbone.model.layers.0"
LM = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["q_proj", "down_proj"]}
LM |= {"lora_rank": RANK, "lora_alpha": ALPHA}
HARSH = {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.3, "optimizer_state": "kept", "epochs": 2}
KINDS: list[dict[str, Any]] = [
    {"name": "lora-inc"},
    {"name": "lora-merge"},
    {"name": "lora-merge", "rule": "sum", "weight": 0.25},
    {"name": "olora"},
    {"name": "olora", "measure": "cosine"},
    {"name": "reglora"},
]


@dataclass
class Watch(Strategy):
    """Keeps the weights, and the logits of some test samples, as they are where it stands in the chain."""

    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    _weights: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)
    _logits: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._weights.append(dict(learner.weights()))
        self._logits.append(said(learner, learner.stream))


@dataclass
class Hold(Strategy):
    """Freezes the lower layer from the second experience on."""

    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if experience.index == 1:
            learner.freeze([LOWER])


def texts() -> Stream:
    return toys.stream(form="texts", scoring="first-token")


def said(learner: Learner, on: Stream) -> Tensor:
    """Logits of eight test samples, in evaluation mode."""
    return answered(learner.replica(), on)


def answered(model: nn.Module, on: Stream) -> Tensor:
    data = on.experiences[0].test
    with torch.no_grad():
        logits: Tensor = model(data.x[:8], data.t[:8])
    return logits


def between(link: dict[str, Any], **sections: Any) -> tuple[Trainer, Any, Any, Any]:
    """A trainer of ``link`` with a watch before and one behind it."""
    watch = {"name": f"{__file__}:Watch"}
    made = toys.trainer([watch, link, watch], texts(), **({"model": LM, "training": HARSH} | sections))
    before, strategy, after = made.strategy.links
    return made, before, strategy, after


def parts(past: LowRank) -> list[LowRank]:
    """The adapters that stand beside each other, one for each experience."""
    return [LowRank(a, b) for a, b in zip(past.a.split(RANK), past.b.split(RANK, 1), strict=True)]


@pytest.mark.parametrize("link", KINDS, ids=str)
def test_past_adapters_stay_as_they_ended_bit_for_bit(link: dict[str, Any]) -> None:
    """Under AdamW with weight decay and moments of the whole stream, a past adapter is what its experience left."""
    made, before, strategy, _ = between(link)
    made.run()
    assert strategy._past
    for path, past in strategy._past.items():
        layer = strategy._layers[path]
        assert [p.a.shape for p in parts(past)] == [(RANK, past.a.shape[1])] * 3
        for part, weights in zip(parts(past), before._weights, strict=True):
            assert torch.equal(part.a, weights[layer.a])
            assert torch.equal(part.b, weights[layer.b])
            assert part.b.any(), "something was learnt"


@pytest.mark.parametrize("link", KINDS, ids=str)
def test_the_model_is_that_with_all_adapters_in_its_weights(link: dict[str, Any]) -> None:
    """After three experiences, against a model without hooks whose weights are ``W₀ + Σ c_i (α/r) B_i A_i``, by hand."""
    made, before, strategy, after = between(link)
    made.run()
    plain = toys.trainer([{"name": "naive"}], texts(), model=LM)
    weights = dict(plain.learner.weights())
    for path, layer in strategy._layers.items():
        changes = [ALPHA / RANK * w[layer.b] @ w[layer.a] for w in before._weights]
        if link["name"] == "lora-merge":
            total = torch.stack(changes).mean(0) if "rule" not in link else 0.25 * torch.stack(changes).sum(0)
        else:
            total = changes[0] + changes[1] + changes[2]
        weights[f"{path}.base_layer.weight"] = weights[f"{path}.base_layer.weight"] + total
    plain.learner.set_weights(dict(weights))
    assert torch.allclose(said(plain.learner, texts()), after._logits[-1], atol=1e-4)
    untouched = toys.trainer([{"name": "naive"}], texts(), model=LM).learner
    assert not torch.allclose(said(untouched, texts()), after._logits[-1], atol=0.1)


@pytest.mark.parametrize("link", [k for k in KINDS if k["name"] != "lora-merge"], ids=str)
def test_a_new_adapter_changes_no_answer(link: dict[str, Any]) -> None:
    made, before, _, after = between(link)
    made.run()
    for was, became in zip(before._logits, after._logits, strict=True):
        assert torch.allclose(was, became, atol=1e-5, rtol=1e-5)


def test_a_new_adapter_is_drawn_as_peft_draws_it() -> None:
    """From the run's generator alone, layer after layer: ``A`` uniform up to ``1/√inputs``, ``B`` zero."""
    made, _, strategy, after = between({"name": "lora-inc"})
    made.run()
    rng = toys.trainer([{"name": "naive"}], texts(), model=LM).learner.rng
    for weights in after._weights:
        for layer in strategy._layers.values():
            a = weights[layer.a]
            assert torch.equal(a, nn.init.kaiming_uniform_(torch.empty(a.shape), 5**0.5, generator=rng))
            assert 0.9 < a.abs().max() * a.shape[1] ** 0.5 <= 1
            assert not weights[layer.b].any()
    assert torch.equal(rng.get_state(), made.learner.rng.get_state())


def test_copies_of_the_model_have_the_past_too() -> None:
    made, _, _, after = between({"name": "lora-inc"})
    made.run()
    assert torch.equal(answered(made.learner.model.eval(), texts()), after._logits[-1])


def test_the_past_follows_autocast() -> None:
    made, before, strategy, after = between({"name": "lora-inc"}, engine={"precision": "bf16"})
    made.run()
    assert {dtype for _, _, dtype in strategy._placed} >= {torch.bfloat16}
    assert torch.allclose(before._logits[-1], after._logits[-1], atol=1e-4), "kept in full precision"


def test_adapters_that_another_strategy_froze_stay() -> None:
    """Frozen from the second experience on: their parameters stand still, and so does what their layers compute."""
    links = [{"name": f"{__file__}:Hold"}, {"name": "lora-inc"}, {"name": f"{__file__}:Watch"}]
    made = toys.trainer(links, texts(), model=LM, training=HARSH)
    made.run()
    _, strategy, after = made.strategy.links
    ranks = {path: len(past.a) for path, past in strategy._past.items()}
    assert ranks == {path: RANK if path.startswith(LOWER) else 3 * RANK for path in strategy._layers}
    first, *later = after._weights
    for weights in later:
        assert all(name.startswith("backbone.model.layers.1.") for name in toys.differing(first, weights))


# -- O-LoRA and RegLoRA against autograd ---------------------------------------------------------------------------------


def begun(link: dict[str, Any], past: int = 2) -> tuple[Trainer, Any, dict[str, Tensor]]:
    """A learner ready to step, with ``past`` adapters and a present one of random numbers, and a gradient of the loss."""
    made = toys.trainer([link], texts(), model=LM)
    learner, (strategy,) = made.learner, made.strategy.links
    learner.begin(fresh=True)
    rng = torch.Generator().manual_seed(3)
    parameters = learner.parameters()
    for path, layer in strategy._layers.items():
        a, b = parameters[layer.a], parameters[layer.b]
        held = LowRank(
            torch.randn(past * RANK, a.shape[1], generator=rng), torch.randn(len(b), past * RANK, generator=rng)
        )
        strategy._past[path] = held
        for p in (a, b):
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    batch = texts().experiences[0].train.batch(torch.arange(10))
    learner.backward(learner.loss(learner.forward(batch), batch), last=True)
    with learner.gradients() as gradients:
        return made, strategy, {name: g.clone() for name, g in gradients.items()}


def equals_autograd(
    made: Trainer, strategy: Any, before: dict[str, Tensor], written: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """What ``adjust_gradients`` adds is the gradient of ``written``, and ``penalty`` is its value."""
    leaves = {name: p.double().requires_grad_() for name, p in made.learner.parameters().items()}
    value = written(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    strategy.adjust_gradients(made.learner)
    moved = 0
    with made.learner.gradients() as gradients:
        for (name, p), expected in zip(leaves.items(), found, strict=True):
            wanted = torch.zeros_like(p) if expected is None else expected
            moved += bool(wanted.any())
            assert torch.allclose(gradients[name].double() - before[name], wanted, rtol=1e-4, atol=1e-5), name
    assert moved
    assert strategy.penalty(made.learner) == pytest.approx(float(value.detach()), rel=1e-5)


@pytest.mark.parametrize("measure", ["product", "cosine"])
def test_olora_adds_the_gradient_of_its_penalty(measure: str) -> None:
    made, strategy, before = begun({"name": "olora", "strength": 0.7, "measure": measure})

    def written(leaves: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for path, layer in strategy._layers.items():
            for past in parts(strategy._past[path]):
                for old in past.a.double():
                    for new in leaves[layer.a]:
                        product = old @ new
                        total = (
                            total + (product if measure == "product" else F.cosine_similarity(old, new, dim=0)).abs()
                        )
        return 0.7 * total

    equals_autograd(made, strategy, before, written)


def test_olora_without_a_past_has_nothing_to_be_orthogonal_to() -> None:
    made = toys.trainer([{"name": "olora"}], texts(), model=LM, training={"iterations": 3})
    naive = toys.trainer([{"name": "naive"}], texts(), model=LM, training={"iterations": 3})
    made.run()
    naive.run()
    assert made.record.matrix[0] == naive.record.matrix[0]
    assert made.record.losses[2] == naive.record.losses[2]


def test_cosine_knows_no_scale() -> None:
    for measure, factor in (("product", 10), ("cosine", 1)):
        made, strategy, _ = begun({"name": "olora", "measure": measure})
        was = strategy.penalty(made.learner)
        for name, p in made.learner.parameters().items():
            if "lora_A" in name:
                p.mul_(10)
        assert strategy.penalty(made.learner) == pytest.approx(factor * was, rel=1e-5)


def test_olora_turns_the_new_adapter_away_from_the_past() -> None:
    overlaps = {}
    for strength in (0.0, 0.5):
        made, *_ = between({"name": "olora", "strength": strength}, training={"lr": 0.1, "epochs": 3})
        overlaps[strength] = [m["olora/overlap"] for m in made.run().measures]
    assert overlaps[0.0][0] == overlaps[0.5][0] == 0, "the first has no past"
    assert all(a < 0.5 * b for a, b in zip(overlaps[0.5][1:], overlaps[0.0][1:], strict=True)), overlaps


def test_reglora_adds_the_gradient_of_its_penalty() -> None:
    made, strategy, before = begun({"name": "reglora", "strength": 30.0, "share": 0.1})
    rng = torch.Generator().manual_seed(1)
    for path, past in strategy._past.items():
        for part in parts(past):  # as two experiences would have left them
            noise = torch.randn(part.b.shape, generator=rng)
            strategy.consolidate(path, LowRank(part.a, part.b + noise))
    masks = {path: mask_of(strategy, path) for path in strategy._past}
    assert all(0.1 < float(mask.float().mean()) < 0.21 for mask in masks.values()), (
        "two experiences, some entries shared"
    )

    def written(leaves: dict[str, Tensor]) -> Tensor:
        each = []
        for path, layer in strategy._layers.items():
            product = leaves[layer.b] @ leaves[layer.a]
            each.append(product[masks[path]].abs().mean())
        return 30.0 * torch.stack(each).mean()

    equals_autograd(made, strategy, before, written)


def mask_of(strategy: Any, path: str) -> Tensor:
    past = strategy._past[path]
    mask: Tensor = strategy._mask(path, torch.device("cpu"), (len(past.b), past.a.shape[1]))[0]
    return mask


def test_reglora_masks_the_largest_entries_of_every_past_product_once() -> None:
    made, before, strategy, _ = between({"name": "reglora", "share": 0.03})
    made.run()
    size = total = entries = 0
    for path, layer in strategy._layers.items():
        expected = torch.zeros(strategy._past[path].b.shape[0], strategy._past[path].a.shape[1], dtype=torch.bool)
        for weights in before._weights:
            product = (weights[layer.b] @ weights[layer.a]).abs()
            k = round(0.03 * product.numel())
            assert k > 10
            expected |= product >= product.flatten().sort(descending=True).values[k - 1]
        assert torch.equal(mask_of(strategy, path), expected)
        size, total, entries = size + expected.numel() // 8, total + int(expected.sum()), entries + expected.numel()
    measures = made.record.measures[-1]
    assert measures["reglora/mask_bytes"] == size == sum(m.numel() for m in strategy.state_dict()["masks"].values())
    assert measures["reglora/masked"] == pytest.approx(total / entries)


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1), (7, 24)])
def test_bits_come_back_as_they_were(shape: tuple[int, int]) -> None:
    from strategies.reglora import packed, unpacked

    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    bits = packed(mask.flatten())
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, shape), mask)


def test_what_an_adapter_left_alone_is_not_masked() -> None:
    made, strategy, _ = begun({"name": "reglora", "share": 0.5})
    one, two = list(strategy._past)[:2]
    a, b = strategy._past[one]
    strategy.consolidate(one, LowRank(a, torch.zeros_like(b)))
    assert not strategy._masks
    assert strategy.penalty(made.learner) == 0
    a, b = strategy._past[two]
    b = b.clone()
    b[1:] = 0
    strategy.consolidate(two, LowRank(a, b))
    assert mask_of(strategy, two).nonzero()[:, 0].unique().tolist() == [0]
    assert mask_of(strategy, two).sum() == a.shape[1]


def test_a_mean_takes_no_weight() -> None:
    with pytest.raises(ConfigError, match=r"weight = 0\.5: a mean gives every adapter the same weight; set rule=sum"):
        registry.create("strategies", {"name": "lora-merge", "weight": 0.5}, "strategy")
