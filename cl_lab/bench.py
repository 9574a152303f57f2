"""``cl-lab bench``: our training loop against Avalanche's and against a bare torch loop, measured in one process.

*loop*, *online* and *resnet* train one model on one stream with three contestants that start from the same weights:

- *ours*: :class:`~cl_lab.trainer.Trainer`, fed with the stream's uint8 samples; ``ours_s`` is the ``train_seconds`` of
  its record;
- *avalanche*: Avalanche's own strategy on a benchmark made as its classic ones are, from the same uint8 samples;
  ``avalanche_s`` is the time in its ``train``. *avalanche_lean* is the same on float32 tensors that were scaled
  beforehand, the fastest set-up found;
- *bare*: a hand-written torch loop that does the same arithmetic on float32 tensors that were scaled beforehand.

*prefix* fine-tunes a language model whose lower layers are frozen, running them every time and keeping what they make
(``freeze`` with ``cache``), *precision* the same model in single precision and in bf16; *remind* streams pictures one at a
time to a frozen network's last block, and says where the time of each goes; *edits* makes edits, against a loop that runs
the whole model in every step, and asks a model that has many; *until-right* makes them until they hold; *fisher* is EWC's
work after an experience, *startup* the time to a command's first word.

All count training alone: every optimiser step, what a strategy does between experiences (Fisher, memory), nothing of
making data, model and optimiser, and no evaluation. Accuracies are means over the test sets after the last experience.
Contestants take turns within each repetition, so that a drift of the machine hits all alike; the median is reported.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import itertools
import logging
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cl_lab import bench_serving, registry, seeding
from cl_lab.chain import Chain
from cl_lab.compat import use_freed_memory_again
from cl_lab.config import RunConfig, parse
from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError, DataError, PluginError, UserError, nearest
from cl_lab.facts import Edit
from cl_lab.learner import EngineLearner
from cl_lab.models import Classifier, MLPBackbone
from cl_lab.patches import SidePatch, packed
from cl_lab.records import PAD, Experience, Stream, TensorData
from cl_lab.trainer import Record, Silent, Trainer

log = logging.getLogger("cl_lab")

SEED = 0
_WARM_UP_SAMPLES = 32  # per experience, before anything is measured


@dataclass(frozen=True)
class Workload:
    """What the contestants train: a stream, a model and the strategies to try."""

    model: Mapping[str, Any]
    strategies: Mapping[str, Mapping[str, Any]]  # knobs by label: a registered name, and what follows a dash
    batch_size: int
    lr: float
    shape: tuple[int, ...]
    train_samples: int
    test_samples: int
    scenario: str | None = None
    online: bool = False
    experiences: int = 5
    classes: int = 10

    @property
    def knobs(self) -> dict[str, Any]:
        """Knobs of the scenario."""
        return {"online": self.online, "train_limit": self.train_samples, "test_limit": self.test_samples}


_MLP = {"name": "mlp", "hidden": [256], "head": "single"}

WORKLOADS: dict[str, Workload] = {
    "loop": Workload(
        _MLP,
        {
            "naive": {},
            "replay": {"memory": 500},
            "ewc": {"strength": 10.0},
            # Our Fisher from 1,000 samples per experience; Avalanche's, which has no such knob, still from all.
            "ewc-1000": {"strength": 10.0, "fisher_samples": 1000},
        },
        batch_size=64,
        lr=0.05,
        shape=(1, 28, 28),
        train_samples=12000,
        test_samples=2000,
        scenario="split-fashion-mnist",
    ),
    "online": Workload(
        _MLP,
        {"naive": {}, "replay": {"memory": 500}},
        batch_size=10,
        lr=0.01,
        shape=(1, 28, 28),
        train_samples=2000,
        test_samples=2000,
        scenario="split-fashion-mnist",
        online=True,
    ),
    "resnet": Workload(
        {"name": "slim-resnet18", "head": "single"},
        {"naive": {}, "replay": {"memory": 500}},
        batch_size=10,
        lr=0.03,
        shape=(3, 32, 32),
        train_samples=200,
        test_samples=100,
    ),
}
"""Streams and sizes of the benchmarks that train, by name."""

FISHER_SAMPLES = 12000
VMAP_SAMPLES = 1200
"""vmap runs on this many samples, and its time is scaled up linearly."""
_VMAP_CHUNK = 16  # the fastest of 4 to 128: what fits the cache

TEXTS: dict[str, Any] = {"weights": "smollm2-135m", "texts": 64, "tokens": 96, "batch_size": 16}
"""The language model of *prefix* and *precision*, and the texts it learns: this many, of half to all of ``tokens``."""
FROZEN = 20
"""Its lower layers that *prefix* does not train."""

REMIND: dict[str, Any] = {
    "model": {"name": "efficientnet-lite0", "weights": "random", "resolution": 128},
    "split": "blocks.15",
    "base_samples": 300,
    "streamed_samples": 100,
    "rows": (
        ("remind", {"codebooks": 32}),
        ("remind", {"codebooks": 64, "mixup": 0.0, "crop": 1.0}),
        ("remind", {"codebooks": None, "mixup": 0.0, "crop": 1.0}),
        ("slda", {}),
    ),
}
"""What *remind* streams: pictures of 64×64, to the network cut behind ``split``, 50 remembered with each."""

EDITS: dict[str, Any] = {
    "weights": "smollm2-135m",
    "layer": 26,
    "contexts": 8,
    "steps": 20,
    "rho": 0.2,
    "edits": 500,
    "tokens": 24,
    "together": 50,
}
"""The language model of *edits*, how it is edited, how many edits it has when it is asked, the answer's length, and how many
edits ``ultraedit`` makes at once where it is not one."""

UNTIL_RIGHT: dict[str, Any] = {
    "loop": {"contexts": 10, "steps": 70, "lr": 1.0},
    "wise": {"contexts": 0, "chat": False, "stop_at": 0.5},
    "its_margin": {"sampled": 1, "neighbours": 0},
    "facts": (
        ("The capital of {} is", "Kenya", "Lisbon"),
        ("The capital of {} is", "Vietnam", "Dublin"),
        ("The capital of {} is", "Greece", "Ottawa"),
        ("The capital of {} is", "Chile", "Helsinki"),
        ("The language most people speak in {} is", "Brazil", "Finnish"),
        ("The language most people speak in {} is", "Haiti", "Turkish"),
        ("The language most people speak in {} is", "Turkey", "Welsh"),
        ("The language most people speak in {} is", "Japan", "Spanish"),
    ),
}
"""What *until-right* edits into the model of *edits*, by the released code's loop and by ``wise``; ``its_margin`` gives
``wise`` the loop's."""

COMMANDS = (("--help",), ("list", "strategies"), ("show", "strategy", "ewc"), ("run", "--help"))
"""Command lines whose start is measured."""


def run(name: str, threads: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """The rows of benchmark ``name``: one per strategy and thread count (*startup*: per command).

    Times are medians over ``repeats``. Raises :class:`ConfigError` for an unknown name or a thread count below 1.
    """
    known = [*WORKLOADS, "edits", "fisher", "precision", "prefix", "remind", "serving", "startup", "until-right"]
    if name not in known:
        raise ConfigError(f"bench: unknown benchmark '{name}'{nearest(name, known)}")
    if any(n < 1 for n in threads):
        raise ConfigError(f"bench: threads = {min(threads)}: must be 1 or more")
    if name == "startup":
        return [_startup(words, repeats) for words in COMMANDS]
    if name == "serving":
        return [bench_serving.run(n) for n in threads]
    before = torch.get_num_threads()
    use_freed_memory_again()
    rows = []
    try:
        if name in ("prefix", "precision"):
            for n in threads:
                torch.set_num_threads(n)
                rows.append((_prefix if name == "prefix" else _precision)(n, repeats))
        elif name == "edits":
            for n in threads:
                torch.set_num_threads(n)
                rows.append(_edits(n, repeats))
        elif name == "until-right":
            for n in threads:
                torch.set_num_threads(n)
                rows.extend(_until_right(n))
        elif name == "remind":
            for n in threads:
                torch.set_num_threads(n)
                rows.extend(_remind(strategy, knobs, n, repeats) for strategy, knobs in REMIND["rows"])
        elif name == "fisher":
            stream, data = _stream(replace(WORKLOADS["loop"], train_samples=FISHER_SAMPLES))
            for n in threads:
                torch.set_num_threads(n)
                rows.append(_fisher(stream, data, n, repeats))
        else:
            work = WORKLOADS[name]
            stream, data = _stream(work)
            for strategy in work.strategies:
                for n in threads:
                    torch.set_num_threads(n)
                    rows.append(_race(name, work, stream, data, strategy, n, repeats))
    finally:
        torch.set_num_threads(before)
    return rows


# -- streams -------------------------------------------------------------------------------------------------------


def _stream(work: Workload) -> tuple[Stream, str]:
    """The stream with all its tensors in memory, and what it is made of; made up where the data set is absent."""
    if work.scenario is not None:
        try:
            stream = registry.create("scenarios", {"name": work.scenario, **work.knobs}, "bench").stream(SEED)
            return _kept(stream, lambda data: data), work.scenario.removeprefix("split-")
        except DataError as error:
            log.warning("%s; measuring on made-up data of the same shape", error)
    return _made_up(work), "made-up"


def _kept(stream: Stream, change: Callable[[TensorData], TensorData]) -> Stream:
    """``stream`` with ``change`` applied to every set, now; nothing is made anew when an experience is released."""
    return replace(
        stream, experiences=tuple(_experience(e, change(e.train), change(e.test)) for e in stream.experiences)
    )


def _experience(like: Experience, train: TensorData, test: TensorData) -> Experience:
    return _made(like.index, like.name, like.classes, train, test)


def _made(index: int, name: str, classes: Sequence[int], train: TensorData, test: TensorData) -> Experience:
    return Experience(index, name, classes, lambda: train, lambda: test)


def _made_up(work: Workload) -> Stream:
    """Noisy copies of one coarse random pattern per class, as uint8: of the shape of ``work``, and learnable."""
    rng = seeding.generator(SEED, "bench")
    channels, height, width = work.shape
    coarse = torch.rand(work.classes, channels, 4, 4, generator=rng)
    patterns = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    per = work.classes // work.experiences

    def draw(first: int, samples: int) -> TensorData:
        y = first + torch.arange(samples) % per
        noise = torch.randn(samples, *work.shape, generator=rng)
        x = (patterns[y] + 0.3 * noise).clamp_(0, 1).mul_(255).to(torch.uint8)
        return TensorData(x, y, torch.zeros_like(y))

    experiences = []
    for i in range(work.experiences):
        train, test = draw(i * per, work.train_samples), draw(i * per, work.test_samples)
        experiences.append(_made(i, f"made-up {i}", range(i * per, (i + 1) * per), train, test))
    return Stream(
        "made-up", tuple(experiences), work.shape, work.classes, online=work.online, boundaries=not work.online
    )


# -- training: ours, Avalanche's, bare -----------------------------------------------------------------------------

Result = tuple[float, float]
"""Seconds of training, and the mean accuracy over all test sets after it. The model is trained in place."""


def _race(
    name: str, work: Workload, stream: Stream, data: str, strategy: str, threads: int, repeats: int
) -> dict[str, Any]:
    seeding.seed_everything(SEED)
    model = registry.create("models", work.model, "model").build(stream)
    floats = _kept(stream, lambda d: TensorData(_as_input(d.x, model), d.y, d.t))
    contestants: dict[str, Callable[[Stream, Stream, Classifier], Result]] = {
        "ours": lambda stream, _, model: _ours(work, stream, model, strategy),
        "avalanche": lambda stream, floats, model: _avalanche(work, stream, floats, model, strategy, "usual"),
        "avalanche_lean": lambda stream, floats, model: _avalanche(work, stream, floats, model, strategy, "lean"),
        "bare": lambda _, floats, model: _bare(work, floats, model, strategy),
    }
    few = [_kept(s, lambda d: d.take(torch.arange(min(len(d), _WARM_UP_SAMPLES)))) for s in (stream, floats)]
    for train in contestants.values():
        train(few[0], few[1], copy.deepcopy(model))
    seconds: dict[str, list[float]] = {c: [] for c in contestants}
    accuracy: dict[str, list[float]] = {c: [] for c in contestants}
    for i in range(repeats):
        for contestant, train in contestants.items():
            fresh = copy.deepcopy(model)
            gc.collect()
            took, reached = train(stream, floats, fresh)
            seconds[contestant].append(took)
            accuracy[contestant].append(reached)
        shown = ", ".join(f"{c} {s[-1]:.3f} s" for c, s in seconds.items())
        log.info("%s: %s, threads %d, repetition %d of %d: %s", name, strategy, threads, i + 1, repeats, shown)
    median = {c: statistics.median(s) for c, s in seconds.items()}
    return {
        "strategy": strategy,
        "threads": threads,
        **{f"{c}_s": s for c, s in median.items()},
        "speedup": median["avalanche"] / median["ours"],
        "speedup_lean": median["avalanche_lean"] / median["ours"],
        "over_bare": median["ours"] / median["bare"],
        **{f"accuracy_{c}": statistics.median(a) for c, a in accuracy.items()},
        "data": data,
        "samples": sum(len(e.train) for e in stream.experiences),
        "repeats": repeats,
    }


def _name(label: str) -> str:
    return label.partition("-")[0]


def _config(work: Workload, strategy: str) -> RunConfig:
    return parse(
        {
            "scenario": {"name": work.scenario or "made-up"},
            "model": dict(work.model),
            "strategy": {"name": _name(strategy), **work.strategies[strategy]},
            "training": {"epochs": 1, "batch_size": work.batch_size, "lr": work.lr, "optimizer": "sgd"},
            "engine": {"device": "cpu"},
            "checkpoint": {"enabled": False},
            "tracking": {"uri": None},
            "seed": SEED,
        },
        "bench",
    )


def _ours(work: Workload, stream: Stream, model: Classifier, strategy: str) -> Result:
    config = _config(work, strategy)
    link = registry.create("strategies", {"name": _name(strategy), **work.strategies[strategy]}, "strategy")
    learner = EngineLearner(model, stream, config.training, config.engine, SEED)
    record = Trainer(stream, learner, Chain([link], [strategy], stream), config, SEED).run()
    return record.train_seconds, statistics.fmean(record.matrix[-1])


def _avalanche(work: Workload, stream: Stream, floats: Stream, model: Classifier, strategy: str, form: str) -> Result:
    plain = _plain(model)
    whole = nn.Sequential(nn.Flatten(), *plain) if _flat(model) else plain
    result = _peer()(
        _name(strategy),
        stream,
        whole,
        lr=work.lr,
        batch_size=work.batch_size,
        epochs=1,
        knobs=work.strategies[strategy],
        seed=SEED,
        form=form,
    )
    return result.train_seconds, _accuracy(plain, floats)


def _peer() -> Any:
    """Avalanche's side, through its entry point: the core imports neither plug-ins nor Avalanche."""
    found = list(importlib.metadata.entry_points(group="cl_lab.peers", name="avalanche"))
    if not found:
        raise PluginError("bench: entry point 'avalanche' of cl_lab.peers is missing; reinstall cl-lab")
    return found[0].load()


def _bare(work: Workload, stream: Stream, model: Classifier, strategy: str) -> Result:
    """The loop that one would write by hand, without hooks, checks and records."""
    plain = _plain(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=work.lr)
    knobs, size, online = work.strategies[strategy], work.batch_size, work.online
    memory = _Reservoir(knobs["memory"], stream.experiences[0].train.x) if strategy == "replay" else None
    penalty = _Quadratic(knobs["strength"], plain) if _name(strategy) == "ewc" else None
    plain.train()
    start = time.perf_counter()
    for i, experience in enumerate(stream.experiences):
        data = experience.train
        order = seeding.permutation(len(data), SEED, "order", i, 0)
        for first in range(0, len(data), size):
            rows = order[first : first + size]
            x, y = data.x[rows], data.y[rows]
            if memory is not None:
                new_x, new_y = x, y
                if memory.seen:
                    old_x, old_y = memory.draw(size)
                    x, y = torch.cat([x, old_x]), torch.cat([y, old_y])
                if online:
                    memory.add(new_x, new_y)
            loss = F.cross_entropy(plain(x), y)
            optimizer.zero_grad()
            loss.backward()
            if penalty is not None and i:
                penalty.pull()
            optimizer.step()
        if memory is not None and not online:
            memory.add(data.x, data.y)
        if penalty is not None:
            penalty.add(data.x[order[: knobs.get("fisher_samples")]])
    seconds = time.perf_counter() - start
    return seconds, _accuracy(plain, stream)


class _Reservoir:
    """Vitter's algorithm R."""

    def __init__(self, capacity: int, like: Tensor) -> None:
        self.x, self.y = like.new_empty(capacity, *like.shape[1:]), torch.empty(capacity, dtype=torch.int64)
        self.capacity, self.seen, self.random = capacity, 0, random.Random(SEED)

    def add(self, x: Tensor, y: Tensor) -> None:
        rows: dict[int, int] = {}  # by place; a later row overwrites an earlier one
        for row in range(len(y)):
            place = self.seen if self.seen < self.capacity else int(self.random.random() * (self.seen + 1))
            if place < self.capacity:
                rows[place] = row
            self.seen += 1
        if rows:
            places, taken = torch.tensor(list(rows)), torch.tensor(list(rows.values()))
            self.x[places], self.y[places] = x[taken], y[taken]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        index = torch.randperm(min(self.seen, self.capacity))[:n]
        return self.x[index], self.y[index]


class _Quadratic:
    """EWC's penalty as one running quadratic, with the exact Fisher of a two-layer ReLU network written out."""

    def __init__(self, strength: float, model: nn.Sequential) -> None:
        self.strength, self.model = strength, model
        self.fisher = [torch.zeros_like(p) for p in model.parameters()]
        self.anchor = [torch.zeros_like(p) for p in model.parameters()]

    @torch.no_grad()
    def pull(self) -> None:
        for p, f, a in zip(self.model.parameters(), self.fisher, self.anchor, strict=True):
            assert p.grad is not None
            p.grad.addcmul_(f, p - a, value=self.strength)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        first, _, last = self.model
        assert isinstance(last, nn.Linear)
        found = [torch.zeros_like(p) for p in self.model.parameters()]
        for block in x.split(512):
            h = torch.relu(first(block))
            p = torch.softmax(last(h), dim=1)
            at_hidden, at_logits = torch.zeros_like(h), torch.zeros_like(p)
            for k in range(p.shape[1]):  # squared gradients of √p_k · log p_k, summed over the labels k
                g = -p
                g[:, k] += 1
                g *= p[:, k : k + 1].sqrt()
                at_logits += g.square()
                at_hidden += ((g @ last.weight) * (h > 0)).square()
            found[0] += at_hidden.T @ block.square()
            found[1] += at_hidden.sum(dim=0)
            found[2] += at_logits.T @ h.square()
            found[3] += at_logits.sum(dim=0)
        for theta, f, a, new in zip(self.model.parameters(), self.fisher, self.anchor, found, strict=True):
            new /= len(x)
            f += new
            a += torch.where(f > 0, new / f, 1.0) * (theta - a)


def _plain(model: Classifier) -> nn.Sequential:
    """The model's own modules as one would put them together by hand: of ``x`` alone, an MLP of flat ``x``."""
    if _flat(model):
        return nn.Sequential(*(m for m in model.modules() if next(m.children(), None) is None))
    return nn.Sequential(model.backbone, model.head.linear)


def _flat(model: Classifier) -> bool:
    return isinstance(model.backbone, MLPBackbone)


def _as_input(x: Tensor, model: Classifier) -> Tensor:
    scaled = x.float().div(255)
    return scaled.flatten(1) if _flat(model) else scaled


@torch.no_grad()
def _accuracy(model: nn.Module, stream: Stream) -> float:
    model.eval()
    hits = [
        sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in zip(test.x.split(512), test.y.split(512), strict=True))
        / len(test)
        for test in (e.test for e in stream.experiences)
    ]
    return statistics.fmean(hits)


# -- the exact Fisher ----------------------------------------------------------------------------------------------


def _fisher(stream: Stream, data: str, threads: int, repeats: int) -> dict[str, Any]:
    """EWC's work after an experience, through the public protocol, against per-sample gradients by ``torch.func``.

    ``max_relative_difference`` is relative to the largest entry of each parameter tensor, on the samples vmap saw.
    """
    work = WORKLOADS["loop"]
    config = _config(work, "ewc")
    seeding.seed_everything(SEED)
    model = registry.create("models", work.model, "model").build(stream)
    learner = EngineLearner(model, stream, config.training, config.engine, SEED)
    learner.begin(fresh=True)
    experience = stream.experiences[0]
    count = min(VMAP_SAMPLES, len(experience.train))
    few = _experience(experience, experience.train.take(torch.arange(count)), experience.test)
    inputs = learner.prepare_input(few.train.x)

    def ours(on: Experience) -> tuple[float, dict[str, Tensor]]:
        strategy = registry.create("strategies", {"name": "ewc", "fisher": "exact"}, "strategy")
        start = time.perf_counter()
        strategy.after_experience(on, learner)
        return time.perf_counter() - start, strategy.state_dict()["precision"]

    def by_vmap() -> tuple[float, dict[str, Tensor]]:
        start = time.perf_counter()
        found = _fisher_by_vmap(learner.replica(), inputs, few.train.t)
        return time.perf_counter() - start, found

    mine, reference = ours(few)[1], by_vmap()[1]  # also warms both up
    difference = max(float((mine[n] - v).abs().max() / v.abs().max()) for n, v in reference.items())
    scale = len(experience.train) / count
    seconds: dict[str, list[float]] = {"ours": [], "vmap": []}
    for i in range(repeats):
        seconds["ours"].append(ours(experience)[0])
        seconds["vmap"].append(by_vmap()[0] * scale)
        shown = ", ".join(f"{c} {s[-1]:.3f} s" for c, s in seconds.items())
        log.info("fisher: threads %d, repetition %d of %d: %s", threads, i + 1, repeats, shown)
    median = {c: statistics.median(s) for c, s in seconds.items()}
    return {
        "threads": threads,
        "ours_s": median["ours"],
        "vmap_s": median["vmap"],
        "ratio": median["vmap"] / median["ours"],
        "max_relative_difference": difference,
        "samples": len(experience.train),
        "vmap_samples": count,
        "data": data,
        "repeats": repeats,
    }


# -- frozen layers of a language model -----------------------------------------------------------------------------


class _Epochs(Silent):
    """When each epoch ended."""

    def __init__(self, per_epoch: int) -> None:
        self.ends: list[float] = []
        self._per_epoch = per_epoch

    def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
        if step % self._per_epoch == 0:
            self.ends.append(time.perf_counter())


def _prefix(threads: int, repeats: int) -> dict[str, Any]:
    """LoRA above frozen layers: seconds of the first epoch and, as a median, of later ones, with and without the cache."""
    row: dict[str, Any] = {"model": TEXTS["weights"], "frozen_layers": FROZEN, "threads": threads}
    losses = {}
    for label, cache in (("run", "none"), ("kept", "memory")):
        freeze = {"name": "freeze", "layers": FROZEN, "from_experience": 0, "cache": cache}
        took, losses[label] = _learn_texts(freeze, 1 + repeats)
        row |= {f"{label}_first_s": took[0], f"{label}_later_s": statistics.median(took[1:])}
    row["speedup_later"] = row["run_later_s"] / row["kept_later_s"]
    row |= {"loss_run": losses["run"], "loss_kept": losses["kept"], "texts": TEXTS["texts"], "repeats": repeats}
    return row


def _precision(threads: int, repeats: int) -> dict[str, Any]:
    """LoRA in single precision and in bf16: the median seconds of a step, over epochs after the first, and the last loss."""
    row: dict[str, Any] = {"model": TEXTS["weights"], "threads": threads}
    losses = {}
    for precision in ("fp32", "bf16"):
        took, losses[precision] = _learn_texts({"name": "naive"}, 1 + repeats, precision)
        row[f"{precision}_step_s"] = statistics.median(took[1:]) * TEXTS["batch_size"] / TEXTS["texts"]
    row["speedup"] = row["fp32_step_s"] / row["bf16_step_s"]
    row |= {f"loss_{precision}": loss for precision, loss in losses.items()}
    return row | {"texts": TEXTS["texts"], "batch_size": TEXTS["batch_size"], "repeats": repeats}


def _learn_texts(strategy: Mapping[str, Any], epochs: int, precision: str = "fp32") -> tuple[list[float], float]:
    """Fine-tune the language model of :data:`TEXTS` with LoRA: the seconds of each epoch, and the last loss."""
    model: dict[str, Any] = {"name": "causal-lm", "weights": TEXTS["weights"]}
    config = parse(
        {
            "scenario": {"name": "made-up"},
            "model": model,
            "strategy": dict(strategy),
            "training": {"epochs": epochs, "batch_size": TEXTS["batch_size"], "lr": 1e-3, "optimizer": "adamw"},
            "engine": {"device": "cpu", "precision": precision},
            "checkpoint": {"enabled": False},
            "tracking": {"uri": None},
            "seed": SEED,
        },
        "bench",
    )
    stream = _made_up_texts(TEXTS["texts"], TEXTS["tokens"])
    seeding.seed_everything(SEED)
    built = registry.create("models", model, "model").build(stream)
    link = registry.create("strategies", strategy, "strategy")
    chain = Chain([link], [str(strategy["name"])], stream)
    observer = _Epochs(math.ceil(TEXTS["texts"] / TEXTS["batch_size"]))
    learner = EngineLearner(chain.prepare(built, stream), stream, config.training, config.engine, SEED)
    start = time.perf_counter()
    record = Trainer(stream, learner, chain, config, SEED, observer=observer).run()
    return [b - a for a, b in itertools.pairwise([start, *observer.ends])], float(record.losses[-1]["loss"])


def _made_up_texts(texts: int, tokens: int) -> Stream:
    """Random tokens of half to all of ``tokens`` in length, each with one of two answers."""
    rng = seeding.generator(SEED, "bench")
    x = torch.randint(256, (texts, tokens + 2), generator=rng, dtype=torch.int32)
    start = torch.randint(tokens // 2 + 1, (texts,), generator=rng)
    x[torch.arange(tokens + 2) < start[:, None]] = PAD
    answers = torch.tensor([[5, 2], [6, 2]])
    y = torch.arange(texts) % 2
    x[:, tokens:] = answers[y].to(torch.int32)
    x[0, tokens - 1] = 255  # the tiny model has as many tokens as the test set shows it
    train = TensorData(x, y, torch.zeros_like(y))
    one = Experience(0, "made-up", range(2), lambda: train, lambda: train.take(torch.arange(2)))
    layout = {"prompt": (tokens,), "answer": (2,)}
    return Stream(
        "made-up",
        (one,),
        (tokens + 2,),
        2,
        objective="language",
        layout=layout,
        answers=answers,
        scoring="first-token",
    )


# -- pictures, one at a time ---------------------------------------------------------------------------------------


def _edits(threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of an edit by ``wise`` and by a loop that runs the whole model each step; what routing adds to an answer.

    ``same_work_s`` is ``wise`` with that loop's margin: one unrelated prompt a step, as in the released code, where its own
    settings look at 48. ``speedup`` compares these two, ``speedup_own`` its own settings with the loop.
    """
    model = load_editable(EDITS["weights"])
    knobs = {k: EDITS[k] for k in ("layer", "contexts", "steps", "rho")}
    wise = registry.create("editors", {"name": "wise", **knobs, "stop_at": 1.0, "chat": False}, "editor")
    same = registry.create(
        "editors",
        {"name": "wise", **knobs, "stop_at": 1.0, "chat": False, "sampled": 1, "neighbours": 0},
        "editor",
    )
    ultra = registry.create("editors", {"name": "ultraedit", "chat": False}, "editor")
    facts = [Edit(f"The capital of {name} is", "Alder Hill", subject=name) for name in ("Thale", "Norland", "Ostra")]
    wise.propose(model, facts[:1])  # what is read once for a model's life
    many = [Edit(f"The capital of {_made_up_name(n)} is", "Alder Hill") for n in range(EDITS["together"])]
    ours, alike, whole, closed, together = (list[float]() for _ in range(5))
    for i in range(repeats):
        some = [facts[1 + i % 2]]
        start = time.perf_counter()
        wise.propose(model, some)
        ours.append(time.perf_counter() - start)
        for edit, took in (
            (partial(same.propose, model, some), alike),
            (partial(_whole_model_edit, model, some[0]), whole),
            (partial(ultra.propose, model, some), closed),
            (partial(ultra.propose, model, many), together),
        ):
            start = time.perf_counter()
            edit()
            took.append(time.perf_counter() - start)
    row = {"model": EDITS["weights"], "threads": threads, **knobs}
    row |= {"ultraedit_together_s": statistics.median(together) / len(many)}
    row |= {"wise_s": statistics.median(ours), "same_work_s": statistics.median(alike)}
    row |= {"whole_model_s": statistics.median(whole), "ultraedit_s": statistics.median(closed)}
    row |= {"speedup": row["whole_model_s"] / row["same_work_s"], "speedup_own": row["whole_model_s"] / row["wise_s"]}
    return row | _routing(model, wise, repeats) | {"repeats": repeats}


def _made_up_name(n: int) -> str:
    """A name that nobody has, another for each number."""
    syllables = ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti")
    return "".join(syllables[n // 8**place % 8] for place in range(3)).capitalize()


def _until_right(threads: int) -> Iterator[dict[str, Any]]:
    """Seconds a fact until the model gives each of its answer's tokens, by the released code's loop and by ``wise``.

    The loop is stopped at the first step at which the prompt is answered so. The released code's is not: in a model of this
    width, with the paper's margins, it takes all its steps (the first row, of one fact). ``wise`` goes on until prompts are
    told apart, too, and each token is likelier than all others together: with its own margin and with the loop's, one fact
    at a time and all in one shard.
    """
    model = load_editable(EDITS["weights"])
    facts = [Edit(asked.format(name), answer, subject=name) for asked, name, answer in UNTIL_RIGHT["facts"]]
    loop: Any = partial(_whole_model_edit, model, **UNTIL_RIGHT["loop"])
    start = time.perf_counter()
    taken, right = loop(facts[0])
    rows = [("loop, all its steps", time.perf_counter() - start, float(taken), int(right), 1)]
    start = time.perf_counter()
    ended = [loop(fact, until_right=True) for fact in facts]
    took = (time.perf_counter() - start) / len(facts)
    rows.append(("loop", took, statistics.fmean(n for n, _ in ended), sum(ok for _, ok in ended), len(facts)))
    margins: dict[str, Any] = {"its own margin": {}, "the loop's margin": UNTIL_RIGHT["its_margin"]}
    for margin, more in margins.items():
        for together in (1, len(facts)):
            shape = {k: EDITS[k] for k in ("layer", "rho")} | {"edits_per_shard": together}
            wise = registry.create("editors", {"name": "wise", **shape, **UNTIL_RIGHT["wise"], **more}, "editor")
            wise.propose(model, facts[:1])  # what is read once for a model's life
            held, steps, took = 0, list[int](), 0.0
            for first in range(0, len(facts), together):
                some = facts[first : first + together]
                start = time.perf_counter()
                patch = wise.propose(model, some)
                took += (time.perf_counter() - start) / len(facts)
                steps.append(patch.notes["steps"])
                patch.apply(model)
                held += sum(_is_right(model, fact) for fact in some)
                patch.revert(model)
            name = f"wise, {margin}, {'one at a time' if together == 1 else 'in one shard'}"
            rows.append((name, took, statistics.fmean(steps), held, len(facts)))
    until = rows[1][1]
    for name, took, steps_taken, held, of in rows:
        yield {"threads": threads, "model": EDITS["weights"], "way": name, "seconds": took} | {
            "steps": steps_taken,
            "held": f"{held} of {of}",
            "speedup": until / took,
        }


def _is_right(model: EditableModel, fact: Edit) -> bool:
    """Whether each token of the answer, its end aside, is the likeliest behind those before it."""
    rows = model.rows([(model.encode_prompt(fact.prompt), model.encode_answer(fact.answer, end=False))])
    return torch.equal(model.logits(rows).argmax(1), rows.labels.to(model.device))


def _whole_model_edit(
    model: EditableModel,
    edit: Edit,
    *,
    contexts: int | None = None,
    steps: int | None = None,
    lr: float = 1e-3,
    until_right: bool = False,
) -> tuple[int, bool]:
    """Such steps as released code takes them, all layers and all logits every time: how many, and whether it is right then.

    Every step has the margin of WISE's Eq. 5, too, with the paper's α, β and γ and one unrelated prompt, whose row runs
    through the model likewise. ``contexts`` and ``steps`` are those of *edits* where not given; with ``until_right`` no step
    is taken once each token of the answer to the prompt itself is the likeliest.
    """
    contexts = EDITS["contexts"] if contexts is None else contexts
    steps = EDITS["steps"] if steps is None else steps
    site = model.down_projection(EDITS["layer"])
    answer = model.encode_answer(edit.answer)
    beginnings = ["", *(f"So it was, {n} times. " for n in range(contexts))]
    texts = [(model.encode_prompt(f"{text}{edit.prompt}"), answer) for text in beginnings]
    rows = model.rows([*texts, (model.encode_prompt("What is the name of the river near the old library?"), [])])
    asked, said, heard = rows.asked.float(), rows.said, list[Tensor]()
    alpha, beta, gamma = 5, 20, 10
    free = torch.rand(site.weight.shape, generator=seeding.generator(SEED, "bench edits")) < EDITS["rho"]
    change = torch.zeros(site.weight.shape, requires_grad=True)
    optimizer = torch.optim.SGD([change], lr=lr)
    own, taken = slice(len(answer) - 1), 0  # without the answer's end

    def moved(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        more = args[0] @ (change * free).T
        heard[:] = [((more + 1e-12).norm(dim=2) * asked).sum(1) / asked.sum(1)]
        return torch.add(out, more)

    hook = site.module.register_forward_hook(moved)
    try:
        while True:
            logits = model.model(input_ids=rows.ids, use_cache=False).logits
            right = torch.equal(logits[said][own].argmax(1), rows.labels[own])
            if taken == steps or (until_right and right):
                return taken, right
            gap, far = heard[0][:-1], heard[0][-1]
            margin = (far - alpha).relu() + (beta - gap).relu().mean() + (gamma - gap + far).relu().mean()
            loss = F.cross_entropy(logits[said], rows.labels) + margin
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken += 1
    finally:
        hook.remove()


def _routing(model: EditableModel, wise: Any, repeats: int) -> dict[str, Any]:
    """Seconds of an answer to one question, with and without the side memories of so many edits, none of which fires."""
    site = model.down_projection(EDITS["layer"])
    memories = math.ceil(EDITS["edits"] / wise.edits_per_shard)
    for shard in range(memories):
        drawn = seeding.generator(SEED, "bench edits", shard)
        mask = torch.rand(site.weight.numel(), generator=drawn) < EDITS["rho"]
        values = torch.randn(int(mask.sum()), generator=drawn).to(torch.bfloat16)
        SidePatch("wise", path=site.path, shard=shard, places=packed(mask), values=values, gap=1e9, floor=1e9).apply(
            model
        )
    question = ["What is the name of the river that runs through the capital of the country?"]
    took: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * (repeats + 1)):
        routed = bool(turn % 2)
        start = time.perf_counter()
        if routed:
            model.write(question, tokens=EDITS["tokens"])
        else:
            with model.unrouted():
                model.write(question, tokens=EDITS["tokens"])
        if turn > 1:  # the first of each fills caches
            took[routed].append(time.perf_counter() - start)
    plain, asked = (statistics.median(took[routed]) for routed in (False, True))
    return {"answer_s": plain, "routed_answer_s": asked, "routing": asked / plain, "memories": memories}


class _Streaming(Silent):
    """What the second experience took, in all and in some methods of the strategy alone, without its evaluation."""

    def __init__(self, strategy: Any, methods: Mapping[str, str]) -> None:
        self._clock = dict.fromkeys(methods, 0.0)
        self._inner = 0.0  # seconds in timed methods that the running one has called
        self._before = self._now = dict(self._clock)
        self._base = self.seconds = 0.0
        for name, method in methods.items():
            setattr(strategy, method, self._timing(name, getattr(strategy, method)))

    def _timing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **how: Any) -> Any:
            start, outer, self._inner = time.perf_counter(), self._inner, 0.0
            try:
                return call(*args, **how)
            finally:
                took = time.perf_counter() - start
                self._clock[name] += took - self._inner
                self._inner = outer + took

        return timed

    def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
        self._now = dict(self._clock)  # what an evaluation adds comes after the last step

    def scored(self, record: Record) -> None:
        if len(record.matrix) == 1:
            self._base, self._before = record.train_seconds, dict(self._clock)
        self.seconds = record.train_seconds - self._base

    def inside(self) -> dict[str, float]:
        """Seconds in each method but for those it called, while the second experience was learnt."""
        return {name: self._now[name] - self._before[name] for name in self._clock}


def _remind(strategy: str, knobs: Mapping[str, Any], threads: int, repeats: int) -> dict[str, Any]:
    """Milliseconds for a streamed picture, medians over ``repeats``: in all, in the frozen layers, in codes, in the step.

    SLDA learns from the features that the whole network makes, so all it does is ``other_ms`` but for the network, which is
    part of it too. ``pictures_per_second`` is 1,000 over the whole.
    """
    work = REMIND
    link = {"name": strategy, **knobs}
    remind = strategy == "remind"
    link |= {"split": work["split"], "base": "pretrained"} if remind else {"base": "frozen"}
    config = parse(
        {
            "scenario": {"name": "made-up"},
            "model": work["model"],
            "strategy": link,
            "training": {"epochs": 1, "batch_size": 1, "lr": 0.005, "momentum": 0.9, "first": {"batch_size": 64}},
            "engine": {"device": "cpu"},
            "checkpoint": {"enabled": False},
            "tracking": {"uri": None},
            "seed": SEED,
        },
        "bench",
    )
    found: dict[str, list[float]] = {"all": [], "frozen": [], "codes": [], "other": []}
    for _ in range(repeats):
        stream = _pictures(work["base_samples"], work["streamed_samples"])
        seeding.seed_everything(SEED)
        model = registry.create("models", work["model"], "model").build(stream)
        learning = registry.create("strategies", link, "strategy")
        chain = Chain([learning], [strategy], stream)
        learner = EngineLearner(chain.prepare(model, stream), stream, config.training, config.engine, SEED)
        clock = _Streaming(learning, {"frozen": "_latents", "codes": "_codes", "decode": "_decode"} if remind else {})
        Trainer(stream, learner, chain, config, SEED, observer=clock).run()
        inside = clock.inside()
        frozen, codes = inside.get("frozen", 0.0), inside.get("codes", 0.0) + inside.get("decode", 0.0)
        for name, seconds in (("all", clock.seconds), ("frozen", frozen), ("codes", codes)):
            found[name].append(1000 * seconds / work["streamed_samples"])
        found["other"].append(found["all"][-1] - found["frozen"][-1] - found["codes"][-1])
    median = {name: statistics.median(ms) for name, ms in found.items()}
    return {
        "strategy": strategy,
        "settings": ", ".join(f"{k}={v}" for k, v in knobs.items()),
        "threads": threads,
        "pictures_per_second": 1000 / median["all"],
        **{f"{name}_ms": ms for name, ms in median.items()},
        "repeats": repeats,
    }


def _pictures(base: int, streamed: int) -> Stream:
    """Random pictures of 64×64, ten classes and ten more: what they show makes no difference to the time."""
    rng = seeding.generator(SEED, "bench")

    def draw(first: int, samples: int) -> TensorData:
        y = first + torch.arange(samples) % 10
        return TensorData(torch.randint(256, (samples, 3, 64, 64), generator=rng).byte(), y, torch.zeros_like(y))

    parts = [(draw(0, base), draw(0, 10)), (draw(10, streamed), draw(10, 10))]
    experiences = (_made(i, f"made-up {i}", range(10 * i, 10 * i + 10), *part) for i, part in enumerate(parts))
    return Stream("made-up", tuple(experiences), (3, 64, 64), 20)


def _fisher_by_vmap(model: nn.Module, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """``E_x Σ_k p_k (∂ log p_k / ∂θ)²``, the sum over labels by one vectorised gradient each, in chunks of samples."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def log_p(parameters: dict[str, Tensor], x: Tensor, t: Tensor, k: int) -> Tensor:
        logits = functional_call(model, parameters, (x.unsqueeze(0), t.unsqueeze(0)))
        return torch.log_softmax(logits[0], dim=0)[k]

    gradients = vmap(grad(log_p), in_dims=(None, 0, 0, None))
    found = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for first in range(0, len(x), _VMAP_CHUNK):
        rows = slice(first, first + _VMAP_CHUNK)
        with torch.no_grad():
            p = torch.softmax(model(x[rows], t[rows]), dim=1)
        for k in range(p.shape[1]):
            for name, g in gradients(parameters, x[rows], t[rows], k).items():
                found[name] += torch.einsum("b,b...->...", p[:, k], g.square())
    return {n: v / len(x) for n, v in found.items()}


# -- the command line ----------------------------------------------------------------------------------------------


def _startup(words: Sequence[str], repeats: int) -> dict[str, Any]:
    """Wall time of a command from start to end; a first start, which fills the disk cache, is not counted."""
    script = Path(sys.executable).with_name("cl-lab")
    command = [str(script)] if script.is_file() and os.access(script, os.X_OK) else [sys.executable, "-m", "cl_lab"]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise UserError(f"bench: 'cl-lab {' '.join(words)}' ended with code {done.returncode}: {done.stderr}")
    row = {"command": " ".join(["cl-lab", *words]), "seconds": statistics.median(seconds[1:]), "repeats": repeats}
    log.info("startup: %s: %.3f s", row["command"], row["seconds"])
    return row
