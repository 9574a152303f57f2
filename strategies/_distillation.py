"""What distilling strategies share: the model as it stood at some time, and how far other answers are from its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lab.adapters import LowRank, low_rank
from cl_lab.protocols import Learner
from cl_lab.records import PAD, Batch, State

_IMPOSSIBLE = -1e30  # in place of -inf, whose differences are NaN; softmax makes exactly 0 of either


class Teacher:
    """A copy of the model as it stood when :meth:`take` was called; false before that.

    Its state leaves out what was not trained then: it is, and stays, that of the model itself. It computes in the model's
    own precision, or equal weights would give other answers.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._given: set[str] = set()  # names of what was not trained when it was taken
        self._running: set[str] = set()  # names of its buffers
        self._restored: State = {}  # weights of a checkpoint, until they are needed
        # Weights held in 16 bits that follow others, in 32: a small share of a way is less than these round to.
        self._exact: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return self._module is not None or bool(self._restored)

    def take(self, learner: Learner) -> None:
        """Become a copy of the model as it stands now."""
        self._restored, self._exact = {}, {}
        if self._module is None:
            self._make(learner)
        else:
            learner.refresh(self._module)

    @torch.no_grad()
    def follow(self, learner: Learner, share: float) -> None:
        """Go a ``share`` of the way to the model's weights: ``θ ← θ + share·(θ_model − θ)``, for what is trained now."""
        own = dict(self._ready(learner).named_parameters())
        for name, p in learner.parameters().items():
            if name not in self._exact and _is_half(own[name]):
                self._exact[name] = own[name].float()
            kept = self._exact.get(name, own[name])
            kept.lerp_(p.to(kept), share)
            if name in self._exact:
                own[name].copy_(kept)

    @torch.no_grad()
    def take_buffers(self, learner: Learner) -> None:
        """Take over the model's buffers (running statistics), not its weights."""
        own = dict(self._ready(learner).named_buffers())
        for name, value in self.buffers_of(learner).items():
            own[name].copy_(value)

    def buffers_of(self, learner: Learner) -> dict[str, Tensor]:
        """The model's buffers by name, copied, on its own device; all ranks take part."""
        own = self._ready(learner)
        if not self._running:  # gathering the weights is not free
            return {}
        buffers = {name: buffer for name, buffer in own.named_buffers() if name in self._running}
        weights = learner.weights()
        return {name: weights[name].to(buffer) for name, buffer in buffers.items()}

    @torch.no_grad()
    def outputs(self, batch: Batch, learner: Learner, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Its logits ``[B, n_classes]``, in evaluation mode; with ``buffers`` in place of its own for this once."""
        own = self._ready(learner)
        x, how = (learner.prepare_input(batch.x), {}) if batch.raw else (batch.x, {"latent": True})
        with learner.autocast():
            logits: Tensor = (
                functional_call(own, dict(buffers), (x, batch.t), how) if buffers else own(x, batch.t, **how)
            )
        return logits.float()

    def outputs_and_features(self, batch: Batch, learner: Learner) -> tuple[Tensor, Tensor]:
        """The same with what its head saw, ``[B, d]``, out of one pass."""
        seen: list[Tensor] = []
        head = self._ready(learner).get_submodule("head")
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.outputs(batch, learner)
        finally:
            handle.remove()
        return logits, seen[-1].float()

    def adapters(self, learner: Learner) -> dict[str, LowRank]:
        """Its low-rank adapters by path of the layer, as :meth:`cl_lab.protocols.Strategy.adapters` gives them."""
        return low_rank(self._ready(learner))

    def _ready(self, learner: Learner) -> nn.Module:
        if self._module is None:
            made = self._make(learner)
            # What has been frozen since it was taken is its own, and stands in the checkpoint.
            self._given -= self._restored.keys()
            made.load_state_dict(self._restored, strict=not self._given)
            self._exact = {
                name: held.to(p.device, copy=True)
                for name, p in made.named_parameters()
                if isinstance(held := self._restored.get(name), Tensor) and held.dtype == torch.float32 and _is_half(p)
            }
            self._restored = {}
        assert self._module is not None
        return self._module

    def _make(self, learner: Learner) -> nn.Module:
        made = self._module = learner.replica()
        parameters = made.state_dict(keep_vars=True).items()
        self._given = {n for n, p in parameters if isinstance(p, nn.Parameter) and not p.requires_grad}
        self._running = {n for n, p in parameters if not isinstance(p, nn.Parameter)}
        return made.requires_grad_(False)

    def state_dict(self) -> State:
        """Its weights; nothing before it was taken."""
        if self._module is None:
            return dict(self._restored)
        return {n: self._exact.get(n, v) for n, v in self._module.state_dict().items() if n not in self._given}

    def load_state_dict(self, state: object) -> None:
        """Restore what :meth:`state_dict` gave."""
        assert isinstance(state, dict)
        self._module, self._restored, self._exact = None, dict(state), {}


def _is_half(p: Tensor) -> bool:
    return p.dtype in (torch.bfloat16, torch.float16)


class Unmasked:
    """What the last layer of a watched model (or of a copy of it) gave, before the head hid other tasks' outputs.

    So one pass answers for every task. Hooks are functions, which copies of a model share, and survive its wrapping.
    """

    def __init__(self) -> None:
        self._given: Tensor | None = None
        self._pass: tuple[Tensor, Tensor] | None = None  # of the latest pass: outputs, and the same unmasked

    def watch(self, model: nn.Module) -> None:
        """Look at every pass from now on; a model without a head and a linear layer in it is left alone."""
        head = getattr(model, "head", None)
        linear = getattr(head, "linear", None)
        if isinstance(head, nn.Module) and isinstance(linear, nn.Module):
            linear.register_forward_hook(lambda _, args, out: self._gave(out))
            head.register_forward_hook(lambda _, args, out: self._passed(out))

    def _gave(self, unmasked: Tensor) -> None:
        self._given = unmasked

    def _passed(self, outputs: Tensor) -> None:
        given, self._given = self._given, None
        self._pass = None if given is None else (outputs, given)

    def of(self, outputs: Tensor) -> Tensor | None:
        """The unmasked outputs of the latest pass, or ``None`` where that pass did not give ``outputs``."""
        latest, self._pass = self._pass, None
        if latest is None or latest[0].shape != outputs.shape:
            return None
        if latest[0].dtype == outputs.dtype:
            return latest[1] if latest[0].data_ptr() == outputs.data_ptr() else None
        return latest[1] if torch.equal(latest[0].float(), outputs.float()) else None  # widened, from bf16


def answer_places(batch: Batch, learner: Learner) -> Tensor:
    """Where the answers of a batch of texts have tokens, ``[B, A]`` bool."""
    answers = learner.stream.answers
    assert answers is not None
    return answers.to(batch.y.device)[batch.y] != PAD


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(target/T) ‖ softmax(logits/T))`` over the last axis, which it takes away.

    Outputs that hold ``-inf`` are no part of their softmax. Of those possible in ``target`` only what is possible in
    ``logits`` counts; where nothing is left, the divergence is zero.
    """
    possible = logits != float("-inf")
    known = possible & (target != float("-inf"))
    log_p = torch.where(known, target / temperature, _IMPOSSIBLE).log_softmax(dim=-1)
    log_q = torch.where(possible, logits / temperature, _IMPOSSIBLE).log_softmax(dim=-1)
    return (torch.where(known, log_p.exp(), 0.0) * (log_p - log_q)).sum(dim=-1)
