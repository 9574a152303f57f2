"""I-LoRA: the slow weights are the closed-form average of the fast ones, and pull only where they should."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import checkpoint, hub, launch, registry
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import OBJECTIVES, PAD, Batch, Experience, Objective, Stream
from cl_lab.trainer import Trainer
from strategies.ilora import ILoRA

LM = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"]}
ADAM = {"lr": 0.02, "optimizer": "adam", "epochs": 6}


@dataclass
class Watch(Strategy):
    """Keeps the fast weights as they are before the first step and after each."""

    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    _seen: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        if not self._seen:
            self._seen.append({n: p.clone() for n, p in learner.parameters().items()})
        return batch

    def after_step(self, learner: Learner) -> None:
        self._seen.append({n: p.clone() for n, p in learner.parameters().items()})


@dataclass
class Averaged(ILoRA):
    """Measures how far its slow weights are from the closed-form average of the fast ones, kept after every step."""

    _seen: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)
    _found: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        if not self._seen:
            self._keep(learner)
        return super().mix(batch, learner)

    def after_step(self, learner: Learner) -> None:
        super().after_step(learner)
        self._keep(learner)

    def _keep(self, learner: Learner) -> None:
        self._seen.append({n: p.to("cpu", torch.float64, copy=True) for n, p in learner.parameters().items()})

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        super().after_experience(experience, learner)
        n = len(self._seen) - 1
        slow: Any = self._slow.state_dict()
        apart, behind = 0.0, 0.0
        for name in self._seen[0]:
            path = torch.stack([seen[name] for seen in self._seen])
            # θ_s = λⁿ θ_0 + (1 − λ) Σ_k λⁿ⁻ᵏ θ_k
            weights = (1 - self.decay) * self.decay ** (n - torch.arange(n + 1, dtype=torch.float64))
            weights[0] = self.decay**n
            apart = max(apart, float((torch.tensordot(weights, path, 1) - slow[name].cpu().double()).abs().max()))
            behind = max(behind, float((path[-1] - slow[name].cpu().double()).abs().max()))
        self._found = {"steps": float(n), "parameters": float(len(slow)), "apart": apart, "behind": behind}

    def measures(self) -> dict[str, float]:
        return dict(self._found)


def trainer(on: Stream, knobs: dict[str, Any], **sections: Any) -> tuple[Trainer, Any]:
    links = [{"name": "ilora", "memory": 60, **knobs}, {"name": f"{__file__}:Watch"}]
    made = toys.trainer(links, on, **sections)
    return made, made.strategy.links


@pytest.mark.parametrize(("decay", "warm_up"), [(0.9, True), (0.99, True), (0.9, False)])
def test_slow_weights_are_the_closed_form_average(decay: float, warm_up: bool) -> None:
    """After k steps ``θ_s = Σ_i w_i θ_f(i)`` with weights that the recursion gives; 108 steps, adapters alone."""
    on = toys.stream(form="texts", scoring="first-token")
    made, (ilora, watch) = trainer(on, {"decay": decay, "warm_up": warm_up}, model=LM, training=ADAM | {"lr": 0.005})
    made.run()
    assert len(watch._seen) > 100
    weights = torch.ones(1, dtype=torch.float64)
    for k in range(1, len(watch._seen)):
        stays = min(1 - 1 / (k + 1), decay) if warm_up else decay
        weights = torch.cat([weights * stays, torch.tensor([1 - stays], dtype=torch.float64)])
    assert weights.sum() == pytest.approx(1)
    slow = dict(ilora._slow._module.named_parameters())
    assert all("lora_" in name for name in watch._seen[0])
    for name in watch._seen[0]:
        path = torch.stack([seen[name] for seen in watch._seen]).double()
        expected = torch.tensordot(weights, path, 1)
        assert torch.allclose(slow[name].double(), expected, atol=1e-6), name
        assert not slow[name].requires_grad
    if warm_up and decay == 0.99:
        assert torch.allclose(weights[:-1], weights[1:], atol=1e-3), "until λ takes over, the plain mean"


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_slow_weights_of_a_model_in_bf16_move_as_the_closed_form_says(adapt: str, tmp_path: Path) -> None:
    """A hundredth of a way is less than bf16 tells from nothing; and what is saved goes on from the very same place."""
    torch.manual_seed(0)
    made: Any = hub.tiny_causal_lm(64)
    made.save_pretrained(tmp_path)
    link = {"name": f"{__file__}:Averaged", "memory": 60, "decay": 0.99, "warm_up": False, "strength": 0.0}
    model = {**LM, "weights": str(tmp_path), "dtype": "bfloat16", "adapt": adapt}
    on = toys.stream(form="texts", scoring="first-token", experiences=1)
    trained = toys.trainer([link], on, model=model, training=ADAM | {"lr": 0.005, "epochs": 3})
    (measures,) = trained.run().measures
    last = {name.rpartition("/")[2]: value for name, value in measures.items()}
    assert last["behind"] > 1e-3
    assert last["apart"] <= 1e-6, last
    (slow,) = trained.strategy.links
    restored = Averaged(memory=60)
    restored._slow.load_state_dict(copy.deepcopy(slow._slow.state_dict()))
    for teacher in (slow._slow, restored._slow):
        teacher.follow(trained.learner, 0.01)
    assert not toys.differing(slow._slow.state_dict(), restored._slow.state_dict())


ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    "ddp": {"kind": "torch", "processes": 2, "threads": 1},
    **{f"zero{i}": {"kind": "deepspeed", "zero": i, "processes": 2, "threads": 1} for i in (1, 2, 3)},
}


@pytest.mark.slow
def test_the_closed_form_holds_under_every_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch, then DDP and ZeRO 1–3 on two ranks of one launch: 108 steps, a second task with its memory in them."""
    link = {"name": f"{__file__}:Averaged", "memory": 60, "decay": 0.95, "warm_up": False}
    stream = {"form": "texts", "scoring": "first-token", "experiences": 2}
    sections = {"model": {**LM, "lora_targets": ["q_proj"], "layers": 1}, "training": ADAM | {"lr": 0.005, "epochs": 9}}
    found = {"torch": toys.trainer([link], toys.stream(**stream), **sections).run().measures}
    jobs = [
        {"key": key, "links": [link], "stream": stream, "sections": {**sections, "engine": engine}}
        for key, engine in ENGINES.items()
        if key != "torch"
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(toys.__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    assert launch.run_ranks("two_ranks", [str(tmp_path)], 2, 1) == 0
    found |= json.loads((tmp_path / "measures.json").read_text())
    assert list(found) == list(ENGINES)
    for key, measures in found.items():
        last = {name.rpartition("/")[2]: value for name, value in measures[-1].items()}
        assert last["steps"] == 108, key
        assert last["apart"] <= 1e-6, (key, last)
        assert last["behind"] > 1e-3, f"{key}: the fast weights are elsewhere"


def test_released_slow_weights_never_move() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    made, (ilora, watch) = trainer(on, {"variant": "released"}, model=LM, training=ADAM)
    made.run()
    slow = dict(ilora._slow._module.named_parameters())
    assert all(torch.equal(slow[name], p) for name, p in watch._seen[0].items())


def prepared(on: Stream, variant: str, **sections: Any) -> tuple[Trainer, Any]:
    """One experience learnt, the second begun: a memory, and slow weights away from the fast ones."""
    made = toys.trainer([{"name": "ilora", "memory": 60, "variant": variant, "strength": 3.0}], on, **sections)
    learner, (ilora,) = made.learner, made.strategy.links
    learner.begin(fresh=True)
    first = on.experiences[0]
    made.strategy.before_experience(first, learner)
    ilora.mix(first.train.batch(torch.arange(5)), learner)
    ilora.after_experience(first, learner)
    with torch.no_grad():
        for p in learner._named.values():
            p.add_(0.1 * torch.randn(p.shape, generator=learner.rng))
    return made, ilora


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_pull_is_that_of_the_formula(variant: str) -> None:
    on = toys.stream()
    made, ilora = prepared(on, variant)
    learner = made.learner
    batch = ilora.mix(on.experiences[1].train.batch(torch.arange(10)), learner)
    assert len(batch) == 20
    assert batch.y[10:].max() < 2, "the past alone is remembered"
    outputs = learner.forward(batch)
    plain = learner.loss(outputs, batch)
    total = ilora.adjust_loss(plain, batch=batch, outputs=outputs, learner=learner)
    fast = learner.model.backbone(batch.x[10:])
    slow = ilora._slow._module.backbone(batch.x[10:])
    away = slow - fast if variant == "paper" else (slow - fast).clamp(min=0)
    assert float((total - plain).detach()) == pytest.approx(float(3 * away.detach().square().mean()), rel=1e-4)
    assert away.abs().max() > 1e-3


def test_of_a_text_only_the_answers_places_count() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    made, ilora = prepared(on, "paper", model=LM)
    learner = made.learner
    batch = ilora.mix(on.experiences[1].train.batch(torch.arange(6)), learner)
    outputs = learner.forward(batch)
    plain = learner.loss(outputs, batch)
    total = ilora.adjust_loss(plain, batch=batch, outputs=outputs, learner=learner)
    expected = []
    assert on.answers is not None
    for x, y in zip(batch.x[6:], batch.y[6:], strict=True):  # one text after another, with no padding between
        said = int((on.answers[y] != PAD).sum())
        fast, slow = (m.backbone(x[None])[0, :said] for m in (learner.model, ilora._slow._module))
        expected.append((fast - slow).square().mean())
    assert float((total - plain).detach()) == pytest.approx(float(3 * torch.stack(expected).detach().mean()), rel=1e-4)
    total.backward()
    assert any(p.grad is not None and p.grad.any() for p in learner._named.values()), "the fast weights feel it"


def test_either_may_answer() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    for serve in ("slow", "fast"):
        made, (ilora, _) = trainer(on, {"serve": serve, "decay": 0.9}, model=LM, training=ADAM)
        made.run()
        batch = on.experiences[0].test.batch(torch.arange(8))
        with torch.no_grad():
            same = torch.equal(ilora.predict(batch, made.learner), made.learner.forward(batch))
        assert same == (serve == "fast")


def test_slow_weights_forget_less_than_none() -> None:
    """Of models so small one run hangs on a rounding; three seeds do not."""
    on = toys.stream(form="texts", scoring="first-token")
    held = {"slow": 0.0, "naive": 0.0}
    for seed in range(3):
        made, _ = trainer(on, {"serve": "slow", "decay": 0.9}, model=LM, training=ADAM, seed=seed)
        held["slow"] += sum(made.run().matrix[-1])
        naive = toys.trainer([{"name": "naive"}], on, model=LM, training=ADAM, seed=seed)
        held["naive"] += sum(naive.run().matrix[-1])
    assert held["slow"] > held["naive"] + 0.5, held


def test_checkpoints_hold_the_adapters_alone() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    made, (ilora, _) = trainer(on, {}, model=LM, training={"iterations": 2})
    made.run()
    slow = ilora.state_dict()["slow"]
    assert slow
    assert all("lora_" in name for name in slow)
    fresh = registry.create("strategies", {"name": "ilora", "memory": 60}, "strategy")
    fresh.load_state_dict(ilora.state_dict())
    batch = on.experiences[0].test.batch(torch.arange(8))
    assert torch.equal(fresh.predict(batch, made.learner), ilora.predict(batch, made.learner))


@pytest.mark.parametrize("model", [LM, {"name": "causal-lm", "weights": "tiny", "adapt": "full"}])
def test_beside_layers_that_are_frozen_later_a_killed_run_goes_on_to_the_same(
    model: dict[str, Any], tmp_path: Path
) -> None:
    """The slow weights of a layer that is frozen meanwhile are its own: no checkpoint may take them from the fast ones."""
    on, ilora = toys.stream(form="texts"), {"name": "ilora", "memory": 60}
    links = [ilora, {"name": "freeze", "layers": 1, "embeddings": True}]
    sections = {"model": model, "training": {"optimizer": "adamw", "lr": 0.01, "epochs": 2}}

    def made(name: str) -> Trainer:
        place = tmp_path / name
        return toys.trainer(links, on, checkpoints=place, checkpoint={"every_steps": 1}, **sections)

    whole = made("whole")
    whole.run()
    for at in (15, 20, 30):
        toys.stopped_at(at, toys.at_newest(made("cut")))
    last = toys.at_newest(made("cut"))
    last.run()
    assert last.record.matrix == whole.record.matrix
    assert not toys.differing(toys.weights_of(whole), toys.weights_of(last))
    assert checkpoint.equal(whole.strategy.state_dict(), last.strategy.state_dict())
    again = toys.at_newest(made("whole"))
    batch = on.experiences[0].test.batch(torch.arange(8))
    given = [t.strategy.links[0].predict(batch, t.learner) for t in (whole, again)]
    assert torch.equal(*given), "what is exported is what was scored"


def test_fast_and_slow_weights_answer_in_one_precision() -> None:
    """Equal weights give equal answers, so that the two scores of a run in bf16 can be compared."""
    on = toys.stream(form="texts", scoring="first-token")
    made, (ilora, _) = trainer(on, {}, model=LM, training={"iterations": 1}, engine={"precision": "bf16"})
    made.run()
    ilora._slow.take(made.learner)
    batch = on.experiences[0].test.batch(torch.arange(8))
    with torch.no_grad():
        fast, slow = made.learner.forward(batch).float(), ilora._slow.outputs(batch, made.learner)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("form", ["texts", "images"])
@pytest.mark.parametrize("serve", ["slow", "fast"])
def test_the_other_weights_are_scored_and_training_does_not_notice(serve: str, form: str) -> None:
    """Images pass batch normalisation, whose running statistics the slow weights borrow to be scored."""
    on = toys.stream(form=form, experiences=2, **({"scoring": "first-token"} if form == "texts" else {}))
    sections: dict[str, Any] = {"model": LM, "training": ADAM | {"epochs": 2}}
    if form == "images":
        sections = {"model": "slim-resnet18", "training": {"lr": 0.05, "iterations": 2}}
    with_both, (both, _) = trainer(on, {"serve": serve, "decay": 0.9}, **sections)
    record = with_both.run()
    without, (one, _) = trainer(on, {"serve": serve, "decay": 0.9, "score_both": False}, **sections)
    plain = without.run()
    assert record.matrix == plain.matrix
    assert record.losses == plain.losses
    assert not toys.differing(toys.weights_of(with_both), toys.weights_of(without))
    assert not toys.differing(both._slow.state_dict(), one._slow.state_dict()), "the slow weights stand where they did"
    assert torch.equal(with_both.learner.rng.get_state(), without.learner.rng.get_state())
    assert plain.measures == [{}, {}]

    other = "fast" if serve == "slow" else "slow"
    key = f"ilora/{other}_accuracy"
    assert list(record.measures[0]) == [key, f"{key}_exp_0"]
    assert list(record.measures[1]) == [key, f"{key}_exp_0", f"{key}_exp_1"], "what was met, and no more"
    both.serve = other
    both._looked = -1
    row, _ = with_both._score()
    assert [record.measures[1][f"{key}_exp_{j}"] for j in range(2)] == row, "as the run that lets them serve"
    assert record.measures[1][key] == sum(row) / 2


def test_scoring_in_between_changes_nothing() -> None:
    """The slow weights answer by the fast ones' running statistics, and train by their own."""
    on = toys.stream(form="images", experiences=2)
    done = []
    for every in (None, 1):
        sections: dict[str, Any] = {
            "model": "slim-resnet18",
            "training": {"lr": 0.05, "iterations": 3, "batch_size": 8},
        }
        made, (slow, _) = trainer(on, {"decay": 0.5, "strength": 10}, **sections, evaluation={"every_steps": every})
        done.append((made.run(), made, slow))
    (one, a, of_a), (two, b, of_b) = done
    assert one.matrix == two.matrix
    assert not toys.differing(toys.weights_of(a), toys.weights_of(b))
    assert not toys.differing(of_a._slow.state_dict(), of_b._slow.state_dict())


def test_only_its_own_rows_pull() -> None:
    """Another strategy's rehearsal stands before it."""
    on = toys.stream(experiences=2)
    own = {"name": "ilora", "memory": 20, "replay_batch_size": 4}
    made = toys.trainer([{"name": "replay", "memory": 20, "replay_batch_size": 7}, own], on, training=ADAM)
    slow = made.strategy.links[1]._slow
    seen: set[int] = set()
    real = slow.outputs_and_features

    def watched(batch: Batch, learner: Learner) -> Any:
        seen.add(len(batch))
        return real(batch, learner)

    slow.outputs_and_features = watched
    made.run()
    assert seen == {4}
