"""Your own pictures as a stream: a folder for each class, or a folder of such folders for each domain."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_lab.errors import ConfigError, DataError, nearest
from cl_lab.files import cache_root
from cl_lab.knobs import knob

from . import _cache, _orders, _sources
from ._images import Incremental, _Plan
from ._sources import ImageSet
from ._splits import _Split

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
"""Files that are taken for pictures; any other file is passed over, and so is every name that begins with a dot."""


@dataclass(frozen=True)
class FolderSet(ImageSet):
    """An image set with the names of its classes and domains, each the name of a folder."""

    classes: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()


@dataclass(kw_only=True)
class ImageFolder(_Split):
    """Your own pictures from a folder (image-folder:~/pictures), split by class or by domain.

    By class the folder holds ``<class>/*.jpg``, by domain (as PACS does) ``<domain>/<class>/*.jpg`` with the same classes
    in each. Where it has both ``train/`` and ``test/`` (or ``val/``), the same lies in either. Otherwise ``test_share``
    decides: a picture is held out when the SHA-256 of its path below the folder, taken as a number in [0, 1), is below the
    share, so what is added later moves no picture. (Only a class, or a class of a domain, that had none to train or none
    to test on this way gets the one nearest to the share.)

    By domain each experience is a domain (or a group of them, alphabetically unless ``domains`` says otherwise), tested on
    its own test pictures. Every picture becomes a square of ``size`` pixels: turned as its EXIF tag says, scaled
    bilinearly, the middle cut out (``fit: crop``) or black added (``fit: pad``). This is done once; the cache holds the
    result, and is made anew when a file changes.
    """

    source: ClassVar[str] = "the folder"
    argument: ClassVar[str | None] = "folder"

    # Nothing is searched for, so no knob.
    data_dir: ClassVar[None] = None  # type: ignore[misc]

    folder: str = knob(doc="the folder that holds <class>/*.jpg or <domain>/<class>/*.jpg")
    by: Literal["class", "domain"] = knob("class", "what an experience is a group of, and how the folder is laid out")
    size: int = knob(64, "side of the square that every picture becomes, in pixels", ge=1)
    fit: Literal["crop", "pad"] = knob("crop", "crop: scale the short side and cut out the middle; pad: the long side")
    grey: bool = knob(False, "one channel instead of three")
    test_share: float = knob(0.2, "share of the pictures held out where there is no test folder", gt=0, lt=1)
    domains: list[str] | None = knob(None, "by domain: the domains to take, in this order; null: all, alphabetically")
    experiences: int = knob(0, "number of experiences; 0: one for each class (after base_classes) or domain", ge=0)
    incremental: Incremental | None = knob(  # type: ignore[assignment]
        None,
        "class: new outputs, task unknown; task: new outputs, task label told; domain: the same outputs throughout; "
        "null: as by",
    )

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """The made-up folder :func:`example`."""
        try:
            return {"folder": str(example()), "size": 8, "grey": True, "experiences": 5}
        except OSError:  # the cache cannot be written
            return None

    @classmethod
    def fetch(cls, root: Path | None = None) -> Path:
        """Nothing to download; raises :class:`~cl_lab.errors.ConfigError`."""
        raise ConfigError("fetch: image-folder has nothing to download; it reads the pictures in scenario.folder")

    def __post_init__(self) -> None:
        if self.incremental is None:
            self.incremental = self.by
        super().__post_init__()

    def _complaints(self) -> Iterator[tuple[str, str]]:
        yield from super()._complaints()
        if self.domains is not None and self._by_class():
            yield "domains", "by = 'class' knows of none; use by=domain, or leave it out"
        if self.domains is not None and len(set(self.domains)) < max(len(self.domains), 1):
            yield "domains", "must name one domain at least, and each only once"
        if self.shuffle_classes and not self._by_class():
            yield "shuffle_classes", "by = 'domain' puts no classes in order; name the domains in order (domains=[...])"

    def images(self) -> FolderSet:
        """All pictures. Raises :class:`~cl_lab.errors.DataError` for a folder or a picture that cannot be read."""
        root = Path(self.folder).expanduser()
        pictures = list_pictures(root, self.by, self.domains, self.test_share)
        x = _decoded(root, pictures, self.size, self.fit, self.grey)
        classes = sorted({p.label for p in pictures})
        domains = self.domains or sorted({p.domain for p in pictures})
        y = torch.tensor([classes.index(p.label) for p in pictures])
        domain = torch.tensor([domains.index(p.domain) for p in pictures])
        n = sum(p.part == "train" for p in pictures)
        recorded = not self._by_class()
        return FolderSet(
            name=str(root),
            train_x=x[:n],
            train_y=y[:n],
            test_x=x[n:],
            test_y=y[n:],
            n_classes=len(classes),
            train_domain=domain[:n] if recorded else None,
            test_domain=domain[n:] if recorded else None,
            classes=tuple(classes),
            domains=tuple(domains),
        )

    def _by_class(self) -> bool:
        return self.by == "class"

    def _by_what(self) -> str:
        return "domains (by = 'domain'); leave it out"

    def _names(self, images: ImageSet) -> Sequence[str]:
        assert isinstance(images, FolderSet)
        return images.classes

    def _sizes(self, n_classes: int) -> list[int]:
        if self.experiences:
            return super()._sizes(n_classes)
        base = self.base_classes
        if base is None:
            return [1] * n_classes
        return [base, *[1] * _orders.base_session(n_classes, 2, base, self.source)[1]]

    def _plan(self, images: ImageSet, order_seed: int) -> list[_Plan]:
        if self._by_class():
            return super()._plan(images, order_seed)
        assert isinstance(images, FolderSet)
        total = len(images.domains)
        count = self.experiences or total
        _orders.require_division(count, total, "domains of the folder")
        groups = [range(i, i + total // count) for i in range(0, total, total // count)]
        names = [" ".join(images.domains[d] for d in group) for group in groups]
        return self._domain_plans(images, groups, names, whole_test=False)


# -- which pictures there are --------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Picture:
    """One file: ``part`` is ``"test"`` or ``"train"``, ``path`` lies below the folder, ``/`` between names."""

    part: str
    path: str
    label: str
    domain: str = ""


def list_pictures(root: Path, by: str, domains: Sequence[str] | None, test_share: float) -> list[Picture]:
    """All pictures of a folder in either layout, training pictures first, by path.

    Raises :class:`~cl_lab.errors.DataError` on one line for whatever is not as the layout says.
    """
    if not root.is_dir():
        raise DataError(
            f"image-folder: folder = {root} {'is no folder' if root.exists() else 'does not exist'}; give the folder that "
            f"holds {_LAYOUTS[by]}"
        )
    held_out = next((part for part in ("test", "val") if (root / part).is_dir()), "")
    split = bool(held_out) and (root / "train").is_dir()
    found = []
    try:
        for part, top in (("train", root / "train"), ("test", root / held_out)) if split else (("", root),):
            for domain in _domains(top, domains) if by == "domain" else ("",):
                for label in _folders(top / domain):
                    files = [f.relative_to(root).as_posix() for f in _pictures(label, by)]
                    found += [Picture(part, f, label.name, domain) for f in files]
    except OSError as error:
        raise DataError(f"image-folder: {root} cannot be read ({error}); check its permissions") from error
    if not found:
        raise DataError(
            f"image-folder: no pictures ({', '.join(SUFFIXES)}) in {root} as {_LAYOUTS[by]}; give the folder that has them"
        )
    _check_domains(found)
    _check_parts(found, root, split)
    if not split:
        found = _split(found, test_share)
    return sorted(found, key=lambda p: (p.part != "train", p.path))


_LAYOUTS = {"class": "<class>/*.jpg", "domain": "<domain>/<class>/*.jpg"}


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.is_dir()]


def _images_in(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES]


def _domains(top: Path, wanted: Sequence[str] | None) -> list[str]:
    present = [p.name for p in _folders(top)]
    for name in present if wanted is None else wanted:
        if name not in present:
            raise DataError(f"image-folder: domains: {top} has no domain '{name}'{nearest(name, present)}")
        if not _folders(top / name):
            hint = f"for {_LAYOUTS['class']} use by=class" if _images_in(top / name) else "fill it or remove it"
            raise DataError(f"image-folder: domain {top / name} holds no class folders; {hint}")
    return present if wanted is None else list(wanted)


def _pictures(folder: Path, by: str) -> list[Path]:
    found = _images_in(folder)
    if found:
        return found
    inside = next((p.name for p in _folders(folder) if _images_in(p)), None)
    if inside is not None and by == "class":
        raise DataError(
            f"image-folder: {folder} has no pictures of its own, but {inside}/ in it has; for {_LAYOUTS['domain']} use "
            "by=domain"
        )
    raise DataError(f"image-folder: {folder} holds no pictures ({', '.join(SUFFIXES)}); fill it or remove it")


def _check_domains(found: Sequence[Picture]) -> None:
    """Two classes at least, every class in every domain."""
    classes = sorted({p.label for p in found})
    domains = sorted({p.domain for p in found})
    if len(classes) < 2:
        raise DataError(f"image-folder: there is one class only ('{classes[0]}'); give pictures of two at least")
    present = {(p.domain, p.label) for p in found}
    for label in classes:
        lacking = [d for d in domains if (d, label) not in present]
        if lacking:
            having = [d for d in domains if d not in lacking]
            where = f"in domain '{having[0]}' only" if len(having) == 1 else f"not in domain '{lacking[0]}'"
            raise DataError(
                f"image-folder: class '{label}' is {where}; every domain needs the same classes: add it to '{lacking[0]}', "
                "remove it, or name the domains to take (domains=[...])"
            )


def _check_parts(found: Sequence[Picture], root: Path, split: bool) -> None:
    """Something to train and something to test on, for each class of each domain."""
    counts = Counter((p.domain, p.label, p.part) for p in found)
    for domain, label in sorted({(p.domain, p.label) for p in found}):
        of = f"class '{label}'" + (f" of domain '{domain}'" if domain else "")
        for part in ("train", "test") if split else ():
            if not counts[domain, label, part]:
                raise DataError(f"image-folder: {of} has no {part} pictures in {root}; add some or remove the class")
        if not split and counts[domain, label, ""] < 2:
            raise DataError(f"image-folder: {of} has one picture only; add another: one to train, one to test on")


def place_of(path: str) -> float:
    """A number in [0, 1) that a path has on every machine: the first 53 bits of its SHA-256."""
    # Systems write the same accented name in different ways.
    digest = hashlib.sha256(unicodedata.normalize("NFC", path).encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def _split(found: Sequence[Picture], test_share: float) -> list[Picture]:
    groups: dict[tuple[str, str], list[Picture]] = {}
    for p in found:
        groups.setdefault((p.domain, p.label), []).append(p)
    parts = []
    for group in groups.values():
        group.sort(key=lambda p: place_of(p.path))
        held_out = sum(place_of(p.path) < test_share for p in group)
        held_out = min(max(held_out, 1), len(group) - 1)
        parts += [Picture("test" if i < held_out else "train", p.path, p.label, p.domain) for i, p in enumerate(group)]
    return parts


# -- decoding ------------------------------------------------------------------------------------------------------


def _decoded(root: Path, pictures: Sequence[Picture], size: int, fit: str, grey: bool) -> Tensor:
    """All pictures in order, uint8 ``[N, C, size, size]``, memory-mapped from the cache; decoded where not there yet."""
    channels = 1 if grey else 3
    lines = ["image-folder", "1", str(root.resolve()), f"{size} {fit} {channels}"]
    for p in pictures:
        stat = (root / p.path).stat()
        lines.append(f"{p.path} {stat.st_size} {stat.st_mtime_ns}")

    def fill(create: _cache.Create) -> None:
        x = create("x", (len(pictures), channels, size, size), np.uint8)
        for row, p in enumerate(pictures):
            x[row] = read_picture(root / p.path, size, fit, grey)

    folder = cache_root() / "decoded" / f"image-folder-{_cache.key_of(lines)}"
    return torch.from_numpy(_cache.arrays(folder, ("x",), fill)["x"])


def read_picture(path: Path, size: int, fit: str, grey: bool) -> npt.NDArray[np.uint8]:
    """One picture as uint8 ``[C, size, size]``. Raises :class:`~cl_lab.errors.DataError` naming the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # of damaged EXIF tags, say
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {opened.mode}, more than 8 bits each")
            opened.draft(
                None, (2 * size, 2 * size)
            )  # a JPEG much larger than that is decoded at a fraction of its size
            image = ImageOps.exif_transpose(opened)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("L" if grey else "RGB")
    except (OSError, SyntaxError, ValueError, LookupError, Image.DecompressionBombError) as error:
        reason = type(error).__name__ if isinstance(error, UnidentifiedImageError) else f"{error}"
        raise DataError(
            f"image-folder: {path}: cannot be read as a picture ({reason}); replace or remove it"
        ) from error
    square = ImageOps.fit if fit == "crop" else ImageOps.pad
    pixels = np.asarray(square(image, (size, size), method=Image.Resampling.BILINEAR))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


# -- an example ----------------------------------------------------------------------------------------------------


def example() -> Path:
    """Scikit-learn's digits as a folder of small pictures, ``<digit>/<number>.png``, made in the cache at first use."""
    folder = cache_root() / "examples" / "digits"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
        try:
            images = _sources.digits()
            write_pictures(temporary, {str(c): images.test_x[images.test_y == c][:20] for c in range(images.n_classes)})
            temporary.rename(folder)
        except OSError:  # somebody else was first
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_pictures(root: Path, classes: Mapping[str, Tensor]) -> None:
    """Write uint8 images ``[N, C, H, W]`` (C 1 or 3) below ``root`` as ``<class>/<number>.png``."""
    from PIL import Image

    for name, images in classes.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(root / name / f"{i:05}.png")
