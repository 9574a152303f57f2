"""Image models of torchvision and timm as backbones: their layers, their weights, their scale of input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_lab.compat import import_torchvision
from cl_lab.errors import ConfigError, DataError, nearest
from cl_lab.knobs import knob
from cl_lab.models import Classifier, ImageBackbone, Stage, grey_or_colour, mean_pool, to_scale_of
from cl_lab.pretrained import PretrainedImageModel
from cl_lab.records import Stream

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_Step = Callable[[Tensor], Tensor]


class LibraryBackbone(ImageBackbone):
    """A model of a library without its last layer: ``[B, C, H, W]`` → ``[B, width]``.

    It can be cut into the steps of one of the families below, provided that these, one after another, compute what the
    model does. That is tried on a random picture, and a model that no family reproduces is one stage, ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: Tensor,
        shift: Tensor,
        shape: tuple[int, int],
        resolution: int | None,
    ) -> None:
        super().__init__(scale, shift, resolution)
        self.model = model
        height, width = (resolution, resolution) if resolution else shape
        picture = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        model.eval()
        with torch.no_grad():
            try:
                features = model(picture)
            except RuntimeError as error:
                raise ConfigError(
                    f"model: cannot take images of {height}×{width} pixels ({_first_line(error)}); set model.resolution=224"
                ) from error
            # The family and not its steps: those hold on to modules, of which a copy of this has its own.
            self._family = next((f for f in _FAMILIES if _agrees(f, model, picture, features)), _whole)
        if features.dim() != 2:
            raise ConfigError(
                f"model: gives features {list(features.shape[1:])} where one vector is wanted; use another"
            )
        self.width = features.shape[1]
        model.train()

    def stages(self) -> list[Stage]:
        """The blocks of the model by path (``model.layer4.1``), or the one stage ``model``."""
        (first, step), *rest = self._family(self.model)
        return [(first, lambda x: step(self.enter(x))), *rest]


_Family = Callable[[Any], list[Stage]]
"""How models of a family are made up: the stages of one."""


def _agrees(family: _Family, model: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        for _, step in family(model):
            x = step(x)
    except (RuntimeError, TypeError, AttributeError, IndexError):  # made up in another way
        return False
    return x.shape == expected.shape and torch.allclose(x, expected, rtol=1e-3, atol=1e-4)


def _listed(path: str, blocks: Any) -> list[Stage]:
    return [(f"model.{path}.{name}", block) for name, block in blocks.named_children()]


def _in_turn(*steps: _Step) -> _Step:
    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def _residual(model: Any) -> list[Stage]:
    """ResNets of either library."""
    activation = model.relu if hasattr(model, "relu") else model.act1
    stem = _in_turn(model.conv1, model.bn1, activation, model.maxpool)
    blocks = [s for i in range(1, 5) for s in _listed(f"layer{i}", getattr(model, f"layer{i}"))]
    return [("model.bn1", stem), *blocks, ("pool", mean_pool)]


def _sequential(model: Any, between: _Step) -> list[Stage]:
    """torchvision's convolutional families: features one after another, the mean, and what is left of the classifier."""
    pool = getattr(model, "avgpool", None) or nn.AdaptiveAvgPool2d(1)
    end = _in_turn(pool, between, model.classifier)
    return [*_listed("features", model.features), ("model.classifier", end)]


def _torchvision_vit(model: Any) -> list[Stage]:
    def enter(x: Tensor) -> Tensor:
        tokens = model._process_input(x)
        tokens = torch.cat([model.class_token.expand(len(x), -1, -1), tokens], 1)
        h: Tensor = model.encoder.dropout(tokens + model.encoder.pos_embedding)
        return h

    def end(h: Tensor) -> Tensor:
        features: Tensor = model.heads(model.encoder.ln(h)[:, 0])
        return features

    return [("model.conv_proj", enter), *_listed("encoder.layers", model.encoder.layers), ("model.encoder.ln", end)]


def _timm_vit(model: Any) -> list[Stage]:
    def enter(x: Tensor) -> Tensor:
        h: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        return h

    # Pools with weights of their own come between the two norms; nothing would name these as above the cut.
    end = [("model.norm", model.norm), ("model.fc_norm", model.forward_head)] if model.attn_pool is None else []
    return [("model.patch_embed", enter), *_listed("blocks", model.blocks), *end]


def _timm_convolutional(model: Any) -> list[Stage]:
    """timm's EfficientNets and MobileNets: a stem, blocks, a widening."""
    stem = _in_turn(model.conv_stem, model.bn1)
    end = _in_turn(model.bn2, model.forward_head)
    blocks = _listed("blocks", model.blocks)
    return [("model.bn1", stem), *blocks, ("model.conv_head", model.conv_head), ("model.bn2", end)]


def _whole(model: Any) -> list[Stage]:
    return [("model", model)]


_FAMILIES: tuple[_Family, ...] = (
    _residual,
    partial(_sequential, between=nn.Flatten()),
    partial(_sequential, between=nn.Identity()),  # ConvNeXt's classifier flattens by itself
    _torchvision_vit,
    _timm_vit,
    _timm_convolutional,
)


@dataclass
class _LibraryModel(PretrainedImageModel):
    """What the two libraries share (abstract)."""

    library: ClassVar[str]

    architecture: str = knob("resnet18", "name of the model in the library")
    weights: str = knob("default", "default (downloaded once), random, or the path of a .pth or .safetensors file")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"weights": "random", "resolution": 32}

    def build(self, stream: Stream) -> Classifier:
        """The network with a fresh head.

        Raises :class:`ConfigError` for input that is no image, an architecture the library has not, weights that cannot be
        had, a stage the model has not or an impossible head, and :class:`DataError` for a file that holds something else.
        """
        grey_or_colour(self.library, stream)
        model, (mean, std), size = self._made()
        if self.weights not in ("default", "random"):
            _load(model, self.weights)
        scale, shift = to_scale_of(stream, mean, std)
        shape = stream.input_shape[1], stream.input_shape[2]
        backbone = LibraryBackbone(model, scale, shift, shape, size or self.resolution)
        return self.with_head(backbone, stream)

    def _made(self) -> tuple[nn.Module, tuple[Sequence[float], Sequence[float]], int | None]:
        """The model without its last layer, its input's mean and spread, and its only size, if it has one."""
        raise NotImplementedError

    def _unknown(self, there: list[str]) -> ConfigError:
        return ConfigError(
            f"model.architecture = '{self.architecture}': {self.library} has no such model"
            f"{nearest(self.architecture, there)}"
        )

    def _unreachable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"model.weights = 'default': those of '{self.architecture}' cannot be downloaded ({_first_line(error)}); check "
            "the network, give the path of a file, or 'random'"
        )


@dataclass
class TorchvisionModel(_LibraryModel):
    """Any image classifier of torchvision, with the weights that it publishes.

    Its last linear layer is taken away and the laboratory's head put there. ResNets, the families with ``features`` (VGG,
    MobileNet, EfficientNet, ConvNeXt) and vision transformers can be cut behind any block; others are one stage, ``model``.
    Most published weights were learnt on ImageNet, whose labels include the classes of CIFAR and Tiny-ImageNet, so results
    are those of a *pretrained* model. A vision transformer's input is resized to the one size it takes.
    """

    library: ClassVar[str] = "torchvision"

    def _made(self) -> tuple[nn.Module, tuple[Sequence[float], Sequence[float]], int | None]:
        import_torchvision()
        from torchvision import models

        there = models.list_models(module=models)
        if self.architecture not in there:
            raise self._unknown(there)
        published = models.get_model_weights(self.architecture).DEFAULT if self.weights == "default" else None
        try:
            model: nn.Module = models.get_model(self.architecture, weights=published)
        except (OSError, RuntimeError) as error:
            raise self._unreachable(error) from error
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if hasattr(model, "aux_logits") or not linear:
            raise ConfigError(
                f"model.architecture = '{self.architecture}': does not end in one linear layer, which the head takes the "
                "place of; use another, resnet18 say"
            )
        owner, _, last = linear[-1].rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Identity())
        scale = _IMAGENET
        if published is not None:
            preset = published.transforms()
            scale = (tuple(preset.mean), tuple(preset.std))
        return model, scale, getattr(model, "image_size", None)


@dataclass
class TimmModel(_LibraryModel):
    """Any image classifier of timm (``pip install timm``), with the weights that the Hugging Face hub has of it.

    Its last layer is taken away and the laboratory's head put there. ResNets, EfficientNets, MobileNets and vision
    transformers can be cut behind any block; others are one stage, ``model``. Most published weights were learnt on
    ImageNet, so results are those of a *pretrained* model. A vision transformer's input is resized to the one size it takes.
    """

    library: ClassVar[str] = "timm"

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return super().conformance_knobs() | {"architecture": "test_resnet"}

    def _made(self) -> tuple[nn.Module, tuple[Sequence[float], Sequence[float]], int | None]:
        if importlib.util.find_spec("timm") is None:
            raise ConfigError("model 'timm' needs the package timm; pip install timm")
        import_torchvision()
        import timm

        if not timm.is_model(self.architecture):
            raise self._unknown(timm.list_models())
        try:
            model: Any = timm.create_model(self.architecture, pretrained=self.weights == "default", num_classes=0)
        except Exception as error:  # the hub's client raises what its HTTP library does
            if self.weights != "default":
                raise
            raise self._unreachable(error) from error
        known = model.pretrained_cfg
        fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return model, (known["mean"], known["std"]), fixed[0] if fixed else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _load(model: nn.Module, source: str) -> None:
    """The weights in a file into ``model``; those of a last layer are left out."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"model.weights = '{source}': no such file; give its path, 'default' or 'random'")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        pickled = path.suffix != ".safetensors"
        read = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        own = model.state_dict()
        missing, _ = model.load_state_dict({k: v for k, v in read.items() if k in own}, strict=False)
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, UnpicklingError, SafetensorError) as error:
        raise DataError(f"model.weights = '{source}': not the weights of this model ({_first_line(error)})") from error
    if missing:
        raise DataError(
            f"model.weights = '{source}': not the weights of this model ({len(missing)} are missing, first {missing[0]})"
        )
