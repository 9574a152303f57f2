"""UltraEdit, GRACE and the prompt memory on a tiny random model: their equations, what they promise, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cl_lab import hub
from cl_lab.compat import import_torchvision
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, EditError, TooLong
from cl_lab.facts import Edit
from cl_lab.patches import Codebook, Delta, KeyPatch, PromptPatch, WeightPatch, load_patch
from cl_lab.protocols import Editor
from strategies.ft_m import FTM
from strategies.grace import Grace, answer_label
from strategies.lora_edit import LoRAEdit
from strategies.prompt_memory import PromptMemory
from strategies.ultraedit import Moments, UltraEdit, feed_forward_inputs, kept_moments, shift

ONE = Edit("The capital of France is", "Lyon")
TWO = Edit("Who wrote Hamlet?", "Bob")
THREE = Edit("The river through Cairo is the", "Oder")


@pytest.fixture
def model() -> EditableModel:
    torch.manual_seed(0)
    return EditableModel(hub.tiny_causal_lm(257, layers=4), hub.load_tokenizer("bytes"), "tiny")


@pytest.fixture(scope="module")
def knowing() -> EditableModel:
    """A tiny model that gives four answers to four prompts: what one vector can turn from one answer to another."""
    torch.manual_seed(0)
    made = EditableModel(hub.tiny_causal_lm(257, layers=4), hub.load_tokenizer("bytes"), "knowing")
    facts = [
        (ONE.prompt, "Nice"),
        (TWO.prompt, "Oder"),
        (THREE.prompt, "Bob"),
        ("The largest city of Alder is", "Lyon"),
    ]
    rows = made.rows([(made.encode_prompt(p), made.encode_answer(a)) for p, a in facts])
    optimizer = torch.optim.Adam(made.model.requires_grad_(True).parameters(), lr=5e-3)
    for _ in range(120):
        h = made.decoder(input_ids=rows.ids, use_cache=False).last_hidden_state[rows.said]
        loss = torch.nn.functional.cross_entropy(made.project(h), rows.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.model.requires_grad_(False)
    assert float(loss.detach()) < 0.1
    return made


@pytest.fixture
def grace_model(knowing: EditableModel) -> Iterator[EditableModel]:
    yield knowing
    for patch in list(knowing.patches):
        patch.revert(knowing)


def weights(model: EditableModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def surprise(model: EditableModel, edit: Edit) -> float:
    """The answer's mean cross-entropy, in nats a token, its end among them."""
    rows = model.rows([(model.encode_prompt(edit.prompt), model.encode_answer(edit.answer))])
    return float(torch.nn.functional.cross_entropy(model.logits(rows), rows.labels))


def rightness(model: EditableModel, edit: Edit) -> float:
    rows = model.rows([(model.encode_prompt(edit.prompt), model.encode_answer(edit.answer))])
    return float((model.logits(rows).argmax(1) == rows.labels).float().mean())


# -- UltraEdit -----------------------------------------------------------------------------------------------------


def test_ultraedit_solves_the_ridge_regression_in_its_dual_form() -> None:
    generator = torch.Generator().manual_seed(1)
    h, grad = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (5, 7))
    seen = Moments.of(torch.cat([h, grad], 1)).joined(Moments.of(torch.randn(20, 12, generator=generator)))
    found = shift(h, grad, seen, 0.3).value().double()

    everything = (torch.cat([h, grad], 1) - seen.mean) / seen.deviation
    values = -0.3 * everything[:, :5].square().sum(1, keepdim=True) * everything[:, 5:]
    primal = torch.linalg.solve(h.T @ h + torch.eye(5, dtype=torch.float64), h.T @ values)
    assert torch.allclose(found, primal.T, atol=1e-6 * float(primal.abs().max()))


def test_ultraedit_statistics_of_the_patches_are_those_of_all_features_together() -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [100 + 3 * torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 1, 30)]
    joined = Moments.none(Moments.of(parts[0]))
    for part in parts:
        joined = joined.joined(Moments.of(part))
    whole = torch.cat(parts)
    assert int(joined.number) == 35
    assert torch.allclose(joined.mean, whole.mean(0), rtol=1e-12)
    assert torch.allclose(joined.deviation, whole.std(0), rtol=1e-9)


def test_ultraedit_patch_that_is_taken_away_takes_its_statistics_along(model: EditableModel) -> None:
    editor, site = UltraEdit(layers=[1], iterations=2, lr=1e-3), feed_forward_inputs(model, 1)[0]
    plain = weights(model)
    first = editor.propose(model, [ONE])
    assert same(plain, weights(model)), "proposing must leave the model as it was"
    assert not model.patches
    first.apply(model)
    second = editor.propose(model, [TWO], [ONE])
    count = kept_moments(model, site).number
    second.apply(model)
    assert isinstance(second, WeightPatch)
    tokens = len("Bob") + 2  # the blank before it, and the end
    assert int(kept_moments(model, site).number - count) == tokens * second.notes["steps"]

    first.revert(model)
    left = kept_moments(model, site)
    for part in Moments._fields:
        assert torch.equal(getattr(left, part), second.statistics[f"{site.path}:{part}"])
    second.revert(model)
    assert same(plain, weights(model))
    again = editor.propose(model, [ONE])
    assert isinstance(again, WeightPatch)
    assert isinstance(first, WeightPatch)
    assert all(torch.equal(again.changes[p].value(), first.changes[p].value()) for p in first.changes)


@pytest.mark.parametrize("made", [FTM(steps=3), LoRAEdit(steps=3)])
def test_what_answers_for_some_prompts_takes_no_part_in_training(model: EditableModel, made: Editor) -> None:
    """A codebook above the trained layer goes by the prompt's tokens, which training does not tell it."""
    asked = model.rows([(model.encode_prompt(ONE.prompt), [1])])
    plain = model.logits(asked)
    site = model.down_projection(3)
    width, size = site.weight.shape

    def beside(radius: float) -> dict[str, list[float]]:
        radii = torch.tensor([radius])
        book = KeyPatch(path=site.path, keys=torch.zeros(1, size), values=torch.ones(1, width) * 9, radii=radii)
        book.apply(model)
        answers = not torch.allclose(model.logits(asked), plain, atol=0.1)
        assert answers == (radius > 1)
        patch = made.propose(model, [ONE])
        book.revert(model)
        return {name: t.tolist() for name, t in patch.tensors().items()}

    assert beside(1e6) == beside(1e-6)


def test_ultraedit_normalises_by_what_earlier_patches_saw(model: EditableModel) -> None:
    editor = UltraEdit(layers=[1], iterations=1)
    alone = editor.propose(model, [TWO])
    other = editor.propose(model, [ONE])
    assert isinstance(alone, WeightPatch)
    assert isinstance(other, WeightPatch)
    zero = {p: Delta(dense=torch.zeros_like(c.value())) for p, c in other.changes.items()}
    WeightPatch("ultraedit", {}, zero, other.statistics).apply(model)  # the model says the same, but it has seen more
    beside = editor.propose(model, [TWO])
    assert isinstance(beside, WeightPatch)
    for path, change in alone.changes.items():
        assert not torch.allclose(change.value(), beside.changes[path].value(), rtol=1e-2)


def test_ultraedit_learns_a_batch_of_edits(model: EditableModel) -> None:
    editor = UltraEdit(**UltraEdit.conformance_knobs())
    patch = editor.propose(model, [ONE, TWO])
    patch.apply(model)
    assert min(rightness(model, ONE), rightness(model, TWO)) == 1.0, patch.notes


def test_ultraedit_keeps_the_smaller_form_of_a_change(model: EditableModel) -> None:
    editor = UltraEdit(layers=[2], iterations=1)
    few = editor.propose(model, [TWO])
    many = editor.propose(model, [ONE, TWO, THREE, *(Edit(f"{i} and {i} is", "something longer") for i in range(9))])
    assert isinstance(few, WeightPatch)
    assert isinstance(many, WeightPatch)
    assert all(c.dense is None for c in few.changes.values())
    assert all(c.dense is not None for c in many.changes.values())


def test_feed_forward_inputs_are_found_by_their_shape(model: EditableModel) -> None:
    paths = [s.path for s in feed_forward_inputs(model, 2)]
    assert paths == ["model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"]


def test_feed_forward_input_of_gpt2_is_found_and_edited() -> None:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=256
    )
    model = EditableModel(GPT2LMHeadModel(config), hub.load_tokenizer("bytes"), "gpt2")
    (site,) = feed_forward_inputs(model, 1)
    assert site.path == "transformer.h.1.mlp.c_fc"
    assert tuple(site.weight.shape) == (128, 32)
    before = surprise(model, TWO)
    UltraEdit(layers=[0, 1], iterations=8, lr=1e-2).propose(model, [TWO]).apply(model)
    assert surprise(model, TWO) < 0.95 * before


@pytest.mark.parametrize("iterations", [1, 3])
def test_ultraedit_says_what_it_came_to(model: EditableModel, iterations: int) -> None:
    patch = UltraEdit(layers=[1], iterations=iterations, lr=1e-3, stop_at=1.0, chat=False).propose(model, [ONE])
    before = surprise(model, ONE)
    patch.apply(model)
    assert patch.notes["steps"] == iterations
    assert patch.notes["loss"] == pytest.approx(surprise(model, ONE), rel=1e-4)
    assert patch.notes["loss"] < before


def test_ultraedit_refuses_what_made_it_worse(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(model)
    monkeypatch.setattr("strategies.ultraedit.shift", lambda h, grad, seen, lr: shift(h, -grad, seen, lr))
    with pytest.raises(EditError, match=r"^ultraedit: .* the loss went from .* lower the editor's lr$"):
        UltraEdit(layers=[0, 1], iterations=2, lr=1e-2).propose(model, [ONE])
    assert same(before, weights(model))


@pytest.mark.parametrize("layers", [[], [1, 1], [4]], ids=["none", "twice", "not there"])
def test_ultraedit_refuses_layers_that_make_no_sense(model: EditableModel, layers: list[int]) -> None:
    with pytest.raises(ConfigError, match="layer"):
        UltraEdit(layers=layers).propose(model, [ONE])


# -- GRACE ---------------------------------------------------------------------------------------------------------


def grace(**knobs: Any) -> Grace:
    return Grace(**{**Grace.conformance_knobs(), **knobs})


def test_grace_edits_its_prompt_and_leaves_others_alone(grace_model: EditableModel) -> None:
    model = grace_model
    plain, other = weights(model), model.rows([(model.encode_prompt("Nothing near it"), [1, 2])])
    before = model.logits(other)
    patch = grace(radius=0.01).propose(model, [ONE])
    assert not model.side
    assert torch.equal(model.logits(other), before)
    patch.apply(model)
    assert rightness(model, ONE) == 1.0, patch.notes
    assert torch.equal(model.logits(other), before)
    assert same(plain, weights(model))


def test_grace_makes_one_entry_for_each_edit_of_a_batch(grace_model: EditableModel) -> None:
    model = grace_model
    patch = grace(radius=0.01, lr=0.3, steps=200).propose(model, [ONE, TWO, THREE])
    assert isinstance(patch, KeyPatch)
    assert len(patch.keys) == len(patch.values) == len(patch.radii) == 3
    assert patch.labels.tolist() == [answer_label(e.answer) for e in (ONE, TWO, THREE)]
    patch.apply(model)
    assert [rightness(model, e) for e in (ONE, TWO)] == [1.0, 1.0], patch.notes
    model.logits(model.rows([(model.encode_prompt(e.prompt), [1]) for e in (THREE, ONE, TWO)]))
    route = codebook(model).route
    assert route is not None
    assert route.tolist() == [2, 0, 1]


def test_grace_takes_the_radius_from_unrelated_prompts(model: EditableModel) -> None:
    half, whole = (grace(reach=share, steps=1).propose(model, [ONE]) for share in (0.5, 1.0))
    assert isinstance(half, KeyPatch)
    assert isinstance(whole, KeyPatch)
    assert float(half.radii) > 0
    assert float(whole.radii) == pytest.approx(2 * float(half.radii))


def entry(path: str, key: list[float], radius: float, answer: str) -> KeyPatch:
    keys, values = torch.zeros(1, 128), torch.zeros(1, 32)
    keys[0, : len(key)] = torch.tensor(key)
    labels = torch.tensor([answer_label(answer)])
    return KeyPatch(path=path, keys=keys, values=values, radii=torch.tensor([radius]), labels=labels)


def codebook(model: EditableModel) -> Codebook:
    (hook,) = model.side.values()
    assert isinstance(hook, Codebook)
    return hook


def test_entries_of_two_answers_share_the_way_between_them_until_one_goes(model: EditableModel) -> None:
    path = model.down_projection(2).path
    old, new, twin = entry(path, [0.0], 3.0, "Lyon"), entry(path, [4.0], 3.0, "Nice"), entry(path, [0.5], 3.0, " lyon ")
    old.apply(model)
    twin.apply(model)
    assert codebook(model).radii.tolist() == [3, 3], "one answer: no conflict"
    twin.revert(model)
    new.apply(model)
    assert codebook(model).radii.tolist() == pytest.approx([2, 2])
    assert float(old.radii) == 3.0, "the older patch itself is not rewritten"
    new.revert(model)
    assert codebook(model).radii.tolist() == [3]


def test_a_new_answer_to_the_same_prompt_replaces_the_old_one_and_gives_it_back(grace_model: EditableModel) -> None:
    model = grace_model
    editor, other = grace(radius=0.01), Edit(ONE.prompt, "Nice")
    first = editor.propose(model, [ONE])
    first.apply(model)
    second = editor.propose(model, [other], [ONE])
    second.apply(model)
    assert rightness(model, other) == 1.0
    assert rightness(model, ONE) < 1.0
    second.revert(model)
    assert rightness(model, ONE) == 1.0


# -- the prompt memory ---------------------------------------------------------------------------------------------


def memory(**knobs: Any) -> PromptMemory:
    return PromptMemory(**{**PromptMemory.conformance_knobs(), **knobs})


def test_prompt_memory_reads_the_nearest_fact_before_its_prompt_only(model: EditableModel) -> None:
    editor = memory(unrelated=64)  # a percentile of a few is not met by the next
    editor.propose(model, [ONE, TWO]).apply(model)
    editor.propose(model, [THREE], [ONE, TWO]).apply(model)
    decode = model.tokenizer.decode
    for edit in (ONE, TWO, THREE):
        assert decode(model.read_prompt(edit.prompt)) == f"{edit.prompt} {edit.answer}\n{edit.prompt}"
    assert decode(model.read_prompt("zzzzzz 0123456789")) == "zzzzzz 0123456789"


@pytest.mark.parametrize("asked", [True, False])
def test_prompt_memory_goes_by_the_subject_where_it_is_known(model: EditableModel, asked: bool, tmp_path: Path) -> None:
    known = Edit(ONE.prompt, ONE.answer, subject="France", aliases=("Gaul",))
    patch = memory(subjects=asked, least=-1.0).propose(model, [known, TWO])
    assert ("France" in patch.fires(model)) == asked
    patch.save(tmp_path)
    load_patch(tmp_path).apply(model)

    def told(prompt: str) -> str:
        text: str = model.tokenizer.decode(model.read_prompt(prompt))
        return text.removesuffix(prompt).rstrip()

    for prompt in (ONE.prompt, "The capital of GAUL is"):
        assert told(prompt) == f"{ONE.prompt} {ONE.answer}"
    # The nearest is the same question about another; the fact without a subject is open to whatever is near enough.
    other = f"{TWO.prompt} {TWO.answer}" if asked else f"{ONE.prompt} {ONE.answer}"
    assert told("The capital of Francia is") == other


def test_prompt_memory_forgets_what_is_taken_away(model: EditableModel) -> None:
    patches = [memory().propose(model, [e]) for e in (ONE, TWO)]
    for patch in patches:
        patch.apply(model)
    patches[0].revert(model)
    assert model.tokenizer.decode(model.read_prompt(ONE.prompt)) == ONE.prompt
    assert model.tokenizer.decode(model.read_prompt(TWO.prompt)).startswith(f"{TWO.prompt} {TWO.answer}")


@pytest.mark.parametrize("together", [1, 3])  # read with others, a prompt's embedding has other last digits
def test_prompt_memory_puts_the_newest_of_a_prompts_answers_before_it(model: EditableModel, together: int) -> None:
    first = memory().propose(model, [THREE, TWO, ONE][-together:])
    second = memory().propose(model, [Edit(ONE.prompt, "Nice")], [ONE])
    first.apply(model)
    second.apply(model)

    def told() -> str:
        return model.tokenizer.decode(model.read_prompt(ONE.prompt)).partition("\n")[0]

    assert told() == f"{ONE.prompt} Nice"
    assert model.fired(ONE.prompt) == [second]
    second.revert(model)
    assert told() == f"{ONE.prompt} {ONE.answer}", "undone, the first is back"
    second.apply(model)
    first.revert(model)
    first.apply(model)
    assert told() == f"{ONE.prompt} Nice", "what is brought back lies below what was made after it"


def test_prompt_memory_leaves_a_fact_out_for_which_there_is_no_room(model: EditableModel) -> None:
    context = model.context
    assert context is not None
    patch = memory(least=-1.0).propose(model, [ONE])
    patch.apply(model)
    fact = len(model.read_prompt(ONE.prompt)) - len(model.encode_prompt(ONE.prompt))
    prompt = "a" * (context - fact - 10)
    assert model.read(prompt, room=10).by == [patch]
    assert model.read(prompt, room=11).by == []
    assert model.read(prompt, room=11).ids == model.encode_prompt(prompt)
    assert len(model.answer([prompt], max_new_tokens=11)) == 1, "what can be asked without it can be asked with it"
    long = Edit("b" * (context // 2), "Lyon")
    with pytest.raises(TooLong, match=r"^'b{30}…b{30}': a text of \d+ tokens is longer than the \d+ the model reads"):
        memory().propose(model, [long])


def test_prompt_memory_names_the_subjects_it_goes_by(model: EditableModel) -> None:
    def known(names: list[str]) -> list[Edit]:
        return [Edit(f"The capital of {name} is", "Lyon", subject=name) for name in names]

    names = ["France", "Peru", "Chad", "Mali", "Togo", "Cuba", "Fiji"]
    for some, expected in (
        (known(names[:2]), "with its prompt that names France or Peru"),
        (known(names), "that names France or Peru or Chad or Mali or Togo or one of 2 others"),
        ([*known(names[:1]), TWO], "with its prompt that, where a fact's subject is known, names France"),
        ([TWO], "with its prompt"),
    ):
        assert memory(least=0.5).propose(model, some).fires(model).endswith(expected)


def test_a_name_without_words_opens_no_fact_to_prompts_without_any(model: EditableModel) -> None:
    edit = Edit(ONE.prompt, ONE.answer, subject="France", aliases=("!!!", "…"))
    patch = memory(least=-1.0).propose(model, [edit])
    assert isinstance(patch, PromptPatch)
    assert patch.subjects == [["France"]]
    for names in (["France"], ["France", "!!!"]):  # as an earlier version saved it
        patch.subjects = [names]
        patch.apply(model)
        assert [bool(model.read(text).by) for text in ("France?", "?!", "...")] == [True, False, False]
        patch.revert(model)


def test_prompt_memory_tells_facts_by_its_template(model: EditableModel) -> None:
    patch = memory(template="Note: {prompt} ({answer}).").propose(model, [Edit("What is {x}?", "a {prompt}")])
    assert isinstance(patch, PromptPatch)
    assert patch.texts == ["Note: What is {x}? (a {prompt})."]
    with pytest.raises(ConfigError, match="answer"):
        memory(template="{prompt}").propose(model, [ONE])


def test_prompt_memory_takes_the_cosine_between_unrelated_prompts_and_its_own(model: EditableModel) -> None:
    low, high, given = (memory(**k).propose(model, [ONE]) for k in ({"share": 0.0}, {"share": 1.0}, {"least": 0.77}))
    assert isinstance(low, PromptPatch)
    assert isinstance(high, PromptPatch)
    assert isinstance(given, PromptPatch)
    assert low.thresholds.tolist() == pytest.approx([low.notes["unrelated"]])
    assert high.thresholds.tolist() == pytest.approx([max(high.notes["own"], high.notes["unrelated"])])
    assert given.thresholds.tolist() == pytest.approx([0.77])
    both = memory().propose(model, [ONE, TWO])
    assert isinstance(both, PromptPatch)
    each = [memory().propose(model, [edit]) for edit in (ONE, TWO)]
    assert both.thresholds.tolist() == pytest.approx([float(p.tensors()["least"]) for p in each], rel=1e-4)


def test_prompt_memory_refuses_a_layer_that_is_not_there(model: EditableModel) -> None:
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        memory(layer=4).propose(model, [ONE])


# -- all three -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "editor", [UltraEdit(layers=[1]), grace(), memory()], ids=["ultraedit", "grace", "prompt-memory"]
)
def test_a_broken_model_is_refused(model: EditableModel, editor: UltraEdit | Grace | PromptMemory) -> None:
    model.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(EditError):
        editor.propose(model, [ONE])


@pytest.mark.parametrize("editor", [UltraEdit, Grace, PromptMemory])
def test_knobs_have_a_word_of_explanation(editor: type) -> None:
    from cl_lab.knobs import describe

    rows = [SimpleNamespace(**row) for row in describe(editor)]
    assert rows
    assert all(row.doc for row in rows)
