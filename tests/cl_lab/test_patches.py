"""What an edit leaves behind: bit for bit reversible, readable again from its files, and asked for by row."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import hub
from cl_lab import patches as module
from cl_lab.compat import import_torchvision
from cl_lab.editable import Batch, EditableModel, Rows
from cl_lab.errors import DataError
from cl_lab.patches import (
    Codebook,
    Delta,
    KeyPatch,
    Patch,
    PromptPatch,
    SideMemory,
    SidePatch,
    WeightPatch,
    activation_gap,
    embed,
    last_of_greatest,
    load_patch,
    packed,
    remade,
    shard_change,
    threshold,
    ties,
    unpacked,
)

BYTES = hub.load_tokenizer("bytes")
TEXTS = [
    ("The capital of Peru is", " Lima"),
    ("Q", " no"),
    ("Who wrote it, and when was that?", " B"),
    ("Two", " of them"),
    ("zzzz zzzz", " or 17"),
    ("Some more words of no great meaning", " yes"),
]
PROMPTS = [p for p, _ in TEXTS]


def editable(name: str = "llama", layers: int = 3, width: int = 32) -> EditableModel:
    torch.manual_seed(5)
    if name == "llama":
        return EditableModel(hub.tiny_causal_lm(vocabulary=257, layers=layers, width=width, heads=2), BYTES, name)
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    own = {"initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=257, n_embd=width, n_layer=layers, n_head=2, n_positions=128, **own)
    return EditableModel(GPT2LMHeadModel(config), BYTES, name)


def state(model: EditableModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.model.state_dict().items()}


def same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def hooks(model: EditableModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def rows_of(model: EditableModel, texts: list[tuple[str, str]] = TEXTS) -> Rows:
    return model.rows([(BYTES.encode(p), BYTES.encode(a)) for p, a in texts])


def by_row(model: EditableModel, rows: Rows) -> list[Tensor]:
    return list(model.logits(rows).split((rows.length - rows.prompt).tolist()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- patches by hand -----------------------------------------------------------------------------------------------


def dense(model: EditableModel, layer: int = 1, seed: int = 0) -> WeightPatch:
    site = model.down_projection(layer)
    return WeightPatch("dense", {"loss": 0.5}, {site.path: Delta(dense=0.1 * random(*site.weight.shape, seed=seed))})


def low_rank(model: EditableModel, layer: int = 1, seed: int = 1) -> WeightPatch:
    site = model.down_projection(layer)
    out, into = site.weight.shape
    delta = Delta(a=0.3 * random(2, into, seed=seed), b=0.3 * random(out, 2, seed=seed + 100))
    return WeightPatch("low", {}, {site.path: delta}, {"sum": random(3)})


def side(
    model: EditableModel, least: float = 0.0, *, shard: int = 0, seed: int = 0, layer: int = 1, whole: bool = True
) -> SidePatch:
    """A shard's patch that answers from the gap ``least`` on."""
    site = model.down_projection(layer)
    generator = torch.Generator().manual_seed(50 + shard)
    mask = torch.rand(site.weight.numel(), generator=generator) < 0.5
    values = 0.3 * random(int(mask.sum()), seed=seed)
    return SidePatch(
        "side",
        {"edits": 1},
        path=site.path,
        shard=shard,
        places=packed(mask),
        values=values.bfloat16(),
        gap=least,
        floor=least,
        whole=whole,
    )


def key(model: EditableModel, *prompts: str, radius: float = 1e-3, seed: int = 0, layer: int = 1) -> KeyPatch:
    """A codebook with an entry for each prompt."""
    site = model.down_projection(layer)
    rows = model.rows([(BYTES.encode(p), []) for p in prompts])
    keys = torch.stack([h[-1] for h in model.inputs(rows, [site])[site.path]])
    values = 3 * random(len(prompts), site.weight.shape[0], seed=seed)
    return KeyPatch("key", {}, path=site.path, keys=keys, values=values, radii=torch.full((len(prompts),), radius))


def prompt(model: EditableModel, **facts: str) -> PromptPatch:
    centre = 0.01 * random(32)
    keys = embed(list(facts), model, 1, centre)
    return PromptPatch("prompt", {}, texts=list(facts.values()), keys=keys, centre=centre, least=0.999, layer=1)


MADE: dict[str, Callable[[EditableModel], Patch]] = {
    "dense": dense,
    "low-rank": low_rank,
    "side": side,
    "key": lambda m: key(m, *PROMPTS[:3]),
    "prompt": lambda m: prompt(m, Q="Q is no letter."),
}
every = pytest.mark.parametrize("kind", MADE)
family = pytest.mark.parametrize("name", ["llama", "gpt2"])


def spoken(model: EditableModel) -> tuple[Tensor, list[str]]:
    """Everything a model says to :data:`TEXTS`, what its patches do to prompts included."""
    pairs = [(model.read_prompt(p), BYTES.encode(a)) for p, a in TEXTS]
    return model.logits(model.rows(pairs)), model.answer(PROMPTS, max_new_tokens=4)


# -- on and off ----------------------------------------------------------------------------------------------------


@every
@family
def test_taking_a_patch_away_leaves_nothing(kind: str, name: str) -> None:
    model = editable(name)
    before, (logits, texts) = state(model), spoken(model)
    patch = MADE[kind](model)
    assert same_state(state(model), before), "making it changes nothing"
    patch.apply(model)
    assert model.patches == [patch]
    assert not torch.equal(spoken(model)[0], logits), "it does something"
    patch.revert(model)
    assert same_state(state(model), before)
    assert (model.patches, model.side, hooks(model)) == ([], {}, 0)
    after = spoken(model)
    assert torch.equal(after[0], logits)
    assert after[1] == texts
    with pytest.raises(ValueError, match="not in list"):
        patch.revert(model)


@every
@family
def test_without_the_middle_one_it_is_as_if_it_had_never_been(kind: str, name: str) -> None:
    model, fresh = editable(name), editable(name)
    before = state(model)
    first, middle, last = dense(model, seed=7), MADE[kind](model), low_rank(model, layer=2)
    third = side(model, seed=4)  # the same shard as the middle one's, where that is a side memory
    for patch in (first, middle, last, third):
        patch.apply(model)
    middle.revert(model)
    for patch in (first, last, third):
        patch.apply(fresh)
    assert same_state(state(model), state(fresh))
    one, two = spoken(model), spoken(fresh)
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    for patch in (first, third, last):
        patch.revert(model)
    assert same_state(state(model), before)
    assert model.side == {}


@every
@family
@pytest.mark.parametrize("which", range(3))
def test_what_is_taken_away_and_laid_again_is_as_it_was(kind: str, name: str, which: int) -> None:
    """Bit for bit, weights and answers, where it is read from its file, too; and what is new lies on top."""
    model = editable(name)
    make = {"dense": dense, "low-rank": low_rank, "side": side}.get(kind)
    patches = [make(model, seed=n) for n in range(3)] if make else [MADE[kind](model) for _ in range(3)]
    for patch in patches:
        patch.apply(model)
    before, said = state(model), spoken(model)
    patches[which].revert(model)
    patches[which].apply(model)
    assert model.patches == patches
    assert same_state(state(model), before)
    after = spoken(model)
    assert torch.equal(after[0], said[0])
    assert after[1] == said[1]
    again = remade(patches[which].document(), patches[which].tensors())
    patches[which].revert(model)
    again.number = which + 1
    again.apply(model)
    assert model.patches.index(again) == which
    assert same_state(state(model), before)
    new = MADE[kind](model)
    new.apply(model)
    assert model.patches[-1] is new


@family
@pytest.mark.parametrize("make", [dense, low_rank])
def test_changes_of_a_weight_add_up(name: str, make: Callable[..., WeightPatch]) -> None:
    model = editable(name)
    site = model.down_projection(1)
    whole = site.weight.clone()
    for seed in range(3):
        patch = make(model, seed=seed)
        patch.apply(model)
        whole += patch.changes[site.path].value()
    assert torch.equal(site.weight, whole)
    assert torch.equal(model.model.get_submodule(site.path).weight, whole.T if name == "gpt2" else whole)


def test_a_weight_in_bf16_comes_back() -> None:
    model = editable()
    model.model.bfloat16()
    before = state(model)
    one, two = dense(model), low_rank(model)
    one.apply(model)
    two.apply(model)
    one.revert(model)
    assert model.down_projection(1).weight.dtype == torch.bfloat16
    assert not same_state(state(model), before)
    two.revert(model)
    assert same_state(state(model), before)


def test_what_was_computed_of_other_weights_is_forgotten() -> None:
    model = editable()
    model.memo["inputs"] = 1
    side(model).apply(model)
    assert model.memo == {"inputs": 1}, "the weights are what they were"
    patch = dense(model)
    patch.apply(model)
    assert model.memo == {}
    model.memo["inputs"] = 2
    patch.revert(model)
    assert model.memo == {}


# -- on disk -------------------------------------------------------------------------------------------------------


@every
@family
def test_a_patch_is_read_as_it_was_written(kind: str, name: str, tmp_path: Path) -> None:
    model = editable(name)
    patch = MADE[kind](model)
    digest = patch.save(tmp_path / "new" / "patch")
    read = load_patch(tmp_path / "new" / "patch", digest)
    assert type(read) is type(patch)
    assert (read.editor, read.notes, read.settings()) == (patch.editor, patch.notes, patch.settings())
    assert read.tensors().keys() == patch.tensors().keys()
    for part, value in patch.tensors().items():
        assert read.tensors()[part].dtype == value.dtype
        assert torch.equal(read.tensors()[part], value)
    assert read.nbytes == patch.nbytes > 0
    patch.apply(model)
    expected = spoken(model)
    patch.revert(model)
    read.apply(model)
    found = spoken(model)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert read.fires(model) == patch.fires(model) != ""


@every
def test_no_prompt_is_written_that_is_not_needed(kind: str, tmp_path: Path) -> None:
    model = editable()
    MADE[kind](model).save(tmp_path)
    written = (tmp_path / "patch.json").read_text("utf-8")
    assert ("Q is no letter." in written) == (kind == "prompt")
    assert not any(p in written for p in PROMPTS if len(p) > 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patch.json", "patch.safetensors"]


def refused(act: Callable[[], object], *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        act()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


def edited(folder: Path, **changes: Any) -> None:
    """Change some of a saved document; None takes a value out."""
    place = folder / "patch.json"
    document = {**json.loads(place.read_text("utf-8")), **changes}
    place.write_text(json.dumps({k: v for k, v in document.items() if v is not None}), "utf-8")


@every
def test_damaged_files_are_told_on_one_line(kind: str, tmp_path: Path) -> None:
    model = editable()
    patch = MADE[kind](model)
    document, tensors = tmp_path / "patch.json", tmp_path / "patch.safetensors"

    def told(*parts: str) -> None:
        refused(lambda: load_patch(tmp_path), *parts)
        digest[0] = patch.save(tmp_path)

    refused(lambda: load_patch(tmp_path / "none"), str(tmp_path / "none" / "patch.json"), "No such file")
    digest = [patch.save(tmp_path)]
    refused(
        lambda: load_patch(tmp_path, "0" * 64), str(document), f"its SHA-256 is {digest[0][:12]}…", "says 000000000000…"
    )
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    told(str(tensors), "the file was changed; restore it")
    tensors.write_bytes(data[: len(data) // 2])
    told(str(tensors), "the file was changed; restore it")
    tensors.unlink()
    told(str(tensors), "No such file")
    document.write_text(document.read_text("utf-8")[:-20], "utf-8")
    told(str(document), "is no JSON")
    document.write_bytes(b"\xff\xfe{}")
    told(str(document), "is no JSON")
    document.write_text("[]")
    told(str(document), "format None, this version reads 1")
    edited(tmp_path, format=2)
    told(str(document), "format 2, this version reads 1; update cl-lab")
    edited(tmp_path, kind="weigths")
    told(str(document), "unknown kind 'weigths'; did you mean 'weights'?")
    edited(tmp_path, kind=["weights"])
    told(str(document), "unknown kind")
    assert load_patch(tmp_path, digest[0]).notes == patch.notes, "what told() restores is whole"


@pytest.mark.parametrize("step", ["tensors", "document"])
def test_a_disk_that_is_full_when_a_patch_is_saved_over_another_costs_neither(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = editable()
    old, new = dense(model, seed=1), dense(model, seed=2)
    digest = old.save(tmp_path)
    own, part = module.write_atomically, "json" if step == "document" else "safetensors"

    def full(path: Path, content: bytes) -> None:
        if part in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            new.save(tmp_path)
    assert same_state(load_patch(tmp_path, digest).tensors(), old.tensors())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patch.json", "patch.safetensors"]
    digest = new.save(tmp_path)
    assert same_state(load_patch(tmp_path, digest).tensors(), new.tensors())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patch.json", "patch.safetensors"]


class Killed(Exception):
    """The process ends here: nothing that would put things in order runs."""


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("at", range(4))
def test_a_save_may_be_killed_at_any_step(
    at: int, fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its ``at``-th rename (there are three) or behind it all, and then again with another patch."""
    model = editable()
    old, new, last = (dense(model, seed=n) for n in range(3))
    if not fresh:
        old.save(tmp_path)
    replace, settle, left = Path.replace, module._settle, [at, 0]

    def killed(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return replace(self, target)

    def first_only(folder: Path) -> None:
        left[1] += 1
        if left[1] == 1:
            settle(folder)

    for patch in (new, last):
        before = None
        with contextlib.suppress(DataError):
            before = load_patch(tmp_path).tensors()
        left[:] = [at, 0]
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(Path, "replace", killed)
            patched.setattr(module, "_settle", first_only)
            patch.save(tmp_path)
        try:
            found = load_patch(tmp_path).tensors()
        except DataError:
            assert before is None, "what was there can be read no more"
            continue
        assert any(known and same_state(found, known) for known in (before, patch.tensors()))
    digest = last.save(tmp_path)
    assert same_state(load_patch(tmp_path, digest).tensors(), last.tensors())
    assert not (tmp_path / "patch.safetensors.new").exists()


@every
@pytest.mark.parametrize("part", ["settings", "notes", "editor", "sha256"])
def test_a_document_that_lacks_a_part_is_told(kind: str, part: str, tmp_path: Path) -> None:
    MADE[kind](editable()).save(tmp_path)
    edited(tmp_path, **{part: None})
    refused(lambda: load_patch(tmp_path), str(tmp_path), part)


def test_a_document_of_other_values_is_told(tmp_path: Path) -> None:
    dense(editable()).save(tmp_path)
    edited(tmp_path, settings={"paths": ["model.layers.0.mlp.down_proj"]})
    refused(lambda: load_patch(tmp_path), str(tmp_path), "lacks a part", "model.layers.0.mlp.down_proj")
    edited(tmp_path, settings={"paths": 5})
    refused(lambda: load_patch(tmp_path), str(tmp_path), "lacks a part")
    edited(tmp_path, sha256=5)
    refused(lambda: load_patch(tmp_path), str(tmp_path))


@every
@pytest.mark.parametrize("other", ["wider", "shallower", "gpt2"])
def test_a_patch_of_another_model_is_told(kind: str, other: str) -> None:
    made = MADE[kind](editable())
    model = {
        "wider": lambda: editable(width=48),
        "shallower": lambda: editable(layers=1),
        "gpt2": lambda: editable("gpt2", width=48),
    }[other]()
    before = state(model)
    refused(lambda: made.apply(model), "is it another model's?")
    assert (model.patches, model.side, hooks(model)) == ([], {}, 0)
    assert same_state(state(model), before)


# -- side memories -------------------------------------------------------------------------------------------------


def gaps_of(model: EditableModel, patch: SidePatch, rows: Rows, *, answers: bool = False) -> list[float]:
    """The activation gap of each row's prompt (or whole text), in plain sums."""
    weight = model.site(patch.path).weight
    change = torch.zeros(weight.numel())
    change[unpacked(patch.places, weight.numel())] = patch.values.float()
    found = []
    for h, a, b, end in zip(
        model.inputs(rows, [model.site(patch.path)])[patch.path],
        rows.begin.tolist(),
        rows.until.tolist(),
        rows.length.tolist(),
        strict=True,
    ):
        lengths = [float((change.view(weight.shape) @ x).norm()) for x in h[a : end if answers else b]]
        found.append(sum(lengths) / len(lengths))
    return found


def changed(name: str, patch: SidePatch) -> EditableModel:
    """A model whose weight is ``W + change`` for everybody."""
    model = editable(name)
    weight = model.site(patch.path).weight
    more = torch.zeros(weight.numel())
    more[unpacked(patch.places, weight.numel())] = patch.values.float()
    weight += more.view(weight.shape)
    return model


@family
def test_a_side_memory_answers_for_rows_that_reach_it(name: str) -> None:
    model = editable(name)
    rows = rows_of(model)
    patch = side(model)
    gaps = gaps_of(model, patch, rows)
    least = sum(sorted(gaps)[2:4]) / 2
    mine = [g >= least for g in gaps]
    assert sum(mine) == 3
    plain, all_of_it = by_row(model, rows), by_row(changed(name, patch), rows)
    patch = replace(patch, gap=least, floor=least)
    patch.apply(model)
    found = by_row(model, rows)
    hook = model.side[f"side-memory:{patch.path}"]
    assert isinstance(hook, SideMemory)
    assert hook.route is not None
    assert [r >= 0 for r in hook.route.tolist()] == mine
    for ours, now, was, all_changed in zip(mine, found, plain, all_of_it, strict=True):
        if ours:
            assert torch.allclose(now, all_changed, atol=1e-4)
            assert not torch.allclose(now, was, atol=1e-2)
        else:
            assert torch.equal(now, was), "not a bit of an unrelated answer moves"
    for i, now in enumerate(found):
        assert torch.allclose(by_row(model, rows_of(model, TEXTS[i : i + 1]))[0], now, atol=1e-4), "as if alone"
    with model.unrouted():
        assert torch.equal(torch.cat(by_row(model, rows)), torch.cat(plain))


@family
def test_a_side_memory_begins_at_the_prompts_last_token(name: str) -> None:
    model = editable(name)
    rows = rows_of(model)
    patch = side(model, whole=False)
    site = model.site(patch.path)
    more = torch.zeros(site.weight.numel()).masked_scatter(
        unpacked(patch.places, site.weight.numel()), patch.values.float()
    )
    at = model.above(rows, site)
    begun = torch.arange(rows.ids.shape[1])[None] >= rows.until[:, None] - 1
    expected = at.logits(begun[..., None] * (at.inputs @ more.view(site.weight.shape).T))
    everywhere = at.logits(at.inputs @ more.view(site.weight.shape).T)
    patch.apply(model)
    found = model.logits(rows)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, everywhere, atol=1e-2)
    assert model.answer(PROMPTS, max_new_tokens=5) == [loop(model, p, 5) for p in PROMPTS]


def test_an_answer_that_is_given_does_not_choose_the_route() -> None:
    model = editable()
    patch = side(model)
    rows = rows_of(model)
    own, with_answer = gaps_of(model, patch, rows), gaps_of(model, patch, rows, answers=True)
    for i, (a, b) in enumerate(zip(own, with_answer, strict=True)):
        least = (a + b) / 2  # the answer, if it were asked, would decide the other way
        assert abs(a - b) > 1e-3
        tuned = replace(patch, gap=least, floor=least)
        tuned.apply(model)
        model.logits(rows)
        (hook,) = model.side.values()
        assert (int(hook.route[i]) >= 0) == (a >= least)
        tuned.revert(model)


def loop(model: EditableModel, text: str, budget: int) -> str:
    """What full passes say, each of which asks the prompt's tokens only."""
    ids = model.read_prompt(text)
    said = toys.written(lambda said: int(model.logits(model.rows([(ids, [*said, 0])]))[-1].argmax()), BYTES.end, budget)
    return BYTES.decode(said).partition("\n")[0].strip()


@family
@pytest.mark.parametrize("kind", ["side", "key"])
def test_a_route_is_chosen_once_for_an_answer(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = editable(name)
    plain = model.answer(PROMPTS, max_new_tokens=8)
    patch: Patch
    if kind == "side":
        gaps = gaps_of(model, side(model), rows_of(model))
        patch = side(model, sum(sorted(gaps)[2:4]) / 2)
    else:
        patch = key(model, *PROMPTS[::2])
    patch.apply(model)
    (hook,) = model.side.values()
    calls = {"choose": 0, "change": 0}

    def counted(what: str) -> Callable[..., Any]:
        own = getattr(hook, what)

        def call(*args: Any) -> Any:
            calls[what] += 1
            return own(*args)

        return call

    for what in calls:
        monkeypatch.setattr(hook, what, counted(what))
    found = model.answer(PROMPTS, max_new_tokens=8)
    assert calls["choose"] == 1
    assert calls["change"] > 8 - 1, "the route holds in every step"
    mine = (hook.route if hook.route is not None else torch.empty(0)).tolist()
    assert mine == [], "and is let go of behind the answer"
    assert found == [loop(model, p, 8) for p in PROMPTS]
    assert [a == b for a, b in zip(found, plain, strict=True)].count(False) in (2, 3)
    assert model.answer(PROMPTS, max_new_tokens=8, batch_size=2) == found


def test_transformers_own_generation_takes_the_first_pass_for_the_prompt() -> None:
    model = editable()
    key(model, PROMPTS[0]).apply(model)
    for text in PROMPTS[:2]:
        ids = torch.tensor([BYTES.encode(text)])
        out = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        said = BYTES.decode(out[0, ids.shape[1] :].tolist()).partition("\n")[0].strip()
        assert said == model.answer([text], max_new_tokens=6)[0]


def test_of_two_shards_that_with_the_larger_ratio_answers() -> None:
    model = editable()
    rows = rows_of(model)
    gaps = [gaps_of(model, side(model, shard=n, seed=n), rows) for n in (0, 1)]
    least = [sorted(own)[2] * 0.999 for own in gaps]
    ratios = [[g / t for g in own] for own, t in zip(gaps, least, strict=True)]
    expected = [-1 if max(a, b) < 1 else int(b > a) for a, b in zip(*ratios, strict=True)]
    assert {*expected} == {-1, 0, 1}
    patches = [side(model, t, shard=n, seed=n) for n, t in enumerate(least)]
    for patch in patches:
        patch.apply(model)
    found = by_row(model, rows)
    (hook,) = model.side.values()
    assert hook.route.tolist() == expected
    answers = {-1: by_row(editable(), rows)} | {n: by_row(changed("llama", p), rows) for n, p in enumerate(patches)}
    for i, which in enumerate(expected):
        assert torch.allclose(found[i], answers[which][i], atol=1e-4)


def test_of_equal_scores_the_last_is_taken_by_hand() -> None:
    """Columns: a tie, one but for rounding, two that differ, negative ones, none."""
    scores = torch.tensor(
        [
            [1.0, 1 + 1e-6, 1.001, -2.0 + 1e-6, -torch.inf],
            [1.0, 1.0, 1.0, -2.0, -torch.inf],
            [0.5, 0.0, 1.0, -2.1, -torch.inf],
        ]
    )
    assert last_of_greatest(scores)[:4].tolist() == [1, 1, 0, 1]
    assert 0 <= int(last_of_greatest(scores)[4]) < 3, "where nobody answers, whose place it is does not matter"


def test_of_equal_memories_the_newest_answers() -> None:
    """As edits of one prompt have them: equal keys, or without keys equal gaps; undone, the older is back."""
    model = editable()
    one, two = side(model, 1e-6, shard=0), side(model, 1e-6, shard=1)
    two = replace(two, places=one.places, values=one.values)
    one.apply(model)
    two.apply(model)
    assert model.fired(PROMPTS[0]) == [two]
    for patch in (one, two):
        width = model.site(patch.path).weight.shape[1]
        patch.keys, patch.centre = torch.nn.functional.normalize(random(1, width, seed=3), dim=1), torch.zeros(width)
    assert model.fired(PROMPTS[0]) == [two]
    two.revert(model)
    assert model.fired(PROMPTS[0]) == [one]
    two.apply(model)
    one.revert(model)
    one.apply(model)
    assert model.fired(PROMPTS[0]) == [two]


def test_of_many_shards_the_same_answers_as_if_all_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = editable()
    rows = rows_of(model)
    patches = []
    for n in range(60):
        patch = side(model, shard=n, seed=n)
        gaps = gaps_of(model, patch, rows)
        patches.append(replace(patch, gap=1.02 * gaps[n % 6], floor=1.02 * gaps[n % 6]))
    for patch in patches:
        patch.apply(model)
    model.logits(rows)
    (hook,) = model.side.values()
    found = hook.route.clone()
    monkeypatch.setattr(module, "CANDIDATES", 60)
    model.logits(rows)
    assert torch.equal(found, hook.route)
    assert len({*found.tolist()}) > 2


def test_only_the_shard_that_an_edit_goes_to_is_added_up_again() -> None:
    model = editable()
    patches = [side(model, shard=n // 2, seed=n) for n in range(6)]
    for patch in patches:
        patch.apply(model)
    (hook,) = model.side.values()
    before = dict(hook.changes)
    patches[2].revert(model)
    assert hook.changes[0] is before[0]
    assert hook.changes[2] is before[2]
    assert torch.equal(hook.changes[1], shard_change([patches[3]], model.site(patches[3].path)))


def test_patches_of_a_shard_add_up() -> None:
    model = editable()
    one, two = replace(side(model, seed=1), gap=9.0, floor=1.0), replace(side(model, seed=2), gap=16.0, floor=4.0)
    one.apply(model)
    two.apply(model)
    (hook,) = model.side.values()
    assert hook.thresholds == {0: pytest.approx(threshold([one, two]))}
    mask = unpacked(one.places, hook.changes[0].numel())
    assert torch.equal(hook.changes[0].flatten()[mask], one.values.float() + two.values.float())
    assert not hook.changes[0].flatten()[~mask].any()
    one.revert(model)
    assert hook.thresholds == {0: pytest.approx(threshold([two]))}
    one.apply(model)
    assert hook.thresholds == {0: pytest.approx(threshold([one, two]))}, "that of the one made last, not laid last"


def test_merged_shards_are_one_memory() -> None:
    model = editable()
    patches = [replace(side(model, 2.0 + n, shard=n, seed=n), merge=True) for n in (0, 1)]
    for patch in patches:
        patch.apply(model)
    (hook,) = model.side.values()
    assert hook.thresholds == {0: pytest.approx(2.0)}
    size = model.site(patches[0].path).weight.numel()
    apart = [torch.zeros(size).masked_scatter(unpacked(p.places, size), p.values.float()) for p in patches]
    assert torch.equal(hook.changes[0].flatten(), ties(apart))


def test_thresholds_by_hand() -> None:
    def of(*ends: tuple[float, float]) -> float:
        return threshold([SidePatch(gap=gap, floor=floor) for gap, floor in ends])

    assert of((10.0, 1.0)) == pytest.approx(7.0)
    assert of((10.0, 1.0), (5.0, 2.0)) == pytest.approx(3.5), "the newest measured all of the shard's edits"
    assert of((5.0, 4.5)) == pytest.approx(4.5), "where they overlap, what is unrelated stays out"
    assert of((0.0, 0.0)) > 0


def test_activation_gap_by_hand() -> None:
    change = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    inputs = torch.tensor([[[1.0, 7.0], [3.0, 7.0], [100.0, 0.0]]])
    assert activation_gap(change, inputs, torch.tensor([[True, True, False]])).tolist() == [pytest.approx(10.0)]
    assert activation_gap(change, inputs, torch.tensor([[False] * 3])).tolist() == [0.0]


# -- merging and packing -------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Three of five entries stay, and two of three; at the corner −6 outweighs 4, beside it both agree."""
    one = torch.tensor([[4.0, -3.0, 0.0], [1.0, 0.5, -2.0]])
    two = torch.tensor([[-6.0, -5.0, 2.0], [0.0, 0.0, 0.0]])
    assert ties([one, two], density=0.6).tolist() == [[-6.0, -4.0, 0.0], [0.0, 0.0, -2.0]]
    assert ties([one], density=1).tolist() == one.tolist()
    assert ties([one, -one], density=1).tolist() == [[0.0] * 3] * 2, "no sign wins"
    assert ties([one, torch.zeros(2, 3)], density=0.2).tolist() == [[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 1001])
def test_masks_are_packed_into_bits(size: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.4
    bits = packed(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-size // 8)
    assert torch.equal(unpacked(bits, size), mask)
    for wrong in (8 * len(bits) + 1, 8 * len(bits) - 8):
        refused(lambda wrong=wrong: unpacked(bits, wrong), "is it another model's?")


def test_bits_by_hand() -> None:
    mask = torch.tensor([[True, False, False, False, False], [False, False, True, True, True]])
    assert packed(mask).tolist() == [1 + 128, 1 + 2]


# -- a codebook ----------------------------------------------------------------------------------------------------


@family
def test_the_nearest_key_answers_from_the_prompts_last_token_on(name: str) -> None:
    model = editable(name)
    rows, site = rows_of(model), model.down_projection(1)
    plain = by_row(model, rows)
    patch = key(model, PROMPTS[0], PROMPTS[4], PROMPTS[0])
    patch.keys[2] += 0.01 * random(len(patch.keys[2]), seed=9)  # near the first, with a radius that reaches all of them
    patch.radii[2] = 0.5
    patch.apply(model)
    found = by_row(model, rows)
    (hook,) = model.side.values()
    assert isinstance(hook, Codebook)
    assert hook.route is not None
    route = hook.route.tolist()
    assert (route[0], route[4]) == (0, 1)
    assert route[2] == -1
    patch.revert(model)
    for i, which in enumerate(route):
        if which == -1:
            assert torch.equal(found[i], plain[i])
            continue
        alone = rows_of(model, TEXTS[i : i + 1])
        added = torch.zeros(1, alone.ids.shape[1], len(patch.values[which]))
        added[:, len(PROMPTS[i]) - 1 :] = patch.values[which]
        handle = site.module.register_forward_hook(lambda _, args, out, more=added: out + more)
        expected = by_row(model, alone)[0]
        handle.remove()
        assert torch.allclose(found[i], expected, atol=1e-4)
        assert not torch.allclose(found[i], plain[i], atol=1e-2)


def test_a_radius_is_where_a_key_ends() -> None:
    model = editable()
    rows = rows_of(model, TEXTS[:1])
    patch = key(model, PROMPTS[0])
    step = random(len(patch.keys[0]))
    patch.keys[0] += 2 * step / step.norm()
    for radius, expected in ((1.99, -1), (2.01, 0)):
        patch.radii[0] = radius
        patch.apply(model)
        model.logits(rows)
        (hook,) = model.side.values()
        assert hook.route.tolist() == [expected]
        patch.revert(model)


def test_a_key_is_met_exactly_however_many_there_are() -> None:
    """Distances from products lose their digits: a key that is met would be some way off."""
    model = editable()
    site = model.down_projection(1)
    book = Codebook(model, site)
    keys = 100 + random(60, site.weight.shape[1])
    book.set([KeyPatch(path=site.path, keys=keys, values=torch.zeros(60, 32), radii=torch.full((60,), 1e-3))])
    inputs = torch.stack([torch.zeros_like(keys), keys], dim=1)
    asked = torch.tensor([[True, True]]).expand(60, 2)
    assert book.choose(inputs, asked).tolist() == list(range(60))
    assert book.choose(inputs, torch.tensor([[True, False]]).expand(60, 2)).tolist() == [-1] * 60
    book.remove()


def test_a_newer_answer_takes_its_key_from_an_older_one() -> None:
    model = editable()
    site = model.down_projection(1)
    book = Codebook(model, site)
    keys = 100 + random(60, site.weight.shape[1])
    keys[50] = keys[10]
    keys[40], labels = keys[20] + 0.001, torch.arange(60)
    labels[40] = labels[20]
    book.set([KeyPatch(path=site.path, keys=keys, values=torch.zeros(60, 32), radii=torch.ones(60), labels=labels)])
    inputs, asked = keys[[10, 50, 20, 40]][:, None], torch.tensor([[True]]).expand(4, 1)
    assert book.choose(inputs, asked).tolist() == [50, 50, 20, 40], "keys of one answer bear each other"
    book.remove()


def test_codebooks_go_on_from_each_other() -> None:
    model = editable()
    one, two = key(model, PROMPTS[0]), key(model, PROMPTS[1], seed=2)
    one.apply(model)
    two.apply(model)
    rows = rows_of(model)
    both = by_row(model, rows)
    (hook,) = model.side.values()
    assert hook.route.tolist()[:3] == [0, 1, -1]
    one.revert(model)
    assert torch.equal(by_row(model, rows)[1], both[1])
    assert torch.equal(by_row(model, rows)[0], by_row(editable(), rows)[0])


# -- facts before the prompt ---------------------------------------------------------------------------------------


def test_the_nearest_fact_is_put_before_a_prompt() -> None:
    model = editable()
    one = prompt(model, **{PROMPTS[0]: "It is Rome.", PROMPTS[2]: "It was Eve."})
    two = prompt(model, **{PROMPTS[3]: "Three."})
    one.apply(model)
    two.apply(model)
    read = [BYTES.decode(model.read_prompt(p)) for p in PROMPTS]
    facts = ["It is Rome.\n", "", "It was Eve.\n", "Three.\n", "", ""]
    assert read == [fact + p for fact, p in zip(facts, PROMPTS, strict=True)]
    one.revert(model)
    assert BYTES.decode(model.read_prompt(PROMPTS[0])) == PROMPTS[0]
    assert model.answer([PROMPTS[3]], max_new_tokens=5) == editable().answer(
        [f"Three.\n{PROMPTS[3]}"], max_new_tokens=5
    )
    assert hooks(model) == 0


def test_a_prompt_is_compared_at_the_layer_and_centre_of_each_fact() -> None:
    """Two memories that look at other layers, from other centres: each finds its own, whichever is the first."""
    model = editable()
    made = []
    for layer, (text, fact) in ((0, (PROMPTS[0], "It is Rome.")), (2, (PROMPTS[2], "It was Eve."))):
        centre = 0.01 * random(32, seed=layer)
        keys = embed([text], model, layer, centre)
        made.append(PromptPatch("prompt", {}, texts=[fact], keys=keys, centre=centre, least=0.999, layer=layer))
    for order in (made, made[::-1]):
        for patch in order:
            patch.apply(model)
        assert [model.fired(text) for text in PROMPTS[:4]] == [[made[0]], [], [made[1]], []]
        for patch in order:
            patch.revert(model)


def test_a_fact_has_its_own_cosine_and_one_saved_before_shares_it(tmp_path: Path) -> None:
    model = editable()
    patch = prompt(model, **{PROMPTS[0]: "It is Rome.", PROMPTS[2]: "It was Eve."})
    patch.least = torch.tensor([2.0, 0.999])
    patch.save(tmp_path)
    read = load_patch(tmp_path)
    assert isinstance(read, PromptPatch)
    assert read.thresholds.tolist() == pytest.approx([2.0, 0.999])
    assert read.fires(model) == "cosine of 1.00 to 2.00 with its prompt"
    read.apply(model)
    assert [model.fired(text) for text in PROMPTS[:4]] == [[], [], [read], []]
    document = {**patch.document(), "settings": {**patch.settings(), "least": 0.999}}
    old = remade(document, {name: t for name, t in patch.tensors().items() if name != "least"})
    assert isinstance(old, PromptPatch)
    assert old.thresholds.tolist() == pytest.approx([0.999, 0.999])
    assert old.fires(model) == "cosine of 1.00 with its prompt"


def test_embeddings_are_means_over_the_tokens_behind_the_first() -> None:
    model = editable()
    with torch.no_grad():
        hidden = model.model(torch.tensor([BYTES.encode("Two")]), output_hidden_states=True).hidden_states[1][0]
    expected = torch.nn.functional.normalize(hidden[1:], dim=1).mean(0)
    assert torch.allclose(embed(["Q", "Two"], model, 1, None)[1], expected / expected.norm(), atol=1e-5)
    centre = random(32)
    found = embed(["Two"], model, 1, centre)[0]
    assert torch.allclose(found, (expected - centre) / (expected - centre).norm(), atol=1e-5)


# -- twins and who answers -------------------------------------------------------------------------------------------


@every
def test_twins_do_not_reach_each_other(kind: str) -> None:
    model = editable()
    MADE[kind](model).apply(model)
    before, first = state(model), model.answer(PROMPTS, max_new_tokens=6)
    twin = model.twin()
    assert {p.data_ptr() for p in twin.model.parameters()} == {p.data_ptr() for p in model.model.parameters()}
    assert twin.answer(PROMPTS, max_new_tokens=6) == first
    more = [dense(twin, 0, seed=4), dense(twin, 1, seed=5), side(twin, shard=3, seed=6), key(twin, PROMPTS[4], seed=7)]
    for patch in more:
        patch.apply(twin)
    changed = twin.answer(PROMPTS, max_new_tokens=6)
    assert changed != first
    assert model.answer(PROMPTS, max_new_tokens=6) == first
    assert bits_equal(state(model), before)
    model.patches[0].revert(model)
    assert twin.answer(PROMPTS, max_new_tokens=6) == changed
    again = editable()
    for patch in [MADE[kind](again), *more]:
        patch.apply(again)
    assert bits_equal(state(twin), state(again)), "as one that was never a twin"
    twin.memo["of these weights"] = 1
    with twin.unpatched():
        assert bits_equal(state(twin), state(editable()))
        assert "of these weights" not in twin.memo
    assert twin.memo["of these weights"] == 1
    assert twin.answer(PROMPTS, max_new_tokens=6) == changed


def bits_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_is_told_which_patch_answers() -> None:
    model = editable()
    weights, books = dense(model, 0), key(model, PROMPTS[0], PROMPTS[1], layer=2)
    memories = [side(model, 1e6, shard=0, layer=1), side(model, 1e-6, shard=1, layer=1)]
    for patch in [weights, books, *memories]:
        patch.apply(model)
    books.revert(model)
    fresh = key(model, PROMPTS[0], PROMPTS[1], layer=2)
    fresh.apply(model)
    note = prompt(model, **{PROMPTS[2]: "Q is no letter."})
    note.apply(model)
    batch = Batch(model)
    batch.add([model.read(p) for p in PROMPTS[:4]])
    assert [batch.fired(i) for i in range(4)] == [
        [memories[1], fresh],
        [memories[1], fresh],
        [note, memories[1]],
        [memories[1]],
    ]
    batch.keep([3, 1])
    batch.add([model.read(PROMPTS[0])])
    assert [batch.fired(i) for i in range(3)] == [[memories[1]], [memories[1], fresh], [memories[1], fresh]]
    merged = side(model, 1e-6, shard=2, layer=1)
    merged.merge = True
    merged.apply(model)
    batch = Batch(model)
    batch.add([model.read(PROMPTS[3])])
    assert batch.fired(0) == [*memories, merged], "all of them are in what answers"
