"""Learning to Prompt (Wang et al., CVPR 2022, arXiv 2112.08654), for language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner
from cl_lab.records import Batch, Experience, State, Stream

from ._prompts import SoftPrompts, sampled

_OFTEN = "backbone.prefix.pool.often"


class Pool(nn.Module):
    """M prompts ``[M, L, D]``, each with a key ``[M, D]``; the ``top`` whose keys are nearest to a query are its own."""

    often: Tensor
    """``h`` ``[M]``: shares of the choices that fell on each prompt in past tasks; zero where that is not to count."""

    def __init__(self, prompts: Tensor, keys: Tensor, top: int) -> None:
        super().__init__()
        self.prompts, self.keys = nn.Parameter(prompts), nn.Parameter(keys)
        self.register_buffer("often", torch.zeros(len(keys)))
        self._top = top

    def extra_repr(self) -> str:
        """Names what its tensors do not tell."""
        return f"top={self._top}"

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, D]`` → their prompts ``[B, top·L, D]``, the cosines and the places in the pool, ``[B, top]``."""
        cosines = F.normalize(query.float(), dim=1) @ F.normalize(self.keys.float(), dim=1).T
        chosen = self._choose(cosines.detach())
        return self.prompts[chosen].flatten(1, 2), cosines.gather(1, chosen), chosen

    def _choose(self, cosines: Tensor) -> Tensor:
        nearest = cosines.argsort(dim=1, descending=True, stable=True)
        if self.training:  # among those that count alike, for example never chosen, the nearest
            costs = ((1 - cosines) * self.often).gather(1, nearest)
            nearest = nearest.gather(1, costs.argsort(dim=1, stable=True))
        return nearest[:, : self._top]


class PoolPrefix(nn.Module):
    """What stands before a text: the prompts that a pool has for its mean embedding. ``tell`` hears cosines and choice."""

    def __init__(self, pool: Pool, tell: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.pool = pool
        self._tell = tell  # a plain function: copies of the model share it

    def forward(self, h: Tensor, read: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`cl_lab.causal_lm.CausalBackbone.take_prefix`; the task labels ``t`` are not looked at."""
        query = (h.float() * read[:, :, None]).sum(1) / read.sum(1, keepdim=True).clamp(min=1)
        soft, cosines, chosen = self.pool(query.detach())
        self._tell(cosines, chosen)
        return soft, torch.ones(soft.shape[:2], dtype=torch.bool, device=soft.device)


@dataclass
class L2P(SoftPrompts):
    """A pool of soft prompts, of which each text chooses some by itself: those whose keys are nearest to it.

    The query ``q`` of a text is the mean embedding of its prompt's tokens, by the model's own frozen table (the answer is no
    part of it). The N prompts ``P_s`` with the highest ``cos(q, k_s)`` stand before the text, nearest first. Prompts and
    keys alone are trained, on

        ``CE − λ Σ_s cos(q, k_s)``   over the N that were chosen

    (Wang et al. 2022, arXiv 2112.08654, eq. 5, with its distance ``1 − cos``; λ = 0.5). No task is told, neither in training
    nor at test. With ``diversify`` a prompt's distance counts, in training, times ``h``, the share of past tasks' choices
    that fell on it (eq. 4), so that new tasks take what others left; among prompts that nobody chose, the nearest.

    A prompt begins as embeddings of tokens drawn from the vocabulary, its key as their mean, which is where queries are
    (the released code, for images, draws both from a uniform distribution). Like the model's weights they are drawn from
    torch's global generator.
    """

    pool: int = knob(10, doc="M, prompts in the pool", ge=1)
    length: int = knob(5, doc="places of each prompt", ge=1)
    top: int = knob(3, doc="N, prompts that each text chooses", ge=1)
    strength: float = knob(0.5, doc="λ, the weight of the pull of chosen keys to their queries", ge=0)
    diversify: bool = knob(False, doc="in training, prefer prompts that past tasks chose less often")

    _counts: Tensor = field(init=False, repr=False)  # [M] int64: how often each was chosen in training
    # Not state, but of the step in progress: what the latest forward pass chose, and this rank's choices so far.
    _given: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _pass: tuple[Tensor, Tensor, Tensor] | None = field(
        default=None, init=False, repr=False
    )  # outputs, cosines, choice
    _pending: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.top > self.pool:
            raise ConfigError(f"top = {self.top}: the pool holds {self.pool} prompts; lower top, or raise pool")
        self._counts = torch.zeros(self.pool, dtype=torch.int64)
        if self.diversify:
            # An instance may need more than its class: past tasks are those behind a boundary.
            vars(self)["needs_boundaries"] = True

    def prefix(self, table: Tensor, stream: Stream) -> tuple[nn.Module, int]:
        prompts = sampled(table, self.pool * self.length, None).unflatten(0, (self.pool, self.length))
        made = Pool(prompts, prompts.mean(1), self.top)
        return PoolPrefix(made, lambda cosines, chosen: self._gave(cosines, chosen)), self.top * self.length

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        super().prepare(model, stream)
        model.get_submodule("head").register_forward_hook(lambda _, args, out: self._passed(out))
        return model

    def _gave(self, cosines: Tensor, chosen: Tensor) -> None:
        # Copies of the model, which others hold as teachers, are passed through without gradients.
        self._given = (cosines, chosen) if cosines.requires_grad else None

    def _passed(self, outputs: Tensor) -> None:
        if self._given is not None:
            self._pass, self._given = (outputs, *self._given), None

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if self.diversify and self._counts.any():
            weights = learner.weights()
            weights[_OFTEN] = (self._counts / self._counts.sum()).to(weights[_OFTEN].dtype)
            learner.set_weights(dict(weights))

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        if self._pass is None or self._pass[0].data_ptr() != outputs.data_ptr():
            learner.forward(batch)  # another strategy has put other samples through since
        assert self._pass is not None
        (_, cosines, chosen), self._pass = self._pass, None
        counted = chosen if batch.weight is None else chosen[batch.weight != 0]
        counts = torch.bincount(counted.flatten(), minlength=self.pool)
        self._pending = counts if self._pending is None else self._pending + counts
        # Also where λ = 0: keys that no gradient reaches would leave DDP waiting.
        return loss - self.strength * learner.average(cosines.sum(1), batch)

    def after_step(self, learner: Learner) -> None:
        if self._pending is not None:
            self._counts += learner.reduce(self._pending).cpu()
            self._pending = None

    def measures(self) -> dict[str, float]:
        """How many prompts of the pool were chosen in training so far."""
        return {"prompts_used": float((self._counts > 0).sum())}

    def state_dict(self) -> State:
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state: State) -> None:
        counts: Any = state["counts"]
        self._counts, self._pending = counts.clone(), None
