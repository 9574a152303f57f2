"""What every registered editor keeps: a proposal that changes nothing, a patch that comes off, and the new answer.

An editor brings its own test settings with ``conformance_knobs()``; nothing here asks for a name.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import hub, registry
from cl_lab.edit_scores import ask, scores
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, EditError
from cl_lab.facts import Edit, Probe
from cl_lab.patches import Patch, WeightPatch, load_patch
from cl_lab.protocols import Editor

NAMES = toys.editor_names()
every = pytest.mark.parametrize("name", NAMES)
BYTES = hub.load_tokenizer("bytes")
EDITS = [
    Edit(
        "The capital of Peru is", "B", old="L", subject="Peru", relation="capital", paraphrases=("Peru's capital is",)
    ),
    Edit(
        "Quick question: who won?", "7", subject="who", unrelated=(Probe("Where is it?", "N"),), irrelevant=("Hello!",)
    ),
]
THIRD = Edit("Zebras have", "q", subject="Zebras")
ASIDE = ["Nothing of the kind was said", "12 + 30 ="]


def editor_class(name: str) -> type[Editor]:
    cls, _ = registry.load("editors", name)
    assert issubclass(cls, Editor)
    return cls


def editor(name: str, **more: Any) -> Editor:
    made: Editor = registry.create("editors", {"name": name, **toys.editor_knobs(name), **more}, "editor")
    return made


def editable() -> EditableModel:
    return EditableModel(toys.language_model(), BYTES, "tiny")


def state(model: EditableModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def hooks(model: EditableModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def spoken(model: EditableModel) -> Tensor:
    """Logits behind the edits' prompts and behind others, as the patches want them read."""
    pairs = [(model.read_prompt(p), BYTES.encode(" B7")) for p in (*(e.prompt for e in EDITS), THIRD.prompt, *ASIDE)]
    return model.logits(model.rows(pairs))


def surprise(model: EditableModel, edits: list[Edit]) -> float:
    rows = model.rows([(model.encode_prompt(e.prompt), model.encode_answer(e.answer)) for e in edits])
    return float(torch.nn.functional.cross_entropy(model.logits(rows), rows.labels))


def holds(model: EditableModel, patch: Patch, edits: list[Edit]) -> bool:
    """Whether every token of the new answers is the likeliest.

    Of a random model that is told a fact, that it is told it; of one that is written to at a subject in the middle of a
    prompt, which it does not look at as a trained one does, that the answers became likelier.
    """
    if editor_class(patch.editor).by_subject:
        return surprise(model, edits) < 0.95 * surprise(editable(), edits)
    if patch.rewrites:
        told = [BYTES.decode(model.read_prompt(e.prompt)) for e in edits]
        return all(
            text.endswith(e.prompt) and e.answer in text.removesuffix(e.prompt)
            for text, e in zip(told, edits, strict=True)
        ) and len({*told}) == len(edits)
    asked = ask(model, edits, free=False, groups=("reliability",))
    return bool(scores(model, edits, asked, asked)["reliability"] == 1)


def test_some_are_registered() -> None:
    assert NAMES


# -- knobs ---------------------------------------------------------------------------------------------------------


@every
def test_says_what_it_is(name: str) -> None:
    cls = editor_class(name)
    assert dataclasses.is_dataclass(cls)
    first = (cls.__doc__ or "").partition("\n")[0]
    assert first
    assert not first.startswith(f"{cls.__name__}("), "a docstring of its own, not the dataclass's"
    assert {"name": name.partition(":")[0], "summary": first} in registry.summaries("editors")
    for knob in registry.describe("editors", name):
        assert knob["doc"], f"{name}.{knob['name']} has no documentation"
        assert knob["type"] not in ("Any", "object"), f"{name}.{knob['name']} takes anything"


@every
def test_refuses_unknown_knobs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^editor\.stepss: unknown key"):
        editor(name, stepss=1)


# -- a proposal ----------------------------------------------------------------------------------------------------


@every
def test_a_proposal_changes_nothing(name: str) -> None:
    model, edits = editable(), list(EDITS)
    before, said, drawn = state(model), spoken(model), torch.get_rng_state()
    made = editor(name)
    settings = dataclasses.asdict(made)
    made.propose(model, edits)
    assert same(state(model), before)
    assert (model.patches, model.side, hooks(model)) == ([], {}, 0)
    assert torch.equal(spoken(model), said)
    assert not model.model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn), "what is drawn comes from the editor's own seed"
    assert edits == EDITS
    assert dataclasses.asdict(made) == settings


@every
def test_equal_proposals_for_equal_edits(name: str) -> None:
    model = editable()
    made = editor(name)
    one = made.propose(model, EDITS)
    torch.rand(3)
    for two in (made.propose(model, EDITS), editor(name).propose(editable(), EDITS)):
        assert type(one) is type(two)
        assert same(one.tensors(), two.tensors())
        assert one.settings() == two.settings()
        assert one.notes == two.notes


@every
def test_weights_in_half_precision_are_edited(name: str) -> None:
    model = EditableModel(toys.language_model().bfloat16(), BYTES, "tiny")
    before, said = state(model), spoken(model)
    patch = editor(name).propose(model, EDITS)
    assert same(state(model), before)
    patch.apply(model)
    assert not torch.equal(spoken(model), said)
    assert torch.isfinite(spoken(model)).all()
    patch.revert(model)
    assert same(state(model), before)
    assert torch.equal(spoken(model), said)


@every
def test_the_patch_can_be_told(name: str) -> None:
    model = editable()
    patch = editor(name).propose(model, EDITS)
    assert patch.editor == name
    assert json.loads(json.dumps(patch.notes, allow_nan=False)) == patch.notes
    assert json.loads(json.dumps(patch.settings(), allow_nan=False)) == patch.settings()
    assert patch.nbytes > 0
    assert patch.fires(model)
    assert all(torch.isfinite(t.float()).all() for t in patch.tensors().values())
    if editor_class(name).folds:
        assert isinstance(patch, WeightPatch)


# -- on and off ----------------------------------------------------------------------------------------------------


@every
def test_the_new_answers_hold(name: str) -> None:
    model = editable()
    patch = editor(name).propose(model, EDITS)
    assert not holds(model, patch, EDITS), "they did not before"
    patch.apply(model)
    assert holds(model, patch, EDITS)


@every
def test_taking_it_away_leaves_nothing(name: str) -> None:
    model = editable()
    before, said, texts = state(model), spoken(model), model.answer(ASIDE, max_new_tokens=4)
    patch = editor(name).propose(model, EDITS)
    patch.apply(model)
    assert not torch.equal(spoken(model), said)
    patch.revert(model)
    assert same(state(model), before)
    assert (model.patches, model.side, hooks(model)) == ([], {}, 0)
    assert torch.equal(spoken(model), said)
    assert model.answer(ASIDE, max_new_tokens=4) == texts


@every
def test_it_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    model = editable()
    patch = editor(name).propose(model, EDITS)
    digest = patch.save(tmp_path)
    written = (tmp_path / "patch.json").read_text("utf-8")
    if not patch.rewrites:
        for edit in EDITS:
            assert edit.prompt not in written, "nobody's questions are kept where they are not needed"
    patch.apply(model)
    other = editable()
    load_patch(tmp_path, digest).apply(other)
    assert torch.equal(spoken(model), spoken(other))
    prompts = [e.prompt for e in EDITS]
    assert model.answer(prompts, max_new_tokens=4) == other.answer(prompts, max_new_tokens=4)


@every
def test_a_second_patch_lies_on_the_first(name: str) -> None:
    model = editable()
    made, before = editor(name), state(model)
    one = made.propose(model, EDITS[:1])
    one.apply(model)
    first, said = state(model), spoken(model)
    two = made.propose(model, [THIRD], EDITS[:1])
    assert same(state(model), first), "a proposal on top of a patch changes nothing, either"
    assert torch.equal(spoken(model), said)
    assert model.patches == [one]
    two.apply(model)
    assert holds(model, two, [THIRD])
    two.revert(model)
    assert same(state(model), first)
    assert torch.equal(spoken(model), said)
    two.apply(model)
    one.revert(model)
    if editor_class(name).removable:
        assert holds(model, two, [THIRD])
        assert not holds(model, two, EDITS[:1])
    two.revert(model)
    assert same(state(model), before)
    assert model.side == {}


@every
def test_what_is_removable_leaves_all_others_as_they_were(name: str) -> None:
    if not editor_class(name).removable:
        pytest.skip(f"{name} does not say so")
    model, made = editable(), editor(name)
    patches = []
    for i, edit in enumerate([*EDITS, THIRD]):
        patches.append(made.propose(model, [edit], [*EDITS, THIRD][:i]))
        patches[-1].apply(model)
    assert holds(model, patches[-1], [*EDITS, THIRD])
    patches[1].revert(model)
    assert holds(model, patches[-1], [EDITS[0], THIRD])
    assert not holds(model, patches[-1], [EDITS[1]])


# -- what cannot be done -------------------------------------------------------------------------------------------


def skip_unless_it_trains(name: str) -> None:
    if "lr" not in {k["name"] for k in registry.describe("editors", name)}:
        pytest.skip(f"{name} trains nothing")


@every
def test_a_learning_rate_far_too_high_is_told_on_one_line(name: str) -> None:
    """By the schema or by the edit, but not with a patch that says nothing sensible."""
    skip_unless_it_trains(name)
    model = editable()
    before = state(model)
    with pytest.raises((ConfigError, EditError), match=r"\blr\b") as caught:
        editor(name, lr=1e30).propose(model, EDITS)
    assert "\n" not in str(caught.value)
    assert same(state(model), before)
    assert (model.patches, model.side, hooks(model)) == ([], {}, 0)


@every
def test_a_loss_that_is_not_finite_is_told_on_one_line(name: str) -> None:
    skip_unless_it_trains(name)
    model = editable()
    model.model.model.norm.weight[0] = torch.inf
    before = state(model)
    with pytest.raises(EditError) as caught:
        editor(name).propose(model, EDITS)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert same(state(model), before)
    assert (model.patches, model.side, hooks(model)) == ([], {}, 0)


@every
def test_a_place_that_is_not_there_is_told_on_one_line(name: str) -> None:
    known = {k["name"] for k in registry.describe("editors", name)}
    model = editable()
    editor(name).check(model)
    wrong: list[tuple[str, Any, str]] = [
        ("layer", 99, "layer = 99: .* has layers 0 to"),
        ("layers", [99], "layer = 99: .* has layers 0 to"),
        ("module", "model.layers.1.mlp.up", "model.layers.1.mlp.up"),
        ("module", "model.layers.1.mlp.up_proj", "up_proj': puts out 128 values, the layers of model 'tiny' 32"),
        ("module", "model.layers.1.self_attn.q_proj", "q_proj': its layer .* changes what the module puts out"),
        ("targets", ["up"], "targets: .*'up'"),
        ("template", "{prompt}", r"template = '{prompt}': has no {answer}"),
    ]
    for knob, value, part in wrong:
        if knob in known:
            made = editor(name, **{knob: value})
            for refuse in (partial(made.propose, model, EDITS), partial(made.check, model)):
                with pytest.raises(ConfigError, match=part) as caught:
                    refuse()
                assert "\n" not in str(caught.value)
                assert (model.patches, hooks(model)) == ([], 0)
