"""Toy streams that anything can learn in a second, and runs on them in this process.

Also a plug-in file: ``tests/toys.py:Toy`` as a scenario's name gives these streams to the command line and to ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from cl_lab import checkpoint, hub, registry, seeding
from cl_lab.chain import Chain
from cl_lab.config import RunConfig, parse
from cl_lab.errors import Interrupted
from cl_lab.knobs import knob
from cl_lab.learner import EngineLearner
from cl_lab.protocols import Scenario
from cl_lab.records import PAD, Experience, Scoring, Stream, TensorData
from cl_lab.trainer import Observer, Trainer

CLASSES = 2  # of each experience
FEATURES = 16
WORDS = 4  # of a question
END = 1  # the end-of-text token of the toy texts
PROMPT, ANSWER = 6, 3


@dataclass
class Toy(Scenario):
    """Gaussian clusters far apart: every class of every experience has a centre of its own."""

    experiences: int = knob(3, "number of experiences", ge=1)
    incremental: Literal["class", "task", "domain"] = knob("class", "what a label means")
    boundaries: bool = knob(True, "tell strategies where an experience ends")
    online: bool = knob(False, "each sample is seen once")
    form: Literal["float", "bytes", "images", "questions", "texts"] = knob(
        "float", "float32 [16], uint8 [16], uint8 [3, 16, 16], such a picture and a question, flat, or int32 tokens"
    )
    scoring: Scoring = knob("generation", "how answers in words are found")
    train: int = knob(60, "training samples per experience", ge=1)
    test: int = knob(40, "test samples per experience", ge=1)

    def stream(self, seed: int) -> Stream:
        """The stream for one seed."""
        if self.form == "texts":
            return self._texts(seed)
        shape: tuple[int, ...] = (3, 16, 16) if self.form == "images" else (FEATURES,)
        layout: dict[str, tuple[int, ...]] = {}
        if self.form == "questions":
            shape, layout = (3 * 16 * 16 + WORDS,), {"image": (3, 16, 16), "question": (WORDS,)}
        experiences = []
        for i in range(self.experiences):
            first = 0 if self.incremental == "domain" else CLASSES * i
            task = i if self.incremental == "task" else 0

            def make(part: str, i: int = i, first: int = first, task: int = task) -> TensorData:
                n = self.train if part == "train" else self.test
                rng = seeding.generator(seed, part, i)
                centres = torch.randn(CLASSES, FEATURES, generator=seeding.generator(seed, "centres", i))
                own = torch.arange(n) % CLASSES
                x = centres[own] + 0.3 * torch.randn(n, FEATURES, generator=rng)
                if self.form != "float":
                    x = (128 + 40 * x).clamp(0, 255).to(torch.uint8)
                if self.form in ("images", "questions"):
                    x = x.view(n, 1, 4, 4).repeat(1, 3, 4, 4)
                if self.form == "questions":
                    x = torch.cat([x.flatten(1), own[:, None].repeat(1, WORDS).to(torch.uint8)], 1)
                return TensorData(x, first + own, torch.full((n,), task))

            experiences.append(
                Experience(
                    i,
                    f"toy {i}",
                    range(first, first + CLASSES),
                    lambda make=make: make("train"),
                    lambda make=make: make("test"),
                )
            )
        return Stream(
            "toy",
            tuple(experiences),
            shape,
            CLASSES if self.incremental == "domain" else CLASSES * self.experiences,
            task_labels=self.incremental == "task",
            boundaries=self.boundaries,
            online=self.online,
            layout=layout,
        )

    def _texts(self, seed: int) -> Stream:
        """Prompts of three to six tokens that hold their class's own token; an answer is one token or two, and the end."""
        n_classes = CLASSES * (1 if self.incremental == "domain" else self.experiences)
        answers = torch.full((n_classes, ANSWER), PAD)
        for c, row in enumerate(answers):
            said = [10 + c] if c % 2 else [10 + c, 9]
            row[: len(said) + 1] = torch.tensor([*said, END])
        experiences = []
        for i in range(self.experiences):
            first = 0 if self.incremental == "domain" else CLASSES * i

            def make(part: str, i: int = i, first: int = first) -> TensorData:
                n = self.train if part == "train" else self.test
                rng = seeding.generator(seed, part, i)
                own = torch.arange(n) % CLASSES
                x = torch.randint(2, 9, (n, PROMPT), generator=rng)
                x[:, -2] = 30 + CLASSES * i + own
                x[torch.arange(PROMPT) < torch.randint(0, 4, (n, 1), generator=rng)] = PAD
                y = first + own
                return TensorData(torch.cat([x, answers[y]], 1).to(torch.int32), y, torch.full((n,), i))

            classes = range(first, first + CLASSES)
            train, test = (lambda make=make: make("train")), (lambda make=make: make("test"))
            experiences.append(Experience(i, f"toy {i}", classes, train, test))
        return Stream(
            "toy",
            tuple(experiences),
            (PROMPT + ANSWER,),
            n_classes,
            boundaries=self.boundaries,
            online=self.online,
            objective="language",
            layout={"prompt": (PROMPT,), "answer": (ANSWER,)},
            answers=answers,
            scoring=self.scoring,
        )


def stream(**knobs: Any) -> Stream:
    """A toy stream with the given knobs of :class:`Toy`."""
    made: Stream = registry.create("scenarios", {"name": f"{__file__}:Toy", **knobs}, "scenario").stream(0)
    return made


def own_settings(name: str) -> dict[str, Any]:
    """A registered strategy with the knobs it gave itself for tests, as a config would hold it."""
    cls, _ = registry.load("strategies", name)
    return {"name": name, **cls.conformance_knobs()}


STRATEGIES_AS_EDITORS: dict[str, dict[str, Any]] = {
    "naive": {},
    "ewc": {"fisher": "batched", "strength": 1.0},
    "replay": {"memory": 20},
}
"""Strategies that the suites run as editors, with what a strategy needs there."""


def editor_names() -> list[str]:
    """Every editor by the name that a configuration has, with some strategies for the one that takes any."""
    return [
        full
        for name in registry.names("editors")
        for full in ([f"{name}:{s}" for s in STRATEGIES_AS_EDITORS] if name == "strategy" else [name])
    ]


def editor_knobs(name: str) -> dict[str, Any]:
    """The knobs that the editor ``name`` gave itself for tests."""
    knobs: dict[str, Any] = registry.load("editors", name)[0].conformance_knobs()
    return knobs | STRATEGIES_AS_EDITORS.get(name.partition(":")[2], {})


TRAINING = {"epochs": 3, "batch_size": 10, "lr": 0.1}
HARD: dict[str, Any] = {
    "training": {
        "optimizer": "adamw",
        "lr": 0.01,
        "optimizer_state": "kept",
        "weight_decay": 0.01,
        "schedule": "cosine",
    },
    "evaluation": {"every_steps": 7},
}
"""Sections with much that a resumed run could forget: moments kept across experiences, a schedule, scores on the way."""
MLP = {"name": "mlp", "hidden": [24, 24]}


def config(**sections: Any) -> RunConfig:
    """A configuration for a toy stream; ``training`` is merged with :data:`TRAINING`, other sections stand as given."""
    training = TRAINING | sections.pop("training", {})
    if training.get("iterations"):
        training["epochs"] = 1
    document = {
        "scenario": {"name": f"{__file__}:Toy"},
        "model": MLP,
        "strategy": "naive",
        "training": training,
        "tracking": {"uri": None},
    }
    return parse(document | sections, "toy")


def trainer(
    links: Sequence[Mapping[str, Any]],
    on: Stream,
    *,
    seed: int = 0,
    checkpoints: Path | None = None,
    weights: Path | None = None,
    observer: Observer | None = None,
    stop: Callable[[], str | None] = lambda: None,
    chain: type[Chain] = Chain,
    **sections: Any,
) -> Trainer:
    """A trainer ready to run the chain ``links`` (name and knobs each), built as :mod:`cl_lab.experiment` builds one."""
    c = config(**sections)
    strategies = [registry.create("strategies", link, f"strategy.{i}") for i, link in enumerate(links)]
    made = chain(strategies, [str(link["name"]) for link in links], on)
    seeding.seed_everything(seeding.derive(seed, "model"))
    spec = registry.create("models", {"name": c.model.name, **c.model.knobs}, "model")
    learner = EngineLearner(made.prepare(spec.build(on), on), on, c.training, c.engine, seed)
    return Trainer(on, learner, made, c, seed, observer=observer, checkpoints=checkpoints, weights=weights, stop=stop)


def at_newest(made: Trainer) -> Trainer:
    """``made``, of fresh objects as a new process would make them, at the newest of its checkpoints, if there is one."""
    assert made.checkpoints is not None
    found = checkpoint.load_newest(made.checkpoints)
    if found is not None:
        seeding.seed_everything(99)  # a new process stands anywhere
        made.load_state_dict(found[0])
    return made


def stopped_at(step: int, made: Trainer) -> None:
    """Run ``made`` until a signal reaches it at ``step``."""
    made.stop = lambda: "SIGTERM" if made.record.steps >= step else None
    with pytest.raises(Interrupted, match=r"SIGTERM.*--resume"):
        made.run()
    assert made.record.steps == step


def weights_of(done: Trainer) -> dict[str, Tensor]:
    """Every parameter and buffer, full, on the CPU."""
    return done.learner.weights()


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same, bit for bit."""
    assert a.keys() == b.keys()
    return [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


def written(next_token: Callable[[list[int]], int], end: int, budget: int) -> list[int]:
    """What is said one token after another, ``next_token`` given those before: to the end, a line's end, or the budget."""
    said: list[int] = []
    while len(said) < budget and (token := next_token(said)) != end:
        said.append(token)
        if token == ord("\n"):
            break
    return said


def assert_same(one: Trainer, two: Trainer) -> None:
    """Two runs came out the same, bit for bit: scores, losses, measures, weights, and what the strategies hold."""
    assert one.record.matrix == two.record.matrix
    assert one.record.losses == two.record.losses
    assert one.record.measures == two.record.measures
    assert not differing(weights_of(one), weights_of(two))
    assert checkpoint.equal(one.strategy.state_dict(), two.strategy.state_dict())


def language_model() -> Any:
    """A random model that can be sure of a token and whose layers do something, which one as drawn cannot and does not.

    A ``LlamaForCausalLM`` over bytes, always the same.
    """
    torch.manual_seed(11)
    model: Any = hub.tiny_causal_lm(vocabulary=257, layers=4, width=32, heads=2)
    with torch.no_grad():
        for weight in (model.model.norm.weight, model.model.embed_tokens.weight):
            weight *= 3
        for layer in model.model.layers:
            at, ff = layer.self_attn, layer.mlp
            for part, factor in (
                (at.q_proj, 4),
                (at.k_proj, 4),
                (at.v_proj, 2),
                (at.o_proj, 2),
                (ff.gate_proj, 2),
                (ff.up_proj, 2),
            ):
                part.weight *= factor
    return model
