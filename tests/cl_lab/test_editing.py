"""``cl-lab edit score`` as a user types it, on a tiny model: what it says and refuses, and that it goes on if stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_lab import cli, edit_scores, editing, registry
from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable, score_facts
from cl_lab.errors import ConfigError, DataError, EditError
from cl_lab.facts import Edit
from cl_lab.patches import load_patch
from strategies.ft_m import FTM

FACTS = [
    {"prompt": "A is", "answer": "x", "paraphrases": ["What is A?"], "unrelated": [["Say", "no"]]},
    {"prompt": "B is", "answer": "y", "old": "z"},
    {"prompt": "C is", "answer": "w"},
]
KNOBS = {"name": "ft-m", "lr": 0.02, "steps": 60, "contexts": 0, "layer": 1}


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, FACTS)) + "\n")
    return file


def scored(facts: Path, out: Path, **more: Any) -> dict[str, Any]:
    return score_facts("tiny", more.pop("editor", KNOBS), facts, out, **more)


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in document.items() if k != "seconds_per_edit"}


def test_says_what_held_and_what_moved(facts: Path, tmp_path: Path) -> None:
    document = scored(facts, tmp_path / "out")
    before, after = document["before"], document["after"]
    assert before["reliability"] < 0.5 <= after["reliability"] <= 1
    assert len(document["retention"]) == 3
    assert document["retention"][-1] == 1, "what was edited last holds"
    assert before["unrelated_agreement"] == 1 >= after["unrelated_agreement"]
    assert {"reliability_free", "generality", "generality_free", "unrelated_free_agreement"} <= after.keys()
    assert after["perplexity"] != before["perplexity"]
    assert document["bytes_per_edit"] == 32 * 128 * 4
    assert sorted(p.name for p in (tmp_path / "out/patches").iterdir()) == ["000000", "000001", "000002"]
    assert json.loads((tmp_path / "out/run.json").read_text()) == document


def test_edits_of_a_batch_share_a_patch(facts: Path, tmp_path: Path) -> None:
    document = scored(facts, tmp_path / "out", batch_size=2, free=False)
    assert [p.name for p in sorted((tmp_path / "out/patches").iterdir())] == ["000000", "000001"]
    assert document["after"]["reliability"] > 0.5
    assert "reliability_free" not in document["after"]


def test_goes_on_behind_the_last_whole_patch(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scored(facts, tmp_path / "whole")
    scored(facts, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/patches/000002")
    scratch = tmp_path / "out/patches/.000002"  # of a process that was killed while it wrote
    scratch.mkdir()
    (scratch / "patch.safetensors").write_bytes(b"half")
    asked = []
    propose = FTM.propose
    monkeypatch.setattr(
        FTM, "propose", lambda self, model, edits, earlier: asked.append(edits) or propose(self, model, edits, earlier)
    )
    again = scored(facts, tmp_path / "out")
    assert len(asked) == 1, "two patches were read, one was made"
    assert timeless(again) == timeless(whole)
    for n in range(3):
        one, two = (tmp_path / f"{run}/patches/{n:06d}/patch.safetensors" for run in ("whole", "out"))
        assert one.read_bytes() == two.read_bytes()


def test_a_long_stream_is_scored_as_the_short_ones_in_it(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {n: scored(facts, tmp_path / f"first{n}", limit=n) for n in (1, 2)}
    whole = scored(facts, tmp_path / "out", at=[2, 1, 3, 2])
    *parts, last = whole.pop("at")
    assert timeless(whole) == timeless(scored(facts, tmp_path / "plain")), "nothing is made otherwise"
    assert [part["edits"] for part in parts] == [1, 2]
    assert last == {name: whole[name] for name in last}, "all of them are scored in any case"
    assert last.keys() == parts[0].keys()
    for part in parts:
        one = short[part["edits"]]
        assert timeless(part) == {name: one[name] for name in part if name != "seconds_per_edit"}
        assert {"before", "after", "retention", "contested", "bytes_per_edit", "refused"} <= part.keys()

    # Of a run that is finished another may be asked for, and what was scored is not asked again.
    monkeypatch.setattr(FTM, "propose", lambda *args: pytest.fail("all patches are there"))
    assert scored(facts, tmp_path / "plain", at=[1])["at"][0]["after"] == parts[0]["after"]
    place = tmp_path / "plain/at/000001.json"
    document = json.loads(place.read_text())
    document["scores"]["retention"] = "as it was"
    place.write_text(json.dumps(document))
    again = scored(facts, tmp_path / "plain", at=[1, 2])["at"]
    assert [part["retention"] for part in again] == ["as it was", parts[1]["retention"]]

    # Another run's, or what is damaged, is not taken for this one's.
    other = {name: document["of"] | {name: "another"} for name in ("editor", "version", "patches", "sha256")}
    for wrong in (*(json.dumps(document | {"of": of}) for of in other.values()), "", "[1]", "{"):
        place.write_text(wrong)
        again = scored(facts, tmp_path / "plain", at=[1])["at"]
        assert timeless(again[0]) == timeless(parts[0])


def test_a_long_edit_in_a_prompt_memory_costs_no_scores(tmp_path: Path) -> None:
    """Behind its fact a question may be longer than the model reads, which it is not by itself."""
    facts = tmp_path / "facts.jsonl"
    # Of 512 tokens: behind the fact of 7 there is room for no free answer (24), none for a forced one (2 with its end).
    long = ["".join(chr(ord("a") + (i * i + n) % 26) for i in range(n)) for n in (485, 488)]
    rows = [*FACTS[:1], *({"prompt": prompt, "answer": "q"} for prompt in long)]
    facts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    model = load_editable("tiny")
    assert model.context == 512
    document = scored(facts, tmp_path / "out", editor={"name": "prompt-memory", "least": -1.0}, at=[1])
    assert [refused["prompt"] for refused in document["refused"]] == long, "for their own facts there is no room"
    load_patch(tmp_path / "out/patches/000000").apply(model)
    assert all(model.read(prompt).by and not model.read(prompt, room=24).by for prompt in long)
    assert document["before"].keys() == document["after"].keys()
    assert document["after"]["fluency"] is not None


def test_what_a_kill_left_half_written_is_no_patch(facts: Path, tmp_path: Path) -> None:
    whole = scored(facts, tmp_path / "out", at=[1])
    (tmp_path / "out/patches/000001").rename(tmp_path / "out/patches/.000001")
    assert (tmp_path / "out/patches/.000001/patch.json").is_file()
    assert timeless(scored(facts, tmp_path / "out", at=[1])) == timeless(whole)


def test_there_must_be_so_many_edits_to_score_after(facts: Path, tmp_path: Path) -> None:
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match=f"--at {wrong}: give a number from 1 to 3, the edits there are$"):
            scored(facts, tmp_path / "out", at=[1, wrong])
    with pytest.raises(ConfigError, match=r"--at 1: give .*, the edits there are, a multiple of --batch-size 2$"):
        scored(facts, tmp_path / "out", at=[3, 1], batch_size=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1, 4])
def test_what_is_made_again_is_bit_for_bit_what_was_lost(tmp_path: Path, size: int) -> None:
    """Also of an editor that remembers what it heard of earlier edits."""
    facts = tmp_path / "facts.jsonl"
    answers = {"France": "Lyon", "Japan": "Osaka", "Peru": "Cusco", "Spain": "Madeira", "Equatorial Guinea": "Bata"}
    rows = [{"prompt": f"The capital of {n} is", "answer": a, "subject": n} for n, a in answers.items()]
    facts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    editor = {"name": "wise", "steps": 8, "stop_at": 0.02, "unrelated": 16, "edits_per_shard": size}
    whole = scored(facts, tmp_path / "out", editor=editor, free=False)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    for n in range(2, 5):
        shutil.rmtree(tmp_path / f"again/patches/{n:06d}")
    assert timeless(scored(facts, tmp_path / "again", editor=editor, free=False)) == timeless(whole)
    for n in range(5):
        one, two = (tmp_path / f"{run}/patches/{n:06d}/patch.safetensors" for run in ("out", "again"))
        assert one.read_bytes() == two.read_bytes()


def test_an_edit_that_cannot_be_made_is_left_out(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = FTM.propose

    def sometimes(self: FTM, model: Any, edits: Any, earlier: Any) -> Any:
        if edits[0].prompt == "B is":
            raise EditError("ft-m: 'B is': the loss became nan; the model is as it was")
        return propose(self, model, edits, earlier)

    monkeypatch.setattr(FTM, "propose", sometimes)
    document = scored(facts, tmp_path / "out")
    assert [r["prompt"] for r in document["refused"]] == ["B is"]
    assert document["retention"][1] < 1 == document["retention"][2]


def test_of_a_batch_only_the_bad_edits_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under their own names; the others are patches of their own, and what all of it took is counted."""
    facts, out, tried, clock = tmp_path / "facts.jsonl", tmp_path / "out", [], [0.0]
    facts.write_text("".join(json.dumps({"prompt": f"{c} is", "answer": "x"}) + "\n" for c in "ABCDEFG"))
    propose = FTM.propose

    def sometimes(self: FTM, model: Any, edits: Any, earlier: Any) -> Any:
        names = "".join(e.prompt[0] for e in edits)
        tried.append((names, "".join(e.prompt[0] for e in earlier)))
        clock[0] += 1
        if bad := next((n for n in names if n in "CEG"), None):
            raise EditError(f"prompt '{bad} is': subject 'Z' is not in it")
        return propose(self, model, edits, earlier)

    monkeypatch.setattr(FTM, "propose", sometimes)
    monkeypatch.setattr(editing.time, "perf_counter", lambda: clock[0])
    document = scored(facts, out, batch_size=3, free=False, without=[1])
    assert tried == [
        ("ABC", ""),
        *(("A", ""), ("B", "A"), ("C", "AB")),
        ("DEF", "AB"),
        *(("D", "AB"), ("E", "ABD"), ("F", "ABD")),
        ("G", "ABDF"),
    ]
    assert document["refused"] == [
        {"prompt": f"{c} is", "reason": f"prompt '{c} is': subject 'Z' is not in it"} for c in "CEG"
    ]
    assert document["seconds_per_edit"] == 9 / 4, "nine were tried, four made"
    assert document["without"][0]["removed"] == [1]
    places = ["000000-000000", "000000-000001", "000001-000000", "000001-000002"]
    assert sorted(p.name for p in (out / "patches").iterdir()) == places

    # Stopped behind the first of a batch's, it does not try the batch again, but knows what that took.
    tried.clear()
    for lost in places[1:]:
        shutil.rmtree(out / "patches" / lost)
    again = scored(facts, out, batch_size=3, free=False, without=[1])
    assert [names for names, _ in tried] == ["B", "C", "DEF", "D", "E", "F", "G"]
    assert again == document
    words = ["edit", "score", str(facts), "lr=0.02", "steps=60", "contexts=0", "layer=1", "--editor", "ft-m"]
    cli.app(
        [*words, "--model", "tiny", "--batch-size", "3", "--no-free", "--out", str(out)],
        standalone_mode=False,
    )
    assert "3 edits refused" in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("when", ["first", "last"])
def test_a_full_disk_is_told_and_the_run_goes_on_from_there(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    write = editing.write_atomically

    def full(path: Path, content: str) -> None:
        if (json.loads(content)["status"] == "running") == (when == "first"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    with monkeypatch.context() as broken:
        broken.setattr(editing, "write_atomically", full)
        with pytest.raises(DataError) as error:
            scored(facts, tmp_path / "out", free=False)
    assert str(error.value) == (
        f"'{tmp_path / 'out/run.json'}' cannot be written (No space left on device); make room and give the same command: "
        "it goes on from here"
    )
    assert scored(facts, tmp_path / "out", free=False)["status"] == "finished"


def test_a_fact_that_is_too_long_for_its_editor_alone_is_left_out(tmp_path: Path) -> None:
    """Its prompt can be asked, but not behind the beginnings that ft-m trains on."""
    facts = tmp_path / "facts.jsonl"
    rows = [FACTS[0], {"prompt": f"{'x' * 475} is", "answer": "y"}, FACTS[2]]
    facts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    document = scored(facts, tmp_path / "out", editor=KNOBS | {"contexts": 5})
    (refused,) = document["refused"]
    assert refused["prompt"] == rows[1]["prompt"]
    assert re.match(
        r"'\S.{29}…x+ is': a text of 5\d\d tokens is longer than the 512 the model reads", refused["reason"]
    )
    assert len(document["retention"]) == 3


def test_a_fact_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(json.dumps(f) for f in (FACTS[0], {"prompt": f"Who is {'x' * 600}", "answer": "y"})))
    with pytest.raises(DataError, match=r"^'Who is x{23}…x{30}': a text of 609 tokens is longer than the 512"):
        scored(facts, tmp_path / "out")


def test_an_answer_of_any_length_may_be_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        json.dumps({"prompt": "The land is", "answer": "a green valley of many rivers", "ood": ["It is."]})
    )
    words = ["edit", "score", str(facts), "lr=0.02", "steps=200", "contexts=0", "--model", "tiny", "--editor", "ft-m"]
    for _ in range(2):
        cli.app([*words, "--out", str(tmp_path / "out")], standalone_mode=False)
        shown = capsys.readouterr().out
        document = json.loads((tmp_path / "out/run.json").read_text())
        assert document["before"]["answer_tokens"] == document["after"]["answer_tokens"] == 38
        assert document["after"]["reliability_free"] == 1
        assert re.search(r"answer tokens *│ 38 *│ 38 *│", shown)
        assert re.search(r"ood *│ 0\.000 *│ \d\.\d{3} *│", shown)


def test_a_loss_that_is_not_finite_leaves_the_model_alone() -> None:
    model = load_editable("tiny")
    before = {n: v.clone() for n, v in model.model.state_dict().items()}
    with pytest.raises(EditError, match="the model is as it was"):
        FTM(lr=1e37, layer=1, stop_at=1.0).propose(model, [Edit("A is", "x")])
    assert all(torch.equal(v, before[n]) for n, v in model.model.state_dict().items())
    assert not model.patches


def test_refuses_the_folder_of_another_run(facts: Path, tmp_path: Path) -> None:
    scored(facts, tmp_path / "out", limit=1, free=False)
    with pytest.raises(ConfigError, match=r"another edits \(1, asked for 2\)|another sha256"):
        scored(facts, tmp_path / "out", limit=2, free=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="no run of edits"):
        scored(facts, tmp_path / "other")


@pytest.mark.parametrize("status", ["running", "finished"])
def test_a_training_run_is_left_as_it_is(facts: Path, tmp_path: Path, status: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for document in ({"status": status, "model": {"name": "mlp"}, "edits": 3}, [], "text", None):
        (out / "run.json").write_text(json.dumps(document))
        with pytest.raises(
            ConfigError, match=r"^--out '.*/run': exists and is no run of edits; choose another folder$"
        ):
            scored(facts, out)
        assert json.loads((out / "run.json").read_text()) == document
        assert [p.name for p in out.iterdir()] == ["run.json"]


def test_one_process_at_a_time_makes_a_run(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first is at its first edit the second is told; afterwards the folder is free."""
    out, told = tmp_path / "out", []
    propose = FTM.propose

    def meanwhile(self: FTM, model: Any, edits: Any, earlier: Any) -> Any:
        with pytest.raises(ConfigError) as caught:
            scored(facts, out, free=False)
        told.append(str(caught.value))
        return propose(self, model, edits, earlier)

    monkeypatch.setattr(FTM, "propose", meanwhile)
    document = scored(facts, out, free=False)
    fix = "wait for its end, or choose another folder"
    assert told == 3 * [f"--out '{out}': process {os.getpid()} is making it; {fix}"]
    assert timeless(scored(facts, out, free=False)) == timeless(document)


def test_a_command_that_failed_may_be_given_corrected(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a patch is there its folder is nobody's; from then on it is that run's, also if it was stopped."""
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="no such folder or file"):
        score_facts("./nowhere", KNOBS, facts, out, free=False)
    with pytest.raises(ConfigError, match="set fisher=batched"):
        scored(facts, out, editor={"name": "strategy:ewc"}, free=False)
    assert not (out / "patches").exists()
    propose = FTM.propose

    def stopped(self: FTM, model: Any, edits: Any, earlier: Any) -> Any:
        if earlier:
            raise KeyboardInterrupt
        return propose(self, model, edits, earlier)

    monkeypatch.setattr(FTM, "propose", stopped)
    with pytest.raises(KeyboardInterrupt):
        scored(facts, out, free=False)
    assert json.loads((out / "run.json").read_text())["model"] == "tiny"
    with pytest.raises(ConfigError, match="another editor"):
        scored(facts, out, editor=KNOBS | {"steps": 7}, free=False)


def test_a_run_whose_edits_were_all_refused_keeps_its_folder(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise EditError("ft-m: 'A is': the loss became nan; the model is as it was")

    monkeypatch.setattr(FTM, "propose", refuse)
    scored(facts, tmp_path / "out", free=False, limit=1)
    with pytest.raises(ConfigError, match="holds a run with another"):
        scored(facts, tmp_path / "out", free=False, limit=1, editor=KNOBS | {"steps": 7})


@pytest.mark.checkout
def test_what_the_readme_says_of_strategies_works(facts: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:--editor )?(strategy:\w[^`]*)`", readme)
    assert len(named) >= 3
    for words in named:
        command = [
            "edit",
            "score",
            str(facts),
            "--model",
            "tiny",
            "--no-free",
            "--json",
            "--out",
            str(tmp_path / words),
        ]
        cli.app([*command, "steps=2", "--editor", *words.split()], standalone_mode=False)


def test_some_of_the_facts(facts: Path, tmp_path: Path) -> None:
    whole = scored(facts, tmp_path / "whole", free=False)
    some = scored(facts, tmp_path / "some", skip=1, limit=1, free=False)
    assert (whole["edits"] > 2, some["edits"]) == (True, 1)
    assert some["before"] != whole["before"]
    with pytest.raises(ConfigError, match=r"^--skip 99: '.*' holds \d+ facts; leave out fewer$"):
        scored(facts, tmp_path / "none", skip=99, free=False)


def test_a_bad_line_stops_all_unless_asked(facts: Path, tmp_path: Path) -> None:
    facts.write_text(facts.read_text() + '{"prompt": "D is", "answer": ""}\n')
    with pytest.raises(DataError, match=r"facts\.jsonl:4"):
        scored(facts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    document = scored(facts, tmp_path / "out", skip_bad=True, free=False)
    assert document["edits"] == 3
    assert [b["place"].rpartition(":")[2] for b in document["bad"]] == ["4"]


def test_scoring_twice_gives_the_same_and_changes_nothing() -> None:
    model = load_editable("tiny")
    edits = [Edit.from_json({"prompt": f["prompt"], "answer": f["answer"]}) for f in FACTS]
    FTM(lr=0.02, layer=1, contexts=0).propose(model, edits).apply(model)
    before = {n: v.clone() for n, v in model.model.state_dict().items()}
    one, two = (edit_scores.ask(model, edits) for _ in range(2))
    assert one == two
    assert all(torch.equal(v, before[n]) for n, v in model.model.state_dict().items())


# -- one edit taken away ---------------------------------------------------------------------------------------------


def never(document: dict[str, Any], out: Path, number: int) -> EditableModel:
    """The model that has all patches of a run, but for the ``number``-th, which it never had."""
    model = load_editable("tiny")
    for n in range(len(document["retention"])):
        if n != number - 1:
            load_patch(out / f"patches/{n:06d}").apply(model)
    return model


def written(model: EditableModel, edits: list[Edit]) -> list[bool]:
    said = model.answer([e.prompt for e in edits], max_new_tokens=edit_scores.BUDGET)
    return [edit_scores.is_right(text, e.answer, e.old) for text, e in zip(said, edits, strict=True)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_taken_away_is_never_applied(facts: Path, tmp_path: Path, number: int) -> None:
    """Against a model that never had the patch, asked by hand; and for each number in turn."""
    document = scored(facts, tmp_path / "out", without=[number], editor=KNOBS | {"steps": 20})
    (seen,) = document["without"]
    others = [n for n in (1, 2, 3) if n != number]
    assert (seen["edit"], seen["removed"], seen["others"]) == (number, [number], 2)
    model = never(document, tmp_path / "out", number)
    edits = [Edit.from_json({k: f[k] for k in ("prompt", "answer", "old") if k in f}) for f in FACTS]
    said = edit_scores.ask(model, edits, groups=("reliability",))
    assert seen["retention"] == edit_scores.retention(model, edits, said)
    full = document["retention"]
    for key, before, after in (
        ("forced", [r == 1 for r in full], [r == 1 for r in seen["retention"]]),
        (
            "free",
            written(never(document, tmp_path / "out", 0), edits),
            written(model, edits),
        ),
    ):
        assert seen[key]["lost"] == [n for n in others if before[n - 1] and not after[n - 1]]
        assert seen[key]["gained"] == [n for n in others if after[n - 1] and not before[n - 1]]
    assert seen["retention"][number - 1] < 1, "what was taken away is gone"


def test_what_an_edit_hid_or_held_up_is_told(tmp_path: Path) -> None:
    """Of two that contradict each other the first holds without the second; the second of two alike is nothing by itself."""
    rows = [("A is", "x"), ("A is", "y"), ("B is", "w"), ("B is", "w")]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    document = scored(facts, tmp_path / "out", without=[2, 3])
    assert document["retention"] == [0.5, 1, 1, 1], "the blank is a byte by itself"
    second, third = document["without"]
    assert second["forced"] == second["free"] == {"lost": [], "gained": [1]}
    assert third["forced"] == third["free"] == {"lost": [4], "gained": []}
    assert (second["moved"], third["moved"]) == (1, 1)
    assert second["retention"] == [1, 0.5, 1, 1]


@pytest.mark.parametrize("name", ["grace", "prompt-memory"])
def test_what_is_removable_is_as_if_it_had_never_been_edited(facts: Path, tmp_path: Path, name: str) -> None:
    made = registry.load("editors", name)[0]
    assert made.removable
    knobs = {"name": name, **made.conformance_knobs()}
    document = scored(facts, tmp_path / "out", editor=knobs, without=[2])
    (seen,) = document["without"]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(json.dumps(f) for i, f in enumerate(FACTS) if i != 1) + "\n")
    other = scored(fewer, tmp_path / "fewer", editor=knobs)
    assert [seen["retention"][i] for i in (0, 2)] == other["retention"]
    assert seen["forced"] == seen["free"] == {"lost": [], "gained": []}
    assert seen["moved"] == 0


def test_what_is_taken_away_may_be_asked_of_a_run_that_is_finished(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(facts, tmp_path / "whole", without=[3, 1, 3])
    assert [seen["edit"] for seen in whole["without"]] == [3, 1]
    assert "without" not in scored(facts, tmp_path / "out")
    monkeypatch.setattr(FTM, "propose", lambda *args: pytest.fail("all patches are there"))
    again = scored(facts, tmp_path / "out", without=[3, 1])
    assert timeless(again) == timeless(whole)
    assert json.loads((tmp_path / "out/run.json").read_text()) == again


def test_edits_that_share_a_patch_go_together(facts: Path, tmp_path: Path) -> None:
    (seen,) = scored(facts, tmp_path / "out", batch_size=2, free=False, without=[2])["without"]
    assert (seen["removed"], seen["others"]) == ([1, 2], 1)
    assert "free" not in seen


def test_there_must_be_such_an_edit_to_take_away(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match=f"--without {wrong}: there are 3 edits; give 1 to 3"):
            scored(facts, tmp_path / "out", without=[1, wrong])
    assert not (tmp_path / "out").exists()

    def refuse(*args: Any) -> None:
        raise EditError("ft-m: 'A is': the loss became nan; the model is as it was")

    monkeypatch.setattr(FTM, "propose", refuse)
    document = scored(facts, tmp_path / "out", without=[2], free=False, limit=2)
    assert document["without"] == [{"edit": 2, "refused": True}]


# -- edits that contradict each other ----------------------------------------------------------------------------------


def test_edits_that_may_contradict_are_counted_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "Ann's boss is", "answer": "x", "subject": "Ann"},
        {"prompt": "B is", "answer": "y", "paraphrases": ["What is B?"]},
        {"prompt": "The boss of Ann is", "answer": "w", "subject": "Ann"},
        {"prompt": "C is", "answer": "u"},
        {"prompt": "c is", "answer": "v"},
        {"prompt": "B is", "answer": "y"},
    ]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    document = scored(facts, tmp_path / "out", free=False, editor=KNOBS | {"steps": 5})
    assert [(c["edit"], c["other"], c["kind"]) for c in document["conflicts"]] == [
        (5, 4, "contradiction"),
        (6, 2, "duplicate"),
        (3, 1, "suspect"),
    ]
    kept = document["retention"]
    assert document["contested"] == {
        "edits": 4,
        "reliability": pytest.approx(sum(kept[i] for i in (0, 2, 3, 4)) / 4),
        "others": pytest.approx((kept[1] + kept[5]) / 2),
        "generality": None,
        "others_generality": pytest.approx(document["after"]["generality"]),
    }
    (line,) = [r.getMessage() for r in caplog.records if "may contradict" in r.getMessage()]
    assert line.startswith(
        "facts: 1 pair may contradict each other in other words, first: facts.jsonl:3 the same subject"
    )
    words = ["edit", "score", str(facts), "lr=0.02", "steps=5", "contexts=0", "layer=1", "--model", "tiny", "--no-free"]
    cli.app([*words, "--editor", "ft-m", "--out", str(tmp_path / "out"), "--without", "1"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "4 edits contradict another or may: their reliability" in shown
    assert "without edit 1, of 5 others: teacher-forced" in shown


def test_from_the_command_line(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["edit", "score", str(facts), "lr=0.02", "steps=5", "--model", "tiny", "--editor", "ft-m", "--out"]
    cli.app([*words, str(tmp_path / "one"), "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert document["editor"] == {"name": "ft-m", "lr": 0.02, "steps": 5}
    cli.app([*words, str(tmp_path / "two"), "--at", "2"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "before" in shown
    assert "before 2" in shown, "of two edits other questions are asked than of all"
    assert "after 2" in shown
    assert "after 3" not in shown
    assert "reliability of the oldest third" in shown
    assert "3 edits of facts.jsonl in tiny by ft-m" in shown
    for wrong, why in (("lr=fast", "lr"), ("learning=1", "learning"), ("lr", "key=value")):
        with pytest.raises(ConfigError, match=why):
            cli.app(["edit", "score", str(facts), wrong, "--model", "tiny", "--editor", "ft-m"], standalone_mode=False)
