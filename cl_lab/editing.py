"""A stream of edits, one patch after another, scored when all of them are made: what held, by age, and what else moved.

The folder of a run holds ``run.json``, which says what was asked for and what came out, and ``patches/<n>``, one folder for
each patch in the order they were made; where the edits of a batch could not be made together, ``patches/<n>-<m>`` for the
``m``-th of them alone; and ``at/<n>.json``, the scores after the first ``n`` edits. A run that was stopped goes on behind
the last whole patch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_lab import __version__, edit_scores, hub, registry
from cl_lab.compat import use_freed_memory_again
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, DataError, EditError
from cl_lab.facts import Conflict, Edit, conflicts, read_facts, suspects
from cl_lab.files import LOCK, InUse, alone_in, write_atomically
from cl_lab.patches import Patch, load_patch

log = logging.getLogger("cl_lab")

_PATCHES = "patches/[0-9]*/patch.json"
"""Of a run's folder; what begins with a dot was being written when the run was stopped."""

Told = Callable[[int, int, str], None]
"""Called with how many edits are made, of how many, and a word on the last patch."""


def load_editable(name: str, *, dtype: str = "float32") -> EditableModel:
    """The model ``name`` (:func:`cl_lab.hub.find_model`) with its tokenizer, ready to be edited. Raises as these do.

    ``tiny`` is a random Llama of four layers that reads bytes, always the same: to try things out. Also raises
    :class:`ConfigError` where the tokenizer makes tokens that the model has not.
    """
    if name == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = hub.tiny_causal_lm(257, layers=4)
        return EditableModel(model, hub.load_tokenizer("bytes"), name)
    loaded: Any = hub.load_causal_lm(name, dtype=dtype)
    tokenizer = hub.load_tokenizer(name)
    vocabulary, highest = len(loaded.get_input_embeddings().weight), hub.highest_token(tokenizer)
    if highest >= vocabulary:
        raise ConfigError(
            f"model '{name}': has {vocabulary} tokens, but its tokenizer makes token {highest}; put the model's own "
            "tokenizer there"
        )
    return EditableModel(loaded, tokenizer, name)


def found_from_anywhere(name: str) -> str:
    """What :func:`load_editable` takes for the same model in whatever folder it is asked: for a file or folder, its path."""
    if name == "tiny" or name in hub.MODELS:
        return name
    place = Path(hub.find_model(name))
    return str(place.resolve()) if place.exists() else name


def score_facts(
    model: str,
    editor: dict[str, Any],
    facts: Path,
    out: Path,
    *,
    batch_size: int = 1,
    skip: int = 0,
    limit: int | None = None,
    chat: bool = False,
    free: bool = True,
    skip_bad: bool = False,
    layout: str = "auto",
    at: Sequence[int] = (),
    without: Sequence[int] = (),
    told: Told = lambda made, of, what: None,
) -> dict[str, Any]:
    """Make the edits in a file of ``facts`` with ``editor`` (its name and knobs), score them, and return ``run.json``.

    ``batch_size`` edits share a patch; ``skip`` leaves out the first so many facts, ``limit`` takes the first of the others.
    Scores (:func:`cl_lab.edit_scores.scores`) are those before any edit and those after the last, ``retention`` the
    reliability of each edit by then, oldest first. An edit that cannot be made is left out and named under ``refused``; the
    edits of a batch that cannot are tried one by one, each as a patch of its own. ``seconds_per_edit`` counts all of that.
    Edits that contradict one before them, or may (:func:`cl_lab.facts.suspects`), are not refused: ``conflicts`` lists the
    pairs, and ``contested`` says how many edits are in one, and what these and the others were worth.

    ``at`` are numbers of edits after which the model is scored as well, as if no more had followed: a long stream has the
    short ones in it, made once. Under the same name is a document for each, shortest first: ``edits``, the scores and what
    follows from them, the cost. ``without`` are edits, counted from 1, to be taken away when all is scored, each from the
    model with all others; under the same name is what that did to the rest (:func:`_taken_away`). Both may differ when a
    run is given again.

    Raises :class:`ConfigError` where ``out`` holds another run, or another process makes this one there, or there is no such
    edit to take away or to score after, :class:`DataError` for facts that cannot be read, and what the model and the editor
    refuse.
    """
    read = read_facts(facts, layout=layout, skip_bad=skip_bad)
    edits = read.edits[skip:][:limit]
    if not edits:
        raise ConfigError(f"--skip {skip}: '{facts}' holds {len(read.edits)} facts; leave out fewer")
    if wrong := [n for n in without if not 1 <= n <= len(edits)]:
        raise ConfigError(f"--without {wrong[0]}: there are {len(edits)} edits; give 1 to {len(edits)}")
    if wrong := [n for n in at if not 1 <= n <= len(edits) or (n % batch_size and n < len(edits))]:
        whole = f", a multiple of --batch-size {batch_size}" if batch_size > 1 else ""
        raise ConfigError(f"--at {wrong[0]}: give a number from 1 to {len(edits)}, the edits there are{whole}")
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
    with _claimed(out, asked):
        known = conflicts(edits)
        for conflict in known:
            log.warning("facts: %s", conflict.told)
        if doubted := suspects(edits):
            log.warning(
                "facts: %d %s may contradict each other in other words, first: %s %s",
                len(doubted),
                "pair" if len(doubted) == 1 else "pairs",
                doubted[0].edit.source,
                doubted[0].why,
            )
        use_freed_memory_again()
        target = load_editable(model)
        made_by.check(target)

        def made_of(count: int) -> dict[str, Any]:
            """What scores after ``count`` edits are of, to know them by."""
            return asked | {"version": __version__, "patches": _digest(out, -(-count // batch_size))}

        places = {n: out / "at" / f"{n:06d}.json" for n in sorted({*at} - {len(edits)})}
        parts = {n: part for n, place in places.items() if (part := _scored_before(place, made_of(n)))}
        plain = edit_scores.perplexity(target)
        streams = {
            n: _Stream(target, edits[:n], free, chat, [*known, *doubted], plain)
            for n in [*places, len(edits)]
            if n not in parts
        }

        def reached(count: int, cost: dict[str, Any]) -> None:
            if count in places and count not in parts:
                parts[count] = {"edits": count} | streams[count].scored() | cost
                _write(places[count], {"of": made_of(count), "scores": parts[count]})

        made, patches = _make(target, made_by, edits, out, batch_size, told, reached)
        stream = streams[len(edits)]
        worth = stream.scored()
        document = asked | {
            "status": "finished",
            "bad": [{"place": b.place, "reason": b.reason} for b in read.bad],
            **worth,
            **made,
        }
        if at:
            parts[len(edits)] = {"edits": len(edits)} | worth | made
            document["at"] = [parts[n] for n in sorted({*at})]
        if without:
            document["without"] = [
                _taken_away(model, number, edits, patches, stream.after, worth["retention"], chat)
                for number in dict.fromkeys(without)
            ]
        _write(out / "run.json", document)
        return document


class _Stream:
    """The first edits of a run, or all of them: asked before any is made, and scored when the last of them is."""

    def __init__(
        self,
        model: EditableModel,
        edits: Sequence[Edit],
        free: bool,
        chat: bool,
        contested: Sequence[Conflict],
        perplexity: float,
    ) -> None:
        """``perplexity`` is the unedited model's, which is that of all streams."""
        self._model, self._edits, self._free, self._chat = model, edits, free, chat
        mine = {id(edit) for edit in edits}
        self._contested = [c for c in contested if {id(c.edit), id(c.other)} <= mine]
        self._before = self._ask()
        self._old = self._worth(self._before, perplexity)

    def scored(self) -> dict[str, Any]:
        """Scores ``before`` and ``after``, ``retention``, and what contradictions are in it (:func:`_contested`)."""
        model, edits, chat = self._model, self._edits, self._chat
        self.after = self._ask()
        retention = edit_scores.retention(model, edits, self.after, chat=chat)
        general = edit_scores.by_edit(model, edits, self.after, "generality", chat=chat)
        found = {
            "before": self._old,
            "after": self._worth(self.after, edit_scores.perplexity(model)),
            "retention": retention,
        }
        return found | _contested(edits, self._contested, retention, general)

    def _ask(self) -> edit_scores.Asked:
        return edit_scores.ask(self._model, self._edits, free=self._free, chat=self._chat)

    def _worth(self, said: edit_scores.Asked, perplexity: float) -> dict[str, Any]:
        found = edit_scores.scores(self._model, self._edits, said, self._before, chat=self._chat)
        found["perplexity"] = edit_scores.finite(perplexity)
        if self._free:
            found["fluency"] = edit_scores.fluency(self._model, self._edits, chat=self._chat)
        return found


def _digest(out: Path, batches: int) -> str:
    """Of the patches of the first so many batches in a run's folder: others, made anew, have another."""
    places = sorted(p for p in out.glob(_PATCHES) if int(p.parent.name[:6]) < batches)
    return hashlib.sha256(b"\0".join(p.parent.name.encode() + p.read_bytes() for p in places)).hexdigest()


def _scored_before(place: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """The scores at ``place``, where they are of these patches; ``None`` where they are not, or cannot be read."""
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
        found: dict[str, Any] = document["scores"]
        return found if document["of"] == of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # they are taken anew


def _contested(
    edits: Sequence[Edit], found: Sequence[Conflict], held: Sequence[float], general: Sequence[float | None]
) -> dict[str, Any]:
    """Pairs of edits, counted from 1, that contradict each other or may; what these edits and the others were worth.

    ``held`` is the reliability of each edit, ``general`` its generality, where it has paraphrases.
    """
    place = {id(edit): i for i, edit in enumerate(edits)}
    pairs = [(place[id(c.edit)], place[id(c.other)], c) for c in found]
    within = {i for *two, c in pairs if c.kind != "duplicate" for i in two}
    some, rest = ([i for i in range(len(edits)) if (i in within) == is_in] for is_in in (True, False))
    return {
        "conflicts": [{"edit": i + 1, "other": j + 1, "kind": c.kind, "why": c.why} for i, j, c in pairs],
        "contested": {
            "edits": len(some),
            "reliability": _mean(held, some),
            "others": _mean(held, rest),
            "generality": _mean(general, some),
            "others_generality": _mean(general, rest),
        },
    }


def _mean(values: Sequence[float | None], of: Sequence[int]) -> float | None:
    known = [v for v in (values[i] for i in of) if v is not None]
    return sum(known) / len(known) if known else None


def _taken_away(
    name: str,
    number: int,
    edits: Sequence[Edit],
    patches: Mapping[int, Patch],
    after: edit_scores.Asked,
    retention: Sequence[float],
    chat: bool,
) -> dict[str, Any]:
    """What becomes of the other edits when the patch of the ``number``-th is taken away from a model that has all of them.

    ``removed`` are the edits of that patch, counted from 1 as all here. Of the ``others`` (how many), ``forced`` has those
    whose whole answer was right, teacher-forced, and is not any more (``lost``) or the other way round (``gained``), and
    ``free`` the same of what the model writes; ``moved`` is how many answer in other tokens, and ``retention`` each edit's
    reliability then. For an edit that was refused, only ``refused``.
    """
    patch = patches.get(number - 1)
    if patch is None:
        log.warning("--without %d: that edit was refused; there is nothing to take away", number)
        return {"edit": number, "refused": True}
    model = load_editable(name)
    for other in dict.fromkeys(patches.values()):
        other.apply(model)
    patch.revert(model)
    # All edits are asked, in the batches of before: others would round otherwise.
    said = edit_scores.ask(model, edits, free=bool(after.texts), chat=chat, groups=("reliability",))
    now = edit_scores.retention(model, edits, said, chat=chat)
    others = [i for i, its in patches.items() if its is not patch]
    found: dict[str, Any] = {
        "edit": number,
        "removed": [i + 1 for i, its in patches.items() if its is patch],
        "others": len(others),
        "moved": sum(said.tokens["reliability"][i] != after.tokens["reliability"][i] for i in others),
        "forced": _changed(others, [r == 1 for r in retention], [r == 1 for r in now]),
        "retention": now,
    }
    if after.texts:
        found["free"] = _changed(
            others, edit_scores.written_right(edits, after), edit_scores.written_right(edits, said)
        )
    return found


def _changed(places: Sequence[int], before: Sequence[bool], after: Sequence[bool]) -> dict[str, list[int]]:
    return {
        "lost": [i + 1 for i in places if before[i] and not after[i]],
        "gained": [i + 1 for i in places if after[i] and not before[i]],
    }


@contextlib.contextmanager
def _claimed(out: Path, asked: dict[str, Any]) -> Iterator[None]:
    """Make ``out`` the folder of this run, or find it to be so already, and be the one process that works in it.

    That of another run is taken over if it ended before its first patch: a command that was wrong and is given corrected.
    Raises :class:`ConfigError` for any other, and while another process works there.
    """
    _may_claim(out, asked)  # before anything is left in a folder of somebody else's
    with contextlib.ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(out))
        except InUse as other:
            raise ConfigError(
                f"--out '{out}': process {other} is making it; wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            raise ConfigError(f"--out '{out}': cannot be used ({error.strerror}); choose another folder") from None
        if _may_claim(out, asked):
            _write(out / "run.json", asked | {"status": "running"})
        yield


def _may_claim(out: Path, asked: dict[str, Any]) -> bool:
    """Whether ``out`` is still to be made the folder of this run; False where it is. Raises as :func:`_claimed`."""
    place = out / "run.json"
    try:
        if not place.is_file():
            if out.exists() and {p.name for p in out.iterdir()} - {LOCK}:
                raise ConfigError(f"--out '{out}': exists and is no run of edits; choose another folder")
            return True
        known = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"'{place}': is no JSON ({error}); choose another folder") from None
    except OSError as error:
        raise ConfigError(f"--out '{out}': cannot be used ({error.strerror}); choose another folder") from None
    if not isinstance(known, dict) or not asked.keys() <= known.keys():  # a training run has another document there
        raise ConfigError(f"--out '{out}': exists and is no run of edits; choose another folder")
    differs = [k for k, v in asked.items() if known[k] != v]
    if differs and (known.get("status") != "running" or any(out.glob(_PATCHES))):
        raise ConfigError(
            f"--out '{out}': holds a run with another {differs[0]} ({known[differs[0]]!r}, asked for "
            f"{asked[differs[0]]!r}); choose another folder"
        )
    return bool(differs)


def _make(
    model: EditableModel,
    editor: Any,
    edits: Sequence[Edit],
    out: Path,
    batch_size: int,
    told: Told,
    reached: Callable[[int, dict[str, Any]], None],
) -> tuple[dict[str, Any], dict[int, Patch]]:
    """Lay one patch after another on ``model``; those that are on disk are read.

    Edits that cannot be made together are made alone, so that a bad one takes no other with it. What it took and what was
    refused, and the patch of each edit by its place, oldest first. ``reached`` is called after each batch with how many
    edits were made or refused by then, and the former so far.
    """
    done: list[Edit] = []
    patches: dict[int, Patch] = {}
    refused: list[dict[str, str]] = []
    seconds = size = 0.0

    def cost() -> dict[str, Any]:
        count = max(len(done), 1)
        return {"seconds_per_edit": seconds / count, "bytes_per_edit": size / count, "refused": list(refused)}

    for n, first in enumerate(range(0, len(edits), batch_size)):
        whole, folder = range(first, min(first + batch_size, len(edits))), out / "patches" / f"{n:06d}"
        alone = [(range(i, i + 1), folder.with_name(f"{folder.name}-{i - first:06d}")) for i in whole]
        known = len(whole) > 1 and any((place / "patch.json").is_file() for _, place in alone)
        parts = alone if known else [(whole, folder)]  # a batch that was refused is not tried again
        lost = 0.0
        while parts:
            (places, folder), *parts = parts
            some = [edits[i] for i in places]
            if (folder / "patch.json").is_file():
                patch = load_patch(folder)
            else:
                start = time.perf_counter()
                try:
                    patch = editor.propose(model, some, done)
                except EditError as error:
                    took = time.perf_counter() - start
                    if len(some) > 1:
                        log.warning("%s; the %d edits of its batch are tried one by one", error, len(some))
                        parts, lost = alone, took
                    else:
                        log.warning("%s; left out", error)
                        refused.append({"prompt": some[0].prompt, "reason": str(error)})
                        seconds += took
                    continue
                # With what the batch took, so that a run that goes on from here counts it too.
                patch.notes["seconds"] = time.perf_counter() - start + lost
                lost = 0.0
                _save(patch, folder)
            seconds += float(patch.notes["seconds"])
            patch.apply(model)
            done += some
            patches |= dict.fromkeys(places, patch)
            size += patch.nbytes
            told(len(done), len(edits), some[-1].prompt)
        seconds += lost
        reached(whole.stop, cost())
    return cost(), patches


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


def _write(place: Path, document: dict[str, Any]) -> None:
    try:
        place.parent.mkdir(exist_ok=True)
        write_atomically(place, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(
            f"'{place}' cannot be written ({error.strerror}); make room and give the same command: it goes on from here"
        ) from error
