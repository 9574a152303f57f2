"""What all image streams have in common: the plan of an experience, its tensors, and knobs that fit every stream.

A stream is planned as row numbers of a set; each experience indexes (and permutes, rotates, pads) its images when it is
first used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Scenario
from cl_lab.records import Experience, Stream, TensorData
from cl_lab.seeding import generator

from . import _avalanche, _orders, _sources
from ._sources import ImageSet

Incremental = Literal["class", "task", "domain"]


# -- what an experience is made of ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Again:
    """Training samples of earlier experiences that come again: whose, which rows, and where all rows are put."""

    parts: tuple[tuple[_Plan, Tensor], ...]
    order: Tensor


@dataclass(frozen=True)
class _Plan:
    """One experience before its tensors exist: which rows, which output each class has, what happens to the pixels.

    ``rows`` holds int64 row numbers per part, ``outputs`` int64 ``[n_classes]`` maps a class of the set to an output
    (−1: not here), ``transform`` maps uint8 ``[N, C, H, W]`` to the same shape and dtype. ``pieces`` is the number of
    experiences that are still to be cut from this one; ``ordered`` says that the order of the training rows is kept.
    """

    name: str
    rows: _avalanche.Rows
    outputs: Tensor
    task: int = 0
    transform: Callable[[Tensor], Tensor] | None = None
    pieces: int = 1
    again: _Again | None = None
    ordered: bool = False

    def classes(self, images: ImageSet) -> list[int]:
        """The outputs that its labels can be."""
        found = [self.outputs]
        if self.again is not None:
            found += [plan.outputs[images.train_y[rows]] for plan, rows in self.again.parts]
        outputs: list[int] = torch.cat(found).unique().tolist()
        return [c for c in outputs if c >= 0]


def _materialise(images: ImageSet, part: str, plan: _Plan, pad: int) -> TensorData:
    """The tensors of one part of an experience: one indexing of the set, then padding and the transform."""
    rows = plan.rows[part]
    x, y = (images.train_x, images.train_y) if part == "train" else (images.test_x, images.test_y)
    if not _is_all(rows, len(x)):
        x, y = x[rows], y[rows]
    if pad:
        x = functional.pad(x, (pad,) * 4)
    if plan.transform is not None:
        x = plan.transform(x)
    return TensorData(x, plan.outputs[y], torch.full_like(y, plan.task))


def _training_set(images: ImageSet, plan: _Plan, pad: int) -> TensorData:
    """The training tensors of an experience, what comes again among its own."""
    own = _materialise(images, "train", plan, pad)
    if plan.again is None:
        return own
    past = [_materialise(images, "train", replace(p, rows={"train": rows}), pad) for p, rows in plan.again.parts]
    return TensorData.concat([own, *past]).take(plan.again.order)


def _filtered(plan: _Plan, part: str, keep: Tensor) -> _Plan:
    """``plan`` with those rows of ``part`` for which ``keep`` (bool, one per sample of the set) says so."""
    rows = plan.rows[part]
    return replace(plan, rows={**plan.rows, part: rows[keep[rows]]})


def _is_all(rows: Tensor, length: int) -> bool:
    # Then the set itself serves: no copy, and a memory-mapped set stays on disk.
    return len(rows) == length and bool((rows == torch.arange(length)).all())


# -- the scenarios' common part ------------------------------------------------------------------------------------


@dataclass
class _Images(Scenario):
    """Knobs and steps that all image streams share; a subclass says with :meth:`_plan` what the experiences hold."""

    experiences: int = knob(5, "number of experiences; 1 is the joint stream", ge=1)
    incremental: Incremental = knob(
        "class",
        "class: new outputs, task unknown; task: new outputs, task label told; domain: the same outputs throughout",
    )
    online: bool = knob(False, "one pass: each sample is seen once")
    boundaries: bool | None = knob(None, "tell strategies where an experience ends; null: unless online")
    order_seed: int | None = knob(
        None, "seed of the order of classes and samples, permutations, drawn angles; null: the run's seed", ge=0
    )
    pad: int = knob(0, "zero pixels added on each side (2 makes MNIST 32×32, as in van de Ven's permuted MNIST)", ge=0)
    train_limit: int | None = knob(None, "training samples per experience, drawn by class with the run's seed", ge=1)
    test_limit: int | None = knob(None, "test samples per experience, drawn by class; the same for every seed", ge=1)
    holdout: float | None = knob(
        None,
        "share of each class's training images that stand in for the test images, which are then not used: the stream to "
        "choose settings on; the same share for every seed",
        gt=0,
        lt=1,
    )
    normalise: bool = knob(False, "scale inputs by mean and standard deviation of the training pixels")
    revisit: Literal["none", "power", "exponential", "uniform"] = knob(
        "none",
        "training samples of earlier experiences come again: in the k-th, those of the j-th in proportion to "
        "(k−j+1)^−a (power), e^−b(k−j) (exponential) or equally (Gandhi et al. 2024)",
    )
    revisit_exponent: float = knob(1.0, "a of the power law, or b of the exponential one", ge=0)
    revisit_share: float = knob(
        0.5, "share of an experience's training samples that have come before, added to its own", gt=0, lt=1
    )
    data_dir: str | None = knob(
        None, "folder searched first; then $CL_LAB_DATA, ~/.cache/cl-lab/data ($CL_LAB_CACHE), /usr/share/datasets"
    )

    source: ClassVar[str]
    """The data set's name in :data:`scenarios._sources.SOURCES`."""

    def __post_init__(self) -> None:
        for name, why in self._complaints():
            raise ConfigError(f"{name} = {getattr(self, name)!r}: {why}")

    def _complaints(self) -> Iterator[tuple[str, str]]:
        """Knobs whose value makes no sense beside the others, and why."""
        if self.revisit == "none":
            return
        if self.incremental == "task":
            yield (
                "revisit",
                "an experience would hold other tasks' samples (incremental = 'task'); use incremental=class or domain",
            )
        if self.experiences == 1:
            yield "revisit", "with experiences = 1 there is nothing to come back to; raise experiences"

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """``None``: the images are not made up, and a machine need not have them."""
        return None

    @classmethod
    def find(cls) -> Path | None:
        """The folder that holds the set; ``None`` where each configuration names its own.

        Raises :class:`~cl_lab.errors.DataError` where it is nowhere.
        """
        return _sources.find(cls.source) if cls.source in _sources.SOURCES else None

    @classmethod
    def fetch(cls, root: Path | None = None) -> Path:
        """Download the set below ``root`` (default: the user's cache) where scenarios find it; returns the folder.

        Raises :class:`~cl_lab.errors.DataError` on one line when the download fails.
        """
        from ._cache import data_root

        return _sources.fetch(cls.source, data_root() if root is None else Path(root))

    def images(self) -> ImageSet:
        """The whole set. Raises :class:`~cl_lab.errors.DataError` where it is absent or damaged."""
        return _sources.load(self.source, self.data_dir)

    def stream(self, seed: int) -> Stream:
        """The stream for one seed; see :class:`~cl_lab.protocols.Scenario`.

        Samples are uint8 ``[C, H, W]``. Raises :class:`~cl_lab.errors.ConfigError` for knobs that do not fit the set
        and :class:`~cl_lab.errors.DataError` for absent or damaged data.
        """
        images = whole = self.images()
        order_seed = seed if self.order_seed is None else self.order_seed
        held = None if self.holdout is None else self._held(images, self.holdout)
        if held is not None:
            images = replace(
                images, test_x=images.train_x, test_y=images.train_y, test_domain=images.train_domain
            )  # the rows below keep the two parts apart
        plans = self._plan(images, order_seed)
        if held is not None:
            plans = [_filtered(plan, "train", ~held) for plan in plans]
        plans = [self._limited(images, plan, i, seed) for i, plan in enumerate(plans)]
        plans = self._arranged(images, plans, order_seed, seed)
        plans = self._revisited(plans, seed)
        tests = self._limited_tests(images, plans, held)
        plans = [replace(p, rows={**p.rows, "test": tests[id(p.rows["test"])]}) for p in plans]
        channels, height, width = images.train_x.shape[1:]
        told = self.incremental == "task"
        if told:
            labels = {"train": images.train_y, "test": images.test_y}
            tasks = _avalanche.task_labels(labels, [p.rows for p in plans])
        experiences = []
        test_makers: dict[tuple[int, ...], Callable[[], TensorData]] = {}
        for i, plan in enumerate(plans):
            plan = replace(plan, task=tasks[i]) if told else plan
            # Experiences that share a test set share its tensors, too.
            key = (id(plan.rows["test"]),) if plan.transform is None and not told else (i, -1)
            test = test_makers.setdefault(
                key, functools.cache(functools.partial(_materialise, images, "test", plan, self.pad))
            )
            train = functools.partial(_training_set, images, plan, self.pad)
            made = Experience(
                i, plan.name, plan.classes(images), train, test, ordered=plan.ordered and plan.again is None
            )
            experiences.append(made)
        return Stream(
            name=type(self).__name__,
            experiences=tuple(experiences),
            input_shape=(channels, height + 2 * self.pad, width + 2 * self.pad),
            n_classes=1 + max(e.classes[-1] for e in experiences),
            task_labels=told,
            boundaries=not self.online if self.boundaries is None else self.boundaries,
            online=self.online,
            mean=whole.mean if self.normalise else None,  # counted once for a set, with or without a hold-out
            std=whole.std if self.normalise else None,
        )

    def _plan(self, images: ImageSet, order_seed: int) -> list[_Plan]:
        """The experiences, in order, with all their rows."""
        raise NotImplementedError

    def _arranged(self, images: ImageSet, plans: list[_Plan], order_seed: int, seed: int) -> list[_Plan]:
        """What is done with the rows that ``train_limit`` has left: thinned, ordered, cut, exchanged."""
        return plans

    def _limited(self, images: ImageSet, plan: _Plan, index: int, seed: int) -> _Plan:
        if self.train_limit is None:
            return plan
        rows, rng = plan.rows["train"], generator(seed, "train_limit", index)
        rows = _orders.limit_rows(rows, images.train_y[rows], self.train_limit * plan.pieces, rng)
        return replace(plan, rows={**plan.rows, "train": rows})

    def _held(self, images: ImageSet, share: float) -> Tensor:
        """Which training images stand in for the test images: bool ``[N]``, at least one of each class."""
        y = images.train_y
        counts = (torch.bincount(y, minlength=images.n_classes) * share).round().long().clamp(min=1)
        held = torch.zeros(len(y), dtype=torch.bool)
        # Every seed is measured on the same samples.
        held[_orders.keep_counts(torch.arange(len(y)), y, counts, generator(0, "holdout"))] = True
        return held

    def _limited_tests(self, images: ImageSet, plans: list[_Plan], held: Tensor | None) -> dict[int, Tensor]:
        """The test rows by the identity of those in the plans: what was shared stays shared."""
        tests = {id(p.rows["test"]): p.rows["test"] for p in plans}
        if held is not None:
            tests = {key: rows[held[rows]] for key, rows in tests.items()}
        if self.test_limit is None:
            return tests
        return {
            # Every seed is measured on the same samples.
            key: _orders.limit_rows(rows, images.test_y[rows], self.test_limit, generator(0, "test_limit"))
            for key, rows in tests.items()
        }

    def _revisited(self, plans: list[_Plan], seed: int) -> list[_Plan]:
        """Each plan with the samples that come again in it.

        Experience ``k`` with ``n`` samples of its own gets ``n·s/(1−s)`` more, whichever the law, so that they are the
        share ``s`` of the whole; the law divides them among the earlier ones, and largest remainders round.
        """
        if self.revisit == "none":
            return plans
        found = plans[:1]
        for k in range(1, len(plans)):
            own = len(plans[k].rows["train"])
            budget = round(own * self.revisit_share / (1 - self.revisit_share))
            weights = _orders.revisit_weights(self.revisit, self.revisit_exponent, k)
            parts = []
            for j, count in enumerate(_orders.largest_remainder(weights, budget)):
                if count:
                    rows = plans[j].rows["train"]
                    parts.append(
                        (plans[j], rows[_orders.draw_again(len(rows), count, generator(seed, "revisit", k, j))])
                    )
            order = torch.randperm(own + budget, generator=generator(seed, "revisit", k))
            found.append(replace(plans[k], again=_Again(tuple(parts), order)))
        return found
