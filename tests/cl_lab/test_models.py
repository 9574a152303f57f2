"""Models: shapes, heads and their masks, parameter counts, seeds, and Avalanche's networks as oracles."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cl_lab import models, registry
from cl_lab.errors import ConfigError
from cl_lab.knobs import build, describe
from cl_lab.models import Classifier, ConvNet, GrowingHead, MultiHead, ResNet18, SimpleMLP, SingleHead, SlimResNet18
from cl_lab.protocols import ModelSpec
from cl_lab.records import Experience, Stream, TensorData

SPECS = [models.MLP, SimpleMLP, ConvNet, ResNet18, SlimResNet18]


def stream(
    shape: tuple[int, ...] = (3, 16, 16),
    tasks: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3), (4, 5)),
    task_labels: bool = False,
) -> Stream:
    """A stream whose tensors are never made: models must not need them."""

    def never() -> TensorData:
        raise AssertionError("a model looked at the data")

    experiences = tuple(Experience(i, f"e{i}", c, never, never) for i, c in enumerate(tasks))
    n_classes = max(c for task in tasks for c in task) + 1
    return Stream("toy", experiences, shape, n_classes, task_labels=task_labels)


def batch(s: Stream, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that cycle through the tasks, each with a class of its task."""
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(n) % len(s.experiences)
    y = torch.tensor([s.experiences[int(i)].classes[k % 2] for k, i in enumerate(t)])
    return torch.randn(n, *s.input_shape, generator=generator), y, t


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("head", ["auto", "single", "growing", "multi"])
def test_shapes(spec: type[ModelSpec], head: str) -> None:
    s = stream(task_labels=True)
    torch.manual_seed(0)
    model = build(spec, {"head": head}, "model").build(s)
    x, y, t = batch(s)
    logits = model(x, t)
    assert logits.shape == (6, 6)
    assert logits.dtype == torch.float32
    h = model.features(x)
    assert h.shape == (6, model.head.linear.in_features)
    cross_entropy(logits, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.observe([0, 1])


@pytest.mark.parametrize("spec", SPECS)
def test_auto_takes_the_head_the_stream_needs(spec: type[ModelSpec]) -> None:
    assert isinstance(spec().build(stream(task_labels=True)).head, MultiHead)
    assert isinstance(spec().build(stream()).head, SingleHead)
    assert isinstance(build(spec, {"head": "growing"}, "model").build(stream()).head, GrowingHead)
    with pytest.raises(ConfigError, match=r"model\.head = 'multi': stream 'toy' tells no task labels"):
        build(spec, {"head": "multi"}, "model").build(stream())


@pytest.mark.parametrize("spec", SPECS)
def test_equal_seeds_give_equal_models(spec: type[ModelSpec]) -> None:
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(spec().build(stream()).state_dict())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])
    assert not torch.equal(made[0]["head.linear.weight"], made[2]["head.linear.weight"])


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_works_in_place(spec: type[ModelSpec]) -> None:
    model = spec().build(stream())
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        kept.extend((v, v.clone()) for v in (*inputs, output))

    for module in model.modules():
        module.register_forward_hook(keep)
    x, _, t = batch(stream())
    model(x, t)
    assert len(kept) > 3
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("spec", SPECS)
def test_knobs_are_documented(spec: type[ModelSpec]) -> None:
    rows = describe(spec)
    assert rows[-1]["name"] == "head"
    assert all(row["doc"] for row in rows)
    assert (spec.__doc__ or "").partition("\n")[0].endswith(".")


def test_single_head_is_the_linear_layer() -> None:
    head = SingleHead(4, 3)
    h = torch.randn(2, 4)
    assert torch.equal(head(h, torch.zeros(2, dtype=torch.int64)), head.linear(h))
    head.observe([0])
    assert not list(head.buffers())


def test_growing_head() -> None:
    torch.manual_seed(0)
    s = stream((5,))
    model = build(models.MLP, {"hidden": [8], "head": "growing"}, "model").build(s)
    x, _, t = batch(s)
    free = model(x, t)
    assert free.isfinite().all(), "before anything is observed, all outputs are possible"
    assert torch.equal(free, model.head.linear(model.features(x)))

    model.observe([2, 3])
    masked = model(x, t)
    assert torch.equal(masked[:, 2:4], free[:, 2:4])
    assert (masked[:, [0, 1, 4, 5]] == -torch.inf).all()
    model.observe(range(2))
    assert (model(x, t)[:, :4]).isfinite().all()

    y = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = cross_entropy(model(x, t), y)
    loss.backward()
    assert loss.isfinite()
    grad = model.head.linear.weight.grad
    assert (grad[4:] == 0).all()
    assert (model.head.linear.bias.grad[4:] == 0).all()
    assert (grad[:4] != 0).any(dim=1).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())

    again = build(models.MLP, {"hidden": [8], "head": "growing"}, "model").build(s)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, t), model(x, t)), "what was observed is part of the state"

    with pytest.raises(ValueError, match="6 outputs"):
        model.observe([6])
    with pytest.raises(ValueError, match="6 outputs"):
        model.observe([-1])
    model.observe([])


def test_multi_head_is_one_head_per_task() -> None:
    torch.manual_seed(0)
    s = stream((5,), task_labels=True)
    model = build(models.MLP, {"hidden": [8]}, "model").build(s)
    x, y, t = batch(s, 12)
    logits = model(x, t)
    for row, task in zip(logits, t, strict=True):
        assert set(row.isfinite().nonzero().flatten().tolist()) == set(s.experiences[int(task)].classes)
    assert all(int(c) in s.experiences[int(i)].classes for c, i in zip(logits.argmax(1), t, strict=True))

    # A batch of mixed tasks gives what one batch per task gives, and what separate small heads give.
    h = model.features(x)
    total = torch.zeros(())
    for e in s.experiences:
        rows = t == e.index
        assert torch.allclose(model(x[rows], t[rows]), logits[rows])
        small = nn.Linear(8, len(e.classes))
        with torch.no_grad():
            small.weight.copy_(model.head.linear.weight[list(e.classes)])
            small.bias.copy_(model.head.linear.bias[list(e.classes)])
        assert torch.allclose(small(h[rows]), logits[rows][:, list(e.classes)])
        local = torch.tensor([e.classes.index(int(c)) for c in y[rows]])
        total = total + cross_entropy(small(h[rows]), local, reduction="sum")
    assert torch.allclose(cross_entropy(logits, y, reduction="sum"), total)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_outputs_get_exactly_no_gradient(reduction: str) -> None:
    torch.manual_seed(0)
    s = stream((5,), task_labels=True)
    model = build(models.MLP, {"hidden": [8]}, "model").build(s)
    x, y, t = batch(s, 12)
    rows = t == 1
    loss = cross_entropy(model(x[rows], t[rows]), y[rows], reduction=reduction).sum()
    loss.backward()
    assert loss.isfinite()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    for name in ("head.linear.weight", "head.linear.bias"):
        assert (grads[name][[0, 1, 4, 5]] == 0).all()
        assert (grads[name][2:4] != 0).any()


def test_masked_loss_survives_extreme_logits() -> None:
    head = MultiHead(1, 4, [(0, 1), (2, 3)])
    h = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = cross_entropy(head(h, torch.tensor([0, 1])), torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert h.grad is not None
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["growing", "multi"])
def test_masks_hold_in_low_precision(kind: str) -> None:
    s = stream((5,), task_labels=True)
    model = build(models.MLP, {"hidden": [8], "head": kind}, "model").build(s).to(torch.bfloat16)
    model.observe([0, 1, 2, 3, 4])
    x, y, t = batch(s, 5)
    logits = model(x.bfloat16(), t)
    assert logits.dtype == torch.bfloat16
    cross_entropy(logits, y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_kept_momentum_moves_masked_rows() -> None:
    # The documented caveat: a gradient of zero stops no optimiser that remembers.
    torch.manual_seed(0)
    s = stream((5,), task_labels=True)
    model = build(models.MLP, {"hidden": []}, "model").build(s)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y, t = batch(s, 12)
    moved = []
    for task in (0, 1):
        before = model.head.linear.weight.detach().clone()
        optimiser.zero_grad()
        cross_entropy(model(x[t == task], t[t == task]), y[t == task]).backward()
        optimiser.step()
        moved.append((model.head.linear.weight != before).any(dim=1).tolist())
    assert moved == [[True, True, False, False, False, False], [True, True, True, True, False, False]]


def test_parameter_counts() -> None:
    ten = stream((3, 32, 32), (tuple(range(10)),))
    assert models.count_parameters(ResNet18().build(ten)) == 11_173_962
    mnist = stream((1, 28, 28), (tuple(range(10)),))
    mlp = models.MLP().build(mnist)
    assert models.count_parameters(mlp) == 785 * 400 + 401 * 400 + 401 * 10
    mlp.head.requires_grad_(False)
    assert models.count_parameters(mlp, trainable=True) == 785 * 400 + 401 * 400
    assert models.count_parameters(SimpleMLP().build(mnist)) == 785 * 512 + 513 * 10
    conv = ConvNet().build(mnist)
    assert models.count_parameters(conv) == 10 * 32 + (9 * 32 + 1) * 64 + (64 * 49 + 1) * 256 + 257 * 10


def test_module_paths() -> None:
    def names(spec: ModelSpec) -> set[str]:
        return {n for n, _ in spec.build(stream()).named_parameters()}

    assert (
        names(models.MLP(dropout=0.5))
        == names(models.MLP())
        >= {
            "backbone.layers.0.linear.weight",
            "backbone.layers.1.linear.bias",
            "head.linear.weight",
        }
    )
    assert "backbone.layers.0.linear.weight" in names(SimpleMLP())
    assert names(ConvNet(batch_norm=True)) >= {"backbone.blocks.1.conv.weight", "backbone.blocks.0.norm.bias"}
    assert names(SlimResNet18()) >= {"backbone.conv1.weight", "backbone.layer4.1.bn2.weight"}
    assert "backbone.layer2.0.shortcut.0.weight" in names(SlimResNet18())


def test_mlp_knobs() -> None:
    s = stream((2, 3))
    plain = build(models.MLP, {"hidden": []}, "model").build(s)
    x, _, t = batch(s)
    assert torch.equal(plain.features(x), x.flatten(1))
    kinds = [
        type(module) for module in build(models.MLP, {"hidden": [7, 5], "activation": "tanh"}, "m").build(s).modules()
    ]
    assert kinds.count(nn.Tanh) == 2
    assert nn.ReLU not in kinds
    dropped = build(models.MLP, {"hidden": [64], "dropout": 0.5}, "m").build(s)
    assert not torch.equal(dropped(x, t), dropped(x, t))
    dropped.eval()
    assert torch.equal(dropped(x, t), dropped(x, t))


def test_two_models_share_no_list() -> None:
    models.MLP().hidden.append(3)
    assert models.MLP().hidden == [400, 400]


@pytest.mark.parametrize(
    ("spec", "values", "shape", "why"),
    [
        (ConvNet, {}, (64,), r"model 'convnet' takes images .* samples of stream 'toy' are \[64\]; use model 'mlp'"),
        (ResNet18, {}, (28, 28), r"model 'resnet18' takes images"),
        (SlimResNet18, {}, (784,), r"model 'slim-resnet18' takes images"),
        (ConvNet, {"channels": [8, 8, 8, 8]}, (1, 8, 8), r"4 blocks halve images of stream 'toy' \(8x8\) to nothing"),
        (ConvNet, {"channels": [8, 0]}, (1, 8, 8), r"model\.channels = \[8, 0\]: every entry must be at least 1"),
        (models.MLP, {"hidden": [-1]}, (4,), r"model\.hidden = \[-1\]"),
        (ConvNet, {"channels": []}, (1, 8, 8), r"model\.channels = \[\]"),
        (ConvNet, {"kernel_size": 2}, (1, 8, 8), r"model\.kernel_size = 2"),
        (models.MLP, {"dropout": 1.0}, (4,), r"model\.dropout = 1\.0"),
        (models.MLP, {"head": "dual"}, (4,), r"model\.head = 'dual'"),
    ],
)
def test_bad_configurations_say_why(
    spec: type[ModelSpec], values: dict[str, Any], shape: tuple[int, ...], why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        build(spec, values, "model").build(stream(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spec", "size"), [(ConvNet, 8), (ConvNet, 28), (SlimResNet18, 8), (SlimResNet18, 64)])
def test_images_of_any_size(spec: type[ModelSpec], size: int) -> None:
    s = stream((1, size, size))
    x, _, t = batch(s, 2)
    assert spec().build(s)(x, t).shape == (2, 6)


def avalanche(module: str) -> Any:
    """Avalanche's module, imported in spite of what it warns about, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cl_lab.compat import import_torchvision

        import_torchvision()
        pytest.importorskip("avalanche")
        return import_module(module)


def renamed(theirs: nn.Module, pairs: dict[str, str]) -> dict[str, Tensor]:
    state = {}
    for name, value in theirs.state_dict().items():
        prefix = next(p for p in pairs if name.startswith(p))
        state[pairs[prefix] + name.removeprefix(prefix)] = value
    return state


def same(ours: Classifier, state: dict[str, Tensor]) -> bool:
    mine = ours.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[k], state[k]) for k in mine)


@pytest.mark.slow
def test_avalanche_has_the_same_networks() -> None:
    slim = avalanche("avalanche.models.slim_resnet18")
    simple = avalanche("avalanche.models.simple_mlp")
    cifar = stream((3, 32, 32), (tuple(range(10)),))
    torch.manual_seed(5)
    theirs = slim.SlimResNet18(10)
    torch.manual_seed(5)
    ours = SlimResNet18().build(cifar)
    assert models.count_parameters(ours) == models.count_parameters(theirs)
    assert same(ours, renamed(theirs, {"linear": "head.linear", "": "backbone."}))
    x = torch.randn(4, 3, 32, 32)
    t = torch.zeros(4, dtype=torch.int64)
    assert torch.allclose(ours(x, t), theirs(x), atol=1e-6)

    mnist = stream((1, 28, 28), (tuple(range(10)),))
    torch.manual_seed(6)
    theirs = simple.SimpleMLP(num_classes=10)
    torch.manual_seed(6)
    ours = SimpleMLP().build(mnist)
    assert same(ours, renamed(theirs, {"features.0": "backbone.layers.0.linear", "classifier": "head.linear"}))
    x = torch.randn(4, 1, 28, 28)
    assert torch.allclose(ours.eval()(x, t), theirs.eval()(x))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.__name__)
def test_a_model_can_be_cut_behind_every_stage(spec: type[ModelSpec]) -> None:
    """Latents of the lower part, through the upper part, are the whole; and the lower part's parameters are named."""
    model = spec().build(stream()).eval()
    assert isinstance(model, Classifier)
    x, t = torch.rand(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64)
    whole = model(x, t)
    names = [name for name, _ in model.backbone.stages()]
    every = {n.rpartition(".")[0] for n, _ in model.backbone.named_parameters()}
    held: set[str] = set()
    for name in names:
        lower = {p.removeprefix("backbone.") for p in model.split(name)}
        assert held <= lower
        held = lower
        latents = model.latents(x)
        torch.testing.assert_close(model(latents, t, latent=True), whole)
        model.zero_grad()
        model(latents.detach(), t, latent=True).sum().backward()
        reached = {n.rpartition(".")[0] for n, p in model.backbone.named_parameters() if p.grad is not None}
        assert reached == every - lower
    assert held == every
    with pytest.raises(ConfigError, match=r"cannot be split behind 'layer9'.*its stages are") as caught:
        model.split("layer9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [models.MLP, models.SimpleMLP, models.Linear, ConvNet, SlimResNet18])
def test_a_stream_that_asks_for_words_has_its_model(spec: type[ModelSpec]) -> None:
    knobs = registry.load("scenarios", "biography")[0].conformance_knobs()
    asks = registry.create("scenarios", {"name": "biography", **knobs}, "scenario").stream(0)
    with pytest.raises(
        ConfigError, match=r"^model: stream 'Biography' asks for answers in words.*; use model 'causal-lm'$"
    ):
        build(spec, {}, "model").build(asks)
