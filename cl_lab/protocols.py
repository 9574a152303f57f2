"""What a plug-in is: the narrow contracts between the core and every strategy, scenario, model and editor.

A plug-in is a dataclass. Public fields are its knobs (see :mod:`cl_lab.knobs`), underscored fields its state. It gets
values and returns values; it never assigns to its host, never steps the optimiser, never replaces a loader.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cl_lab.adapters import LowRank, low_rank
from cl_lab.records import Batch, Experience, Objective, State, Stream, TensorData

if TYPE_CHECKING:
    from cl_lab.editable import EditableModel
    from cl_lab.facts import Edit
    from cl_lab.patches import Patch


class Learner(Protocol):
    """The view of model and engine that a strategy gets; the same under plain torch, DDP and DeepSpeed ZeRO 0–3.

    Parameters and gradients appear by name, for trainable parameters only. What a strategy computes from them must be
    elementwise in the parameter, so that the engine may hand out full tensors or local shards alike.
    """

    @property
    def device(self) -> torch.device:
        """Where batches and parameters live."""
        ...

    @property
    def rng(self) -> torch.Generator:
        """The generator every strategy draws from: CPU, seeded by the run, equal on all ranks, saved in checkpoints."""
        ...

    @property
    def stream(self) -> Stream:
        """The stream being learnt. Only strategies marked ``reference`` may look at experiences other than their own."""
        ...

    @property
    def augments(self) -> bool:
        """Whether samples of the current experience are changed at random whenever they are trained on."""
        ...

    @property
    def training_batch_size(self) -> int:
        """Samples of the current experience per optimiser step, over all ranks."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate of the present step."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[B, n_classes]`` of the wrapped model, with gradients; impossible outputs hold ``-inf``."""
        ...

    def features(self, batch: Batch) -> Tensor:
        """Penultimate features ``[B, d]`` of the wrapped model, with gradients: what its head sees.

        For the very batch that :meth:`forward` saw last, and a strategy marked ``uses_features``, they come from that
        pass at no cost. Raises :class:`~cl_lab.errors.ConfigError` for a model that is not a backbone and a head.
        """
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The training loss of ``outputs``: cross-entropy per sample, brought together by :meth:`average`.

        Where the stream is a regression, the squared error per sample.
        """
        ...

    def average(self, values: Tensor, batch: Batch) -> Tensor:
        """``Σ wᵢ vᵢ`` of per-sample ``values`` ``[B]``: the mean where ``batch.weight`` is ``None``.

        Terms made this way add up right over ranks and over pieces of an accumulated batch.
        """
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters by name, detached, in fp32 where the engine keeps such a copy."""
        ...

    def gradients(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Gradients by name, averaged over ranks; changes made in place inside the context reach the optimiser."""
        ...

    def gradients_of(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients by name of :meth:`loss` on a global ``batch`` (the same on every rank), averaged over ranks.

        Nothing is accumulated, and the gradients of the step in progress stay as they are. The model stays in its mode, so
        while it trains batch normalisation uses the statistics of each rank's rows; running statistics do not move.
        """
        ...

    def replica(self) -> nn.Module:
        """A plain copy of the model in evaluation mode on :attr:`device`, free to run backward through (Fisher, MAS, …)."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that :meth:`forward` computes in, for passes of a :meth:`replica` that stand beside its own."""
        ...

    def refresh(self, replica: nn.Module) -> None:
        """Bring a :meth:`replica` up to date in place."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, full, as copies on the CPU."""
        ...

    def set_weights(self, weights: State) -> None:
        """Take over what :meth:`weights` gave; the optimiser keeps its state. Call it between experiences."""
        ...

    def prepare_input(self, x: Tensor) -> Tensor:
        """Raw samples as the model wants them: float32 on :attr:`device`, scaled and normalised."""
        ...

    def freeze(self, patterns: Sequence[str]) -> list[str]:
        """Stop training all parameters under the modules that match, by path structure; returns their names.

        Takes effect at once, so it is called between experiences. Raises :class:`~cl_lab.errors.ConfigError` where a
        pattern matches nothing.
        """
        ...

    def reduce(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over ranks."""
        ...

    def shard(self, data: TensorData) -> TensorData:
        """This rank's rows of ``data`` (all of them with one process)."""
        ...

    def shard_rows(self, values: Tensor) -> Tensor:
        """This rank's rows of a tensor that goes with the data given to :meth:`shard`."""
        ...


@dataclass
class Strategy:
    """A way to learn a stream without forgetting it. Every hook does nothing unless overridden.

    Order within a run: :meth:`prepare` and :meth:`prepared`; then per experience :meth:`before_experience`,
    :meth:`training_set`, and per step :meth:`mix` → :meth:`learning_rate` → forward → loss → :meth:`adjust_loss` → backward
    → :meth:`observe_outputs` → :meth:`adjust_gradients` → optimiser → :meth:`after_step`; then :meth:`after_experience`.
    Where the stream hides its boundaries, :meth:`before_experience` and :meth:`after_experience` are not called and
    :meth:`training_set` is not asked, unless the strategy :attr:`learns_when_asked`. Test sets go through :meth:`encode`
    and :meth:`predict`.
    """

    needs_boundaries: ClassVar[bool] = False
    """Refuse streams that do not say where an experience ends."""
    learns_when_asked: ClassVar[bool] = False
    """Learns anew from what it keeps whenever it is to be scored, and from nothing else: so it needs no boundaries beside
    these moments, may pass over it as often as it likes where a stream shows each sample once, and stands alone."""
    gathers: ClassVar[bool] = False
    """Its :meth:`training_set` brings samples of several experiences together: they are shuffled, whatever order the
    stream has."""
    reference: ClassVar[bool] = False
    """Sees more than a continual learner may (joint, cumulative): an upper bound, marked so in reports."""
    uses_features: ClassVar[bool] = False
    """Wants :meth:`Learner.features` of the training pass itself."""
    whole_parameters: ClassVar[bool] = False
    """Calls parts of the model on its own, so it cannot run where parameters are sharded (ZeRO 3)."""
    trained_by_steps: ClassVar[bool] = True
    """The trainer's steps are what changes the model's weights: not of an editor, which lays patches."""
    task_conditioned: ClassVar[bool] = False
    """Needs the task label of every sample, also at test time: refuses streams that do not tell it."""
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification"})
    """What it can learn: refuses streams of another objective. Say regression too where no class is looked at."""
    instead: ClassVar[Mapping[Objective, str]] = {}
    """Which strategy does the like for another objective, for the message of that refusal."""
    renews_parameters: ClassVar[bool] = False
    """Begins trained parameters anew with each experience, and keeps what they were beside the model."""
    remembers_parameters: ClassVar[bool] = False
    """Holds parameters against what the same ones were before: of use to nobody beside one that renews them."""

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        """Knobs under which the conformance suite can run this strategy on a toy stream and an MLP."""
        return {}

    @property
    def replaces_loss(self) -> bool:
        """Whether :meth:`adjust_loss` takes the training loss of some rows away to put another in its place.

        In a chain only one may, and it comes first: what others have scaled could not be taken away.
        """
        return False

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        """Change the model before the engine wraps it (adapters, splitting); returns the model to train."""
        return model

    def prepared(self, model: nn.Module) -> None:
        """Look at the model once every strategy of the chain has prepared it; nothing may change any more."""

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        """A new experience begins."""

    def training_set(self, experience: Experience, learner: Learner) -> TensorData | None:
        """The samples to iterate over in this experience; ``None`` skips its training.

        Called again on resume, so it must give the same rows for the same state.
        """
        return experience.train

    def budget(self, experience: Experience, learner: Learner) -> int:
        """How many experiences' worth of ``training.iterations`` this experience gets."""
        return 1

    def mix(self, batch: Batch, learner: Learner) -> Batch | None:
        """Rehearsal: the batch to train on. Sees the global batch, the same on every rank. ``None``: take no step."""
        return batch

    def learning_rate(self, batch: Batch, learner: Learner) -> float | None:
        """The learning rate for the batch that :meth:`mix` gave; ``None`` leaves it to ``training``."""
        return None

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        """Add terms that need the graph (distillation, margins), or put others in its place (:attr:`replaces_loss`)."""
        return loss

    def observe_outputs(self, batch: Batch, outputs: Tensor, learner: Learner) -> None:
        """The step's global batch and its detached logits ``[B, n_classes]``, the same on every rank, before the step."""

    def adjust_gradients(self, learner: Learner) -> None:
        """Between backward and step: add an analytic penalty's gradient, mask or project."""

    def after_step(self, learner: Learner) -> None:
        """The optimiser has stepped."""

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        """The experience has been learnt; consolidate."""

    def encoding(self) -> Hashable:
        """Names what :meth:`encode` does at present; test sets are encoded once for each. ``None``: it does nothing."""
        return None

    def encode(self, data: TensorData, learner: Learner) -> TensorData:
        """A test set as :meth:`predict` (or the model) wants it, for work done once per sample: frozen layers, codes."""
        return data

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        """Scores ``[B, n_classes]`` whose highest is the answer; by default the model's logits. Without gradients."""
        return learner.forward(batch)

    def other_answers(self, learner: Learner) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Further ways to answer than :meth:`predict`, by name, each giving scores as it does (fast weights beside slow).

        After each experience every test set met so far is scored with each of them, too, for the measures; no model is
        swapped and nothing drawn, so training goes on as without. The names must be the same on every rank.
        """
        return {}

    def adapters(self, learner: Learner) -> dict[str, LowRank]:
        """The low-rank adapters with which the model answers as :meth:`predict` does, by path of the layer; for export.

        By default those in the model itself; of a model that has none, an empty dictionary.
        """
        return low_rank(learner.replica())

    def penalty(self, learner: Learner) -> float:
        """The value of the analytic penalty whose gradient :meth:`adjust_gradients` adds, for the log."""
        return 0.0

    def measures(self) -> dict[str, float]:
        """Numbers of the method's own to record after each experience (bytes per sample, share of projected steps)."""
        return {}

    def state_dict(self) -> State:
        """All that :meth:`load_state_dict` needs to go on as if never stopped."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave."""


@dataclass
class Scenario:
    """A recipe for a stream. Knobs are its public fields; :meth:`stream` makes the experiences."""

    argument: ClassVar[str | None] = None
    """The knob that ``name: plugin:value`` sets (``avalanche:SplitOmniglot`` sets ``benchmark``)."""
    memorised: ClassVar[bool] = False
    """Some experiences are tested on their own training samples, all of them, because memory is what they measure."""

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """Knobs for the conformance suite; ``None`` where no offline data can be made up for it."""
        return {}

    def stream(self, seed: int) -> Stream:
        """The stream for one seed: equal seeds give equal streams, on any machine."""
        raise NotImplementedError


@dataclass
class ModelSpec:
    """A recipe for a classifier. Knobs are its public fields; :meth:`build` makes the module.

    The module takes ``(x, t)``, ``x`` ``[B, *input_shape]`` float32 and ``t`` ``[B]`` int64, and returns logits
    ``[B, n_classes]``; where the stream is a regression, ``[B, 1]`` predictions.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    """What a sample must be made of (names of :attr:`Stream.layout <cl_lab.records.Stream>`); empty: one tensor."""

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        """Knobs under which the conformance suite can build this model on a machine that has no weights."""
        return {}

    def build(self, stream: Stream) -> nn.Module:
        """A freshly initialised model for ``stream``, drawn from torch's global generator."""
        raise NotImplementedError


@dataclass
class Editor:
    """A way to correct facts in a language model. Knobs are its public fields; what it learnt before lies in the patches."""

    removable: ClassVar[bool] = False
    """Whether taking one patch away leaves the answers of all others as they were."""
    folds: ClassVar[bool] = False
    """Whether its patches are changes of weights, so that an edited model can be saved as a plain one."""
    routes_once: ClassVar[bool] = True
    """Whether it is decided once, by the prompt alone, whether a patch answers; an answer given beforehand says nothing."""
    by_subject: ClassVar[bool] = False
    """Whether it writes at the subject's last token: an edit must name its subject as it stands in the prompt."""

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        """Knobs under which the conformance suite can edit a tiny random model."""
        return {}

    def check(self, model: EditableModel) -> None:
        """Raise :class:`~cl_lab.errors.ConfigError` where a knob names what ``model`` has not: before any edit is made."""

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        """The patch that makes ``edits`` true in ``model``, on top of those that it has; the model is left as it was.

        ``earlier`` are the edits behind the model's patches, oldest first, as far as they are known: an editor may rehearse
        them. Raises :class:`~cl_lab.errors.EditError` where the edit cannot be made.
        """
        raise NotImplementedError


def tensors_of(state: State) -> Iterator[Tensor]:
    """Every tensor in a (nested) state."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_of(value)


def state_bytes(state: State) -> int:
    """Bytes held by the tensors of a state."""
    return sum(v.numel() * v.element_size() for v in tensors_of(state))
