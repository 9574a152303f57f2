"""A stream of edits, one patch after another, scored when all of them are made: what held, by age, and what else moved.

The folder of a run holds ``run.json``, which says what was asked for and what came out, and ``patches/<n>``, one folder for
each patch in the order they were made. A run that was stopped goes on behind the last whole patch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_lab import edit_scores, hub, registry
from cl_lab.compat import use_freed_memory_again
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, DataError, EditError
from cl_lab.facts import Edit, conflicts, read_facts
from cl_lab.files import write_atomically
from cl_lab.patches import load_patch

log = logging.getLogger("cl_lab")

Told = Callable[[int, int, str], None]
"""Called with how many edits are made, of how many, and a word on the last patch."""


def load_editable(name: str, *, dtype: str = "float32") -> EditableModel:
    """The model ``name`` (:func:`cl_lab.hub.find_model`) with its tokenizer, ready to be edited. Raises as these do.

    ``tiny`` is a random Llama of four layers that reads bytes, always the same: to try things out.
    """
    if name == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = hub.tiny_causal_lm(257, layers=4)
        return EditableModel(model, hub.load_tokenizer("bytes"), name)
    return EditableModel(hub.load_causal_lm(name, dtype=dtype), hub.load_tokenizer(name), name)


def score_facts(
    model: str,
    editor: dict[str, Any],
    facts: Path,
    out: Path,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    chat: bool = False,
    free: bool = True,
    skip_bad: bool = False,
    layout: str = "auto",
    told: Told = lambda made, of, what: None,
) -> dict[str, Any]:
    """Make the edits in a file of ``facts`` with ``editor`` (its name and knobs), score them, and return ``run.json``.

    ``batch_size`` edits share a patch; ``limit`` takes the first so many. Scores (:func:`cl_lab.edit_scores.scores`) are
    those before any edit and those after the last, ``retention`` the reliability of each edit by then, oldest first. A patch
    that cannot be made is left out and named under ``refused``. Raises :class:`ConfigError` where ``out`` holds another run,
    :class:`DataError` for facts that cannot be read or contradict each other, and what the model and the editor refuse.
    """
    read = read_facts(facts, layout=layout, skip_bad=skip_bad)
    edits = read.edits[:limit]
    made_by = registry.create("editors", editor, "editor")
    asked = {
        "model": model,
        "editor": editor,
        "facts": facts.name,
        "sha256": hashlib.sha256(json.dumps([e.as_json() for e in edits]).encode()).hexdigest(),
        "edits": len(edits),
        "batch_size": batch_size,
        "chat": chat,
        "free": free,
    }
    _claim(out, asked)
    for conflict in conflicts(edits):
        log.warning("facts: %s", conflict.why)
    use_freed_memory_again()
    target = load_editable(model)
    before = edit_scores.ask(target, edits, free=free, chat=chat)
    old = _scored(target, edits, before, before, free, chat)
    made = _make(target, made_by, edits, out, batch_size, told)
    after = edit_scores.ask(target, edits, free=free, chat=chat)
    new = _scored(target, edits, after, before, free, chat)
    document = asked | {
        "status": "finished",
        "bad": [{"place": b.place, "reason": b.reason} for b in read.bad],
        "before": old,
        "after": new,
        "retention": edit_scores.retention(target, edits, after, chat=chat),
        **made,
    }
    _write(out, document)
    return document


def _scored(
    model: EditableModel,
    edits: Sequence[Edit],
    after: edit_scores.Asked,
    before: edit_scores.Asked,
    free: bool,
    chat: bool,
) -> dict[str, Any]:
    found = edit_scores.scores(model, edits, after, before, chat=chat)
    found["perplexity"] = edit_scores.perplexity(model)
    if free:
        found["fluency"] = edit_scores.fluency(model, edits, chat=chat)
    return found


def _claim(out: Path, asked: dict[str, Any]) -> None:
    """Make ``out`` the folder of this run, or find it to be so already."""
    place = out / "run.json"
    try:
        if place.is_file():
            known = json.loads(place.read_text(encoding="utf-8"))
            differs = [k for k, v in asked.items() if known.get(k) != v]
            if differs:
                raise ConfigError(
                    f"--out '{out}': holds a run with another {differs[0]} ({known.get(differs[0])!r}, asked for "
                    f"{asked[differs[0]]!r}); choose another folder"
                )
            return
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out '{out}': exists and is no run of edits; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise DataError(f"'{place}': is no JSON ({error}); choose another folder") from None
    except OSError as error:
        raise ConfigError(f"--out '{out}': cannot be used ({error.strerror}); choose another folder") from None
    _write(out, asked | {"status": "running"})


def _make(
    model: EditableModel, editor: Any, edits: Sequence[Edit], out: Path, batch_size: int, told: Told
) -> dict[str, Any]:
    """Lay one patch after another on ``model``; those that are on disk are read. What it took, and what was refused."""
    done: list[Edit] = []
    refused: list[dict[str, str]] = []
    seconds = size = 0.0
    for n, first in enumerate(range(0, len(edits), batch_size)):
        some, folder = edits[first : first + batch_size], out / "patches" / f"{n:06d}"
        start = time.perf_counter()
        if (folder / "patch.json").is_file():
            patch = load_patch(folder)
            seconds += float(patch.notes["seconds"])
        else:
            try:
                patch = editor.propose(model, some, done)
            except EditError as error:
                log.warning("%s; left out", error)
                refused.append({"prompt": some[0].prompt, "reason": str(error)})
                continue
            patch.notes["seconds"] = time.perf_counter() - start
            seconds += patch.notes["seconds"]
            _save(patch, folder)
        patch.apply(model)
        done += some
        size += patch.nbytes
        told(len(done), len(edits), some[-1].prompt)
    count = max(len(done), 1)
    return {"seconds_per_edit": seconds / count, "bytes_per_edit": size / count, "refused": refused}


def _save(patch: Any, folder: Path) -> None:
    """Write a patch so that its folder is there whole or not at all."""
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        patch.save(scratch)
        scratch.rename(folder)
    except OSError as error:
        raise DataError(
            f"'{folder}' cannot be written ({error.strerror}); make room and give the same command: it goes on from here"
        ) from error


def _write(out: Path, document: dict[str, Any]) -> None:
    write_atomically(out / "run.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
