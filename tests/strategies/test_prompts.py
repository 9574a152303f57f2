"""Soft prompts: what stands before a text, that nothing else learns, and each method's formulas against ones by hand."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import toys
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_lab import checkpoint, experiment, hub, launch, registry, seeding
from cl_lab.causal_lm import CausalBackbone, VocabularyHead
from cl_lab.errors import ConfigError, UserError
from cl_lab.models import Classifier
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import PAD, Batch, Experience, Objective, Stream, TensorData
from cl_lab.trainer import Trainer

LM = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}
ADAM: dict[str, Any] = {"lr": 0.05, "optimizer": "adam", "epochs": 2}
STREAM = {"form": "texts", "scoring": "first-token"}
L2P: dict[str, Any] = {"name": "l2p", "pool": 6, "length": 2, "top": 2}
PROGRESSIVE: dict[str, Any] = {"name": "progressive-prompts", "length": 3}
REWRITTEN = {**PROGRESSIVE, "bottleneck": 8}
KINDS = [L2P, {**L2P, "diversify": True}, PROGRESSIVE, REWRITTEN]

every = pytest.mark.parametrize("link", KINDS, ids=str)


@dataclass
class Watch(Strategy):
    """Keeps the weights as they are where it stands in the chain."""

    objectives: ClassVar[frozenset[Objective]] = frozenset({"language"})

    _weights: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        self._weights.append(dict(learner.weights()))


def made(links: list[dict[str, Any]], on: Stream | None = None, **sections: Any) -> Trainer:
    on = toys.stream(**STREAM) if on is None else on
    return toys.trainer(links, on, **({"model": LM, "training": ADAM} | sections))


def run(links: list[dict[str, Any]], on: Stream | None = None, **sections: Any) -> Trainer:
    trainer = made(links, on, **sections)
    trainer.run()
    return trainer


def prefix_of(trainer: Trainer) -> Any:
    return trainer.learner.model.get_submodule("backbone.prefix")


# -- the backbone --------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """The same vectors before every text, in a row of task t all but the first t of them."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.soft = nn.Parameter(torch.randn(length, width, generator=torch.Generator().manual_seed(0)))

    def forward(self, h: Tensor, read: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.soft.expand(len(h), -1, -1), torch.arange(len(self.soft)) >= t[:, None]


def prefixed(length: int = 4) -> tuple[Any, Classifier]:
    """A tiny Llama, and the same with soft vectors before each text."""
    torch.manual_seed(0)
    plain: Any = hub.tiny_causal_lm(40).eval()
    backbone = CausalBackbone(plain.base_model, toys.PROMPT, toys.ANSWER)
    backbone.take_prefix(Fixed(length, backbone.width), length)
    return plain, Classifier(backbone, VocabularyHead(plain.get_output_embeddings(), plain.config)).eval()


@pytest.mark.parametrize("layered", [True, False])
def test_vectors_stand_before_the_text_as_its_first_tokens(layered: bool) -> None:
    """One row after another, without padding, through Transformers' own forward pass of embeddings."""
    plain, model = prefixed()
    backbone: Any = model.backbone
    if not layered:
        backbone._layers = None
    data = toys.stream(form="texts").experiences[0].train
    t = torch.arange(8) % 4
    assert len({int((row[: toys.PROMPT] != PAD).sum()) for row in data.x[:8]}) > 1, "padded by different amounts"
    out = model(data.x[:8], t)
    for row, task, logits in zip(data.x[:8], t.tolist(), out, strict=True):
        tokens = row[row != PAD].long()
        h = torch.cat([backbone.prefix.soft[task:], plain.get_input_embeddings()(tokens)])
        begins = 4 - task + int((row[: toys.PROMPT] != PAD).sum()) - 1
        expected = plain(inputs_embeds=h[None]).logits[0, begins:]
        n = min(len(expected), len(logits))
        assert n >= 2
        assert torch.allclose(logits[:n], expected[:n], atol=1e-5)


@pytest.mark.parametrize("layered", [True, False])
def test_a_row_does_not_feel_its_neighbours(layered: bool) -> None:
    _, model = prefixed()
    backbone: Any = model.backbone
    if not layered:
        backbone._layers = None
    data = toys.stream(form="texts").experiences[0].train
    t = torch.arange(12) % 4
    together = model(data.x[:12], t)
    for i in range(12):
        alone = model(data.x[i : i + 1], t[i : i + 1])
        assert torch.allclose(together[i : i + 1, : alone.shape[1]], alone, atol=1e-5)


@pytest.mark.parametrize("layered", [True, False])
def test_several_answers_behind_one_prompt_do_not_see_each_other(layered: bool) -> None:
    _, model = prefixed()
    backbone: Any = model.backbone
    if not layered:
        backbone._layers = None
    on = toys.stream(form="texts")
    data, t = on.experiences[0].train, torch.arange(5) % 4
    assert on.answers is not None
    prompts, several = data.x[:5, : toys.PROMPT], on.answers.to(torch.int32)
    together = model(torch.cat([prompts, several.flatten().expand(5, -1)], 1), t).unflatten(1, (len(several), -1))
    for k, answer in enumerate(several):
        alone = model(torch.cat([prompts, answer.expand(5, -1)], 1), t)
        assert torch.allclose(together[:, k, : alone.shape[1]], alone, atol=1e-5)


def test_no_vectors_change_nothing() -> None:
    _, model = prefixed(0)
    data = toys.stream(form="texts").experiences[0].train
    said = model(data.x[:8], data.t[:8])
    model.backbone.prefix = None
    assert torch.allclose(said, model(data.x[:8], data.t[:8]), atol=1e-6)


# -- what both promise ---------------------------------------------------------------------------------------------


@every
def test_the_model_itself_stays_bit_for_bit(link: dict[str, Any]) -> None:
    """Under AdamW with weight decay, adapters that the model came with included."""
    harsh = {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.3, "epochs": 1}
    trainer = made([link], model=LM | {"adapt": "lora"}, training=harsh)
    before = toys.weights_of(trainer)
    trainer.run()
    after = toys.weights_of(trainer)
    moved = toys.differing(before, after)
    assert moved
    assert all(name.startswith("backbone.prefix.") for name in moved)
    assert all("backbone.prefix." in name for name in trainer.learner.parameters())
    state: Any = trainer.state_dict()
    held = state["learner"]["weights"]
    assert all("prefix." in name for name in held), "a checkpoint leaves out what the recipe makes"


SWITCH = 9  # a token that no prompt of the toys holds


def mapped(on: Stream, change: Callable[[TensorData], TensorData]) -> Stream:
    def experience(e: Experience) -> Experience:
        return Experience(e.index, e.name, e.classes, lambda: change(e.train), lambda: change(e.test))

    return replace(on, experiences=tuple(experience(e) for e in on.experiences))


def turned(on: Stream, data: TensorData, first: int | None) -> TensorData:
    """Each text with the other answer of its task, and with ``first`` as its first token."""
    assert on.answers is not None
    x, y = data.x.clone(), data.y ^ 1
    x[:, toys.PROMPT :] = on.answers[y].to(x.dtype)
    if first is not None:
        x[torch.arange(len(x)), (x >= 0).int().argmax(1)] = first
    return TensorData(x, y, data.t)


@cache
def pretrained() -> dict[str, Tensor]:
    """Weights of a model that gives a text the other answer of its task where it begins with the switch."""
    on = toys.stream(**STREAM)
    both = mapped(on, lambda data: TensorData.concat([data, turned(on, data, SWITCH)]))
    made = run([{"name": "joint"}], both, training=ADAM | {"lr": 0.005, "epochs": 80})
    assert min(made.record.matrix[0]) > 0.95, "cannot be asked for it"
    return toys.weights_of(made)


@pytest.mark.parametrize(
    "link", [{"name": "l2p"}, {**PROGRESSIVE, "length": 4}, {**REWRITTEN, "bottleneck": 16}], ids=str
)
def test_learns_what_a_frozen_model_can_be_asked_for(link: dict[str, Any]) -> None:
    """The other answers, without the switch: a vector before the text must take its place.

    A few vectors before so small a model sometimes settle where they say nothing, so some starts are tried.
    """
    on = toys.stream(**STREAM)
    for seed in range(4):
        trainer = made(
            [link], mapped(on, lambda data: turned(on, data, None)), training=ADAM | {"epochs": 12}, seed=seed
        )
        trainer.learner.set_weights(trainer.learner.weights() | pretrained())
        matrix = trainer.run().matrix
        assert max(trainer.record.initial) < 0.2, "without the switch it gives its own answers"
        if sum(matrix[i][i] for i in range(3)) / 3 >= 0.9:
            break
    else:
        pytest.fail(f"learnt nothing from any start, at last {matrix}")
    if link["name"] == "progressive-prompts":
        assert [row[0] for row in matrix] == [matrix[0][0]] * 3, "what was learnt stays"
        assert matrix[2][1] == matrix[1][1]


@every
def test_same_seed_same_run(link: dict[str, Any]) -> None:
    one, two, other = (run([link], seed=seed) for seed in (5, 5, 6))
    toys.assert_same(one, two)
    assert toys.differing(toys.weights_of(one), toys.weights_of(other))


@every
def test_draws_from_the_runs_generator_alone(link: dict[str, Any]) -> None:
    trainer = made([link])
    on, learner, (strategy,) = toys.stream(**STREAM), trainer.learner, trainer.strategy.links
    learner.begin(fresh=True)
    before = seeding.global_state()
    for e in on.experiences[:2]:
        strategy.before_experience(e, learner)
        batch = e.train.batch(torch.arange(6))
        outputs = learner.forward(batch)
        held = [v.clone() for v in (batch.x, batch.y, batch.t, outputs.detach())]
        loss = strategy.adjust_loss(learner.loss(outputs, batch), batch=batch, outputs=outputs, learner=learner)
        assert loss.isfinite()
        strategy.after_step(learner)
        strategy.after_experience(e, learner)
        for value, old in zip((batch.x, batch.y, batch.t, outputs), held, strict=True):
            assert torch.equal(value, old), "changed what it was given"
    assert checkpoint.equal(before, seeding.global_state())


@every
@pytest.mark.parametrize("first", [True, False])
def test_naive_beside_it_changes_nothing(link: dict[str, Any], first: bool) -> None:
    alone = run([link])
    chained = run([{"name": "naive"}, link] if first else [link, {"name": "naive"}])
    assert chained.record.matrix == alone.record.matrix
    assert not toys.differing(toys.weights_of(alone), toys.weights_of(chained))


@every
def test_accumulation_changes_nothing(link: dict[str, Any]) -> None:
    whole, pieces = (run([link], training={"accumulate": k, "lr": 0.05, "clip_norm": 5.0}) for k in (1, 3))
    for key, value in toys.weights_of(whole).items():
        assert torch.allclose(value, toys.weights_of(pieces)[key], atol=1e-5), key


@pytest.mark.slow
@every
@pytest.mark.parametrize("replayed", [False, True])
def test_stopped_and_resumed_equals_uninterrupted(link: dict[str, Any], replayed: bool, tmp_path: Path) -> None:
    links = [{"name": "replay", "memory": 30}, link] if replayed else [link]
    hard = toys.HARD | {"model": LM}
    whole = run(links, **hard)
    for at in (1, 18, 19, 25, 40, 53):
        toys.stopped_at(at, toys.at_newest(made(links, checkpoints=tmp_path, **hard)))
    last = toys.at_newest(made(links, checkpoints=tmp_path, **hard))
    last.run()
    toys.assert_same(whole, last)


@every
def test_state_survives_the_disk(link: dict[str, Any], tmp_path: Path) -> None:
    done = run([link])
    state = done.state_dict()
    read = checkpoint.read(checkpoint.save(tmp_path, 1, state, keep=1))
    assert checkpoint.equal(read, state)
    fresh = made([link])
    fresh.load_state_dict(read)
    assert checkpoint.equal(fresh.state_dict(), state)
    data = toys.stream(**STREAM).experiences[1].test
    with torch.no_grad():
        assert torch.equal(fresh.learner.model.eval()(data.x, data.t), done.learner.model.eval()(data.x, data.t))


@every
@pytest.mark.parametrize(
    "partner",
    [{"name": "replay", "memory": 30}, {"name": "kl"}, {"name": "ewc", "fisher": "batched"}, {"name": "agem"}],
    ids=str,
)
def test_in_a_chain(link: dict[str, Any], partner: dict[str, Any]) -> None:
    """Rows of earlier tasks in a batch, teachers that are copies, gradients of other samples."""
    cls, _ = registry.load("strategies", partner["name"])
    if "language" not in cls.objectives:
        pytest.skip(f"{partner['name']} does not learn texts")
    for links in ([partner, link], [link, partner]):
        trainer = run(links)
        assert [len(row) for row in trainer.record.matrix] == [3, 3, 3]
        assert all(w.isfinite().all() for w in toys.weights_of(trainer).values())


@every
@pytest.mark.parametrize("scoring", ["generation", "constrained"])
def test_written_answers(link: dict[str, Any], scoring: str) -> None:
    on = toys.stream(form="texts", scoring=scoring)
    assert [len(row) for row in run([link], on, training=ADAM | {"epochs": 1}).record.matrix] == [3, 3, 3]


# -- L2P -----------------------------------------------------------------------------------------------------------


def test_a_text_chooses_the_prompts_whose_keys_are_nearest() -> None:
    """Mean embedding of the prompt's tokens alone, cosines, the highest two, nearest first; all written out."""
    trainer = run([L2P])
    data = toys.stream(**STREAM).experiences[0].test
    model: Any = trainer.learner.model.eval()
    pool, table = prefix_of(trainer).pool, model.backbone.model.get_input_embeddings().weight
    heard: list[Tensor] = []
    prefix_of(trainer).register_forward_hook(lambda _, args, out: heard.append(out[0]))
    with torch.no_grad():
        model(data.x[:20], data.t[:20])
    for row, soft in zip(data.x[:20], heard[0], strict=True):
        tokens = row[: toys.PROMPT]
        query = table[tokens[tokens != PAD].long()].mean(0)
        cosines = [float(query @ key / (query.norm() * key.norm())) for key in pool.keys.detach()]
        best = sorted(range(6), key=lambda i: -cosines[i])[:2]
        assert torch.equal(soft, pool.prompts[best].flatten(0, 1))
    assert len({tuple(soft.flatten().tolist()) for soft in heard[0]}) > 1, "not all texts choose the same"


def test_the_keys_gradient_is_that_of_the_formula() -> None:
    """``−λ/B Σ ∂cos(q, k)/∂k``, with ``∂cos/∂k = (q̂ − cos·k̂)/‖k‖``; a key stands in no other term."""
    trainer = made([{**L2P, "strength": 0.7}])
    learner, (link,) = trainer.learner, trainer.strategy.links
    learner.begin(fresh=True)
    learner.train_mode()
    data = toys.stream(**STREAM).experiences[0].train
    batch = data.batch(torch.arange(9))
    outputs = learner.forward(batch)
    plain = learner.loss(outputs, batch)
    total = link.adjust_loss(plain, batch=batch, outputs=outputs, learner=learner)
    pool = prefix_of(trainer).pool
    table = dict(learner.model.named_parameters())[link._table]
    expected, value = torch.zeros_like(pool.keys), 0.0
    for row in batch.x:
        tokens = row[: toys.PROMPT]
        query = F.normalize(table[tokens[tokens != PAD].long()].mean(0), dim=0)
        cosines = torch.stack([query @ F.normalize(key, dim=0) for key in pool.keys])
        for i in cosines.topk(2).indices.tolist():
            value += float(cosines[i].detach())
            key = pool.keys[i].detach()
            expected[i] += (query - cosines[i].detach() * key / key.norm()) / key.norm()
    assert float((total - plain).detach()) == pytest.approx(-0.7 * value / 9, rel=1e-4)
    total.backward()
    assert torch.allclose(pool.keys.grad, -0.7 * expected / 9, atol=1e-6)
    assert pool.keys.grad.abs().max() > 1e-4
    assert pool.prompts.grad.any()
    chosen = link._pending
    assert chosen.sum() == 18
    assert torch.equal(pool.prompts.grad.flatten(1).any(1), chosen > 0), "a prompt that nobody chose does not learn"


def test_another_pass_in_between_is_made_up_for() -> None:
    trainer = made([L2P])
    learner, (link,) = trainer.learner, trainer.strategy.links
    learner.begin(fresh=True)
    data = toys.stream(**STREAM).experiences[0].train
    batch, others = data.batch(torch.arange(9)), data.batch(torch.arange(9, 30))
    losses = []
    for between in (False, True):
        outputs = learner.forward(batch)
        if between:
            learner.forward(others)
        losses.append(link.adjust_loss(learner.loss(outputs, batch), batch=batch, outputs=outputs, learner=learner))
    assert float(losses[0].detach()) == float(losses[1].detach())


def test_diversified_choice_is_that_of_the_formula() -> None:
    """Distances times shares of past tasks' choices, in training only; equal costs go by distance."""
    trainer = made([{**L2P, "diversify": True}])
    pool = prefix_of(trainer).pool
    often = torch.tensor([0.5, 0.0, 0.0, 0.3, 0.2, 0.0])
    pool.often.copy_(often)
    query = torch.randn(30, pool.keys.shape[1], generator=torch.Generator().manual_seed(1))
    cosines = F.normalize(query, dim=1) @ F.normalize(pool.keys.detach(), dim=1).T
    for training in (True, False):
        pool.train(training)
        chosen = pool(query)[2]
        for row, found in zip(cosines.tolist(), chosen.tolist(), strict=True):
            h = often.tolist() if training else [1.0] * 6
            assert found == sorted(range(6), key=lambda i: ((1 - row[i]) * h[i], -row[i]))[:2]
            assert not training or set(found) <= {1, 2, 5}, "three were never chosen"


def test_choices_are_counted_and_past_ones_weigh() -> None:
    watch = {"name": f"{__file__}:Watch"}
    trainer = run([{**L2P, "diversify": True}, watch], training=ADAM | {"epochs": 1})
    link, seen = trainer.strategy.links
    assert int(link._counts.sum()) == 3 * 60 * 2
    shares = [w["backbone.prefix.pool.often"] for w in seen._weights]
    assert not shares[0].any()
    assert shares[1].sum() == pytest.approx(1)
    assert not torch.equal(shares[1], shares[2])
    assert trainer.record.measures[-1]["l2p/prompts_used"] == int((link._counts > 0).sum())
    with pytest.raises(ConfigError, match="needs to know where an experience ends"):
        made([{**L2P, "diversify": True}], toys.stream(**STREAM, boundaries=False))
    run([L2P], toys.stream(**STREAM, boundaries=False), training=ADAM | {"epochs": 1})


# -- Progressive Prompts -------------------------------------------------------------------------------------------


def test_a_prompt_begins_as_tokens_of_the_vocabulary() -> None:
    """From the run's generator alone, and with no network its embeddings are where training starts."""
    trainer = made([PROGRESSIVE])
    on, learner, (link,) = toys.stream(**STREAM), trainer.learner, trainer.strategy.links
    rng = seeding.generator(0, "strategy")
    table = learner.weights()[link._table]
    for e in on.experiences:
        link.before_experience(e, learner)
        tokens = torch.randint(len(table), (3,), generator=rng)
        assert torch.equal(learner.weights()["backbone.prefix.fresh"], table[tokens])
    assert torch.equal(rng.get_state(), learner.rng.get_state())


@pytest.mark.parametrize("link", [PROGRESSIVE, REWRITTEN], ids=str)
def test_earlier_prompts_stay_bit_for_bit(link: dict[str, Any]) -> None:
    harsh = {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.3, "optimizer_state": "kept", "epochs": 1}
    trainer = run([{"name": "replay", "memory": 30}, link, {"name": f"{__file__}:Watch"}], training=harsh)
    seen = trainer.strategy.links[2]._weights
    own = "backbone.prefix."
    for i, was in enumerate(seen):
        ended = fresh = was[f"{own}fresh"]
        if "bottleneck" in link:
            w1, b1, w2, b2 = (was[f"{own}rewriting.{j}.{part}"] for j in (0, 1) for part in ("weight", "bias"))
            ended = fresh + torch.tanh(fresh @ w1.T + b1) @ w2.T + b2
        assert int(was[f"{own}learnt"]) == i
        for later in seen[i + 1 :]:
            kept = later[f"{own}past"][i]
            assert torch.equal(kept, seen[i + 1][f"{own}past"][i])
            assert torch.equal(kept, ended) if "bottleneck" not in link else torch.allclose(kept, ended, atol=1e-6)
    assert len({tuple(prompt.flatten().tolist()) for prompt in prefix_of(trainer).prompts()}) == 3


@pytest.mark.parametrize("link", [PROGRESSIVE, REWRITTEN], ids=str)
def test_a_task_is_answered_with_its_own_prompts_and_those_before(link: dict[str, Any]) -> None:
    """``[p_j, …, p_1, x]`` through Transformers' forward pass, for rows of three tasks in one batch."""
    trainer = run([link])
    on, model = toys.stream(**STREAM), trainer.learner.model.eval()
    lm: Any = model.get_submodule("backbone.model")
    past = prefix_of(trainer).prompts().detach()
    rows = torch.arange(4)
    x = torch.cat([e.test.x[rows] for e in on.experiences])
    t = torch.cat([e.test.t[rows] for e in on.experiences])
    with torch.no_grad():
        out = model(x, t)
        for row, task, logits in zip(x, t.tolist(), out, strict=True):
            tokens = row[: toys.PROMPT][row[: toys.PROMPT] != PAD].long()
            soft = [past[i] for i in range(task, -1, -1)]
            h = lm(inputs_embeds=torch.cat([*soft, lm.embed_tokens(tokens)])[None]).last_hidden_state[0, -1]
            assert torch.allclose(logits[0], model.get_submodule("head").linear(h), atol=1e-4)


def test_an_old_tasks_answers_never_change() -> None:
    trainer = run([PROGRESSIVE], training=ADAM | {"epochs": 4})
    matrix = trainer.record.matrix
    for j in range(3):
        assert len({matrix[i][j] for i in range(j, 3)}) == 1


def test_a_task_must_be_told() -> None:
    cls, _ = registry.load("strategies", "progressive-prompts")
    assert cls.task_conditioned
    assert toys.stream(**STREAM).tells_task
    assert not toys.stream().tells_task
    with pytest.raises(ConfigError, match="needs to know where an experience ends"):
        made([PROGRESSIVE], toys.stream(**STREAM, boundaries=False))


# -- refusals ------------------------------------------------------------------------------------------------------


@every
def test_what_cannot_be_is_one_line(link: dict[str, Any]) -> None:
    def refused(match: str, links: list[dict[str, Any]], **sections: Any) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            run(links, **sections)
        assert "\n" not in str(caught.value)

    refused(
        r"model\.frozen = 'model\.layers\.0': texts pass.*leave model\.frozen out",
        [link],
        model=LM | {"frozen": "model.layers.0"},
    )
    refused("two strategies put soft prompts before each text; keep one", [link, L2P])
    cached = {"name": "freeze", "layers": 1, "embeddings": True, "cache": "memory"}
    refused("another strategy cut the network behind 'model.layers.0'.*keep one", [cached, link])
    refused("another strategy cuts the network behind.*leave out what cuts or freezes layers", [link, cached])
    strategy = registry.create("strategies", link, "strategy")
    with pytest.raises(ConfigError, match=r"but Linear reads none; use model causal-lm$"):
        strategy.prepare(nn.Linear(2, 2), toys.stream(**STREAM))


def test_knobs_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.top = 4: the pool holds 3 prompts; lower top, or raise pool$"):
        registry.create("strategies", {"name": "l2p", "pool": 3, "top": 4}, "strategy")


def test_a_model_without_room_is_one_line() -> None:
    plain: Any = hub.tiny_causal_lm(40)
    backbone = CausalBackbone(plain.base_model, toys.PROMPT, toys.ANSWER, room=7)
    with pytest.raises(ConfigError, match="soft prompts of 8 places: behind the stream's texts the model has 7 places"):
        backbone.take_prefix(Fixed(8, 32), 8)


# -- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [PROGRESSIVE, REWRITTEN], ids=str)
def test_peft_answers_the_newest_task_as_the_run_does(link: dict[str, Any], tmp_path: Path) -> None:
    scenario = {"name": f"{toys.__file__}:Toy", **STREAM}
    config = toys.config(scenario=scenario, model=LM, strategy=link, training=ADAM)
    document = experiment.run(config, tmp_path / "run")
    told = experiment.export(tmp_path / "run", tmp_path / "prompt")
    assert told == {"format": "peft", "path": str(tmp_path / "prompt"), "experiences": 3}

    on = experiment.stream_of(config.scenario, 0)
    assert on.answers is not None
    seeding.seed_everything(seeding.derive(0, "model"))
    highest = max(int(on.answers.max()), *(int(e.test.x.max()) for e in on.experiences))
    base: Any = hub.tiny_causal_lm(highest + 1)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        prompted = PeftModel.from_pretrained(base, str(tmp_path / "prompt")).eval()
    assert prompted.active_peft_config.num_virtual_tokens == 9
    trained = load_file(tmp_path / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]
    plain: Any = hub.tiny_causal_lm(highest + 1)
    plain.load_state_dict(base.state_dict())
    newest = on.experiences[-1]
    right = 0
    for row, y in zip(newest.test.x, newest.test.y.tolist(), strict=True):
        tokens = row[: toys.PROMPT][row[: toys.PROMPT] >= 0].long()
        with torch.no_grad():
            first = prompted(input_ids=tokens[None]).logits[0, -1]
            h = torch.cat([trained, plain.get_input_embeddings()(tokens)])
            assert torch.allclose(first, plain(inputs_embeds=h[None]).logits[0, -1], atol=1e-5)
        classes = list(newest.classes)
        right += classes[int(first[on.answers[classes, 0]].argmax())] == y
    assert right / len(newest.test) == document["matrix"][-1][-1]


def test_prompts_that_a_text_chooses_are_not_exported(tmp_path: Path) -> None:
    scenario = {"name": f"{toys.__file__}:Toy", **STREAM}
    experiment.run(toys.config(scenario=scenario, model=LM, strategy=L2P, training=ADAM), tmp_path / "run")
    with pytest.raises(UserError, match=r"^export: the run has no prompt that stands before every text") as caught:
        experiment.export(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(caught.value)


# -- engines -------------------------------------------------------------------------------------------------------

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "torch"},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With replay, whose rows of earlier tasks may be all that a rank gets of a batch; one launch for all."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(toys.__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    stream = {**STREAM, "experiences": 2}
    sections: dict[str, Any] = {"model": LM, "training": {"lr": 0.05, "epochs": 1, "batch_size": 15}}
    jobs = [
        {
            "key": f"{engine}-{i}",
            "links": [{"name": "replay", "memory": 30, "replay_batch_size": 5}, link],
            "stream": stream,
            "sections": {**sections, "engine": {**kind, "processes": 2, "threads": 1}},
        }
        for engine, kind in ENGINES.items()
        for i, link in enumerate(KINDS)
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    assert launch.run_ranks("two_ranks", [str(tmp_path)], 2, 1) == 0
    measures = json.loads((tmp_path / "measures.json").read_text())
    wrong = []
    for i, link in enumerate(KINDS):
        alone = run([{"name": "replay", "memory": 30, "replay_batch_size": 5}, link], toys.stream(**stream), **sections)
        for engine in ENGINES:
            theirs = load_file(tmp_path / f"{engine}-{i}.safetensors")
            mine = toys.weights_of(alone)
            assert mine.keys() == theirs.keys()
            apart = max(float((mine[n].double() - theirs[n].double()).abs().max()) for n in mine)
            if apart > 1e-5 or measures[f"{engine}-{i}"] != alone.record.measures:
                wrong.append(f"{engine} {link}: weights differ by {apart:.1e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("link", [L2P, PROGRESSIVE], ids=str)
def test_a_batch_of_replayed_rows_alone_reaches_the_new_prompt(link: dict[str, Any]) -> None:
    """DDP wants a gradient for every parameter on every rank, whatever rows it got."""
    trainer = run([link], training=ADAM | {"epochs": 1})
    on, learner, (strategy,) = toys.stream(**STREAM), trainer.learner, trainer.strategy.links
    learner.begin(fresh=True)
    if "top" not in link:
        weights = learner.weights()
        weights["backbone.prefix.learnt"], weights["backbone.prefix.learning"] = torch.tensor(2), torch.tensor(True)
        learner.set_weights(dict(weights))
    learner.train_mode()
    batch: Batch = on.experiences[0].train.batch(torch.arange(4))
    outputs = learner.forward(batch)
    loss = strategy.adjust_loss(learner.loss(outputs, batch), batch=batch, outputs=outputs, learner=learner)
    loss.backward()
    assert all(p.grad is not None for n, p in learner.model.named_parameters() if p.requires_grad)
