"""The loop: what it records, when it stops, and that its options mean what they say."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from cl_lab import checkpoint
from cl_lab.compat import use_freed_memory_again
from cl_lab.config import TrainingConfig
from cl_lab.errors import TrainingError
from cl_lab.records import Experience, TensorData
from cl_lab.trainer import Observer, Record, Silent, Trainer, learning_rate

NAIVE = [{"name": "naive"}]


def accuracy_by_hand(model: nn.Module, data: TensorData) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(data.x.float(), data.t).argmax(dim=1) == data.y).double().mean())


def test_record_is_what_the_model_scores() -> None:
    on = toys.stream()
    trainer = toys.trainer(NAIVE, on)
    untrained = [accuracy_by_hand(trainer.learner.model, e.test) for e in on.experiences]
    record = trainer.run()
    assert record.initial == untrained
    assert record.matrix[-1] == [accuracy_by_hand(trainer.learner.model, e.test) for e in on.experiences]
    assert record.steps == 3 * 3 * 6  # experiences, epochs, batches of 10 in 60 samples
    assert record.samples == 3 * 3 * 60
    assert record.train_seconds > 0
    assert record.trainable_parameters == sum(p.numel() for p in trainer.learner.model.parameters())


def test_one_step_is_gradient_descent() -> None:
    """A linear softmax model, one batch, plain SGD: the step is known in closed form."""
    on = toys.stream(experiences=1, train=20)
    trainer = toys.trainer(
        NAIVE, on, model={"name": "mlp", "hidden": []}, training={"epochs": 1, "batch_size": 20, "lr": 0.3}
    )
    before = {n: v.clone() for n, v in trainer.learner.weights().items()}
    data = on.experiences[0].train
    p = torch.softmax(data.x @ before["head.linear.weight"].T + before["head.linear.bias"], dim=1)
    towards = (p - nn.functional.one_hot(data.y, 2)) / len(data)
    trainer.run()
    after = trainer.learner.weights()
    torch.testing.assert_close(after["head.linear.weight"], before["head.linear.weight"] - 0.3 * towards.T @ data.x)
    torch.testing.assert_close(after["head.linear.bias"], before["head.linear.bias"] - 0.3 * towards.sum(dim=0))


def test_forgetting_of_a_linear_model_is_exact() -> None:
    """Two one-hot tasks that share an output: learning the second to the end undoes the first, and only it."""
    on = toys.stream(experiences=2, incremental="domain")
    first, second = on.experiences
    x = torch.zeros(40, toys.FEATURES)
    y = torch.arange(40) % 2
    x[torch.arange(40), y] = 1.0
    flipped = TensorData(x, 1 - y, torch.zeros(40, dtype=torch.int64))
    straight = TensorData(x, y, torch.zeros(40, dtype=torch.int64))
    for experience, data in ((first, straight), (second, flipped)):
        experience._makers = {"train": lambda data=data: data, "test": lambda data=data: data}
    trainer = toys.trainer(NAIVE, on, model={"name": "mlp", "hidden": []}, training={"epochs": 30, "lr": 1.0})
    record = trainer.run()
    assert record.matrix == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [0.5, 0.5, 0.5, 0.5]),
        ({"schedule": "linear"}, [0.5, 0.375, 0.25, 0.125]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ({"schedule": "step", "milestones": [0.5], "decay": 0.1}, [0.5, 0.5, 0.05, 0.05]),
        ({"schedule": "constant", "warmup_steps": 2}, [0.25, 0.5, 0.5, 0.5]),
        ({"schedule": "step", "warmup_steps": 1, "milestones": [0.5]}, [0.5, 0.5, 0.05, 0.05]),
        ({"schedule": "step", "warmup_steps": 2, "milestones": [0.25, 0.75]}, [0.25, 0.5, 0.05, 0.005]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.25, 0.5, 0.5, 0.25]),
    ],
)
def test_learning_rate(settings: dict[str, object], expected: list[float]) -> None:
    t = TrainingConfig.model_validate({"lr": 0.5, **settings})
    assert [learning_rate(t, step, 4) for step in range(4)] == pytest.approx(expected)


def test_milestones_are_fractions_of_the_whole_experience() -> None:
    t = TrainingConfig(lr=0.5, schedule="step", warmup_steps=100, milestones=[0.6], decay=0.1)
    rates = [learning_rate(t, step, 200) for step in range(200)]
    assert rates[99:] == pytest.approx([0.5] * 21 + [0.05] * 80), "warmed up by step 99, decayed from step 120 on"


def test_pieces_of_a_batch_add_up() -> None:
    whole = toys.trainer([{"name": "replay", "memory": 30}], toys.stream())
    whole.run()
    pieces = toys.trainer([{"name": "replay", "memory": 30}], toys.stream(), training={"accumulate": 3})
    pieces.run()
    for name, value in toys.weights_of(whole).items():
        torch.testing.assert_close(toys.weights_of(pieces)[name], value, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_step() -> None:
    on = toys.stream(experiences=1)
    trainer = toys.trainer(NAIVE, on, training={"epochs": 1, "batch_size": 60, "lr": 1.0, "clip_norm": 0.01})
    before = trainer.learner.weights()
    trainer.run()
    moved = sum(float((v - before[n]).square().sum()) for n, v in trainer.learner.weights().items()) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_optimizer_state_fresh_or_kept() -> None:
    settings = {"optimizer": "adam", "lr": 0.01}
    fresh = toys.trainer(NAIVE, toys.stream(), training={**settings, "optimizer_state": "fresh"})
    kept = toys.trainer(NAIVE, toys.stream(), training={**settings, "optimizer_state": "kept"})
    a, b = fresh.run(), kept.run()
    assert a.matrix[0] == b.matrix[0], "the first experience is the same"
    assert toys.differing(toys.weights_of(fresh), toys.weights_of(kept))
    steps = kept.learner.state_dict()["optimizer"]["head.linear.weight"]["step"]
    assert int(steps) == 3 * 18
    steps = fresh.learner.state_dict()["optimizer"]["head.linear.weight"]["step"]
    assert int(steps) == 18


def test_early_stopping_takes_the_best_epoch_and_never_the_test_set() -> None:
    on = toys.stream(experiences=2)

    training = {"epochs": 50, "validation": 0.25, "patience": 2, "lr": 0.5}
    trainer = toys.trainer(NAIVE, on, training=training)
    scored: list[int] = []
    accuracy = trainer.learner.accuracy

    def watch(data: TensorData, size: int, predict: object = None) -> float:
        assert predict is None, "no strategy here answers in place of the model"
        scored.append(len(data))
        return accuracy(data, size)

    trainer.learner.accuracy = watch
    record = trainer.run()
    assert record.steps < 2 * 50 * 5, "patience ended the experiences early"
    validated = [n for n in scored if n == 15]  # a quarter of 60
    assert len(validated) == record.steps // 5, "one look per epoch"
    assert len([n for n in scored if n == 40]) == 3 * 2, "test sets are scored once per row"
    assert record.matrix[0][0] > 0.9


@pytest.mark.parametrize(
    "link", [{"name": "si"}, {"name": "ilora", "memory": 20, "decay": 0.5}], ids=lambda k: k["name"]
)
def test_what_a_strategy_follows_goes_back_with_the_best_weights(link: dict[str, Any]) -> None:
    """An experience that patience ended is one that ended with its best epoch: slow weights, importance along the path."""
    on = toys.stream(experiences=1)
    settings = {"validation": 0.25, "lr": 0.5, "batch_size": 8}

    def state_of(done: Trainer) -> dict[str, Tensor]:
        return checkpoint.flatten(done.strategy.state_dict())[0]

    patient = toys.trainer([link], on, training=settings | {"epochs": 50, "patience": 4})
    taken = patient.run().losses[-1]["epoch"] + 1
    assert taken < 50
    for epochs in range(1, taken):
        plain = toys.trainer([link], on, training=settings | {"epochs": epochs})
        plain.run()
        if not toys.differing(toys.weights_of(patient), toys.weights_of(plain)):
            break
    else:
        pytest.fail("the weights are those of no epoch before the last")
    assert not toys.differing(state_of(patient), state_of(plain))


def test_a_sample_alone_before_batch_normalisation_is_one_line() -> None:
    on = toys.stream(form="images", train=9)
    model = {"name": "efficientnet-lite0", "weights": "random"}
    with pytest.raises(
        TrainingError, match=r"^training\.batch_size = 4: of the 9 samples of Experience.* for example 5$"
    ):
        toys.trainer(NAIVE, on, model=model, training={"batch_size": 4}).run()


@pytest.mark.parametrize("epochs", [100, 2000])  # a loss is logged each 10 steps, and each 200: more than are taken
def test_an_early_stop_logs_its_last_step(epochs: int, tmp_path: Path) -> None:
    on, training = toys.stream(), {"epochs": epochs, "validation": 0.25, "patience": 2, "lr": 0.5}
    told: list[tuple[int, int, float | None]] = []

    class Heard(Silent):
        def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
            told.append((experience.index, step, loss))

    whole = toys.trainer(NAIVE, on, training=training, observer=Heard())
    record = whole.run()
    taken = [max(step for index, step, _ in told if index == i) for i in range(3)]
    assert any(n % (epochs // 10) for n in taken), "patience ends an experience between two log points"
    last = [max(p["step"] for p in record.losses if p["experience"] == i) for i in range(3)]
    assert last == [*itertools.accumulate(taken)]
    assert [p["loss"] for p in record.losses] == [loss for _, _, loss in told if loss is not None]

    def made() -> Trainer:
        return toys.at_newest(toys.trainer(NAIVE, on, training=training, checkpoints=tmp_path))

    for at in (7, record.steps - 3):
        toys.stopped_at(at, made())
    resumed = made()
    resumed.run()
    toys.assert_same(whole, resumed)


def test_what_is_left_to_learn_of_an_ordered_experience_keeps_its_order() -> None:
    on = toys.stream(experiences=1)
    on.experiences[0].ordered = True
    trainer = toys.trainer(NAIVE, on, training={"epochs": 2, "validation": 0.3})
    data = on.experiences[0].train
    left, held = trainer._split(data, on.experiences[0], True)
    place = {tuple(row): i for i, row in enumerate(data.x.tolist())}
    rows = [place[tuple(row)] for row in left.x.tolist()]
    assert rows == sorted(rows)
    assert held is not None
    assert sorted(rows + [place[tuple(row)] for row in held.x.tolist()]) == [*range(60)]


def test_ranks_agree_to_stop_on_short_experiences() -> None:
    """Several look at each other's signals at every tenth step of the run, however few an experience has."""
    trainer = toys.trainer(NAIVE, toys.stream(), training={"epochs": 1, "batch_size": 20}, stop=lambda: "SIGTERM")
    trainer.learner._world = 2
    trainer.learner.reduce = lambda value: value
    asked = [trainer._asked_to_stop()]
    trainer.record.steps, trainer._position.step = 9, 3
    asked.append(trainer._asked_to_stop())
    trainer.record.steps, trainer._position.step = 10, 1
    asked.append(trainer._asked_to_stop())
    assert asked == ["SIGTERM", None, "SIGTERM"]


def test_anytime_evaluations_are_recorded() -> None:
    trainer = toys.trainer(NAIVE, toys.stream(), evaluation={"every_steps": 4})
    record = trainer.run()
    assert [(a["experience"], len(a["accuracies"])) for a in record.anytime] == [
        (i, i + 1) for i in range(3) for _ in range(18 // 4)
    ]
    plain = toys.trainer(NAIVE, toys.stream()).run()
    assert plain.matrix == record.matrix, "looking changes nothing"


def test_loss_that_is_not_finite_stops_the_run() -> None:
    trainer = toys.trainer(NAIVE, toys.stream(), training={"lr": 1e30})
    with pytest.raises(TrainingError, match=r"the loss became .* lower training\.lr") as e:
        trainer.run()
    assert "\n" not in str(e.value)
    assert trainer.record.initial, "what was measured stays"


def test_divergence_in_the_last_step_is_noticed() -> None:
    training = {"epochs": 1, "batch_size": 100, "lr": 3e38}
    with pytest.raises(TrainingError, match=r"outputs are not finite on \d+ of 40 samples"):
        toys.trainer(NAIVE, toys.stream(experiences=1), training=training).run()


def test_bf16_learns() -> None:
    record = toys.trainer(NAIVE, toys.stream(incremental="task"), engine={"precision": "bf16"}).run()
    assert [record.matrix[i][i] for i in range(3)] == [1.0] * 3
    weights = toys.trainer([{"name": "ewc", "strength": 1.0}], toys.stream(), engine={"precision": "bf16"})
    weights.run()
    assert all(v.dtype == torch.float32 for v in toys.weights_of(weights).values() if v.is_floating_point())


def test_joint_gets_the_budget_of_all_experiences() -> None:
    record = toys.trainer([{"name": "joint"}], toys.stream(), training={"iterations": 7}).run()
    assert record.steps == 21
    assert record.matrix[0] == record.matrix[1] == record.matrix[2]
    grown = toys.trainer([{"name": "joint"}], toys.stream(), model={**toys.MLP, "head": "growing"}).run()
    assert min(grown.matrix[0]) > 0.9, "a growing head meets every class at once"


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot reset a process's peak memory"
)
def test_peak_memory_is_the_runs_own() -> None:
    class Hungry(Silent):
        def scored(self, record: Record) -> None:
            torch.ones(400 * 2**20, dtype=torch.uint8)

    def cost(observer: Observer | None = None) -> Record:
        return toys.trainer(NAIVE, toys.stream(experiences=1), observer=observer).run()

    use_freed_memory_again()  # as every run does
    cost()
    large = torch.ones(400 * 2**20, dtype=torch.uint8)
    during = cost()
    del large
    after, needs = cost(), cost(Hungry())
    assert after.peak_memory_bytes < during.peak_memory_bytes - 200 * 2**20, "another run's memory is not charged"
    assert after.own_memory_bytes is not None
    assert during.own_memory_bytes == pytest.approx(after.own_memory_bytes, abs=50 * 2**20), (
        "nor what others still hold"
    )
    assert needs.cost()["own_memory_bytes"] > 350 * 2**20


def test_memory_of_its_own_is_left_out_where_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr("cl_lab.trainer.give_freed_memory_back", lambda: None)
    record = toys.trainer(NAIVE, toys.stream(experiences=1)).run()
    assert "own_memory_bytes" not in record.cost()
    assert record.cost()["peak_memory_bytes"] > 0


def test_a_resumed_run_keeps_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only steps, evaluations and saves move: each is counted where it belongs, once."""
    now = 0.0

    class Clock(Silent):
        def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
            nonlocal now
            now += 1

    def taking(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **how: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*args, **how)

        return slow

    monkeypatch.setattr("cl_lab.trainer.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(checkpoint, "save", taking(2**10, checkpoint.save))
    on = toys.stream()
    sections = {"evaluation": {"every_steps": 4}, "checkpoint": {"every_steps": 5}}

    def made(folder: str) -> Trainer:
        trainer = toys.trainer(NAIVE, on, checkpoints=tmp_path / folder, observer=Clock(), **sections)
        trainer.learner.score = taking(2**20, trainer.learner.score)
        return trainer

    whole = made("whole").run()
    assert whole.train_seconds == whole.steps == 54
    assert whole.eval_seconds == 2**20 * (4 * 3 + 4 * (1 + 2 + 3)), "rows, and four times within each experience"

    for at in (7, 11, 30, 53):
        toys.stopped_at(at, toys.at_newest(made("stopped")))
    stopped = toys.at_newest(made("stopped")).run()
    assert (stopped.train_seconds, stopped.eval_seconds) == (whole.train_seconds, whole.eval_seconds)

    def killed() -> None:
        raise KeyboardInterrupt

    dead = made("killed")
    dead.stop = lambda: killed() if dead.record.steps == 33 else None
    with pytest.raises(KeyboardInterrupt):
        dead.run()
    resumed = toys.at_newest(made("killed"))
    assert resumed.record.train_seconds == resumed.record.steps == 28, "the checkpoint ten steps into an experience"
    again = resumed.run()
    assert (again.train_seconds, again.eval_seconds) == (whole.train_seconds, whole.eval_seconds)


def test_cost_of_nothing_is_zero() -> None:
    assert Record().cost()["samples_per_second"] == 0.0
