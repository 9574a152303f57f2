"""What an edit leaves behind: reversible changes that lie on a model in layers, each removable on its own.

A patch is values, not instructions. Those on weights add up, oldest first, on the weights as they were before any patch; to
take one away is to add the others up again, so what is left is bit for bit what it would have been without it, as the patch
itself was computed. One that comes back lies where it lay, below those that were made after it, and all is bit for bit as
before. Patches that answer only for some prompts (side memories, codebooks) hang on a layer as a hook and are asked for each
row of a batch. A saved patch is ``patch.json`` and ``patch.safetensors``; prompts are in it only if it needs
them to work (:class:`PromptPatch`; of a side memory the subjects alone) or the caller asked.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cl_lab.errors import ConfigError, DataError, nearest
from cl_lab.files import write_atomically
from cl_lab.hub import activation
from cl_lab.subjects import NamedSubjects

if TYPE_CHECKING:
    from cl_lab.editable import EditableModel, Site

CANDIDATES, SKETCH = 16, 32
"""Side memories whose gaps are computed exactly, and numbers of the sketch by which these are found among more."""

FORMAT = 1
"""Version of the files; another is refused."""

_DOCUMENT, _TENSORS, _COMING = "patch.json", "patch.safetensors", "patch.safetensors.new"

_SAME = 1e-5  # what scores of the same thing may differ by in rounding, as a share of them


@dataclass(eq=False)
class Patch:
    """A reversible change to what a model says. ``editor`` made it; ``notes`` are numbers worth keeping (loss, steps).

    ``number`` says where it lies among others: those made before it have smaller ones. It is not saved: who keeps patches
    knows in what order they were made. One without a number gets the next on the first model that it is laid on.
    """

    kind: ClassVar[str]
    rewrites: ClassVar[bool] = False
    """Whether it changes prompts before they are read."""

    editor: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    number: int | None = field(default=None, init=False, repr=False)

    def apply(self, model: EditableModel) -> None:
        """Lay the patch on those that ``model`` has, below such as were made after it, so on top of all if it is new.

        Raises :class:`DataError` where it does not fit the model.
        """
        self.check(model)
        there = [p.number or 0 for p in model.patches]
        if self.number is None:
            self.number = 1 + max(there, default=0)
        place = bisect.bisect(there, self.number)
        model.patches.insert(place, self)
        try:
            self._rebuild(model, added=place == len(there))
        except BaseException:
            del model.patches[place]
            raise

    def revert(self, model: EditableModel) -> None:
        """Take the patch away, wherever it lies; the others stay. Raises :class:`ValueError` where it is not there."""
        model.patches.remove(self)
        self._rebuild(model)

    def check(self, model: EditableModel) -> None:
        """Raise :class:`DataError` where the patch does not fit ``model``."""

    def _rebuild(self, model: EditableModel, *, added: bool = False) -> None:
        """Bring the model in line with its patches, as far as this kind goes; ``added``: only the last is new."""

    def rewrite(self, prompt: str, model: EditableModel) -> tuple[str, list[Patch]]:
        """The prompt to read in place of ``prompt``, as all of the model's patches of this kind want it, and who did."""
        return prompt, []

    def fires(self, model: EditableModel) -> str:
        """What lets it act: a word for the list of edits."""
        return "always"

    # -- on disk -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that is large, by name."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """All that is small."""
        raise NotImplementedError

    @classmethod
    def made(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Patch:
        """The patch that gave :meth:`tensors` and :meth:`settings`."""
        raise NotImplementedError

    def save(self, folder: Path) -> str:
        """Write the patch into ``folder`` (made if need be); returns the digest of its document.

        The document names the digest of the tensors, so that of the document stands for all of it. It is replaced in one
        step, once the new tensors lie beside the old, whose place they then take: whenever this is stopped,
        :func:`load_patch` finds the patch that was there or the new one, whole. Raises :class:`OSError` as writing does.
        """
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        data = save({name: t.detach().cpu().contiguous() for name, t in self.tensors().items()})
        content = {"format": FORMAT, **self.document(), "sha256": hashlib.sha256(data).hexdigest()}
        document = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
        _settle(folder)
        try:
            write_atomically(folder / _COMING, data)
            write_atomically(folder / _DOCUMENT, document)
            (folder / _COMING).replace(folder / _TENSORS)
        except BaseException:
            _settle(folder)
            raise
        return hashlib.sha256(document).hexdigest()

    def document(self) -> dict[str, Any]:
        """All but the tensors, as JSON values: what :func:`remade` wants."""
        return {"kind": self.kind, "editor": self.editor, "settings": self.settings(), "notes": self.notes}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def kinds() -> dict[str, type[Patch]]:
    """Every kind of patch, by its name."""
    return {cls.kind: cls for cls in (WeightPatch, SidePatch, ReleasedSidePatch, KeyPatch, PromptPatch)}


def remade(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Patch:
    """The patch that gave :meth:`Patch.document` and :meth:`Patch.tensors`. Raises :class:`KeyError` and its like."""
    patch = kinds()[document["kind"]].made(tensors, document["settings"])
    patch.editor, patch.notes = document["editor"], document["notes"]
    return patch


def load_patch(folder: Path, digest: str | None = None) -> Patch:
    """The patch saved in ``folder``. With ``digest`` its document must be that; the tensors must be the document's anyway.

    Raises :class:`DataError`, naming the file, for what is missing, damaged, altered or of another version.
    """
    from safetensors.torch import load

    place = folder / _DOCUMENT
    try:
        written = place.read_bytes()
        document = json.loads(written)
        place = _place_of_tensors(folder, document)
        data = place.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"is no JSON ({error})"
        raise DataError(f"patch '{place}': {why}; restore the file from a copy of the folder") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise DataError(f"patch '{folder / _DOCUMENT}': format {found!r}, this version reads {FORMAT}; update cl-lab")
    for name, content, wanted, who in (
        (_DOCUMENT, written, digest, "the list of edits"),
        (_TENSORS, data, str(document.get("sha256")), f"sha256 in {_DOCUMENT}"),
    ):
        found = hashlib.sha256(content).hexdigest()
        if wanted is not None and found != wanted:
            raise DataError(
                f"patch '{folder / name}': its SHA-256 is {found[:12]}…, {who} says {wanted[:12]}…: the file was changed; "
                "restore it"
            )
    if (kind := str(document.get("kind"))) not in kinds():
        raise DataError(f"patch '{folder / _DOCUMENT}': unknown kind '{kind}'{nearest(kind, kinds())}")
    try:
        return remade(document, load(data))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"patch '{folder / _DOCUMENT}': lacks a part ({type(error).__name__}: {error}); restore it"
        ) from None


def _place_of_tensors(folder: Path, document: Any) -> Path:
    """Where a saved patch's tensors lie: beside those they replace, if these are what ``document`` names.

    :meth:`Patch.save` leaves them there where it is stopped before its last step.
    """
    coming = folder / _COMING
    wanted = document.get("sha256") if isinstance(document, dict) else None
    if wanted is not None and coming.is_file() and hashlib.sha256(coming.read_bytes()).hexdigest() == wanted:
        return coming
    return folder / _TENSORS


def _settle(folder: Path) -> None:
    """Put tensors that lie beside those they replace in their place if the document names them, or else drop them."""
    coming = folder / _COMING
    if not coming.is_file():
        return
    try:
        document = json.loads((folder / _DOCUMENT).read_bytes())
    except (FileNotFoundError, ValueError):
        document = None
    if _place_of_tensors(folder, document) == coming:
        coming.replace(folder / _TENSORS)
    else:
        coming.unlink()


def _shape_at(model: EditableModel, path: str) -> tuple[int, int]:
    """``(out, in)`` of the layer at ``path``. Raises :class:`DataError` where the model has none there."""
    try:
        out, into = model.site(path).weight.shape
    except ConfigError as error:
        raise DataError(f"patch of '{path}', but {error}; is it another model's?") from None
    return out, into


# -- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delta:
    """A change of one weight ``[out, in]``: ``b @ a`` (``[out, r]``, ``[r, in]``), or ``dense`` ``[out, in]``; float32."""

    a: Tensor | None = None
    b: Tensor | None = None
    dense: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        if self.dense is not None:
            return self.dense.shape[0], self.dense.shape[1]
        assert self.a is not None
        assert self.b is not None
        return self.b.shape[0], self.a.shape[1]

    def value(self) -> Tensor:
        """The change, ``[out, in]`` float32."""
        if self.dense is not None:
            return self.dense
        assert self.a is not None
        assert self.b is not None
        return self.b @ self.a


@dataclass(eq=False)
class WeightPatch(Patch):
    """Changes of weights, by path of the linear layer. ``statistics`` are an editor's own running sums, by name."""

    kind: ClassVar[str] = "weights"

    changes: dict[str, Delta] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def check(self, model: EditableModel) -> None:
        for path, change in self.changes.items():
            wanted, found = _shape_at(model, path), change.shape
            if wanted != found:
                raise DataError(
                    f"patch of '{path}' changes {list(found)} weights, the model has {list(wanted)}; is it another model's?"
                )

    def _rebuild(self, model: EditableModel, *, added: bool = False) -> None:
        model.memo = {}  # not cleared: a twin may have it still
        for path in self.changes:
            site = model.site(path)
            base = model.base.setdefault(path, site.weight.clone())
            changes = [p.changes[path] for p in model.patches if isinstance(p, WeightPatch) and path in p.changes]
            whole = model.sums.pop(path, None)
            if whole is None or not added:
                whole = base.float()  # something was taken away: all of it again
            else:
                changes = changes[-1:]
            for change in changes:
                whole = whole + change.value().to(whole.device)
            site.put(whole)
            if changes:
                model.sums[path] = whole

    def tensors(self) -> dict[str, Tensor]:
        parts = {
            f"{path}:{name}": value
            for path, change in self.changes.items()
            for name in ("a", "b", "dense")
            if (value := getattr(change, name)) is not None
        }
        return parts | {f"statistics:{name}": value for name, value in self.statistics.items()}

    def settings(self) -> dict[str, Any]:
        return {"paths": list(self.changes)}

    @classmethod
    def made(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Patch:
        parts = ("a", "b", "dense")
        if lost := [path for path in settings["paths"] if not any(f"{path}:{n}" in tensors for n in ("b", "dense"))]:
            raise KeyError(lost[0])
        changes = {path: Delta(**{n: tensors.get(f"{path}:{n}") for n in parts}) for path in settings["paths"]}
        kept = {n.removeprefix("statistics:"): t for n, t in tensors.items() if n.startswith("statistics:")}
        return cls(changes=changes, statistics=kept)


# -- what answers for some prompts only ----------------------------------------------------------------------------


class Routed:
    """A hook on one linear layer that adds to its output for the rows whose prompt it takes for its own.

    The choice is made once, from the prompt's tokens, and held for the whole answer. Which tokens are the prompt's the model
    says (:meth:`~cl_lab.editable.EditableModel.prompts`); where nobody does, a pass with an empty cache is a prompt, and
    what comes behind it its answer, which is how Transformers generates.
    """

    holds: ClassVar[bool] = True
    """Whether a choice is held to the answer's end."""

    def __init__(self, model: EditableModel, site: Site) -> None:
        self._hang(model, site)

    def _hang(self, model: EditableModel, site: Site) -> None:
        self.model, self.site = model, site
        self._route: Tensor | None = None
        self._holding = self._paused = False
        self._begins = True  # the pass in progress has nothing in its cache
        self._ids: Tensor | None = None  # its tokens
        self._handles = [
            model.decoder.register_forward_pre_hook(self._look, with_kwargs=True),
            site.module.register_forward_hook(self._add),
        ]

    def twin(self, model: EditableModel) -> Routed:
        """The same on another model; what is laid on there stays there (:meth:`EditableModel.twin`)."""
        made = copy.copy(self)
        made._hang(model, model.site(self.site.path))
        return made

    def remove(self) -> None:
        """Take the hook off."""
        for handle in self._handles:
            handle.remove()

    def _look(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self._begins = cache is None or cache.get_seq_length() == 0
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def pause(self, on: bool) -> bool:
        """Add nothing until this is said again; returns what was said before."""
        before, self._paused = self._paused, on
        return before

    def hold(self, on: bool, route: Tensor | None = None) -> None:
        """Keep ``route``, or else the next choice, until this is said again."""
        self._holding, self._route = on, route

    @property
    def route(self) -> Tensor | None:
        """The last choice, ``[B]`` int64: which memory or key answers for each row; −1 for the model itself."""
        return self._route

    def answering(self, which: int) -> Sequence[Patch]:
        """The patches behind a choice; none behind −1."""
        raise NotImplementedError

    def deciding(self, inputs: Tensor) -> Tensor | None:
        """The tokens ``[B, T]`` bool of ``inputs`` ``[B, T, in]`` to choose by; ``None`` where the last choice holds."""
        asked = self.model.asked
        if self._route is not None and len(self._route) == len(inputs):
            fresh = not self._holding if asked is not None else self._begins
            if not fresh:
                return None
        return asked if asked is not None and asked.shape == inputs.shape[:2] else _all(inputs)

    def asked_texts(self, asked: Tensor) -> list[str]:
        """What the prompts of the pass say, whose tokens ``asked`` ``[B, T]`` are; nothing where it was given embeddings.

        A text's first token belongs to it, too, though no gap or key is of use there.
        """
        ids = self._ids if self.model.ids is None else self.model.ids
        if ids is None or ids.shape != asked.shape:
            return [""] * len(asked)
        whole = asked.to(ids.device, copy=True)
        whole[:, :-1] |= whole[:, 1:].clone()
        if self.model.there is not None:
            whole &= self.model.there.to(ids.device)
        return [self.model.tokenizer.decode(row[own].tolist()) for row, own in zip(ids, whole, strict=True)]

    def choose(self, inputs: Tensor, asked: Tensor) -> Tensor:
        """The choice ``[B]`` int64, from ``inputs`` ``[B, T, in]`` and which of them are prompt ``[B, T]`` bool."""
        raise NotImplementedError

    def change(self, inputs: Tensor, which: int, asked: Tensor) -> Tensor:
        """What to add to the output ``[N, T, out]`` of rows that memory ``which`` answers for."""
        raise NotImplementedError

    def _add(self, module: Any, args: Any, out: Tensor) -> Tensor | None:
        if self._paused:
            return None
        inputs: Tensor = args[0]
        flat = inputs.dim() == 2
        if flat:
            inputs = inputs[None]
        asked = self.deciding(inputs)
        if asked is not None:
            self._route = self.choose(inputs, asked)
        else:
            asked = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        assert self._route is not None
        changed = out.clone() if bool((self._route >= 0).any()) else None
        for which in self._route.unique().tolist():
            if which >= 0:
                assert changed is not None
                rows = self._route == which
                more = self.change(inputs[rows], which, asked[rows]).to(out.dtype)
                if flat:
                    changed += more[0]
                else:
                    changed[rows] += more
        return changed


def _all(inputs: Tensor) -> Tensor:
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def _hang(model: EditableModel, name: str, needed: bool, make: Callable[[], Routed]) -> Any:
    """The hook called ``name``, made where it is needed and lacking, taken off where it is not."""
    if needed and name not in model.side:
        model.side[name] = make()
    elif not needed and name in model.side:
        model.side.pop(name).remove()
    return model.side.get(name)


def from_prompt_end(asked: Tensor) -> Tensor:
    """``[B, T, 1]`` bool: the places from the prompt's last own token on, ``asked`` ``[B, T]`` saying which these are."""
    place = torch.arange(1, asked.shape[1] + 1, device=asked.device)
    return (place >= (asked * place).amax(1, keepdim=True))[..., None]


def activation_gap(change: Tensor, inputs: Tensor, asked: Tensor) -> Tensor:
    """``D`` ``[B]``: the mean over the prompt's tokens of ``‖A(x)·(W' − W)ᵀ‖₂``. Wang et al. 2024 (WISE), Eq. 3.

    ``change`` is ``W' − W`` ``[out, in]``, ``inputs`` ``A(x)`` ``[B, T, in]``, ``asked`` ``[B, T]`` bool.
    """
    length = (inputs.to(change.dtype) @ change.T).norm(dim=2)
    mean: Tensor = (length * asked).sum(1) / asked.sum(1).clamp(min=1)
    return mean


def directions(inputs: Tensor, asked: Tensor, centre: Tensor) -> Tensor:
    """``[B, in]`` float32 of length 1: where what the prompts bring lies from ``centre`` ``[in]``, the mean of their tokens.

    ``inputs`` are ``[B, T, in]``, ``asked`` ``[B, T]`` bool.
    """
    total = ((inputs.float() - centre) * asked[..., None]).sum(1)
    return torch.nn.functional.normalize(total, dim=1)


@dataclass(eq=False)
class SidePatch(Patch):
    """What one edit added to a shard of WISE's side memory: ``values`` at the places of the shard's random mask.

    A shard's memory is ``W + Σ values`` over its patches. ``gap`` is the least activation gap ``D`` of the shard's edits
    when the patch was made, and ``floor`` the gap that all but a few unrelated prompts stay below: see :func:`threshold`.
    Values are bf16, and were rounded so before they were judged. The memory acts from the prompt's last own token on, or on
    the ``whole`` text. With ``subjects`` it answers for prompts alone that name one of them (:mod:`cl_lab.subjects`).
    ``keys`` ``[n, in]`` are its own prompts' directions (:func:`directions` from ``centre`` ``[in]``), by which it is chosen
    among several that would answer.
    """

    kind: ClassVar[str] = "side-memory"

    path: str = ""
    shard: int = 0
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))  # the mask's bits, packed
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    gap: float = 0.0
    floor: float = 0.0
    merge: bool = False
    whole: bool = False
    subjects: tuple[str, ...] = ()
    keys: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    centre: Tensor = field(default_factory=lambda: torch.empty(0))

    def fires(self, model: EditableModel) -> str:
        return "prompts like its own" + (f" that name {' or '.join(self.subjects)}" if self.subjects else "")

    def check(self, model: EditableModel) -> None:
        out, into = _shape_at(model, self.path)
        mask = unpacked(self.places, out * into)
        if int(mask.sum()) != len(self.values):
            raise DataError(
                f"patch of '{self.path}' has {len(self.values)} values for {int(mask.sum())} places; is it another model's?"
            )
        if len(self.keys) and (wrong := {self.keys.shape[1], len(self.centre)} - {into}):
            raise DataError(
                f"patch of '{self.path}' has keys of {wrong.pop()} values, the layer reads {into}; is it another model's?"
            )

    def _rebuild(self, model: EditableModel, *, added: bool = False) -> None:
        mine = [p for p in model.patches if type(p) is type(self) and p.path == self.path]
        hook: SideMemory | None = _hang(model, f"{self.kind}:{self.path}", bool(mine), lambda: self.memory(model))
        if hook is not None:
            hook.set(mine)

    def memory(self, model: EditableModel) -> SideMemory:
        """The hook that answers with patches of this kind."""
        return SideMemory(model, model.site(self.path))

    def tensors(self) -> dict[str, Tensor]:
        keys = {"keys": self.keys, "centre": self.centre} if len(self.keys) else {}
        return {"places": self.places, "values": self.values} | keys

    def settings(self) -> dict[str, Any]:
        names = ("path", "shard", "gap", "floor", "merge", "whole")
        return {name: getattr(self, name) for name in names} | {"subjects": list(self.subjects)}

    @classmethod
    def made(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Patch:
        settings = dict(settings)
        if settings.pop("subject_path", ""):  # one day's version knew a subject by what its tokens resemble
            raise DataError(
                f"patch of '{settings['path']}': is of a version that did not write down its subject's name; make the edit "
                "again in a new deployment"
            )
        subjects = tuple(settings.get("subjects", ()))
        keys = {name: tensors[name] for name in ("keys", "centre") if name in tensors}
        return cls(places=tensors["places"], values=tensors["values"], **{**settings, **keys, "subjects": subjects})


class SideMemory(Routed):
    """WISE's side memories on one layer: a change of its weight for each shard, and the gap from which each answers.

    The gap says whether a memory would answer. Of several that would, as edits about the same subject do, that one answers
    of which a prompt is most like what is asked, by the cosine of their directions; by the gap, where one has no keys. Of
    two that are equally like it, as edits of one prompt are, the newer answers.

    Gaps are computed for prompts alone that name a memory's subject, where it has one. Of more than :data:`CANDIDATES`
    memories that may answer the gaps are first estimated, each from :data:`SKETCH` random projections of its change (Johnson
    and Lindenstrauss), and computed for those alone that seem furthest above their thresholds: five hundred memories cost
    little more than sixteen.
    """

    def __init__(self, model: EditableModel, site: Site) -> None:
        super().__init__(model, site)
        self.changes: dict[int, Tensor] = {}
        self.thresholds: dict[int, float] = {}
        self.whole, self._newest = False, 0
        self._sketches: Tensor | None = None
        self._made: dict[int, tuple[list[SidePatch], Tensor]] = {}
        self._named: NamedSubjects | None = None

    def set(self, patches: Sequence[SidePatch]) -> None:
        """Take over what ``patches``, oldest first, amount to."""
        self._route = None
        self.whole, self._newest = patches[-1].whole, patches[-1].shard
        of: dict[int, list[SidePatch]] = {}
        for patch in patches:
            of.setdefault(patch.shard, []).append(patch)
        known = self._made
        self._made = {
            shard: known[shard] if shard in known and known[shard][0] == own else (own, self.whole_change(own))
            for shard, own in of.items()
        }
        self.changes = {shard: change for shard, (_, change) in self._made.items()}
        self.thresholds = {shard: self.threshold(own) for shard, (own, _) in self._made.items()}
        if patches and patches[-1].merge and len(self.changes) > 1:
            self.changes = {0: ties(list(self.changes.values()))}
            self.thresholds = {0: min(self.thresholds.values())}
        self._sketches = None
        self._named = None  # made when it is first wanted: while edits are laid on, nobody asks

    def answering(self, which: int) -> Sequence[Patch]:
        merged = self.changes.keys() != self._made.keys()
        return [p for shard, (own, _) in self._made.items() if which >= 0 and (merged or shard == which) for p in own]

    def whole_change(self, patches: Sequence[Any]) -> Tensor:
        """``W' − W`` ``[out, in]`` of a shard with these patches."""
        return shard_change(patches, self.site)

    def threshold(self, patches: Sequence[Any]) -> float:
        """The gap from which a shard with these patches answers."""
        return threshold(patches)

    def choose(self, inputs: Tensor, asked: Tensor) -> Tensor:
        shards = list(self.changes)
        near = self._may_answer(asked).to(inputs.device)
        if int(near.sum(0).max()) > CANDIDATES:
            near = self._nearest(inputs, asked, near)
        gaps = torch.full((len(shards), len(inputs)), -1.0, device=inputs.device)
        for n in near.any(1).nonzero().flatten().tolist():
            gaps[n, near[n]] = self._ratio(shards[n], inputs[near[n]], asked[near[n]])
        would, place = gaps >= 1, last_of_greatest(gaps)
        if int(would.sum(0).max()) > 1 and all(len(p.keys) for own, _ in self._made.values() for p in own):
            like = torch.full_like(gaps, -torch.inf)
            for n in would.any(1).nonzero().flatten().tolist():
                like[n, would[n]] = self._likeness(shards[n], inputs[would[n]], asked[would[n]])
            place = last_of_greatest(like)
        return torch.where(would.any(0), torch.tensor(shards, device=inputs.device)[place], -1)

    def _likeness(self, shard: int, inputs: Tensor, asked: Tensor) -> Tensor:
        """``[B]``: the greatest cosine of each prompt's direction with one of the memory's own prompts'."""
        patches, _ = self._made[shard]
        each = [directions(inputs, asked, p.centre.to(inputs.device)) @ p.keys.to(inputs.device).T for p in patches]
        return torch.cat(each, 1).amax(1)

    def _may_answer(self, asked: Tensor) -> Tensor:
        """``[memories, B]`` bool: those that are open to all prompts, and those whose subject a prompt names."""
        if self._named is None:
            several = [[p.subjects for p in own] for own, _ in self._made.values()]
            self._named = NamedSubjects([list(chain(*some)) if all(some) else None for some in several])
        if self._named.all_open:
            return torch.ones(len(self.changes), len(asked), dtype=torch.bool)
        near = self._named.among(self.asked_texts(asked))
        return near if len(self.changes) == len(near) else near.any(0, keepdim=True)  # these are merged into one

    def _ratio(self, shard: int, inputs: Tensor, asked: Tensor) -> Tensor:
        return activation_gap(self.changes[shard], inputs, asked) / self.thresholds[shard]

    def _nearest(self, inputs: Tensor, asked: Tensor, named: Tensor) -> Tensor:
        """``[memories, B]`` bool: the :data:`CANDIDATES` of ``named`` whose gaps seem largest, by random projections."""
        if self._sketches is None:  # made when they are first wanted: while edits are laid on, nobody asks
            width = self.site.weight.shape[0]
            drawn = torch.randn(SKETCH, width, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5
            self._sketches = torch.stack([drawn.to(c) @ c for c in self.changes.values()])
        least = torch.tensor(list(self.thresholds.values()), device=inputs.device)
        found = torch.zeros_like(named)
        for i, (row, own) in enumerate(zip(inputs, asked, strict=True)):
            projected = row[own].to(self._sketches.dtype) @ self._sketches.flatten(0, 1).T
            length = projected.view(len(projected), len(least), SKETCH).norm(dim=2).mean(0)
            found[torch.where(named[:, i], length / least, -1.0).topk(CANDIDATES).indices, i] = True
        return found & named

    def change(self, inputs: Tensor, which: int, asked: Tensor) -> Tensor:
        memory = self.changes[which]
        more = inputs.to(memory.dtype) @ memory.T
        return more if self.whole else more * from_prompt_end(asked)


def last_of_greatest(scores: Tensor) -> Tensor:
    """The index ``[B]`` of the greatest of ``scores`` ``[n, B]``, and the last where several are that but for rounding.

    Two edits of one prompt are as like it as each other, and what was said last holds.
    """
    best = scores.amax(0)
    found: Tensor = len(scores) - 1 - (scores >= best - _SAME * best.abs()).flip(0).int().argmax(0)
    return found


def shard_change(patches: Sequence[SidePatch], site: Site) -> Tensor:
    """``W' − W`` ``[out, in]`` float32 of one shard."""
    weight = site.weight
    whole = torch.zeros(weight.numel(), device=weight.device)
    if patches:
        mask = unpacked(patches[0].places, weight.numel()).to(weight.device)
        whole[mask] = torch.stack([p.values.float() for p in patches]).sum(0).to(weight.device)
    return whole.view(weight.shape)


def threshold(patches: Sequence[SidePatch]) -> float:
    """The gap from which a shard answers: seven tenths of the least of its edits, as the patch made last found it.

    But not below what unrelated prompts reach (``floor``), of which a stated share may be wrong.
    """
    return max(0.7 * patches[-1].gap, patches[-1].floor, 1e-12)


@dataclass(eq=False)
class ReleasedSidePatch(SidePatch):
    """What one edit added to a side memory that answers as WISE's released code does (:class:`ReleasedMemory`).

    ``gap`` is the edit's, the mean over the rows it was trained on; a memory answers from ``ratio`` times the least of its
    edits. Entries outside the mask are ``decay`` times what they were: the optimiser's weight decay knows no mask.
    """

    kind: ClassVar[str] = "side-memory-released"

    ratio: float = 0.88
    decay: float = 1.0

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"ratio": self.ratio, "decay": self.decay}

    def memory(self, model: EditableModel) -> SideMemory:
        return ReleasedMemory(model, model.site(self.path))


class ReleasedMemory(SideMemory):
    """Side memories as WISE's released code consults them (EasyEdit 14cea82, ``models/wise/WISE.py``), in mode Retrieve.

    The gap is that of *activations of the layer's output*, ``‖σ(W'a) − σ(Wa)‖₂``, the mean over all tokens of a pass that
    are there, template, first token and given answer too; of a pass of more than 100 tokens the greatest. Every pass decides
    anew: while an answer is written, each token of it. The newest memory answers if its gap reaches its threshold; an older
    one takes over if its gap reaches its own and is greater than that of the newest and of those before it, *whether or not
    these reach theirs*. The memory acts on the whole pass.
    """

    holds: ClassVar[bool] = False

    def __init__(self, model: EditableModel, site: Site) -> None:
        super().__init__(model, site)
        self._activation = activation(model.model.config)

    def whole_change(self, patches: Sequence[Any]) -> Tensor:
        return released_change(patches, self.site)

    def threshold(self, patches: Sequence[Any]) -> float:
        return float(patches[-1].ratio * min(p.gap for p in patches))

    def deciding(self, inputs: Tensor) -> Tensor | None:
        read = self.model.there
        return read if read is not None and read.shape == inputs.shape[:2] else _all(inputs)

    def choose(self, inputs: Tensor, asked: Tensor) -> Tensor:
        newest = self._newest
        older = [shard for shard in self.changes if shard != newest]
        best = self.gap(newest, inputs, asked)
        found = torch.where(best >= self.thresholds[newest], newest, -1)
        for shard in older:
            gap = self.gap(shard, inputs, asked)
            takes = (gap > best) & (gap > self.thresholds[shard])
            found, best = torch.where(takes, shard, found), torch.where(takes, gap, best)
        return found

    def gap(self, shard: int, inputs: Tensor, read: Tensor) -> Tensor:
        """``D`` ``[B]`` of a memory, from ``inputs`` ``[B, T, in]`` and which of them are tokens ``[B, T]`` bool."""
        change = self.changes[shard]
        out = self.site.module.forward(inputs).to(change.dtype)  # without the hook, which is this one
        length = token_gaps(out, inputs.to(change.dtype) @ change.T, self._activation) * read
        count = read.sum(1).clamp(min=1)
        return torch.where(count > 100, length.amax(1), length.sum(1) / count)

    def change(self, inputs: Tensor, which: int, asked: Tensor) -> Tensor:
        memory = self.changes[which]
        return inputs.to(memory.dtype) @ memory.T


def token_gaps(out: Tensor, more: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``‖σ(out + more) − σ(out)‖₂`` of each token ``[B, T]``, of outputs ``[B, T, out]``."""
    length: Tensor = (act(out + more) - act(out)).norm(dim=2)
    return length


def released_change(patches: Sequence[ReleasedSidePatch], site: Site) -> Tensor:
    """``W' − W`` ``[out, in]`` float32 of one shard, with what weight decay did to the entries outside its mask."""
    change = shard_change(patches, site)
    if patches:
        mask = unpacked(patches[0].places, change.numel()).view(change.shape).to(change.device)
        left = math.prod(p.decay for p in patches)
        change = torch.where(mask, change, (left - 1) * site.weight.float())
    return change


def ties(changes: Sequence[Tensor], density: float = 0.53) -> Tensor:
    """TIES-merging (Yadav et al. 2023, arXiv 2306.01708): keep each change's largest entries, agree on signs, average.

    Of every change ``[out, in]`` the ``density`` share of its *non-zero* entries largest in size is kept; each entry's sign
    is that of the sum; the mean is over the changes that have it.
    """
    kept = []
    for change in changes:
        moved = change[change != 0].abs()
        if len(moved):
            least = moved.kthvalue(len(moved) - max(1, round(density * len(moved))) + 1).values
            change = torch.where(change.abs() >= least, change, 0)
        kept.append(change)
    stack = torch.stack(kept)
    sign = stack.sum(0).sign()
    agrees = (stack.sign() == sign) & (stack != 0)
    merged: Tensor = (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return merged


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as bits: uint8 ``[⌈n/8⌉]``."""
    flat = mask.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """What :func:`packed` packed: bool ``[size]``. Raises :class:`DataError` where it was another number of places."""
    if len(bits) != -(-size // 8):
        raise DataError(f"patch has a mask of {8 * len(bits)} places for a weight of {size}; is it another model's?")
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:size].bool()


# -- a codebook ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class KeyPatch(Patch):
    """Entries of GRACE's codebook on one layer: ``keys`` ``[n, in]``, what to add to the output ``values`` ``[n, out]``.

    A prompt whose last token reaches the layer within ``radii`` ``[n]`` of a key is answered with the nearest key's value.
    """

    kind: ClassVar[str] = "codebook"

    path: str = ""
    keys: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    values: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    radii: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [n], one for each answer

    def __post_init__(self) -> None:
        if not len(self.labels):  # nothing is known of the answers: none is another's
            self.labels = torch.zeros(len(self.keys), dtype=torch.int64)

    def fires(self, model: EditableModel) -> str:
        return f"within {float(self.radii.max()):.3g} of its key"

    def check(self, model: EditableModel) -> None:
        wanted = _shape_at(model, self.path)
        if (self.values.shape[1], self.keys.shape[1]) != wanted:
            raise DataError(
                f"patch of '{self.path}' leads from {self.keys.shape[1]} values to {self.values.shape[1]}, the layer from "
                f"{wanted[1]} to {wanted[0]}; is it another model's?"
            )

    def _rebuild(self, model: EditableModel, *, added: bool = False) -> None:
        mine = [p for p in model.patches if isinstance(p, KeyPatch) and p.path == self.path]
        hook: Codebook | None = _hang(
            model, f"codebook:{self.path}", bool(mine), lambda: Codebook(model, model.site(self.path))
        )
        if hook is not None:
            hook.set(mine)

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values, "radii": self.radii, "labels": self.labels}

    def settings(self) -> dict[str, Any]:
        return {"path": self.path}

    @classmethod
    def made(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Patch:
        parts: dict[str, Any] = {name: tensors[name] for name in ("keys", "values", "radii", "labels")}
        return cls(**parts, **settings)


class Codebook(Routed):
    """GRACE's codebook: keys around which a stored value is added, from the prompt's last token on."""

    def set(self, patches: Sequence[KeyPatch]) -> None:
        """Take over the entries of ``patches``, oldest first.

        Keys of different answers share the way between them; one that a newer has the place of is out of reach.
        """
        self._route = None
        self._of = [patch for patch in patches for _ in patch.keys]
        self.keys, self.values, radii, labels = (
            torch.cat([getattr(p, name) for p in patches]) for name in ("keys", "values", "radii", "labels")
        )
        apart = torch.cdist(self.keys.double(), self.keys.double()).float()  # in float, near ones lose their digits
        others = labels[:, None] != labels
        same_place = others & (apart <= 0.01 * torch.minimum(radii[:, None], radii))
        half = torch.where(others & ~same_place, apart / 2, torch.inf).amin(1)
        self.radii = torch.where(same_place.triu().any(1), -1, torch.minimum(radii, half))

    def answering(self, which: int) -> Sequence[Patch]:
        return [self._of[which]] if which >= 0 else []

    def choose(self, inputs: Tensor, asked: Tensor) -> Tensor:
        last = (asked * torch.arange(1, asked.shape[1] + 1, device=asked.device)).argmax(1)
        query = inputs[torch.arange(len(inputs), device=inputs.device), last].to(self.keys)
        # From differences: from products, a key that is met would be some way off.
        distance = torch.cdist(query, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance = torch.where(distance <= self.radii, distance, torch.inf)
        least, place = distance.min(1)
        return torch.where(least.isfinite(), place, -1)

    def change(self, inputs: Tensor, which: int, asked: Tensor) -> Tensor:
        return from_prompt_end(asked) * self.values[which].to(inputs.device)


# -- facts put before the prompt -----------------------------------------------------------------------------------


_NAMED = 5
"""Names of subjects that a line has at most."""


@dataclass(eq=False)
class PromptPatch(Patch):
    """Facts that are put before prompts they concern: ``texts``, and their embeddings ``keys`` ``[n, width]``, of length 1.

    ``centre`` ``[width]`` is taken off an embedding before it is compared; a fact concerns a prompt from the cosine
    ``least`` ``[n]`` on, one for each (a number is that of all), and only the nearest is put there: the newest, where
    several are of the same prompt. Of ``subjects``, one list for each fact or none at all, a prompt must name one
    (:mod:`cl_lab.subjects`), unless the fact has none.
    """

    kind: ClassVar[str] = "prompt-memory"
    rewrites: ClassVar[bool] = True

    texts: list[str] = field(default_factory=list)
    keys: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    centre: Tensor = field(default_factory=lambda: torch.empty(0))
    least: Tensor | float = 1.0
    layer: int = 0
    subjects: list[list[str]] = field(default_factory=list)

    def fires(self, model: EditableModel) -> str:
        low, high = (f"{float(value):.2f}" for value in self.thresholds.aminmax())
        names = list(dict.fromkeys(chain(*self.subjects)))
        more = f" or one of {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        some = "" if all(self.subjects) else ", where a fact's subject is known,"
        named = f" that{some} names {' or '.join(names[:_NAMED])}{more}" if names else ""
        return f"cosine of {low if low == high else f'{low} to {high}'} with its prompt{named}"

    @property
    def thresholds(self) -> Tensor:
        """``least`` of each fact, ``[n]`` float32."""
        return torch.as_tensor(self.least, dtype=torch.float32).expand(len(self.keys))

    def check(self, model: EditableModel) -> None:
        width = model.model.config.hidden_size
        if self.subjects and len(self.subjects) != len(self.texts):
            raise DataError(
                f"patch of {len(self.texts)} facts has the subjects of {len(self.subjects)}; is it damaged?"
            )
        if self.keys.shape[1] != width or self.layer >= len(model.layers):
            raise DataError(
                f"patch of layer {self.layer} has keys of {self.keys.shape[1]} values, the model has {len(model.layers)} "
                f"layers of width {width}; is it another model's?"
            )

    def rewrite(self, prompt: str, model: EditableModel) -> tuple[str, list[Patch]]:
        mine = [p for p in model.patches if isinstance(p, PromptPatch)]
        named = NamedSubjects([names or None for p in mine for names in p.subjects or [[]] * len(p.texts)])
        may = named.among([prompt])[:, 0]
        if not bool(may.any()):
            return prompt, []
        # Keys are of their own patch's layer and centre, and so must be what is compared with them.
        read = {layer: raw_embeddings([prompt], model, layer)[0] for layer in {p.layer for p in mine}}
        queries = torch.nn.functional.normalize(torch.stack([read[p.layer] - p.centre for p in mine]), dim=1)
        near = torch.cat([p.keys @ query for p, query in zip(mine, queries, strict=True)])
        least = torch.cat([p.thresholds for p in mine])
        near[~may] = -torch.inf
        best = int(last_of_greatest(torch.where(near >= least, near, -torch.inf)[:, None]))
        if near[best] < least[best]:
            return prompt, []
        text, patch = [(text, p) for p in mine for text in p.texts][best]
        return text + "\n" + prompt, [patch]

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "centre": self.centre, "least": self.thresholds.contiguous()}

    def settings(self) -> dict[str, Any]:
        return {"texts": self.texts, "layer": self.layer, "subjects": self.subjects}

    @classmethod
    def made(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Patch:
        # Patches saved by earlier versions have one number among their settings.
        least = tensors["least"] if "least" in tensors else settings["least"]
        return cls(keys=tensors["keys"], centre=tensors["centre"], **{**settings, "least": least})


def embed(texts: Sequence[str], model: EditableModel, layer: int, centre: Tensor | None) -> Tensor:
    """Embeddings ``[n, width]`` float32 of length 1: what enters ``layer``, the mean over tokens, less ``centre``."""
    raw = raw_embeddings(texts, model, layer)
    raw = raw if centre is None else raw - centre
    return torch.nn.functional.normalize(raw, dim=1)


def raw_embeddings(texts: Sequence[str], model: EditableModel, layer: int) -> Tensor:
    """The mean ``[n, width]`` float32 over a text's tokens, but for its first, of the direction of what enters ``layer``.

    Each token counts alike, whatever its length: a few are far longer than the rest and say nothing of the text.
    """
    place = model.layer(layer)
    with model.unrouted():
        heard = model.inputs(model.rows([(model.tokenizer.encode(text), []) for text in texts]), [place])[place.path]
    directions = [torch.nn.functional.normalize(h, dim=1) for h in heard]
    return torch.stack([d[min(1, len(d) - 1) :].mean(0) for d in directions])
