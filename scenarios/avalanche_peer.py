"""Avalanche's own training of a stream, for ``cl-lab bench`` to measure ours against."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_lab.errors import ConfigError, nearest
from cl_lab.records import Stream, TensorData

from . import _avalanche

STRATEGIES = ("naive", "replay", "ewc")

Form = Literal["usual", "lean"]
"""*usual*: as Avalanche's classic benchmarks are made, by ``nc_benchmark`` from stored uint8 images with a transform that
scales each sample (but without their PIL images and their normalisation). *lean*: the fastest set-up found, float32
tensors scaled beforehand and no task labels, so that torch's plain ``DataLoader`` serves instead of Avalanche's
task-balanced one."""


@dataclass(frozen=True)
class PeerResult:
    """What a training took; the model was trained in place."""

    train_seconds: float
    """Wall time of all calls of ``strategy.train``; making data sets and strategy is not in it."""
    version: str
    """Avalanche's version."""


def train(
    strategy: str,
    stream: Stream,
    model: nn.Module,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    knobs: Mapping[str, Any],
    seed: int,
    device: str = "cpu",
    form: Form = "usual",
) -> PeerResult:
    """Train ``model`` in place on every experience of ``stream`` with Avalanche's ``strategy``; nothing is evaluated.

    ``model`` takes ``x`` ``[B, *input_shape]`` alone, scaled to [0, 1]. Avalanche runs without metrics, loggers and worker
    processes. ``knobs`` are those of our strategy of that name: ``memory`` becomes ``mem_size``; ``strength`` λ becomes
    an ``ewc_lambda`` of ``λ/2 · batch_size``, because Avalanche's penalty has no ½ and squares the gradient of a batch's
    mean, which makes its Fisher smaller by about the batch size. On an online stream each batch is an experience of its
    own (``split_online_stream``), as Avalanche's documentation has it, and replay keeps a reservoir.

    Raises :class:`~cl_lab.errors.ConfigError` for what this comparison does not cover: task labels, normalised input,
    classes that come twice or in groups of different size, ewc without boundaries.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"avalanche: unknown strategy '{strategy}'{nearest(strategy, STRATEGIES)}")
    order = [c for e in stream.experiences for c in e.classes]
    sizes = {len(e.classes) for e in stream.experiences}
    if stream.task_labels or stream.mean is not None or len(set(order)) != len(order) or len(sizes) > 1:
        raise ConfigError(
            f"avalanche: stream '{stream.name}' cannot be compared; take a class-incremental one of equal steps without "
            "normalisation"
        )
    if stream.online and strategy == "ewc":
        raise ConfigError("avalanche: strategy 'ewc' needs boundaries; take a stream that is not online")
    _avalanche.import_avalanche()
    with warnings.catch_warnings(record=True):  # recorded and dropped: Avalanche resets the filters to be heard
        warnings.simplefilter("ignore")
        experiences = _usual(stream, order) if form == "usual" else _lean(stream)
        torch.manual_seed(seed)
        learner = _strategy(strategy, stream.online, model, lr, batch_size, epochs, knobs, device)
        seconds = 0.0
        for experience in experiences:
            start = time.perf_counter()
            if stream.online:
                experience = _part("benchmarks.scenarios").split_online_stream(
                    [experience], experience_size=batch_size, seed=seed
                )
            learner.train(experience, num_workers=0)
            seconds += time.perf_counter() - start
    return PeerResult(seconds, importlib.metadata.version("avalanche-lib"))


def _part(name: str) -> Any:
    return importlib.import_module(f"avalanche.{name}")


def _scaled(x: Tensor) -> Tensor:
    return x.float().div(255) if x.dtype == torch.uint8 else x


def _usual(stream: Stream, order: list[int]) -> Any:
    train, test = (TensorData.concat([getattr(e, part) for e in stream.experiences]) for part in ("train", "test"))
    benchmark = _part("benchmarks").nc_benchmark(
        _with_targets(train.x, train.y),
        _with_targets(test.x, test.y),
        n_experiences=len(stream),
        task_labels=False,
        fixed_class_order=order,
        train_transform=_scaled,
        eval_transform=_scaled,
    )
    return benchmark.train_stream


def _lean(stream: Stream) -> Any:
    sets = [
        _part("benchmarks.utils").as_classification_dataset(_with_targets(_scaled(e.train.x), e.train.y))
        for e in stream.experiences
    ]
    return _part("benchmarks.scenarios").benchmark_from_datasets(train=sets).streams["train"]


def _with_targets(x: Tensor, y: Tensor) -> Any:
    samples = TensorDataset(x, y)
    samples.targets = y.tolist()  # type: ignore[attr-defined]  # where Avalanche looks for labels
    return samples


def _strategy(
    name: str,
    online: bool,
    model: nn.Module,
    lr: float,
    batch_size: int,
    epochs: int,
    knobs: Mapping[str, Any],
    device: str,
) -> Any:
    supervised = _part("training.supervised")
    common: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": batch_size,
        "train_epochs": epochs,
        "device": device,
        "evaluator": None,
    }
    if name == "ewc":
        return supervised.EWC(ewc_lambda=knobs["strength"] / 2 * batch_size, mode="separate", **common)
    if name == "naive":
        return supervised.Naive(**common)
    memory = {"mem_size": knobs["memory"]}
    if online:
        memory["storage_policy"] = _part("training.storage_policy").ReservoirSamplingBuffer(max_size=knobs["memory"])
    return supervised.Naive(plugins=[_part("training.plugins").ReplayPlugin(**memory)], **common)
