"""WISE on tiny random models: shards and masks, the gap and its margin, rehearsal, and what is held away."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_lab import hub
from cl_lab.editable import EditableModel, Site
from cl_lab.editing import load_editable
from cl_lab.errors import DataError
from cl_lab.facts import Edit
from cl_lab.patches import SidePatch, activation_gap, directions, shard_change, unpacked
from strategies._edit_texts import SUBJECTS, neighbours
from strategies.wise import (
    Heard,
    Wise,
    apart,
    both_ways,
    forget_all_but,
    heard_once,
    heard_prompts,
    heard_unrelated,
    in_turn,
    nearest,
    shard_mask,
    together,
)

BYTES = hub.load_tokenizer("bytes")
EDITS = [
    Edit("The capital of Peru is", "Bonn", subject="Peru"),
    Edit("Who wrote Hamlet?", "Ann", subject="Hamlet"),
    Edit("The river through Cairo is the", "Oder", subject="Cairo"),
    Edit("Zebras have", "wings", subject="Zebras"),
    Edit("Snow is", "green", subject="Snow"),
]


@pytest.fixture
def model() -> EditableModel:
    torch.manual_seed(0)
    return EditableModel(hub.tiny_causal_lm(257, layers=4), BYTES, "tiny")


def wise(**more: Any) -> Wise:
    return Wise(
        **{"layer": 2, "contexts": 0, "lr": 0.05, "steps": 60, "rho": 0.5, "unrelated": 16, "sampled": 8, "margin": 2.0}
        | more
    )


def made(model: EditableModel, editor: Wise, edits: list[Edit]) -> list[SidePatch]:
    """A patch for each edit, one after another."""
    found: list[SidePatch] = []
    for i, edit in enumerate(edits):
        patch = editor.propose(model, [edit], edits[:i])
        assert isinstance(patch, SidePatch)
        patch.apply(model)
        found.append(patch)
    return found


def mask_of(model: EditableModel, patch: SidePatch) -> Tensor:
    return unpacked(patch.places, model.site(patch.path).weight.numel())


def acted(model: EditableModel, site: Site, shard: int) -> Tensor:
    """What the patched layer adds to its output for each of its inputs alone, ``[out, in]``, where the shard answers."""
    (hook,) = model.side.values()
    ones = torch.eye(site.weight.shape[1])[:, None]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hook, "choose", lambda inputs, asked: torch.full((len(inputs),), shard))
        with_it: Tensor = site.module(ones)
    with model.unrouted():
        without: Tensor = site.module(ones)
    return (with_it - without)[:, 0].T


def said(model: EditableModel, prompt: str) -> str:
    (found,) = model.answer([prompt], max_new_tokens=6)
    return found


def test_edits_fill_one_shard_after_another_and_each_has_its_mask(model: EditableModel) -> None:
    patches = made(model, wise(edits_per_shard=2), EDITS)
    a, b, c = (patches[i].shard for i in (0, 2, 4))
    assert [p.shard for p in patches] == [a, a, b, b, c]
    assert len({a, b, c}) == 3
    masks = [mask_of(model, p) for p in patches]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    overlap = (masks[0] & masks[2]).float().mean()
    assert float(overlap) == pytest.approx(0.25, abs=0.03), "drawn apart, they overlap as chance has it"
    assert float(masks[0].float().mean()) == pytest.approx(0.5, abs=0.03)
    patches[-1].revert(model)
    patches[0].revert(model)
    again = wise(edits_per_shard=2).propose(model, [EDITS[4]], EDITS[1:4])
    assert isinstance(again, SidePatch)
    assert again.shard not in {a, b}, "a place that came free in an old shard is not filled again"
    assert apart(EDITS[3:4], patches[1:4], b) == (EDITS[3:4], []), "of fewer edits than were made the last"
    assert apart([], patches[1:4], b) == ([], [])
    known = apart([EDITS[4], *EDITS[1:4]], patches[1:4], b)
    assert known == (EDITS[2:4], [EDITS[4], EDITS[1]]), "what was edited before by others is no shard's"


def test_an_edit_that_is_brought_back_lies_with_no_other(model: EditableModel) -> None:
    editor = wise(steps=5)
    first, second = made(model, editor, EDITS[:2])
    second.revert(model)
    third = editor.propose(model, [EDITS[2]], EDITS[:1])
    third.apply(model)
    second.apply(model)
    assert isinstance(third, SidePatch)
    (memory,) = model.side.values()
    for patch in (first, second, third):
        assert memory.answering(patch.shard) == [patch]
        assert torch.equal(memory.changes[patch.shard], shard_change([patch], model.site(patch.path)))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("near", [0, 16])
def test_a_prompt_is_corrected_a_second_time(model: EditableModel, near: int, size: int) -> None:
    firm = {"rho": 1.0, "unrelated": 128, "sampled": 32, "margin": 4.0, "steps": 200, "stop_at": 0.8}
    editor = wise(neighbours=near, edits_per_shard=size, **firm)
    prompt = EDITS[0].prompt
    edits = [EDITS[1], *(dataclasses.replace(EDITS[0], answer=name) for name in ("Rom", "Ulm"))]
    beside, first, second = made(model, editor, edits)
    assert second.notes["out_of_reach"] == 0
    assert model.fired(prompt) == ([second] if size == 1 else [beside, first, second])
    assert said(model, prompt) == "Ulm"
    assert said(model, EDITS[1].prompt) == "Ann"
    second.revert(model)
    assert said(model, prompt) == "Rom", "undone, the first is back"
    second.apply(model)
    assert said(model, prompt) == "Ulm"
    if size == 1:
        first.revert(model)
        assert said(model, prompt) == "Ulm"
        first.apply(model)
        assert said(model, prompt) == "Ulm", "what is brought back lies below what was made after it"


def test_what_is_corrected_is_neither_rehearsed_nor_held_away(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed: list[list[str]] = []
    away: list[list[str]] = []
    own = Wise._rehearsed

    def noted(self: Wise, model: EditableModel, site: Site, held: Any, *more: Any) -> Any:
        rehearsed.append([e.prompt for e in held])
        return own(self, model, site, held, *more)

    def told(model: EditableModel, site: Site, prompts: Any, others: Any, number: int) -> list[str]:
        away.append(list(others))
        return []

    monkeypatch.setattr(Wise, "_rehearsed", noted)
    monkeypatch.setattr("strategies.wise.nearest", told)
    editor = wise(edits_per_shard=3, steps=1)
    made(model, editor, EDITS)
    prompts = [e.prompt for e in EDITS]
    for i, kept, others in ((0, prompts[3:], prompts[1:3]), (4, prompts[3:4], prompts[:3])):
        editor.propose(model, [dataclasses.replace(EDITS[i], answer="Ulm")], EDITS)
        assert (rehearsed[-1], away[-1]) == (kept, others)


def test_prompts_that_the_memory_does_not_answer_are_counted(model: EditableModel) -> None:
    faint = wise(steps=1, lr=1e-3).propose(model, EDITS[:2])
    assert isinstance(faint, SidePatch)
    faint.apply(model)
    unanswered = [not model.fired(e.prompt) for e in EDITS[:2]]
    assert any(unanswered)
    assert faint.notes["out_of_reach"] == sum(unanswered)


def test_the_places_of_a_shard_are_the_only_ones_that_move(model: EditableModel) -> None:
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    patches = made(model, wise(edits_per_shard=5, optimizer="sgd", lr=0.5), EDITS[:3])
    site, shard = model.site(patches[0].path), patches[0].shard
    drawn = shard_mask(site.weight.numel(), 0.5, shard, seed=0).view(site.weight.shape)
    change = acted(model, site, shard)
    assert change[drawn].any()
    assert not change[~drawn].any()
    heard = heard_prompts(model, site, [(e.prompt, False) for e in EDITS[:3]])
    assert float(heard.gap(change).min()) == pytest.approx(patches[-1].gap, rel=1e-3), "it acts as it was trained"
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters()), "nor does the model itself"


def test_the_gap_of_prompts_is_that_of_equation_3(model: EditableModel) -> None:
    site = model.down_projection(2)
    prompts = [e.prompt for e in EDITS]
    heard = heard_prompts(model, site, in_turn(prompts, False))
    change = torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(1))
    rows = model.rows([(model.encode_prompt(p), []) for p in prompts])
    at = model.above(rows, site)
    expected = activation_gap(change, at.inputs, at.asked)
    assert torch.allclose(heard.gap(change), expected, rtol=1e-4)

    drawn = heard.drawn(3, torch.Generator().manual_seed(7))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(7))[:3]
    assert torch.allclose(drawn.gap(change), expected[order], rtol=1e-4)
    assert heard.drawn(99, torch.Generator()).count == 5


def test_prompts_are_heard_once(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    site = model.down_projection(2)
    asked = both_ways([e.prompt for e in EDITS], False)
    first, unrelated = heard_once(model, site, asked), heard_unrelated(model, site, asked)
    alone = heard_prompts(model, site, asked[1:2])
    monkeypatch.setattr(model, "heard", None)
    found = heard_once(model, site, asked[1:2])
    assert torch.equal(found.tokens, first.tokens[first.of == 1])
    assert torch.equal(found.tokens, alone.tokens), "by itself, whatever else was asked for"
    assert heard_unrelated(model, site, asked) is unrelated
    forget_all_but(model, site, [e.prompt for e in EDITS[1:]])
    heard_once(model, site, asked[1:])
    with pytest.raises(TypeError, match="NoneType"):
        heard_once(model, site, asked[:1])


def test_together_are_the_prompts_of_all(model: EditableModel) -> None:
    site = model.down_projection(2)
    prompts = in_turn([e.prompt for e in EDITS], False)
    whole = heard_prompts(model, site, prompts)
    parts = together([heard_prompts(model, site, some) for some in (prompts[:2], prompts[2:3], prompts[3:])])
    assert (parts.count, parts.of.tolist()) == (5, whole.of.tolist())
    assert torch.allclose(parts.tokens, whole.tokens, atol=1e-5)


def test_what_was_only_tried_is_forgotten(model: EditableModel) -> None:
    """A service previews edits without end: kept is what the edits in force bring, and the last that was tried."""
    editor = wise(steps=1)
    made(model, editor, EDITS[:2])

    def sizes() -> list[int]:
        kept: list[int] = []
        for value in model.memo.values():
            heard = value.values() if isinstance(value, dict) else [value]
            kept += [h.tokens.numel() for h in heard if isinstance(h, Heard)]
        return kept

    editor.propose(model, [Edit("The capital of land 00 is", "B", subject="land 00")], EDITS[:2])
    first = sizes()
    for n in range(1, 12):
        editor.propose(model, [Edit(f"The capital of land {n:02d} is", "B", subject=f"land {n:02d}")], EDITS[:2])
        assert sizes() == first
    (known,) = [v for k, v in model.memo.items() if k[1] == "prompts"]
    assert {text for text, _ in known} == {*(e.prompt for e in EDITS[:2]), "The capital of land 11 is"}


@pytest.mark.parametrize("size", [1, 3])
def test_an_edit_does_not_depend_on_what_was_heard_before(model: EditableModel, size: int) -> None:
    """One after another, previews between them, is bit for bit what a new process makes on top of the same patches."""
    editor = wise(edits_per_shard=size, neighbours=3, contexts=1, steps=8)
    patches = made(model, editor, EDITS[:3])
    for tried in EDITS[:3:-1]:
        editor.propose(model, [tried], EDITS[:3])
    fresh = load_editable("tiny")
    fresh.model.load_state_dict(model.model.state_dict())
    for patch in patches:
        patch.apply(fresh)
    one, two = (editor.propose(on, [EDITS[3]], EDITS[:3]) for on in (model, fresh))
    assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
    assert one.settings() == two.settings()


def test_ways_of_asking_by_hand() -> None:
    assert in_turn("abc", True) == [("a", False), ("b", True), ("c", False)]
    assert in_turn("abc", False) == [("a", False), ("b", False), ("c", False)]
    assert both_ways("ab", True) == [("a", False), ("a", True), ("b", False), ("b", True)]
    assert both_ways("ab", False) == [("a", False), ("b", False)]


def test_neighbours_are_the_prompt_with_other_subjects() -> None:
    found = neighbours(EDITS[0], 5)
    assert len({*found}) == 5
    assert {text.removeprefix("The capital of ").removesuffix(" is") for text in found} < {*SUBJECTS}
    assert neighbours(EDITS[0], 5) == found
    assert neighbours(EDITS[0], 0) == []
    assert neighbours(Edit("Zebras have", "q"), 3) == []
    assert neighbours(Edit("Zebras have", "q", subject="Lions"), 3) == []
    assert len(neighbours(EDITS[0], 999)) == len(SUBJECTS)


def test_a_prompt_must_name_the_subject(model: EditableModel) -> None:
    patch, plain = (wise(subjects=asked).propose(model, [EDITS[0]]) for asked in (True, False))
    assert isinstance(patch, SidePatch)
    assert isinstance(plain, SidePatch)
    assert torch.equal(patch.values, plain.values), "it is trained as it would be without"
    assert (patch.subjects, plain.subjects) == (("Peru",), ())
    known = dataclasses.replace(EDITS[0], subject="peru", aliases=("The Republic of Peru", "peru"))
    unknown = Edit("Zebras have", "q")
    misplaced = dataclasses.replace(unknown, subject="Lions")
    for some, expected in (
        ([known], ("peru", "The Republic of Peru")),
        (EDITS[:2], tuple(e.subject for e in EDITS[:2])),
        ([EDITS[0], unknown], ()),  # where one is not known, none is asked for
        ([misplaced], ()),
    ):
        patch = wise(steps=1).propose(model, some)
        assert isinstance(patch, SidePatch)
        assert patch.subjects == expected


def test_of_several_questions_about_a_subject_the_nearest_answers(model: EditableModel) -> None:
    questions = [
        Edit(f"The {what} of Peru is", "B", subject="Peru") for what in ("capital", "president", "longest river")
    ]
    patches = made(model, wise(steps=2), questions)
    for patch in patches:  # whatever is asked about Peru, each would answer, and the last most strongly
        patch.gap = patch.floor = 1e-9
    patches[2].gap = patches[2].floor = 1e-12
    patches[2].revert(model)
    patches[2].apply(model)
    assert [model.fired(q.prompt) for q in questions] == [[p] for p in patches]
    kept = patches[0].keys
    patches[0].keys = kept[:0]
    assert [model.fired(q.prompt) for q in questions] == 3 * [[patches[2]]], "where one has no keys, the gap decides"
    patches[0].keys = kept
    again = SidePatch.made(patches[0].tensors(), patches[0].settings())
    assert isinstance(again, SidePatch)
    assert torch.equal(again.keys, kept)
    assert torch.equal(again.centre, patches[0].centre)
    again.keys = kept[:, 1:]
    with pytest.raises(DataError, match=r"has keys of \d+ values, the layer reads \d+; is it another model's"):
        again.check(model)


def test_the_nearest_prompts_are_those_that_bring_nearly_the_same(model: EditableModel) -> None:
    site = model.down_projection(2)
    others = ["Snow is", "The capital of Chad is", "Who wrote it?", "The capital of Perú is"]
    found = nearest(model, site, ["The capital of Peru is"], others, 2)
    assert found == ["The capital of Perú is", "The capital of Chad is"]
    assert nearest(model, site, ["The capital of Peru is"], others, 0) == []
    assert nearest(model, site, ["The capital of Peru is"], [], 2) == []
    heard = heard_prompts(model, site, in_turn(others, False))
    centre = torch.linspace(-0.1, 0.1, heard.tokens.shape[1])
    mean = torch.stack([heard.tokens[heard.of == n].mean(0) for n in range(4)]) - centre
    found_at = heard.directions(centre)
    assert torch.allclose(found_at, torch.nn.functional.normalize(mean, dim=1), atol=1e-5)
    rows = model.rows([(model.encode_prompt(p), []) for p in others])
    at = model.above(rows, site)
    assert torch.allclose(directions(at.inputs, at.asked, centre), found_at, atol=1e-4)


def test_training_brings_prompts_apart(model: EditableModel) -> None:
    """With the margin the edit's gap stands out from those of the prompts held away; without it, it does not."""
    editor = wise(rho=1.0, stop_at=1)
    site = model.down_projection(2)
    away = heard_prompts(model, site, in_turn(editor._unrelated()[0], False))

    def apart(weight: float) -> float:
        patch = wise(margin=weight, stop_at=1, rho=1.0).propose(model, [EDITS[0]])
        assert isinstance(patch, SidePatch)
        return patch.gap / float(away.gap(shard_change([patch], site)).max())

    assert apart(20.0) > 1.3 * apart(1e-9)


def test_what_is_rehearsed_holds(model: EditableModel) -> None:
    def rightness(replay: int) -> list[float]:
        patches = made(model, wise(edits_per_shard=5, replay=replay, stop_at=0.6, steps=200, rho=1.0), EDITS[:3])
        change = shard_change(patches, model.site(patches[0].path))
        for patch in patches:
            patch.revert(model)
        rows = model.rows([(model.encode_prompt(e.prompt), model.encode_answer(e.answer)) for e in EDITS[:3]])
        at = model.above(rows, model.site(patches[0].path), from_prompt_end=True)
        right = (at.logits(at.inputs @ change.T).argmax(1) == rows.labels).float()
        return [float(own.mean()) for own in right.split((rows.length - rows.prompt).tolist())]

    with_replay, without = rightness(2), rightness(0)
    assert with_replay == [1.0, 1.0, 1.0]
    assert min(without[:2]) < 1, "what is not rehearsed is overwritten"


def test_groups_that_are_whole_are_read_once(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = model.above

    def above(rows: Any, site: Any, **more: Any) -> Any:
        seen.append(len(rows))
        return own(rows, site, **more)

    editor = wise(edits_per_shard=5, replay=2, steps=2)
    made(model, editor, EDITS[:4])
    monkeypatch.setattr(model, "above", above)
    patch = editor.propose(model, [EDITS[4]], EDITS[:4])
    assert seen == [1, 2], "the new edit, and the third and fourth, which are a group since the fourth came"
    seen.clear()
    patch.apply(model)
    monkeypatch.setattr(editor, "edits_per_shard", 6)
    editor.propose(model, [Edit("Iron is", "soft", subject="Iron")], EDITS)
    assert seen == [1, 1], "the new edit and the fifth; the two whole groups are known"


def test_proposing_twice_gives_the_same(model: EditableModel) -> None:
    one, two = (wise().propose(model, [EDITS[0]]) for _ in range(2))
    assert isinstance(one, SidePatch)
    assert isinstance(two, SidePatch)
    assert torch.equal(one.values, two.values)
    assert (one.gap, one.floor) == (two.gap, two.floor)
