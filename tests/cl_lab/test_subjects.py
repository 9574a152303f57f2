"""Whether a prompt names a subject: the words by hand, and what that decides of a side memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import DataError
from cl_lab.patches import SidePatch, load_patch, packed
from cl_lab.subjects import NamedSubjects, words


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("Australia", "The capital of Australia is", True),
        ("Australia", "Australia's capital is", True),
        ("Australia", "whats the capital of AUSTRALIA", True),
        ("Australia", "The Australian capital is", False),
        ("Niger", "The capital of Nigeria is", False),
        ("room 12", "The code of room 12?", True),
        ("room 12", "The code of room 13?", False),
        ("room 12", "The code of room 123?", False),
        ("room 12", "The code of room 2, not 1?", False),
        ("John Smith", "Where does Jane Smith live?", False),
        ("Hotel Adler Berlin", "Who runs Hotel Adler Bonn in Berlin?", False),
        ("USS Kete (SS-369)", "Which boat is USS Kete (SS-369)?", True),
        ("USS Kete (SS-369)", "Which boat is USS Kete, SS 369?", True),
        ("São Paulo", "Who runs Sao Paulo?", True),
        ("Straße", "Wer baute die STRASSE?", True),
        ("Москва", "Кто основал город москва?", True),
        ("日本", "日本の首都は", True),
        ("日本", "日光の首都は", False),
        ("パリ", "パリの市長は", True),
        ("パリ", "バリの市長は", False),
        ("호주", "호주의 수도는", True),
        ("호주", "호준의 수도는", False),
        ("दिल्ली", "दिल्ली कहाँ है", True),
        ("दिल्ली", "दल्ला कहाँ है", False),
        ("C++", "Who designed C++?", True),
        ("C++", "It is (c++).", True),
        ("C++", "Is C＋＋17 new?", True),
        ("C++", "Who designed C?", False),
        ("C++", "Who designed C#?", False),
        ("C++", "Is a C+ enough?", False),
        ("C", "Who designed C++?", False),
        ("C", "Who designed C#?", False),
        ("C", "What is new in C#7?", False),
        ("C", "Who designed C?", True),
        ("C#", "What is new in C#7?", True),
        ("c+", "Is a C+ enough?", True),
        ("c+", "Who designed C++?", False),
        ("F#", "F#'s designer is", True),
        ("F", "F#'s designer is", False),
        ("Notepad++", "Notepad++'s maker", True),
        ("Notepad", "Notepad++'s maker", False),
        ("A+", "Is an A+ good?", True),
        ("B", "What is A+B?", True),
        ("room 12", "The code of room#12?", True),
    ],
)
def test_names_by_hand(name: str, text: str, named: bool) -> None:
    assert (words(name) in words(text)) is named
    assert NamedSubjects([[name]]).among([text]).tolist() == [[named]]


def test_several_are_looked_for_at_once() -> None:
    named = NamedSubjects([["Peru"], ["Chad", "Niger"], None])
    found = named.among(["the capital of chad", "Peru or Niger?", "it"])
    assert found.tolist() == [[False, True, False], [True, True, False], [True, True, True]]
    assert not named.all_open
    assert NamedSubjects([None, None]).all_open
    assert NamedSubjects([]).among(["it", "that"]).shape == (0, 2)


@pytest.fixture
def model() -> EditableModel:
    return load_editable("tiny")


def side_patch(
    model: EditableModel, *subjects: str, shard: int = 0, gap: float = 1e-6, merge: bool = False
) -> SidePatch:
    """One that answers whatever is asked about its subjects."""
    site = model.down_projection(2)
    return SidePatch(
        "by hand",
        path=site.path,
        shard=shard,
        places=packed(torch.ones(site.weight.numel(), dtype=torch.bool)),
        values=(0.3 * torch.randn(site.weight.numel(), generator=torch.Generator().manual_seed(shard))).bfloat16(),
        gap=gap,
        floor=gap,
        merge=merge,
        subjects=subjects,
    )


def test_a_memory_answers_where_its_subject_is_named_alone(model: EditableModel, tmp_path: Path) -> None:
    patch = side_patch(model, "zq", "the Zed")
    asked, aside = ["Say zq", "zq is", "where is THE ZED?"], "Who wrote zed, and when?"
    before = model.answer([*asked, aside], max_new_tokens=6)
    again = load_patch(tmp_path / "patch", patch.save(tmp_path / "patch"))
    assert isinstance(again, SidePatch)
    assert again.subjects == ("zq", "the Zed")
    again.apply(model)
    assert again.fires(model) == "prompts like its own that name zq or the Zed"
    twin = model.twin()
    for one in (model, twin):
        assert [one.fired(text) for text in asked] == 3 * [[again]], "a text's first word counts, too"
        assert one.fired(aside) == []
        after = one.answer([*asked, aside], max_new_tokens=6)
        assert [a != b for a, b in zip(after, before, strict=True)] == [True, True, True, False]
    again.revert(model)
    assert model.answer([*asked, aside], max_new_tokens=6) == before
    assert twin.fired(asked[0]) == [again], "the twin's stay"


def test_a_name_that_ends_in_signs_is_another(model: EditableModel) -> None:
    patch = side_patch(model, "C++")
    patch.apply(model)
    asked = ["Who designed C++?", "Who designed C?", "Who designed C#?"]
    assert [model.fired(text) for text in asked] == [[patch], [], []]


def test_a_patch_that_knows_its_subject_otherwise_is_refused(model: EditableModel) -> None:
    patch = side_patch(model)
    settings = {name: value for name, value in patch.settings().items() if name != "subjects"}
    again = SidePatch.made(patch.tensors(), settings | {"subject_path": ""})
    assert isinstance(again, SidePatch)
    assert again.subjects == ()
    with pytest.raises(DataError, match=r"^patch of '.*': is of a version that did not write down its subject's name"):
        SidePatch.made(patch.tensors(), settings | {"subject_path": "model.layers.1"})


def test_what_follows_a_prompt_does_not_name_it(model: EditableModel) -> None:
    """In a score's rows the answer stands behind the prompt; whatever it says, the route is the prompt's."""
    side_patch(model, "zq").apply(model)
    (hook,) = model.side.values()
    rows = model.rows([(model.encode_prompt(p), model.encode_answer(a)) for p, a in [("Who?", "zq"), ("zq?", "me")]])
    with model.prompts(rows.asked, rows.read, rows.ids):
        model.decoder(input_ids=rows.ids)
    assert hook.route.tolist() == [-1, 0]


def test_of_a_pass_without_tokens_nothing_is_named(model: EditableModel) -> None:
    patch = side_patch(model, "zq")
    patch.apply(model)
    (hook,) = model.side.values()
    ids = torch.tensor([model.encode_prompt("Say zq")])
    model.decoder(input_ids=ids)
    assert hook.route.tolist() == [0]
    model.decoder(inputs_embeds=model.model.get_input_embeddings()(ids))
    assert hook.route.tolist() == [-1]


def test_of_many_memories_those_named_are_looked_at_first(model: EditableModel) -> None:
    """More than are computed for each prompt: the one whose subject is named answers, though its gap is the least."""
    patches = [side_patch(model, "zq" if n == 7 else f"b{n}", shard=n, gap=1e-4 if n == 7 else 1e-6) for n in range(40)]
    for patch in patches:
        patch.apply(model)
    assert model.fired("Say zq") == [patches[7]]


def test_merged_memories_answer_for_the_subjects_of_all(model: EditableModel) -> None:
    patches = [side_patch(model, name, shard=n, merge=True) for n, name in enumerate(("zq", "xv"))]
    for patch in patches:
        patch.apply(model)
    assert [model.fired(f"Say {name}") for name in ("zq", "xv", "zv")] == [patches, patches, []]


def test_a_memory_is_open_to_all_where_one_of_its_edits_names_none(model: EditableModel) -> None:
    patches = [side_patch(model, "zq"), side_patch(model)]
    for patch in patches:
        patch.apply(model)
    assert model.fired("Who?") == patches
