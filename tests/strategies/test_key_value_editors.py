"""ROME, MEMIT, AlphaEdit and LoRA as editors: their equations held against brute force, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cl_lab import hub, registry
from cl_lab.compat import import_torchvision
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, EditError
from cl_lab.facts import Edit
from cl_lab.patches import Delta, WeightPatch
from cl_lab.protocols import Editor
from strategies._key_values import (
    changed,
    key_moments,
    least_squares,
    rank_one,
    subject_inputs,
    subject_rows,
    tokens_until,
    whiten,
)
from strategies.alphaedit import AlphaEdit, kept_keys, outside, used_directions
from strategies.lora_edit import LoRAEdit, linear_layers
from strategies.memit import MEMIT
from strategies.rome import ROME

ONE = Edit("The capital of Peru is", "B", subject="Peru")
TWO = Edit("Who painted Night Watch?", "7", subject="Night Watch")
BESIDE = Edit("Rivers of Peru run", "7", subject="Peru")
QUICK: dict[str, Any] = {"steps": 6, "contexts": 1, "lr": 0.3}


@pytest.fixture
def model() -> EditableModel:
    torch.manual_seed(0)
    return EditableModel(hub.tiny_causal_lm(257, layers=4), hub.load_tokenizer("bytes"), "tiny")


def gpt2() -> EditableModel:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=3, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=256
    )
    made = GPT2LMHeadModel(config)
    with torch.no_grad():
        for layer in made.transformer.h:  # as drawn, its layers do next to nothing
            for part in (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj):
                part.weight *= 10
    return EditableModel(made, hub.load_tokenizer("bytes"), "gpt2")


def weights(model: EditableModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def proposed(editor: Editor, model: EditableModel, *edits: Edit) -> WeightPatch:
    patch = editor.propose(model, list(edits))
    assert isinstance(patch, WeightPatch)
    return patch


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the equations -------------------------------------------------------------------------------------------------


def test_rank_one_is_the_constrained_least_squares_solution() -> None:
    known, wanted = drawn(40, 6), drawn(40, 4, seed=1)
    old = torch.linalg.lstsq(known, wanted).solution.T  # W: the least squares without the constraint
    key, change = drawn(6, seed=2), drawn(4, seed=3)
    value = old @ key + change
    moments = known.T @ known / 40
    found = rank_one(key, change, whiten(key[None], moments, 0.0)[0]).value().double()
    assert torch.allclose((old + found) @ key, value, atol=1e-5)

    # Lagrange: [KᵀK k; kᵀ 0] [Wᵀ; λ] = [KᵀV; v]
    system = torch.zeros(7, 7, dtype=torch.float64)
    system[:6, :6], system[:6, 6], system[6, :6] = known.T @ known, key, key
    best = torch.linalg.solve(system, torch.cat([known.T @ wanted, value[None]]))[:6].T
    assert torch.allclose(old + found, best, atol=1e-5)


def test_least_squares_solves_memits_normal_equations() -> None:
    keys, changes, known = drawn(5, 9), drawn(5, 4, seed=1), drawn(60, 9, seed=2)
    moments, weight, ridge = known.T @ known / 60, 3.0, 0.2
    full = weight * (moments + ridge * moments.trace() / 9 * torch.eye(9, dtype=torch.float64))
    found = least_squares(keys, whiten(keys, moments, ridge) / weight, changes)
    brute = torch.linalg.solve(full + keys.T @ keys, keys.T @ changes).T
    assert torch.allclose(found.value().double(), brute, atol=1e-5)
    assert found.a is not None
    assert found.a.shape == (5, 9)


def test_least_squares_solves_alphaedits_equation_with_earlier_keys() -> None:
    held, new, changes = drawn(3, 9), drawn(2, 9, seed=1), drawn(2, 4, seed=2)
    used = torch.linalg.qr(drawn(9, 4, seed=3)).Q
    project = torch.eye(9, dtype=torch.float64) - used @ used.T
    whole = outside(torch.cat([held, new]), used)
    found = least_squares(whole, whole / 0.7, changes).value().double()
    # The paper's form: Δ = R K₁ᵀP (K_p K_pᵀ P + K₁ K₁ᵀ P + L2 I)⁻¹, keys as columns.
    inner = held.T @ held @ project + new.T @ new @ project + 0.7 * torch.eye(9, dtype=torch.float64)
    assert torch.allclose(found, changes.T @ new @ project @ torch.linalg.inv(inner), atol=1e-5)
    assert float((found @ used).abs().max()) < 1e-6


def test_whiten_says_what_to_do_without_enough_texts() -> None:
    few = drawn(3, 9)
    with pytest.raises(ConfigError, match="ridge"):
        whiten(few, -few.T @ few, 0.0)


# -- keys ----------------------------------------------------------------------------------------------------------


def test_a_subjects_end_is_found_in_tokens(model: EditableModel) -> None:
    assert tokens_until(model, "The Ångström is", len("The Ångström")) == len("The Ångström".encode())
    rows = subject_rows(model, [TWO], 2, chat=False).rows
    for ids, until in zip(rows.ids, rows.until.tolist(), strict=True):
        assert model.tokenizer.decode(ids[:until].tolist()).endswith("Night Watch")


class Words:
    """A tokenizer of which a token may lie across the end of a subject."""

    def encode(self, text: str) -> list[int]:
        tokens, pieces = [], ["ab", "bc", "a", "b", "c", "d"]
        while text:
            piece = next(p for p in pieces if text.startswith(p))
            tokens.append(pieces.index(piece))
            text = text[len(piece) :]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return "".join(["ab", "bc", "a", "b", "c", "d"][t] for t in tokens)


def test_a_token_across_the_subjects_end_counts(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tokenizer", Words())
    assert tokens_until(model, "cdabd", 3) == 3  # the subject ends with the "a" of "ab"
    assert tokens_until(model, "cdbd", 2) == 2


def test_moments_are_those_of_the_model_before_any_patch(model: EditableModel) -> None:
    site, below = model.down_projection(2), model.down_projection(0)
    plain = key_moments(model, [site])[0]
    model.origin.clear()
    patch = WeightPatch("x", {}, {below.path: Delta(dense=torch.ones(below.weight.shape))})
    patch.apply(model)
    before = weights(model)
    assert torch.equal(key_moments(model, [site])[0], plain)
    assert same(before, weights(model))


def test_moments_are_those_of_long_texts(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens weigh as one in a thousand, however short the texts are that they come from."""
    texts = ["What is it?", "Q", "Rivers of Peru run to the sea."]
    monkeypatch.setattr("strategies._key_values.PARAGRAPHS", texts[:2])
    monkeypatch.setattr("strategies._key_values.unrelated_prompts", lambda: texts[2:])
    site = model.down_projection(2)
    keys: list[torch.Tensor] = []
    with site.module.register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double())):
        for text in texts:
            model.model(torch.tensor([model.tokenizer.encode(text)]))
    outer = [[torch.outer(k, k) for k in text] for text in keys]
    firsts, others = [o[0] for o in outer], [one for o in outer for one in o[1:]]
    assert len(others) == sum(len(text) - 1 for text in texts), "a text of one token has a first alone"
    brute = 0.001 * torch.stack(firsts).mean(0) + 0.999 * torch.stack(others).mean(0)
    assert torch.allclose(key_moments(model, [site])[0], brute, rtol=1e-4, atol=1e-6 * float(brute.abs().max()))


# -- editors on a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ROME, MEMIT, AlphaEdit, LoRAEdit])
def test_a_patch_comes_off_bit_for_bit(model: EditableModel, make: type[Editor]) -> None:
    plain = weights(model)
    patch = proposed(make(**{**make.conformance_knobs(), "steps": 6}), model, ONE, TWO)
    assert same(plain, weights(model))
    assert all(c.a is not None and c.dense is None for c in patch.changes.values()), "low-rank"
    patch.apply(model)
    assert not same(plain, weights(model))
    patch.revert(model)
    assert same(plain, weights(model))


def test_rome_moves_the_value_at_each_key_by_what_was_searched(model: EditableModel) -> None:
    editor = ROME(layer=1, **QUICK)
    site = model.down_projection(1)
    delta, _ = editor._search(model, site, [ONE], "rome")
    (key,) = subject_inputs(model, editor._subjects(model, [ONE]), [site])
    patch = proposed(editor, model, ONE)
    assert torch.allclose(key @ patch.changes[site.path].value().T, delta, atol=1e-5 * float(delta.norm()))


def test_romes_second_edit_is_found_with_the_first_in_place(model: EditableModel) -> None:
    editor, path = ROME(layer=1, **QUICK), model.down_projection(1).path
    both = proposed(editor, model, ONE, TWO)
    first = proposed(editor, model, ONE)
    first.apply(model)
    second = proposed(editor, model, TWO)
    apart = first.changes[path].value() + second.changes[path].value()
    assert torch.allclose(both.changes[path].value(), apart, atol=1e-4 * float(apart.abs().max()))


@pytest.mark.parametrize("make", [ROME, MEMIT, AlphaEdit])
def test_a_fact_that_already_holds_makes_a_patch_that_changes_nothing(model: EditableModel, make: type[Any]) -> None:
    patch = proposed(make(stop_at=1e-30, **QUICK), model, ONE, TWO)
    assert patch.notes["steps"] == 0
    assert patch.notes.get("missing", 0.0) == 0
    assert not any(bool(change.value().any()) for change in patch.changes.values())


class TestWhatIsSearchedFor:
    """``δ`` under each of the terms that hold it back, at layer 1 and without beginnings; all else held equal."""

    def delta(self, model: EditableModel, **terms: float) -> torch.Tensor:
        free: dict[str, Any] = {"contexts": 0, "steps": 40, "stop_at": 1, "kl": 0.0, "decay": 0.0, "clamp": 30.0}
        found, notes = ROME(layer=1, **{**free, **terms})._search(model, model.down_projection(1), [ONE], "rome")
        assert notes["steps"] == 40
        return found[0]

    def following(self, model: EditableModel, delta: torch.Tensor | None) -> torch.Tensor:
        """Log-probabilities of what follows "Peru is a" with ``delta`` added at its "u", in one plain pass."""

        def adding(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out if delta is None else out.index_add(1, torch.tensor([len("Peru") - 1]), delta[None, None])

        with model.down_projection(1).module.register_forward_hook(adding), torch.no_grad():
            logits: torch.Tensor = model.model(torch.tensor([model.tokenizer.encode("Peru is a")])).logits
        return logits[0, -1].log_softmax(0)

    def test_kl_keeps_what_follows_subject_is_a(self, model: EditableModel) -> None:
        before = self.following(model, None)
        moved = [
            float((after.exp() * (after - before)).sum())
            for after in (self.following(model, self.delta(model, kl=kl)) for kl in (0.0, 1.0, 30.0))
        ]
        assert moved[2] < 0.5 * moved[1] < 0.5 * moved[0], moved

    def test_clamp_bounds_its_length_in_units_of_the_layers_output(self, model: EditableModel) -> None:
        lengths: list[float] = []
        place = ONE.prompt.index("Peru") + len("Peru") - 1
        with model.layers[1].register_forward_hook(
            lambda _, args, out: lengths.append(float((out[0] if isinstance(out, tuple) else out)[0, place].norm()))
        ):
            model.model(torch.tensor([model.tokenizer.encode(ONE.prompt)]))
        for clamp in (0.1, 0.3):
            assert float(self.delta(model, clamp=clamp).norm()) == pytest.approx(clamp * lengths[0], rel=1e-4)
        assert float(self.delta(model).norm()) > 0.5 * lengths[0], "nothing else keeps it short"

    def test_decay_shortens_it(self, model: EditableModel) -> None:
        free, some, much = (float(self.delta(model, decay=decay).norm()) for decay in (0.0, 0.1, 0.5))
        assert much < 0.9 * some < 0.8 * free


def test_memit_brings_what_was_searched_through_several_layers(model: EditableModel) -> None:
    patch = proposed(MEMIT(layers=[0, 1, 2], weight=1e-4, **QUICK), model, ONE, TWO)
    assert list(patch.changes) == [model.down_projection(i).path for i in range(3)]
    assert patch.notes["missing"] < 0.1
    far = proposed(MEMIT(layers=[0, 1, 2], weight=1e7, **QUICK), model, ONE, TWO)
    assert far.notes["missing"] > 0.9


def test_alphaedit_leaves_preserved_and_earlier_keys_alone(model: EditableModel) -> None:
    editor = AlphaEdit(layers=[1], l2=1e-8, **QUICK)
    site = model.down_projection(1)
    first = proposed(editor, model, ONE)
    (key,) = (first.statistics[f"{site.path}:keys"],)
    first.apply(model)
    assert torch.equal(kept_keys(model, site), key)
    second = proposed(editor, model, BESIDE)
    change = second.changes[site.path].value().double()
    used = used_directions(model, site, editor.threshold)
    moved = float((change @ key.double().T).norm())
    assert float((change @ used).norm()) < 1e-5 * float(change.norm())
    first.revert(model)
    assert len(kept_keys(model, site)) == 0
    alone = proposed(editor, model, BESIDE).changes[site.path].value().double()
    assert moved < 0.05 * float((alone @ key.double().T).norm()), (
        "the earlier edit's value moves only where it is not held"
    )


def test_alphaedit_can_correct_the_same_fact_again(model: EditableModel) -> None:
    editor = AlphaEdit(layers=[1], l2=1e-8, **QUICK)
    proposed(editor, model, ONE).apply(model)
    assert proposed(editor, model, Edit(ONE.prompt, "Q", subject="Peru")).notes["missing"] < 0.2


def test_lora_trains_the_named_modules_at_the_rank_asked_for(model: EditableModel) -> None:
    patch = proposed(LoRAEdit(layers=[0, 2], modules=["q_proj", "v_proj"], rank=3, lr=0.02), model, TWO)
    assert list(patch.changes) == [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 2) for n in "qv"]
    assert all(c.a is not None and c.a.shape == (3, 32) for c in patch.changes.values())
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        LoRAEdit(modules=["q_pro"]).propose(model, [TWO])
    with pytest.raises(ConfigError, match=r"^editor\.modules = \[\]: list should have at least 1 item"):
        registry.create("editors", {"name": "lora", "modules": []}, "editor")


def test_lora_from_a_layer_on_equals_whole_passes(model: EditableModel) -> None:
    patch = proposed(LoRAEdit(layers=[2], lr=0.02, steps=5, stop_at=1.0), model, TWO)
    rows = model.rows([(model.encode_prompt(TWO.prompt), model.encode_answer(TWO.answer))])
    with changed(model, patch.changes):
        hooked = model.logits(rows)
    patch.apply(model)
    assert torch.allclose(model.logits(rows), hooked, atol=1e-4)
    assert len(linear_layers(model, 0)) == 7


@pytest.mark.parametrize(
    "editor",
    [ROME(layer=0, **QUICK), MEMIT(layers=[0, 1], **QUICK), AlphaEdit(layers=[0, 1], **QUICK), LoRAEdit(layers=[0, 1])],
    ids=["rome", "memit", "alphaedit", "lora"],
)
class TestAllFour:
    def test_gpt2_is_edited(self, editor: Editor) -> None:
        made = gpt2()
        rows = made.rows([(made.encode_prompt(ONE.prompt), made.encode_answer(ONE.answer))])
        before = torch.nn.functional.cross_entropy(made.logits(rows), rows.labels)
        editor.propose(made, [ONE]).apply(made)
        assert torch.nn.functional.cross_entropy(made.logits(rows), rows.labels) < before

    def test_a_broken_model_is_refused(self, editor: Editor, model: EditableModel) -> None:
        model.model.get_input_embeddings().weight.data.fill_(float("nan"))
        with pytest.raises(EditError, match="nan"):
            editor.propose(model, [ONE])

    def test_a_subject_is_needed_where_it_is_written_to(self, editor: Editor, model: EditableModel) -> None:
        if not editor.by_subject:
            pytest.skip("writes at no subject")
        for subject, part in ((None, "has no subject"), ("Chile", "subject 'Chile' is not in it")):
            with pytest.raises(EditError, match=part) as caught:
                editor.propose(model, [Edit(ONE.prompt, "B", subject=subject)])
            assert ONE.prompt in str(caught.value)
            assert "ft-m" in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [MEMIT, AlphaEdit])
def test_the_last_layer_is_not_spread_to(model: EditableModel, make: type[Any]) -> None:
    with pytest.raises(ConfigError, match="one above it"):
        make(layers=[2, 3]).propose(model, [ONE])


def test_lora_draws_other_rows_for_each_patch(model: EditableModel) -> None:
    editor = LoRAEdit(rank=4)
    site = model.down_projection(1)
    first = editor._factors(model, [site], [ONE])[site.path].a
    again = editor._factors(model, [site], [ONE])[site.path].a
    other = editor._factors(model, [site], [dataclasses.replace(ONE, prompt="Who?")])[site.path].a
    WeightPatch("by hand", {}, {site.path: Delta(dense=torch.zeros(site.weight.shape))}).apply(model)
    second = editor._factors(model, [site], [ONE])[site.path].a
    assert first is not None
    assert again is not None
    assert other is not None
    assert second is not None
    assert torch.equal(first, again)
    for a in (other, second):
        assert float(torch.cosine_similarity(first.detach(), a.detach()).abs().mean()) < 0.6
