"""What WISE's released code does otherwise than the paper, each beside the paper's way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import hub
from cl_lab.editable import EditableModel, Rows
from cl_lab.facts import Edit
from cl_lab.hub import activation
from cl_lab.patches import (
    ReleasedMemory,
    ReleasedSidePatch,
    SideMemory,
    SidePatch,
    activation_gap,
    packed,
    released_change,
    shard_change,
    token_gaps,
    unpacked,
)
from strategies._edit_texts import row_loss
from strategies.wise import Wise
from strategies.wise_released import STARTS, WiseReleased

BYTES = hub.load_tokenizer("bytes")
EDITS = [
    Edit("The capital of Peru is", "Bonn", irrelevant=("A wholly other text.", "Another.")),
    Edit("Who wrote Hamlet?", "Ann"),
    Edit("Zebras have", "wings"),
]
PATH = "model.layers.2.mlp.down_proj"


@pytest.fixture
def model() -> EditableModel:
    return EditableModel(toys.language_model(), BYTES, "tiny")


def released(**more: Any) -> WiseReleased:
    return WiseReleased(**{"layer": 2, "beginnings": 0, "rho": 0.5, "steps": 5, "lr": 0.2} | more)


def made(model: EditableModel, editor: WiseReleased, edits: list[Edit]) -> list[ReleasedSidePatch]:
    """A patch for each edit, one after another."""
    found = []
    for i, edit in enumerate(edits):
        patch = editor.propose(model, [edit], edits[:i])
        assert isinstance(patch, ReleasedSidePatch)
        patch.apply(model)
        found.append(patch)
    return found


def memory(model: EditableModel) -> SideMemory:
    (hook,) = model.side.values()
    assert isinstance(hook, SideMemory)
    return hook


def side(model: EditableModel, kind: type[SidePatch], *, seed: int = 1, scale: float = 0.3, **more: Any) -> SidePatch:
    """A patch on all entries, drawn."""
    shape = model.site(PATH).weight.shape
    values = scale * torch.randn(shape.numel(), generator=torch.Generator().manual_seed(seed))
    return kind("test", path=PATH, places=packed(torch.ones(shape.numel())), values=values, **more)


def rows_of(model: EditableModel, *, end: bool = False) -> Rows:
    return model.rows([(model.encode_prompt(e.prompt), model.encode_answer(e.answer, end=end)) for e in EDITS])


def heard(model: EditableModel, rows: Rows) -> list[Tensor]:
    with model.unrouted():
        return model.inputs(rows, [model.site(PATH)])[PATH]


def gaps_by_hand(model: EditableModel, change: Tensor, inputs: Tensor) -> Tensor:
    """The gap ``[T]`` of each token."""
    weight = model.site(PATH).weight
    silu = torch.nn.functional.silu
    return torch.stack([(silu((weight + change) @ x) - silu(weight @ x)).norm() for x in inputs])


# -- the gap ---------------------------------------------------------------------------------------------------------


def test_the_gap_is_of_activations_and_of_all_tokens(model: EditableModel) -> None:
    """The paper's is linear in the change, and the prompt's own tokens alone count."""
    patch = side(model, ReleasedSidePatch, gap=1.0)
    patch.apply(model)
    rows, hook = rows_of(model), memory(model)
    assert isinstance(hook, ReleasedMemory)
    change = hook.changes[0]
    width = rows.ids.shape[1]
    inputs = torch.stack([torch.nn.functional.pad(h, (0, 0, 0, width - len(h)), value=9.0) for h in heard(model, rows)])
    found = hook.gap(0, inputs, rows.read)
    wanted = torch.stack([gaps_by_hand(model, change, h).mean() for h in heard(model, rows)])
    assert torch.allclose(found, wanted, rtol=1e-4)
    assert not torch.allclose(found, activation_gap(change, inputs, rows.asked), rtol=0.05)
    own = torch.stack([activation_gap(change, h[None], torch.ones(1, len(h)))[0] for h in heard(model, rows)])
    assert not torch.allclose(found, own, rtol=0.05), "of the same tokens, it is the activation that differs"


def test_of_a_long_text_the_greatest_token_counts(model: EditableModel) -> None:
    side(model, ReleasedSidePatch, gap=1.0).apply(model)
    hook = memory(model)
    assert isinstance(hook, ReleasedMemory)
    for length in (100, 101):
        rows = model.rows([(BYTES.encode("x" * (length - 7) + "Hamlet?"), [])])
        (inputs,) = heard(model, rows)
        each = gaps_by_hand(model, hook.changes[0], inputs)
        wanted = each.mean() if length == 100 else each.max()
        assert torch.allclose(hook.gap(0, inputs[None], rows.read), wanted, rtol=1e-4)
        assert float(each.max()) > 1.2 * float(each.mean())


def test_activations_by_name() -> None:
    class Config:
        hidden_act = "silu"

    x = torch.linspace(-3, 3, 7)
    assert torch.equal(activation(Config())(x), torch.nn.functional.silu(x))
    assert token_gaps(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.tanh).tolist() == [[0.0, 0.0]]


# -- who answers -----------------------------------------------------------------------------------------------------


def routes(model: EditableModel, answers: list[str]) -> list[int]:
    rows = model.rows([(model.encode_prompt(EDITS[0].prompt), model.encode_answer(a, end=False)) for a in answers])
    model.logits(rows)
    route = memory(model).route
    assert route is not None
    return [int(r) for r in route]


@pytest.mark.parametrize("kind", [ReleasedSidePatch, SidePatch])
def test_an_answer_that_stands_there_takes_part(model: EditableModel, kind: type[SidePatch]) -> None:
    answers = ["Bonn is where it was", "zzzzzzzzzzzzzzzzzzzzzz", "1"]
    patch = side(model, ReleasedSidePatch, gap=1.0)
    patch.apply(model)
    hook = memory(model)
    assert isinstance(hook, ReleasedMemory)
    gaps = []
    for answer in answers:
        (inputs,) = heard(
            model,
            model.rows([(model.encode_prompt(EDITS[0].prompt), model.encode_answer(answer, end=False))]),
        )
        gaps.append(float(hook.gap(0, inputs[None], torch.ones(1, len(inputs)))))
    patch.revert(model)
    middle = sorted(gaps)[1]
    more = {"ratio": 1.0} if kind is ReleasedSidePatch else {}
    side(model, kind, gap=middle * (1 + 1e-4) / (1.0 if more else 0.7), **more).apply(model)
    found = routes(model, answers)
    if kind is ReleasedSidePatch:
        assert [r >= 0 for r in found] == [g > middle for g in gaps]
        assert len({*found}) == 2
    else:
        assert len({*found}) == 1, "the paper's has the prompt alone"


@pytest.mark.parametrize(("kind", "decisions"), [(ReleasedSidePatch, 6), (SidePatch, 1)])
def test_each_written_token_is_another_decision(
    model: EditableModel, kind: type[SidePatch], decisions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side(model, kind, gap=1e-9).apply(model)
    hook, seen = memory(model), []
    own = hook.choose

    def choose(inputs: Tensor, asked: Tensor) -> Tensor:
        seen.append(inputs.shape[1])
        return own(inputs, asked)

    monkeypatch.setattr(hook, "choose", choose)
    model.write([EDITS[0].prompt], tokens=6)
    assert seen == [len(EDITS[0].prompt), *[1] * (decisions - 1)]


def test_padding_of_a_batch_decides_nothing(model: EditableModel) -> None:
    """One prompt at a time is what the released code is asked; a row of a batch must say the same."""
    editor = released(steps=30)
    made(model, editor, EDITS[:2])
    prompts = [e.prompt for e in EDITS]
    together = model.answer(prompts, max_new_tokens=6)
    assert together == [model.answer([p], max_new_tokens=6)[0] for p in prompts]


@pytest.mark.parametrize("kind", [ReleasedSidePatch, SidePatch])
def test_the_memory_acts_on_the_whole_text(model: EditableModel, kind: type[SidePatch]) -> None:
    rows = model.rows([(model.encode_prompt(EDITS[0].prompt), model.encode_answer("B", end=False))])
    (inputs,) = heard(model, rows)
    side(model, kind, gap=1e-9).apply(model)
    hook = memory(model)
    change = hook.change(inputs[None], 0, rows.asked)[0]
    full = inputs @ hook.changes[0].T
    at = int(rows.until) - 1
    assert torch.allclose(change[at:], full[at:], atol=1e-5)
    assert bool(change[:at].any()) == (kind is ReleasedSidePatch)


@pytest.mark.parametrize("kind", [ReleasedSidePatch, SidePatch])
def test_raw_gaps_are_compared(model: EditableModel, kind: type[SidePatch]) -> None:
    """The newest memory has the larger gap but is below its threshold: it keeps the older from answering."""
    side(model, kind, seed=1, scale=0.2, shard=0, gap=1e-6).apply(model)
    side(model, kind, seed=2, scale=0.6, shard=1, gap=1e6).apply(model)
    model.logits(rows_of(model))
    route = memory(model).route
    assert route is not None
    assert route.tolist() == ([-1] * 3 if kind is ReleasedSidePatch else [0] * 3)
    for patch in list(model.patches):
        patch.revert(model)
    side(model, kind, seed=1, scale=0.6, shard=0, gap=1e-6).apply(model)
    side(model, kind, seed=2, scale=0.2, shard=1, gap=1e-9).apply(model)
    model.logits(rows_of(model))
    route = memory(model).route
    assert route is not None
    assert route.tolist() == ([0] * 3 if kind is ReleasedSidePatch else [1] * 3), "the paper's asks how far above"


def test_the_threshold_is_a_share_of_the_least_gap(model: EditableModel) -> None:
    patches = made(model, released(act_ratio=0.5), EDITS)
    assert memory(model).thresholds == {patches[0].shard: pytest.approx(0.5 * min(p.gap for p in patches))}
    for patch in list(model.patches):
        patch.revert(model)
    one = made(model, released(), EDITS[:1])[0]
    rows = rows_of(model).take(slice(0, 1))
    (inputs,) = heard(model, rows)
    hook = memory(model)
    assert isinstance(hook, ReleasedMemory)
    assert one.gap == pytest.approx(float(hook.gap(one.shard, inputs[None], rows.read)), rel=1e-4)


# -- what is learnt --------------------------------------------------------------------------------------------------


def test_weight_decay_knows_no_mask(model: EditableModel) -> None:
    site = model.site(PATH)
    patches = made(model, released(weight_decay=1e-3, steps=7), EDITS[:2])
    mask = unpacked(patches[0].places, site.weight.numel()).view(site.weight.shape)
    change = released_change(patches, site)
    assert torch.allclose((site.weight + change)[~mask], site.weight[~mask] * (1 - 2e-4) ** 14, rtol=1e-6)
    (shard,) = memory(model).changes
    assert torch.allclose(memory(model).changes[shard], change)
    patches[0].revert(model)
    left = memory(model).changes[shard]
    assert torch.allclose((site.weight + left)[~mask], site.weight[~mask] * (1 - 2e-4) ** 7, rtol=1e-6)
    plain = Wise(layer=2, contexts=0, optimizer="sgd", lr=0.2, steps=7, rho=0.5, unrelated=16).propose(model, EDITS[:1])
    assert isinstance(plain, SidePatch)
    own = unpacked(plain.places, site.weight.numel()).view(site.weight.shape)
    assert not shard_change([plain], site)[~own].any(), "the paper's stays in its mask"


def test_one_step_by_hand(model: EditableModel) -> None:
    """The loss is divided by one token too many, and margins are absolute; the answer's end is not in it."""
    site, edit = model.site(PATH), EDITS[0]
    patch = released(steps=1, lr=1e-3, weight_decay=0.0).propose(model, [edit])
    assert isinstance(patch, ReleasedSidePatch)
    prompt, answer = BYTES.encode(edit.prompt), BYTES.encode(" Bonn")
    weight = site.weight.clone().requires_grad_()
    rows = model.rows([(prompt, answer), (BYTES.encode(edit.irrelevant[0]), [])])
    at = model.above(rows, site)
    more = at.inputs @ (weight - site.weight).T
    each, _ = row_loss(at.logits(more), rows.labels, torch.tensor([len(answer)]))
    out = at.inputs @ site.weight.T
    gap = (token_gaps(out, more, torch.nn.functional.silu) * rows.read).sum(1) / rows.read.sum(1)
    loss = each.sum() * 5 / 6 + (20 - gap[0]) + (10 - gap[0] + gap[1])
    assert len(answer) == 5
    loss.backward()
    assert weight.grad is not None
    mask = unpacked(patch.places, weight.numel()).view(weight.shape)
    assert torch.allclose(patch.values, (-1e-3 * weight.grad)[mask], atol=1e-7)
    assert patch.values.abs().max() > 1e-5


def test_neither_the_end_nor_a_chats_turn_is_learnt(model: EditableModel) -> None:
    for _, answer in released(beginnings=2)._texts(model, EDITS[0]):
        assert answer == BYTES.encode(" Bonn")
        assert BYTES.end not in answer


def test_the_model_writes_the_beginnings_once_and_unedited(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = released(beginnings=5)
    found = editor._beginnings(model)
    assert len(found) == 10
    assert [any(text.startswith(f"{s} ") for s in STARTS) for text in found] == [True] * 10
    assert [prompt for prompt, _ in editor._texts(model, EDITS[0])] == [
        BYTES.encode(text) for text in ("The capital of Peru is", *(f"{b} The capital of Peru is" for b in found))
    ]
    other = EditableModel(toys.language_model(), BYTES, "other")
    made(other, released(steps=40), EDITS[:1])
    assert editor._beginnings(other) == found, "of a model that is edited, too"
    monkeypatch.setattr(model, "write", None)
    assert editor._beginnings(model) == found


def test_the_first_irrelevant_text_is_held_away(model: EditableModel) -> None:
    assert released()._irrelevant(model, EDITS[0]) == (BYTES.encode("A wholly other text."), [])
    ours, again = (released()._irrelevant(model, EDITS[1]) for _ in range(2))
    assert ours == again, "one of our own where there is none"
    assert ours != released()._irrelevant(model, EDITS[2])


def test_training_stops_where_the_loss_is_small_and_still(model: EditableModel) -> None:
    easy = {"alpha": 1e6, "beta": 1e-9, "gamma": 0.0}
    patch = released(steps=400, **easy).propose(model, EDITS[:1])
    assert patch.notes["loss"] <= 0.02
    assert 1 < patch.notes["steps"] < 400
    hard = released(steps=200, **{**easy, "alpha": 0.0}).propose(model, EDITS[:1])
    assert hard.notes["steps"] == 200, "while a margin is not met it goes on"


def test_edits_go_on_in_one_memory_and_another_begins_when_it_is_full(model: EditableModel) -> None:
    patches = made(model, released(edits_per_shard=2, steps=2), EDITS)
    first, newest = patches[0].shard, patches[2].shard
    assert [p.shard for p in patches] == [first, first, newest]
    assert first != newest
    assert torch.equal(patches[0].places, patches[1].places)
    assert list(memory(model).changes) == [first, newest]


def test_the_settings_are_those_that_were_released() -> None:
    editor = WiseReleased()
    assert (editor.alpha, editor.beta, editor.gamma, editor.act_ratio) == (5, 20, 10, 0.88)
    assert (editor.lr, editor.steps, editor.rho, editor.weight_decay) == (1, 70, 0.2, 1e-5)
    assert (editor.edits_per_shard, 2 * editor.beginnings) == (500, 10)


def test_side_memories_of_both_kinds_do_not_mix(model: EditableModel) -> None:
    made(model, released(), EDITS[:1])
    patch = Wise(layer=2, contexts=0, steps=2, rho=0.5, unrelated=16).propose(model, EDITS[1:2])
    patch.apply(model)
    assert len(model.side) == 2
    for laid in list(model.patches):
        laid.revert(model)
    assert model.side == {}


def test_pauses_nest(model: EditableModel) -> None:
    side(model, ReleasedSidePatch, gap=1e-9).apply(model)
    rows = rows_of(model)
    routed = model.logits(rows)
    with model.unrouted():
        plain = model.logits(rows)
        with model.unpatched():
            assert torch.equal(model.logits(rows), plain)
        assert torch.equal(model.logits(rows), plain)
    assert torch.equal(model.logits(rows), routed)
    assert not torch.equal(routed, plain)
