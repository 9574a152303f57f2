"""A causal language model as backbone and head: against Transformers' own forward pass, and cut in two."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import hub, learner, registry
from cl_lab.causal_lm import CausalBackbone, VocabularyHead, add_adapters, linear_modules
from cl_lab.compat import import_torchvision
from cl_lab.errors import ConfigError
from cl_lab.latents import put_through
from cl_lab.models import Classifier
from cl_lab.records import PAD, Aside, Batch, Stream, TensorData

import_torchvision()  # in the way that does not fail where its operators are missing; Transformers reaches for it
transformers: Any = importlib.import_module("transformers")

TINY = {"name": "causal-lm", "weights": "tiny"}
TRAINING = {"lr": 0.01, "optimizer": "adam", "epochs": 8}


@pytest.fixture
def stream() -> Stream:
    return toys.stream(form="texts")


def build(on: Stream, **knobs: Any) -> Any:
    torch.manual_seed(0)
    return registry.create("models", TINY | knobs, "model").build(on).eval()


def wrapped(on: Stream) -> tuple[Any, Classifier]:
    """A tiny Llama, and the same within backbone and head."""
    torch.manual_seed(0)
    plain: Any = hub.tiny_causal_lm(40).eval()
    backbone = CausalBackbone(plain.base_model, toys.PROMPT, toys.ANSWER)
    return plain, Classifier(backbone, VocabularyHead(plain.get_output_embeddings(), plain.config)).eval()


def test_says_what_the_model_itself_says(stream: Stream) -> None:
    """One row after another, without any padding, through Transformers' own forward pass."""
    plain, model = wrapped(stream)
    data = stream.experiences[0].train
    out = model(data.x[:8], data.t[:8])
    for row, logits in zip(data.x[:8], out, strict=True):
        tokens = row[row != PAD].long()
        prompt = int((row[: toys.PROMPT] != PAD).sum())
        expected = plain(tokens[None]).logits[0, prompt - 1 :]
        n = min(len(expected), len(logits))
        assert n >= 2
        assert torch.allclose(logits[:n], expected[:n], atol=1e-5)


OWN: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {  # what its class is called, its own settings, layer by layer?
    "llama": ("Llama", {}, True),
    "qwen3": ("Qwen3", {"head_dim": 16}, True),
    "mistral": ("Mistral", {"sliding_window": None}, True),
    "a wide window": ("Mistral", {"sliding_window": toys.PROMPT + toys.ANSWER}, True),
    "a narrow window": ("Mistral", {"sliding_window": 3}, False),
    "cohere": ("Cohere", {"logit_scale": 0.125}, True),
    "granite": ("Granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.2}, False),
    "gemma2": ("Gemma2", {**OWN, "final_logit_softcapping": 0.5, "sliding_window": 64}, False),  # eager, as below
    "gemma3": ("Gemma3", {**OWN, "sliding_window": 4}, False),
}


def of_family(name: str) -> Any:
    """A tiny random model of a family, whose texts' order and values tell."""
    family, own, _ = FAMILIES[name]
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own,
    )
    config._attn_implementation = "eager" if family == "Gemma2" else "sdpa"  # it squeezes its attention, too
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def alone(plain: Any, tokens: Sequence[int], prompt: int) -> Tensor:
    """What Transformers itself says from the prompt's end on."""
    found: Tensor = plain(torch.tensor([tokens])).logits[0, prompt - 1 :]
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_says_itself(stream: Stream, name: str) -> None:
    """Whatever a family does beside its layers and behind its projection; several answers stand behind a prompt."""
    plain = of_family(name)
    plain.train()
    before = torch.get_rng_state()
    backbone = CausalBackbone(plain.base_model, toys.PROMPT, toys.ANSWER)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in plain.modules()), "left as it was"
    assert len(plain.base_model.layers) == 3
    assert backbone.layered == FAMILIES[name][2]
    model = Classifier(backbone, VocabularyHead(plain.get_output_embeddings(), plain.config)).eval()
    data = stream.experiences[0].train
    assert stream.answers is not None
    prompts, every = data.x[:4, : toys.PROMPT], stream.answers[:3].to(torch.int32)
    out = model(torch.cat([prompts, every.flatten().expand(4, -1)], 1), data.t[:4]).unflatten(1, (len(every), -1))
    for row, said in zip(prompts, out, strict=True):
        own = row[row != PAD].tolist()
        for answer, logits in zip(every, said, strict=True):
            expected = alone(plain, [*own, *answer[answer != PAD].tolist()], len(own))
            n = min(len(expected), len(logits))
            assert torch.allclose(logits[:n], expected[:n], atol=1e-4)


def asked_in_turn(data: TensorData, answers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and tokens ``[B, P + m·A]`` as writing asks for them: nothing behind the prompts, more and more behind fewer."""
    turns = []
    for rows, given in (([0, 1, 2, 3], 0), ([0, 1, 2, 3], 1), ([3, 1], 2), ([1], 3), ([0, 2], 1)):
        behind = torch.full((len(rows), toys.ANSWER), PAD, dtype=torch.int32)
        behind[:, :given] = answers[0, :given]
        turns.append((torch.tensor(rows), torch.cat([data.x[rows, : toys.PROMPT], behind], 1)))
    every = answers[:3].flatten().expand(2, -1)
    turns.append((torch.tensor([2, 0]), torch.cat([data.x[[2, 0], : toys.PROMPT], every], 1)))
    return turns


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_comes_again_is_not_read_again(stream: Stream, name: str) -> None:
    plain = of_family(name)
    backbone = CausalBackbone(plain.base_model, toys.PROMPT, toys.ANSWER).eval()
    data = stream.experiences[0].train
    assert stream.answers is not None
    columns: list[int] = []
    plain.base_model.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: columns.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    turns = asked_in_turn(data, stream.answers.to(torch.int32))
    expected = [backbone(x) for _, x in turns]
    read = sum(columns)
    with backbone.remembering_prompts():
        columns.clear()
        for (_, x), out in zip(turns, expected, strict=True):
            assert torch.allclose(backbone(x), out, atol=1e-4)
    if backbone.layered:
        assert columns == [toys.PROMPT, 1, 2, 2, 1, 6], "the whole of the prompt, then what stands behind it"
    else:
        assert sum(columns) == read
    columns.clear()
    backbone(turns[1][1])
    assert columns == [toys.PROMPT + 1], "nothing is kept behind the block"


@torch.no_grad()
def test_prompts_are_read_again_by_other_weights(stream: Stream) -> None:
    """Changed where they lie, or lent for a call: what another model made of a prompt is never used."""
    _, model = wrapped(stream)
    backbone = model.backbone
    data = stream.experiences[0].train
    x = data.x[:4].clone()
    weight = backbone.get_parameter("model.layers.0.self_attn.k_proj.weight")
    lent = {"model.layers.0.self_attn.k_proj.weight": weight * 2}
    other = torch.func.functional_call(backbone, lent, (x,))
    with backbone.remembering_prompts():
        one = backbone(x)
        assert torch.allclose(torch.func.functional_call(backbone, lent, (x,)), other, atol=1e-6)
        assert torch.allclose(backbone(x), one, atol=1e-6)
        weight.mul_(2)
        assert torch.allclose(backbone(x), other, atol=1e-6)
    assert not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
def test_weights_lent_one_after_another_are_told_apart(stream: Stream) -> None:
    """Each is gone before the next is made, and may come to lie in its place."""
    _, model = wrapped(stream)
    x, name = stream.experiences[0].train.x[:4], "model.layers.0.self_attn.k_proj.weight"
    weight = model.backbone.get_parameter(name)
    expected = [torch.func.functional_call(model.backbone, {name: weight * scale}, (x,)) for scale in range(2, 6)]
    with model.backbone.remembering_prompts():
        for scale, out in zip(range(2, 6), expected, strict=True):
            found = torch.func.functional_call(model.backbone, {name: weight * scale}, (x,))
            assert torch.allclose(found, out, atol=1e-5)


@torch.no_grad()
def test_a_copy_made_meanwhile_remembers_nothing(stream: Stream) -> None:
    _, model = wrapped(stream)
    data = stream.experiences[0].train
    with model.backbone.remembering_prompts():
        model(data.x[:4], data.t[:4])
        copied: Any = copy.deepcopy(model)
    assert copied.backbone._read is None
    assert torch.equal(copied(data.x[:4], data.t[:4]), model(data.x[:4], data.t[:4]))


@torch.no_grad()
def test_what_was_put_through_the_lower_layers_is_read_as_ever() -> None:
    """Where the tokens' embeddings are gone there are no prompts to remember."""
    stream = toys.stream(form="texts", scoring="first-token")
    cut = build(stream, frozen="model.layers.0")
    through = put_through(stream, cut, "model.layers.0", keep=False, device=torch.device("cpu"))
    latents = through.experiences[0].test
    expected = cut(latents.x, latents.t)
    with cut.backbone.remembering_prompts():
        assert torch.equal(cut(latents.x, latents.t), expected)


@torch.no_grad()
def test_a_layer_that_the_trial_did_not_come_to_may_keep_nothing(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = of_family("llama")
    backbone = CausalBackbone(plain.base_model, toys.PROMPT, toys.ANSWER).eval()
    x = stream.experiences[0].train.x[:4]
    expected = backbone(x)
    attention = plain.base_model.layers[2].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, past_key_values=None, **k: forward(*a, **k))
    with backbone.remembering_prompts():
        assert backbone._read is not None, "two layers were tried"
        for _ in range(2):
            assert torch.allclose(backbone(x), expected, atol=1e-5)
    assert backbone._remembers is False


@torch.no_grad()
def test_a_decoder_that_is_run_whole_reads_answers_in_rows(stream: Stream) -> None:
    """Those of one row stand in rows of their own, some at a time."""
    plain, model = wrapped(stream)
    backbone: Any = model.backbone
    data = stream.experiences[0].train
    assert stream.answers is not None
    every = stream.answers.to(torch.int32)
    x = torch.cat([data.x[:20, : toys.PROMPT], every.flatten().expand(20, -1)], 1)
    expected = model(x, data.t[:20])
    backbone._layers = None
    rows: list[int] = []
    plain.base_model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert torch.allclose(model(x, data.t[:20]), expected, atol=1e-5)
    assert sum(rows) == 20 * len(every)
    assert max(rows) == 32


@torch.no_grad()
def test_a_prompt_of_another_text_is_read(stream: Stream) -> None:
    _, model = wrapped(stream)
    data = stream.experiences[0].train
    expected = model(data.x[:6], data.t[:6])
    with model.backbone.remembering_prompts():
        model(data.x[:4], data.t[:4])
        assert torch.allclose(model(data.x[:6], data.t[:6]), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["asks for nothing", "asks for something else", "takes what it is given for its own"])
def test_an_attention_that_remembers_in_another_way_reads_all(
    stream: Stream, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = wrapped(stream)
    data = stream.experiences[0].train
    expected = model(data.x[:4], data.t[:4])
    attention = type(plain.base_model.layers[0].self_attn)
    forward = attention.forward

    class Older:
        def __init__(self, read: Any) -> None:
            self.read = read

        def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            keys, values = self.read.update(keys, values, layer)
            return keys.flip(2), values

    def other(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and wrong == "asks for something else":
            past_key_values.reorder_cache(torch.arange(4))
        past = Older(past_key_values) if past_key_values is not None and wrong.startswith("takes") else None
        return forward(self, *args, past_key_values=past, **kwargs)

    monkeypatch.setattr(attention, "forward", other)
    with model.backbone.remembering_prompts():
        for _ in range(2):
            assert torch.allclose(model(data.x[:4], data.t[:4]), expected, atol=1e-5)


def test_a_window_has_room_for_soft_prompts_or_the_decoder_is_run_whole() -> None:
    for longest, layered in ((0, True), (1, False)):
        backbone = CausalBackbone(of_family("a wide window").base_model, toys.PROMPT, toys.ANSWER)
        backbone.take_prefix(torch.nn.Identity(), longest)
        assert backbone.layered == layered
        assert len(backbone.stages()) == (5 if layered else 1)


def test_adapters_of_a_model_in_bf16_are_float32() -> None:
    """A step of 1e-4 of a value moves it, as PEFT's own way to add adapters has it; and the answer is in bf16 still."""
    plain: Any = hub.tiny_causal_lm(40).bfloat16()
    add_adapters(plain, ["q_proj"], rank=2, alpha=4)
    own = {n: p for n, p in plain.named_parameters() if p.requires_grad and "lora_" in n}
    assert len(own) == 4
    assert {p.dtype for p in own.values()} == {torch.float32}
    logits = plain(torch.tensor([[1, 2, 3]])).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own.values())


def test_columns_that_nobody_uses_change_nothing(stream: Stream) -> None:
    _, model = wrapped(stream)
    data = stream.experiences[0].train
    x = data.x[:4].clone()
    x[:, toys.PROMPT + 1 :] = PAD
    assert model(x, data.t[:4]).shape[1] == 2, "one more than the answer's tokens"
    x[:, toys.PROMPT :] = PAD
    alone = model(x, data.t[:4])
    assert alone.shape[1] == 1
    assert torch.allclose(alone[:, 0], model(data.x[:4], data.t[:4])[:, 0], atol=1e-5), "the answer is not foreseen"


class Soft(torch.nn.Module):
    """The same soft prompts for all texts."""

    def __init__(self, soft: Tensor, there: Tensor) -> None:
        super().__init__()
        self.soft, self.there = soft, there

    def forward(self, h: Tensor, read: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.soft, self.there


def unlike(stream: Stream, m: int) -> Tensor:
    """Prompts of two lengths, each with ``m`` answers."""
    assert stream.answers is not None
    x = stream.experiences[0].train.x[:8].clone()
    x[::2, : toys.PROMPT - 1] = PAD
    answers = stream.answers[torch.arange(8 * m) % len(stream.answers)].to(torch.int32)
    return torch.cat([x[:, : toys.PROMPT], answers.reshape(8, -1)], 1)


@pytest.mark.parametrize("m", [1, 2])
def test_texts_of_unlike_length_are_not_padded_in_training(stream: Stream, m: int) -> None:
    """They say what they say, gradients are as they were, and layers read fewer places."""
    _, model = wrapped(stream)
    x = unlike(stream, m)
    seen: list[int] = []
    layer = model.get_submodule("backbone.model.layers.1")
    layer.register_forward_hook(lambda _, args, out: seen.append(args[0][..., 0].numel()))

    def outputs() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        said = model(x, torch.zeros(8, dtype=torch.int64))
        said.square().mean().backward()
        return said.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, slopes = outputs()
    model.train()
    found, others = outputs()
    assert torch.allclose(found, expected, atol=1e-5)
    assert others.keys() == slopes.keys()
    assert all(torch.allclose(others[n], slope, atol=1e-6) for n, slope in slopes.items())
    said = seen[0] - 8 * toys.PROMPT  # places of answers
    assert seen[1] <= said + 4 * toys.PROMPT + 4 + toys.PROMPT, (
        "four long prompts, four of a token, a place or so left over"
    )


def test_behind_soft_prompts_texts_are_not_padded_either(stream: Stream) -> None:
    _, model = wrapped(stream)
    x, soft = unlike(stream, 1), torch.randn(8, 3, 32)
    there = torch.ones(8, 3, dtype=torch.bool)
    there[1::4, 0] = False
    model.get_submodule("backbone").take_prefix(Soft(soft, there), 3)  # type: ignore[operator]
    shapes: list[torch.Size] = []
    model.get_submodule("backbone.model.layers.0").register_forward_hook(
        lambda _, args, out: shapes.append(args[0].shape)
    )
    expected = model(x, torch.zeros(8, dtype=torch.int64))
    found = model.train()(x, torch.zeros(8, dtype=torch.int64))
    assert torch.allclose(found, expected, atol=1e-5)
    assert shapes[1][:2].numel() < shapes[0][:2].numel()


@pytest.mark.parametrize("training", [True, False])
def test_a_backbone_is_in_the_mode_of_its_decoder(training: bool) -> None:
    decoder: Any = hub.tiny_causal_lm(40).train(training).base_model
    assert CausalBackbone(decoder, toys.PROMPT, toys.ANSWER).training == training


def test_texts_of_unlike_length_stand_in_more_than_one_row(stream: Stream) -> None:
    _, model = wrapped(stream)
    backbone: Any = model.backbone
    x = unlike(stream, 1)
    expected = model(x, torch.zeros(8, dtype=torch.int64))
    shapes: list[torch.Size] = []
    model.get_submodule("backbone.model.layers.0").register_forward_hook(
        lambda _, args, out: shapes.append(args[0].shape)
    )
    for longest in (1, 1000):
        backbone._row = longest
        assert torch.allclose(model.train()(x, torch.zeros(8, dtype=torch.int64)), expected, atol=1e-5)
    assert 1 < shapes[0][0] < 8, "rows of the longest text's length"
    assert shapes[1][0] == 1, "one row for all"


def test_texts_of_like_length_stay_in_rows_of_their_own(stream: Stream) -> None:
    _, model = wrapped(stream)
    x = unlike(stream, 1)[1::2]
    x[:, : toys.PROMPT] = 3
    shapes: list[torch.Size] = []
    model.get_submodule("backbone.model.layers.0").register_forward_hook(
        lambda _, args, out: shapes.append(args[0].shape)
    )
    model.train()(x, torch.zeros(4, dtype=torch.int64))
    assert shapes[0][0] == 4


@pytest.mark.parametrize("layered", [True, False])
def test_answers_behind_one_prompt_do_not_see_each_other(stream: Stream, layered: bool) -> None:
    _, model = wrapped(stream)
    backbone: Any = model.backbone
    if not layered:  # a family whose parts are not known: the whole decoder for each answer
        backbone._layers = None
    data = stream.experiences[0].train
    assert stream.answers is not None
    prompts = data.x[:5, : toys.PROMPT]
    every = stream.answers.to(torch.int32)
    together = model(torch.cat([prompts, every.flatten().expand(5, -1)], 1), data.t[:5]).unflatten(1, (len(every), -1))
    for k, answer in enumerate(every):
        alone = model(torch.cat([prompts, answer.expand(5, -1)], 1), data.t[:5])
        assert torch.allclose(together[:, k, : alone.shape[1]], alone, atol=1e-5)


@pytest.mark.parametrize("stage", ["model.embed_tokens", "model.layers.0", "model.layers.1"])
def test_cut_in_two_it_is_the_same_function(stream: Stream, stage: str) -> None:
    model = build(stream)
    data = stream.experiences[0].train
    whole = model(data.x[:8], data.t[:8])
    lower = model.split(stage)
    latents = model.latents(data.x[:8])
    rows, depth = toys.PROMPT + toys.ANSWER, model.backbone.flat_latents[stage].size
    assert latents.shape == (8, rows * depth + rows)
    assert torch.equal(latents[:, rows * depth :], (data.x[:8] != PAD).float())
    assert torch.allclose(model(latents, data.t[:8], latent=True), whole, atol=1e-5)
    x = unlike(stream, 1)
    whole, latents = model(x, data.t[:8]), model.latents(x)
    assert torch.allclose(model.train()(latents, data.t[:8], latent=True), whole, atol=1e-5), "in training, too"
    assert not any("layers.1" in name for name in lower) or stage == "model.layers.1"


def test_a_stream_put_through_the_frozen_layers_is_learnt_alike() -> None:
    stream = toys.stream(form="texts", scoring="first-token")
    aside = Aside(stream, lambda: stream.experiences[0].test)
    stream = replace(stream, asides={"again": aside})
    whole, cut = build(stream), build(stream, frozen="model.layers.0")
    data = stream.experiences[0].test
    expected = whole(data.x, data.t)
    through = put_through(stream, cut, "model.layers.0", keep=False, device=torch.device("cpu"))
    latents = through.experiences[0].test
    assert torch.allclose(cut(latents.x, latents.t), expected, atol=1e-5)
    assert through.layout["prompt"] == (toys.PROMPT,), "answers are found as before"
    assert torch.equal(through.asides["again"].questions.x, latents.x)


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_learns_and_checkpoints_hold_what_it_learnt(stream: Stream, adapt: str, tmp_path: Path) -> None:
    """Low-rank adapters or all weights: a stream of three tasks is learnt, and a fresh trainer goes on from the state."""
    model = TINY | {"adapt": adapt, "lora_targets": ["*_proj"]}
    on = toys.stream(form="texts", scoring="constrained")
    trainer = toys.trainer([{"name": "joint"}], on, model=model, training=TRAINING | {"epochs": 10, "lr": 0.02})
    before = toys.weights_of(trainer)
    record = trainer.run()
    assert sum(record.matrix[-1]) / 3 > 0.8, record.matrix
    assert all("lora_" in n for n in trainer.learner.parameters()) == (adapt == "lora")
    after = toys.weights_of(trainer)
    moved = set(toys.differing(before, after))
    assert moved
    assert adapt == "full" or all("lora_" in n for n in moved), "what is not adapted stands still"
    state: Any = trainer.state_dict()
    held = state["learner"]["weights"]
    assert all("lora_" in n for n in held) == (adapt == "lora"), "given weights are not saved again"
    fresh = toys.trainer([{"name": "joint"}], on, model=model, training=TRAINING)
    fresh.load_state_dict(state)
    assert not toys.differing(after, toys.weights_of(fresh))


def test_written_answers_say_how_many_are_valid(stream: Stream) -> None:
    """A model that learns task after task answers an old task with the newest one's labels: invalid, not only wrong."""
    model = TINY | {"adapt": "full"}
    training = TRAINING | {"epochs": 10, "lr": 0.02}
    record = toys.trainer([{"name": "naive"}], stream, model=model, training=training).run()
    assert len(record.initial_valid) == 3
    assert [len(row) for row in record.valid] == [3, 3, 3]
    for row, valid in zip(record.matrix, record.valid, strict=True):
        assert all(a <= v for a, v in zip(row, valid, strict=True))
    assert record.valid[-1][-1] > 0.8
    assert record.valid[-1][0] < 0.5, "the first task's labels are no longer written"
    constrained = toys.trainer([{"name": "naive"}], toys.stream(form="texts", scoring="constrained"), model=model)
    assert constrained.run().valid == [], "where only the task's answers are compared, all are valid"


@pytest.mark.parametrize("links", [[{"name": "naive"}], [{"name": "replay", "memory": 30}], [{"name": "si"}]])
def test_the_shelf_serves(stream: Stream, links: list[dict[str, Any]]) -> None:
    record = toys.trainer(links, stream, model=TINY | {"adapt": "full"}, training=TRAINING).run()
    assert record.matrix[0][0] > 0.5, "written freely, token by token"


@pytest.mark.parametrize("scoring", ["first-token", "constrained"])
@pytest.mark.parametrize("codebooks", [8, None])
def test_remind_keeps_hidden_states(scoring: str, codebooks: int | None) -> None:
    on = toys.stream(form="texts", scoring=scoring)
    knobs = {"name": "remind", "split": "model.layers.0", "base": "pretrained", "codebooks": codebooks}
    knobs |= {"codebook_size": 64, "replay": 20}
    trainer = toys.trainer([knobs], on, model=TINY | {"adapt": "full"}, training=TRAINING)
    record = trainer.run()
    (link,) = trainer.strategy.links
    places = toys.PROMPT + toys.ANSWER
    measures = record.measures[-1]
    assert measures["remind/memory_samples"] == 180
    if codebooks is not None:
        assert measures["remind/bytes_per_sample"] == places * codebooks + places + 4 + 2 + 4, (
            "codes, mask, answer, task, place"
        )
    assert (link.encoding() == "codes") == (scoring == "first-token")
    assert sum(record.matrix[-1]) / 3 > 0.6, record.matrix
    naive = toys.trainer([{"name": "naive"}], on, model=TINY | {"adapt": "full"}, training=TRAINING).run()
    assert sum(record.matrix[-1]) > sum(naive.matrix[-1])


@pytest.mark.parametrize("codebooks", [8, None])
def test_several_answers_behind_a_prompt_pass_remind_as_one_does(codebooks: int | None) -> None:
    on = toys.stream(form="texts", scoring="constrained")
    knobs = {"name": "remind", "split": "model.layers.0", "base": "pretrained", "codebooks": codebooks}
    trainer = toys.trainer([knobs | {"codebook_size": 64}], on, model=TINY, training=TRAINING)
    trainer.run()
    (link,), learner, data = trainer.strategy.links, trainer.learner, on.experiences[0].test
    assert on.answers is not None
    prompts, every = data.x[:5, : toys.PROMPT], on.answers.to(torch.int32)

    def said(answers: Tensor) -> Tensor:
        x = torch.cat([prompts, answers.flatten().expand(5, -1)], 1)
        return link.predict(Batch(x, data.y[:5], data.t[:5], 0), learner).unflatten(1, (len(answers), -1))

    with torch.no_grad():
        together = said(every)
        for k, answer in enumerate(every):
            alone = said(answer[None])[:, 0]
            assert torch.allclose(together[:, k, : alone.shape[1]], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [(["q_proj"], 2), (["model.layers.*.self_attn.[qv]_proj"], 4), (["model.layers.1.mlp.down_proj", "q_proj"], 3)],
)
def test_targets_are_found_by_structure(patterns: list[str], count: int) -> None:
    assert len(linear_modules(hub.tiny_causal_lm(40), patterns)) == count


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"lora_targets": ["qproj"]}, "'qproj' matches no linear layer; did you mean 'q_proj'"),
        ({"lora_targets": ["layers.1.q_proj"]}, "matches no linear layer"),
        (
            {"frozen": "model.layers.0"},
            "scoring 'generation' reads on from answers; set scenario.scoring=first-token or",
        ),
    ],
)
def test_what_cannot_be_is_one_line(stream: Stream, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(stream, **knobs)


def test_a_stage_that_is_not_there_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be split behind 'model.layers.7'.*its stages are model.embed_tokens"
    ):
        build(toys.stream(form="texts", scoring="first-token"), frozen="model.layers.7")


def test_other_streams_are_refused() -> None:
    with pytest.raises(ConfigError, match="answers prompts, but stream 'toy' is a classification"):
        build(toys.stream())
    with pytest.raises(ConfigError, match="learns classification only"):
        toys.trainer([{"name": "lwf"}], toys.stream(form="texts"), model=TINY)


def test_a_tiny_model_is_as_large_as_asked_for() -> None:
    on = replace(toys.stream(form="texts"), vocabulary=70)
    spec = {**TINY, "layers": 3, "width": 48, "heads": 4, "adapt": "full"}
    built = registry.create("models", spec, "model").build(on)
    config = built.backbone.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 48, 4)
    assert config.vocab_size == 70, "tokens may come in training that no test set holds"
    assert all(p.requires_grad for p in built.parameters())
    assert registry.create("models", TINY, "model").build(on).backbone.model.config.num_hidden_layers == 2


@pytest.mark.parametrize("knob", ["layers", "width", "heads"])
def test_other_weights_have_a_size_of_their_own(knob: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model\.{knob} = 4: the model 'smollm2-135m' has a size of its own; leave it"
    ):
        registry.create("models", {"name": "causal-lm", knob: 4}, "model")


def test_long_texts_widen_a_tiny_model() -> None:
    on = toys.stream(form="texts")
    assert hub.tiny_causal_lm(40, context=700).config.max_position_embeddings == 700
    spec = registry.create("models", TINY, "model")
    assert spec.build(on).backbone.model.config.max_position_embeddings == 512, "editors read more than the stream has"
    long = replace(on, input_shape=(700,))
    assert spec.build(long).backbone.model.config.max_position_embeddings == 700


def test_ranks_that_share_parameters_must_ask_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of answers may need more passes than another, and under ZeRO 3 every pass gathers the weights."""
    ranks = SimpleNamespace(device="cpu", num_processes=2, process_index=0)
    monkeypatch.setattr(learner, "accelerator_for", lambda *_: ranks)
    engine = {"kind": "deepspeed", "zero": 3, "processes": 2}
    for scoring in ("generation", "constrained"):
        with pytest.raises(ConfigError, match=rf"engine.zero = 3 on 2 ranks: scoring '{scoring}'.*first-token") as e:
            toys.trainer([{"name": "naive"}], toys.stream(form="texts", scoring=scoring), model=TINY, engine=engine)
        assert "\n" not in str(e.value)
    toys.trainer([{"name": "naive"}], toys.stream(form="texts", scoring="first-token"), model=TINY, engine=engine)
