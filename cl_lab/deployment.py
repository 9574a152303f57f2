"""A model in service and the edits made to it: a folder with a journal, from which every state can be had again.

``deployment.json`` says which base model, by name and by the digest of its weights, which editor and which gates.
``journal.jsonl`` has one line for each event (an edit applied, undone, done again), each with the hash of the line before,
the first with that of ``deployment.json``; ``edits/<id>`` has an edit's patch and its facts. A line is written when all it
speaks of is on disk, so after a kill at any instant the folder is as it was before the event or as it is after it; a line
that was not finished counts for nothing and is taken away by the next event. One process at a time changes a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_lab import edit_scores, hub, names, registry
from cl_lab.editable import EditableModel
from cl_lab.editing import found_from_anywhere, load_editable
from cl_lab.errors import ConfigError, DataError, EditError
from cl_lab.facts import GROUPS, LOCAL, Edit, conflicts, normalised, suspects
from cl_lab.files import LOCK, InUse, alone_in, sync_folder, write_atomically
from cl_lab.patches import Delta, Patch, WeightPatch, load_patch
from cl_lab.probe_texts import QUESTIONS
from cl_lab.subjects import words

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
GATES: dict[str, float] = {"paraphrases": 0.5, "guards": 1.0, "perplexity": 1.05}
"""An edit is refused unless its prompt is answered, and of its paraphrases and of the guards such a share is right, or as it
was; and if the perplexity of plain texts grows by more than this factor."""

PARAPHRASES = ("Question: {}", "Please tell me. {}", "I should like to know: {}")
"""The prompt in other words, where the facts give none."""

_DOCUMENT, _JOURNAL, _EDITS, _GUARDS = "deployment.json", "journal.jsonl", "edits", "guards.jsonl"
_EXPORT = "cl-lab.json"


@dataclass(frozen=True)
class Event:
    """A line of the journal: the ``n``-th event, at ``time`` (UTC), ``kind`` (apply, undo, redo), and the edit it is about.

    ``digest`` is that of the edit's patch (:meth:`~cl_lab.patches.Patch.save`), ``facts`` that of its facts; ``forced`` says
    that gates were overruled.
    """

    n: int
    time: str
    kind: str
    id: str
    digest: str
    facts: str
    forced: bool
    previous: str
    hash: str


class Deployment:
    """A deployment's folder, read and checked. Raises :class:`DataError`, naming file and line, where it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            text = (folder / _DOCUMENT).read_bytes()
            self.document: dict[str, Any] = json.loads(text)
        except OSError as error:
            raise ConfigError(
                f"'{folder}': is no deployment ({_DOCUMENT}: {error.strerror}); make one: cl-lab edit init {folder}"
            ) from None
        except ValueError as error:
            raise DataError(f"'{folder / _DOCUMENT}': is no JSON ({error}); restore it from a copy") from None
        if not isinstance(self.document, dict) or self.document.get("format") != FORMAT:
            raise DataError(f"'{folder / _DOCUMENT}': is of another format; this version reads {FORMAT}; update cl-lab")
        if missing := [key for key in ("model", "sha256", "editor", "gates") if key not in self.document]:
            raise DataError(f"'{folder / _DOCUMENT}': has no '{missing[0]}'; restore it from a copy")
        self._root = hashlib.sha256(text).hexdigest()
        self.events: list[Event] = []
        self._whole = 0
        self.read()

    # -- what there is ----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: Path, model: str, editor: Mapping[str, Any], gates: Mapping[str, float] | None = None
    ) -> Deployment:
        """Make the folder of a new deployment of ``model``, edited by ``editor`` (its name and knobs).

        Raises :class:`ConfigError` where the folder is taken, a gate is unknown, or model or editor cannot be had, and
        :class:`DataError` where it cannot be written: what was made by then is taken away again.
        """
        _refuse_taken(folder)
        if unknown := sorted({*(gates or {})} - {*GATES}):
            raise ConfigError(f"gates: unknown gate '{unknown[0]}'; known: {', '.join(GATES)}")
        for name, value in (gates or {}).items():
            _check_gate(name, value)
        made_by = registry.create("editors", editor, "editor")
        base = load_editable(model)
        made_by.check(base)
        document = {
            "format": FORMAT,
            "model": found_from_anywhere(model),
            "sha256": weights_digest(base),
            "editor": dict(editor),
            "gates": {**GATES, **(gates or {})},
            "created": _now(),
        }
        with contextlib.ExitStack() as undone:
            try:
                for place in (*reversed(folder.parents), folder):
                    if not place.exists():
                        place.mkdir(exist_ok=True)
                        undone.callback(_take_away, place)
                # What is there by now another process made, and it stays.
                (folder / _EDITS).mkdir()
                undone.callback(_take_away, folder / _EDITS)
                for name in (_JOURNAL, LOCK):
                    (folder / name).touch(exist_ok=False)
                    undone.callback(_take_away, folder / name)
                undone.callback(_take_away, folder / _DOCUMENT)
                write_atomically(folder / _DOCUMENT, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
                sync_folder(folder)
            except OSError as error:
                raise DataError(
                    f"'{folder}' cannot be written ({error.strerror}); make room or choose another place"
                ) from error
            undone.pop_all()
        return cls(folder)

    def read(self) -> None:
        """Read the journal again, each line checked against the one before."""
        place = self.folder / _JOURNAL
        try:
            data = place.read_bytes()
        except OSError as error:
            raise DataError(f"'{place}': {error.strerror}; restore it from a copy") from None
        lines = data.split(b"\n")
        self._whole = len(data) - len(lines.pop())  # what has no end was not finished
        events: list[Event] = []
        previous = self._root
        for number, line in enumerate(lines, 1):
            event = _parsed(line, f"'{place}', line {number}")
            if event.previous != previous:
                what = "the line before" if number > 1 else _DOCUMENT
                raise DataError(
                    f"'{place}', line {number}: does not follow {what}, which was changed; restore the folder"
                )
            if event.n != number:
                raise DataError(f"'{place}', line {number}: says it is event {event.n}; restore the folder")
            events.append(event)
            previous = event.hash
        self.events = events

    def active(self, as_of: int | None = None) -> list[str]:
        """The edits in force behind event ``as_of`` (default: the last), in the order they were made and lie on the model.

        So one that was undone and done again is where it was. Raises :class:`ConfigError` for a position that is not in the
        journal.
        """
        if as_of is not None and not 0 <= as_of <= len(self.events):
            raise ConfigError(f"as_of = {as_of}: the journal of '{self.folder}' has events 0 to {len(self.events)}")
        last = {event.id: event.kind for event in self.events[:as_of]}
        made = (event.id for event in self.events[:as_of] if event.kind == "apply")
        return [identifier for identifier in made if last[identifier] != "undo"]

    def edits(self, identifier: str) -> list[Edit]:
        """The facts of an edit, as they were applied. Raises as :meth:`event_of`, and where the file was changed."""
        event = self.event_of(identifier)
        place = self.folder / _EDITS / identifier / "facts.json"
        try:
            data = place.read_bytes()
        except OSError as error:
            raise DataError(f"'{place}': {error.strerror}; restore it from a copy") from None
        if hashlib.sha256(data).hexdigest() != event.facts:
            raise DataError(
                f"'{place}': is not what line {event.n} of {_JOURNAL} says; the file was changed; restore it"
            )
        # No answer is too long that was taken once: the limit is the layout's, and may have been another.
        return [Edit.from_json(record, max_answer=sys.maxsize) for record in json.loads(data)]

    def event_of(self, identifier: str) -> Event:
        """The event that applied an edit. Raises :class:`ConfigError` where there is none of that id."""
        for event in self.events:
            if event.id == identifier and event.kind == "apply":
                return event
        known = ", ".join(e.id for e in self.events if e.kind == "apply") or "none yet"
        raise ConfigError(f"edit '{identifier}': is not in the journal of '{self.folder}'; there are: {known}")

    def patch(self, identifier: str) -> Patch:
        """An edit's patch, numbered by its event. Raises as :func:`~cl_lab.patches.load_patch` and :meth:`event_of`."""
        event = self.event_of(identifier)
        patch = load_patch(self.folder / _EDITS / identifier, event.digest)
        patch.number = event.n
        return patch

    def load(self, as_of: int | None = None) -> EditableModel:
        """The model with the edits in force. Raises :class:`DataError` where it is not the base model of old."""
        wanted = self.active(as_of)
        model = self.base()
        self.bring(model, [], wanted)
        return model

    def base(self) -> EditableModel:
        """The model without edits. Raises likewise."""
        model = load_editable(self.document["model"])
        found = weights_digest(model)
        if found != self.document["sha256"]:
            raise DataError(
                f"model '{self.document['model']}': its weights have the digest {found[:12]}…, {_DOCUMENT} says "
                f"{self.document['sha256'][:12]}…: the base model was changed underneath; bring the old one back"
            )
        return model

    def bring(self, model: EditableModel, there: Sequence[str], wanted: Sequence[str]) -> None:
        """Take a model that has the edits ``there`` on it, and no others, to the edits ``wanted``; both as :meth:`active`.

        Raises as :meth:`patch`; the model is then of no use.
        """
        kept, left = {*wanted}, {*there}
        for identifier, patch in zip(there, list(model.patches), strict=True):
            if identifier not in kept:
                patch.revert(model)
        for identifier in wanted:
            if identifier not in left:
                self.patch(identifier).apply(model)

    def guards(self) -> list[str]:
        """Questions whose answers must stay: the operator's own ``guards.jsonl`` and some that ship with the laboratory."""
        own: list[str] = []
        place = self.folder / _GUARDS
        if place.is_file():
            try:
                text = place.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"'{place}': cannot be read as UTF-8 ({error}); save it so") from None
            for number, line in enumerate(text.split("\n"), 1):
                if not line.strip():
                    continue
                try:
                    prompt = json.loads(line)["prompt"]
                except (ValueError, KeyError, TypeError):
                    prompt = None
                if not isinstance(prompt, str) or not prompt.strip():
                    raise DataError(f"'{place}', line {number}: must be a JSON object with a prompt")
                own.append(prompt)
        return own + [question for some in QUESTIONS.values() for question, _ in some[:4]]

    # -- what changes it --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self, wait: float = 10.0) -> Iterator[None]:
        """Be the one process that changes the folder, after waiting ``wait`` seconds at most. The journal is read anew.

        Raises :class:`ConfigError` where another does so still, and :class:`DataError` where the folder cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(alone_in(self.folder, wait))
            except InUse as other:
                raise ConfigError(f"'{self.folder}': process {other} is changing it; try again later") from None
            except OSError as error:
                raise DataError(
                    f"'{self.folder / LOCK}' cannot be written ({error.strerror}); nothing was changed; give the folder to "
                    "who writes there"
                ) from error
            self.read()
            yield

    def propose(
        self, model: EditableModel, edits: Sequence[Edit], *, chat: bool = False, tried: Sequence[Edit] = ()
    ) -> tuple[Patch, dict[str, Any]]:
        """A patch for ``edits`` on ``model``, which stays as it is, and what it would do (:func:`preview`).

        ``tried`` are edits that lie on ``model`` behind those in force, and are not written down.
        ``suspects`` says which edits in force it may contradict in other words, ``subjects`` what each fact was taken to be
        about: what it says, or else what :func:`cl_lab.names.guessed` finds in its prompt. Nothing found breaks a gate where
        the editor goes by the subject.

        Raises :class:`EditError` where it contradicts an edit in force or its subject is not in its prompt, and what the
        editor raises.
        """
        earlier = [*(edit for identifier in self.active() for edit in self.edits(identifier)), *tried]
        self.refuse_conflicts(edits)
        editor = registry.create("editors", self.document["editor"], "editor")
        about = [dataclasses.replace(e, subject=_subject_of(e)) for e in edits]
        patch, seen = preview(model, editor, about, earlier, self.guards(), self.document["gates"], chat=chat)
        if getattr(
            editor, "subjects", False
        ):  # it answers what names the subject; without one, whatever is asked alike
            seen["broken"] += [
                f"'{e.shown}' names no subject that is known: what is asked alike of others may be answered so; give it"
                for e in about
                if not e.subject
            ]
        more = {
            "suspects": [conflict.told for conflict in suspects(edits, earlier)],
            "subjects": [e.subject for e in about],
        }
        return patch, seen | more

    def apply(self, model: EditableModel, patch: Patch, edits: Sequence[Edit], *, forced: bool = False) -> str:
        """Write an edit down and lay it on ``model``; returns its id. Call it inside :meth:`changing`.

        Raises :class:`DataError` where it cannot be written: folder and model are then as they were.
        """
        identifier = str(1 + sum(e.kind == "apply" for e in self.events))
        patch.number = len(self.events) + 1  # what its event will have
        place = self.folder / _EDITS / identifier
        scratch = place.with_name(f".{identifier}")
        facts = (json.dumps([e.as_json() for e in edits], indent=1, ensure_ascii=False) + "\n").encode()
        try:
            for left in (scratch, place):  # of an event that did not come to its end
                shutil.rmtree(left, ignore_errors=True)
            digest = patch.save(scratch)
            write_atomically(scratch / "facts.json", facts)
            sync_folder(scratch)
            scratch.rename(place)
            sync_folder(place.parent)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise DataError(
                f"'{place}' cannot be written ({error.strerror}); nothing was changed; make room"
            ) from error
        patch.apply(model)
        try:
            self._append("apply", identifier, digest, hashlib.sha256(facts).hexdigest(), forced)
        except DataError:
            patch.revert(model)
            raise
        return identifier

    def undo(self, identifier: str) -> None:
        """Take an edit out of force, inside :meth:`changing`. Raises :class:`ConfigError` where it is not in force."""
        event = self.event_of(identifier)
        if identifier not in self.active():
            raise ConfigError(f"edit '{identifier}': is undone already; redo brings it back")
        self._append("undo", identifier, event.digest, event.facts, False)

    def redo(self, identifier: str) -> None:
        """Bring an undone edit back, as it was and where it was among those in force; inside :meth:`changing`.

        Raises :class:`ConfigError` where it is in force, :class:`EditError` where it contradicts an edit that is.
        """
        event = self.event_of(identifier)
        active = self.active()
        if identifier in active:
            raise ConfigError(f"edit '{identifier}': is in force; there is nothing to do again")
        self.patch(identifier)  # is whole
        self.refuse_conflicts(self.edits(identifier))
        self._append("redo", identifier, event.digest, event.facts, False)

    def export(self, out: Path, *, adapter: bool = False) -> dict[str, Any]:
        """Write the model as it is deployed into ``out``; returns ``plain`` (bool) and how to load it, ``load``.

        Where every edit in force is a change of weights, a plain folder of Transformers'. Else the base model's, with the
        patches beside it: :func:`load_exported` reads both. With ``adapter`` the edits alone, as PEFT's LoRA of the base
        model. Raises :class:`ConfigError` where ``out`` is taken or an edit is not of low rank, as an adapter wants, and
        :class:`DataError` where it cannot be written.
        """
        _refuse_taken(out)
        patches = [self.patch(identifier) for identifier in self.active()]
        if adapter:
            return self._export_adapter(out, patches)
        plain = all(isinstance(patch, WeightPatch) for patch in patches)
        model = self.load(None if plain else 0)
        document = {
            "format": FORMAT,
            "model": self.document["model"],
            "events": len(self.events),
            "tokenizer": "bytes" if isinstance(model.tokenizer, hub.ByteTokenizer) else None,
            "patches": [] if plain else [patch.editor for patch in patches],
        }
        with _appearing(out) as scratch:
            hub.save_causal_lm(model.model, model.tokenizer, scratch)
            for n, patch in enumerate([] if plain else patches):
                patch.save(scratch / _EDITS / f"{n:06d}")
            write_atomically(scratch / _EXPORT, json.dumps(document, indent=1) + "\n")
        how = f"AutoModelForCausalLM.from_pretrained('{out}')" if plain else f"cl_lab.load('{out}')"
        return {"plain": plain, "load": how, "edits": len(patches)}

    def _export_adapter(self, out: Path, patches: Sequence[Patch]) -> dict[str, Any]:
        from safetensors.torch import save

        if not patches:
            raise ConfigError(f"'{self.folder}': has no edits in force, which an adapter could hold")
        model = self.base()
        for identifier, patch in zip(self.active(), patches, strict=True):
            if not isinstance(patch, WeightPatch) or any(c.dense is not None for c in patch.changes.values()):
                raise ConfigError(
                    f"edit {identifier} of '{self.folder}': is no change of low rank, as an adapter has; leave out --adapter"
                )
        content, tensors = peft_adapter(
            model, [p for p in patches if isinstance(p, WeightPatch)], self.document["model"]
        )
        with _appearing(out) as scratch:
            write_atomically(scratch / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
            write_atomically(scratch / "adapter_config.json", json.dumps(content, indent=1) + "\n")
        how = f"PeftModel.from_pretrained(model, '{out}')"
        return {"plain": False, "load": how, "edits": len(patches)}

    def check(self) -> list[str]:
        """What is wrong with the folder, one line each; empty where patches, facts and base model are as written."""
        wrong: list[str] = []
        for event in self.events:
            if event.kind == "apply":
                for look in (self.patch, self.edits):
                    try:
                        look(event.id)
                    except DataError as error:
                        wrong.append(str(error))
        try:
            self.load(0)
        except (DataError, ConfigError) as error:
            wrong.append(str(error))
        return wrong

    def refuse_conflicts(self, edits: Sequence[Edit]) -> None:
        """Raise :class:`EditError` where one of ``edits`` speaks of a fact of an edit in force, or of one before it."""
        earlier = [(identifier, edit) for identifier in self.active() for edit in self.edits(identifier)]
        numbers = {id(edit): identifier for identifier, edit in earlier}
        for conflict in conflicts(edits, [edit for _, edit in earlier]):
            number = numbers.get(id(conflict.other))
            fix = "leave one of them out" if number is None else f"undo edit {number} first, or leave this one out"
            raise EditError(f"{conflict.told}; {fix}")

    def holds(self, edit: Edit) -> str | None:
        """The number of the edit in force that says the same of the same prompt; ``None`` where none does."""
        for identifier in self.active():
            if any(e.prompt == edit.prompt and e.answer == edit.answer for e in self.edits(identifier)):
                return identifier
        return None

    def _append(self, kind: str, identifier: str, digest: str, facts: str, forced: bool) -> None:
        place = self.folder / _JOURNAL
        line: dict[str, Any] = {
            "n": len(self.events) + 1,
            "time": _now(),
            "kind": kind,
            "id": identifier,
            "digest": digest,
            "facts": facts,
            "forced": forced,
            "previous": self.events[-1].hash if self.events else self._root,
        }
        event = Event(**line, hash=_hash(line))
        data = (json.dumps(line | {"hash": event.hash}) + "\n").encode()
        try:
            with place.open("r+b") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):  # a torn line counts for nothing even if it stays
                        file.truncate(self._whole)
                    raise
        except OSError as error:
            raise DataError(
                f"'{place}' cannot be written ({error.strerror}); nothing was changed; make room"
            ) from error
        self._whole += len(data)
        self.events.append(event)


def named(patches: Sequence[Patch], model: EditableModel, ids: Sequence[str]) -> list[str]:
    """The ids of the edits whose patches these are, of those ``ids`` that lie on ``model``, oldest first."""
    known = {id(patch): identifier for patch, identifier in zip(model.patches, ids, strict=True)}
    return list(dict.fromkeys(known[id(patch)] for patch in patches))


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when all is written. Raises :class:`DataError` where it cannot be.

    An empty folder that is there already is filled, and not replaced: a shell that stands in it, as where ``out`` is ``.``,
    would go on in one that is gone.
    """
    place = out.resolve()  # '.' and '..' have no name beside which something could be written
    # A name that nothing else has: '.git' or '.config' may well stand beside what is to be 'git' or 'config'.
    scratch = place.with_name(f".{place.name}.{os.getpid()}.{time.time_ns()}.tmp")
    moved: list[Path] = []
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if place.exists():
            if any(place.iterdir()):  # by now; what another put there is not written over
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            for part in sorted(scratch.iterdir()):
                moved.append(place / part.name)
                shutil.move(part, moved[-1])  # also where it is the mount of another disk
            scratch.rmdir()
        else:
            scratch.rename(place)
    except OSError as error:
        for part in moved:
            shutil.rmtree(part, ignore_errors=True)
            _take_away(part)
        raise DataError(f"'{out}' cannot be written ({error.strerror}); make room or choose another place") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def peft_adapter(
    model: EditableModel, patches: Sequence[WeightPatch], base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sum of low-rank changes as the configuration and the tensors of a LoRA in PEFT's layout.

    Changes of one weight stand side by side: ``[b₁ b₂] [a₁; a₂] = b₁a₁ + b₂a₂``, of rank ``r₁ + r₂``; ``alpha`` is the rank,
    so that nothing is scaled.
    """
    import torch

    parts: dict[str, list[Delta]] = {}
    for patch in patches:
        for path, change in patch.changes.items():
            parts.setdefault(path, []).append(change)
    tensors = {}
    for path, changes in parts.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.cat([c.a for c in changes if c.a is not None])
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.cat([c.b for c in changes if c.b is not None], 1)
    ranks = {path: len(tensors[f"base_model.model.{path}.lora_A.weight"]) for path in parts}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted(ranks),
        "r": 8,
        "lora_alpha": 8,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(model.site(path).transposed for path in ranks),
        "inference_mode": True,
    }
    return content, tensors


def load_exported(folder: Path) -> EditableModel:
    """The model in a folder of :meth:`Deployment.export`, or of a deployment, with its edits in force.

    Raises :class:`ConfigError` for a folder that is neither, :class:`DataError` for one that is damaged.
    """
    if (folder / _DOCUMENT).is_file():
        return Deployment(folder).load()
    try:
        document = json.loads((folder / _EXPORT).read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"'{folder}': is neither a deployment nor an export of one ({_EXPORT} is missing)") from None
    except ValueError as error:
        raise DataError(f"'{folder / _EXPORT}': is no JSON ({error}); export again") from None
    if document.get("format") != FORMAT:
        raise DataError(f"'{folder / _EXPORT}': is of another format; this version reads {FORMAT}; update cl-lab")
    tokenizer = hub.load_tokenizer(document["tokenizer"] or str(folder))
    model = EditableModel(hub.load_causal_lm(str(folder)), tokenizer, str(folder))
    for n in range(len(document["patches"])):
        load_patch(folder / _EDITS / f"{n:06d}").apply(model)
    return model


def preview(
    model: EditableModel,
    editor: Any,
    edits: Sequence[Edit],
    earlier: Sequence[Edit],
    guards: Sequence[str],
    gates: Mapping[str, float],
    *,
    chat: bool = False,
) -> tuple[Patch, dict[str, Any]]:
    """A patch for ``edits`` and what it does: answers before and after, what moved, and which gates it breaks.

    The model is as it was afterwards. Asked are the edits' own questions and paraphrases, and beside them the ``guards``,
    the edits' probes, and the same of other subjects like theirs (:func:`others`), but for those that an edit is to change.
    ``broken`` has one line for each gate; each of ``answers`` says what was asked, wanted
    and said. Raises :class:`EditError` as the editor does.
    """
    start = time.perf_counter()
    patch = editor.propose(model, edits, earlier)
    seconds = time.perf_counter() - start
    asked = [(e.prompt, e) for e in edits]
    other = [(p, e) for e in edits for p in (e.paraphrases or [form.format(e.prompt) for form in PARAPHRASES])]
    local = [p.prompt for e in edits for name in LOCAL for p in GROUPS[name](e)]
    own = {normalised(p) for p, _ in asked + other}  # to change is what they are for, also where one is a guard
    taken = {normalised(e.prompt) for e in earlier}  # one that was corrected itself is no other subject
    local += [prompt for e in edits for prompt in others(model, e) if normalised(prompt) not in taken]
    kept = [p for p in dict.fromkeys([*guards, *local]) if normalised(p) not in own]
    prompts = [p for p, _ in asked + other] + kept
    most = edit_scores.budget(model, [e.answer for e in edits], chat=chat)
    before, nats = model.answer(prompts, max_new_tokens=most, chat=chat), edit_scores.perplexity(model)
    patch.apply(model)
    try:
        after, now = model.answer(prompts, max_new_tokens=most, chat=chat), edit_scores.perplexity(model)
    finally:
        patch.revert(model)

    count = len(asked) + len(other)
    answers = [
        {
            "prompt": prompt,
            "wanted": edit.answer,
            "before": was,
            "after": said,
            "right": edit_scores.is_right(said, edit.answer, edit.old),
            "paraphrase": i >= len(asked),
        }
        for i, ((prompt, edit), was, said) in enumerate(zip(asked + other, before, after, strict=False))
    ]
    moved = [
        {"prompt": p, "before": was, "after": said}
        for p, was, said in zip(kept, before[count:], after[count:], strict=True)
        if _bare(was) != _bare(said)
    ]
    right = [bool(a["right"]) for a in answers if a["paraphrase"]]
    found = {
        "paraphrases": sum(right) / max(len(right), 1),
        "guards": 1 - len(moved) / max(len(kept), 1),
        "perplexity": now / nats,
    }
    broken = [f"'{a['prompt']}' is answered '{a['after']}'" for a in answers if not a["paraphrase"] and not a["right"]]
    broken += [
        f"{n} {found[n]:.2f}, at least {gates[n]} wanted" for n in ("paraphrases", "guards") if found[n] < gates[n]
    ]
    if not found["perplexity"] <= gates["perplexity"]:
        broken.append(
            f"perplexity grows by a factor of {found['perplexity']:.3f}, at most {gates['perplexity']} wanted"
        )
    return patch, {
        "answers": answers,
        "asked_aside": len(kept),
        "moved": moved,
        **found,
        "fires": patch.fires(model),
        "broken": broken,
        "seconds": seconds,
    }


def _refuse_taken(folder: Path) -> None:
    """Raise :class:`ConfigError` where ``folder`` is a file or holds something."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}': is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"'{folder}': is there already and not empty; choose another folder")


def _take_away(place: Path) -> None:
    """Remove a file, or a folder if nothing is in it."""
    with contextlib.suppress(OSError):  # what cannot be is told by what went wrong before
        place.rmdir() if place.is_dir() else place.unlink()


def _check_gate(name: str, value: float) -> None:
    """Raise :class:`ConfigError` for a gate that nothing, or everything, would pass."""
    most = math.inf if name == "perplexity" else 1.0
    if isinstance(value, bool) or not math.isfinite(value) or not 0 <= value <= most:
        wanted = "a number from 0 up" if most == math.inf else "a share from 0 to 1"
        raise ConfigError(f"gates: {name} = {value}: must be {wanted}")


def _subject_of(edit: Edit) -> str | None:
    """What an edit is about, as its prompt writes it, or else as the edit does; where it does not say, what is guessed."""
    if not edit.subject:
        return names.guessed(edit.prompt)
    if words(edit.subject) not in words(edit.prompt):
        raise EditError(
            f"subject '{edit.subject}' is not in the prompt '{edit.shown}'; name it as the prompt does, or leave it out"
        )
    written = re.search(re.escape(edit.subject), edit.prompt, re.IGNORECASE)
    return written[0] if written else edit.subject


def others(model: EditableModel, edit: Edit, number: int = 6) -> list[str]:
    """What an edit asks, of the subjects most like its own; nothing where its subject is not known or not in the prompt."""
    if not edit.subject or edit.subject not in edit.prompt:
        return []
    return [edit.prompt.replace(edit.subject, name) for name in names.alike(model, edit.subject, number)]


def _bare(answer: str) -> str:
    """An answer without the full stop at its end."""
    return answer.rstrip(" .")


def weights_digest(model: EditableModel) -> str:
    """SHA-256 over the model's tensors, by name, as they are kept."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _parsed(line: bytes, where: str) -> Event:
    try:
        record = json.loads(line)
        found = Event(**record)
    except (ValueError, TypeError):
        raise DataError(f"{where}: is no event; restore the file from a copy") from None
    del record["hash"]
    if _hash(record) != found.hash:
        raise DataError(f"{where}: its hash is another; the line was changed; restore the file from a copy")
    return found


def _hash(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
