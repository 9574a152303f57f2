"""The training loop: a stream meets a model, a strategy tries to keep the model from forgetting, the damage is measured.

What the loop promises: the test stream chooses nothing; the same configuration and seed give the same score matrix; and
a run that is killed at any moment and resumed ends in that same matrix, bit for bit (one process).
"""

from __future__ import annotations

import copy
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cl_lab import checkpoint, seeding
from cl_lab.augmentation import crop_flip, transformed_batches
from cl_lab.chain import Chain
from cl_lab.compat import give_freed_memory_back
from cl_lab.config import RunConfig, TrainingConfig
from cl_lab.drift import make_probes
from cl_lab.errors import ConfigError, Interrupted, TrainingError
from cl_lab.learner import EngineLearner, Score, warm_up
from cl_lab.protocols import state_bytes
from cl_lab.records import Batch, Experience, State, Stream, TensorData

log = logging.getLogger("cl_lab")

_LOSS_POINTS = 50  # loss values logged per experience, at most
_GPU_CHECK_EVERY = 50  # steps between looks at the loss where looking stops the device


class Observer(Protocol):
    """What the trainer tells the outside while it works."""

    def started(self, total_steps: int, done_steps: int) -> None:
        """Training is about to begin or go on."""

    def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
        """One optimiser step is done; ``loss`` is given at log points."""

    def scored(self, record: Record) -> None:
        """A row of the score matrix is known (or ``initial``)."""


class Silent:
    """An observer that keeps quiet."""

    def started(self, total_steps: int, done_steps: int) -> None:
        """Nothing."""

    def stepped(self, experience: Experience, step: int, loss: float | None) -> None:
        """Nothing."""

    def scored(self, record: Record) -> None:
        """Nothing."""


@dataclass
class Record:
    """Everything measured so far. ``matrix[i][j]`` is the score on experience j's test set after learning i."""

    score: str = "accuracy"
    """What a score is (:attr:`cl_lab.records.Stream.score`), also of those that are kept as ``accuracies``."""
    initial: list[float] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    initial_valid: list[float] = field(default_factory=list)
    valid: list[list[float]] = field(default_factory=list)
    """Of texts that are answered freely, the shares that were an answer of their task, as ``matrix``; empty of others."""
    anytime: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, float]] = field(default_factory=list)
    """Numbers of the strategy's own after each experience, by ``strategy/name``; with those of its other answers."""
    drift: list[dict[str, Any]] = field(default_factory=list)
    """What :meth:`cl_lab.drift.Probes.results` says, and after how many experiences ``learnt``: 0, then each or all."""
    asides: list[dict[str, Any]] = field(default_factory=list)
    """Of a stream's asides, after how many experiences ``learnt``, 0 and all, and the ``scores`` by their names."""
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    samples: int = 0
    steps: int = 0
    peak_memory_bytes: int = 0
    own_memory_bytes: int | None = None
    """Peak above what was held just before the first step; ``None`` where the system does not let it be measured."""
    strategy_state_bytes: int = 0
    trainable_parameters: int | None = None
    """``None`` where nothing is trained by steps (:attr:`cl_lab.protocols.Strategy.trained_by_steps`)."""

    def cost(self) -> dict[str, float]:
        """What the run cost, in seconds, samples per second, bytes and scalars; without what is not known."""
        whole: dict[str, float | None] = {
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "samples_per_second": self.samples / self.train_seconds if self.train_seconds else 0.0,
            "peak_memory_bytes": self.peak_memory_bytes,
            "own_memory_bytes": self.own_memory_bytes,
            "strategy_state_bytes": self.strategy_state_bytes,
            "trainable_parameters": self.trainable_parameters,
        }
        return {name: value for name, value in whole.items() if value is not None}


@dataclass
class _Position:
    """Where the run stands; with the rest of the checkpoint it says exactly what comes next."""

    experience: int = 0
    step: int = 0  # inside the experience
    begun: bool = False  # before_experience has been called
    best: float | None = None  # early stopping
    stale: int = 0  # epochs without a better validation score
    loss_sum: Tensor | float = 0.0  # since the last log point; a tensor while training, so that no step waits for it
    loss_steps: int = 0


class Trainer:
    """Runs one stream through one learner and strategy.

    ``stop`` is asked at every step and returns the name of a signal that wants the run to end. ``checkpoints`` is the
    folder for checkpoints, or ``None`` for none; ``weights`` that for the weights after each experience, which
    ``checkpoint.experiences`` asks for: ``<n>.safetensors`` after n experiences, 0 before any training, and
    ``<n>+<s>.safetensors`` s steps later where ``checkpoint.weights_at`` asks for that.
    """

    def __init__(
        self,
        stream: Stream,
        learner: EngineLearner,
        strategy: Chain,
        config: RunConfig,
        seed: int,
        *,
        observer: Observer | None = None,
        checkpoints: Path | None = None,
        weights: Path | None = None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.stream, self.learner, self.strategy, self.config, self.seed = stream, learner, strategy, config, seed
        self.observer: Observer = observer or Silent()
        self.checkpoints = checkpoints if config.checkpoint.enabled else None
        self.weights = weights if config.checkpoint.experiences else None
        self.stop = stop
        self.record = Record(stream.score)
        self._position = _Position()
        self._best: State = {}  # of the best epoch where patience watches
        self._batch_mixes = strategy.overrides("mix")
        self._loss_adjusts = strategy.overrides("adjust_loss")
        self._gradient_adjusts = strategy.overrides("adjust_gradients")
        self._after_steps = strategy.overrides("after_step")
        self._observes = strategy.overrides("observe_outputs")
        self._sets_lr = strategy.overrides("learning_rate")
        self._predict = (lambda batch: strategy.predict(batch, learner)) if strategy.overrides("predict") else None
        self._encoded: dict[int, tuple[Hashable, TensorData]] = {}  # test sets as the strategy wants them, by id
        asked = config.evaluation
        self._probes = make_probes(stream, asked.probe_text) if asked.drift else None
        learner.keep_features = strategy.uses_features
        if config.engine.zero == 3 and strategy.whole_parameters:
            raise ConfigError(
                f"engine.zero = 3: strategy '{strategy.whole_parameters[0]}' calls parts of the model on its own, which "
                "ZeRO 3 keeps in shards; use engine.zero=2 or less"
            )
        self._check_every = 1 if learner.device.type == "cpu" else _GPU_CHECK_EVERY

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Record:
        """Learn the whole stream from where :attr:`record` stands; returns the record.

        Raises :class:`TrainingError` for a loss that is not finite, :class:`Interrupted` after a signal; either way the
        record and the last checkpoint hold everything so far.
        """
        warm_up(self.learner.device)
        held = _reset_peak_memory(self.learner.device)
        done = self.record.steps
        self.observer.started(done + self._steps_left(), done)
        if not self.record.initial:
            self._keep_weights(0)
            self.record.initial, self.record.initial_valid = self._score()
            self._probe()
            self._ask_aside()
            self.observer.scored(self.record)
        for experience in self.stream.experiences[self._position.experience :]:
            with self._timed("train_seconds"):
                self.learn(experience)
            row, valid = self._score()
            self.record.matrix.append(row)
            if valid:
                self.record.valid.append(valid)
            last = len(self.record.matrix) == len(self.stream)
            if last or self.config.evaluation.drift != "ends":
                self._probe()
            if last:
                self._ask_aside()
            if self.strategy.trained_by_steps:
                self.record.trainable_parameters = self.learner.trainable_parameters
            self.record.measures.append(self.strategy.measures() | self._other_scores(experience.index + 1))
            self.record.strategy_state_bytes = state_bytes(self.strategy.state_dict())
            peak = _peak_memory(self.learner.device)
            self.record.peak_memory_bytes = max(self.record.peak_memory_bytes, peak)
            if held is not None:
                self.record.own_memory_bytes = max(self.record.own_memory_bytes or 0, peak - held)
            self._position = _Position(experience=experience.index + 1)
            if not self.strategy.reference:
                experience.release()
            self._keep_weights(experience.index + 1)  # before the checkpoint, which says that they are there
            self._save()
            self.observer.scored(self.record)
        return self.record

    def learn(self, experience: Experience) -> None:
        """Train on one experience, from where the run stands in it, with all of the strategy's hooks; nothing is scored."""
        strategy, learner, told = self.strategy, self.learner, self.strategy.told
        t = self.config.training.at(experience.index)
        if not self._position.begun:
            if told:
                learner.observe(experience.classes)
            # Without told boundaries a fresh optimiser would betray them; a base session ends by the user's own word.
            learner.configure(t)
            other_settings = self.config.training.first is not None and experience.index == 1
            learner.begin(fresh=(told and t.optimizer_state == "fresh") or other_settings)
            if told:
                strategy.before_experience(experience, learner)
            self._position.begun = True
        data = strategy.training_set(experience, learner) if told else experience.train
        if data is not None:
            if told:
                learner.observe_labels(data.y)  # joint training meets every class in the first experience
            self._iterate(experience, data, t)
        if told:
            strategy.after_experience(experience, learner)

    def _iterate(self, experience: Experience, data: TensorData, t: TrainingConfig) -> None:
        position, learner = self._position, self.learner
        # Only an experience's own rows have an order of its own: others are shuffled, and brought among them are, too.
        ordered = experience.ordered and not self.strategy.gathers
        data, held = self._split(data, experience, ordered)
        per_epoch = math.ceil(len(data) / t.batch_size)
        total = self._steps_of(experience, len(data), t)
        log_every = math.ceil(total / _LOSS_POINTS)
        moving_lr = t.schedule != "constant" or t.warmup_steps > 0 or self._sets_lr
        learner.train_mode()
        # Of the steps since the last log point; a resumed run goes on with what had been added up.
        running, counted = torch.full((), float(position.loss_sum), device=learner.device), position.loss_steps
        plan = self._plan(len(data), experience, per_epoch, t.batch_size, ordered)
        for step, batch in self._batches(data, experience, range(position.step, total), plan, t):
            if moving_lr:
                learner.set_lr(learning_rate(t, step, total))
            try:
                running += self._train_step(batch, experience, step, t)
            except ValueError as error:
                _refuse_lone_sample(error, t.batch_size, len(data), experience)
                raise
            counted += 1
            position.step = step + 1
            position.loss_sum, position.loss_steps = running, counted
            self.record.steps += 1
            self.record.samples += batch.current
            if position.step % self._check_every == 0 or position.step in (per_epoch, total):
                self._check(running, experience, step, per_epoch)
            stops = t.patience is not None and position.step % per_epoch == 0 and self._out_of_patience(held)
            loss = None
            # An experience's last step is always logged: its point says how many steps it took.
            if position.step % log_every == 0 or position.step == total or stops:
                loss = self._mean_over_ranks(running) / counted
                loss += self.strategy.penalty(learner)
                self.record.losses.append(
                    {
                        "step": self.record.steps,
                        "experience": experience.index,
                        "epoch": step // per_epoch,
                        "loss": loss,
                    }
                )
                running, counted = torch.zeros((), device=learner.device), 0
                position.loss_sum, position.loss_steps = running, counted
            self.observer.stepped(experience, position.step, loss)
            if stops:
                break
            self._between_steps(experience, position.step == total)
        if self._best:
            weights, followed = self._best["weights"], self._best["strategy"]
            assert isinstance(weights, dict)
            assert isinstance(followed, dict)
            learner.set_weights(weights)
            self.strategy.load_state_dict(followed)
            self._best = {}

    def _train_step(self, batch: Batch, experience: Experience, step: int, t: TrainingConfig) -> Tensor:
        """One optimiser step on a global batch; returns this rank's detached loss."""
        learner, strategy = self.learner, self.strategy
        if not self.stream.boundaries:
            learner.observe_labels(batch.y)
        if self._batch_mixes:
            mixed = strategy.mix(batch, learner)
            if mixed is None:
                return torch.zeros((), device=learner.device)
            batch = mixed
        if self._sets_lr and (lr := strategy.learning_rate(batch, learner)) is not None:
            learner.set_lr(lr)
        if t.augmentation == "crop-flip" and batch.raw:
            batch.x = crop_flip(batch.x, self.seed, experience.index, step)
        pieces = learner.pieces(learner.rows(batch))
        total: Tensor | None = None
        seen: list[Tensor] = []  # outputs, where the strategy wants them
        for i, piece in enumerate(pieces):
            piece = piece.to(learner.device)
            outputs = learner.forward(piece)
            if self._observes:
                seen.append(outputs.detach())
            loss = learner.loss(outputs, piece)
            if self._loss_adjusts:
                loss = strategy.adjust_loss(loss, batch=piece, outputs=outputs, learner=learner)
            learner.backward(loss, last=i + 1 == len(pieces))
            total = loss.detach() if total is None else total + loss.detach()
        if self._observes:
            strategy.observe_outputs(batch, learner.gather(torch.cat(seen), len(batch)), learner)
        if self._gradient_adjusts:
            strategy.adjust_gradients(learner)
        learner.step()
        if self._after_steps:
            strategy.after_step(learner)
        assert total is not None
        return total

    # --- what surrounds a step ------------------------------------------------------------------------------------

    def _plan(
        self, rows: int, experience: Experience, per_epoch: int, size: int, ordered: bool
    ) -> Callable[[int], tuple[Tensor, int]]:
        """What gives the rows and the epoch of a step."""
        order, held = torch.empty(0, dtype=torch.int64), -1

        def plan(step: int) -> tuple[Tensor, int]:
            nonlocal order, held
            epoch, place = divmod(step, per_epoch)
            if epoch != held:
                if ordered:
                    order = torch.arange(rows)
                else:
                    order = seeding.permutation(rows, self.seed, "order", experience.index, epoch)
                held = epoch
            return order[place * size : (place + 1) * size], epoch

        return plan

    def _batches(
        self,
        data: TensorData,
        experience: Experience,
        steps: range,
        plan: Callable[[int], tuple[Tensor, int]],
        t: TrainingConfig,
    ) -> Iterator[tuple[int, Batch]]:
        if t.augmentation not in ("none", "crop-flip") and data.raw:  # a strategy's codes are no samples to augment
            seed = seeding.derive(self.seed, "augment", experience.index)
            batches = transformed_batches(data, t.augmentation, plan, steps, seed=seed, workers=t.workers)
            yield from zip(steps, batches, strict=True)
            return
        for step in steps:
            yield step, data.batch(*plan(step))

    def _split(self, data: TensorData, experience: Experience, ordered: bool) -> tuple[TensorData, TensorData | None]:
        share = self.config.training.validation
        if share == 0:
            return data, None
        order = seeding.permutation(len(data), self.seed, "validation", experience.index)
        n = max(1, round(share * len(data)))
        if n >= len(data):
            raise TrainingError(
                f"training.validation = {share}: leaves no sample to train on of the {len(data)} in {experience!r}"
            )
        learnt = order[n:].sort().values if ordered else order[n:]
        return data.take(learnt), data.take(order[:n])

    def _out_of_patience(self, held: TensorData | None) -> bool:
        assert held is not None
        assert self.config.training.patience is not None
        score = self.learner.score(held, self.config.evaluation.batch_size, self._predict).value
        self.learner.train_mode()
        if self._position.best is None or score > self._position.best:
            self._position.best, self._position.stale = score, 0
            # What a strategy follows step by step (a slow copy, a path's importance) goes back with the weights.
            followed = copy.deepcopy(self.strategy.state_dict())
            self._best = {"weights": dict(self.learner.weights()), "strategy": followed}
        else:
            self._position.stale += 1
        return self._position.stale >= self.config.training.patience

    def _between_steps(self, experience: Experience, ends: bool) -> None:
        """Anytime evaluation, checkpoints and signals; ``ends`` is the last step, after which a row is scored anyway."""
        every = self.config.evaluation.every_steps
        if every is not None and self._position.step % every == 0:
            accuracies, _ = self._score(experience.index + 1)
            self.record.anytime.append(
                {
                    "step": self.record.steps,
                    "samples": self.record.samples,
                    "experience": experience.index,
                    "accuracies": accuracies,
                }
            )
            self.learner.train_mode()
        if self._position.step in self.config.checkpoint.weights_at and not ends:
            with self._timed(None):
                self._keep_weights(f"{experience.index}+{self._position.step}")
        signal_name = self._asked_to_stop()
        if signal_name is not None:
            path = self._save()
            raise Interrupted(signal_name, str(path or "memory only (checkpoint.enabled=false)"))
        every = self.config.checkpoint.every_steps
        if every is not None and self._position.step % every == 0 and not ends:
            self._save()

    def _asked_to_stop(self) -> str | None:
        name = self.stop()
        if self.learner.world == 1:
            return name
        # Ranks must agree on the step at which they stop, or the others wait for ever.
        if self.record.steps % 10:
            return None
        asked = int(self.learner.reduce(torch.tensor(int(name is not None), device=self.learner.device)))
        return (name or "a signal to another rank") if asked else None

    def _check(self, running: Tensor, experience: Experience, step: int, per_epoch: int) -> None:
        if math.isfinite(value := float(running)):
            return
        t = self.config.training
        raise TrainingError(
            f"the loss became {value} in experience {experience.index} ('{experience.name}'), epoch {step // per_epoch}, "
            f"step {step} with training.lr={t.lr}; lower training.lr (or the strategy's strength), or set training.clip_norm"
        )

    def _score(
        self, first: int | None = None, predict: Callable[[Batch], Tensor] | None = None
    ) -> tuple[list[float], list[float]]:
        """Score on the test set of every experience (or the ``first`` so many), and, of free answers, the valid shares.

        ``predict`` answers in place of the strategy.
        """
        with self._timed("eval_seconds"):
            size = self.config.evaluation.batch_size
            scores: dict[int, Score] = {}  # experiences may share a test set
            for e in self.stream.experiences[:first]:
                if id(e.test) not in scores:
                    scores[id(e.test)] = self.learner.score(self._encode(e.test), size, predict or self._predict)
            row = [scores[id(e.test)] for e in self.stream.experiences[:first]]
            return [s.value for s in row], [s.valid for s in row if s.valid is not None]

    def _other_scores(self, seen: int) -> dict[str, float]:
        """What the strategy's other answers score on the ``seen`` experiences met so far: each, and their mean."""
        found = {}
        for name, answer in self.strategy.other_answers(self.learner).items():
            key = f"{name}_{self.stream.score.replace(' ', '_')}"
            row, _ = self._score(seen, answer)
            found[key] = sum(row) / len(row)
            found |= {f"{key}_exp_{j}": score for j, score in enumerate(row)}
        return found

    def _probe(self) -> None:
        """Measure drift where it is asked for; of the model as it answers, in evaluation mode, nothing drawn."""
        if self._probes is None:
            return
        with self._timed("eval_seconds"):
            data, size = self._encode(self._probes.data), self.config.evaluation.batch_size
            data = self._probes.of_newest(data, len(self.record.matrix))
            found = self.learner.log_likelihoods(data, self._probes.said, size, self._predict)
            self.record.drift.append({"learnt": len(self.record.matrix), **self._probes.results(found)})

    def _ask_aside(self) -> None:
        """Score the stream's asides, where it has any."""
        if not self.stream.asides:
            return
        with self._timed("eval_seconds"):
            found = {}
            for name, aside in self.stream.asides.items():
                data, size = self._encode(aside.questions), self.config.evaluation.batch_size
                found[name] = self.learner.score(data, size, self._predict, aside.stream).value
            self.record.asides.append({"learnt": len(self.record.matrix), "scores": found})

    def _encode(self, data: TensorData) -> TensorData:
        """A test set as the strategy wants it: encoded once for each encoding."""
        key = self.strategy.encoding()
        if key is None:
            return data
        held = self._encoded.get(id(data))
        if held is None or held[0] != key:
            held = self._encoded[id(data)] = (key, self.strategy.encode(data, self.learner))
        return held[1]

    @contextmanager
    def _timed(self, name: str | None) -> Iterator[None]:
        """Count the block's time under ``name``, not under that of the block around it; ``None`` counts it nowhere.

        The time of the block around it so far is in the record when this one begins.
        """
        self._charge()
        outer, self._timing = self._timing, name
        try:
            yield
        finally:
            self._charge()
            self._timing = outer

    def _charge(self) -> None:
        """Add the time since the last call to what is being timed."""
        now = time.perf_counter()
        if self._timing is not None:
            setattr(self.record, self._timing, getattr(self.record, self._timing) + now - self._charged)
        self._charged = now

    _timing: str | None = None
    _charged = 0.0

    # --- survival -----------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The whole run: learner, strategy, every generator, position and record."""
        return {
            "learner": self.learner.state_dict(),
            "strategy": self.strategy.state_dict(),
            "rng": seeding.global_state(),
            "position": {**vars(self._position), "loss_sum": self._mean_over_ranks(self._position.loss_sum)},
            "record": dict(vars(self.record)),
            "best": dict(self._best),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what :meth:`state_dict` gave."""
        learner, strategy, rng, position, record, best = (
            state[k] for k in ("learner", "strategy", "rng", "position", "record", "best")
        )
        for part in (learner, strategy, rng, position, record, best):
            assert isinstance(part, dict)
        self._position = _Position(**position)  # type: ignore[arg-type]
        # The optimiser saved is that of the experience in progress, or of the last one where the next has not begun.
        of = self._position.experience - (not self._position.begun)
        self.learner.configure(self.config.training.at(max(of, 0)))
        self.learner.load_state_dict(learner)  # type: ignore[arg-type]
        self.strategy.load_state_dict(strategy)  # type: ignore[arg-type]
        self.record = Record(**record)  # type: ignore[arg-type]
        self._best = best  # type: ignore[assignment]
        if self.learner.rank == 0:
            seeding.restore_global_state(rng)  # type: ignore[arg-type]
        else:  # other ranks' dropout masks are not saved; give each its own
            seeding.seed_everything(seeding.derive(self.seed, "resume", self.learner.rank, self.record.steps))

    def _mean_over_ranks(self, value: Tensor | float) -> float:
        if not isinstance(value, Tensor):
            return value
        return float(self.learner.reduce(value)) / self.learner.world

    def _save(self) -> Path | None:
        if self.checkpoints is None:
            return None
        with self._timed(None):  # inside an experience, what is saved holds its time so far
            state = self.state_dict()  # every rank takes part: ZeRO gathers what it has sharded
            if self.learner.rank != 0:
                return None
            suffix = f"-{self._position.experience:05d}"
            return checkpoint.save(
                self.checkpoints, self.record.steps, state, self.config.checkpoint.keep, suffix=suffix
            )

    def _keep_weights(self, learnt: int | str) -> None:
        """Write the weights after ``learnt`` experiences (``n+s``: and s steps), where they are wanted."""
        if self.weights is None:
            return
        weights = self.learner.learnt()  # every rank takes part: ZeRO gathers what it has sharded
        if self.learner.rank == 0:
            checkpoint.save_weights(self.weights / f"{learnt}.safetensors", weights)

    # --- counting -----------------------------------------------------------------------------------------------

    def _steps_of(self, experience: Experience, samples: int, t: TrainingConfig) -> int:
        if t.iterations is not None:
            return t.iterations * self.strategy.budget(experience, self.learner)
        return t.epochs * math.ceil(samples / t.batch_size)

    def _steps_left(self) -> int:
        """An estimate for the progress bar: exact for strategies that train on the experience's own samples."""
        left = self.stream.experiences[self._position.experience :]
        samples = round(len(left[0].train) * (1 - self.config.training.validation)) if left else 0
        plans = (self.config.training.at(e.index) for e in left)
        steps = sum(t.iterations or t.epochs * math.ceil(samples / t.batch_size) for t in plans)
        return steps - self._position.step


def _refuse_lone_sample(error: ValueError, size: int, rows: int, experience: Experience) -> None:
    """Raise :class:`TrainingError` where ``error`` is torch's word for one sample alone before a batch normalisation."""
    if "more than 1 value per channel" in str(error):
        other = next(n for n in range(size + 1, size + rows + 2) if rows % n != 1)
        raise TrainingError(
            f"training.batch_size = {size}: of the {rows} samples of {experience!r} one is left alone in a batch, and batch "
            f"normalisation has no variance of one; take another, for example {other}"
        ) from None


def learning_rate(t: TrainingConfig, step: int, total: int) -> float:
    """The learning rate of ``step`` (from 0) of an experience of ``total`` steps; a pure function, never saved."""
    if step < t.warmup_steps:
        return t.lr * (step + 1) / t.warmup_steps
    if t.schedule == "step":  # milestones are of the whole experience; those that the warm-up passed decay behind it
        return t.lr * math.prod(t.decay for milestone in t.milestones if step / total >= milestone)
    done = (step - t.warmup_steps) / max(1, total - t.warmup_steps)
    if t.schedule == "cosine":
        return t.lr * (1 + math.cos(math.pi * done)) / 2
    if t.schedule == "linear":
        return t.lr * (1 - done)
    return t.lr


def _reset_peak_memory(device: torch.device) -> int | None:
    """Start measuring the peak anew and return it, which is all that is held by now; ``None`` where that cannot be done.

    A comparison's runs share a process: one must not inherit another's peak, nor be charged for what others left behind.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return _peak_memory(device)
    give_freed_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident set's high-water mark
    except OSError as error:
        log.debug("the peak memory is that of the whole process: %s", error)
        return None
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> int:
    """Peak resident memory of this process in bytes, or of the GPU where one is used."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, this mark can be reset
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
