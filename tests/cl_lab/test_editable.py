"""A model whose facts are edited: its parts by structure in six families, partial passes, batches and answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from cl_lab import hub
from cl_lab.compat import import_torchvision
from cl_lab.editable import Batch, EditableModel, Rows, Site, check_plain_residual
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError, DataError, TooLong
from cl_lab.patches import Delta, PromptPatch, ReleasedSidePatch, SidePatch, WeightPatch, packed

import_torchvision()  # in the way that does not fail where its operators are missing; Transformers reaches for it
transformers: Any = importlib.import_module("transformers")

BYTES = hub.load_tokenizer("bytes")
WIDTH, LAYERS = 32, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
OF_GPT: dict[str, Any] = {"vocab_size": 257, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 128}
GROUPED = {**SHAPE, "num_key_value_heads": 1}
CONFIGS: dict[str, Callable[..., Any]] = {
    "qwen2": lambda **own: transformers.Qwen2Config(**GROUPED, intermediate_size=72, **own),
    "mistral": lambda **own: transformers.MistralConfig(**GROUPED, intermediate_size=72, sliding_window=6, **own),
    "gpt2": lambda **own: transformers.GPT2Config(**OF_GPT, **own),
    "gptj": lambda **own: transformers.GPTJConfig(**OF_GPT, rotary_dim=8, n_inner=72, **own),
    "gpt-neox": lambda **own: transformers.GPTNeoXConfig(**SHAPE, intermediate_size=72, **own),
    "gpt-neox-serial": lambda **own: transformers.GPTNeoXConfig(
        **SHAPE, intermediate_size=72, use_parallel_residual=False, **own
    ),
}
INNER = {"llama": 128, "gpt2": 128}
FAMILIES = ["llama", *CONFIGS]
family = pytest.mark.parametrize("name", FAMILIES)

TEXTS = [("The capital of Peru", " Lima"), ("Q", " no"), ("Who wrote it, and when was that?", " B")]


def editable(name: str = "llama", attention: str | None = None) -> EditableModel:
    torch.manual_seed(3)
    if name == "llama":
        model = hub.tiny_causal_lm(vocabulary=257, layers=LAYERS, width=WIDTH, heads=2)
    else:
        config = CONFIGS[name](initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases begin at 0, which would hide them
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    if attention is not None:
        model.set_attn_implementation(attention)
    return EditableModel(model, BYTES, name)


def rows_of(model: EditableModel, texts: list[tuple[str, str]] = TEXTS) -> Rows:
    return model.rows([(BYTES.encode(p), BYTES.encode(a)) for p, a in texts])


def hooks(model: EditableModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def with_change(model: EditableModel, site: Site, rows: Rows, change: Tensor) -> Tensor:
    """Logits of the whole model, as Transformers runs it, with ``change`` added to what the module puts out."""
    handle = site.module.register_forward_hook(lambda _, args, out: out + change)
    try:
        with torch.no_grad():
            out = model.model(input_ids=rows.ids, use_cache=False).logits
    finally:
        handle.remove()
    found: Tensor = out[rows.said]
    return found


# -- rows ----------------------------------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    rows = editable().rows([([7, 8, 9], [1, 2]), ([5], [6])])
    assert rows.ids.tolist() == [[7, 8, 9, 1, 2], [5, 6, 0, 0, 0]]
    assert (rows.prompt.tolist(), rows.length.tolist()) == ([3, 1], [5, 2])
    assert rows.labels.tolist() == [1, 2, 6]
    assert rows.said.tolist() == [[False, False, True, True, False], [True, False, False, False, False]]
    asked = [[False, True, True, False, False], [True, False, False, False, False]]
    assert rows.asked.tolist() == asked, "a text's first token tells nothing, unless it is all there is"
    second = rows.take(slice(1, 2))
    assert second.ids.tolist() == [[5, 6]]
    assert second.labels.tolist() == [6]


class Chatty:
    """Bytes with a chat template around them."""

    end, size, key, can_chat = 256, 257, "chatty", True
    encode, decode, encode_all = BYTES.encode, BYTES.decode, BYTES.encode_all

    def chat(self, said: object) -> str:
        return f"<user>{said}</user><bot>"


def test_of_a_chat_only_what_was_said_counts() -> None:
    model = EditableModel(editable().model, Chatty())
    rows = model.rows([(model.encode_prompt("Why?", chat=True), [1]), (model.encode_prompt("Why?"), [1])])
    own = [BYTES.decode(ids[asked].tolist()) for ids, asked in zip(rows.ids, rows.asked, strict=True)]
    assert own == ["Why?", "hy?"]
    assert BYTES.decode(model.encode_answer(" B ", chat=True)[:-1]) == "B"
    assert model.encode_answer("B") == [*b" B", 256]
    assert model.encode_answer("B", end=False) == [*b" B"]


class Marked(Chatty):
    """Bytes that begin every text with a mark, as SentencePiece's tokenizers do."""

    key = "marked"

    def encode(self, text: str) -> list[int]:
        return [ord("_"), *BYTES.encode(text)]

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@pytest.mark.parametrize(("chat", "expected"), [(False, b" Lyon"), (True, b"Lyon")])
def test_an_answer_is_tokenised_as_it_stands_behind_its_prompt(chat: bool, expected: bytes) -> None:
    model = EditableModel(editable().model, Marked())
    assert model.encode_answer("Lyon", chat=chat) == [*expected, 256]
    assert model.encode_prompt("It is") + model.encode_answer("Lyon", end=False) == model.encode_prompt("It is Lyon")


# -- parts ---------------------------------------------------------------------------------------------------------


@family
def test_parts_are_found(name: str) -> None:
    model = editable(name)
    assert len(model.layers) == LAYERS
    for layer in range(LAYERS):
        site = model.down_projection(layer)
        assert tuple(site.weight.shape) == (WIDTH, INNER.get(name, 72))
        assert model.layer_of(site.path) == layer
        assert model.model.get_submodule(site.path) is site.module
        check_plain_residual(model, site)
    assert hooks(model) == 0


@family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_half_precision_rounds_is_no_change_of_the_output(name: str, dtype: torch.dtype) -> None:
    model = editable(name)
    model.model.to(dtype)
    for layer in range(LAYERS):
        check_plain_residual(model, model.down_projection(layer))


@family
def test_a_weight_is_out_by_in(name: str) -> None:
    model = editable(name)
    site = model.down_projection(1)
    x = torch.randn(2, site.weight.shape[1])
    bias = site.module.bias
    expected = x @ site.weight.T + (0 if bias is None else bias)
    assert torch.allclose(site.module(x), expected, atol=1e-5)
    site.weight[0, 0] = 5.0
    assert model.down_projection(1).weight[0, 0] == 5, "it is a view"


@family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_the_part_above_is_that_of_the_whole(name: str, attention: str, layer: int) -> None:
    model = editable(name, attention)
    site, rows = model.down_projection(layer), rows_of(model)
    at = model.above(rows, site)
    assert tuple(at.inputs.shape) == (*rows.ids.shape, site.weight.shape[1])
    plain = model.logits(rows)
    assert torch.allclose(at.logits(), plain, atol=1e-4)
    for seed in range(2):  # again and again, in any order
        change = torch.randn(*rows.ids.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
        found = at.logits(change)
        assert torch.allclose(found, with_change(model, site, rows, change), atol=1e-4)
        assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.allclose(at.logits(torch.zeros_like(change)), plain, atol=1e-4)
    assert hooks(model) == 0


@family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_from_the_prompts_end_on_it_is_that_of_the_whole(name: str, attention: str, layer: int) -> None:
    model = editable(name, attention)
    site, rows = model.down_projection(layer), rows_of(model)
    whole, at = model.above(rows, site), model.above(rows, site, from_prompt_end=True)
    assert torch.equal(at.rows.labels, rows.labels)
    assert torch.allclose(at.logits(), whole.logits(), atol=1e-4)
    length = int((rows.length - rows.until).max())
    assert at.inputs.shape[1] == length, "nothing before it runs again, and nothing follows a text's last token"
    for seed in range(2):
        change = torch.randn(len(rows), length, WIDTH, generator=torch.Generator().manual_seed(seed))
        placed = torch.zeros(*rows.ids.shape, WIDTH)
        for row, own, first in zip(placed, change, (rows.until - 1).tolist(), strict=True):
            row[first : first + length] = own[: len(row) - first]
        assert torch.allclose(at.logits(change), whole.logits(placed), atol=1e-4)
        assert not torch.allclose(at.logits(change), whole.logits(), atol=1e-2)
    for own, row, first, n in zip(
        at.inputs, whole.inputs, (rows.until - 1).tolist(), (rows.length - rows.until).tolist(), strict=True
    ):
        assert torch.allclose(own[:n], row[first : first + n], atol=1e-4)
    assert hooks(model) == 0


@family
@pytest.mark.parametrize("from_prompt_end", [False, True])
def test_the_part_above_has_heard_the_prompts_in_the_same_passes(name: str, from_prompt_end: bool) -> None:
    model = EditableModel(editable(name).model, Chatty(), name)
    site = model.down_projection(2)
    prompts = [
        (text, chat) for text in ("The capital of Peru", "Q", "Who wrote it, and when?") for chat in (False, True)
    ]
    rows = model.rows([(model.encode_prompt(text, chat=chat), [7, 8, 9]) for text, chat in prompts])
    at = model.above(rows, site, from_prompt_end=from_prompt_end, heard=True)
    for found, expected in zip(at.heard, model.heard(prompts, site), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-4)
    assert model.above(rows, site, from_prompt_end=from_prompt_end).heard == [], "kept for those who ask for it"
    short = model.rows([([5], [6]), ([4], [3, 2])])  # no prompt has a token before its last
    (one, two) = model.above(short, site, from_prompt_end=from_prompt_end, heard=True).heard
    assert len(one) == len(two) == 1


@family
def test_what_texts_begin_with_is_read_once(name: str) -> None:
    model = EditableModel(editable(name).model, Chatty(), name)
    site = model.down_projection(2)
    openings = [[5, 6, 7, 8], [9, 4, 5, 6, 7], model.encode_prompt("A", chat=True)]
    prompts = [
        [5, 6, 7, 8, 3, 2, 1],
        [9, 4, 5, 6, 7, 2],
        [5, 6, 4, 4],
        [7],
        model.encode_prompt("Pe", chat=True),
        [5, 6, 7, 8],
    ]
    rows = model.rows([(prompt, [7, 8, 9][: 1 + i % 3]) for i, prompt in enumerate(prompts)])
    plain = model.above(rows, site, from_prompt_end=True, heard=True)
    read = []

    def listen(_: object, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> None:
        read.append(tuple(kwargs["input_ids"].shape))

    handle = model.decoder.register_forward_pre_hook(listen, with_kwargs=True)
    for turn in range(2):
        read.clear()
        at = model.above(rows, site, from_prompt_end=True, heard=True, openings=openings)
        assert torch.allclose(at.logits(), plain.logits(), atol=1e-4)
        assert torch.allclose(at.inputs[:, 0], plain.inputs[:, 0], atol=1e-4)
        for found, expected in zip(at.heard, plain.heard, strict=True):
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-4)
        assert read[:-2] == ([] if turn else [(1, len(ids)) for ids in openings])
        assert read[-2] == (len(rows), 2), "what is not in common with an opening, which is two tokens at most"
    handle.remove()
    change = torch.randn(len(rows), plain.inputs.shape[1], WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(at.logits(change), plain.logits(change), atol=1e-4)
    assert torch.allclose(
        model.above(rows, site, from_prompt_end=True, openings=[[1, 1]]).logits(), plain.logits(), atol=1e-4
    ), "none has it"
    with torch.no_grad():
        site.module.weight.mul_(2)
    model.memo.clear()  # as every patch does that changes weights
    changed = model.above(rows, site, from_prompt_end=True, openings=openings)
    assert torch.allclose(changed.logits(), model.above(rows, site).logits(), atol=1e-4)
    assert not torch.allclose(changed.logits(), plain.logits(), atol=1e-2)
    assert hooks(model) == 0


def test_a_change_of_the_output_is_learnt_through_the_part_above() -> None:
    model = editable()
    site, rows = model.down_projection(1), rows_of(model)
    change = torch.zeros(*rows.ids.shape, WIDTH, requires_grad=True)
    (model.above(rows, site).logits(change).logsumexp(1).sum()).backward()
    assert change.grad is not None
    reach = torch.arange(rows.ids.shape[1])[None] < rows.length[:, None] - 1
    assert (change.grad[reach].abs().sum(1) > 0).all()
    assert not change.grad[~reach].any(), "nothing comes from the padding, nor from a text's last token"
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


@family
def test_what_reaches_a_site_is_kept_for_each_row(name: str) -> None:
    model = editable(name)
    sites, rows = [model.down_projection(n) for n in (2, 0)], rows_of(model)
    found = model.inputs(rows, sites, batch_size=2)
    for site in sites:
        whole = model.above(rows, site).inputs
        assert [len(h) for h in found[site.path]] == rows.length.tolist()
        for own, row in zip(found[site.path], whole, strict=True):
            assert torch.allclose(own, row[: len(own)], atol=1e-5)
    assert hooks(model) == 0


@family
def test_what_prompts_bring_to_a_site_is_that_of_whole_passes(name: str) -> None:
    model = EditableModel(editable(name).model, Chatty(), name)
    site = model.down_projection(2)
    texts = ["The capital of Peru", "Q", "Who wrote it, and when was that?", "Why?", "The capital of Chile"]
    prompts = [(text, i % 2 == 1) for i, text in enumerate(texts)] + [(text, True) for text in texts[::-1]]
    expected = []
    for text, chat in prompts:
        rows = model.rows([(model.encode_prompt(text, chat=chat), [])])
        (whole,) = model.inputs(rows, [site])[site.path]
        expected.append(whole[int(rows.begin) : max(int(rows.until), int(rows.begin) + 1)])
    for batch_size in (32, 2):
        found = model.heard(prompts, site, batch_size)
        assert [len(h) for h in found] == [len(h) for h in expected]
        assert all(torch.allclose(own, whole, atol=1e-5) for own, whole in zip(found, expected, strict=True))

    read: list[tuple[int, ...]] = []
    with model.decoder.register_forward_pre_hook(
        lambda _, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    ):
        model.heard(prompts, site)
    assert read == [(3, len(texts[2])), (7, len(texts[2]))], "neither what all turns begin with, nor what ends them"
    model.decoder.get_input_embeddings().weight.data.mul_(1.5)
    model.memo = {}  # as a patch of weights leaves it
    assert not torch.allclose(model.heard(prompts[1:2], site)[0], expected[1], atol=1e-3)
    assert hooks(model) == 0


class Halved(nn.Module):
    """A feed-forward part whose output counts half."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.inner(h) / 2
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_changes_the_output_is_told(dtype: torch.dtype) -> None:
    model = editable()
    model.model.to(dtype)
    model.model.model.layers[1].mlp = Halved(model.model.model.layers[1].mlp)
    check_plain_residual(model, model.down_projection(0))
    with pytest.raises(ConfigError, match=r"^module = 'model\.layers\.1\.mlp\.inner\.down_proj': its layer .* changes"):
        check_plain_residual(model, model.down_projection(1))
    assert hooks(model) == 0


# -- batches -------------------------------------------------------------------------------------------------------


@family
def test_padding_does_not_matter(name: str) -> None:
    model = editable(name)
    together = model.logits(rows_of(model))
    alone = torch.cat([model.logits(rows_of(model, [text])) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, model.logits(rows_of(model), batch_size=2), atol=1e-4)


@family
def test_logits_are_those_of_transformers(name: str) -> None:
    model = editable(name)
    p, a = TEXTS[0]
    ids = BYTES.encode(p + a)
    with torch.no_grad():
        whole = model.model(input_ids=torch.tensor([ids])).logits[0]
    expected = whole[len(p) - 1 : -1]
    assert torch.allclose(model.logits(rows_of(model, [(p, a)])), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("Granite", {"embedding_multiplier": 6.0, "logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.125}),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 0.5}),
    ],
)
def test_logits_are_scaled_as_the_family_scales_them(name: str, own: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(
        **GROUPED,
        intermediate_size=72,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own,
    )
    torch.manual_seed(3)
    model = EditableModel(transformers.AutoModelForCausalLM.from_config(config), BYTES, name)
    p, a = TEXTS[0]
    with torch.no_grad():
        whole = model.model(input_ids=torch.tensor([BYTES.encode(p + a)])).logits[0]
    rows = rows_of(model, [(p, a)])
    assert torch.allclose(model.logits(rows), whole[len(p) - 1 : -1], atol=1e-5)
    assert torch.allclose(model.above(rows, model.down_projection(2)).logits(), whole[len(p) - 1 : -1], atol=1e-5)


# -- answers -------------------------------------------------------------------------------------------------------


def naive(model: EditableModel, prompt: str, budget: int) -> str:
    """One text at a time, without a cache."""
    ids = BYTES.encode(prompt)

    def likeliest(said: list[int]) -> int:
        with torch.no_grad():
            return int(model.model(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax())

    said = toys.written(likeliest, BYTES.end, budget)
    return BYTES.decode(said).partition("\n")[0].strip()


@family
def test_an_answer_is_what_a_plain_loop_says(name: str) -> None:
    model = editable(name)
    prompts = ["The capital of Peru is", "Q", "Who wrote it, and when was that?", "Two", "Some more words"]
    found = model.answer(prompts, max_new_tokens=10, batch_size=3)
    assert found == [naive(model, p, 10) for p in prompts]
    assert len(set(found)) > 2, "the prompts matter"
    assert model.answer(prompts, max_new_tokens=10, batch_size=5) == found, "asking twice, in other batches"
    assert hooks(model) == 0


@family
def test_texts_that_join_and_leave_are_read_as_if_alone(name: str) -> None:
    model = editable(name)
    prompts = ["The capital of Peru is", "Q", "Who wrote it, and when was that?", "Two", "Some more words"]
    alone = {p: naive(model, p, 12) for p in prompts}
    batch, there = Batch(model), list[str]()
    said: dict[str, list[int]] = {p: [] for p in prompts}
    joins = {0: prompts[:2], 2: prompts[2:4], 5: prompts[4:]}
    for turn in range(17):
        tokens = []
        if there:
            tokens = batch.step(torch.tensor([said[p][-1] for p in there])).argmax(1).tolist()
        for p, token in zip(there, tokens, strict=True):
            said[p].append(token)
        if turn in joins:
            new = joins[turn]
            for p, token in zip(new, batch.add([model.read(p) for p in new]).argmax(1).tolist(), strict=True):
                said[p].append(token)
            there += new
        kept = [i for i, p in enumerate(there) if len(said[p]) < 12 and said[p][-1] != 256]
        batch.keep(kept)
        there = [there[i] for i in kept]
        assert len(batch) == len(there)
    assert not there
    assert {p: BYTES.decode(said[p]).partition("\n")[0].strip() for p in prompts} == alone


def test_a_conversation_is_asked_in_its_last_turn() -> None:
    class Talking(Chatty):
        def chat(self, said: Any) -> str:
            turns = [{"role": "user", "content": said}] if isinstance(said, str) else said
            return "".join(f"<{t['role']}>{t['content']}</>" for t in turns) + "<bot>"

    model = EditableModel(editable().model, Talking())
    talk = [("user", "Hello"), ("assistant", "Hi."), ("user", "Who won?")]
    read = model.read([{"role": r, "content": c} for r, c in talk])
    assert BYTES.decode(read.ids) == "<user>Hello</><assistant>Hi.</><user>Who won?</><bot>"
    assert BYTES.decode(read.ids[read.begin : read.until]) == "Who won?"
    one = model.read("Who won?", chat=True)
    assert BYTES.decode(one.ids[one.begin : one.until]) == "Who won?"


def scripted(model: EditableModel, *scripts: str | list[int]) -> list[int]:
    """Let the model say ``scripts``, one for each row of a batch; what it gives back counts the passes."""
    lines = [list(s.encode()) if isinstance(s, str) else s for s in scripts]
    passes: list[int] = []

    going = list(range(len(lines)))

    def token_of(line: list[int], place: int) -> int:
        return line[min(place, len(line) - 1)]

    def say(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        if passes and len(out) < passes[-1]:  # rows that came to their end have left
            going[:] = [i for i in going if token_of(lines[i], len(passes) - 1) not in (10, 256)]
        tokens = [token_of(lines[i], len(passes)) for i in going]
        passes.append(len(out))
        return nn.functional.one_hot(torch.tensor(tokens), out.shape[-1]).float()

    model.model.get_output_embeddings().register_forward_hook(say)
    return passes


def test_an_answer_ends_with_its_line_or_the_end_token() -> None:
    model = editable()
    passes = scripted(model, " Lima\nQ", [*b" B", 256, *b"more"], "\nA")
    assert model.answer(["Why?", "x", "And?"], max_new_tokens=20) == ["Lima", "B", ""]
    assert len(passes) == 6, "it stops where the last row does"


def test_an_answer_keeps_to_its_budget() -> None:
    model = editable()
    passes = scripted(model, "abcdefgh")
    assert model.answer(["Why?"], max_new_tokens=4) == ["abcd"]
    assert len(passes) == 4
    assert model.answer([]) == []


def test_an_answer_in_a_chat_may_have_lines() -> None:
    model = EditableModel(editable().model, Chatty())
    scripted(model, [*b"One.\nTwo.", 256])
    assert model.answer(["Why?"], chat=True) == ["One.\nTwo."]


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(act: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_what_is_not_there_is_told_on_one_line() -> None:
    model = editable()
    for layer in (-1, LAYERS):
        refused(lambda layer=layer: model.down_projection(layer), f"layer = {layer}: model 'llama' has layers 0 to 3")
    path = "model.layers.1.mlp.down_proj"
    refused(lambda: model.site(f"{path}s"), f"module = '{path}s': names nothing in", f"did you mean '{path}'?")
    refused(lambda: model.site("model.layers.1.mlp"), "is no linear layer of model 'llama'")
    refused(lambda: model.site("model.layers"), "is no linear layer of model 'llama'")
    refused(lambda: model.layer_of("lm_head"), "module = 'lm_head': lies in none of the layers model.layers.0 to")
    refused(lambda: model.layer_of("model.layers.9.mlp.down_proj"), "lies in none of the layers")


def test_a_prompt_without_tokens_is_told_on_one_line() -> None:
    """Also where a patch would compare it with its facts: there is nothing that they could concern."""
    model = editable()
    PromptPatch("by hand", texts=["It is."], keys=torch.eye(1, WIDTH), centre=torch.zeros(WIDTH), least=-1.0).apply(
        model
    )
    assert model.read_prompt("A") == [*b"It is.\nA"], "it concerns whatever is asked"
    with pytest.raises(DataError, match=r"^prompt: has no tokens; ask something$"):
        model.answer([""])


def test_a_model_without_the_parts_is_told_on_one_line() -> None:
    refused(lambda: EditableModel(nn.Linear(2, 2), BYTES, "flat"), "model 'flat': holds no list of layers")
    model = editable()
    model.model.config.intermediate_size = 99
    refused(lambda: model.down_projection(0), "no linear layer from 99 to 32 values", "name the module by its path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cl_lab.editable._NORMS", ("absent",))
        model = editable()
        refused(
            lambda: model.above(rows_of(model), model.down_projection(0)),
            "no normalisation is found behind its layers (of absent)",
        )


def test_texts_of_the_same_weights_go_together_unless_one_decides_anew_at_each_token() -> None:
    model = editable("llama")
    site = model.down_projection(1)
    beside, released, other = model.twin(), model.twin(), model.twin()
    everywhere = packed(torch.ones(site.weight.numel(), dtype=torch.bool))
    values = torch.ones(site.weight.numel(), dtype=torch.bfloat16)
    SidePatch("by hand", path=site.path, shard=0, places=everywhere, values=values, gap=1.0).apply(beside)
    ReleasedSidePatch("by hand", path=site.path, shard=0, places=everywhere, values=values, gap=1.0).apply(released)
    WeightPatch("by hand", {}, {site.path: Delta(dense=torch.ones(site.weight.shape))}).apply(other)
    assert beside.goes_with(model)
    assert model.goes_with(beside)
    assert not model.goes_with(other)
    assert not other.goes_with(beside)
    assert not model.goes_with(released)
    assert released.goes_with(released)


def test_what_is_longer_than_the_model_reads_is_refused() -> None:
    made = load_editable("tiny")
    made.model.config.max_position_embeddings = 20
    with pytest.raises(
        TooLong, match=r"^'x{30}': a text of 30 tokens and 4 to answer with is longer than the 20 the model reads"
    ):
        made.answer(["x" * 30], max_new_tokens=4)
    with pytest.raises(TooLong, match=r"^'y{10}': a text of 10 tokens and 11 to answer with is longer"):
        made.answer(["short", "y" * 10], max_new_tokens=11)
    with pytest.raises(
        TooLong, match=r"^'a�b{18}': a text of 23 tokens is longer than the 20 the model reads; shorten it$"
    ):
        made.rows([([5], [6]), ([*b"a\x05", *[98] * 18], [6] * 3)])
    with pytest.raises(TooLong, match=r"^'x{30}…y{30}': a text of 100 tokens"):
        made.answer(["x" * 50 + "y" * 50], max_new_tokens=4)
    with pytest.raises(TooLong, match=r"^'y{10}': a text of 10 tokens and 11 to answer with is longer"):
        made.write(["short", "y" * 10], tokens=11)
    with pytest.raises(DataError, match="prompt: has no tokens; ask something"):
        made.answer(["fine", ""], max_new_tokens=4)
    assert len(made.answer(["x" * 10], max_new_tokens=10)) == 1
