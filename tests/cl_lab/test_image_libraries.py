"""torchvision and timm as backbones: cut anywhere they compute the same, and what they lack is one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import save_file
from torch import nn

from cl_lab.compat import import_torchvision
from cl_lab.errors import ConfigError, DataError
from cl_lab.image_libraries import TimmModel, TorchvisionModel
from cl_lab.latents import put_through
from cl_lab.models import Classifier
from cl_lab.records import Experience, Stream, TensorData

import_torchvision()

# Each with a stage of its own in the middle; None: it cannot be cut.
TORCHVISION = {
    "resnet18": "model.layer2.0",
    "mobilenet_v3_small": "model.features.5",
    "vgg11": "model.features.10",
    "convnext_tiny": "model.features.3",
    "vit_b_32": "model.encoder.layers.encoder_layer_4",
    "shufflenet_v2_x0_5": None,
}
TIMM = {
    "test_resnet": "model.layer2.0",
    "test_efficientnet": "model.blocks.1",
    "test_vit": "model.blocks.3",
    "test_convnext": None,
}
EVERY = [(TorchvisionModel, *pair) for pair in TORCHVISION.items()] + [(TimmModel, *pair) for pair in TIMM.items()]


def stream(shape: tuple[int, ...] = (3, 64, 64), classes: int = 5, **more: Any) -> Stream:
    def never() -> TensorData:
        raise AssertionError("a model looked at the data")

    return Stream("made up", (Experience(0, "all", tuple(range(classes)), never, never),), shape, classes, **more)


def network(
    kind: type[TorchvisionModel] | type[TimmModel], architecture: str, on: Stream | None = None, **knobs: Any
) -> Classifier:
    if kind is TimmModel:
        pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return kind(**{"architecture": architecture, "weights": "random", **knobs}).build(on or stream()).eval()


@pytest.mark.parametrize(("kind", "architecture", "stage"), EVERY)
def test_cut_in_two_it_is_the_same_function(kind: Any, architecture: str, stage: str | None) -> None:
    model = network(kind, architecture)
    names = [name for name, _ in model.backbone.stages()]
    if stage is None:
        assert names == ["model"]
        return
    x, t = torch.rand(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        whole = model(x, t)
        lower = model.split(stage)
        latents = model.latents(x)
        assert torch.allclose(model(latents, t, latent=True), whole, atol=1e-5)
        assert latents.shape[1:] != x.shape[1:]
    # What is below the cut, by name, is what the latents depend on, and nothing else is.
    model.zero_grad()
    model.latents(x).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    below = {n for n, _ in model.named_parameters() if any(n == path or n.startswith(path + ".") for path in lower)}
    assert moved == below

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
        assert torch.allclose(model(latents, t, latent=True), whole, atol=1e-5), "a copy has layers of its own"
        assert not torch.allclose(copied(x, t), whole, atol=1e-5)


def test_features_are_the_librarys_own() -> None:
    """Of torchvision's ResNet-18: the model built by hand from equal weights, on pictures it scales itself."""
    from torchvision import models

    model = network(TorchvisionModel, "resnet18", stream(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)))
    theirs: Any = models.resnet18().eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(model.backbone.model.state_dict())
    pixels = torch.rand(2, 3, 64, 64)
    given = (pixels - torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.1)).view(3, 1, 1)
    wanted = (pixels - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor((0.229, 0.224, 0.225)).view(
        3, 1, 1
    )
    with torch.no_grad():
        assert torch.allclose(model.features(given), theirs(wanted), atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(3)
    published = models.resnet18().state_dict()  # with its last layer, as such files are
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(published, file)
    else:
        save_file(published, file)
    model = network(TorchvisionModel, "resnet18", weights=str(file))
    assert torch.equal(model.get_parameter("backbone.model.layer4.1.conv2.weight"), published["layer4.1.conv2.weight"])


def test_a_transformer_is_frozen_and_put_through_like_any_backbone() -> None:
    on = toys.stream(form="images", experiences=2, train=8, test=4)
    model = network(TimmModel, "test_vit", on)
    data = on.experiences[0].test
    x = data.x.float() / 255
    expected = model(x, data.t)
    through = put_through(on, model, "model.blocks.3", keep=False, device=torch.device("cpu"))
    assert len(through.input_shape) == 2, "tokens of one size"
    latents = through.experiences[0].test
    assert torch.allclose(model(latents.x, latents.t), expected, atol=1e-4)


def test_remind_codes_the_tokens_of_a_transformer() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    on = toys.stream(form="images", train=20, test=10)
    remind = {"name": "remind", "split": "model.blocks.3", "base": "pretrained", "codebooks": 8, "codebook_size": 32}
    model = {"name": "timm", "architecture": "test_vit", "weights": "random", "frozen": None}
    record = toys.trainer([remind], on, model=model, training={"epochs": 1, "lr": 0.01}).run()
    tokens = (160 // 16) ** 2 + 1
    assert record.measures[-1]["remind/bytes_per_sample"] == tokens * 8 + 4 + 2 + 4, "codes, label, task, place"


def test_what_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, kind: Any = TorchvisionModel, on: Stream | None = None, **knobs: Any) -> None:
        with pytest.raises((ConfigError, DataError), match=match) as caught:
            kind(**{"weights": "random", **knobs}).build(on or stream())
        assert "\n" not in str(caught.value)

    refused(
        r"^model\.architecture = 'resnet81': torchvision has no such model; did you mean 'resnet18'",
        architecture="resnet81",
    )
    refused("does not end in one linear layer", architecture="squeezenet1_0")
    refused("takes 1 or 3 channels", on=stream((4, 64, 64)))
    refused(r"cannot take images of 8×8 pixels .*model\.resolution=224", architecture="alexnet", on=stream((3, 8, 8)))
    refused("cannot be split behind 'model.layer5'", frozen="model.layer5")
    refused(r"^model\.weights = 'nowhere\.pth': no such file", weights="nowhere.pth")
    (tmp_path / "other.pth").write_bytes(b"nonsense")
    refused("not the weights of this model", weights=str(tmp_path / "other.pth"))
    (tmp_path / "other.safetensors").write_bytes(b"nonsense")
    refused("not the weights of this model", weights=str(tmp_path / "other.safetensors"))
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "few.pth")
    refused(r"not the weights of this model \(\d+ are missing", weights=str(tmp_path / "few.pth"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    refused(r"those of 'resnet18' cannot be downloaded \(no network\)", weights="default")


def test_timm_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ConfigError, match=r"timm has no such model; did you mean"):
        TimmModel(architecture="test_vitt", weights="random").build(stream())

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(no hub\); check"):
        TimmModel(architecture="test_vit").build(stream())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model 'timm' needs the package timm; pip install timm$"):
        TimmModel(architecture="test_vit").build(stream())
