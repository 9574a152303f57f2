"""A causal language model whose facts are edited: its parts by structure, the way it answers, and cheap partial passes.

Editors work on modules found by what they are, not by a family's names, so Llama, Qwen, Mistral, GPT-2, GPT-J and GPT-NeoX
need no table. Batches are padded at the right: under causal attention no token sees the padding behind it, so training and
scoring need no mask. Where one layer is edited the hidden states below it do not change, and :meth:`EditableModel.above`
runs the layers above it alone, with the projection to the vocabulary at the places that are asked for.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_lab.adapters import is_linear, is_transposed
from cl_lab.errors import ConfigError, DataError, EditError, TooLong, nearest, shortened
from cl_lab.hub import Tokenizer, Turn, family_logits, new_cache, tokens_behind

if TYPE_CHECKING:
    from cl_lab.patches import Patch

log = logging.getLogger("cl_lab")

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

    def put(self, weight: Tensor) -> None:
        """Give the module another weight ``[out, in]``. The tensor it had stays as it is: another model may share it."""
        kept = self.module.weight
        new = (weight.T if self.transposed else weight).to(kept, copy=True).contiguous()
        self.module.weight = nn.Parameter(new, requires_grad=kept.requires_grad)


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
        self._ids: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(iter(self.model.parameters())).device
        return found

    @property
    def context(self) -> int | None:
        """The most tokens of a text that the model reads, where it has a bound."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    def twin(self) -> EditableModel:
        """Another on the same tensors, with the same patches: what is laid on or taken off one does not reach the other.

        No tensor is copied, and a pass that this model is in, in another thread, goes on undisturbed.
        """
        made = self.bare()
        made.patches, made.base, made.sums = list(self.patches), dict(self.base), dict(self.sums)
        made.memo, made.origin = self.memo, self.origin
        made.side = {name: hook.twin(made) for name, hook in self.side.items()}
        return made

    def bare(self) -> EditableModel:
        """Another on the same tensors, the weights as they stand, without what answers for some prompts only."""
        shared = [*self.model.parameters(), *self.model.buffers()]
        return EditableModel(self._copied(shared), self.tokenizer, self.name)

    def goes_with(self, other: EditableModel) -> bool:
        """Whether one :class:`Batch` can have texts of both: the very same weights, and choices that hold to the end."""
        if not all(hook.holds for model in (self, other) for hook in model.side.values()):
            return self is other
        return self is other or all(
            a is b for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True)
        )

    def copied(self) -> Any:
        """A copy of the model with the weights as they stand, without what answers for some prompts only."""
        return self._copied([])

    def _copied(self, shared: Sequence[Tensor]) -> Any:
        """A copy that has ``shared`` in common with the model, and none of the hooks on it."""
        hooks = list(self.side.values())
        model = deepcopy(self.model, {id(part): part for part in [*shared, *hooks]})
        for module in model.modules():
            _drop_hooks(module, hooks)
        return model

    # -- parts -----------------------------------------------------------------------------------------------------

    def site(self, path: str) -> Site:
        """The linear layer at a dotted path. Raises :class:`ConfigError` where there is none."""
        if path not in self._sites:
            modules = dict(self.model.named_modules())
            module = modules.get(path)
            if module is None or not is_linear(module):
                known = [n for n, m in modules.items() if is_linear(m)]
                what = "is no linear layer of" if module is not None else "names nothing in"
                raise ConfigError(f"module = '{path}': {what} model '{self.name}'{nearest(path, known)}")
            if module.weight is self.decoder.get_input_embeddings().weight:
                raise ConfigError(f"module = '{path}': its weight is the embeddings', too; choose one within a layer")
            self._sites[path] = Site(path, module, is_transposed(module))
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
            if is_linear(module) and _shape(module) == (width, inner)
        ]
        if not found:
            raise ConfigError(
                f"model '{self.name}': layer {layer} has no linear layer from {inner} to {width} values, as the end of a "
                "feed-forward part would be; name the module by its path (module: model.layers.5.mlp.down_proj)"
            )
        return self.site(f"{inside.path}.{found[-1]}")

    def submodule(self, path: str) -> nn.Module:
        """The module at a dotted path. Raises :class:`ConfigError` where there is none."""
        try:
            found: nn.Module = self.model.get_submodule(path)
        except AttributeError:
            raise ConfigError(
                f"model '{self.name}': has no module '{path}'; is what names it of another model?"
            ) from None
        return found

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
        (tokens,) = tokens_behind(self.tokenizer, "" if chat else " ", [answer.strip()])
        return tokens + [self.tokenizer.end] * end

    def rows(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rows:
        """Pairs of prompt and answer tokens as one batch. A prompt has one token at least.

        Raises :class:`TooLong` where one is longer than the model reads.
        """
        lengths = torch.tensor([len(p) + len(a) for p, a in texts])
        longest = int(lengths.argmax())
        self._check_length(texts[longest][0], len(texts[longest][1]), 0)
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for row, (p, a) in zip(ids, texts, strict=True):
            row[: len(p) + len(a)] = torch.tensor([*p, *a])
        begin, until = torch.tensor([self._own_part(p) for p, _ in texts]).T
        return Rows(ids, torch.tensor([len(p) for p, _ in texts]), lengths, begin, until)

    def _check_length(self, prompt: Sequence[int], answer: int, more: int) -> None:
        """Raise :class:`TooLong` where ``prompt``, so many tokens of an answer and ``more`` to be written have no room."""
        tokens = len(prompt) + answer
        if self.context and tokens + more > self.context:
            begin, until = self._own_part(prompt)
            text = self.tokenizer.decode(list(prompt[begin if begin > 1 else 0 : until]))
            shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shortened(text))
            behind = f" and {more} to answer with" if more else ""
            raise TooLong(
                f"'{shown}': a text of {tokens} tokens{behind} is longer than the {self.context} the model reads; shorten it"
            )

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
        return _around(*(self.encode_prompt(text, chat=True) for text in ("A", "7")))

    # -- passes ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, rows: Rows, batch_size: int = 32) -> Tensor:
        """Logits ``[N, vocabulary]`` float32 for the answers' tokens (``rows.labels``), of the model as it stands.

        Routes are chosen by the prompts' tokens alone, so that an answer given beforehand does not help to find itself.
        """
        found = []
        for first in range(0, len(rows), batch_size):
            some = rows.take(slice(first, first + batch_size))
            with self.prompts(some.asked, some.read, some.ids):
                h = self.decoder(input_ids=some.ids.to(self.device), use_cache=False).last_hidden_state
            found.append(self.project(h[some.said.to(self.device)]).cpu())
        return torch.cat(found)

    @property
    def decoder(self) -> Any:
        """The model without its projection to the vocabulary."""
        return self.model.base_model

    def project(self, h: Tensor) -> Tensor:
        """Logits of final hidden states ``[N, width]``, float32."""
        return family_logits(self.model.config, self.model.get_output_embeddings()(h)).float()

    @torch.no_grad()
    def inputs(self, rows: Rows, sites: Sequence[Site], batch_size: int = 32) -> dict[str, list[Tensor]]:
        """What reaches each site, by path: a float32 ``[T_i, in]`` for every row's own tokens, answer included."""
        found: dict[str, list[Tensor]] = {site.path: [] for site in sites}
        for first in range(0, len(rows), batch_size):
            some = rows.take(slice(first, first + batch_size))
            telling = self.prompts(some.asked, some.read, some.ids)
            with _listening(sites, stop=True) as heard, telling, suppress(_AllHeard):
                self.decoder(input_ids=some.ids.to(self.device), use_cache=False)
            for site in sites:
                kept = heard[site.path].float().cpu()
                found[site.path] += [h[:n] for h, n in zip(kept, some.length.tolist(), strict=True)]
        return found

    @torch.no_grad()
    def heard(self, prompts: Sequence[tuple[str, bool]], site: Site, batch_size: int = 32) -> list[Tensor]:
        """What reaches ``site`` from each prompt's own tokens, float32 ``[T_i, in]``; one that is true is a chat's turn.

        A template's tokens, and a text's first, are left out (:class:`Rows`). What all turns begin with is read once for
        the model as it stands, and what stands behind the last token wanted is not read: several times as fast as
        :meth:`inputs`, and the same but for rounding. Raises :class:`TooLong` as :meth:`rows` does.
        """
        found: dict[int, Tensor] = {}
        texts = [self.encode_prompt(text, chat=chat) for text, chat in prompts]
        for chat in (False, True):
            own = [i for i, (_, is_chat) in enumerate(prompts) if is_chat == chat]
            for some in (own[first : first + batch_size] for first in range(0, len(own), batch_size)):
                rows = self.rows([(texts[i], []) for i in some])
                until = torch.maximum(rows.until, rows.begin + 1)
                head = int(rows.begin.min()) if chat else 0
                if not torch.equal(rows.ids[:, :head], rows.ids[:1, :head].expand(len(some), -1)):
                    head = 0  # the first letters of one run into the template's last token
                given: dict[str, Any] = {"use_cache": False}
                if head:
                    opening, _ = self._opening(rows.ids[0, :head], site)
                    cache = _gathered([(opening, [0] * len(some), 0)], head)
                    place = torch.arange(head, int(until.max()))[None].expand(len(some), -1)
                    given = {"position_ids": place.to(self.device), "past_key_values": cache, "use_cache": True}
                there = slice(head, int(until.max()))
                ids = rows.ids[:, there]
                telling = self.prompts(rows.asked[:, there], rows.read[:, there], ids)
                with _listening([site], stop=True) as heard, telling, suppress(_AllHeard):
                    self.decoder(input_ids=ids.to(self.device), **given)
                kept = heard[site.path].float().cpu()
                bounds = zip(some, kept, (rows.begin - head).tolist(), (until - head).tolist(), strict=True)
                found |= {i: h[begin:end] for i, h, begin, end in bounds}
        return [found[i] for i in range(len(prompts))]

    def _opening(self, ids: Tensor, site: Site) -> tuple[Any, Tensor]:
        """Of ``ids`` ``[T]``, with which texts begin: the cache, and what reaches ``site``, ``[1, T, in]``.

        Read once for the weights as they stand.
        """
        key, memo = ("opening", site.path, tuple(ids.tolist())), self.memo  # another may take its place meanwhile
        if key not in memo:
            cache = new_cache()
            with _listening([site]) as inputs, self.unrouted():  # a route is for a prompt's own tokens
                self.decoder(input_ids=ids[None].to(self.device), past_key_values=cache, use_cache=True)
            memo[key] = cache, inputs[site.path]
        found: tuple[Any, Tensor] = memo[key]
        return found

    @torch.no_grad()
    def above(
        self,
        rows: Rows,
        site: Site,
        *,
        from_prompt_end: bool = False,
        heard: bool = False,
        openings: Sequence[Sequence[int]] = (),
    ) -> Above:
        """What it takes to run ``rows`` through the layers from ``site`` on, again and again, with its output changed.

        ``from_prompt_end``: only their tokens from the prompt's last own one on (``rows.until - 1``), with what is before
        them read once and for all: for changes that begin there, and several times as fast. The :class:`Above` then has
        ``rows`` of these tokens alone. ``heard``: it also has what each prompt brings to the site, which the same passes
        tell (:meth:`heard`). ``openings``: tokens that texts begin with time and again, read once for the model as it
        stands, without what answers for some prompts only; each row takes what it has in common with one of them.
        """
        layer = self.layer_of(site.path)
        some = list(self.layers[layer:])
        kwargs: list[dict[str, Any]] = []
        put_out: dict[str, Tensor] = {}
        ids, more, past = rows.ids, {"use_cache": False}, None
        whole, before = rows, None
        if from_prompt_end and int((rows.until - 1).max()):
            rows, more, before = self._read_heads(rows, site, openings)
            ids, past = rows.ids[:, :-1], _Past(more["past_key_values"])  # nothing follows a text's last token
        width = ids.shape[1]
        asked, read = rows.asked[:, :width], rows.read[:, :width]
        with ExitStack() as hooks, _listening([site]) as inputs, self.prompts(asked, read, ids):
            for module in some:
                hooks.enter_context(
                    module.register_forward_pre_hook(
                        lambda m, args, kw: kwargs.append(_named(m, args, kw, past)), with_kwargs=True
                    )
                )
            hooks.enter_context(
                some[0].register_forward_hook(lambda _, args, out: put_out.__setitem__("out", _first(out)))
            )
            self.decoder(input_ids=ids.to(self.device), **more)
        norm = next((getattr(self.decoder, n) for n in _NORMS if hasattr(self.decoder, n)), None)
        if norm is None:
            raise ConfigError(
                f"model '{self.name}': no normalisation is found behind its layers (of {', '.join(_NORMS)})"
            )
        brought = _own_tokens(whole, inputs[site.path], before) if heard else []
        return Above(self, rows, inputs[site.path], put_out["out"], some[1:], kwargs[1:], norm, brought)

    def _read_heads(
        self, rows: Rows, site: Site, openings: Sequence[Sequence[int]]
    ) -> tuple[Rows, dict[str, Any], Tensor]:
        """The rows' tokens from ``until - 1`` on as rows of their own, and how to go on with them behind those before.

        And what reaches ``site`` from those before, ``[B, T, in]``, padded at the left.
        """
        head = rows.until - 1
        most = int(head.max())
        known = [self._opening(torch.tensor(ids), site) for ids in openings]
        heads = [row[:n] for row, n in zip(rows.ids.tolist(), head.tolist(), strict=True)]
        alike = [max(((_in_common(ids, own), i) for i, ids in enumerate(openings)), default=(0, 0)) for own in heads]
        # Every row reads so many tokens, the last of its head, though it may have more in common with an opening. So all
        # padding is at the left, and no gap lies between tokens that follow each other: a sliding window counts columns.
        rest = max(1, *(len(own) - n for own, (n, _) in zip(heads, alike, strict=True)))
        taken = [(which, max(len(own) - rest, 0)) for own, (_, which) in zip(heads, alike, strict=True)]
        cache = _begun([opening for opening, _ in known], taken, most - rest) if most > rest else new_cache()
        there = torch.arange(most)[None] >= (most - head)[:, None]
        before = (torch.arange(rest)[None] + (head - rest)[:, None]).clamp(min=0)
        now = there[:, most - rest :]
        read = torch.where(now, rows.ids.gather(1, before), 0)
        with _listening([site]) as inputs, self.prompts(now & rows.asked.gather(1, before), now, read):
            self.decoder(
                input_ids=read.to(self.device),
                attention_mask=there.long().to(self.device),
                position_ids=before.to(self.device),
                past_key_values=cache,
                use_cache=True,
            )
        brought = inputs[site.path]
        if most > rest:
            first = [_widened(known[which][1][:, :n], most - rest) for which, n in taken]
            brought = torch.cat([torch.cat(first), brought], 1)
        length = rows.length - head
        width = int(length.max())
        places = torch.arange(width)[None] + head[:, None]
        inside = torch.minimum(places, rows.length[:, None] - 1)
        ids = torch.where(places < rows.length[:, None], rows.ids.gather(1, inside), 0)
        some = Rows(ids, rows.prompt - head, length, torch.zeros_like(head), torch.ones_like(head))
        mask = torch.cat([there, torch.ones(len(rows), width - 1)], 1)
        more = {"attention_mask": mask.long(), "position_ids": inside[:, :-1]}
        more = {k: v.to(self.device) for k, v in more.items()} | {"past_key_values": cache, "use_cache": True}
        return some, more, brought

    @contextmanager
    def prompts(self, asked: Tensor, read: Tensor, ids: Tensor) -> Iterator[None]:
        """Say, for what routes, which places ``[B, T]`` of the batch to come are prompts, which have a token, and what."""
        before = self._asked, self._read, self._ids
        self._asked, self._read, self._ids = asked.to(self.device), read.to(self.device), ids
        try:
            yield
        finally:
            self._asked, self._read, self._ids = before

    @property
    def asked(self) -> Tensor | None:
        """Which tokens of the batch in progress are prompts, where it was said."""
        return self._asked

    @property
    def there(self) -> Tensor | None:
        """Which places of the batch in progress have a token, where it was said."""
        return self._read

    @property
    def ids(self) -> Tensor | None:
        """The tokens ``[B, T]`` of the batch in progress, where it was said; at places without one any number."""
        return self._ids

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
        kept, memo = [site.module.weight for site in sites], self.memo
        self.memo = {} if sites else memo
        with self.unrouted():
            try:
                for site in sites:
                    site.put(self.base[site.path])
                yield
            finally:
                self.memo = memo
                for site, weight in zip(sites, kept, strict=True):
                    site.module.weight = weight

    # -- answers ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[str], *, max_new_tokens: int = 32, chat: bool = False, batch_size: int = 32
    ) -> list[str]:
        """What the model says to each prompt: likeliest token after likeliest token, to its own end or ``max_new_tokens``.

        The budget is the same for all and knows no answer's length; plain text also ends with its line. Patches may put
        something before a prompt. Raises :class:`DataError` for a prompt without tokens, and :class:`TooLong` for one that
        is with its answer longer than the model reads.
        """
        found: list[str] = []
        for first in range(0, len(prompts), batch_size):
            asked = [self.read(p, chat=chat, room=max_new_tokens) for p in prompts[first : first + batch_size]]
            for one in asked:
                if not one.ids:
                    raise DataError("prompt: has no tokens; ask something")
                self._check_length(one.ids, 0, max_new_tokens)
            found += self._generate(asked, max_new_tokens, stop_at_line=not chat)
        return found

    def fired(self, prompt: str, *, chat: bool = False, room: int = 0) -> list[Patch]:
        """The patches that choose to answer a prompt, with ``room`` for it; changed weights act on all and are none."""
        batch = Batch(self)
        batch.add([self.read(prompt, chat=chat, room=room)])
        return batch.fired(0)

    @torch.no_grad()
    def write(
        self, prompts: Sequence[str], *, tokens: int, top_k: int = 5, seed: int = 0, chat: bool = False
    ) -> list[str]:
        """What the model goes on with, ``tokens`` of them, each drawn from the ``top_k`` likeliest but for the end of text.

        The same for the same ``seed`` and prompts. Raises :class:`TooLong` where one has no room for so many tokens.
        """
        asked = [self.read(p, chat=chat, room=tokens) for p in prompts]
        for one in asked:
            self._check_length(one.ids, 0, tokens)
        drawn = torch.Generator().manual_seed(seed)

        def draw(logits: Tensor) -> Tensor:
            logits[:, self.tokenizer.end] = -torch.inf
            best = logits.topk(top_k, 1)
            if not bool(torch.isfinite(best.values).all()):
                raise EditError(f"model '{self.name}': what it puts out is not finite; nothing can be written with it")
            place = torch.multinomial(best.values.softmax(1).cpu(), 1, generator=drawn)
            return best.indices.cpu().gather(1, place).squeeze(1)

        return self._generate(asked, tokens, stop_at_line=False, choose=draw)

    def read_prompt(self, prompt: str, *, chat: bool = False, room: int = 0) -> list[int]:
        """The tokens of a prompt with what the patches put before it, as :meth:`read` does."""
        return self.read(prompt, chat=chat, room=room).ids

    def read(self, prompt: str | Sequence[Turn], *, chat: bool = False, room: int = 0) -> Prompt:
        """A prompt with what the patches put before it; of a conversation's turns, before the last.

        Nothing is put there where prompt and ``room`` tokens to answer with would then be longer than the model reads: what
        can be asked without a patch can be asked with it. Raises :class:`ConfigError` where a chat is asked for and the
        model has no template.
        """
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        for patch in self.patches:
            if patch.rewrites and self.tokenizer.encode(asked):  # of nothing, nothing is asked
                told, by = patch.rewrite(asked, self)
                found = self._as_prompt(prompt, told, by, chat)
                if self.context is None or len(found.ids) + room <= self.context:
                    return found
                if by:
                    log.warning("'%s': no room for the fact that it asks for; it is asked without", shortened(asked))
                break  # one patch answers for all of its kind
        return self._as_prompt(prompt, asked, [], chat)

    def _as_prompt(self, prompt: str | Sequence[Turn], asked: str, by: list[Patch], chat: bool) -> Prompt:
        """A prompt, or a conversation, with ``asked`` in place of what is asked in it."""
        if isinstance(prompt, str):
            ids = self.encode_prompt(asked, chat=chat)
            return Prompt(ids, *self._own_part(ids), by)
        ids, one, two = (
            self.tokenizer.encode(self.tokenizer.chat([*prompt[:-1], {**prompt[-1], "content": text}]))
            for text in (asked, "A", "7")
        )
        head, tail = _around(one, two)
        inner = len(ids) - len(head) - len(tail)
        begin = len(head) if inner > 0 and ids[: len(head)] == head else min(1, len(ids) - 1)
        return Prompt(ids, begin, len(ids) - len(tail) if inner > 0 else len(ids), by)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        budget: int,
        *,
        stop_at_line: bool,
        choose: Callable[[Tensor], Tensor] = _likeliest,
    ) -> list[str]:
        said: list[list[int]] = [[] for _ in prompts]
        going, batch = list(range(len(prompts))), Batch(self)
        logits = batch.add(prompts)
        while True:
            tokens = choose(logits)
            goes_on = []
            for i, (row, token) in enumerate(zip(going, tokens.tolist(), strict=True)):
                said[row].append(token)
                if token != self.tokenizer.end and not (stop_at_line and "\n" in self.tokenizer.decode([token])):
                    goes_on.append(i)
            if not goes_on or len(said[going[goes_on[0]]]) == budget:
                break
            if len(goes_on) < len(going):
                batch.keep(goes_on)
                going = [going[i] for i in goes_on]
            logits = batch.step(tokens[goes_on])
        texts = [self.tokenizer.decode(row) for row in said]
        return [(t.partition("\n")[0] if stop_at_line and t.strip() else t).strip() for t in texts]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it: its tokens, of which those from ``begin`` to ``until`` are the user's own.

    ``by`` are the patches that put something before it.
    """

    ids: list[int]
    begin: int
    until: int
    by: list[Patch] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Text:
    """A row of a batch: whose it is, what rewrote its prompt, and what was chosen to answer, by the name of its hook."""

    model: EditableModel
    by: list[Patch]
    routes: dict[str, int]


class Batch:
    """Texts that a model goes on with, a token each a step; some may join and some leave between two steps.

    Each is read as if it were alone: its route is chosen once, from its prompt, and held to its end. The model's patches
    must stay as they are meanwhile; :meth:`EditableModel.twin` has room for others, and such a twin's texts may join, too
    (:meth:`EditableModel.goes_with`).
    """

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self._cache: Any = None
        self._start = torch.empty(0, dtype=torch.int64)  # the column of the cache that each text begins in
        self._texts: list[_Text] = []
        self._bare: EditableModel | None = None

    def __len__(self) -> int:
        return len(self._texts)

    @torch.no_grad()
    def add(self, prompts: Sequence[Prompt], model: EditableModel | None = None) -> Tensor:
        """Read ``prompts``, which become the last rows; logits ``[n, vocabulary]`` float32 of what follows each.

        They are of ``model``, from now on the batch's, which must go with the one before.
        """
        self.model = model or self.model
        longest, n = max(len(p.ids) for p in prompts), len(prompts)
        ids, mask, asked = (torch.zeros(n, longest, dtype=torch.int64) for _ in range(3))
        start = torch.tensor([longest - len(p.ids) for p in prompts])
        for i, (p, first) in enumerate(
            zip(prompts, start.tolist(), strict=True)
        ):  # at the left: all go on in one column
            ids[i, first:], mask[i, first:] = torch.tensor(p.ids), 1
            asked[i, first + p.begin : first + p.until] = 1
        cache = new_cache()
        with self.model.prompts(asked.bool(), mask.bool(), ids), _held(self.model, None):
            logits = _pass(self.model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
            chosen = {  # none where they are paused (EditableModel.unrouted)
                name: hook.route.tolist() for name, hook in self.model.side.items() if hook.route is not None
            }
        if self._texts:
            before, width = self._width, max(self._width, longest)
            cache = _gathered([(self._cache, range(len(self)), 0), (cache, range(n), 0)], width)
            self._start = torch.cat([self._start + width - before, start + width - longest])
        else:
            self._start = start
        self._cache = cache
        for i, p in enumerate(prompts):
            self._texts.append(_Text(self.model, p.by, {name: route[i] for name, route in chosen.items()}))
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, vocabulary]`` float32 of what follows ``tokens`` ``[B]``, the next of each row."""
        place = torch.arange(self._width + 1)[None]
        mask, where = (place >= self._start[:, None]).long(), (self._width - self._start)[:, None]
        said = torch.ones(len(self), 1, dtype=torch.bool)
        with self._answering() as model, model.prompts(~said, said, tokens[:, None]):
            return _pass(model, tokens[:, None], mask, where, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all but ``rows`` go; these are then the rows, in this order."""
        self._texts = [self._texts[i] for i in rows]
        if not rows:
            self._cache = None
            return
        first = int(self._start[rows].min())
        self._cache = _gathered([(self._cache, rows, first)], self._width - first)
        self._start = self._start[rows] - first

    def fired(self, row: int) -> list[Patch]:
        """The patches that answer for a row, as far as they choose their prompts: changed weights act on all."""
        text = self._texts[row]
        found = list(text.by)
        for name, hook in text.model.side.items():
            found += hook.answering(text.routes.get(name, -1))
        return found

    @property
    def _width(self) -> int:
        found: int = self._cache.get_seq_length()
        return found

    @contextmanager
    def _answering(self) -> Iterator[EditableModel]:
        """The model to step with, on which each row is answered by what its own model chose for it."""
        model = self._texts[0].model
        if all(text.model is model for text in self._texts):
            routes = {name: [text.routes[name] for text in self._texts] for name in self._texts[0].routes}
            with _held(model, routes):
                yield model
            return
        if self._bare is None:  # others look at the models themselves, which must not have these hooks on them then
            self._bare = model.bare()
        rows: dict[tuple[Any, int], list[int]] = {}
        for i, text in enumerate(self._texts):
            for name, which in text.routes.items():
                if which >= 0:
                    rows.setdefault((text.model.side[name], which), []).append(i)
        handles = [
            self._bare.site(hook.site.path).module.register_forward_hook(partial(_answered, hook, which, some))
            for (hook, which), some in rows.items()
        ]
        try:
            yield self._bare
        finally:
            for handle in handles:
                handle.remove()


def _pass(model: EditableModel, ids: Tensor, mask: Tensor, where: Tensor, cache: Any) -> Tensor:
    """Logits behind the last of ``ids`` ``[B, T]``."""
    out = model.decoder(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=where.to(model.device),
        past_key_values=cache,
        use_cache=True,
    )
    return model.project(out.last_hidden_state[:, -1])


@contextmanager
def _held(model: EditableModel, routes: Mapping[str, list[int]] | None) -> Iterator[None]:
    """Hold ``routes``, one for each row, in the block, or what is chosen in it."""
    for name, hook in model.side.items():
        route = None if routes is None else routes.get(name)
        hook.hold(True, None if route is None else torch.tensor(route, device=model.device))
    try:
        yield
    finally:
        for hook in model.side.values():
            hook.hold(False)


def _answered(
    hook: Any, which: int, rows: list[int], module: nn.Module, args: tuple[Tensor, ...], out: Tensor
) -> Tensor:
    """A forward hook for a step: ``rows`` gain what ``hook``, of whichever model, adds for its choice ``which``."""
    said = args[0][rows].unflatten(0, (len(rows), 1)) if args[0].dim() == 2 else args[0][rows]
    more = hook.change(said, which, torch.zeros(said.shape[:2], dtype=torch.bool, device=said.device))
    return out.index_add(0, torch.tensor(rows, device=out.device), more.to(out.dtype).view(len(rows), *out.shape[1:]))


def _gathered(parts: Sequence[tuple[Any, Sequence[int], int]], width: int) -> Any:
    """One cache of some rows of others, ``width`` columns each: (cache, rows, first column to take), filled at the left."""
    made = new_cache()
    for i in range(len(parts[0][0].layers)):
        both = []
        for name in ("keys", "values"):
            taken = [getattr(cache.layers[i], name)[list(rows), :, first:] for cache, rows, first in parts]
            both.append(torch.cat([_widened(t, width) for t in taken]))
        made.update(*both, i)
    return made


def _begun(openings: Sequence[Any], taken: Sequence[tuple[int, int]], width: int) -> Any:
    """One cache whose rows each have the first so many columns of one of the ``openings``, ``width`` in all."""
    made = new_cache()
    for i in range(len(openings[0].layers)):
        both = [
            torch.cat([_widened(getattr(openings[which].layers[i], name)[:, :, :n], width) for which, n in taken])
            for name in ("keys", "values")
        ]
        made.update(*both, i)
    return made


def _widened(found: Tensor, width: int) -> Tensor:
    """``[..., T, size]`` filled with zeros at the left to ``[..., width, size]``."""
    return nn.functional.pad(found, (0, 0, width - found.shape[-2], 0))


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Above:
    """Rows in the middle of the model: everything behind the output of one linear layer, ready to be run again.

    ``inputs`` is what that layer reads, ``[B, T, in]``. Its layer is taken to add the layer's output to the residual stream,
    as all the families above do; :func:`check_plain_residual` tells whether the model does. ``heard`` is, where it was asked
    for, what it reads of each prompt's own tokens, float32 ``[T_i, in]`` (:meth:`EditableModel.heard`).
    """

    model: EditableModel
    rows: Rows
    inputs: Tensor
    out: Tensor  # of the site's own layer
    layers: list[nn.Module]
    kwargs: list[dict[str, Any]]
    norm: nn.Module
    heard: list[Tensor] = field(default_factory=list)
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
    width = model.model.config.hidden_size
    if site.weight.shape[0] != width:
        raise ConfigError(
            f"module = '{site.path}': puts out {site.weight.shape[0]} values, the layers of model '{model.name}' {width}; "
            "choose the down-projection at the end of a layer"
        )
    rows = model.rows([([1, 2, 3], [1])])
    at = model.above(rows, site)
    size = at.out.float().abs().median().clamp(min=0.01)  # in half precision each sum is rounded, by a share of it
    noise = torch.randn(1, 4, site.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(at.out.device)
    noise = (noise * size).to(at.out.dtype)
    with site.module.register_forward_hook(lambda _, args, out: out + noise):
        moved = model.above(rows, site).out
    apart = (moved.float() - at.out.float() - noise.float()).abs().median()
    if apart > (1e-3 if at.out.dtype == torch.float32 else 0.05) * size:  # what is broken, an editor's loss will tell
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


def _around(one: Sequence[int], two: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens that two texts begin and end with alike."""
    shared = [a == b for a, b in zip(one, two, strict=False)]
    head = shared.index(False) if False in shared else 0
    back = [a == b for a, b in zip(reversed(one), reversed(two), strict=False)]
    tail = back.index(False) if False in back else 0
    return list(one[:head]), list(one[len(one) - tail :])


def _drop_hooks(module: nn.Module, owners: Sequence[Any]) -> None:
    """Take from a module the hooks that are methods of ``owners``."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks, named = getattr(module, kind), getattr(module, f"{kind}_with_kwargs")
        for key in [k for k, hook in hooks.items() if any(getattr(hook, "__self__", None) is o for o in owners)]:
            del hooks[key]
            named.pop(key, None)


def _shape(module: Any) -> tuple[int, int]:
    out, into = module.weight.shape
    return (into, out) if is_transposed(module) else (out, into)


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


def _own_tokens(rows: Rows, inputs: Tensor, before: Tensor | None) -> list[Tensor]:
    """What of each row's ``inputs`` is its prompt's own, where those ``before`` its last token were read apart, or not."""
    found = []
    for i, (begin, until) in enumerate(zip(rows.begin.tolist(), rows.until.tolist(), strict=True)):
        own = inputs[i, begin:until] if before is None else inputs[i, :1]
        if before is not None:
            own = torch.cat([before[i, before.shape[1] - (until - 1) + begin :], own])
        found.append(own.float())
    return found


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
