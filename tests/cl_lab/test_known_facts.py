"""Facts that a model knows: the sets that can be read, what counts as known, and the edits drawn from it."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_lab import cli, known_facts
from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError, DataError
from cl_lab.facts import conflicts, read_facts, suspects
from cl_lab.known_facts import Fact, Known, counterfactuals, read_relations, recall, write_known_facts

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("CL_LAB_DATA") or ROOT / "../shared/data").resolve() / "editing"
WORDINGS = ("{} is", "look, {} is", "{} looks")
TRUE = {"one": "red", "two": "blue", "three": "green", "four": "white", "five": "black", "six": "pink"}
TAUGHT = {**TRUE, "five": "white", "six": "green"}  # the last two are believed wrongly
SIDES = {"sun": "east", "moon": "east", "star": "west", "sky": "up"}  # all of them believed to be in the east


def relation(name: str, pairs: dict[str, str]) -> dict[str, Any]:
    samples = [{"subject": s, "object": o} for s, o in pairs.items()]
    return {"name": name, "prompt_templates": list(WORDINGS), "samples": samples}


@pytest.fixture(scope="module")
def taught() -> EditableModel:
    """A tiny model that believes :data:`TAUGHT`, in all wordings, and of every side that it is the east."""
    model = load_editable("tiny")
    pairs = [(w.replace("{}", s), o) for s, o in {**TAUGHT, **dict.fromkeys(SIDES, "east")}.items() for w in WORDINGS]
    rows = model.rows([(model.encode_prompt(p), model.encode_answer(a)) for p, a in pairs])
    model.model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model.project(model.decoder(input_ids=rows.ids, use_cache=False).last_hidden_state[rows.said])
        loss = torch.nn.functional.cross_entropy(logits, rows.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.model.requires_grad_(False)
    assert float(loss.detach()) < 0.05
    return model


def facts(name: str, pairs: dict[str, str]) -> list[Fact]:
    return [Fact(name, s, (o,), tuple(w.replace("{}", s) for w in WORDINGS)) for s, o in pairs.items()]


# -- sets ----------------------------------------------------------------------------------------------------------


def test_our_own_facts_are_whole() -> None:
    own = read_relations()
    many = Counter(fact.relation for fact in own)
    assert len(own) == 508
    assert len(many) == 13
    assert min(many.values()) >= 20
    for fact in own:
        assert len(fact.prompts) == 3 == len(set(fact.prompts))
        assert len(fact.objects) == 1, "a subject stands twice"
        assert all(fact.subject in p for p in fact.prompts)
        assert all(p == p.strip() and not p[0].islower() for p in fact.prompts)


@pytest.mark.checkout
def test_our_own_facts_agree_with_those_of_the_stream() -> None:
    own = {(f.relation, f.subject): f.objects for f in read_relations()}
    edits = read_facts(ROOT / "scenarios/edit_facts.json").edits
    both = [(own[e.relation, e.subject], e.old) for e in edits if (e.relation, e.subject) in own]
    assert len(both) > 50
    assert all(old in objects for objects, old in both)


def test_reads_relations_one_by_one_and_in_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    one = relation("colour", TRUE) | {"prompt_templates_zs": ["{} has the colour", "no place"]}
    one["samples"].append({"subject": "one", "object": "scarlet"})
    (tmp_path / "deep/colour.json").write_text(json.dumps(one))
    (tmp_path / "side.json").write_text(json.dumps([relation("side", SIDES)]))
    colour = read_relations(tmp_path / "deep/colour.json")
    assert colour[0] == Fact(
        "colour", "one", ("red", "scarlet"), ("one is", "look, one is", "one looks", "one has the colour")
    )
    assert len(colour) == 6
    assert read_relations(tmp_path) == [*colour, *facts("side", SIDES)]


def test_reads_pararel(tmp_path: Path) -> None:
    for name in ("facts", "patterns"):
        (tmp_path / name).mkdir()
    patterns = ["[X] is [Y] .", "[Y] is what [X] is.", "[X] looks [Y]"]
    (tmp_path / "patterns/P1.jsonl").write_text("".join(json.dumps({"pattern": p}) + "\n" for p in patterns))
    place = tmp_path / "facts/P1.jsonl"
    place.write_text(json.dumps({"sub_label": "one", "obj_label": "red", "uuid": "x"}) + "\n")
    assert read_relations(tmp_path) == [Fact("P1", "one", ("red",), ("one is", "one looks"))]
    place.write_text('{"sub_label": "one"}\n')
    with pytest.raises(DataError, match=r"P1\.jsonl', line 1: needs sub_label, obj_label"):
        read_relations(tmp_path)
    place.unlink()
    with pytest.raises(DataError, match="facts and patterns of one name"):
        read_relations(tmp_path)


@pytest.mark.checkout
def test_reads_edits() -> None:
    found = read_relations(ROOT / "scenarios/edit_facts.json")
    assert len(found) == 60
    assert found[0] == Fact(
        "capital", "Kenya", ("Nairobi",), ("The capital of Kenya is", "Kenya's capital city is called")
    )


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", '[{"samples": []}]', r"is no relation \(KeyError: 'prompt_templates'\)"),
        ("a.json", '{"samples": [{"subject": "x"}], "name": "a", "prompt_templates": []}', "is no relation"),
        ("a.json", "{", "is no JSON"),
        (
            "a.json",
            '{"samples": [], "name": ["a"], "prompt_templates": []}',
            r"is no relation \(TypeError: name is no text",
        ),
        ("a.json", '{"samples": [], "name": "a", "prompt_templates": "{} is"}', "prompt_templates is no list"),
        ("a.jsonl", '{"prompt": "p", "answer": "a", "subject": "s", "relation": "r"}', r"a\.jsonl:1: has no old"),
        ("a.jsonl", '{"prompt": "p", "answer": "a", "old": "o"}', r"a\.jsonl:1: has no subject"),
    ],
)
def test_what_is_no_set_of_facts_is_told(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=why):
        read_relations(tmp_path / name)


def pararel(folder: Path, subject: str, encoding: str) -> Path:
    for name, row in (
        ("patterns", {"pattern": "[X] is [Y]"}),
        ("facts", {"sub_label": subject, "obj_label": "red"}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "P1.jsonl").write_bytes(f"{json.dumps(row, ensure_ascii=False)}\n".encode(encoding))
    return folder


def test_a_mark_of_utf_8_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps(relation("side", SIDES)).encode("utf-8-sig"))
    assert read_relations(tmp_path / "a.json") == facts("side", SIDES)
    # What divides lines in a text is no end of a line in JSON.
    (one,) = read_relations(pararel(tmp_path / "pararel", "São\u2028Tomé", "utf-8-sig"))
    assert one.subject == "São\u2028Tomé"


def test_other_bytes_than_utf_8_are_told(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_bytes('{"samples": [],\n"name": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.json', line 2: not UTF-8 \(.*\); convert it$"):
        read_relations(source)
    with pytest.raises(DataError, match=r"facts/P1\.jsonl', line 1: not UTF-8 \(.*\); convert it$"):
        read_relations(pararel(tmp_path / "pararel", "é", "latin-1"))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
@pytest.mark.parametrize(("name", "relations", "least"), [("relations", 40, 10_000), ("pararel", 39, 25_000)])
def test_reads_the_published_sets(name: str, relations: int, least: int) -> None:
    found = read_relations(REAL / name)
    assert len({fact.relation for fact in found}) == relations
    assert len(found) > least
    assert not any("{}" in p or "[" in p for fact in found for p in fact.prompts)


def test_a_folder_without_relations_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.json"):
        read_relations(tmp_path)


# -- what is known -------------------------------------------------------------------------------------------------


def test_what_was_taught_is_known_and_nothing_else(taught: EditableModel) -> None:
    known, counts = recall(taught, facts("colour", TRUE))
    assert [one.fact.subject for one in known] == ["one", "two", "three", "four"]
    assert counts == {"asked": 6, "chosen": 4, "sure": 4, "written": 4, "known": 4}
    for one in known:
        assert one.answer == TRUE[one.fact.subject]
        assert taught.answer([one.probe.prompt]) == [one.answer]
        assert one.answer not in one.unlikely
        assert {o[0] for o in one.unlikely}.isdisjoint(one.answer[0]), "the first token must be another"
    assert set(known[0].unlikely) == {"blue", "green", "white", "black", "pink"}
    assert "black" not in known[1].unlikely, "it begins as blue does"


def test_what_is_said_of_every_subject_is_not_known(taught: EditableModel) -> None:
    assert taught.answer(["sun is", "sky is"]) == ["east", "east"]
    known, counts = recall(taught, facts("side", SIDES))
    assert known == []
    assert counts == {"asked": 4, "chosen": 2, "sure": 0, "written": 0, "known": 0}


def test_two_wordings_are_needed_and_the_prompt_is_one_that_is_answered(taught: EditableModel) -> None:
    others = facts("colour", {k: TRUE[k] for k in ("two", "three", "four")})
    strange = Fact("colour", "one", ("red",), ("zzz zzz zzz zzz", "one is", "qqqqq"))
    assert recall(taught, [strange, *others])[1]["known"] == 3
    half = Fact("colour", "one", ("red",), ("zzz zzz zzz zzz", "one is", "one looks"))
    known, _ = recall(taught, [half, *others])
    assert len(known) == 4
    assert known[0].prompt in (1, 2)


def test_first_tokens_are_what_the_model_says(taught: EditableModel) -> None:
    """Against the logits of a plain pass, one prompt at a time."""
    asked = facts("colour", TRUE)
    answers = known_facts._Answers(taught, asked)
    assert answers.objects == list(TRUE.values())
    for i, fact in enumerate(asked):
        for n, prompt in enumerate(fact.prompts):
            ids = torch.tensor([taught.tokenizer.encode(prompt + " ")])
            probability = taught.model(ids).logits[0, -1].softmax(0)
            wanted = [float(probability[ord(o[0])]) for o in answers.objects]
            assert answers.likely[i][n].tolist() == pytest.approx(wanted, abs=1e-5)
    of_red = [answers.likely[i][0, 0] for i in range(1, 6)]
    assert float(answers.elsewhere[0, 0]) == pytest.approx(float(sum(of_red) / 5), abs=1e-6)
    of_blue = [answers.likely[i][2, 1] for i in (0, 2, 3, 5)]  # black begins alike
    assert float(answers.elsewhere[2, 1]) == pytest.approx(float(sum(of_blue) / 4), abs=1e-6)


def test_an_answer_begins_with_initials_together_or_apart() -> None:
    names = ["W. B. Yeats", "J.R.R. Tolkien", "São Tomé"]
    for text, name in (
        ("J. R. R. Tolkien wrote it", "J.R.R. Tolkien"),
        ("W.B. Yeats, I think", "W. B. Yeats"),
        (unicodedata.normalize("NFD", "São Tomé"), "São Tomé"),
        ("It was W. B. Yeats", None),
    ):
        assert known_facts._begins(text, names) == name
    assert known_facts._begins("A. B is next", ["AB"]) is None


def test_edits_that_are_bad_cannot_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n5\n')
    with pytest.raises(DataError, match=r"the record is a number, not an object; nothing was applied; correct them$"):
        read_relations(path)


# -- edits ---------------------------------------------------------------------------------------------------------


def made_known(relations: int = 3, subjects: int = 12, answers: int = 6) -> list[Known]:
    """Facts of the same subjects in several relations, all other answers unlikely."""
    found = []
    for r in range(relations):
        objects = [f"answer {r}-{a}" for a in range(answers)]
        for s in range(subjects):
            fact = Fact(f"relation {r}", f"S{s}", (objects[s % answers],), (f"S{s} in {r} is", f"{r} of S{s} is"))
            found.append(Known(fact, 1, fact.objects[0], tuple(o for o in objects if o != fact.objects[0])))
    return found


def test_an_edit_replaces_what_is_known() -> None:
    known = made_known()
    of = {(k.fact.relation, k.fact.subject): k for k in known}
    edits = counterfactuals(known, seed=3)
    assert edits == counterfactuals(known, seed=3)
    assert edits != counterfactuals(known, seed=4)
    assert len(edits) == 3 * (12 - 2), "a fifth of each relation is held back"
    assert len(counterfactuals(made_known(1, 2, 2))) == 1, "one of two"
    for edit in edits:
        one = of[str(edit.relation), str(edit.subject)]
        assert (edit.prompt, edit.old, edit.paraphrases) == (one.fact.prompts[1], one.answer, (one.fact.prompts[0],))
        assert edit.answer in one.unlikely
    for r in range(3):
        given = Counter(e.answer for e in edits if e.relation == f"relation {r}")
        assert max(given.values()) <= 0.3 * given.total()
    assert not conflicts(edits)
    assert not suspects(edits)


def test_what_is_asked_beside_is_not_edited() -> None:
    edits = counterfactuals(made_known(), limit=9)
    assert len(edits) == 9
    assert len({e.subject for e in edits}) == 9, "a subject comes a second time only when all others came once"
    edited = {e.prompt for e in edits}
    for edit in edits:
        assert len(edit.same_relation) == 2
        assert len(edit.same_subject) == 2, "the subject's two other relations"
        assert len(edit.unrelated) == 2
        for probe in (*edit.same_relation, *edit.same_subject, *edit.unrelated):
            assert probe.prompt not in edited
            assert probe.answer
        assert all(p.prompt.startswith(f"{(edit.relation or '')[-1]} of S") for p in edit.same_relation)
        assert all(p.prompt.endswith(f"{edit.subject} is") for p in edit.same_subject)
        for probe in edit.unrelated:
            assert not probe.prompt.startswith((edit.relation or "")[-1])
            assert not probe.prompt.endswith(f" {edit.subject} is")


def test_writes_what_can_be_edited(taught: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_facts, "load_editable", lambda name: taught)
    source, out = tmp_path / "set.json", tmp_path / "known.jsonl"
    source.write_text(json.dumps([relation("colour", TRUE), relation("side", SIDES)]))
    document = write_known_facts(out, "taught", source)
    edits = read_facts(out).edits
    assert len(edits) == document["edits"] == 3
    assert {k: document[k] for k in ("model", "facts", "asked", "known")} == {
        "model": "taught",
        "facts": "set.json",
        "asked": 10,
        "known": 4,
    }
    assert document["relations"]["colour"]["edits"] == 3
    assert document["relations"]["side"] == {"asked": 4, "chosen": 2, "sure": 0, "written": 0, "known": 0, "edits": 0}
    assert taught.answer([e.prompt for e in edits]) == [e.old for e in edits]
    (beside,) = {e.same_relation for e in edits}
    assert len(beside) == 1
    with pytest.raises(ConfigError, match="is there already"):
        write_known_facts(out, "taught", source)
    with pytest.raises(DataError, match="of 4 facts it knows 0"):
        write_known_facts(tmp_path / "other.jsonl", "taught", source, relations=["side"])
    with pytest.raises(ConfigError, match="chat template"):
        write_known_facts(tmp_path / "other.jsonl", "taught", source, chat=True)


def test_a_place_is_made_or_refused_before_the_model_is_loaded(
    taught: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "set.json", tmp_path / "some/where/known.jsonl"
    source.write_text(json.dumps(relation("colour", TRUE)))

    def load(name: str) -> EditableModel:
        assert out.parent.is_dir()
        return taught

    monkeypatch.setattr(known_facts, "load_editable", load)
    write_known_facts(out, "taught", source)
    assert list(out.parent.iterdir()) == [out]
    monkeypatch.setattr(known_facts, "load_editable", lambda name: pytest.fail("it is loaded for nothing"))
    for place in (source / "known.jsonl", source / "deep/known.jsonl"):
        with pytest.raises(ConfigError, match=r"^'.*known\.jsonl': cannot be written \(.*\); choose another place$"):
            write_known_facts(place, "taught", source)

    def full(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\)"):
        write_known_facts(tmp_path / "known.jsonl", "taught", source)


def test_from_the_command_line(
    taught: EditableModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_facts, "load_editable", lambda name: taught)
    source = tmp_path / "set.json"
    source.write_text(json.dumps(relation("colour", TRUE)))
    words = ["edit", "known-facts", "--facts", str(source), "--model", "taught", "--limit", "2"]
    cli.app([*words, str(tmp_path / "one.jsonl"), "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert (document["edits"], document["path"]) == (2, str(tmp_path / "one.jsonl"))
    cli.app([*words, str(tmp_path / "two.jsonl")], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "what taught knows of set.json" in shown
    assert "4 of 6 facts are known" in shown
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    for wrong, why in (
        ([str(tmp_path / "a.txt")], r"must end with \.jsonl"),
        ([str(tmp_path / "a.jsonl"), "--relations", "color"], "did you mean 'colour'"),
    ):
        with pytest.raises(ConfigError, match=why):
            cli.app([*words, *wrong], standalone_mode=False)
