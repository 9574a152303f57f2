"""The learner: a model, its optimiser and the engine that runs them, behind one narrow view.

Accelerate is the one abstraction of the engine: plain torch, DDP, and DeepSpeed ZeRO 0–3 give the same parameters,
gradients and state by name. An engine is built when training begins and built again when its set of trainable
parameters changes or a fresh optimiser is wanted, because DDP and DeepSpeed fix that set when they wrap the model.
State leaves and enters as full tensors by parameter name, so a checkpoint fits every engine.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.answers import Grades, Say, grade_answers
from cl_lab.compat import compile_nothing_for_deepspeed
from cl_lab.config import EngineConfig, TrainingConfig
from cl_lab.errors import ConfigError, DataError, TrainingError
from cl_lab.models import Classifier, GrowingHead, channels_last
from cl_lab.module_paths import named_by
from cl_lab.records import PAD, Batch, State, Stream, TensorData
from cl_lab.seeding import generator

if TYPE_CHECKING:
    from accelerate import Accelerator

_Answer = TypeVar("_Answer")

_OPTIMIZER_KEYS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


def check_device(engine: EngineConfig) -> bool:
    """Whether a run takes a GPU; raises :class:`ConfigError` where it must and there is none."""
    cuda = torch.cuda.is_available() and engine.device != "cpu"
    if engine.device == "cuda" and not cuda:
        raise ConfigError("engine.device = 'cuda': torch sees no GPU on this machine; use engine.device=cpu or auto")
    return cuda


def accelerator_for(engine: EngineConfig, training: TrainingConfig) -> Accelerator:
    """The Accelerator of a run; ranks find each other by the usual environment (``RANK``, ``WORLD_SIZE``, …).

    On a CPU machine DeepSpeed is only real with an explicit gloo back-end and without ``cpu=True`` (with it, Accelerate
    silently runs plain DDP), so what came out is checked against what was asked for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # import-time chatter of third parties; nothing here warns about a run
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DistributedType, InitProcessGroupKwargs

        cuda = check_device(engine)
        # Runs of one process (a comparison) may ask for different engines; Accelerate keeps the first one's settings.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        handlers = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")] if many or engine.deepspeed else []
        if engine.deepspeed:
            if not cuda:
                compile_nothing_for_deepspeed()
            plugin = _deepspeed_plugin(engine, training)
            accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)
            if accelerator.distributed_type != DistributedType.DEEPSPEED:
                raise TrainingError(
                    f"asked for DeepSpeed ZeRO {engine.zero} but Accelerate runs {accelerator.distributed_type}; "
                    "unset ACCELERATE_* variables or set engine.kind=torch"
                )
        else:
            accelerator = Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes != engine.processes:
        raise ConfigError(
            f"engine.processes = {engine.processes}, but the launcher started {accelerator.num_processes}; make them equal"
        )
    return accelerator


def _deepspeed_plugin(engine: EngineConfig, training: TrainingConfig) -> Any:
    from accelerate.utils import DeepSpeedPlugin

    settings: dict[str, Any] = {
        # Batches are split by us; DeepSpeed only needs some number here to be satisfied.
        "train_micro_batch_size_per_gpu": max(1, training.batch_size // (engine.processes * training.accumulate)),
        "gradient_accumulation_steps": training.accumulate,
        "zero_optimization": {"stage": engine.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "gradient_clipping": training.clip_norm or 0.0,
        "bf16": {"enabled": engine.precision == "bf16"},
    }
    return DeepSpeedPlugin(hf_ds_config=settings)


@cache
def warm_up(device: torch.device) -> None:
    """One throw-away step, once per process: the first backward pass starts threads and libraries, which no run should
    be charged for. Draws no random number."""
    weight = torch.zeros(8, 8, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    F.cross_entropy(
        torch.ones(8, 8, device=device) @ weight, torch.zeros(8, dtype=torch.int64, device=device)
    ).backward()
    optimizer.step()


_LABELS = 64
"""A task with so few answers has labels, however few samples it is tested on."""


class Score(NamedTuple):
    """How well a test set is answered, and, where answers are written freely, the share that are answers of their task."""

    value: float
    valid: float | None = None


class EngineLearner:
    """The :class:`~cl_lab.protocols.Learner` that the trainer drives; strategies only see the protocol.

    ``model`` is a plain module called as ``model(x, t)``; parameters that want no gradient are never trained. Raises
    :class:`ConfigError` where the machine lacks what ``engine`` asks for.
    """

    def __init__(
        self, model: nn.Module, stream: Stream, training: TrainingConfig, engine: EngineConfig, seed: int
    ) -> None:
        self._training, self._engine, self._stream = training, engine, stream
        self._accelerator = accelerator_for(engine, training)
        self._device = torch.device(self._accelerator.device)
        self._world, self._rank = int(self._accelerator.num_processes), int(self._accelerator.process_index)
        self._rng = generator(seed, "strategy")
        self._bf16 = engine.precision == "bf16"
        if engine.zero == 3 and self._world > 1 and stream.reads_on:
            raise ConfigError(
                f"engine.zero = 3 on {self._world} ranks: scoring '{stream.scoring}' asks the model as often as its answers "
                "want, and ranks that share parameters must ask alike; set scenario.scoring=first-token, or engine.zero=2"
            )
        self._regression = stream.objective == "regression"
        # Where DeepSpeed keeps fp32 values and optimiser state apart from the module's own tensors.
        self._apart = engine.deepspeed and engine.zero > 0
        if self.device.type == "cpu" and not engine.deepspeed:  # which lays parameters out anew, as one flat tensor
            channels_last(model)
        # DeepSpeed partitions a module in place; each engine gets a copy of this one.
        self._template = model if not engine.deepspeed else copy.deepcopy(model)
        self._plain = model
        self._wrapped: Any = None
        self._optimizer: Any = None
        self._named: dict[str, nn.Parameter] = {}
        self._frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        # What was never to be trained is as the model's recipe makes it, so checkpoints leave it out.
        self._given = {
            name
            for name, v in model.state_dict(keep_vars=True).items()
            if isinstance(v, nn.Parameter) and not v.requires_grad
        }
        self._frozen_modules: list[nn.Module] = []
        self._patterns: list[str] = []
        self._mirror: nn.Module | None = None  # a replica for gradients_of where the engine's module cannot serve
        self._scale_shift = _normalisation(stream, self.device)
        self._answers_table = None if stream.answers is None else stream.answers.to(self.device)
        self._plain.to(self.device)
        self._grows = isinstance(model, Classifier) and isinstance(model.head, GrowingHead)
        self.keep_features = False
        """Whether :meth:`forward` holds on to the features it passed through; set by who wants them."""
        self._held: tuple[Batch, Tensor] | None = None

    # --- what strategies see ------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def rng(self) -> torch.Generator:
        return self._rng

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def augments(self) -> bool:
        return self._training.augmentation != "none"

    @property
    def training_batch_size(self) -> int:
        return self._training.batch_size

    def prepare_input(self, x: Tensor) -> Tensor:
        x = x.to(self._device)
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).mul_(1 / 255)
        if self._scale_shift is not None:
            scale, shift = self._scale_shift
            x = torch.addcmul(shift, x, scale)
        return x

    @property
    def lr(self) -> float:
        if self._optimizer is None:
            return self._training.lr
        return float(self._optimizer.param_groups[0]["lr"])

    def forward(self, batch: Batch) -> Tensor:
        if not self.keep_features:
            return self._forward(batch)
        outputs, features = self._forward_with_features(batch)
        self._held = (batch, features)
        return outputs

    def features(self, batch: Batch) -> Tensor:
        if self._held is not None and self._held[0] is batch:
            return self._held[1]
        return self._forward_with_features(batch)[1]

    def _forward_with_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        head = getattr(self._plain, "head", None)
        if not isinstance(head, nn.Module):
            raise ConfigError(
                f"the strategy needs features, but {type(self._plain).__name__} has no 'head'; use a model that is a "
                "backbone and a head (cl-lab list models)"
            )
        seen: list[Tensor] = []

        def hold(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        handle = head.register_forward_pre_hook(hold)
        try:
            outputs = self._forward(batch)
        finally:
            handle.remove()
        return outputs, seen[-1]

    def _forward(self, batch: Batch) -> Tensor:
        model = self._plain if self._wrapped is None else self._wrapped
        x = self.prepare_input(batch.x) if batch.raw else batch.x.to(self._device)
        how = {} if batch.raw else {"latent": True}
        outputs: Tensor
        if not self._bf16:
            outputs = model(x, batch.t, **how)
        elif self._engine.deepspeed and self._wrapped is not None:
            if x.is_floating_point():
                x = x.to(torch.bfloat16)  # DeepSpeed holds the weights themselves in bf16
            outputs = model(x, batch.t, **how)
        else:
            with self.autocast():
                outputs = model(x, batch.t, **how)
        return outputs

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        if self._regression:
            return self.average((outputs.float().squeeze(1) - batch.y).square(), batch)
        if self._answers_table is not None:
            return self.average(_answer_loss(outputs.float(), self._answers_table[batch.y]), batch)
        if batch.weight is None:
            return F.cross_entropy(outputs.float(), batch.y)
        return self.average(F.cross_entropy(outputs.float(), batch.y, reduction="none"), batch)

    def average(self, values: Tensor, batch: Batch) -> Tensor:
        return values.mean() if batch.weight is None else (values * batch.weight).sum()

    def parameters(self) -> dict[str, Tensor]:
        if self._wrapped is None or not self._apart:
            return {name: p.detach() for name, p in self._trainable()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p) for name, p in self._trainable()}

    @contextmanager
    def gradients(self) -> Iterator[dict[str, Tensor]]:
        if not self._engine.deepspeed:
            yield {name: p.grad for name, p in self._trainable() if p.grad is not None}
            return
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        gradients = {name: safe_get_full_grad(p) for name, p in self._trainable()}
        gradients = {name: g for name, g in gradients.items() if g is not None}
        yield gradients
        for name, p in self._trainable():
            if name in gradients:
                safe_set_full_grad(p, gradients[name])

    def gradients_of(self, batch: Batch) -> dict[str, Tensor]:
        rows = self.rows(batch).to(self._device)
        if not self._engine.deepspeed:
            model = self._plain
        else:  # the engine's own module has hooks that count on its own backward pass
            if self._mirror is None:
                self._mirror = self.replica()
            else:
                self.refresh(self._mirror)
            model = self._mirror
            for (_, mirrored), original in zip(model.named_modules(), self._plain.modules(), strict=True):
                mirrored.training = original.training
        named = {n: p for n, p in model.named_parameters() if n not in self._frozen}
        x = self.prepare_input(rows.x) if rows.raw else rows.x
        with torch.enable_grad(), _still_statistics(model):
            with self.autocast():
                outputs = model(x, rows.t, **({} if rows.raw else {"latent": True}))
            found = torch.autograd.grad(self.loss(outputs, rows), list(named.values()), allow_unused=True)
        return {
            n: self.reduce(torch.zeros_like(p) if g is None else g) / self.world
            for (n, p), g in zip(named.items(), found, strict=True)
        }

    def refresh(self, replica: nn.Module) -> None:
        if not self._engine.deepspeed:
            source = dict(self._plain.named_parameters()) | dict(self._plain.named_buffers())
            with torch.no_grad():
                for name, value in (*replica.named_parameters(), *replica.named_buffers()):
                    value.copy_(source[name])
            return
        replica.load_state_dict(self._full_weights())

    def replica(self) -> nn.Module:
        copied = copy.deepcopy(self._template)
        if self._engine.deepspeed:  # whose weights are elsewhere; the template is the model itself without it
            copied.load_state_dict(self._full_weights())
        for name, p in copied.named_parameters():
            p.requires_grad_(name not in self._frozen)
        return copied.to(self.device).eval()

    def freeze(self, patterns: Sequence[str]) -> list[str]:
        matched: set[str] = set()
        for pattern in patterns:
            matched |= named_by(self._plain, pattern)
        if not {name for name, _ in self._plain.named_parameters()} - self._frozen - matched:
            raise ConfigError(f"freeze: {', '.join(patterns)} leaves no trainable parameter; freeze fewer modules")
        self._patterns += [p for p in patterns if p not in self._patterns]
        if not matched <= self._frozen:
            self._frozen |= matched
            rebuild = self._wrapped is not None
            state = self._optimizer_state() if rebuild else {}
            self._close()
            self._mirror = None
            if rebuild:
                self._open(state)
        return sorted(matched)

    def reduce(self, value: Tensor) -> Tensor:
        if self.world == 1:
            return value
        reduced: Tensor = self._accelerator.reduce(value, reduction="sum")
        return reduced

    def shard(self, data: TensorData) -> TensorData:
        if self.world == 1:
            return data
        return data.map(self.shard_rows)

    def shard_rows(self, values: Tensor) -> Tensor:
        return values[self.rank :: self.world]

    # --- what the trainer drives --------------------------------------------------------------------------------

    @property
    def world(self) -> int:
        """How many ranks train together."""
        return self._world

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._rank

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(math.prod(_full_shape(p)) for name, p in self._plain.named_parameters() if name not in self._frozen)

    @property
    def model(self) -> nn.Module:
        """The module inside the engine."""
        return self._plain

    def configure(self, training: TrainingConfig) -> None:
        """Optimisers made from now on are as ``training`` says."""
        self._training = training

    def begin(self, *, fresh: bool) -> None:
        """Make ready to train; ``fresh`` starts with an empty optimiser."""
        if self._wrapped is not None and not fresh:
            return
        if self._wrapped is not None and not self._engine.deepspeed:
            # The wrapped model may stay; only the optimiser starts anew.
            self._optimizer = self._make_optimizer()
            return
        self._close()
        self._open({})

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def observe(self, classes: Sequence[int]) -> None:
        """Tell a growing head which classes are about to be learnt."""
        for model in {self._plain, self._template}:
            if isinstance(model, Classifier):
                model.observe(classes)

    def observe_labels(self, y: Tensor) -> None:
        """The same from the labels of a batch, where boundaries are hidden; free for heads that do not grow."""
        if self._grows:
            self.observe(y.unique().tolist())

    def train_mode(self) -> None:
        """Training mode, with frozen modules' running statistics kept as they are."""
        model = self._wrapped if self._wrapped is not None else self._plain
        model.train()
        for module in self._frozen_modules:
            module.eval()

    def rows(self, batch: Batch) -> Batch:
        """This rank's rows of a global batch, weighted so that the average over ranks is the global loss."""
        if self.world == 1:
            return batch
        n = len(batch)
        index = torch.arange(self.rank, n, self.world)
        weight = batch.weight if batch.weight is not None else torch.full((n,), 1 / n)
        empty = len(index) == 0
        if empty:  # fewer rows than ranks: take part in the collectives with a row that weighs nothing
            index = torch.zeros(1, dtype=torch.int64)
        return batch.rows(index, weight[index] * (0.0 if empty else float(self.world)))

    def gather(self, values: Tensor, n: int) -> Tensor:
        """The global ``[n, …]`` tensor whose rows of this rank (as :meth:`rows` deals them) are ``values``."""
        if self.world == 1:
            return values
        whole = values.new_zeros(n, *values.shape[1:])
        mine = len(range(self.rank, n, self.world))
        whole[self.rank :: self.world] = values[:mine]
        return self.reduce(whole)

    def pieces(self, batch: Batch) -> list[Batch]:
        """The batch cut into ``training.accumulate`` pieces whose losses add up to the whole batch's."""
        k = min(self._training.accumulate, len(batch))
        if self._training.accumulate == 1:
            return [batch]
        weight = batch.weight if batch.weight is not None else torch.full((len(batch),), 1 / len(batch))
        made = [batch.rows(index, weight[index]) for index in torch.arange(len(batch)).tensor_split(k)]
        while len(made) < self._training.accumulate:  # DeepSpeed counts pieces; an extra one weighs nothing
            made.append(batch.rows(torch.zeros(1, dtype=torch.int64), torch.zeros(1)))
        return made

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of one piece; ``last`` is the piece after which the optimiser steps."""
        if self._engine.deepspeed:
            self._wrapped.set_gradient_accumulation_boundary(last)
            self._wrapped.backward(loss, scale_wrt_gas=False)
            return
        with nullcontext() if last or self.world == 1 else self._wrapped.no_sync():
            loss.backward()

    def step(self) -> None:
        """Clip where asked, step the optimiser, clear the gradients."""
        if self._engine.deepspeed:
            self._wrapped.step()
            return
        if self._training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self._trainable()], self._training.clip_norm)
        self._optimizer.step()
        for p in self._named.values():
            p.grad = None

    def score(
        self, data: TensorData, batch_size: int, predict: Say | None = None, stream: Stream | None = None
    ) -> Score:
        """An entry of the score matrix: :meth:`accuracy`, or minus :meth:`squared_error` where the stream is a regression.

        Arguments are those of :meth:`accuracy`; ``stream`` is an aside's, where ``data`` are its questions. Raises
        :class:`DataError` for targets that are not the stream's kind.
        """
        if data.y.is_floating_point() != self._regression:
            raise DataError(
                f"stream '{self._stream.name}' is a {self._stream.objective}, but its targets are {data.y.dtype}; "
                "give int64 labels for a classification, float32 targets for a regression"
            )
        if self._regression:
            return Score(0.0 - self.squared_error(data, batch_size, predict))  # never "-0.0"
        if self._answers_table is not None:
            return self.answered(data, batch_size, predict, stream)
        return Score(self.accuracy(data, batch_size, predict))

    @torch.no_grad()
    def accuracy(self, data: TensorData, batch_size: int, predict: Say | None = None) -> float:
        """Share of ``data`` whose highest logit is the label, in evaluation mode, over all ranks.

        ``predict`` gives the scores ``[B, n_classes]`` of a batch in place of the model's logits. Raises
        :class:`TrainingError` where outputs are not finite: their highest logit would mean nothing.
        """
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # right answers, outputs that are not finite
        for batch, outputs, rows in self._answers(data, batch_size, predict or self._forward):
            highest, label = outputs.max(dim=1)
            if rows is not None:
                counts[0] += (label == batch.y).sum()
                counts[1] += (~highest.isfinite()).sum()
        correct, broken = self.reduce(counts).tolist()
        self._check_finite(int(broken), len(data))
        return int(correct) / len(data)

    @torch.no_grad()
    def answered(
        self, data: TensorData, batch_size: int, predict: Say | None = None, stream: Stream | None = None
    ) -> Score:
        """What the answers to ``data`` in words are worth, as :func:`~cl_lab.answers.grade_answers` says: their mean.

        Where all must be exact, that is the share of right ones. As :meth:`accuracy` otherwise; ``predict`` gives logits
        ``[B, A', vocabulary]``. Where answers are written freely and none is compared, with the share that are one of their
        task's answers, right or wrong. ``stream`` is an aside's, where ``data`` are its questions.
        """
        stream = stream or self._stream
        say = self._forward if predict is None else predict
        # In float64, whose sums of ones are as exact as counts.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        table = stream.answers
        assert table is not None
        wanted = [data.y]
        for task in data.t.unique().tolist():
            classes = stream.experiences[task].classes
            # Behind the longest right answer all is wrong, but it may be another of the task's labels. Whole texts, of
            # which there are as many as samples, are none.
            if len(classes) <= max(_LABELS, len(data)):
                wanted.append(torch.tensor(classes))
        longest = int((table[torch.cat(wanted)] != PAD).sum(1).max())

        def graded(batch: Batch) -> Grades:
            with self._remembering_prompts():
                return grade_answers(batch, say, stream, longest)

        for _, grades, rows in self._answers(data, batch_size, graded):
            if rows is not None:
                sums += torch.stack([grades.value.sum(), grades.broken.sum(), grades.valid.sum()])
        worth, broken, valid = self.reduce(sums).tolist()
        self._check_finite(int(broken), len(data))
        free = stream.scoring == "generation" and not stream.measures
        return Score(worth / len(data), valid / len(data) if free else None)

    @torch.no_grad()
    def squared_error(self, data: TensorData, batch_size: int, predict: Say | None = None) -> float:
        """Mean of ``(f(x) − y)²`` over ``data``, in evaluation mode, over all ranks; as :meth:`accuracy` otherwise."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # squared errors, outputs that are not finite
        for batch, outputs, rows in self._answers(data, batch_size, predict or self._forward):
            apart = outputs.squeeze(1).double() - batch.y
            if rows is not None:
                sums[0] += apart.square().sum()
                sums[1] += (~apart.isfinite()).sum()
        total, broken = self.reduce(sums).tolist()
        self._check_finite(int(broken), len(data))
        return float(total) / len(data)

    @torch.no_grad()
    def log_likelihoods(self, data: TensorData, said: Tensor, batch_size: int, predict: Say | None = None) -> Tensor:
        """Log-probability of the tokens ``said`` ``[N, A]`` behind the prompts of ``data``: float64 ``[N]``, on the CPU.

        In nats, summed over each row's tokens, :data:`~cl_lab.records.PAD` left out; in evaluation mode, over all ranks.
        ``predict`` gives logits ``[B, A', vocabulary]`` in place of the model's. Raises :class:`TrainingError` where they
        are not finite.
        """
        found = torch.zeros(len(data), dtype=torch.float64, device=self.device)
        for _, outputs, rows in self._answers(data, batch_size, predict or self._forward):
            if rows is not None:
                tokens = said[rows].to(self.device)[:, : outputs.shape[1]]
                log_p = outputs.float().log_softmax(2).gather(2, tokens.clamp(min=0)[..., None]).squeeze(2).double()
                found[rows] = torch.where(tokens == PAD, 0.0, log_p).sum(1)
        whole = self.reduce(found).cpu()  # each rank has its own rows, and zeros
        self._check_finite(int((~whole.isfinite()).sum()), len(data))
        return whole

    def _answers(
        self, data: TensorData, batch_size: int, answer: Callable[[Batch], _Answer]
    ) -> Iterator[tuple[Batch, _Answer, slice | None]]:
        """This rank's batches of ``data``, what ``answer`` gives to each, and its rows; ``None`` where it does not count.

        A rank that has no rows left answers a row of another's, for the others' sake.
        """
        model = self._plain if self._wrapped is None else self._wrapped
        model.eval()
        n = len(data)
        # Every rank runs the same number of batches: ZeRO 3 gathers parameters in each of them.
        for start in range(0, n, batch_size * self.world):
            lo = min(start + self.rank * batch_size, n)
            hi = min(lo + batch_size, n)
            rows = slice(lo, hi) if hi > lo else slice(0, 1)
            batch = Batch(data.x[rows], data.y[rows], data.t[rows], 0, raw=data.raw).to(self.device)
            yield batch, answer(batch), rows if hi > lo else None

    def _remembering_prompts(self) -> AbstractContextManager[None]:
        """Within, this model reads each prompt but once where it can; what else a strategy answers with reads as ever."""
        # ZeRO 3 lays weights out anew for every layer's turn, so whether they have changed cannot be seen.
        if not isinstance(self._plain, Classifier) or self._engine.zero == 3:
            return nullcontext()
        return self._plain.backbone.remembering_prompts()

    def _check_finite(self, broken: int, n: int) -> None:
        if broken:
            raise TrainingError(
                f"the model's outputs are not finite on {broken} of {n} samples: training diverged with "
                f"training.lr={self._training.lr}; lower training.lr, or set training.clip_norm"
            )

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, full, on the CPU."""
        return self._full_weights()

    def learnt(self) -> dict[str, Tensor]:
        """:meth:`weights` without the parameters that were never to be trained, which the model's recipe makes anew."""
        return {n: v for n, v in self._full_weights().items() if n not in self._given}

    def set_learnt(self, weights: State) -> None:
        """Take over what :meth:`learnt` gave, also of another process."""
        given = {n: v for n, v in self._template.state_dict().items() if n in self._given}
        self.set_weights(given | weights)

    def set_weights(self, weights: State) -> None:
        """Take over what :meth:`weights` gave; the optimiser keeps its state."""
        was_open = self._wrapped is not None
        optimizer = self._optimizer_state() if was_open else {}
        self._close()
        self._template.load_state_dict(weights)
        self._plain.load_state_dict(weights)
        if was_open:
            self._open(optimizer)

    def state_dict(self) -> State:
        """Weights, optimiser state, frozen set and strategy generator: full tensors by name, for any engine."""
        state: State = {
            "weights": dict(self.learnt()),
            "optimizer": self._optimizer_state() if self._wrapped is not None else None,
            "frozen": list(self._patterns),
            "rng": self._rng.get_state(),
        }
        return state

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave, on this engine."""
        weights, optimizer, frozen, rng = (state[k] for k in ("weights", "optimizer", "frozen", "rng"))
        assert isinstance(weights, dict)
        assert isinstance(frozen, list)
        assert isinstance(rng, Tensor)
        self._close()
        self.set_learnt(weights)
        self._rng.set_state(rng)
        if frozen:
            self.freeze([str(p) for p in frozen])
        if optimizer is not None:
            assert isinstance(optimizer, dict)
            self._open(optimizer)

    def close(self) -> None:
        """Leave the engine; :attr:`model` is a plain module with the final weights afterwards."""
        self._close()

    # --- the engine ---------------------------------------------------------------------------------------------

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._named.items())

    def _make_optimizer(self) -> torch.optim.Optimizer:
        t = self._training
        parameters = [p for n, p in self._plain.named_parameters() if n not in self._frozen]
        if not parameters:
            raise TrainingError("the model has no trainable parameter; freeze fewer modules")
        fused = not self._engine.deepspeed  # one pass over memory instead of one per operation, also on CPU
        if t.optimizer == "sgd":
            # Torch's fused SGD on a CPU (2.13) leaves most weights of 16 bits where they are.
            fused = fused and (self.device.type != "cpu" or all(p.dtype == torch.float32 for p in parameters))
            return torch.optim.SGD(parameters, lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay, fused=fused)
        kind = torch.optim.Adam if t.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=fused)

    def _open(self, optimizer_state: State) -> None:
        if self._engine.deepspeed:
            self._plain = copy.deepcopy(self._template).to(self.device)
        for name, p in self._plain.named_parameters():
            p.requires_grad_(name not in self._frozen)
        trained = {
            part for name, _ in self._plain.named_parameters() if name not in self._frozen for part in _within(name)
        }
        kept = {part for name in self._frozen for part in _within(name)} - trained
        self._frozen_modules = [  # the highest of them: what lies in one is set with it
            module
            for name, module in self._plain.named_modules()
            if name in kept and name.rpartition(".")[0] not in kept
        ]
        optimizer = self._make_optimizer()
        if not self._engine.deepspeed:
            self._wrapped = self._accelerator.prepare_model(self._plain)
            self._optimizer = optimizer
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # DeepSpeed's own deprecations
                self._wrapped, self._optimizer = self._accelerator.prepare(self._plain, optimizer)
            self._check_sharding()
        self._named = {n: p for n, p in self._plain.named_parameters() if n not in self._frozen}
        self._load_optimizer_state(optimizer_state)

    def _check_sharding(self) -> None:
        stage = self._wrapped.zero_optimization_stage()
        if stage != self._engine.zero:
            raise TrainingError(f"asked for ZeRO {self._engine.zero} but DeepSpeed runs stage {stage}")
        if stage == 3 and self.world > 1:
            p = next(p for p in self._wrapped.module.parameters() if p.requires_grad)
            if p.ds_tensor.numel() >= p.ds_numel:
                raise TrainingError("asked for ZeRO 3 but parameters are not partitioned over the ranks")

    def _close(self) -> None:
        if self._wrapped is None:
            return
        if self._engine.deepspeed:
            self._template.load_state_dict(self._full_weights())
            self._wrapped.destroy()
            self._accelerator.free_memory()
            self._plain = copy.deepcopy(self._template).to(self.device)
        else:
            self._accelerator._models.clear()
            for p in self._plain.parameters():
                p.grad = None
        self._wrapped = self._optimizer = None
        self._named = {}

    def _full_weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer, full and on the CPU, in fp32 where the engine keeps that copy."""
        if self._wrapped is None or not self._apart:
            return {n: v.detach().cpu().clone() for n, v in self._plain.state_dict().items()}
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if self._engine.zero < 3:
            weights = {n: v.detach().cpu().clone() for n, v in self._plain.state_dict().items()}
        else:
            with GatheredParameters(list(self._plain.parameters()), modifier_rank=None):
                weights = {n: v.detach().cpu().clone() for n, v in self._plain.state_dict().items()}
        for name, p in self._trainable():
            full = safe_get_full_fp32_param(p)
            if full is not None:
                weights[name] = full.detach().cpu().clone()
        return weights

    def _optimizer_state(self) -> State:
        if not self._apart:
            inner = self._optimizer if not self._engine.deepspeed else self._optimizer.optimizer
            return {
                name: {k: v.detach().cpu().clone() for k, v in inner.state[p].items() if isinstance(v, Tensor)}
                for name, p in self._trainable()
                if p in inner.state
            }
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._wrapped.optimizer.optimizer
        held = {k for entry in inner.state.values() for k in entry}
        steps = [float(entry["step"]) for entry in inner.state.values() if "step" in entry]
        state: State = {}
        for name, p in self._trainable():
            entry: State = {}
            for key in _OPTIMIZER_KEYS:
                if key in held:
                    entry[key] = safe_get_full_optimizer_state(p, key).detach().cpu().clone()
            if steps:
                entry["step"] = torch.tensor(steps[0])
            state[name] = entry
        return state

    def _load_optimizer_state(self, state: State) -> None:
        if not state:
            return
        if not self._apart:
            inner = self._optimizer if not self._engine.deepspeed else self._optimizer.optimizer
            for name, p in self._trainable():
                entry = state.get(name)
                if isinstance(entry, dict):
                    inner.state[p] = {
                        k: v.clone() if k == "step" else _laid_out_as(p, v)
                        for k, v in entry.items()
                        if isinstance(v, Tensor)
                    }
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        inner = self._wrapped.optimizer.optimizer
        for name, p in self._trainable():
            entry = state.get(name)
            if not isinstance(entry, dict):
                continue
            for key in _OPTIMIZER_KEYS:
                value = entry.get(key)
                if isinstance(value, Tensor):
                    safe_set_full_optimizer_state(p, value.to(self.device), key)
            step = entry.get("step")
            if isinstance(step, Tensor):
                for held in inner.state.values():
                    if "step" in held:
                        held["step"] = torch.full_like(held["step"], float(step))


def _within(name: str) -> Iterator[str]:
    """The paths of the modules that the parameter ``name`` lies in, but for the model itself."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation as in training, but its running statistics stay where they are."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    held = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in layers]
    for m in layers:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, (momentum, tracked) in zip(layers, held, strict=True):
            m.momentum = momentum
            if tracked is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(tracked)


def _answer_loss(outputs: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy ``[B]`` of ``outputs`` ``[B, A', vocabulary]``: the mean over the tokens of ``answers`` ``[B, A]``."""
    answers = answers[:, : outputs.shape[1]]
    each = F.cross_entropy(outputs.transpose(1, 2), answers, ignore_index=PAD, reduction="none")
    return each.sum(1) / (answers != PAD).sum(1)


def _laid_out_as(p: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` for ``p``, in its layout where it has its shape: fused optimisers go through both by address."""
    if value.shape != p.shape:
        return value.to(p.device, p.dtype).clone()
    return torch.empty_like(p).copy_(value)


def _normalisation(stream: Stream, device: torch.device) -> tuple[Tensor, Tensor] | None:
    if stream.mean is None or stream.std is None:
        return None
    trailing = (1,) * (len(stream.input_shape) - 1)
    mean = torch.tensor(stream.mean, dtype=torch.float32, device=device).view(-1, *trailing)
    std = torch.tensor(stream.std, dtype=torch.float32, device=device).view(-1, *trailing)
    return 1 / std, -mean / std


def _full_shape(p: nn.Parameter) -> tuple[int, ...]:
    shape = getattr(p, "ds_shape", p.shape)  # ZeRO 3 leaves an empty tensor behind and keeps the shape aside
    return tuple(shape)
