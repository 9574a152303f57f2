"""Streams that divide a set: by class, in another order of its samples, or by where they were recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.seeding import generator, permutation

from . import _avalanche, _orders
from ._images import _Images, _Plan
from ._sources import ImageSet

Order = Literal["class", "class-iid", "iid", "instance", "class-instance"]


@dataclass
class _Split(_Images):
    """The classes come in groups. In a domain-incremental split a label is the class's place within its group.

    ``order`` names the orders of Hayes et al. (2019, 2020). Besides *class*, they take the samples that follow the base
    session one by one and cut the sequence into experiences: *iid* evenly, samples of any class in each; *instance* and
    *class-instance* at the ends of recordings, which come in a drawn order (within their class, for the latter), each
    in the order in which it was taken. Labels keep their outputs throughout. An experience is tested on the classes it
    may hold: on those of its recordings, or on all that follow the base session (*iid*, ``temporal``).

    Recordings and ``temporal`` chains are trained on in the order of the stream (``blurry`` and ``revisit`` shuffle within
    experiences again); all else is shuffled within its experience.

    ``blurry`` is our own law, exact and between neighbours only (:func:`scenarios._orders.exchange`); the blurry and
    i-Blurry set-ups (Bang et al. 2021, Koh et al. 2022) spread classes over all experiences. With ``imbalance`` the tail is
    the set's: the natural class order meets the head first (ordered long-tailed streams, Liu et al. 2022),
    ``shuffle_classes`` anywhere (shuffled ones). ``temporal`` is the chain of :func:`scenarios._orders.markov`.

    Samples are limited, then thinned (``imbalance``, ``shots``), then ordered and cut, then exchanged (``blurry``), and
    last of all some come again (``revisit``). So in an order that cuts, ``train_limit`` holds on average over recordings
    (exactly for *iid*), and ``shots`` counts over all experiences after the base session. Orders are drawn with
    ``order_seed``, samples with the run's seed.
    """

    shuffle_classes: bool = knob(False, "draw the class order with order_seed; otherwise it is the natural one")
    only_classes: int | None = knob(
        None, "take only the first so many classes of the order, as if the set had no others; null: all", ge=1
    )
    base_classes: int | None = knob(
        None, "classes of the first experience, a base session; the other experiences share the rest evenly", ge=1
    )
    order: Order = knob(
        "class",
        "class (or class-iid, the same): class by class; iid: all samples shuffled; instance: recording by recording; "
        "class-instance: class by class, recording by recording",
    )
    temporal: float | None = knob(
        None,
        "probability that the next sample has the class (order iid) or recording (order instance) of the one before: runs "
        "of 1/(1−p) samples on average; 0: never the same twice",
        ge=0,
        lt=1,
    )
    blurry: float = knob(
        0.0, "share of its samples that an experience exchanges with its neighbours, half to either side", ge=0, le=1
    )
    imbalance: float = knob(
        1.0,
        "ρ of a long tail: class c of C keeps the share ρ^(c/(C−1)) of its training samples (Cui et al. 2019); 1: all",
        gt=0,
        le=1,
    )
    shots: int | None = knob(
        None,
        "training samples per class in every experience after the first (few-shot sessions, Tao et al. 2020)",
        ge=1,
    )

    def _complaints(self) -> Iterator[tuple[str, str]]:
        yield from super()._complaints()
        by_class, cuts, given = self._by_class(), self._cuts_samples(), f"incremental = {self.incremental!r}"
        if not by_class:
            others = {
                "only_classes": self.only_classes is not None,
                "base_classes": self.base_classes is not None,
                "order": cuts,
                "temporal": self.temporal is not None,
            }
            yield from ((name, f"the experiences are {self._by_what()}") for name, used in others.items() if used)
        if cuts and self.incremental != "class":
            yield "order", f"each label keeps its one output, which {given} denies; use incremental=class"
        if self.base_classes is not None and self.incremental == "domain":
            yield "base_classes", f"experiences that share outputs ({given}) must be of one size; use incremental=class"
        if self.temporal is not None and self.order not in ("iid", "instance"):
            yield (
                "temporal",
                f"order = {self.order!r} takes each class as a whole; use order=iid for a chain over classes, or "
                "order=instance for one over recordings",
            )
        if self.shots is not None and self.experiences == 1:
            yield "shots", "with experiences = 1 there is no session after the first; raise experiences"
        if self.shots is not None and cuts and self.base_classes is None:
            yield "shots", f"order = {self.order!r} has no first session of classes; give base_classes"
        if self._mixes():
            others = {"blurry": self.blurry > 0, "revisit": self.revisit != "none"}
            why = "a stream that is mixed throughout has no tasks to blur or to come back to; leave it out"
            yield from ((name, why) for name, used in others.items() if used)
        if self.blurry:
            if self.experiences and self.experiences - (self.base_classes is not None) < 2:
                yield (
                    "blurry",
                    f"experiences = {self.experiences} leaves no neighbours to exchange with; raise experiences",
                )
            if self.incremental == "task" or not (by_class or self.incremental == "domain"):
                fix = "class" if by_class else "domain"
                yield (
                    "blurry",
                    f"samples would get another experience's outputs or task label ({given}); use incremental={fix}",
                )

    # -- what the knobs mean ---------------------------------------------------------------------------------------

    def _by_class(self) -> bool:
        """Whether the classes are divided; otherwise recordings, which hold all of them."""
        return True

    def _by_what(self) -> str:
        """What the experiences are where they are no groups of classes, and how to change that."""
        raise NotImplementedError

    def _cuts_samples(self) -> bool:
        """Whether the stream is a sequence of samples that is cut, not a sequence of classes."""
        return self.order not in ("class", "class-iid")

    def _mixes(self) -> bool:
        """Whether any sample may be in any experience after the base session."""
        return self.order == "iid" or self.temporal is not None

    def _sizes(self, n_classes: int) -> list[int]:
        return _orders.class_sizes(n_classes, self.experiences, self.base_classes, self.source)

    def _names(self, images: ImageSet) -> Sequence[str]:
        """What the classes are called in the name of an experience."""
        return [str(c) for c in range(images.n_classes)]

    # -- the plan --------------------------------------------------------------------------------------------------

    def _plan(self, images: ImageSet, order_seed: int) -> list[_Plan]:
        order = torch.arange(images.n_classes)
        if self.shuffle_classes:
            order = permutation(images.n_classes, order_seed, "classes")
        if self.only_classes is not None and self.only_classes > images.n_classes:
            raise ConfigError(
                f"only_classes = {self.only_classes}: {self.source} has {images.n_classes} classes; give at most so many"
            )
        pool = self._cuts_samples()
        n_classes = self.only_classes or images.n_classes
        sizes = self._pool_sizes(n_classes) if pool else self._sizes(n_classes)
        labels = {"train": images.train_y, "test": images.test_y}
        names = self._names(images)
        plans = []
        first = 0
        for i, rows in enumerate(_avalanche.by_classes(labels, order.tolist(), sizes)):
            outputs = torch.full((images.n_classes,), -1)
            start = 0 if self.incremental == "domain" else first
            group = order[first : first + sizes[i]]
            outputs[group] = torch.arange(start, start + sizes[i])
            plans.append(_Plan("classes " + " ".join(names[c] for c in group.tolist()), rows, outputs))
            first += sizes[i]
        if pool:
            plans[-1] = replace(plans[-1], pieces=self.experiences - len(plans) + 1)
        return plans

    def _pool_sizes(self, n_classes: int) -> list[int]:
        if self.experiences == 0:
            raise ConfigError(f"experiences = 0: order = {self.order!r} may be cut anywhere; give a number")
        if self.base_classes is None:
            return [n_classes]
        return _orders.base_session(n_classes, self.experiences, self.base_classes, self.source)

    def _domain_plans(
        self, images: ImageSet, groups: Sequence[Sequence[int]], names: Sequence[str], whole_test: bool
    ) -> list[_Plan]:
        """One experience for each group of recordings, tested on its own test samples or (``whole_test``) on all."""
        domains = {"train": images.train_domain, "test": images.test_domain}
        labels = {"train": images.train_y, "test": images.test_y}
        whole = torch.arange(len(images.test_y))

        def rows_of(part: str, group: Sequence[int]) -> Tensor:
            domain = domains[part]
            assert domain is not None
            return torch.isin(domain, torch.tensor(group)).nonzero().flatten()

        parts = [{"train": rows_of("train", g), "test": whole if whole_test else rows_of("test", g)} for g in groups]
        plans = []
        for i, (name, rows) in enumerate(zip(names, _avalanche.by_rows(labels, parts), strict=True)):
            start = 0 if self.incremental == "domain" else i * images.n_classes
            rows = {**rows, "test": whole} if whole_test else rows
            plans.append(_Plan(name, rows, torch.arange(start, start + images.n_classes)))
        return plans

    # -- thinning, ordering, exchanging ----------------------------------------------------------------------------

    def _arranged(self, images: ImageSet, plans: list[_Plan], order_seed: int, seed: int) -> list[_Plan]:
        labels = images.train_y[torch.cat([plan.rows["train"] for plan in plans])].unique()
        plans = [self._thinned(images, plan, labels, i, seed) for i, plan in enumerate(plans)]
        if self._cuts_samples():
            plans = [*plans[:-1], *self._pieces(images, plans[-1], order_seed)]
        if self.blurry:
            base = 0 if self.base_classes is None else 1
            plans = [*plans[:base], *self._blurred(images, plans[base:], seed)]
        return plans

    def _thinned(self, images: ImageSet, plan: _Plan, classes: Tensor, index: int, seed: int) -> _Plan:
        """``plan`` with fewer training samples; ``classes``, in natural order, are all that the stream has."""
        rows = plan.rows["train"]
        if self.imbalance < 1:
            labels = images.train_y[rows]
            counts = torch.bincount(labels, minlength=images.n_classes)
            counts[classes] = _orders.long_tail(counts[classes], self.imbalance)
            rows = _orders.keep_counts(rows, labels, counts, generator(seed, "imbalance", index))
        if self.shots is not None and index > 0:
            counts = torch.full((images.n_classes,), self.shots)
            rows = _orders.keep_counts(rows, images.train_y[rows], counts, generator(seed, "shots", index))
        return replace(plan, rows={**plan.rows, "train": rows})

    def _pieces(self, images: ImageSet, pool: _Plan, order_seed: int) -> list[_Plan]:
        """The experiences that ``pool`` is cut into."""
        rows, parts = pool.rows["train"], pool.pieces
        if self.order == "iid":
            rows = rows[permutation(len(rows), order_seed, "iid")]
            states = images.train_y[rows]
        else:
            states = self._recordings(images, rows, order_seed, pool)
        if self._mixes():
            if self.temporal is not None:
                rows = rows[_orders.markov(states, self.temporal, generator(order_seed, "temporal"))]
            sizes = self._checked(_orders.even_parts(len(rows), parts), len(rows), "training samples")
            return [
                replace(
                    pool,
                    name=f"{self.order} {i}",
                    rows={**pool.rows, "train": piece},
                    pieces=1,
                    ordered=self.temporal is not None or self.order == "instance",
                )
                for i, piece in enumerate(rows.split(sizes))
            ]
        rows, lengths = rows[states.argsort(stable=True)], torch.bincount(states)
        groups = self._checked(_orders.even_parts(len(lengths), parts), len(lengths), "recordings")
        sizes = [int(group.sum()) for group in lengths.split(groups)]
        plans = []
        tests: dict[tuple[int, ...], Tensor] = {}
        first = 0
        for size, piece in zip(groups, rows.split(sizes), strict=True):
            classes = images.train_y[piece].unique()
            test = tests.setdefault(tuple(classes.tolist()), torch.isin(images.test_y, classes).nonzero().flatten())
            outputs = torch.full_like(pool.outputs, -1)
            outputs[classes] = pool.outputs[classes]
            name = f"recordings {first} to {first + size - 1}" if size > 1 else f"recording {first}"
            plans.append(_Plan(name, {"train": piece, "test": test}, outputs, ordered=True))
            first += size
        return plans

    def _checked(self, sizes: list[int], total: int, what: str) -> list[int]:
        if 0 in sizes:
            raise ConfigError(
                f"experiences = {self.experiences}: order = {self.order!r} has {total} {what} for {len(sizes)} of them; "
                f"give at most {self.experiences - len(sizes) + total}"
            )
        return sizes

    def _recordings(self, images: ImageSet, rows: Tensor, order_seed: int, pool: _Plan) -> Tensor:
        """The place in the stream of each row's recording: one class filmed in one session."""
        if images.train_domain is None:
            raise ConfigError(
                f"order = {self.order!r}: {self.source} does not say which recording a sample is from; core50 does, for "
                "others use order=class or iid"
            )
        labels, sessions = images.train_y[rows], images.train_domain[rows]
        recording = (labels * (int(sessions.max()) + 1) + sessions).unique(return_inverse=True)[1]
        place = permutation(int(recording.max()) + 1, order_seed, "recordings")[recording]
        if self.order == "class-instance":
            place = place + pool.outputs[labels] * len(place)  # outputs are numbered in the order of the classes
        dense: Tensor = place.unique(return_inverse=True)[1]
        return dense

    def _blurred(self, images: ImageSet, plans: list[_Plan], seed: int) -> list[_Plan]:
        exchanged = _orders.exchange([p.rows["train"] for p in plans], self.blurry, generator(seed, "blurry"))
        known = torch.stack([p.outputs for p in plans]).max(0).values
        found = []
        for plan, rows in zip(plans, exchanged, strict=True):
            outputs = plan.outputs.clone()
            arrived = images.train_y[rows].unique()
            outputs[arrived] = known[arrived]
            found.append(replace(plan, rows={**plan.rows, "train": rows}, outputs=outputs, ordered=False))
        return found
