"""A causal language model whose facts are edited: its parts by structure, the way it answers, and cheap partial passes.

Editors work on modules found by what they are, not by a family's names, so Llama, Qwen, Mistral, GPT-2, GPT-J and GPT-NeoX
need no table. Batches are padded at the right: under causal attention no token sees the padding behind it, so training and
scoring need no mask. Where one layer is edited the hidden states below it do not change, and :meth:`EditableModel.above`
runs the layers above it alone, with the projection to the vocabulary at the places that are asked for.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.errors import ConfigError, nearest
from cl_lab.hub import Tokenizer, new_cache

if TYPE_CHECKING:
    from cl_lab.patches import Patch

_NORMS = ("norm", "ln_f", "final_layer_norm")  # what stands behind the layers: Llama and Mistral, GPT-2 and GPT-J, NeoX


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(1)


@dataclass(frozen=True)
class Rows:
    """Texts as the model reads them: ``ids`` ``[B, T]`` int64, padded at the right with 0.

    ``prompt`` and ``length`` ``[B]`` int64 say where each prompt and each text ends; the answer lies between them. Of a
    prompt the tokens from ``begin`` to ``until`` ``[B]`` tell it from others: not a chat template's, nor a text's first.
    """

    ids: Tensor
    prompt: Tensor
    length: Tensor
    begin: Tensor
    until: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def asked(self) -> Tensor:
        """``[B, T]`` bool: the tokens of the prompts that are not a template's, which all prompts share."""
        place = torch.arange(self.ids.shape[1])[None]
        return (place >= self.begin[:, None]) & (place < self.until[:, None])

    @property
    def read(self) -> Tensor:
        """``[B, T]`` bool: the places that have a token."""
        return torch.arange(self.ids.shape[1])[None] < self.length[:, None]

    @property
    def said(self) -> Tensor:
        """``[B, T]`` bool: the places whose logits are for a token of the answer, one before each."""
        place = torch.arange(self.ids.shape[1])[None] + 1
        return (place >= self.prompt[:, None]) & (place < self.length[:, None])

    @property
    def labels(self) -> Tensor:
        """``[N]`` int64: the answers' tokens, in the order of ``logits[said]``."""
        return self.ids[:, 1:][self.said[:, :-1]]

    def take(self, rows: slice) -> Rows:
        """Some of the rows, without columns that none of them needs."""
        width = int(self.length[rows].max())
        return Rows(self.ids[rows, :width], self.prompt[rows], self.length[rows], self.begin[rows], self.until[rows])


@dataclass
class Site:
    """A module and its path: a linear layer, whose ``weight`` is ``[out, in]`` however it is kept, or any other."""

    path: str
    module: Any
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """A view of the module's weight, ``[out, in]``, detached."""
        kept: Tensor = self.module.weight.detach()
        return kept.T if self.transposed else kept


class EditableModel:
    """A causal language model, its tokenizer, and the patches that lie on it, oldest first.

    ``model`` is a ``PreTrainedModel`` on the CPU or a GPU, in evaluation mode; its parameters take no gradient.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, name: str = "model") -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        self.patches: list[Patch] = []
        self.base: dict[str, Tensor] = {}
        """Weights ``[out, in]`` as they were before any patch, of the sites that a patch has changed."""
        self.sums: dict[str, Tensor] = {}
        """Those weights with all patches on them, float32, to lay the next on without adding up again."""
        self.side: dict[str, Any] = {}
        """What hangs on sites by hooks, by name; :mod:`cl_lab.patches` keeps it."""
        self.memo: dict[Hashable, Any] = {}
        """What editors computed of the model and may want again; forgotten when a weight changes."""
        self.origin: dict[Hashable, Any] = {}
        """What they computed of the model as it was before any patch (:meth:`unpatched`); kept as long as the model."""
        self.layers_path, self.layers = _layers(model, name)
        self._sites: dict[str, Site] = {}
        self._asked: Tensor | None = None
        self._read: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(iter(self.model.parameters())).device
        return found

    def copied(self) -> Any:
        """A copy of the model with the weights as they stand, without what answers for some prompts only."""
        for hook in self.side.values():
            hook.remove()  # it would bring a copy of every patch along
        try:
            return copy.deepcopy(self.model)
        finally:
            for hook in self.side.values():
                hook.hang()

    # -- parts -----------------------------------------------------------------------------------------------------

    def site(self, path: str) -> Site:
        """The linear layer at a dotted path. Raises :class:`ConfigError` where there is none."""
        if path not in self._sites:
            modules = dict(self.model.named_modules())
            module = modules.get(path)
            if module is None or not _is_linear(module):
                known = [n for n, m in modules.items() if _is_linear(m)]
                what = "is no linear layer of" if module is not None else "names nothing in"
                raise ConfigError(f"module = '{path}': {what} model '{self.name}'{nearest(path, known)}")
            self._sites[path] = Site(path, module, not isinstance(module, nn.Linear))
        return self._sites[path]

    def down_projection(self, layer: int) -> Site:
        """The linear layer that ends the feed-forward part of a layer, ``[width, inner]`` (WISE's value matrix).

        Found by its shape. Raises :class:`ConfigError` for a layer that is not there, and where no module has the shape.
        """
        inside = self.layer(layer)
        config = self.model.config
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        found = [
            name
            for name, module in inside.module.named_modules()
            if _is_linear(module) and _shape(module) == (width, inner)
        ]
        if not found:
            raise ConfigError(
                f"model '{self.name}': layer {layer} has no linear layer from {inner} to {width} values, as the end of a "
                "feed-forward part would be; name the module by its path (module: model.layers.5.mlp.down_proj)"
            )
        return self.site(f"{inside.path}.{found[-1]}")

    def layer(self, index: int) -> Site:
        """A whole layer, to listen to. Raises :class:`ConfigError` where there is none."""
        if not 0 <= index < len(self.layers):
            raise ConfigError(f"layer = {index}: model '{self.name}' has layers 0 to {len(self.layers) - 1}")
        return Site(f"{self.layers_path}.{index}", self.layers[index])

    def layer_of(self, path: str) -> int:
        """The index of the layer that the module at ``path`` lies in. Raises :class:`ConfigError` where it lies in none."""
        head = f"{self.layers_path}."
        number = path.removeprefix(head).partition(".")[0]
        if not path.startswith(head) or not number.isdigit() or int(number) >= len(self.layers):
            raise ConfigError(f"module = '{path}': lies in none of the layers {head}0 to {head}{len(self.layers) - 1}")
        return int(number)

    # -- texts -----------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: str, *, chat: bool = False) -> list[int]:
        """The tokens of a prompt: as it is, or as a user's turn with what opens the answer."""
        return self.tokenizer.encode(self.tokenizer.chat(prompt) if chat else prompt)

    def encode_answer(self, answer: str, *, chat: bool = False, end: bool = True) -> list[int]:
        """The tokens of an answer, behind a blank where it follows plain text, and the token that ends it."""
        text = answer.strip() if chat else " " + answer.strip()
        return self.tokenizer.encode(text) + [self.tokenizer.end] * end

    def rows(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rows:
        """Pairs of prompt and answer tokens as one batch. A prompt has one token at least."""
        lengths = torch.tensor([len(p) + len(a) for p, a in texts])
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for row, (p, a) in zip(ids, texts, strict=True):
            row[: len(p) + len(a)] = torch.tensor([*p, *a])
        begin, until = torch.tensor([self._own_part(p) for p, _ in texts]).T
        return Rows(ids, torch.tensor([len(p) for p, _ in texts]), lengths, begin, until)

    def _own_part(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Where in a prompt the user's own tokens begin and end."""
        head, tail = self._template
        inner = len(prompt) - len(head) - len(tail)
        if (
            not head
            or inner < 1
            or list(prompt[: len(head)]) != head
            or list(prompt[len(prompt) - len(tail) :]) != tail
        ):
            # What a text's first token gives depends on nothing else and is far larger than the rest.
            return min(1, len(prompt) - 1), len(prompt)
        return len(head), len(head) + inner

    @cached_property
    def _template(self) -> tuple[list[int], list[int]]:
        """What a chat template puts before and behind what a user says; empty where there is none."""
        if not self.tokenizer.can_chat:
            return [], []
        one, two = (self.encode_prompt(text, chat=True) for text in ("A", "7"))
        shared = [a == b for a, b in zip(one, two, strict=False)]
        head = shared.index(False) if False in shared else 0
        back = [a == b for a, b in zip(reversed(one), reversed(two), strict=False)]
        tail = back.index(False) if False in back else 0
        return one[:head], one[len(one) - tail :]

    # -- passes ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, rows: Rows, batch_size: int = 32) -> Tensor:
        """Logits ``[N, vocabulary]`` float32 for the answers' tokens (``rows.labels``), of the model as it stands.

        Routes are chosen by the prompts' tokens alone, so that an answer given beforehand does not help to find itself.
        """
        found = []
        for first in range(0, len(rows), batch_size):
            some = rows.take(slice(first, first + batch_size))
            with self.prompts(some.asked, some.read):
                h = self.decoder(input_ids=some.ids.to(self.device), use_cache=False).last_hidden_state
            found.append(self.project(h[some.said.to(self.device)]).cpu())
        return torch.cat(found)

    @property
    def decoder(self) -> Any:
        """The model without its projection to the vocabulary."""
        return self.model.base_model

    def project(self, h: Tensor) -> Tensor:
        """Logits of final hidden states ``[N, width]``, float32."""
        logits: Tensor = self.model.get_output_embeddings()(h)
        return logits.float()

    @torch.no_grad()
    def inputs(self, rows: Rows, sites: Sequence[Site], batch_size: int = 32) -> dict[str, list[Tensor]]:
        """What reaches each site, by path: a float32 ``[T_i, in]`` for every row's own tokens, answer included."""
        found: dict[str, list[Tensor]] = {site.path: [] for site in sites}
        for first in range(0, len(rows), batch_size):
            some = rows.take(slice(first, first + batch_size))
            with _listening(sites, stop=True) as heard, self.prompts(some.asked, some.read), suppress(_AllHeard):
                self.decoder(input_ids=some.ids.to(self.device), use_cache=False)
            for site in sites:
                kept = heard[site.path].float().cpu()
                found[site.path] += [h[:n] for h, n in zip(kept, some.length.tolist(), strict=True)]
        return found

    @torch.no_grad()
    def above(self, rows: Rows, site: Site, *, from_prompt_end: bool = False) -> Above:
        """What it takes to run ``rows`` through the layers from ``site`` on, again and again, with its output changed.

        ``from_prompt_end``: only their tokens from the prompt's last own one on (``rows.until - 1``), with what is before
        them read once and for all: for changes that begin there, and several times as fast. The :class:`Above` then has
        ``rows`` of these tokens alone.
        """
        layer = self.layer_of(site.path)
        some = list(self.layers[layer:])
        kwargs: list[dict[str, Any]] = []
        heard: dict[str, Tensor] = {}
        ids, more, past = rows.ids, {"use_cache": False}, None
        if from_prompt_end and int((rows.until - 1).max()):
            rows, more = self._read_heads(rows)
            ids, past = rows.ids[:, :-1], _Past(more["past_key_values"])  # nothing follows a text's last token
        width = ids.shape[1]
        asked, read = rows.asked[:, :width], rows.read[:, :width]
        with ExitStack() as hooks, _listening([site]) as inputs, self.prompts(asked, read):
            for module in some:
                hooks.enter_context(
                    module.register_forward_pre_hook(
                        lambda m, args, kw: kwargs.append(_named(m, args, kw, past)), with_kwargs=True
                    )
                )
            hooks.enter_context(
                some[0].register_forward_hook(lambda _, args, out: heard.__setitem__("out", _first(out)))
            )
            self.decoder(input_ids=ids.to(self.device), **more)
        norm = next((getattr(self.decoder, n) for n in _NORMS if hasattr(self.decoder, n)), None)
        if norm is None:
            raise ConfigError(
                f"model '{self.name}': no normalisation is found behind its layers (of {', '.join(_NORMS)})"
            )
        return Above(self, rows, inputs[site.path], heard["out"], some[1:], kwargs[1:], norm)

    def _read_heads(self, rows: Rows) -> tuple[Rows, dict[str, Any]]:
        """The rows' tokens from ``until - 1`` on as rows of their own, and how to go on with them behind those before."""
        head = rows.until - 1
        cache, most = new_cache(), int(head.max())
        # Padded at the left, so that no gap lies between a head and what follows: a sliding window counts columns.
        before = torch.arange(most)[None] - (most - head)[:, None]
        there, before = before >= 0, before.clamp(min=0)
        read = torch.where(there, rows.ids.gather(1, before), 0)
        with self.prompts(there & rows.asked.gather(1, before), there):
            self.decoder(
                input_ids=read.to(self.device),
                attention_mask=there.long().to(self.device),
                position_ids=before.to(self.device),
                past_key_values=cache,
                use_cache=True,
            )
        length = rows.length - head
        width = int(length.max())
        places = torch.arange(width)[None] + head[:, None]
        inside = torch.minimum(places, rows.length[:, None] - 1)
        ids = torch.where(places < rows.length[:, None], rows.ids.gather(1, inside), 0)
        some = Rows(ids, rows.prompt - head, length, torch.zeros_like(head), torch.ones_like(head))
        mask = torch.cat([there, torch.ones(len(rows), width - 1)], 1)
        more = {"attention_mask": mask.long(), "position_ids": inside[:, :-1]}
        return some, {k: v.to(self.device) for k, v in more.items()} | {"past_key_values": cache, "use_cache": True}

    @contextmanager
    def prompts(self, asked: Tensor, read: Tensor) -> Iterator[None]:
        """Say which places ``[B, T]`` bool of the batch to come are prompts and which have a token, for what routes."""
        before = self._asked, self._read
        self._asked, self._read = asked.to(self.device), read.to(self.device)
        try:
            yield
        finally:
            self._asked, self._read = before

    @property
    def asked(self) -> Tensor | None:
        """Which tokens of the batch in progress are prompts, where it was said."""
        return self._asked

    @property
    def read(self) -> Tensor | None:
        """Which places of the batch in progress have a token, where it was said."""
        return self._read

    @contextmanager
    def unrouted(self) -> Iterator[None]:
        """Run the block without what answers for some prompts only; changed weights stay."""
        before = [(hook, hook.pause(True)) for hook in self.side.values()]
        try:
            yield
        finally:
            for hook, paused in before:  # one block may lie in another
                hook.pause(paused)

    @contextmanager
    def unpatched(self) -> Iterator[None]:
        """Run the block with the weights from before any patch, and without what answers for some prompts only."""
        sites = [self.site(path) for path in self.base]
        kept = [site.weight.clone() for site in sites]
        with self.unrouted():
            try:
                for site in sites:
                    site.weight.copy_(self.base[site.path])
                yield
            finally:
                for site, weight in zip(sites, kept, strict=True):
                    site.weight.copy_(weight)

    # -- answers ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[str], *, max_new_tokens: int = 32, chat: bool = False, batch_size: int = 32
    ) -> list[str]:
        """What the model says to each prompt: likeliest token after likeliest token, to its own end or ``max_new_tokens``.

        The budget is the same for all and knows no answer's length; plain text also ends with its line. Patches may put
        something before a prompt.
        """
        found: list[str] = []
        for first in range(0, len(prompts), batch_size):
            asked = [self.read_prompt(p, chat=chat) for p in prompts[first : first + batch_size]]
            found += self._generate(asked, max_new_tokens, stop_at_line=not chat)
        return found

    @torch.no_grad()
    def write(
        self, prompts: Sequence[str], *, tokens: int, top_k: int = 5, seed: int = 0, chat: bool = False
    ) -> list[str]:
        """What the model goes on with, ``tokens`` of them, each drawn from the ``top_k`` likeliest but for the end of text.

        The same for the same ``seed`` and prompts.
        """
        drawn = torch.Generator().manual_seed(seed)

        def draw(logits: Tensor) -> Tensor:
            logits[:, self.tokenizer.end] = -torch.inf
            best = logits.topk(top_k, 1)
            place = torch.multinomial(best.values.softmax(1).cpu(), 1, generator=drawn)
            return best.indices.cpu().gather(1, place).squeeze(1)

        return self._generate(
            [self.read_prompt(p, chat=chat) for p in prompts], tokens, stop_at_line=False, choose=draw
        )

    def read_prompt(self, prompt: str, *, chat: bool = False) -> list[int]:
        """The tokens of a prompt with what the patches put before it."""
        for patch in self.patches:
            if patch.rewrites:
                prompt = patch.rewrite(prompt, self)
                break  # one patch answers for all of its kind
        return self.encode_prompt(prompt, chat=chat)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        budget: int,
        *,
        stop_at_line: bool,
        choose: Callable[[Tensor], Tensor] = _likeliest,
    ) -> list[str]:
        longest, n = max(map(len, prompts)), len(prompts)
        ids = torch.zeros(n, longest, dtype=torch.int64)
        mask, asked = (torch.zeros(n, longest, dtype=torch.int64) for _ in range(2))
        for i, p in enumerate(prompts):  # at the left, so that all go on in one column
            (begin, until), skipped = self._own_part(p), longest - len(p)
            ids[i, skipped:], mask[i, skipped:] = torch.tensor(p), 1
            asked[i, skipped + begin : skipped + until] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache, said = new_cache(), torch.full((n, budget), -1, dtype=torch.int64)
        going, step = torch.ones(n, dtype=torch.bool), ids
        with self.prompts(asked.bool(), mask.bool()), self.held_routes():
            for place in range(budget):
                where = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
                out = self.decoder(
                    input_ids=step, attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True
                )
                token = choose(self.project(out.last_hidden_state[:, -1])).cpu()
                said[:, place] = torch.where(going, token, -1)
                going &= token != self.tokenizer.end
                if stop_at_line:
                    going &= torch.tensor(["\n" not in self.tokenizer.decode([t]) for t in token.tolist()])
                if not going.any():
                    break
                step = token[:, None].to(self.device)
                mask = F.pad(mask, (0, 1), value=1)
        texts = [self.tokenizer.decode([t for t in row if t >= 0]) for row in said.tolist()]
        return [(t.partition("\n")[0] if stop_at_line and t.strip() else t).strip() for t in texts]

    @contextmanager
    def held_routes(self) -> Iterator[None]:
        """Routes chosen in the first pass hold until the end of the block: one decision for a whole answer."""
        for hook in self.side.values():
            hook.hold(True)
        try:
            yield
        finally:
            for hook in self.side.values():
                hook.hold(False)


@dataclass
class Above:
    """Rows in the middle of the model: everything behind the output of one linear layer, ready to be run again.

    ``inputs`` is what that layer reads, ``[B, T, in]``. Its layer is taken to add the layer's output to the residual stream,
    as all the families above do; :meth:`check` tells whether the model does.
    """

    model: EditableModel
    rows: Rows
    inputs: Tensor
    out: Tensor  # of the site's own layer
    layers: list[nn.Module]
    kwargs: list[dict[str, Any]]
    norm: nn.Module
    _said: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._said = self.rows.said[:, : self.out.shape[1]].to(self.out.device)

    def hidden(self, change: Tensor | None = None) -> Tensor:
        """Final hidden states ``[N, width]`` at the answers' places, ``change`` ``[B, T, width]`` added to the output."""
        h = self.out if change is None else self.out + change.to(self.out.dtype)
        for layer, kwargs in zip(self.layers, self.kwargs, strict=True):
            h = _first(layer(h, **kwargs))
        done: Tensor = self.norm(h[self._said])
        return done

    def logits(self, change: Tensor | None = None) -> Tensor:
        """Logits ``[N, vocabulary]`` float32 of ``rows.labels``, likewise."""
        return self.model.project(self.hidden(change))

    @property
    def asked(self) -> Tensor:
        """``[B, T]`` bool: the prompts' tokens."""
        return self.rows.asked[:, : self.out.shape[1]].to(self.out.device)


def check_plain_residual(model: EditableModel, site: Site) -> None:
    """Raise :class:`ConfigError` unless what ``site`` puts out is added, as it is, to what its layer puts out."""
    if ("plain residual", site.path) in model.memo:
        return
    rows = model.rows([([1, 2, 3], [1])])
    at = model.above(rows, site)
    noise = torch.randn(1, 4, site.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(at.out)
    with site.module.register_forward_hook(lambda _, args, out: out + noise):
        moved = model.above(rows, site).out
    if not torch.allclose(
        moved, at.out + noise, atol=1e-3, equal_nan=True
    ):  # what is broken, an editor's loss will tell
        raise ConfigError(
            f"module = '{site.path}': its layer of model '{model.name}' changes what the module puts out before it adds it; "
            "choose the down-projection of a Llama, Qwen, Mistral, GPT-2, GPT-J or GPT-NeoX model"
        )
    model.memo["plain residual", site.path] = True


def _layers(model: nn.Module, name: str) -> tuple[str, Sequence[nn.Module]]:
    """The longest list of modules: the layers of any decoder, and their path."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ConfigError(f"model '{name}': holds no list of layers; use a decoder-only language model")
    path, found = max(lists, key=lambda pair: len(pair[1]))
    return path, list(found)


def _is_linear(module: nn.Module) -> bool:
    # GPT-2 has a linear layer of its own that keeps its weight the other way round.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(module: Any) -> tuple[int, int]:
    out, into = module.weight.shape
    return (out, into) if isinstance(module, nn.Linear) else (into, out)


def _named(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], past: _Past | None) -> dict[str, Any]:
    """What a layer was called with beside the hidden states, by name, ``past`` in place of a cache.

    GPT-2's gets its mask by place; GPT-J's and NeoX's call the cache ``layer_past``.
    """
    given = dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)) | dict(kwargs)
    caches = {k: past for k in ("past_key_values", "layer_past") if k in given}
    return {k: v for k, v in given.items() if k != "hidden_states"} | caches


def _first(out: Any) -> Tensor:
    """The hidden states of what a layer gave: alone, or before its cache and attention."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


class _Past:
    """What layers read before, as a cache that gives it again and again and keeps nothing of what comes behind it."""

    def __init__(self, cache: Any) -> None:
        self._kept = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, heads, past + T, width]`` of a layer, those given at the end."""
        before = self._kept[layer]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)


class _AllHeard(Exception):
    """Every site has been reached: what is behind them need not run."""


@contextmanager
def _listening(sites: Sequence[Site], *, stop: bool = False) -> Iterator[Mapping[str, Tensor]]:
    """What reaches each site in the block's last pass, by path; with ``stop`` the pass ends there (:class:`_AllHeard`)."""
    heard: dict[str, Tensor] = {}

    def listen(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
            heard[path] = args[0] if args else kwargs["hidden_states"]
            if stop and len(heard) == len(sites):
                raise _AllHeard

        return hook

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(site.module.register_forward_pre_hook(listen(site.path), with_kwargs=True))
        yield heard
