"""REMIND: replay of compressed latents (Hayes, Kafle, Shrestha, Acharya & Kanan, ECCV 2020)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab import seeding
from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, FlatLatent, Objective, State, Stream, TensorData

from ._code_memory import CodeMemory
from ._latents import beta, channels_first, channels_last, random_resized_crop
from ._memory import parse_bytes
from ._quantizer import Backend, Loss, ProductQuantizer, faiss_or_none

log = logging.getLogger("cl_lab")

_ENCODE_ROWS = 256  # samples through the frozen layers at a time
_FIT_VECTORS = 2**18  # codebooks are learnt from at most so many
_HARMLESS = 0.01  # a share of their power that latents may lose as codes without a word


@dataclass
class Remind(Strategy):
    """Freeze the lower layers, keep their outputs as product-quantised codes, and replay those to the upper layers (REMIND).

    The network is cut behind ``split`` into G (below) and F (above). The first experience is the base session: the whole
    network is learnt as usual (its own settings: ``training.first``), unless ``base: pretrained`` says that G comes
    trained. Then G is frozen, codebooks are learnt from the base samples' latents, one vector per place of a map, and every
    base sample enters the memory as codes. From then on each sample passes through G once, ever. A step trains F on
    the new samples' and ``replay`` remembered samples' reconstructions, each map cropped and resized at random, the
    remembered ones mixed in pairs (manifold mix-up: ``λh₁ + (1−λ)h₂``, ``λ ~ Beta(a, a)``, one λ per step). With
    ``training.batch_size: 1`` this is the paper's streaming. Test samples go through the same codebooks.

    Where the released code departs from its own description, the description holds: the learning rate of a class falls by a
    counter of its samples (``lr_start·γ^⌊n/lr_step⌋``, ``γ = (lr_end/lr_start)^(lr_step/lr_samples)``), never by chained
    schedulers, which under torch ≥ 1.4 multiply each other to nothing; and a class's first sample is learnt at ``lr_start``.
    As in the code, not the paper's text: a full memory lets a newcomer in and drops a random sample of the fullest class.

    ``codebooks: null`` keeps latents as they are (float32): the uncompressed upper bound.

    Of a language model the hidden state of every token is coded, prompt and answer, and the mask is kept beside it. F learns
    the answers of new and remembered texts; as a token's state depends on those before it alone, a test prompt's codes know
    nothing of its answer.
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification", "language"})

    split: str = knob(
        "auto",
        doc="stage of the backbone behind which it is cut, for example layer4.0; auto: model.frozen, else the last but one",
    )
    base: Literal["learn", "pretrained"] = knob("learn", doc="learn the whole network first, or take G as it comes")
    codebooks: int | None = knob(32, doc="codes per vector; null keeps latents uncompressed", ge=1)
    codebook_size: int = knob(256, doc="centroids per codebook", ge=2, le=32768)
    opq: bool = knob(False, doc="rotate vectors before they are quantised (needs faiss)")
    quantizer: Backend = knob("auto", doc="what learns the codebooks: faiss, scikit-learn, or auto: faiss if installed")
    memory: int | None = knob(None, doc="samples kept; null keeps all, unless memory_bytes is given", ge=1)
    memory_bytes: int | str | None = knob(None, doc="instead of memory: a budget in bytes, codebooks counted")
    replay: int = knob(50, doc="remembered samples per step", ge=0)
    mixup: float = knob(
        0.1,
        doc="a of Beta(a, a) for mix-up of remembered samples; none at 0, with told task labels, or where a question goes "
        "with a picture",
        ge=0,
    )
    crop: float = knob(2 / 7, doc="smallest share of a map that a random resized crop keeps; 1: no crop", gt=0, le=1)
    lr_start: float | None = knob(None, doc="learning rate of a class's first sample; null: training.lr for all", gt=0)
    lr_end: float | None = knob(None, doc="learning rate after lr_samples samples of a class; null: lr_start/100", gt=0)
    lr_samples: int = knob(1300, doc="samples of a class over which its learning rate falls", ge=1)
    lr_step: int = knob(100, doc="samples of a class between two steps of its learning rate", ge=1)
    drift: float = knob(1.5, doc="warn when codes err by this times their error on held-out base samples", gt=1)

    _quantizer: ProductQuantizer | None = field(default=None, init=False, repr=False)
    _memory: CodeMemory = field(init=False, repr=False)
    _counts: Tensor = field(init=False, repr=False)  # samples met, by class
    _errors: list[Loss] = field(default_factory=list, init=False, repr=False)  # held-out base first, then fresh data
    _shape: list[int] = field(default_factory=list, init=False, repr=False)  # of one sample's latent, channels last
    _flat: FlatLatent | None = field(default=None, init=False, repr=False)  # how flat rows of latents are laid out
    _lower: list[str] = field(default_factory=list, init=False, repr=False)  # modules of G
    _frozen: bool = field(default=False, init=False, repr=False)
    _live: bool = field(default=False, init=False, repr=False)  # test samples are asked anew with each answer so far
    _base_codes: TensorData | None = field(default=None, init=False, repr=False)  # not state: encoded anew on resuming
    _encoder: nn.Module | None = field(default=None, init=False, repr=False)  # not state: a copy of the model

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory_bytes is not None:
            raise ConfigError(
                f"memory = {self.memory} and memory_bytes = {self.memory_bytes!r}: the memory has one budget; "
                "leave one of them out"
            )
        if self.opq and self.codebooks is None:
            raise ConfigError("opq = true: there is nothing to rotate for with codebooks = null; give codebooks")
        if self.lr_end is not None and self.lr_start is None:
            raise ConfigError(f"lr_end = {self.lr_end}: needs lr_start to fall from; give both")
        if self.quantizer == "faiss" and faiss_or_none() is None:
            raise ConfigError("quantizer = 'faiss': faiss is not installed; pip install faiss-cpu, or take auto")
        self._memory = CodeMemory(None)
        self._counts = torch.zeros(0, dtype=torch.int64)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"split": "layers.0", "codebooks": 12, "codebook_size": 32, "memory": 100, "replay": 20}

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        split = getattr(model, "split", None)
        if split is None:
            raise ConfigError(f"remind cuts a backbone in two, but {type(model).__name__} cannot be cut")
        self._counts = torch.zeros(stream.n_classes, dtype=torch.int64)
        stage = self._stage(model)
        self._lower = split(stage)
        self._flat = getattr(model.backbone, "flat_latents", {}).get(stage)
        self._live = stream.reads_on
        if self.codebooks is not None:  # refused here, not behind the base session
            ProductQuantizer(self._width(model, stream), self.codebooks, self.codebook_size)
        return model

    @torch.no_grad()
    def _width(self, model: Any, stream: Stream) -> int:
        """Numbers in a vector of the latents; where the model does not say, G is asked with one sample of zeros."""
        if self._flat is not None:
            return self._flat.size
        device = next(model.parameters()).device
        kind = torch.int32 if stream.objective == "language" else torch.float32
        lower = copy.deepcopy(model).eval()
        drawn = seeding.global_state()
        h = lower.latents(torch.zeros(1, *stream.input_shape, dtype=kind, device=device))
        seeding.restore_global_state(drawn)
        return int(self._vectors(h)[0].shape[-1])

    def _stage(self, model: Any) -> str:
        if self.split != "auto":
            return self.split
        if model.frozen is not None:
            return str(model.frozen)
        stages = model.backbone.stages()
        weighty = [name for name, step in stages if isinstance(step, nn.Module)] or [name for name, _ in stages]
        return str(weighty[-2] if len(weighty) > 1 else weighty[-1])

    # -- the base session ----------------------------------------------------------------------------------------------

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        if experience.index == 0 and self.base == "pretrained":
            self._begin_coding(experience, learner)

    def training_set(self, experience: Experience, learner: Learner) -> TensorData:
        if not self._frozen:
            return experience.train
        watched = self._quantizer is not None and 0 < experience.index >= len(self._errors)
        lost = torch.zeros(4, dtype=torch.float64, device=learner.device) if watched else None
        codes = self._encoded(experience.train, learner, lost)
        if lost is not None:
            self._watch(experience, Loss.of(*learner.reduce(lost).tolist()))
        if experience.index == 0:
            self._base_codes = codes
        return codes

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        if experience.index > 0:
            return
        if not self._frozen:
            self._begin_coding(experience, learner)
        codes = self.encode(experience.train, learner) if self._base_codes is None else self._base_codes
        self._base_codes = None
        self._counts += torch.bincount(codes.y, minlength=len(self._counts))
        self._memory.add({"x": codes.x, "y": codes.y, "t": codes.t}, learner.rng)

    def _begin_coding(self, experience: Experience, learner: Learner) -> None:
        """Freeze G and learn the codebooks; a tenth of the base samples is held out to measure what they lose."""
        if self._lower:  # none where the stream itself was put through the frozen layers (model.frozen)
            learner.freeze(self._lower)
        self._frozen = True
        data = experience.train
        order = torch.randperm(len(data), generator=learner.rng)
        probe, _ = self._vectors(self._latents(data.take(order[:1]), learner))
        self._shape = list(probe.shape[1:])
        if self.codebooks is not None:
            places = math.prod(self._shape[:-1])
            held = order[: max(1, len(data) // 10)] if len(data) > 1 else order
            learnt = order[len(held) :] if len(data) > 1 else order
            learnt = learnt[: max(self.codebook_size, _FIT_VECTORS // places)]
            quantizer = ProductQuantizer(self._shape[-1], self.codebooks, self.codebook_size)
            seed = int(torch.randint(2**31, (), generator=learner.rng))
            vectors = self._vectors(self._latents(data.take(learnt), learner))[0].flatten(0, -2)
            quantizer.fit(vectors, seed=seed, opq=self.opq, backend=self.quantizer)
            self._quantizer = quantizer
            self._errors = [self._error(data.take(held), learner)]
        self._memory = self._new_memory()

    def _new_memory(self) -> CodeMemory:
        if self.memory_bytes is not None:
            return CodeMemory(None, parse_bytes(self.memory_bytes), self._codebook_bytes())
        return CodeMemory(self.memory)

    def _codebook_bytes(self) -> int:
        return 0 if self._quantizer is None else self._quantizer.nbytes

    # -- codes ---------------------------------------------------------------------------------------------------------

    def encoding(self) -> Hashable:
        return "codes" if self._frozen and not self._live else None

    def encode(self, data: TensorData, learner: Learner) -> TensorData:
        """The codes of ``data``, ``[N, …, M]``; each rank runs its own rows through G.

        Where something goes with the latents (:attr:`_flat`), a row is flat: its codes, then that.
        """
        return self._encoded(data, learner) if data.raw else data

    def _encoded(self, data: TensorData, learner: Learner, lost: Tensor | None = None) -> TensorData:
        """The codes of ``data``; adds to ``lost`` what they lose of this rank's (:meth:`ProductQuantizer.lost`)."""
        mine = learner.shard_rows(torch.arange(len(data)))
        codes: Tensor | None = None
        for rows in mine.split(_ENCODE_ROWS):
            found = self._codes(data.take(rows), learner, lost)
            if codes is None:
                codes = torch.zeros(len(data), *found.shape[1:], dtype=found.dtype)
            codes[rows] = found.cpu()
        if codes is None:  # fewer samples than ranks
            kind = torch.float32 if self._quantizer is None else self._quantizer.dtype
            codes = torch.zeros(len(data), *self._code_shape(), dtype=kind)
        kind = codes.dtype
        whole = codes.to(learner.device, torch.int32 if kind == torch.int16 else kind)  # gloo and NCCL add no int16
        return TensorData(learner.reduce(whole).to("cpu", kind), data.y, data.t, raw=False)

    def _code_shape(self) -> list[int]:
        width = self.codebooks or self._shape[-1]
        if self._flat is None:
            return [*self._shape[:-1], width]
        rows = math.prod(self._shape[:-1])
        return [rows * (width + self._flat.marks) + self._flat.beside]

    def _codes(self, data: TensorData, learner: Learner, lost: Tensor | None = None) -> Tensor:
        h, beside = self._vectors(self._latents(data, learner))
        if self._quantizer is not None:
            vectors = h.flatten(0, -2)
            codes = self._quantizer.encode(vectors)
            if lost is not None:
                lost += self._quantizer.lost(vectors, codes)
            h = codes.unflatten(0, h.shape[:-1])
        return h if beside is None else torch.cat([h.flatten(1), beside.to(h.dtype)], 1)

    @torch.no_grad()
    def _latents(self, data: TensorData, learner: Learner) -> Tensor:
        """G of ``data``, in evaluation mode, on the learner's device."""
        if self._encoder is None:
            self._encoder = learner.replica()
        encoder: Any = self._encoder
        parts = [encoder.latents(learner.prepare_input(x)) for x in data.x.split(_ENCODE_ROWS)]
        return torch.cat(parts)

    def _vectors(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents as rows of vectors ``[B, …, D]``, and what goes with them ``[B, L]``: whole numbers below 256.

        A model whose latents hold more than vectors (a question beside the regions of a picture, a mark with each token)
        makes them flat, vectors first, and says with ``backbone.flat_latents`` how.
        """
        return self._parted(channels_last(h), self._flat.size if self._flat else 0)

    def _parted(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        """Flat rows ``[B, R·width + L]`` as ``[B, R, width]`` and the rest; rows of any other shape as they are."""
        if self._flat is None:
            return rows, None
        count = self._flat._replace(size=width).rows(rows.shape[1])
        return rows[:, : count * width].unflatten(1, (count, width)), rows[:, count * width :]

    def _decode(self, codes: Tensor) -> Tensor:
        """Latents ``[B, C, …]`` of codes ``[B, …, M]``; flat ones of flat rows."""
        h, beside = self._parted(codes, self.codebooks or self._shape[-1])
        if self._quantizer is not None:
            h = self._quantizer.decode(h.flatten(0, -2)).unflatten(0, h.shape[:-1])
        return channels_first(h) if beside is None else torch.cat([h.flatten(1), beside.to(h)], 1)

    def _error(self, data: TensorData, learner: Learner) -> Loss:
        assert self._quantizer is not None
        few = data.take(torch.arange(min(len(data), _ENCODE_ROWS)))
        return self._quantizer.error(self._vectors(self._latents(few, learner))[0].flatten(0, -2))

    def _watch(self, experience: Experience, error: Loss) -> None:
        """Note what codes lost of the newest samples; warn where the stream has left the codebooks behind."""
        self._errors.append(error)
        for what, now, before in zip(("the latents'", "a latent's"), error, self._errors[0], strict=True):
            if now > max(self.drift * before, _HARMLESS):
                log.warning(
                    "remind: codes lose %.3f of %s power in experience %d ('%s'), %.1f times the %.3f of held-out base "
                    "samples: the stream has drifted from the codebooks; learn them on a broader base, or raise codebooks",
                    now,
                    what,
                    experience.index,
                    experience.name,
                    now / before,
                    before,
                )
                return

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        if batch.raw and not (self._live and self._frozen):
            return learner.forward(batch)
        codes = self._codes(TensorData(batch.x, batch.y, batch.t), learner) if batch.raw else batch.x
        h = self._decode(codes).to(learner.device)
        return learner.forward(Batch(h, batch.y, batch.t, batch.current, epoch=batch.epoch, raw=False))

    # -- a step --------------------------------------------------------------------------------------------------------

    def mix(self, batch: Batch, learner: Learner) -> Batch:
        if batch.raw:
            return batch  # the base session of a network that is learnt whole
        if batch.extra or batch.weight is not None:
            raise ConfigError("strategy chain: remind must stand first among rehearsal strategies; reorder the chain")
        streaming = len(self._memory) > 0
        h, y, t = self._decode(batch.x), batch.y, batch.t
        mixing = self.mixup > 0 and streaming and not learner.stream.task_labels and self._flat is None
        drawn = self._memory.draw(self.replay * (1 + mixing), learner.rng) if streaming and self.replay else None
        if drawn is not None:
            old = self._decode(drawn["x"])
            h, y, t = torch.cat([h, old]), torch.cat([y, drawn["y"].long()]), torch.cat([t, drawn["t"].long()])
        if self.crop < 1 and h.dim() == 4 and max(h.shape[2:]) > 1:
            h = random_resized_crop(h, learner.rng, (self.crop, 1.0))
        extra: dict[str, Tensor] = {}
        if drawn is not None and mixing:
            h, y, t, extra = self._mix_up(h, y, t, batch.current, learner)
        if streaming and batch.epoch == 0:
            self._memory.add({"x": batch.x, "y": batch.y, "t": batch.t}, learner.rng)
            self._counts += torch.bincount(batch.y, minlength=len(self._counts))
        return Batch(h, y, t, batch.current, extra=extra, epoch=batch.epoch, raw=False)

    def _mix_up(
        self, h: Tensor, y: Tensor, t: Tensor, new: int, learner: Learner
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The remembered rows' first half mixed with their second; the new rows stay as they are."""
        half = (len(h) - new) // 2
        one, two = slice(new, new + half), slice(new + half, new + 2 * half)
        share = beta(self.mixup, learner.rng)
        mixed = torch.lerp(h[two], h[one], share)
        kept = slice(0, new)
        other = torch.cat([y[kept], y[two]])
        own = torch.ones(new + half)
        own[new:] = share
        return (
            torch.cat([h[kept], mixed]),
            torch.cat([y[kept], y[one]]),
            torch.cat([t[kept], t[one]]),
            {"other": other, "share": own},
        )

    def learning_rate(self, batch: Batch, learner: Learner) -> float | None:
        if self.lr_start is None or batch.raw or not len(self._memory):
            return None
        end = self.lr_start / 100 if self.lr_end is None else self.lr_end
        gamma = (end / self.lr_start) ** (self.lr_step / self.lr_samples)
        met = self._counts[batch.y[: batch.current]]
        if batch.epoch == 0:  # these samples have just been counted
            met = met - 1
        return float((self.lr_start * gamma ** (met.clamp(min=0, max=self.lr_samples) // self.lr_step)).mean())

    @property
    def replaces_loss(self) -> bool:
        return self.mixup > 0

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        if "share" not in batch.extra:
            return loss
        # λ·CE(y₁) + (1−λ)·CE(y₂); the trainer's loss is CE(y₁).
        logits, other, share = outputs.float(), batch.extra["other"], batch.extra["share"]
        first = F.cross_entropy(logits, batch.y, reduction="none")
        second = F.cross_entropy(logits, other, reduction="none")
        return loss + learner.average(torch.where(share < 1, (1 - share) * (second - first), 0.0), batch)

    # -- state ---------------------------------------------------------------------------------------------------------

    def measures(self) -> dict[str, float]:
        """Bytes per remembered sample, samples held, and what codes lose (on held-out base samples, on the newest data).

        ``quantisation_error`` is of all power, ``quantisation_error_per_vector`` the mean over vectors: see :class:`Loss`.
        """
        found = {
            "memory_samples": float(len(self._memory)),
            "bytes_per_sample": float(self._memory.row_bytes),
            "codebook_bytes": float(self._codebook_bytes()),
        }
        for when, error in (("base", self._errors[:1]), ("newest", self._errors[-1:])):
            for power, vectors in error:
                found |= {f"quantisation_error_{when}": power, f"quantisation_error_per_vector_{when}": vectors}
        return found

    def state_dict(self) -> State:
        return {
            "quantizer": None if self._quantizer is None else self._quantizer.state_dict(),
            "memory": self._memory.state_dict(),
            "counts": self._counts,
            "errors": [list(error) for error in self._errors],
            "shape": list(self._shape),
            "frozen": self._frozen,
        }

    def load_state_dict(self, state: State) -> None:
        quantizer, memory, counts, errors, shape, frozen = (
            state[k] for k in ("quantizer", "memory", "counts", "errors", "shape", "frozen")
        )
        assert isinstance(memory, dict)
        assert isinstance(counts, Tensor)
        assert isinstance(errors, list)
        assert isinstance(shape, list)
        # Checkpoints of before know the share of all power alone.
        self._errors = [Loss(*e) if isinstance(e, list) else Loss(float(e), math.nan) for e in errors]
        self._shape, self._frozen = [int(s) for s in shape], bool(frozen)
        self._quantizer = None
        if isinstance(quantizer, dict):
            assert self.codebooks is not None
            self._quantizer = ProductQuantizer(self._shape[-1], self.codebooks, self.codebook_size)
            self._quantizer.load_state_dict(quantizer)
        self._memory = self._new_memory()  # with its budget: it may not have met a sample yet
        self._memory.load_state_dict(memory)
        self._counts = counts.clone()
        self._encoder = None
