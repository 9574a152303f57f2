"""The built-in models: a backbone, and a head that decides which outputs are possible.

Every model is a :class:`Classifier`. Its modules are named so that ``freeze`` and adapters can select them by path:

* ``mlp``: ``backbone.layers.<i>`` is hidden layer i, holding ``linear``, ``activation`` and maybe ``dropout``;
* ``simple-mlp``: the same, so its one hidden layer is ``backbone.layers.0.linear``;
* ``linear``: none, and a head without bias;
* ``convnet``: ``backbone.blocks.<i>`` holds ``conv``, maybe ``norm``, ``activation``, ``pool``; then
  ``backbone.layers.<i>`` as above;
* ``resnet18``, ``slim-resnet18``: ``backbone.conv1``, ``backbone.bn1``, ``backbone.layer1`` … ``layer4``, each of two
  blocks that hold ``conv1``, ``bn1``, ``conv2``, ``bn2`` and ``shortcut``: ``backbone.layer1.0.conv1``;
* all: ``head.linear``, the one matrix over all outputs.

A backbone is a sequence of named stages, so a model can be cut behind any of them: what comes before makes *latents*, what
comes after makes logits of them (``split``, ``latents``; REMIND and its like train on stored latents).

Weights start from PyTorch's defaults, drawn from the global generator in the order of construction (``linear``: from
zero): equal seeds give equal models. No module works in place, so hooks see inputs and outputs as they were.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from cl_lab.errors import ConfigError, nearest
from cl_lab.knobs import knob
from cl_lab.protocols import ModelSpec
from cl_lab.records import FlatLatent, Stream

HeadKind = Literal["auto", "single", "growing", "multi"]
Activation = Literal["relu", "tanh"]

HEAD_DOC = (
    "single: all outputs; growing: only classes met so far; multi: only the classes of the sample's task; "
    "auto: multi where the stream tells task labels, else single"
)


class Head(nn.Module):
    """One linear layer over all ``n_classes`` outputs of the stream; subclasses say which of them are possible.

    Impossible outputs are ``-inf``: softmax gives them exactly 0, cross-entropy and its gradient stay finite as long
    as the target itself is possible, and their rows of the weight get a gradient of exactly zero. So masking one
    matrix is the same function as separate heads, serves batches of mixed tasks without a loop, and leaves no
    parameter unused (DDP).

    Mind three things. A zero gradient does not stop an optimiser with momentum or weight decay that is kept over
    experiences from moving those rows (van de Ven's and Mammoth's code share this). The loss of a sample whose target
    is impossible is ``inf``. And ``0 · -inf`` is NaN, so soft targets and label smoothing must skip impossible
    outputs.
    """

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n_classes)

    def observe(self, classes: Iterable[int]) -> None:
        """These classes are about to be learnt. Does nothing unless the head grows."""


class SingleHead(Head):
    """All outputs are possible at all times."""

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """Logits ``[B, n_classes]`` of features ``h`` ``[B, d]``; the task labels ``t`` are not looked at."""
        logits: Tensor = self.linear(h)
        return logits


class GrowingHead(Head):
    """The classes met so far are possible; before the first :meth:`observe`, all are (so that R₀ is defined)."""

    seen: Tensor

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__(width, n_classes)
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool))

    def observe(self, classes: Iterable[int]) -> None:
        """Make these output indices possible from now on. Raises :class:`ValueError` for an index out of range."""
        index = sorted({int(c) for c in classes})
        if index and not 0 <= index[0] <= index[-1] < len(self.seen):
            raise ValueError(f"classes {index} are not all within the {len(self.seen)} outputs of the head")
        self.seen[index] = True

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """Logits ``[B, n_classes]`` of features ``h`` ``[B, d]``, ``-inf`` for classes not met; ``t`` is ignored."""
        logits: Tensor = self.linear(h)
        possible = self.seen | ~self.seen.any()  # stays on the device: no branch on a tensor's value
        return torch.where(possible, logits, float("-inf"))


class MultiHead(Head):
    """The classes of a sample's own task are possible; its task label is the index of its experience."""

    active: Tensor

    def __init__(self, width: int, n_classes: int, tasks: Sequence[Sequence[int]]) -> None:
        super().__init__(width, n_classes)
        active = torch.zeros(len(tasks), n_classes, dtype=torch.bool)
        for row, classes in zip(active, tasks, strict=True):
            row[list(classes)] = True
        self.register_buffer("active", active)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """Logits ``[B, n_classes]`` of features ``h`` ``[B, d]`` and task labels ``t`` ``[B]``; ``-inf`` off-task."""
        logits: Tensor = self.linear(h)
        return torch.where(self.active[t], logits, float("-inf"))


Stage = tuple[str, Callable[[Tensor], Tensor]]
"""A step of a backbone: the path of its module (the last of them, where it has several) and what it does."""


class Backbone(nn.Module):
    """A sequence of :meth:`stages` from input to features of size :attr:`width`."""

    width: int

    flat_latents: Mapping[str, FlatLatent] = MappingProxyType({})
    """The stages behind which latents are flat rows, and how these are laid out."""

    @property
    def conditional(self) -> bool:
        """Whether something of a sample's own is added on its way: ``forward`` then takes ``t``, and no layer is cut off."""
        return False

    def remembering_prompts(self) -> AbstractContextManager[None]:
        """Within, a language model reads a prompt that comes again but once, where it can; others remember nothing."""
        return nullcontext()

    def stages(self) -> list[Stage]:
        """The steps in order; their composition is :meth:`forward`."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Features ``[B, width]`` of ``x`` ``[B, *input_shape]``; task labels ``t`` ``[B]`` where it is conditional."""
        return self.run(x, 0, None)

    def run(self, x: Tensor, first: int, last: int | None) -> Tensor:
        """The steps ``first`` … ``last − 1`` of :meth:`stages`, or all from ``first`` on."""
        for _, step in self.stages()[first:last]:
            x = step(x)
        return x


class Classifier(nn.Module):
    """A backbone that makes features and a :class:`Head` that makes logits of them."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen: str | None = None
        """The stage up to which the layers are never to change; a run puts the stream through them once."""
        self.keep_latents = False
        """Whether what the frozen layers make is kept on disk for other runs."""
        self._start = 0  # stages that are gone: the stream has been put through them
        self._cut: int | None = None  # stages that make latents

    def forward(self, x: Tensor, t: Tensor, *, latent: bool = False) -> Tensor:
        """Logits ``[B, n_classes]`` of ``x`` ``[B, *input_shape]`` float32 with task labels ``t`` ``[B]`` int64.

        With ``latent``, ``x`` are :meth:`latents` and enter behind the split.
        """
        if latent and self._cut is None:
            raise ValueError("latents were given to a model that is not split; call split first")
        x = self._through(x, self._cut if latent else self._start, None, t)
        logits: Tensor = self.head(x, t)
        return logits

    def split(self, stage: str) -> list[str]:
        """Cut the backbone behind ``stage``; returns the paths of the modules (or parameters) before the cut.

        ``stage`` is a path below ``backbone``: ``layer4.0``, ``layers.0``, ``blocks.1``. Raises :class:`ConfigError` where
        there is no such stage.
        """
        lower = self.modules_up_to(stage)
        self._cut = [name for name, _ in self.backbone.stages()].index(stage) + 1
        return lower

    def freeze_up_to(self, stage: str | None, *, keep: bool) -> None:
        """Set :attr:`frozen` and :attr:`keep_latents`. Raises :class:`ConfigError` where there is no such stage."""
        if stage is not None:
            self.split(stage)
        self.frozen, self.keep_latents = stage, keep

    def stages(self) -> list[str]:
        """Names of the backbone's stages that are there, in order."""
        return [name for name, _ in self.backbone.stages()][self._start :]

    @property
    def cut(self) -> str | None:
        """The stage behind which the backbone is cut."""
        return None if self._cut is None else self.backbone.stages()[self._cut - 1][0]

    def modules_up_to(self, stage: str) -> list[str]:
        """What :meth:`split` returns, without a cut."""
        if self.backbone.conditional:
            raise ConfigError(
                f"strategy chain: another strategy cuts the network behind '{stage}', but what stands before each text goes "
                "through all layers, none of which is trained; leave out what cuts or freezes layers"
            )
        names = [name for name, _ in self.backbone.stages()]
        if stage not in names[max(0, self._start - 1) :]:
            there = names[max(0, self._start - 1) :]
            raise ConfigError(
                f"the model cannot be split behind '{stage}'{nearest(stage, there)}; its stages are {', '.join(there)}"
            )
        place = names.index(stage) + 1
        before, after = names[:place], names[place:]
        owners = [
            n for n, m in self.backbone.named_modules() if n and next(m.parameters(recurse=False), None) is not None
        ]
        # A stage is named after its last module; modules that belong to none by name come before the first that do.
        lower = [o for o in owners if _under(o, before) or not _under(o, after)]
        held = []
        for o in lower:
            module = self.backbone.get_submodule(o)
            own = [n for n, _ in module.named_parameters(recurse=False)]
            # A module that holds others besides (a transformer's class token) is not all below the cut.
            holds_others = any(True for child in module.children() for _ in child.parameters())
            held += [f"backbone.{o}.{n}" for n in own] if holds_others else [f"backbone.{o}"]
        return held

    def latents(self, x: Tensor) -> Tensor:
        """What the stages before the split make of ``x`` ``[B, *input_shape]``: ``[B, C, …]``."""
        return self._through(x, self._start, self._cut)

    def remove_below(self, stage: str) -> None:
        """Take away the stages up to ``stage``: the model's input now is what they would have made of it."""
        for path in self.split(stage):
            parent, _, name = path.rpartition(".")
            holder = self.get_submodule(parent)
            setattr(holder, name, None if name in holder._parameters else nn.Identity())
        self._start, self._cut = self._cut or 0, None

    def features(self, x: Tensor) -> Tensor:
        """The penultimate features ``[B, d]`` of ``x`` ``[B, *input_shape]``: what the head sees."""
        return self._through(x, self._start, None)

    def _through(self, x: Tensor, first: int | None, last: int | None, t: Tensor | None = None) -> Tensor:
        if not first and last is None:
            h: Tensor = self.backbone(x, t) if self.backbone.conditional else self.backbone(x)
            return h
        return self.backbone.run(x, first or 0, last)

    def observe(self, classes: Iterable[int]) -> None:
        """These classes are about to be learnt; call it before their training. Matters to a growing head only."""
        self.head.observe(classes)


def _under(path: str, stages: Sequence[str]) -> bool:
    return any(path == s or path.startswith(s + ".") for s in stages)


def _layers(width: int, hidden: Sequence[int], activation: Activation, dropout: float) -> nn.Sequential:
    layers = nn.Sequential()
    for size in hidden:
        parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(width, size))
        parts["activation"] = nn.ReLU() if activation == "relu" else nn.Tanh()
        if dropout > 0:
            parts["dropout"] = nn.Dropout(dropout)
        layers.append(nn.Sequential(parts))
        width = size
    return layers


class MLPBackbone(Backbone):
    """Fully connected layers on the flattened input: ``[B, *input_shape]`` → ``[B, width]``."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: Activation, dropout: float) -> None:
        super().__init__()
        self.layers = _layers(inputs, hidden, activation, dropout)
        self.width = hidden[-1] if hidden else inputs

    def stages(self) -> list[Stage]:
        """``flatten``, then each hidden layer."""
        return [("flatten", _flatten), *_children("layers", self.layers)]


class ConvBackbone(Backbone):
    """Blocks of convolution, ReLU and halving, then fully connected layers: ``[B, C, H, W]`` → ``[B, width]``."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        kernel_size: int,
        batch_norm: bool,
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        depth, height, width = shape
        self.blocks = nn.Sequential()
        for size in channels:
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            parts["conv"] = nn.Conv2d(depth, size, kernel_size, padding=kernel_size // 2, bias=not batch_norm)
            if batch_norm:
                parts["norm"] = nn.BatchNorm2d(size)
            parts["activation"] = nn.ReLU()
            parts["pool"] = nn.MaxPool2d(2)
            self.blocks.append(nn.Sequential(parts))
            depth, height, width = size, height // 2, width // 2
        inputs = depth * height * width
        self.layers = _layers(inputs, hidden, "relu", dropout)
        self.width = hidden[-1] if hidden else inputs

    def stages(self) -> list[Stage]:
        """Each block, ``flatten``, then each fully connected layer."""
        return [*_children("blocks", self.blocks), ("flatten", _flatten), *_children("layers", self.layers)]


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1)


class ImageBackbone(Backbone):
    """A backbone that was made for colour images of its own scale: what the stream gives is brought to that first.

    ``scale`` and ``shift`` ``[channels, 1, 1]`` make its input of the stream's; one channel becomes three; ``resolution`` is
    the side in pixels to which images are resized, ``None`` for none.
    """

    def __init__(self, scale: Tensor, shift: Tensor, resolution: int | None) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self._resolution = resolution

    def extra_repr(self) -> str:
        """Names what its modules do not tell."""
        return f"resolution={self._resolution}"

    def enter(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` of the stream → ``[B, 3, H', W']``."""
        x = torch.addcmul(self.get_buffer("shift"), x, self.get_buffer("scale"))
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self._resolution is not None and max(x.shape[2:]) != self._resolution:
            x = interpolate(x, size=(self._resolution, self._resolution), mode="bilinear", align_corners=False)
        return x


def to_scale_of(stream: Stream, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift`` ``[C, 1, 1]`` that undo the stream's own normalisation and apply ``(pixel − mean) / std``.

    Pixels are in [0, 1]; ``mean`` and ``std`` are of three channels, or of one for a grey stream.
    """
    channels = stream.input_shape[0]
    own_mean, own_std = stream.mean or (0.0,) * channels, stream.std or (1.0,) * channels
    values = (own_mean, own_std, *((v if len(v) == channels else [sum(v) / len(v)] * channels) for v in (mean, std)))
    of_stream, spread, wanted, unit = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in values)
    return spread / unit, (of_stream - wanted) / unit


def mean_pool(h: Tensor) -> Tensor:
    """The mean over height and width: not AdaptiveAvgPool2d, whose backward pass is not deterministic on CUDA."""
    return h.mean(dim=(2, 3))


def _children(path: str, layers: nn.Sequential) -> list[Stage]:
    return [(f"{path}.{name}", layer) for name, layer in layers.named_children()]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation around a shortcut (He et al. 2016, Fig. 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` → ``[B, outputs, H/stride, W/stride]``."""
        h = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(h + self.shortcut(x))


class ResNetBackbone(Backbone):
    """ResNet-18 with the stem for small images (3×3, stride 1, no pooling): ``[B, C, H, W]`` → ``[B, 8·filters]``."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.layer1 = nn.Sequential(BasicBlock(filters, filters, 1), BasicBlock(filters, filters, 1))
        self.layer2 = nn.Sequential(BasicBlock(filters, 2 * filters, 2), BasicBlock(2 * filters, 2 * filters, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * filters, 4 * filters, 2), BasicBlock(4 * filters, 4 * filters, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * filters, 8 * filters, 2), BasicBlock(8 * filters, 8 * filters, 1))
        self.width = 8 * filters

    def stages(self) -> list[Stage]:
        """``bn1`` (the stem), each block, and ``pool``: the mean over what is left of the image."""
        blocks = [s for i in range(1, 5) for s in _children(f"layer{i}", getattr(self, f"layer{i}"))]
        return [("bn1", self._stem), *blocks, ("pool", mean_pool)]

    def _stem(self, x: Tensor) -> Tensor:
        h: Tensor = relu(self.bn1(self.conv1(x)))
        return h


@dataclass
class Linear(ModelSpec):
    """One linear layer without bias that starts from zero: every output is an inner product with the flattened input.

    The model of linear theory (``linear-theory``); for softmax regression with a bias take ``mlp`` with ``hidden: []``.
    """

    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """The zero function on ``stream``. Raises :class:`ConfigError` for a head the stream cannot have."""
        backbone = MLPBackbone(_numel(stream), [], "relu", 0.0)
        model = classifier(backbone, backbone.width, stream, self.head)
        model.head.linear.register_parameter("bias", None)
        nn.init.zeros_(model.head.linear.weight)
        return model


@dataclass
class MLP(ModelSpec):
    """Fully connected network on the flattened input; by default van de Ven's two layers of 400 ReLU units.

    Source: van de Ven & Tolias 2019, §5.1. An empty ``hidden`` gives softmax regression.
    """

    hidden: list[int] = knob([400, 400], "width of each hidden layer, from the input on")
    activation: Activation = knob("relu", "nonlinearity after each hidden layer")
    dropout: float = knob(0.0, "share of units dropped after each hidden layer in training", ge=0, lt=1)
    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """A fresh MLP for ``stream``. Raises :class:`ConfigError` for widths below 1 or an impossible head."""
        _positive("hidden", self.hidden)
        backbone = MLPBackbone(_numel(stream), self.hidden, self.activation, self.dropout)
        return classifier(backbone, backbone.width, stream, self.head)


@dataclass
class SimpleMLP(ModelSpec):
    """Avalanche's SimpleMLP: one hidden layer of 512 ReLU units with dropout 0.5.

    Source: Avalanche 0.6, ``models/simple_mlp.py``; equal seeds give equal weights.
    """

    hidden: int = knob(512, "width of a hidden layer", ge=1)
    layers: int = knob(1, "number of hidden layers", ge=1)
    dropout: float = knob(0.5, "share of units dropped after each hidden layer in training", ge=0, lt=1)
    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """A fresh network for ``stream``. Raises :class:`ConfigError` for a head the stream cannot have."""
        backbone = MLPBackbone(_numel(stream), [self.hidden] * self.layers, "relu", self.dropout)
        return classifier(backbone, backbone.width, stream, self.head)


@dataclass
class ConvNet(ModelSpec):
    """Small convolutional network: blocks of convolution, ReLU and 2×2 max pooling, then fully connected layers."""

    channels: list[int] = knob([32, 64], "channels of each block; every block halves the image", min_length=1)
    kernel_size: Literal[1, 3, 5, 7] = knob(3, "side of the convolutions")
    batch_norm: bool = knob(False, "normalise each block; its running statistics drift with the stream")
    hidden: list[int] = knob([256], "width of each fully connected layer after the blocks")
    dropout: float = knob(0.0, "share of units dropped after each fully connected layer in training", ge=0, lt=1)
    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """A fresh network for ``stream``.

        Raises :class:`ConfigError` for input that is no image or too small for the blocks, widths below 1, or a head
        the stream cannot have.
        """
        _positive("channels", self.channels)
        _positive("hidden", self.hidden)
        shape = image_shape("convnet", stream)
        if min(shape[1:]) < 2 ** len(self.channels):
            raise ConfigError(
                f"model.channels = {self.channels}: {len(self.channels)} blocks halve images of stream '{stream.name}' "
                f"({shape[1]}x{shape[2]}) to nothing; use fewer blocks"
            )
        backbone = ConvBackbone(shape, self.channels, self.kernel_size, self.batch_norm, self.hidden, self.dropout)
        return classifier(backbone, backbone.width, stream, self.head)


@dataclass
class ResNet18(ModelSpec):
    """ResNet-18 for small images: 3×3 stem with stride 1 and no pooling, then global average pooling (512 features).

    Source: He et al. 2016 with the CIFAR stem; 11,173,962 parameters for 3 channels and 10 classes. Below 16×16 pixels
    the last map is one pixel, and batch normalisation then refuses to train on a batch of one.
    """

    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """A fresh network for ``stream``. Raises :class:`ConfigError` for non-images or an impossible head."""
        backbone = ResNetBackbone(image_shape("resnet18", stream)[0], 64)
        return classifier(backbone, backbone.width, stream, self.head)


@dataclass
class SlimResNet18(ModelSpec):
    """The reduced ResNet-18 of GEM: 20 filters instead of 64 (160 features).

    Source: Lopez-Paz & Ranzato 2017, §5; Avalanche's and Mammoth's reduced ResNet-18. Equal seeds give Avalanche's
    weights.
    """

    filters: int = knob(20, "filters of the first layer; the features are eight times as many", ge=1)
    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """A fresh network for ``stream``. Raises :class:`ConfigError` for non-images or an impossible head."""
        backbone = ResNetBackbone(image_shape("slim-resnet18", stream)[0], self.filters)
        return classifier(backbone, backbone.width, stream, self.head)


def channels_last(model: nn.Module) -> None:
    """Lay the kernels of two-dimensional convolutions out with the channel innermost, in place.

    What passes through such a convolution comes out in that layout, and so does its gradient. On a CPU, batches of 64 are
    trained a fifth (ResNet-18) to a half faster (slim ResNet-18, a small convolutional network); values differ by rounding.
    """
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of scalars in the parameters of ``model`` (shared ones once), or in the trainable ones only."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def classifier(backbone: Backbone, width: int, stream: Stream, kind: HeadKind) -> Classifier:
    """A :class:`Classifier` with a head of that kind. Raises :class:`ConfigError` for one the stream cannot have."""
    _no_language(stream)
    if stream.objective == "regression" and kind in ("growing", "multi"):
        raise ConfigError(
            f"model.head = '{kind}': stream '{stream.name}' is a regression, which has no classes; use 'single'"
        )
    if kind == "multi" and not stream.task_labels:
        raise ConfigError(
            f"model.head = 'multi': stream '{stream.name}' tells no task labels; use 'single' or 'growing', "
            "or a task-incremental scenario"
        )
    if kind == "auto":
        kind = "multi" if stream.task_labels else "single"
    if kind == "multi":
        return Classifier(backbone, MultiHead(width, stream.n_classes, [e.classes for e in stream.experiences]))
    head = GrowingHead if kind == "growing" else SingleHead
    return Classifier(backbone, head(width, stream.n_classes))


def _no_language(stream: Stream) -> None:
    if stream.objective == "language":
        raise ConfigError(
            f"model: stream '{stream.name}' asks for answers in words, which this one does not give; use model 'causal-lm'"
        )


def _numel(stream: Stream) -> int:
    return int(torch.Size(stream.input_shape).numel())


def image_shape(model: str, stream: Stream) -> tuple[int, int, int]:
    """Channels, height and width of the stream's samples. Raises :class:`ConfigError` where they are no images."""
    _no_language(stream)
    if len(stream.input_shape) != 3 or min(stream.input_shape) < 1:
        raise ConfigError(
            f"model '{model}' takes images [channels, height, width], but samples of stream '{stream.name}' are "
            f"{list(stream.input_shape)}; use model 'mlp'"
        )
    channels, height, width = stream.input_shape
    return channels, height, width


def grey_or_colour(model: str, stream: Stream) -> None:
    """Raises :class:`ConfigError` unless the stream's samples are images of one or three channels."""
    channels = image_shape(model, stream)[0]
    if channels not in (1, 3):
        raise ConfigError(f"model '{model}' takes 1 or 3 channels, but stream '{stream.name}' has {channels}")


def _positive(name: str, sizes: Sequence[int]) -> None:
    if any(size < 1 for size in sizes):
        raise ConfigError(f"model.{name} = {list(sizes)}: every entry must be at least 1")
