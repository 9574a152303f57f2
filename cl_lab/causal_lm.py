"""Causal language models as classifiers of the laboratory: prompt in, logits of the answer's tokens out.

The same parts as for pictures, so that everything built on them serves: a backbone of stages that can be cut behind any
layer (frozen prefixes computed once, REMIND's codes), and a head, here the projection to the vocabulary, which runs at
the answer's places only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from heapq import heapreplace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.adapters import LowRank, adapted_layers, is_linear, is_transposed
from cl_lab.errors import ConfigError, nearest
from cl_lab.files import writing_tensors
from cl_lab.hub import family_logits, load_causal_lm, short_text, shortened, tiny_causal_lm
from cl_lab.knobs import knob
from cl_lab.models import Backbone, Classifier, Head, Stage
from cl_lab.module_paths import matching
from cl_lab.protocols import ModelSpec
from cl_lab.records import FlatLatent, Stream

log = logging.getLogger("cl_lab")

_TINY = "tiny"
_TARGETS = "model.lora_targets"
_OTHERWISE = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)  # of parts that want to be called so
_WORTH = 0.85  # the share of a batch's places up to which packing is worth it
_ROWS = 32  # of a decoder that is run whole, in a pass, where its rows are multiplied by their answers


class CausalBackbone(Backbone):
    """The decoder of a causal language model: ``[B, P + A]`` int32 tokens → ``[B, A', width]`` where the answer is said.

    A row holds a prompt that ends at column P and an answer that begins there (:class:`~cl_lab.records.Stream`); places
    without a token are masked and take no position. Columns that no row of a batch uses are cut off, so ``A'`` is one more
    than the longest answer in the batch, but at most A: what it says at place j follows from the prompt and j tokens. In
    training on a CPU, texts of unlike length pass the layers one behind another, not padded (:class:`_Packing`).

    Behind a prompt there may be m answers of A columns each, ``[B, P + m·A]``, none of which sees another: that gives
    ``[B, m·A', width]`` for little more than the price of one.

    Behind a stage its latents are flat, ``[B, L·D + L]`` float32: the hidden state of each of the L places (zero where there
    is no token), then the mask, in ones and zeros.

    With a :attr:`prefix`, soft vectors stand before each prompt as if they were its first tokens: every token sees them, and
    takes its position behind them. ``room`` is how many more places than the stream's own the model reads; ``None``: any.

    ``layered`` says whether the decoder's layers, run one after another, give what the decoder does; ``None``: it is found
    out, on a short text. Where they do not (Granite scales its embeddings, Gemma 3 turns its layers in two ways), and where
    a layer's window is shorter than the texts, the decoder is run whole: a single stage, and one answer after another.
    """

    def __init__(
        self, decoder: Any, prompt: int, answer: int, *, room: int | None = None, layered: bool | None = None
    ) -> None:
        super().__init__()
        self.training = bool(decoder.training)  # else a backbone put around a served model would be in training
        self.model: nn.Module = decoder
        self.width = int(decoder.config.hidden_size)
        self._prompt, self._answer, self._room = prompt, answer, room
        self.prefix: nn.Module | None = None
        """What stands before each prompt: ``(h, read, t)`` → ``(soft, there)``, see :meth:`take_prefix`."""
        self._read: _Prompts | None = None
        self._remembers: bool | None = None
        # In a row of twelve times that, a layer would spend as much on which place sees which as on its projections.
        self._row = int(min(self.width // 2, _window(decoder.config)))
        parts = ("embed_tokens", "layers", "norm", "rotary_emb")  # of Llama, Qwen, Mistral and their relatives
        known = all(hasattr(decoder, p) for p in parts) and prompt + answer <= _window(decoder.config)
        self._cut_into(len(decoder.layers) if known else None)
        if known and not (self._gives_the_same() if layered is None else layered):
            self._cut_into(None)

    def _cut_into(self, layers: int | None) -> None:
        """Have a stage for each of so many layers, or a single one."""
        self._layers = layers
        self._stages = 1 if layers is None else layers + 2
        self.flat_latents = {name: FlatLatent(self.width, marks=1) for name, _ in self.stages()[:-1]}

    @property
    def layered(self) -> bool:
        """Whether layers are run one after another, not the decoder whole."""
        return self._layers is not None

    def _gives_the_same(self) -> bool:
        """Whether layer by layer comes what the decoder itself gives, for a short text with two answers."""
        x = short_text(self.model, 8)
        mask = torch.ones_like(x, dtype=torch.bool)
        mask[:, 0] = False
        return self._alike(lambda: (self._whole(x, mask, 4, 2)[mask], self._some(x, mask, 4, 2, 0, None)[mask]))

    def _alike(self, two: Callable[[], tuple[Tensor, Tensor]]) -> bool:
        """Whether two ways ``[N, width]`` through the decoder's first layers are ways, and give the same up to rounding."""
        decoder: Any = self.model
        training = [module for module in decoder.modules() if module.training]
        decoder.eval()
        try:
            with torch.no_grad(), shortened(decoder):
                one, other = two()
        except _OTHERWISE:
            return False
        finally:
            for module in training:
                module.training = True
        rounding = 1e-3 if one.dtype == torch.float32 else 0.05
        apart = (other.float() - one.float()).norm(dim=1)
        return bool((apart <= rounding * one.float().norm(dim=1)).all())

    def stages(self) -> list[Stage]:
        """``model.embed_tokens``, each ``model.layers.…`` and ``model.norm``; of other families only ``model``, whole."""
        if self._layers is None:
            names = ["model"]
        else:
            names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(self._layers)), "model.norm"]
        return [(name, partial(self.run, first=i, last=i + 1)) for i, name in enumerate(names)]

    @property
    def conditional(self) -> bool:
        """Whether there is a prefix."""
        return self.prefix is not None

    def take_prefix(self, prefix: nn.Module, longest: int) -> None:
        """Put up to ``longest`` soft vectors before each prompt from now on, those that ``prefix`` gives for it.

        ``prefix`` is called with the embeddings ``h`` ``[B, P', width]`` of the prompts' columns, ``read`` ``[B, P']`` bool,
        which of them hold a token, and the task labels ``t`` ``[B]``; it gives ``soft`` ``[B, L, width]`` and ``there``
        ``[B, L]`` bool, which of these are in their row. Raises :class:`ConfigError` where there is one already, or no room.
        """
        if self.prefix is not None:
            raise ConfigError("strategy chain: two strategies put soft prompts before each text; keep one of them")
        if self._room is not None and longest > self._room:
            raise ConfigError(
                f"soft prompts of {longest} places: behind the stream's texts the model has {self._room} places left; lower "
                "their length or number, or scenario.max_prompt"
            )
        if self._prompt + self._answer + longest > _window(self.model.config):
            self._cut_into(None)
        self.prefix = prefix

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """``[B, P + m·A]`` tokens → ``[B, m·A', width]``; ``t`` ``[B]`` for the prefix, where there is one."""
        if self._read is not None and self.prefix is None:
            try:
                return self._said_behind(x, self._read)
            except _NotKept:  # by a layer that the short trial did not come to
                self._remembers, self._read = False, None
        return self._said(x, x >= 0, 0, t)

    @contextmanager
    def remembering_prompts(self) -> Iterator[None]:
        """Within, :meth:`forward` reads a prompt once: when it comes again, only what stands behind it is read.

        Each layer's attention then takes the prompt's keys and values from before, which is how texts are written token by
        token. It forgets them where a weight is another or was changed, but for what is changed through ``.data``, in a
        buffer or by a hook: nothing may be, within. Without gradients. Where the decoder runs whole, has a prefix, or has an
        attention that does not ask for what it read before, all is as without.
        """
        if self._remembers is None:
            self._remembers = self.layered and self._remembers_the_same()
        if self._remembers:
            self._read = _Prompts()
        try:
            yield
        finally:
            self._read = None

    def _remembers_the_same(self) -> bool:
        """Whether a short prompt with two answers gives the same read at once as read one after the other."""

        def both() -> tuple[Tensor, Tensor]:
            text = short_text(self.model, self._prompt + 2 * self._answer)  # none where the layers below are gone
            text[:, self._prompt + self._answer + 1 :] = -1  # answers of different lengths
            if self._prompt > 1:
                text[:, 0] = -1
            read = _Prompts()
            self._said_behind(text[:, : self._prompt + self._answer], read)
            return self._said(text, text >= 0, 0).flatten(0, 1), self._said_behind(text, read).flatten(0, 1)

        return self._alike(both)

    def _said_behind(self, x: Tensor, read: _Prompts) -> Tensor:
        """:meth:`forward`, of prompts that are in ``read`` or put there; :class:`_NotKept` where attention did not."""
        tokens, answers = x.tensor_split((self._prompt,), 1)
        layers: Any = self.model.layers
        if not read.find(tokens, self):
            start = int((tokens >= 0).any(0).int().argmax())
            mask = tokens[:, start:] >= 0
            with read.taking(tokens, mask, self):
                h = self._some(tokens[:, start:], mask, mask.shape[1], 0, 0, None, read)
            read.keep(h[:, -1:], len(layers))
        given = answers.unflatten(1, (-1, self._answer))
        m, (_, behind) = given.shape[1], self._extent(x >= 0)
        said = read.of_rows(read.end)[:, None].expand(-1, m, -1, -1)
        if behind:
            given = given[:, :, :behind].flatten(1, 2)
            before = read.of_rows(read.mask)
            mask = torch.cat([before, given >= 0], 1)
            h = self._some(given, mask, before.shape[1], behind, 0, None, read)
            said = torch.cat([said, h.unflatten(1, (m, behind))], 2)
        return said.flatten(1, 2)

    def columns(self, x: Tensor) -> Tensor:
        """Which columns of ``x`` ``[B, P + m·A]`` the layers read in :meth:`forward`, int64 ``[T]``; without a prefix.

        Where answers are read one after another, those of the first.
        """
        start, behind = self._extent(x >= 0)
        m = (x.shape[1] - self._prompt) // self._answer if self.layered else 1
        said = torch.arange(m)[:, None] * self._answer + torch.arange(behind)
        return torch.cat([torch.arange(start, self._prompt), self._prompt + said.flatten()])

    def _extent(self, mask: Tensor) -> tuple[int, int]:
        """The first column of ``mask`` ``[B, P + m·A]`` with a token, and how many columns of each answer are read."""
        given = mask[:, self._prompt :].unflatten(1, (-1, self._answer))
        start = int(mask[:, : self._prompt].any(0).int().argmax())
        return start, min(self._answer - 1, int(given.any(0).any(0).sum()))

    def run(self, x: Tensor, first: int, last: int | None) -> Tensor:
        """Stages ``first`` … ``last − 1``: tokens or flat latents in, flat latents or (where it is through) features out."""
        h, mask = (x, x >= 0) if first == 0 else self._unpacked(x)
        if last is None or last == self._stages:
            return self._said(h, mask, first)
        unused = int(mask[:, : self._prompt].any(0).int().argmax())  # columns before the longest prompt
        read = mask[:, unused:]
        h = self._some(h[:, unused:], read, self._prompt - unused, self._answer, first, last).float() * read[:, :, None]
        return torch.cat([F.pad(h, (0, 0, unused, 0)).flatten(1), mask.to(h.dtype)], 1)

    def _unpacked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = FlatLatent(self.width, marks=1).rows(x.shape[1])
        h, mask = x.split([places * self.width, places], 1)
        return h.unflatten(1, (places, self.width)).to(next(self.parameters()).dtype), mask > 0.5

    def _said(self, h: Tensor, mask: Tensor, first: int, t: Tensor | None = None) -> Tensor:
        """The last stages, on the columns that matter: prompts from the first token on, answers but for their last."""
        decoder: Any = self.model
        start, behind = self._extent(mask)
        (prompt, answers), (read, given) = (v.tensor_split((self._prompt,), 1) for v in (h, mask))
        answers, given = (v.unflatten(1, (-1, self._answer)) for v in (answers, given))
        m = given.shape[1]
        h, mask = (
            torch.cat([v[:, start:], w[:, :, :behind].flatten(1, 2)], 1) for v, w in ((prompt, answers), (read, given))
        )
        p = self._prompt - start
        if self.prefix is not None:
            h = decoder.get_input_embeddings()(h.clamp(min=0).long())
            soft, there = self.prefix(h[:, :p], mask[:, :p], t)
            h, mask = torch.cat([soft.to(h.dtype), h], 1), torch.cat([there, mask], 1)
            p, first = p + soft.shape[1], 1
        h = self._some(h, mask, p, behind, first, None) if self.layered else self._whole(h, mask, p, behind)
        begun = h[:, None, p - 1 : p].expand(-1, m, -1, -1)
        return torch.cat([begun, h[:, p:].unflatten(1, (m, behind))], 2).flatten(1, 2)

    def _some(
        self,
        h: Tensor,
        mask: Tensor,
        prompt: int,
        answer: int,
        first: int,
        last: int | None,
        read: _Prompts | None = None,
    ) -> Tensor:
        """Some stages, of rows with answers of ``answer`` columns each from column ``prompt`` on.

        ``h`` are all columns of ``mask``, or those behind the prompts that ``read`` holds.
        """
        decoder: Any = self.model
        n = h.shape[1]
        last = self._stages if last is None else last
        layers = decoder.layers[max(first - 1, 0) : max(last - 1, 0)]
        packing = None
        # Editors and estimators of curvature listen to the layers of a model that is not in training, row by row; and on
        # other devices it would take longer to learn how long the texts are than it saves.
        if self.training and len(layers) and read is None and h.device.type == "cpu":
            packing = _Packing.of(mask, prompt, self._row)
        if packing is not None:
            h = packing.packed(h)
        if first == 0:
            h = decoder.embed_tokens(h.clamp(min=0).long())
        if len(layers):
            places, column = _places(mask, prompt, answer), torch.arange(mask.shape[1], device=h.device)[None]
            if packing is None:
                places, seen = places[:, -n:], _seen(mask, column, prompt, answer)[:, :, -n:]
            else:
                places, mask, column = (packing.packed(v) for v in (places, mask, column.expand_as(mask)))
                seen = _seen(mask, column, prompt, answer, packing.row)
            turned = decoder.rotary_emb(h, position_ids=places)
            past = {} if read is None else {"past_key_values": read}
            for layer in layers:
                h = layer(h, attention_mask=seen, position_ids=places, position_embeddings=turned, **past)
        if last == self._stages:
            h = decoder.norm(h)
        return h if packing is None else packing.apart(h)

    def _whole(self, x: Tensor, mask: Tensor, prompt: int, answer: int) -> Tensor:
        """The whole decoder, one answer after another: what a family does with a mask of our own is not known.

        ``x`` are tokens ``[B, T]``, or their embeddings ``[B, T, width]``.
        """
        how, x = ("inputs_embeds", x) if x.is_floating_point() else ("input_ids", x.clamp(min=0).long())
        n, m = len(x), (mask.shape[1] - prompt) // answer if answer else 1

        def apart(v: Tensor) -> Tensor:
            """Each answer behind its prompt in a row of its own: the first answers of all rows, then the second."""
            return torch.cat([torch.cat([v[:, :prompt], one], 1) for one in v[:, prompt:].chunk(m, 1)])

        x, mask = apart(x), apart(mask)
        said = []
        for rows in torch.arange(n * m, device=mask.device).split(max(n, _ROWS)):
            read = mask[rows]
            how_placed = {"attention_mask": read.long(), "position_ids": _places(read, prompt, answer)}
            said.append(self.model(**{how: x[rows]}, **how_placed, use_cache=False).last_hidden_state)
        every = torch.cat(said).unflatten(0, (m, n))
        return torch.cat([every[0, :, :prompt], *every[:, :, prompt:]], 1)


class _Packing:
    """Where the places of a batch ``[B, T]`` go when its texts stand one behind another in rows, instead of padded.

    A text sees itself alone, at its own positions, so that each says what it says by itself; places before its prompt are
    left out.
    """

    def __init__(self, at: Tensor, shape: tuple[int, int]) -> None:
        """``at`` ``[B', T']``: which of the ``B·T`` places stands there, or −1 for none."""
        self._at, self._shape, self._real = at, shape, at >= 0
        self.row = torch.where(self._real, at // shape[1], -1)
        """Which text each place belongs to, ``[B', T']``, −1 for none."""

    @classmethod
    def of(cls, mask: Tensor, prompt: int, length: int) -> _Packing | None:
        """Texts with tokens where ``mask`` ``[B, T]`` says, in rows of about ``length`` or the longest's; if it saves much.

        The longest first, each goes to the row that has the least (Graham 1969, "Bounds on Multiprocessing Timing
        Anomalies").
        """
        kept = mask.clone()
        kept[:, prompt - 1 :] = True  # all of the answers, and where they begin
        if kept.sum() > _WORTH * mask.numel():
            return None
        lengths = kept.sum(1).tolist()
        rows: list[list[int]] = [[] for _ in range(max(1, sum(lengths) // max(length, *lengths)))]
        filled = [(0, row) for row in range(len(rows))]
        for text in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            has, row = filled[0]
            rows[row].append(text)
            heapreplace(filled, (has + lengths[text], row))
        if len(rows) * max(filled)[0] > _WORTH * mask.numel():
            return None
        texts = kept.flatten().nonzero()[:, 0].split(lengths)
        at = [torch.cat([texts[text] for text in row]) for row in rows]
        return cls(nn.utils.rnn.pad_sequence(at, batch_first=True, padding_value=-1), (len(mask), mask.shape[1]))

    def packed(self, v: Tensor) -> Tensor:
        """``[B, T, …]`` → ``[B', T', …]``, zero where nothing stands."""
        some = v.flatten(0, 1)[self._at.clamp(min=0)]
        packed: Tensor = some * self._real.unflatten(1, (-1, *[1] * (v.dim() - 2)))
        return packed

    def apart(self, h: Tensor) -> Tensor:
        """``[B', T', width]`` → ``[B, T, width]``, zero where nothing stood."""
        flat = h.new_zeros(math.prod(self._shape), h.shape[2])
        back: Tensor = flat.index_copy(0, self._at[self._real], h[self._real]).unflatten(0, self._shape)
        return back


class _NotKept(LookupError):
    """A layer's attention did not say what it read."""


class _Prompts:
    """Prompts that were read, and each layer's keys and values of them: to attention, a cache of Transformers'."""

    def __init__(self) -> None:
        self.mask = self.end = self._tokens = torch.empty(0)
        self._states: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: list[tuple[Tensor, int]] = []
        self._rows: Tensor | None = None
        self._taking = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: a copy of the model is asked other things, and remembers for nobody."""
        return

    def find(self, tokens: Tensor, model: nn.Module) -> bool:
        """Whether prompts ``[B, P]`` were read, all of them by the same weights; :meth:`of_rows` are theirs then."""
        if not self._states or not _same_weights(self._weights, _versions(model)):
            return False
        self._rows = None
        if torch.equal(tokens, self._tokens):
            return True
        same = (tokens[:, None] == self._tokens).all(2)
        self._rows = same.int().argmax(1)
        return bool(same.any(1).all())

    @contextmanager
    def taking(self, tokens: Tensor, mask: Tensor, model: nn.Module) -> Iterator[None]:
        """Within, what attention reads is kept, of prompts ``tokens`` ``[B, P]`` by ``mask`` ``[B, P']``."""
        self._tokens, self.mask, self._weights = tokens, mask, _versions(model)
        self._states, self._rows, self._taking = {}, None, True
        try:
            yield
        finally:
            self._taking = False

    def keep(self, end: Tensor, layers: int) -> None:
        """Keep what the last of ``layers`` said of the prompts' last token, ``[B, 1, width]``; all must have been taken."""
        if len(self._states) != layers:
            raise _NotKept(f"{len(self._states)} of {layers} layers told what they read")
        self.end = end

    def of_rows(self, kept: Tensor) -> Tensor:
        """The rows of ``kept`` that belong to the prompts that were asked for last."""
        return kept if self._rows is None else kept[self._rows]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What layer ``layer_idx`` attends to, ``[B, heads, T, width]`` each: behind prompts, these and what it says now."""
        if self._taking:
            self._states[layer_idx] = keys, values
            return keys, values
        before = (self.of_rows(kept) for kept in self._states[layer_idx])
        keys, values = (torch.cat(two, 2) for two in zip(before, (keys, values), strict=True))
        return keys, values


def _versions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Which weights ``model`` has, and how often they were changed; held, so that no other comes to lie in their place."""
    return [(p.detach(), p._version) for p in model.parameters()]


def _same_weights(one: Sequence[tuple[Tensor, int]], other: Sequence[tuple[Tensor, int]]) -> bool:
    return len(one) == len(other) and all(
        p.data_ptr() == q.data_ptr() and v == w for (p, v), (q, w) in zip(one, other, strict=True)
    )


def _window(config: Any) -> float:
    """How many places each token of a text sees, itself among them, in the layer of a decoder that sees the fewest.

    Of layers that see in another way it is 0: they hand on what they read, and with it one answer to the next.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds == {"full_attention"}:
        return float("inf")
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return 0
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size is not None), default=float("inf"))


def _seen(mask: Tensor, column: Tensor, prompt: int, answer: int, row: Tensor | None = None) -> Tensor:
    """Which places each place sees, ``[B, 1, T, T]`` bool: tokens before it of its own text, but of no other answer.

    ``column`` ``[B or 1, T]`` is where in its text a place stands, and ``row`` ``[B, T]`` in which, where a row has several.
    """
    of = torch.where(column < prompt, -1, (column - prompt) // max(answer, 1))  # which answer, or the prompt
    seen = (
        (column[:, :, None] >= column[:, None])
        & ((of[:, None] == -1) | (of[:, :, None] == of[:, None]))
        & mask[:, None]
    )
    if row is not None:
        seen &= row[:, :, None] == row[:, None]
    # Every place may see itself, or a place without a token would have nothing to attend to.
    return (seen | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device))[:, None]


def _places(mask: Tensor, prompt: int, answer: int) -> Tensor:
    """Each token's place ``[B, T]`` in its text: behind those before it, of other answers none."""
    read = mask[:, :prompt].cumsum(1)
    if answer:
        given = mask[:, prompt:].unflatten(1, (-1, answer)).cumsum(2).flatten(1, 2) + read[:, -1:]
        read = torch.cat([read, given], 1)
    return (read - 1).clamp(min=0)


class VocabularyHead(Head):
    """The model's own projection to its vocabulary; it may share its weight with the embedding of tokens.

    ``config`` is the model's, which says what its family does to the logits (:func:`~cl_lab.hub.family_logits`).
    """

    def __init__(self, projection: nn.Linear, config: Any) -> None:
        nn.Module.__init__(self)
        self.linear = projection
        self._config = config

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """Logits ``[B, A', vocabulary]`` of ``h`` ``[B, A', width]``; ``t`` is ignored."""
        return family_logits(self._config, self.linear(h))


@dataclass
class CausalLM(ModelSpec):
    """A causal language model that answers prompts, for streams of texts: adapted by LoRA, or trained whole.

    ``weights`` is a model that ``cl-lab fetch model`` knows (``smollm2-135m``), a local folder, a GGUF file, an id of the
    Hugging Face hub, or ``tiny``: a random Llama over the stream's own vocabulary, to be trained from the beginning
    (``adapt=full``). ``layers``, ``width`` and ``heads`` are its size (2, 32 and 2 where they are not given); other weights
    have theirs. Nothing is unpickled and no code that comes with a model is run, unless ``--trust-remote-code`` is typed.

    LoRA (Hu et al. 2022, arXiv 2106.09685) adds ``(α/r)·BA`` to each target's weight; A and B alone are trained. A target is
    the last part of a module's path (``q_proj``) or a whole path with wildcards (``model.layers.[0-9].self_attn.*_proj``),
    matched part by part. Where embedding and head are one tensor, freezing the one freezes the other.
    """

    parts: ClassVar[tuple[str, ...]] = ("prompt", "answer")

    weights: str = knob("smollm2-135m", "fetched model, local folder, GGUF file, hub id, or tiny: a random model")
    layers: int | None = knob(None, "weights=tiny: number of layers; null: 2", ge=1)
    width: int | None = knob(None, "weights=tiny: length of a hidden state; null: 32", ge=2)
    heads: int | None = knob(None, "weights=tiny: heads of attention; null: 2", ge=1)
    adapt: Literal["lora", "full"] = knob("lora", "train low-rank adapters, or every weight")
    lora_rank: int = knob(8, "r, the rank of each adapter", ge=1)
    lora_alpha: float = knob(16.0, "α: an adapter counts α/r times", gt=0)
    lora_dropout: float = knob(0.0, "share of an adapter's inputs dropped in training", ge=0, lt=1)
    lora_targets: list[str] = knob(["q_proj", "v_proj"], "modules to adapt, by structure", min_length=1)
    dtype: Literal["float32", "bfloat16"] = knob("float32", "what the weights are held in")
    gradient_checkpointing: bool = knob(False, "compute activations again in the backward pass instead of keeping them")
    frozen: str | None = knob(
        None,
        "stage up to which nothing is trained (model.layers.19): samples pass it once, and strategies see what comes out",
    )
    keep_latents: bool = knob(False, "keep what the frozen layers make on disk ($CL_LAB_CACHE/latents) for other runs")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"weights": _TINY}

    def __post_init__(self) -> None:
        for name in self._size():
            if self.weights != _TINY:
                raise ConfigError(
                    f"{name} = {getattr(self, name)}: the model '{self.weights}' has a size of its own; leave it out, or "
                    f"set weights={_TINY}"
                )

    def _size(self) -> dict[str, int]:
        """What is given of a tiny model's size."""
        return {n: v for n in ("layers", "width", "heads") if (v := getattr(self, n)) is not None}

    def build(self, stream: Stream) -> Classifier:
        """The model with its adapters.

        Raises :class:`ConfigError` for a stream that is not of texts, a model that is not there, a LoRA target that matches
        nothing or a stage the model has not, and :class:`~cl_lab.errors.DataError` for files that hold something else.
        """
        if stream.objective != "language" or stream.answers is None:
            raise ConfigError(
                f"model 'causal-lm' answers prompts, but stream '{stream.name}' is a {stream.objective}; use scenario "
                "text-stream, or another model (cl-lab list models)"
            )
        highest = int(stream.answers.max())
        model: Any
        if self.weights == _TINY:
            vocabulary = stream.vocabulary
            if vocabulary is None:
                vocabulary = max(highest, *(int(e.test.x.max()) for e in stream.experiences)) + 1
            # Editors read more than the stream's own texts: what they put before a prompt, and prompts of their own.
            model = tiny_causal_lm(vocabulary, context=max(512, sum(stream.input_shape)), **self._size())
            model = model.to(getattr(torch, self.dtype))
        else:
            model = load_causal_lm(self.weights, dtype=self.dtype)
        vocabulary, longest = model.get_output_embeddings().weight.shape[0], sum(stream.input_shape)
        if highest >= vocabulary:
            raise ConfigError(
                f"model.weights = '{self.weights}': has {vocabulary} tokens, but stream '{stream.name}' holds token "
                f"{highest}; set scenario.tokenizer to the model's own"
            )
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and longest > context:
            raise ConfigError(
                f"model.weights = '{self.weights}': reads {context} tokens, but prompt and answer of stream '{stream.name}' "
                f"take up to {longest}; lower scenario.max_prompt"
            )
        if self.frozen is not None and stream.reads_on:
            raise ConfigError(
                f"model.frozen = '{self.frozen}': texts pass these layers once, but scoring '{stream.scoring}' reads on "
                "from answers; set scenario.scoring=first-token or opening, or leave model.frozen out"
            )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.adapt == "full" and self.dtype == "bfloat16":
            log.warning(
                "model.dtype = 'bfloat16' with adapt = 'full': what a step adds to a weight is lost where it is less than a "
                "256th of it, and at small learning rates most of it is; take dtype=float32, with engine.precision=bf16 for "
                "its speed"
            )
        model.requires_grad_(self.adapt == "full")
        if self.adapt == "lora":
            add_adapters(
                model, self.lora_targets, rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout
            )
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        prompt, answer = (stream.layout[part][0] for part in self.parts)
        room = None if context is None or self.weights == _TINY else context - longest
        built = Classifier(
            CausalBackbone(model.base_model, prompt, answer, room=room),
            VocabularyHead(model.get_output_embeddings(), model.config),
        )
        built.freeze_up_to(self.frozen, keep=self.keep_latents)
        if self.frozen is not None and tied:
            built.head.linear.weight.requires_grad_(False)
        return built


def add_adapters(
    model: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0, place: str = _TARGETS
) -> None:
    """Give the linear layers of ``model`` that ``targets`` name (:func:`linear_modules`) low-rank adapters, by PEFT.

    ``A`` is drawn from torch's global generator, ``B`` is zero; these are what wants a gradient then. They are float32 where
    the model is held in less, as PEFT's own ``get_peft_model`` has them: small steps would be rounded away.
    """
    from peft import LoraConfig, inject_adapter_in_model

    paths = linear_modules(model, targets, place)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=paths,
        fan_in_fan_out=any(is_transposed(model.get_submodule(path)) for path in paths),
    )
    inject_adapter_in_model(config, model)
    for layer in adapted_layers(model).values():
        for p in (model.get_parameter(layer.a), model.get_parameter(layer.b)):
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))


def save_adapters(adapters: Mapping[str, LowRank], model: nn.Module, folder: Path, *, base: str = "") -> None:
    """Write ``adapters`` (:meth:`~cl_lab.protocols.Strategy.adapters`) of a causal-lm ``model`` as one that PEFT reads.

    ``PeftModel.from_pretrained(plain, folder)``, with ``plain`` the causal language model without adapters, then gives the
    logits of the run. The factors stand beside each other in one adapter of their common rank R; ``lora_alpha`` is R too,
    so PEFT's scaling is exactly 1 and every weight is inside ``B``. A layer of lower rank is filled up with zeros. ``base``
    names the plain model in ``adapter_config.json``.

    Raises :class:`ConfigError` where there is no adapter or the model is no causal-lm, and :class:`OSError` as writing does.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, CausalBackbone) or not adapters:
        raise ConfigError(
            f"export: {type(model).__name__} has no low-rank adapters to write; train model causal-lm with adapt: lora"
        )
    decoder: Any = backbone.model
    inside = {path: f"{decoder.base_model_prefix}.{path.removeprefix('backbone.model.')}" for path in adapters}
    rank = max(len(change.a) for change in adapters.values())
    tensors: dict[str, Tensor] = {}
    for path, change in adapters.items():
        more, name = rank - len(change.a), f"base_model.model.{inside[path]}"
        tensors[f"{name}.lora_A.weight"] = F.pad(change.a, (0, 0, 0, more)).contiguous()
        tensors[f"{name}.lora_B.weight"] = F.pad(change.b, (0, more)).contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(inside.values()),
        fan_in_fan_out=any(is_transposed(model.get_submodule(f"{path}.base_layer")) for path in adapters),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with writing_tensors():
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def save_prompt(model: nn.Module, folder: Path, *, base: str = "") -> None:
    """Write the soft prompt of a causal-lm ``model`` as one of prompt tuning that PEFT reads.

    ``PeftModel.from_pretrained(plain, folder)`` then answers a text of the newest task as the model does. PEFT puts the
    prompt before all columns of a batch, so texts of one batch must be equally long, or be given ``position_ids``. ``base``
    is as in :func:`save_adapters`. Raises :class:`ConfigError` where the prompt depends on the text, or there is none yet,
    and :class:`OSError` as writing does.
    """
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    backbone: Any = getattr(model, "backbone", None)
    newest = getattr(backbone.prefix, "newest", None)
    prompt = None if newest is None else newest()
    if prompt is None or not len(prompt):
        raise ConfigError(
            "export: the run has no prompt that stands before every text of a task, which is what PEFT reads; export a run "
            "of progressive-prompts that has learnt a task, or of a strategy with low-rank adapters"
        )
    config = PromptTuningConfig(
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"prompt_embeddings": prompt.detach().to("cpu", torch.float32).contiguous()}
    with writing_tensors():
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def linear_modules(model: nn.Module, patterns: Sequence[str], place: str = _TARGETS) -> list[str]:
    """Paths of the linear layers that ``patterns`` name: the last part of a path, or a whole path with wildcards.

    Raises :class:`ConfigError` for a pattern that names none; ``place`` is the knob that it stood in.
    """
    paths = [n for n, m in model.named_modules() if is_linear(m) and m is not _head_of(model)]
    found: dict[str, None] = {}
    for pattern in patterns:
        by_last = [path for path in paths if matching(pattern, [path.rpartition(".")[2]])]
        named = by_last or matching(pattern, paths)
        if not named:
            there = sorted({path.rpartition(".")[2] for path in paths})
            raise ConfigError(
                f"{place}: '{pattern}' matches no linear layer{nearest(pattern, there)}; there are {', '.join(there)}"
            )
        found |= dict.fromkeys(named)
    return list(found)


def _head_of(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
