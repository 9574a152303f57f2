"""A deployment's folder: its states, what a kill, a full disk or a changed file does to it, and its commands."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import cl_lab
from cl_lab import deployment as module
from cl_lab.cli import app
from cl_lab.compat import import_torchvision
from cl_lab.deployment import Deployment
from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError, DataError, EditError, UserError
from cl_lab.facts import Edit, Probe
from cl_lab.hub import load_tokenizer, save_causal_lm
from cl_lab.patches import Delta, Patch, SidePatch, WeightPatch, packed

BYTES = load_tokenizer("bytes")
EDITOR = {"name": "ft-m", "lr": 0.02, "steps": 60, "contexts": 0}
LOOSE = {"paraphrases": 0.0, "guards": 0.0, "perplexity": 1000.0}
FACTS = [
    Edit("The capital of Peru is", "B", subject="Peru", relation="capital", paraphrases=("Peru's capital is",)),
    Edit("Quick question: who won?", "7"),
    Edit("Zebras have", "q"),
]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return load_editable("tiny")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model: EditableModel) -> Path:
    """A deployment with three edits, each a small change by hand."""
    folder = tmp_path_factory.mktemp("made") / "service"
    made = Deployment.create(folder, "tiny", EDITOR, LOOSE)
    target = made.load()
    with made.changing():
        for n, fact in enumerate(FACTS):
            made.apply(target, by_hand(target, n), [fact])
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "service"))


def by_hand(model: EditableModel, seed: int) -> Patch:
    site = model.down_projection(1)
    change = 0.1 * torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(seed))
    return WeightPatch("ft-m", {"edits": 1}, {site.path: Delta(dense=change)})


def weights(model: EditableModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# -- states --------------------------------------------------------------------------------------------------------


def test_every_position_of_the_journal_is_a_state(folder: Path, model: EditableModel) -> None:
    made = Deployment(folder)
    with made.changing():
        made.undo("2")
        made.redo("2")
        made.undo("1")
    assert [made.active(n) for n in range(7)] == [
        [],
        ["1"],
        ["1", "2"],
        ["1", "2", "3"],
        ["1", "3"],
        ["1", "2", "3"],
        ["2", "3"],
    ]
    again = Deployment(folder)
    assert again.active() == ["2", "3"]
    assert same(weights(again.load(0)), weights(model))
    expected = load_editable("tiny")
    for n in (1, 2):
        by_hand(expected, n).apply(expected)
    assert same(weights(again.load()), weights(expected))
    assert [e.prompt for e in again.edits("3")] == ["Zebras have"]
    assert again.check() == []
    with pytest.raises(ConfigError, match=r"as_of = 7: the journal of .* has events 0 to 6"):
        again.load(7)


@pytest.mark.parametrize("identifier", ["1", "2", "3"])
def test_undone_and_done_again_is_bit_for_bit_as_before(folder: Path, identifier: str) -> None:
    """Read anew, and on a model that follows; an edit made meanwhile lies above."""
    made = Deployment(folder)
    target = made.load()
    before, there = weights(target), made.active()
    with made.changing():
        made.undo(identifier)
        made.bring(target, there, made.active())
        without = made.active()
        made.redo(identifier)
        made.bring(target, without, made.active())
        assert same(weights(target), before)
        assert same(weights(made.load()), before)
        made.undo(identifier)
        made.bring(target, there, without)
        assert made.apply(target, by_hand(target, 9), [Edit("Snow is", "B")]) == "4"
        made.redo(identifier)
        made.bring(target, [*without, "4"], made.active())
    assert made.active() == ["1", "2", "3", "4"]
    by_hand(expected := load_editable("tiny"), 0).apply(expected)
    for n in (1, 2, 9):
        by_hand(expected, n).apply(expected)
    assert same(weights(target), weights(expected))
    assert same(weights(made.load()), weights(expected))
    assert module.named(target.patches, target, made.active()) == ["1", "2", "3", "4"]


def test_what_is_not_there_cannot_be_undone(folder: Path) -> None:
    made = Deployment(folder)
    with made.changing():
        with pytest.raises(ConfigError, match=r"edit '9': is not in the journal .* there are: 1, 2, 3"):
            made.undo("9")
        with pytest.raises(ConfigError, match="edit '2': is in force"):
            made.redo("2")
        made.undo("2")
        with pytest.raises(ConfigError, match="edit '2': is undone already; redo brings it back"):
            made.undo("2")


def test_a_folder_that_is_taken_or_none_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already and not empty"):
        Deployment.create(folder, "tiny", EDITOR)
    with pytest.raises(ConfigError, match=r"is no deployment .* make one: cl-lab edit init"):
        Deployment(tmp_path / "none")
    with pytest.raises(ConfigError, match="unknown gate 'guard'; known: paraphrases, guards, perplexity"):
        Deployment.create(tmp_path / "new", "tiny", EDITOR, {"guard": 1.0})
    for wrong, why in (({"layer": 77}, "layer = 77: .* has layers 0 to 3"), ({"module": "nope"}, "module = 'nope'")):
        with pytest.raises(ConfigError, match=why):
            Deployment.create(tmp_path / "new", "tiny", {"name": "wise", **wrong})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file': is a file; choose a folder"):
        Deployment.create(tmp_path / "file", "tiny", EDITOR)
    with pytest.raises(ConfigError, match="file': is a file; choose a folder"):
        Deployment(folder).export(tmp_path / "file")


@pytest.mark.parametrize(
    ("gate", "value"), [("guards", float("nan")), ("guards", 95), ("paraphrases", True), ("perplexity", -1.0)]
)
def test_a_gate_that_nothing_or_all_would_pass_is_refused(tmp_path: Path, gate: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"gates: {gate} = {value}: must be a "):
        Deployment.create(tmp_path / "new", "tiny", EDITOR, {gate: value})
    assert not (tmp_path / "new").exists()


def test_a_model_in_a_folder_is_found_from_anywhere(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()  # which is no folder's name here
    save_causal_lm(model.model, BYTES, tmp_path / "own")
    monkeypatch.setattr(module, "load_editable", lambda name: model)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("own", "./own", "~/own", str(tmp_path / "own"), "tiny", "someone/own")):
        Deployment.create(tmp_path / f"service{n}", name, EDITOR)
    monkeypatch.chdir("/")
    found = [Deployment(tmp_path / f"service{n}").document["model"] for n in range(6)]
    assert found == [*4 * [str(tmp_path / "own")], "tiny", "someone/own"]


# -- what was changed by others ------------------------------------------------------------------------------------


def altered(place: Path, change: Callable[[bytes], bytes]) -> None:
    place.write_bytes(change(place.read_bytes()))


def test_a_line_that_was_not_finished_counts_for_nothing(folder: Path) -> None:
    journal = folder / "journal.jsonl"
    whole = journal.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[-1])):
        journal.write_bytes(whole[:-cut])
        made = Deployment(folder)
        assert made.active() == ["1", "2"]
        assert made.check() == []
    with made.changing():
        made.undo("1")
    assert journal.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:2]))
    assert Deployment(folder).active() == ["2"]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("line 2: its hash is another", lambda b: b.replace(b'"id": "2"', b'"id": "1"')),
        ("line 3: its hash is another", lambda b: b.replace(b'"n": 3', b'"n": 4')),
        ("line 2: is no event", lambda b: b.replace(b'{"n": 2', b'"n": 2')),
        ("line 2: does not follow the line before", lambda b: b"".join(b.splitlines(keepends=True)[::2])),
    ],
)
def test_a_journal_that_was_altered_is_told_by_line(folder: Path, what: str, change: Callable[[bytes], bytes]) -> None:
    altered(folder / "journal.jsonl", change)
    with pytest.raises(DataError, match=f"journal.jsonl', {what}"):
        Deployment(folder)


def test_other_files_that_were_altered_are_told_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(folder / "edits/2/facts.json", lambda b: b.replace(b"7", b"8"))
    altered(folder / "edits/3/patch.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    altered(folder / "edits/1/patch.json", lambda b: b.replace(b'"edits": 1', b'"edits": 2'))
    made = Deployment(folder)
    document, facts, patch = made.check()
    assert "edits/1/patch.json" in document
    altered(folder / "edits/1/patch.json", lambda b: b.replace(b'"edits": 2', b'"edits": 1'))
    assert "edits/2/facts.json" in facts
    assert "line 2 of journal.jsonl" in facts
    assert "edits/3/patch.safetensors" in patch
    with pytest.raises(DataError, match=r"edits/3/patch\.safetensors"):
        made.load()
    made.load(2)
    altered(folder / "deployment.json", lambda b: b.replace(b"ft-m", b"wise"))
    with pytest.raises(DataError, match=r"line 1: does not follow deployment\.json, which was changed"):
        Deployment(folder)


def test_another_base_model_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(name: str) -> EditableModel:
        found = load_editable(name)
        with torch.no_grad():
            found.model.model.norm.weight[0] += 1e-3
        return found

    monkeypatch.setattr(module, "load_editable", changed)
    with pytest.raises(DataError, match="the base model was changed underneath"):
        Deployment(folder).load()
    assert len(Deployment(folder).check()) == 1


# -- faults --------------------------------------------------------------------------------------------------------


def _change_for_ever(folder: Path, ready: Any) -> None:
    made = Deployment(folder)
    target = load_editable("tiny")
    with made.changing():
        for n in range(10**6):
            ready.set()
            identifier = made.apply(target, by_hand(target, n), [Edit(f"Fact {n} is", "B")])
            if n % 2:
                made.undo(identifier)


@pytest.mark.slow
@pytest.mark.slow
def test_after_a_kill_at_any_moment_the_folder_is_whole(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    drawn, sizes = random.Random(0), []
    for _ in range(200):
        ready = context.Event()
        process = context.Process(target=_change_for_ever, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(drawn.uniform(0, 0.15))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = Deployment(folder)
        assert found.check() == []
        sizes.append(len(found.events))
    assert sizes == sorted(sizes), "nothing that was written down is lost"
    assert sizes[-1] > 43
    assert {e.id for e in found.events} <= {p.name for p in (folder / "edits").iterdir()}
    assert len(found.load().patches) == len(found.active())


@pytest.mark.parametrize("what", ["patch", "facts", "journal"])
def test_a_full_disk_loses_nothing(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Deployment(folder)
    target = made.load()
    before, on_disk = weights(target), contents(folder)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with made.changing():
        with monkeypatch.context() as broken:
            if what == "patch":
                broken.setattr(WeightPatch, "save", full)
            elif what == "facts":
                broken.setattr(module, "write_atomically", full)
            else:
                broken.setattr(module, "_hash", lambda line: broken.setattr(os, "fsync", full) or "0" * 64)
            with pytest.raises(DataError, match=r"No space left on device.*nothing was changed"):
                made.apply(target, by_hand(target, 9), [FACTS[0]])
        assert same(weights(target), before)
        assert len(target.patches) == 3
        left = contents(folder)
        assert {name: left[name] for name in on_disk} == on_disk
        assert Deployment(folder).active() == ["1", "2", "3"]
        assert made.apply(target, by_hand(target, 9), [FACTS[0]]) == "4"
    assert Deployment(folder).check() == []


def left_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("what", ["write_atomically", "sync_folder"])
def test_a_deployment_that_could_not_be_made_leaves_nothing(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "there").mkdir()
    for place in (tmp_path / "new/below", tmp_path / "there"):
        with monkeypatch.context() as broken:
            broken.setattr(module, what, full)
            with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); make room or choose"):
                Deployment.create(place, "tiny", EDITOR)
        assert left_in(tmp_path) == ["there"], "what was there stays"
    for place in (tmp_path / "new/below", tmp_path / "there"):
        Deployment.create(place, "tiny", EDITOR)


@pytest.mark.parametrize("name", ["edits", "journal.jsonl", "letter.txt"])
def test_what_another_made_meanwhile_stays(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is looked at before the model is loaded, which takes its time."""
    place = tmp_path / "service"

    def meanwhile(model: str) -> EditableModel:
        (place / name).mkdir(parents=True) if name == "edits" else place.mkdir()
        (place / name / "1" if name == "edits" else place / name).write_text("theirs")
        return load_editable(model)

    monkeypatch.setattr(module, "load_editable", meanwhile)
    monkeypatch.setattr(module, "sync_folder", lambda folder: os.listdir(folder / "away"))
    with pytest.raises(DataError, match="cannot be written"):
        Deployment.create(place, "tiny", EDITOR)
    assert left_in(place) == (["edits", "edits/1"] if name == "edits" else [name])


def test_two_do_not_change_a_folder_at_once(folder: Path) -> None:
    one, two = Deployment(folder), Deployment(folder)
    with one.changing():
        with pytest.raises(ConfigError, match=f"process {os.getpid()} is changing it"), two.changing(wait=0.1):
            pass
        one.undo("1")
    with two.changing(wait=0.1):
        assert two.active() == ["2", "3"], "what the other did is known"


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # nobody may write to it, nor may root
    told = CliRunner().invoke(app, ["edit", "undo", str(folder), "1"])
    assert isinstance(told.exception, DataError)
    assert re.fullmatch(
        r"'.*/\.lock' cannot be written \(Is a directory\); nothing was changed; .*", str(told.exception)
    )
    assert Deployment(folder).active() == ["1", "2", "3"]


# -- previews and gates --------------------------------------------------------------------------------------------


def test_a_preview_says_what_an_edit_does_and_changes_nothing(folder: Path) -> None:
    (folder / "guards.jsonl").write_text('{"prompt": "My own question"}\n\n')
    made = Deployment(folder)
    target = made.load()
    before = weights(target)
    patch, seen = made.propose(target, [Edit("A new fact is", "B")])
    assert same(weights(target), before)
    assert len(target.patches) == 3
    own, *other = seen["answers"]
    assert own["prompt"] == "A new fact is"
    assert [a["prompt"] for a in other] == [form.format("A new fact is") for form in module.PARAPHRASES]
    assert seen["asked_aside"] == len(made.guards()) > 5
    assert made.guards()[0] == "My own question"
    patch.apply(target)
    assert target.answer([own["prompt"]], max_new_tokens=24) == [own["after"]]
    for row in seen["moved"]:
        assert target.answer([row["prompt"]], max_new_tokens=24) == [row["after"]] != [row["before"]]
    assert seen["guards"] == pytest.approx(1 - len(seen["moved"]) / seen["asked_aside"])


def test_what_an_edit_is_to_change_is_no_damage(folder: Path) -> None:
    """Also where a guard asks it, a probe of its own, or it is the other subject of a fact beside it."""
    (folder / "guards.jsonl").write_text(
        '{"prompt": "What is the capital of france"}\n{"prompt": "France is ruled from:"}\n'
    )
    made = Deployment(folder)
    target = made.load()
    guard = "What is the capital of France?"
    assert guard in made.guards()
    fact = Edit(guard, "B", paraphrases=("France is ruled from",), same_subject=(Probe("France is ruled from"),))
    _, seen = made.propose(target, [fact])
    asked = {guard, "What is the capital of france", "France is ruled from", "France is ruled from:"}
    assert seen["moved"], "the edit is not without effect"
    assert not asked & {row["prompt"] for row in seen["moved"]}
    alike = module.others(target, Edit(guard, "B", subject="France"))
    assert seen["asked_aside"] == len({*made.guards(), *alike} - asked)

    egypt = Edit("The capital of Egypt is", "B", subject="Egypt")
    name = module.others(target, egypt)[0].removeprefix("The capital of ").removesuffix(" is")
    both = [egypt, Edit(f"the capital of {name} is", "q", subject=name)]
    _, seen = made.propose(target, both)
    asked = {p for e in both for p in module.others(target, e)} | {*made.guards()}
    own = {f"{the} capital of {country} is" for the in ("The", "the") for country in ("Egypt", name)}
    assert asked & own, "each is like the other"
    assert not own & {row["prompt"] for row in seen["moved"]}
    assert seen["asked_aside"] == len(asked - own - {"The capital of Peru is", "the capital of Peru is"})


def test_gates_by_what_they_say(folder: Path) -> None:
    target = Deployment(folder).load()

    class Nothing:
        def propose(self, *_: Any) -> Patch:
            site = target.down_projection(1)
            return WeightPatch("none", {}, {site.path: Delta(dense=torch.zeros(site.weight.shape))})

    gates = {"paraphrases": 0.5, "guards": 1.0, "perplexity": 0.5}
    _, seen = module.preview(target, Nothing(), [FACTS[1]], [], ["A question"], gates)
    assert [line.split()[0] for line in seen["broken"]] == ["'Quick", "paraphrases", "perplexity"]
    assert (seen["guards"], seen["moved"], seen["perplexity"]) == (1, [], pytest.approx(1))


def test_what_contradicts_an_edit_in_force_is_refused(folder: Path) -> None:
    made = Deployment(folder)
    target = made.load()
    other = Edit("Peru's capital is named", "C", subject="Peru", relation="capital")
    with pytest.raises(EditError, match="undo edit 1 first"):
        made.propose(target, [other])
    with made.changing():
        made.undo("1")
        target = made.load()
        made.propose(target, [other])
        made.apply(target, by_hand(target, 7), [other])
        with pytest.raises(EditError, match="undo edit 4 first"):
            made.redo("1")


def test_a_guard_that_is_none_is_told_by_line(folder: Path) -> None:
    (folder / "guards.jsonl").write_text('{"prompt": "Fine"}\n{"promt": "x"}\n')
    with pytest.raises(DataError, match=r"guards\.jsonl', line 2: must be a JSON object with a prompt"):
        Deployment(folder).guards()
    # As an editor on Windows saves them, and with a separator of lines that is none in JSON.
    (folder / "guards.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "Fine"}\r\n{"prompt": "a\xe2\x80\xa8b"}\n')
    assert Deployment(folder).guards()[:2] == ["Fine", "a\u2028b"]
    (folder / "guards.jsonl").write_bytes(b'{"prompt": "Caf\xe9"}\n')
    with pytest.raises(DataError, match=r"guards\.jsonl': cannot be read as UTF-8 .* save it so"):
        Deployment(folder).guards()


def test_a_subject_must_be_in_its_prompt_in_any_case(folder: Path) -> None:
    made = Deployment(folder)
    target = made.load()
    with pytest.raises(EditError, match="subject 'Chile' is not in the prompt 'The capital of Chad is'; name it as"):
        made.propose(target, [Edit("The capital of Chad is", "B", subject="Chile")])
    _, seen = made.propose(target, [Edit("The capital of Chad is", "B", subject="chad")])
    assert seen["subjects"] == ["Chad"]
    assert seen["asked_aside"] > len(made.guards()), "the same is asked of others"


def test_who_goes_by_subjects_wants_one(tmp_path: Path) -> None:
    """Nothing else would tell its question from the same one about another."""
    for editor, broken in (({"name": "wise", "steps": 1}, True), (EDITOR | {"steps": 1}, False)):
        place = Deployment.create(tmp_path / editor["name"], "tiny", editor, LOOSE)
        _, seen = place.propose(place.load(), [Edit("the capital of peru is", "B")])
        assert seen["subjects"] == [None]
        assert any("names no subject that is known" in line for line in seen["broken"]) is broken


def side_patch(model: EditableModel) -> SidePatch:
    """One that answers whatever is asked."""
    site = model.down_projection(2)
    places = torch.ones(site.weight.numel(), dtype=torch.bool)
    values = 0.3 * torch.randn(site.weight.numel(), generator=torch.Generator().manual_seed(1))
    return SidePatch("wise", path=site.path, places=packed(places), values=values.bfloat16(), gap=1e-6, floor=1e-6)


def test_an_export_says_what_the_deployment_says(folder: Path, tmp_path: Path) -> None:
    made = Deployment(folder)
    with made.changing():
        made.undo("2")
    assert made.export(tmp_path / "plain")["plain"] is True
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    expected = weights(made.load())
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())

    target = made.load()
    with made.changing():
        made.apply(target, side_patch(target), [FACTS[1]])
    found = made.export(tmp_path / "side")
    assert (found["plain"], found["edits"]) == (False, 3)
    assert "cl_lab.load" in found["load"]
    prompts = [e.prompt for e in FACTS]
    for place in (tmp_path / "side", folder):
        assert cl_lab.load(place).answer(prompts, max_new_tokens=8) == target.answer(prompts, max_new_tokens=8)
    with pytest.raises(ConfigError, match="is there already and not empty"):
        made.export(tmp_path / "side")
    with pytest.raises(ConfigError, match=r"edit 1 of .* is no change of low rank"):
        made.export(tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ConfigError, match="is neither a deployment nor an export"):
        cl_lab.load(tmp_path)


def test_an_export_leaves_hidden_folders_beside_it_alone(tmp_path: Path) -> None:
    """'git' is written beside '.git'."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("main")
    with module._appearing(tmp_path / "git") as scratch:
        (scratch / "one").write_text("1")
    with pytest.raises(EditError), module._appearing(tmp_path / "other"):
        raise EditError("not this one")
    assert (tmp_path / ".git" / "HEAD").read_text() == "main"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", "git"]


@pytest.mark.parametrize("adapter", [False, True])
def test_an_export_fills_the_folder_one_stands_in(
    folder: Path, tmp_path: Path, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Deployment(folder)
    target = made.load()
    with made.changing():
        for identifier in made.active() if adapter else ["1"]:
            made.undo(identifier)
        if adapter:
            site = target.down_projection(1)
            out, into = site.weight.shape
            delta = Delta(a=torch.ones(1, into), b=0.1 * torch.ones(out, 1))
            made.bring(target, ["1", "2", "3"], [])
            made.apply(target, WeightPatch("lora", {}, {site.path: delta}), [Edit("Snow is", "B")])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for taken in ("..", "/"):
        with pytest.raises(ConfigError, match="is there already and not empty"):
            made.export(Path(taken), adapter=adapter)
    before = left_in(tmp_path)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for what in (shutil, "move"), (module, "write_atomically"):
        with monkeypatch.context() as broken:
            broken.setattr(*what, full)
            with pytest.raises(DataError, match=r"'\.' cannot be written \(No space left on device\)"):
                made.export(Path("."), adapter=adapter)
        assert left_in(tmp_path) == before
    with pytest.raises(DataError, match="Directory not empty"), module._appearing(Path(".")):
        (here / "config.json").write_text("here")
    assert (here / "config.json").read_text() == "here", "what another put there meanwhile stays"
    (here / "config.json").unlink()
    found = made.export(Path("."), adapter=adapter)
    assert "'.'" in found["load"]
    assert ("adapter_config.json" if adapter else "config.json") in os.listdir(), "also for a shell that stands there"
    assert {p.name for p in tmp_path.iterdir()} == {"here", "service"}
    if not adapter:
        assert same(weights(cl_lab.load(Path("."))), weights(made.load()))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("layout", ["tiny", "gpt2"])
def test_edits_of_low_rank_are_an_adapter_of_pefts(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()  # in the way that does not fail where its operators are missing; both reach for it
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
    shape = {"vocab_size": 257, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    of_gpt2 = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)

    def bare() -> Any:
        if layout == "tiny":
            return load_editable("tiny").model
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(of_gpt2)

    monkeypatch.setattr(module, "load_editable", lambda name: EditableModel(bare(), BYTES, name))
    made = Deployment.create(tmp_path / "service", "tiny", EDITOR, LOOSE)
    with pytest.raises(ConfigError, match="has no edits in force"):
        made.export(tmp_path / "adapter", adapter=True)
    target = made.load()
    with made.changing():
        for n, (layer, rank) in enumerate([(1, 2), (1, 3), (2, 1)]):
            site = target.down_projection(layer)
            drawn = torch.Generator().manual_seed(n)
            out, into = site.weight.shape
            delta = Delta(a=torch.randn(rank, into, generator=drawn), b=0.1 * torch.randn(out, rank, generator=drawn))
            made.apply(target, WeightPatch("lora", {}, {site.path: delta}), [FACTS[n]])
    found = made.export(tmp_path / "adapter", adapter=True)
    assert found["load"].startswith("PeftModel.from_pretrained(model, '")
    loaded = peft.PeftModel.from_pretrained(bare(), tmp_path / "adapter").eval()
    ids = torch.tensor([list(b"The capital of Peru is")])
    with torch.no_grad():
        said, base = loaded(input_ids=ids).logits, bare().eval()(input_ids=ids).logits
        torch.testing.assert_close(said, target.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(said, base, atol=1e-2)


def test_it_is_told_which_edit_answered(folder: Path, tmp_path: Path) -> None:
    made = Deployment(folder)
    target = made.load()
    with made.changing():
        made.undo("2")
        made.apply(target, side_patch(target), [FACTS[1]])
    result = CliRunner().invoke(app, ["edit", "ask", str(folder), "Zebras have", "--json"])
    assert json.loads(result.stdout)["fired"] == ["4"]
    result = CliRunner().invoke(app, ["edit", "ask", str(folder), "Zebras have", "--json", "--as-of", "3"])
    assert json.loads(result.stdout)["fired"] == []
    result = CliRunner().invoke(app, ["edit", "ask", str(folder), "Zebras have"])
    assert "(edit 4 answered)" in result.stderr


# -- commands ------------------------------------------------------------------------------------------------------


def cli(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["edit", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_an_operators_day(tmp_path: Path) -> None:
    place = tmp_path / "service"
    gates = [f"--gate={name}={value}" for name, value in LOOSE.items()]
    cli("init", place, "lr=0.02", "steps=60", "contexts=0", "--model", "tiny", "--editor", "ft-m", *gates)
    question = "The capital of Peru is"
    (was,) = [json.loads(cli("ask", place, question, "--json"))["answer"]]
    seen = json.loads(cli("apply", place, "--prompt", question, "--answer", "B", "--dry-run", "--json"))
    assert seen["edits"][0]["applied"] is False
    assert json.loads(cli("list", place, "--json"))["edits"] == []
    cli("apply", place, "--prompt", question, "--answer", "B")
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "Zebras have", "answer": "q"}\n')
    cli("apply", place, "--facts", facts)
    now = json.loads(cli("ask", place, question, "--json"))
    assert (now["as_of"], now["answer"] != was) == (2, True)
    assert json.loads(cli("ask", place, question, "--as-of", "0", "--json"))["answer"] == was
    rows = json.loads(cli("list", place, "--json"))["edits"]
    assert [(r["id"], r["in_force"], r["facts"][0]["answer"]) for r in rows] == [("1", True, "B"), ("2", True, "q")]
    assert "Zebras have" in cli("show", place, "2")
    assert json.loads(cli("diff", place, "1", "--json"))["moved"]
    cli("undo", place, "1")
    cli("undo", place, "2")
    assert json.loads(cli("ask", place, question, "--json"))["answer"] == was
    cli("redo", place, "1")
    assert "3 events" not in cli("check", place)
    assert json.loads(cli("check", place, "--json")) == {"events": 5, "wrong": []}
    verified = json.loads(cli("verify", place, "--json"))
    assert (len(verified["edits"]), verified["lost"]) == (1, 0)


def test_a_file_of_facts_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    place, facts = tmp_path / "service", tmp_path / "facts.jsonl"
    gates = [f"--gate={name}={value}" for name, value in LOOSE.items()]
    cli("init", place, "lr=0.02", "steps=60", "contexts=0", "--model", "tiny", "--editor", "ft-m", *gates)
    lines = [
        {"prompt": f"The capital of {c} is", "answer": a} for c, a in (("Peru", "B"), ("Chad", "q"), ("Peru", "z"))
    ]
    facts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for more in ((), ("--dry-run",)):
        result = CliRunner().invoke(app, ["edit", "apply", str(place), "--facts", str(facts), *more])
        assert isinstance(result.exception, EditError)
        assert str(result.exception).startswith(
            "facts.jsonl:3: the same prompt as facts.jsonl:1, with another answer: "
        )
        assert str(result.exception).endswith("'z', not 'B'; leave one of them out")
    assert json.loads(cli("list", place, "--json"))["edits"] == []
    facts.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    cli("apply", place, "--facts", facts, "--force")
    # Of the corrected file what is in force already stays as it is.
    facts.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    document = json.loads(cli("apply", place, "--facts", facts, "--force", "--json"))
    assert (document["already"], [e["id"] for e in document["edits"]]) == (["1"], ["2"])
    assert json.loads(cli("undo", place, "2", "--json")) == {"id": "2", "in_force": False, "events": 3}
    assert json.loads(cli("redo", place, "2", "--json")) == {"id": "2", "in_force": True, "events": 4}


@pytest.mark.parametrize(
    ("editor", "knobs"), [("ft-m", ["lr=0.02", "steps=60", "contexts=0"]), ("wise", ["edits_per_shard=3", "steps=5"])]
)
def test_a_dry_run_previews_what_would_be_done(tmp_path: Path, editor: str, knobs: list[str]) -> None:
    """Each fact beside those before it, as they would be applied; a broken gate is an exit code."""
    place, facts = tmp_path / "service", tmp_path / "facts.jsonl"
    gates = [f"--gate={name}={value}" for name, value in LOOSE.items()]
    cli("init", place, *knobs, "--model", "tiny", "--editor", editor, *gates)
    lines = [{"prompt": f"The capital of {c} is", "answer": a} for c, a in (("Peru", "B"), ("Chad", "q"))]
    facts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen, done = (
        json.loads(cli("apply", place, "--facts", facts, "--force", "--json", *more))["edits"]
        for more in (["--dry-run"], [])
    )
    assert [one["applied"] for one in seen] == [False, False]
    for one, other in zip(seen, done, strict=True):
        timeless = [{k: v for k, v in edit.items() if k not in ("id", "applied", "seconds")} for edit in (one, other)]
        assert timeless[0] == timeless[1]
    strict = tmp_path / "strict"
    cli(
        "init",
        strict,
        "lr=0.02",
        "steps=1",
        "contexts=0",
        "--model",
        "tiny",
        "--editor",
        "ft-m",
        "--gate=paraphrases=1",
    )
    words = ("apply", strict, "--prompt", "Zebras have", "--answer", "q", "--dry-run", "--json")
    assert json.loads(cli(*words, code=1))["edits"][0]["broken"]
    assert json.loads(cli(*words, "--force"))["edits"][0]["applied"] is False


def test_of_a_file_of_facts_bad_ones_are_left_out_if_asked(tmp_path: Path) -> None:
    place, facts = tmp_path / "service", tmp_path / "facts.jsonl"
    gates = [f"--gate={name}={value}" for name, value in LOOSE.items()]
    cli("init", place, "lr=0.02", "steps=60", "contexts=0", "--model", "tiny", "--editor", "ft-m", *gates)
    facts.write_text('{"src": "Zebras have", "alt": "q"}\n{"src": "Yaks have"}\n')

    def refusal(*words: object) -> str:
        result = CliRunner().invoke(app, ["edit", "apply", str(place), *map(str, words)])
        assert isinstance(result.exception, UserError)
        return str(result.exception)

    assert refusal("--facts", facts).endswith(
        "has no alt; nothing was applied; correct them, or leave them out with --skip-bad"
    )
    assert "facts.jsonl:1: has no prompt" in refusal("--facts", facts, "--layout", "hallucination")
    for more in (["--skip-bad"], ["--layout", "zsre"]):
        assert "--skip-bad and --layout go with --facts" in refusal("--prompt", "a", "--answer", "b", *more)
    assert Deployment(place).events == []
    words = ("apply", place, "--facts", facts, "--skip-bad", "--layout", "zsre")
    seen = json.loads(cli(*words, "--dry-run", "--json"))
    assert seen["bad"] == [{"place": "facts.jsonl:2", "reason": "has no alt"}]
    assert "facts.jsonl:2: has no alt; left out" in cli(*words)
    assert [e.id for e in Deployment(place).events] == ["1"]


def test_an_answer_is_as_long_as_in_a_file(tmp_path: Path) -> None:
    """What a layout with longer answers brought in is read again."""
    place, facts = tmp_path / "service", tmp_path / "facts.jsonl"
    gates = [f"--gate={name}={value}" for name, value in LOOSE.items()]
    cli("init", place, "lr=0.02", "steps=1", "contexts=0", "--model", "tiny", "--editor", "ft-m", *gates)
    words = ["edit", "apply", str(place), "--prompt", "Zebras have", "--answer", "q" * 401]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == "edit: answer has 401 characters, more than max_answer = 400; correct it"
    facts.write_text(json.dumps({"prompt": "Zebras have", "target_new": "q" * 401}) + "\n")
    cli("apply", place, "--facts", facts, "--layout", "hallucination", "--force")
    assert [len(e.answer) for e in Deployment(place).edits("1")] == [401]
    assert Deployment(place).check() == []


def test_a_long_answer_has_room_to_be_right(tmp_path: Path) -> None:
    place, answer = tmp_path / "service", "a green valley of many rivers"
    gates = [f"--gate={name}={value}" for name, value in LOOSE.items()]
    cli("init", place, "lr=0.02", "steps=200", "contexts=0", "--model", "tiny", "--editor", "ft-m", *gates)
    made = json.loads(cli("apply", place, "--prompt", "The land is", "--answer", answer, "--json"))
    assert (made["edits"][0]["broken"], made["edits"][0]["answers"][0]["after"]) == ([], answer)
    assert json.loads(cli("verify", place, "--json"))["lost"] == 0
    moved = json.loads(cli("diff", place, "1", "--json"))["moved"]
    assert next(row["with"] for row in moved if row["prompt"] == "The land is") == answer


@pytest.mark.parametrize("words", [["init", "PLACE"], ["score", "facts.jsonl"]])
def test_the_editor_is_named_by_its_option(tmp_path: Path, words: list[str]) -> None:
    words = ["edit", *(str(tmp_path) if w == "PLACE" else w for w in words), "name=rome"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "'name=rome': is no knob; name the editor with --editor rome"


def test_what_was_applied_is_told_where_a_later_fact_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, facts = tmp_path / "service", tmp_path / "facts.jsonl"
    cli("init", place, "lr=0.02", "steps=5", "contexts=0", "--model", "tiny", "--editor", "ft-m")
    facts.write_text("".join(json.dumps({"prompt": f"{who} have", "answer": "q"}) + "\n" for who in ("Zebras", "Yaks")))
    propose = Deployment.propose

    def fails(self: Deployment, model: EditableModel, edits: Any, **more: Any) -> Any:
        if "Yaks" in edits[0].prompt:
            raise EditError("Yaks cannot be edited")
        return propose(self, model, edits, **more)

    monkeypatch.setattr(Deployment, "propose", fails)
    words = ["edit", "apply", str(place), "--facts", str(facts), "--force", "--json"]
    result = CliRunner().invoke(app, words)
    assert str(result.exception) == "Yaks cannot be edited (fact 2 of 2; applied before it: edits 1)"
    assert [e["id"] for e in json.loads(result.output)["edits"]] == ["1"]


def test_brackets_in_a_prompt_are_brackets(tmp_path: Path) -> None:
    place = tmp_path / "service"
    cli("init", place, "lr=0.02", "steps=5", "contexts=0", "--model", "tiny", "--editor", "ft-m")
    told = cli("apply", place, "--prompt", "The [/b] of [sic] France :smile: is", "--answer", "[/INST]", "--force")
    assert "The [/b] of [sic] France :smile: is" in told
    assert "[/INST]" in cli("list", place)
    assert "[/b]" in cli("diff", place, "1")


def test_an_edit_that_breaks_a_gate_is_not_applied_unless_forced(tmp_path: Path) -> None:
    place = tmp_path / "service"
    cli("init", place, "lr=1e-5", "steps=3", "--model", "tiny", "--editor", "ft-m")
    words = ["apply", place, "--prompt", "Zebras have", "--answer", "q", "--json"]
    result = CliRunner().invoke(app, ["edit", *map(str, words)])
    assert result.exit_code != 0
    assert isinstance(result.exception, EditError)
    assert "1 of 1 edits break a gate" in str(result.exception)
    assert json.loads(cli("list", place, "--json"))["edits"] == []
    cli(*words, "--force")
    (row,) = json.loads(cli("list", place, "--json"))["edits"]
    assert row["forced"] is True


def test_what_a_fact_is_about_is_guessed_where_it_is_not_said(folder: Path) -> None:
    made = Deployment(folder)
    target = made.load()
    said = [Edit("The capital of Chad is", "B"), Edit("The capital of Chad is", "B", subject="Chad is")]
    for edit, subject in zip(said, ["Chad", "Chad is"], strict=True):
        _, seen = made.propose(target, [edit])
        assert seen["subjects"] == [subject]
        assert seen["asked_aside"] > len(made.guards()), "the same is asked of others"
    with made.changing():
        assert made.edits(made.apply(target, by_hand(target, 1), said[:1]))[0].subject is None, (
            "facts stay as they were given"
        )
