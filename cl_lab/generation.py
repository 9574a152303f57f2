"""Answers to many at once: one thread steps all texts in progress, which join and leave between steps.

Each text belongs to a model, which is the state of a deployment that was in force when it was asked for. So an edit is
another state: what has begun ends on the one it began with, and nothing waits for the change but the change. Texts are
stepped together as one :class:`~cl_lab.editable.Batch`, those of different states, too, where these have the same weights
and differ only in what answers for some prompts: else each change would have the weights read twice a step for a while.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cl_lab.editable import Batch, EditableModel, Prompt
from cl_lab.errors import UserError
from cl_lab.hub import Tokenizer, Turn
from cl_lab.patches import Patch

log = logging.getLogger("cl_lab")

_UNDECIDED = 16
"""Tokens that are held back, at most, because they may be the beginning of a character."""

_COLD = 1e-4
"""Below this temperature nothing is drawn: the likeliest token has all of the probability, or as good as all."""


@dataclass(frozen=True)
class Piece:
    """Some more of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """An answer's end: ``reason`` is ``stop`` or ``length``, ``fired`` the patches that chose to answer."""

    reason: str
    prompt_tokens: int
    tokens: int
    fired: list[Patch]


@dataclass(frozen=True)
class Failed:
    """No answer, or not all of it: an HTTP ``status`` and one line."""

    status: int
    message: str


Told = Callable[[Piece | Done | Failed], None]
"""Called from the engine's thread; the last call is with :class:`Done` or :class:`Failed`."""


@dataclass(eq=False)
class Ask:
    """What is asked of ``model``: a text to go on with, a user's turn (``chat``), or the turns of a conversation.

    ``temperature`` 0 takes the likeliest token; else one is drawn among the likeliest that have ``top_p`` of the
    probability together, the same for the same ``seed``. ``stop`` are texts before which the answer ends.
    """

    model: EditableModel
    prompt: str | Sequence[Turn]
    told: Told
    chat: bool = False
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    deadline: float = float("inf")
    """By :func:`time.monotonic`."""
    gone: bool = False
    """Set it, and the answer is given up at the next step."""


class Full(Exception):
    """The queue has no room."""


@dataclass(eq=False)
class _Row:
    ask: Ask
    prompt_tokens: int
    speech: Speech
    drawn: torch.Generator | None
    last: int = 0
    tokens: int = 0


@dataclass(eq=False)
class _Group:
    batch: Batch
    rows: list[_Row] = field(default_factory=list)


class Engine:
    """The thread that answers. At most ``rows`` texts are in progress and ``queue`` more wait; begin with :meth:`start`.

    A turn of it reads new prompts of about ``prompt_tokens`` tokens together, so that those in progress do not wait long.
    """

    def __init__(self, *, rows: int = 16, queue: int = 64, prompt_tokens: int = 512, threads: int = 1) -> None:
        self.rows, self.queue, self.prompt_tokens, self.threads = rows, queue, prompt_tokens, threads
        self._waiting: deque[Ask] = deque()
        self._groups: list[_Group] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cl-lab engine", daemon=True)
        self.steps = self.step_seconds = 0.0

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, ask: Ask) -> None:
        """Take a question. Raises :class:`Full` where too many wait, or the engine is about to stop."""
        with self._changed:
            if self._stopping or len(self._waiting) >= self.queue:
                raise Full
            self._waiting.append(ask)
            self._changed.notify()

    def close(self, seconds: float = 30.0) -> None:
        """Take no more questions, answer those there are, for ``seconds`` at most, and stop."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            left = [*self._waiting, *(row.ask for group in self._groups for row in group.rows)]
        for ask in left:
            ask.gone = True
            ask.told(Failed(503, "the service is shutting down; ask again"))

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Questions that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Questions that are being answered."""
        return sum(len(group.rows) for group in list(self._groups))

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self.threads)
        while True:
            with self._changed:
                while not (self._waiting or self._groups or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._waiting or self._groups):
                    return
            self._join()
            for group in list(self._groups):
                begin = time.perf_counter()
                self._guarded(group, partial(self._step, group))
                self.steps, self.step_seconds = self.steps + 1, self.step_seconds + time.perf_counter() - begin
                if not group.rows:
                    self._groups.remove(group)

    def _join(self) -> None:
        """Let some of those who wait begin."""
        room, budget = self.rows - self.running, self.prompt_tokens
        new: dict[EditableModel, list[tuple[_Row, Prompt]]] = {}
        while room > 0 and budget > 0:
            with self._changed:
                if not self._waiting:
                    break
                ask = self._waiting.popleft()
            if _over(ask):
                continue
            try:
                prompt = ask.model.read(ask.prompt, chat=ask.chat, room=ask.max_tokens)
            except UserError as error:
                ask.told(Failed(400, str(error)))
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the others' answers go on
                _failed(ask, error)
                continue
            if trouble := _unreadable(ask, prompt.ids):
                ask.told(Failed(400, trouble))
                continue
            drawn = None
            if ask.temperature > 0:
                drawn = torch.Generator()
                drawn.manual_seed(ask.seed) if ask.seed is not None else drawn.seed()
            row = _Row(ask, len(prompt.ids), Speech(ask.model.tokenizer, ask.stop), drawn)
            new.setdefault(ask.model, []).append((row, prompt))
            room, budget = room - 1, budget - len(prompt.ids)
        for model, joining in new.items():
            group = next((g for g in self._groups if g.batch.model.goes_with(model)), None)
            if group is None:
                self._groups.append(group := _Group(Batch(model)))
            rows, prompts = [row for row, _ in joining], [prompt for _, prompt in joining]
            group.rows += rows
            self._guarded(group, partial(self._begin, group, model, rows, prompts))
            if not group.rows:
                self._groups.remove(group)

    def _guarded(self, group: _Group, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - those of other weights go on
            for row in group.rows:
                _failed(row.ask, error)
            group.rows = []

    def _begin(self, group: _Group, model: EditableModel, rows: Sequence[_Row], prompts: Sequence[Prompt]) -> None:
        self._take(group, rows, group.batch.add(prompts, model))

    def _step(self, group: _Group) -> None:
        kept = [i for i, row in enumerate(group.rows) if not _over(row.ask)]
        self._keep(group, kept)
        if group.rows:
            self._take(group, group.rows, group.batch.step(torch.tensor([row.last for row in group.rows])))

    def _take(self, group: _Group, rows: Sequence[_Row], logits: Tensor) -> None:
        """Give each of ``rows`` its next token, and let those go that are at their end or whose token cannot be had."""
        best = logits.max(1)
        highest, likeliest = best.values.tolist(), best.indices.tolist()
        ended = set()
        for i, row in enumerate(rows):
            ask = row.ask
            try:
                if not math.isfinite(highest[i]):
                    raise FloatingPointError(f"its highest logit is {highest[i]}")
                row.last = likeliest[i]
                if row.drawn is not None and ask.temperature >= _COLD:
                    row.last = _draw(logits[i], ask.temperature, ask.top_p, row.drawn)
            except (ArithmeticError, RuntimeError) as error:  # the other rows go on
                _failed(ask, error)
                ended.add(row)
                continue
            over = row.last == ask.model.tokenizer.end
            if not over:
                row.tokens += 1
                if text := row.speech.push(row.last):
                    ask.told(Piece(text))
            if over or row.speech.stopped or row.tokens >= ask.max_tokens:
                if text := row.speech.finish():
                    ask.told(Piece(text))
                reason = "stop" if over or row.speech.stopped else "length"
                ask.told(Done(reason, row.prompt_tokens, row.tokens, group.batch.fired(group.rows.index(row))))
                ended.add(row)
        self._keep(group, [i for i, row in enumerate(group.rows) if row not in ended])

    def _keep(self, group: _Group, kept: list[int]) -> None:
        if len(kept) < len(group.rows):
            group.batch.keep(kept)
            group.rows = [group.rows[i] for i in kept]


class Speech:
    """Tokens that come one by one, as text: no half characters, and nothing from a text in ``stop`` on."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._tokens: list[int] = []
        self._begin = self._read = 0  # tokens before _read are said; those from _begin on tell how the next are spelt
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be said now that ``token`` is known; maybe nothing."""
        self._tokens.append(token)
        said = self._tokenizer.decode(self._tokens[self._begin : self._read])
        text = self._tokenizer.decode(self._tokens[self._begin :])
        if text.endswith("�") and len(self._tokens) - self._read < _UNDECIDED:
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._say(text[len(said) :])

    def finish(self) -> str:
        """What was held back, when no more comes."""
        if self.stopped:
            return ""
        said = self._tokenizer.decode(self._tokens[self._begin : self._read])
        found = self._say(self._tokenizer.decode(self._tokens[self._begin :])[len(said) :])
        held, self._held = ("" if self.stopped else self._held), ""
        return found + held

    def _say(self, text: str) -> str:
        text = self._held + text
        if places := [text.index(s) for s in self._stop if s in text]:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        # The end of the text may be the beginning of what ends it.
        begun = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - begun :] if begun else ""
        return text[: len(text) - begun]


def _draw(logits: Tensor, temperature: float, top_p: float, drawn: torch.Generator) -> int:
    """A token among the likeliest that have ``top_p`` of the probability together."""
    likely, tokens = ((logits - logits.max()) / temperature).softmax(0).sort(descending=True)
    kept = likely.cumsum(0) - likely < top_p
    kept[0] = True  # a share may be too small for float32
    return int(tokens[torch.multinomial(torch.where(kept, likely, 0).cpu(), 1, generator=drawn)])


def _over(ask: Ask) -> bool:
    """Whether nobody waits for the answer any longer, or it took too long."""
    if not ask.gone and time.monotonic() > ask.deadline:
        ask.told(Failed(504, "the answer took longer than the service allows; ask for fewer tokens"))
        ask.gone = True
    return ask.gone


def _unreadable(ask: Ask, ids: Sequence[int]) -> str:
    if not ids:
        return "prompt: has no tokens; ask something"
    context = ask.model.context
    if context and len(ids) + ask.max_tokens > context:
        return (
            f"max_tokens: {ask.max_tokens} behind a prompt of {len(ids)} tokens are more than the {context} that the model "
            "reads; shorten either"
        )
    return ""


def _failed(ask: Ask, error: BaseException) -> None:
    log.error("an answer failed", exc_info=error)
    ask.told(Failed(500, f"the model failed ({type(error).__name__}: {error}); the service's log says more"))
