"""The values that flow through the laboratory: tensors of an experience, a stream of experiences, a batch.

Importing this module loads torch; the command line therefore imports it only when a run starts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from cl_lab.errors import DataError

if TYPE_CHECKING:
    from cl_lab.facts import Edit
    from cl_lab.hub import Tokenizer

Objective = Literal["classification", "regression", "language"]
"""What a stream asks for: the right one of several outputs, one real number, or a text that answers a text."""
OBJECTIVES: frozenset[Objective] = frozenset({"classification", "regression", "language"})

Scoring = Literal["generation", "constrained", "first-token", "opening"]
"""How an answer in words is found: written freely, the likeliest of the task's answers, or that by its first token.

*opening* asks less: whether the likeliest of all tokens is the one that the right answer begins with.
"""
Measure = Literal["exact", "rouge-l", "f1", "first-line"]
"""What a written answer is worth: 1 where it is the right one and else 0, or how much of it is in the right one.

The latter three are :func:`cl_lab.overlap.rouge_l`, :func:`cl_lab.overlap.word_f1` and :func:`cl_lab.overlap.first_line`.
"""
_SCORES: dict[str, str] = {"exact": "accuracy", "rouge-l": "ROUGE-L", "f1": "word F1", "first-line": "accuracy"}

PAD = -1
"""What stands in a row of tokens where there is none: no vocabulary has it, so no tokenizer needs a pad token."""

State = dict[str, "Tensor | State | int | float | str | bool | list[Any] | None"]
"""What a plug-in may save: nested dictionaries of tensors and JSON values. Tensors go to safetensors, the rest to JSON."""


@dataclass(frozen=True, slots=True)
class TensorData:
    """A materialised set of labelled samples, contiguous in memory (or memory-mapped), indexed batch by batch.

    ``x`` is ``[N, ...]`` uint8 (raw pixels, scaled when a batch is prepared), int32 (tokens) or float32; ``y`` is ``[N]``
    int64, a global output index, or float32, the target of a regression; ``t`` is ``[N]`` int64, the task label (used only
    where the stream tells task labels). ``raw`` says that ``x`` is still to be scaled and normalised; a strategy that keeps
    latent codes gives them as not raw.
    """

    x: Tensor
    y: Tensor
    t: Tensor
    raw: bool = True

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.y) == len(self.t):
            raise DataError(
                f"samples, labels and task labels differ in number: {len(self.x)}, {len(self.y)}, {len(self.t)}"
            )
        if self.y.dtype not in (torch.int64, torch.float32) or self.t.dtype != torch.int64:
            raise DataError(
                f"labels must be int64 (float32: targets of a regression), got {self.y.dtype} and {self.t.dtype}"
            )

    def __len__(self) -> int:
        return len(self.y)

    @property
    def nbytes(self) -> int:
        """Bytes held by the three tensors."""
        return sum(v.numel() * v.element_size() for v in (self.x, self.y, self.t))

    def take(self, index: Tensor) -> TensorData:
        """The rows named by an int64 ``index``, as new contiguous tensors."""
        return self.map(lambda v: v.index_select(0, index))

    def map(self, rows: Callable[[Tensor], Tensor]) -> TensorData:
        """The set whose three tensors are ``rows`` of these."""
        return TensorData(rows(self.x), rows(self.y), rows(self.t), self.raw)

    def batch(self, index: Tensor, epoch: int = 0) -> Batch:
        """The rows named by an int64 ``index``, as a :class:`Batch` of current samples."""
        # index_select copies whole rows: ten times faster here than indexing with a tensor.
        x, y, t = (v.index_select(0, index) for v in (self.x, self.y, self.t))
        return Batch(x, y, t, current=len(index), epoch=epoch, raw=self.raw)

    @staticmethod
    def concat(parts: Sequence[TensorData]) -> TensorData:
        """All rows of ``parts`` in order; their samples must have one shape and dtype."""
        if len(parts) == 1:
            return parts[0]
        if len({p.raw for p in parts}) > 1:
            raise DataError("raw samples and latent codes cannot be put into one set; encode all of them")
        x, y, t = (torch.cat([getattr(p, name) for p in parts]) for name in ("x", "y", "t"))
        return TensorData(x, y, t, parts[0].raw)

    def digest(self, most: int | None = None) -> str:
        """SHA-256 over shapes, dtypes and bytes: two equal digests mean equal data.

        With ``most``, no more than about so many bytes of ``x`` are read, in evenly spaced rows.
        """
        every = 1 if most is None else max(1, math.ceil(self.x.numel() * self.x.element_size() / most))
        sha = hashlib.sha256()
        for v, rows in ((self.x, self.x[::every]), (self.y, self.y), (self.t, self.t)):
            sha.update(f"{tuple(v.shape)}{v.dtype}".encode())
            sha.update(rows.contiguous().numpy().data.cast("B"))
        return sha.hexdigest()


class FlatLatent(NamedTuple):
    """Latents in flat rows ``[B, R·size + R·marks + beside]``: any number R of vectors, then whole numbers below 256.

    Of those numbers ``marks`` go with each vector (whether there is a token) and ``beside`` with all of them (a question).
    """

    size: int
    marks: int = 0
    beside: int = 0

    def rows(self, length: int) -> int:
        """R in a flat row of ``length`` numbers."""
        return (length - self.beside) // (self.size + self.marks)


@dataclass(slots=True)
class Batch:
    """Rows to train on: the first ``current`` come from the present experience, the rest were rehearsed by strategies.

    ``weight`` is ``[B]`` float32 and makes the loss ``Σ wᵢ ℓᵢ``; ``None`` means the mean. ``extra`` holds further tensors
    with one row per sample (stored logits, say), in step with ``x``. ``epoch`` counts the passes over the current
    experience, from 0. ``raw`` is that of :class:`TensorData`: ``x`` is scaled and normalised before the model sees it.
    """

    x: Tensor
    y: Tensor
    t: Tensor
    current: int
    weight: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    raw: bool = True

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> Batch:
        """The same rows on ``device``."""
        if self.x.device == device:
            return self
        return Batch(
            self.x.to(device, non_blocking=True),
            self.y.to(device, non_blocking=True),
            self.t.to(device, non_blocking=True),
            self.current,
            None if self.weight is None else self.weight.to(device, non_blocking=True),
            {k: v.to(device, non_blocking=True) for k, v in self.extra.items()},
            self.epoch,
            self.raw,
        )

    def rows(self, index: Tensor, weight: Tensor | None) -> Batch:
        """The rows named by an increasing int64 ``index``, with new loss weights."""
        return Batch(
            self.x.index_select(0, index),
            self.y.index_select(0, index),
            self.t.index_select(0, index),
            int((index < self.current).sum()),
            weight,
            {k: v.index_select(0, index) for k, v in self.extra.items()},
            self.epoch,
            self.raw,
        )


class Experience:
    """One step of a stream: what is learnt now and what it is tested on.

    ``ordered`` says that the order of the training rows is the stream's own and is kept; otherwise they are shuffled.
    ``groups`` ``[N]`` int64 tells which of the N test rows belong together, as questions about one person do: who divides a
    test set keeps them on one side. ``None``: each row stands alone. ``edits`` are the facts behind the training rows, in
    their order, where the stream is one of edits.

    The tensors are made on first use and kept until :meth:`release`, so a long stream need not sit in memory at once.
    """

    def __init__(
        self,
        index: int,
        name: str,
        classes: Sequence[int],
        train: Callable[[], TensorData],
        test: Callable[[], TensorData],
        *,
        ordered: bool = False,
        groups: Tensor | None = None,
        edits: Sequence[Edit] = (),
    ) -> None:
        if not classes:
            raise DataError(f"experience {index} ('{name}') has no classes; check the split of the scenario")
        self.index = index
        self.name = name
        self.ordered = ordered
        self.groups = groups
        self.edits = tuple(edits)
        self.classes = tuple(sorted(int(c) for c in classes))
        self._makers = {"train": train, "test": test}
        self._made: dict[str, TensorData] = {}

    def _part(self, part: str) -> TensorData:
        if part not in self._made:
            data = self._makers[part]()
            if len(data) == 0:
                raise DataError(
                    f"experience {self.index} ('{self.name}') has no {part} samples; check the scenario's split"
                )
            self._made[part] = data
        return self._made[part]

    @property
    def train(self) -> TensorData:
        """Samples to learn from."""
        return self._part("train")

    @property
    def test(self) -> TensorData:
        """Held-out samples of the same experience; never used to choose anything."""
        return self._part("test")

    def release(self) -> None:
        """Forget the training tensors (they are made again on the next use)."""
        self._made.pop("train", None)

    def __repr__(self) -> str:
        return f"Experience({self.index}, {self.name!r}, classes={self.classes})"


@dataclass(frozen=True)
class Stream:
    """A finite stream of experiences and what a model must know to face it.

    ``input_shape`` is one sample's shape, without the batch axis. ``n_classes`` counts the outputs over the whole stream:
    labels are global output indices, so task-incremental streams own disjoint outputs per task. ``task_labels`` says
    whether the model is told each sample's task at training and test: ``t`` is then the index of that task's experience;
    ``boundaries`` whether strategies are told where one experience ends; ``online`` that each sample is seen once. ``mean``
    and ``std`` (per channel, of inputs scaled to [0, 1]) normalise the input; ``None`` leaves it in [0, 1].

    Where a sample is flat but made of parts (a picture and a question), ``layout`` names them with their shapes, in order.

    A stream whose ``objective`` is regression has float32 targets, one output (``n_classes = 1``, the one class 0 in every
    experience) and no task labels; it is learnt by squared error.

    In a stream whose ``objective`` is language a sample is a row of int32 tokens: ``layout`` has a ``prompt``, which ends at
    its right edge, and behind it an ``answer``, which begins at its left edge; :data:`PAD` fills the rest. ``answers``
    ``[n_classes, longest]`` int64 holds every answer of the stream, each ended by the end-of-text token, then :data:`PAD`; a
    label is a row of it, and an experience's classes are the answers of its task. Only the answer is learnt; ``scoring``
    says how the model's own is found on test sets. ``t`` is the index of the experience a sample comes from. Texts to be
    read rather than answered are answers, too, behind a prompt that holds nothing but the end-of-text token.
    ``vocabulary`` is one more than the highest token that may come, where that is known, and ``tokenizer`` what made them.

    Where ``measures`` says, by experience, how written answers are compared (empty: all exactly), ``references`` has the
    right text for each row of ``answers``, whole where the row was cut; it needs the ``tokenizer``.

    ``asides`` are other questions, by what they ask, which are scored before training and after the last experience. Their
    answers are rows of ``answers``, too, and classes of their own streams' experiences.
    """

    name: str
    experiences: tuple[Experience, ...]
    input_shape: tuple[int, ...]
    n_classes: int
    task_labels: bool = False
    boundaries: bool = True
    online: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    objective: Objective = "classification"
    layout: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    answers: Tensor | None = None
    scoring: Scoring = "generation"
    vocabulary: int | None = None
    tokenizer: Tokenizer | None = None
    measures: tuple[Measure, ...] = ()
    references: tuple[str, ...] = ()
    asides: Mapping[str, Aside] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = sum(math.prod(shape) for shape in self.layout.values())
        # The latents of a text are no tokens any more, but its prompt and answer stay where they are.
        if self.layout and self.input_shape != (parts,) and self.objective != "language":
            raise DataError(
                f"stream '{self.name}' lays a sample out as {dict(self.layout)}, {parts} values, but one is "
                f"{list(self.input_shape)}"
            )
        if self.objective == "regression" and (self.n_classes != 1 or self.task_labels):
            raise DataError(
                f"stream '{self.name}' is a regression with n_classes={self.n_classes}, task_labels={self.task_labels}; "
                "a regression has one output and no task labels"
            )
        if self.objective == "language":
            self._check_language()

    def _check_language(self) -> None:
        if self.answers is None or list(self.layout) != ["prompt", "answer"]:
            raise DataError(
                f"stream '{self.name}' has language as its objective, but layout {list(self.layout)} and "
                f"{'no ' if self.answers is None else ''}answers; it needs prompt and answer, and the table of answers"
            )
        if self.answers.shape != (self.n_classes, *self.layout["answer"]):
            raise DataError(
                f"stream '{self.name}' has {self.n_classes} answers of up to {self.layout['answer'][0]} tokens, but its "
                f"table is {list(self.answers.shape)}"
            )
        if self.measures and not (
            len(self.measures) == len(self.experiences)
            and len(self.references) == self.n_classes
            and self.tokenizer is not None
            and self.scoring == "generation"
        ):
            raise DataError(
                f"stream '{self.name}' has {len(self.measures)} measures for {len(self.experiences)} experiences, "
                f"{len(self.references)} reference texts for {self.n_classes} answers, "
                f"{'no' if self.tokenizer is None else 'a'} tokenizer and scoring '{self.scoring}'; to compare written "
                "texts it needs one for each, a tokenizer, and generation"
            )
        if self.scoring == "first-token":
            for e in self.experiences:
                first = self.answers[list(e.classes), 0]
                if len(first.unique()) < len(first):
                    raise DataError(
                        f"scoring 'first-token': answers of '{e.name}' begin with the same token; take 'constrained'"
                    )

    def __len__(self) -> int:
        return len(self.experiences)

    @cached_property
    def openings(self) -> Tensor:
        """How many tokens each of ``answers`` takes to say something, int64 ``[n_classes]``: some begin with a blank."""
        assert self.answers is not None
        found = []
        for row in self.answers.tolist():
            tokens = [token for token in row if token != PAD]
            some = range(1, len(tokens)) if self.tokenizer is not None else ()
            found.append(next((n for n in some if self._says(tokens[:n])), max(1, len(some))))
        return torch.tensor(found)

    def _says(self, tokens: list[int]) -> bool:
        return self.tokenizer is not None and bool(self.tokenizer.decode(tokens).strip())

    @property
    def score(self) -> str:
        """What the score matrix holds: the ``accuracy``, or the ``negative squared error``, so that higher is better.

        Of texts that are compared, ``ROUGE-L`` or ``word F1``; ``answer score`` where experiences differ in that.
        """
        if self.objective == "regression":
            return "negative squared error"
        names = {_SCORES[m] for m in self.measures} or {"accuracy"}
        return names.pop() if len(names) == 1 else "answer score"

    @property
    def tells_task(self) -> bool:
        """Whether ``t`` is the task of a sample, also at test time: of a text it always is."""
        return self.task_labels or self.objective == "language"

    @property
    def reads_on(self) -> bool:
        """Whether answers are found by reading on from tokens of the answer, not by what follows the prompt alone."""
        return self.objective == "language" and self.scoring in ("generation", "constrained")

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing: one in all outputs, or one in a task's own where the task is told.

        ``None`` for a regression and where any token may be said, as guessing has no score of its own there.
        """
        language = self.objective == "language"
        if self.objective == "regression" or (language and self.scoring in ("generation", "opening")):
            return None
        if not (self.task_labels or language):  # of texts the likeliest of the task's answers is taken
            return 1 / self.n_classes
        return sum(1 / len(e.classes) for e in self.experiences) / len(self.experiences)

    def fingerprint(self) -> str:
        """SHA-256 over every test set and the classes of every experience: names the data a matrix was measured on.

        With what answers are compared to, where they are.
        """
        sha = hashlib.sha256()
        for e in self.experiences:
            sha.update(f"{e.index}{e.classes}".encode())
            sha.update(e.test.digest().encode())
        if self.measures:
            sha.update(repr((self.measures, self.references)).encode("utf-8", "surrogatepass"))
        for name, aside in self.asides.items():
            sha.update(f"{name}{aside.stream.scoring}{aside.questions.digest()}".encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class Aside:
    """Questions that are asked beside a stream and never learnt, about any of its experiences (``questions.t``).

    ``stream`` says how their answers are found and which an experience has: that beside which they are asked, but for these.
    ``make`` gives the questions, when they are first wanted.
    """

    stream: Stream
    make: Callable[[], TensorData]

    @cached_property
    def questions(self) -> TensorData:
        """Samples of the stream's shape. Raises :class:`DataError` for none, or others."""
        data, experiences = self.make(), len(self.stream)
        shape, wanted = list(data.x.shape[1:]), list(self.stream.input_shape)
        if not len(data) or shape != wanted or not bool(((data.t >= 0) & (data.t < experiences)).all()):
            raise DataError(
                f"stream '{self.stream.name}' has {experiences} experiences of samples {wanted}, but an aside asks "
                f"{len(data)} samples {shape} of experiences {sorted(set(data.t.tolist()))}; make them alike"
            )
        return data
