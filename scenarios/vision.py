"""Image streams: split, permuted, rotated and recorded-in-sessions versions of the usual sets.

One experience (``experiences: 1``) is the joint stream: everything at once, the upper bound of every method.

Class order, permutations, angles and draws come from generators of their own, so a stream depends on its knobs and its
seed only. Each experience indexes (and permutes, rotates, pads) its images when it is first used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.seeding import generator, permutation

from . import _avalanche, _orders, _sources
from ._images import Incremental, _Images, _Plan
from ._orders import limit_rows as limit_rows
from ._sources import ImageSet
from ._splits import _Split

# -- changes of pixels ---------------------------------------------------------------------------------------------


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Put pixel ``order[i]`` at place ``i`` in every image of ``x`` (uint8 ``[N, C, H, W]``, ``order`` ``[C·H·W]``)."""
    return x.flatten(1)[:, order].view_as(x)


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Turn images (uint8 ``[N, C, H, W]``) counter-clockwise about their centre, bilinearly, zeros from outside.

    A multiple of 360° gives ``x`` itself.
    """
    if degrees % 360 == 0:
        return x
    channels, height, width = x.shape[1:]
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    c, s = angle.cos().item(), angle.sin().item()
    # Grid coordinates run over [-1, 1] on either axis, hence the aspect ratio off the diagonal.
    theta = torch.tensor([[c, -s * height / width, 0.0], [s * width / height, c, 0.0]])
    grid = functional.affine_grid(theta.unsqueeze(0), [1, 1, height, width], align_corners=False)
    out = torch.empty_like(x)
    step = max(1, (1 << 22) // (channels * height * width))  # 16 MiB of float32 at a time
    for block, target in zip(torch.split(x, step), torch.split(out, step), strict=True):
        # All images turn alike, so they go through as the channels of a single one.
        turned = functional.grid_sample(block.flatten(0, 1).unsqueeze(0).float(), grid, align_corners=False)
        target.copy_(turned.round_().clamp_(0, 255).view_as(target))
    return out


# -- split by class ------------------------------------------------------------------------------------------------


@dataclass
class SplitDigits(_Split):
    """Scikit-learn's 8×8 digits split by class; tiny and always at hand.

    1,797 images (about 80/20, a split that never changes), 5 experiences of 2 digits.
    """

    source = "digits"

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """A short stream of a few dozen samples."""
        return {"experiences": 5, "train_limit": 60, "test_limit": 30}

    @classmethod
    def find(cls) -> Path:
        """Scikit-learn's own folder, which has the digits."""
        import sklearn

        return Path(sklearn.__path__[0])

    @classmethod
    def fetch(cls, root: Path | None = None) -> Path:
        """Nothing to download: the digits come with scikit-learn, whose folder is returned, whatever ``root`` is."""
        return cls.find()

    def images(self) -> ImageSet:
        """The whole set."""
        return _sources.digits()


@dataclass
class SplitMNIST(_Split):
    """MNIST split by class: 5 experiences of 2 digits.

    The protocol of van de Ven & Tolias (2019): digits in natural order, 28×28, raw pixels. Domain-incremental, its two
    outputs mean even and odd.
    """

    source = "mnist"


@dataclass
class SplitFashionMNIST(_Split):
    """Fashion-MNIST split by class: 5 experiences of 2 kinds of garment."""

    source = "fashion-mnist"


@dataclass
class SplitCIFAR10(_Split):
    """CIFAR-10 split by class: 5 experiences of 2 classes, 32×32 colour images."""

    source = "cifar10"


@dataclass
class SplitCIFAR100(_Split):
    """CIFAR-100 split by class: 10 experiences of 10 classes, 32×32 colour images."""

    source = "cifar100"
    experiences: int = knob(10, "number of experiences; 1 is the joint stream", ge=1)


@dataclass
class SplitTinyImageNet(_Split):
    """Tiny-ImageNet split by class: 10 experiences of 20 classes, 64×64 colour images.

    Classes follow wnids.txt; the validation images are the test set (the official test set has no labels).
    """

    source = "tiny-imagenet"
    experiences: int = knob(10, "number of experiences; 1 is the joint stream", ge=1)


# -- the whole set, changed ----------------------------------------------------------------------------------------


@dataclass
class _Changed(_Images):
    """Every experience holds the whole set, its pixels changed in another way."""

    experiences: int = knob(10, "number of experiences; 1 is the joint stream", ge=1)
    incremental: Incremental = knob(
        "domain",
        "domain: one output per class; class: each experience has outputs of its own, task unknown; task: … and told",
    )

    def _plan(self, images: ImageSet, order_seed: int) -> list[_Plan]:
        labels = {"train": images.train_y, "test": images.test_y}
        whole = {part: torch.arange(len(y)) for part, y in labels.items()}
        outputs = torch.arange(images.n_classes)
        plans = []
        changes = self._changes(images, order_seed)
        for i, (rows, (name, transform)) in enumerate(
            zip(_avalanche.by_rows(labels, [whole] * self.experiences), changes, strict=True)
        ):
            start = 0 if self.incremental == "domain" else i * images.n_classes
            plans.append(_Plan(name, rows, outputs + start, transform=transform))
        return plans

    def _changes(self, images: ImageSet, order_seed: int) -> Sequence[tuple[str, Callable[[Tensor], Tensor] | None]]:
        """Name and transform of each experience."""
        raise NotImplementedError


@dataclass
class _Permuted(_Changed):
    """Each experience has its pixels (after padding) in another order, the same for all images."""

    first_identity: bool = knob(False, "leave the first experience as it is")

    def _changes(self, images: ImageSet, order_seed: int) -> Sequence[tuple[str, Callable[[Tensor], Tensor] | None]]:
        channels, height, width = images.train_x.shape[1:]
        pixels = channels * (height + 2 * self.pad) * (width + 2 * self.pad)
        changes: list[tuple[str, Callable[[Tensor], Tensor] | None]] = []
        for i in range(self.experiences):
            if i == 0 and self.first_identity:
                changes.append(("identity", None))
            else:
                order = permutation(pixels, order_seed, "pixels", i)
                changes.append((f"permutation {i}", functools.partial(permute, order=order)))
        return changes


@dataclass
class _Rotated(_Changed):
    """Each experience has its images turned by another angle, counter-clockwise."""

    angles: list[float] | None = knob(None, "degrees, one per experience; null: evenly spread over [0, 180)")
    random_angles: bool = knob(False, "draw the angles from [0, 180) with order_seed instead of spreading them evenly")

    def _changes(self, images: ImageSet, order_seed: int) -> Sequence[tuple[str, Callable[[Tensor], Tensor] | None]]:
        angles = self.angles
        if angles is not None and self.random_angles:
            raise ConfigError("random_angles = true: angles are given as well; remove one of the two")
        if self.random_angles:
            angles = (180 * torch.rand(self.experiences, generator=generator(order_seed, "angles"))).tolist()
        elif angles is None:
            angles = [180.0 * i / self.experiences for i in range(self.experiences)]
        if len(angles) != self.experiences:
            raise ConfigError(
                f"angles has {len(angles)} entries, experiences = {self.experiences}; give one angle per experience"
            )
        return [(f"{a:g}°", functools.partial(rotate, degrees=a) if a % 360 else None) for a in angles]


@dataclass
class PermutedMNIST(_Permuted):
    """MNIST with its pixels permuted: 10 experiences, domain-incremental.

    van de Ven & Tolias (2019) pad to 32×32 first: ``pad: 2``.
    """

    source = "mnist"


@dataclass
class RotatedMNIST(_Rotated):
    """MNIST rotated: 10 experiences from 0° to 162°, domain-incremental."""

    source = "mnist"


@dataclass
class PermutedFashionMNIST(_Permuted):
    """Fashion-MNIST with its pixels permuted: 10 experiences, domain-incremental."""

    source = "fashion-mnist"


@dataclass
class RotatedFashionMNIST(_Rotated):
    """Fashion-MNIST rotated: 10 experiences from 0° to 162°, domain-incremental."""

    source = "fashion-mnist"


# -- CORe50 --------------------------------------------------------------------------------------------------------


@dataclass
class CORe50(_Split):
    """CORe50: 50 objects filmed in 11 sessions; new sessions (domain) or new objects (class, task).

    Sessions 3, 7 and 10 are the test set. Domain-incremental (NI), each experience is a training session, 8 in all,
    and is tested on the whole test set. By class (NC), 9 experiences: 10 objects, then 5 each; an evenly dividing
    number of experiences is taken as well. At 128×128 the images need 8 GB of disk in the cache, where they are
    memory-mapped.
    """

    source = "core50"
    experiences: int = knob(0, "number of experiences; 0: as in the benchmark (8 by session, 9 by class)", ge=0)
    incremental: Incremental = knob(
        "domain", "domain: new sessions; class: new objects, task unknown; task: … and told"
    )
    pixels: int | None = knob(None, "scale images to this side (32 is CORe50 mini); null: as stored", ge=1)

    def images(self) -> ImageSet:
        """The whole set. Raises :class:`~cl_lab.errors.DataError` where it is absent or damaged."""
        return _sources.load(self.source, self.data_dir, self.pixels)

    def _complaints(self) -> Iterator[tuple[str, str]]:
        yield from super()._complaints()
        if self.shuffle_classes and not self._by_class():
            yield "shuffle_classes", "incremental = 'domain' keeps the sessions' order; use incremental=class"

    def _by_class(self) -> bool:
        return self.incremental != "domain"

    def _by_what(self) -> str:
        return f"sessions (incremental = {self.incremental!r}); use incremental=class"

    def _sizes(self, n_classes: int) -> list[int]:
        if self.base_classes is None and self.experiences in (0, 9) and n_classes == 50:
            return [10, *[5] * 8]
        if self.base_classes is not None and self.experiences == 0:
            raise ConfigError(
                f"experiences = 0: base_classes = {self.base_classes} is not the benchmark's; give a number"
            )
        if self.experiences == 0:
            raise ConfigError(
                f"experiences = 0: the 9 experiences of CORe50 need 50 objects, here are {n_classes}; give a number"
            )
        return super()._sizes(n_classes)

    def _plan(self, images: ImageSet, order_seed: int) -> list[_Plan]:
        if self._by_class():
            return super()._plan(images, order_seed)
        domains = images.train_domain
        assert domains is not None
        sessions = torch.unique(domains).tolist()
        count = self.experiences or len(sessions)
        _orders.require_division(count, len(sessions), "training sessions of core50")
        size = len(sessions) // count
        groups = [sessions[i : i + size] for i in range(0, len(sessions), size)]
        names = ["sessions " + " ".join(map(str, group)) for group in groups]
        return self._domain_plans(images, groups, names, whole_test=True)
