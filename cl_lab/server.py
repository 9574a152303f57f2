"""A deployment over HTTP: answers as OpenAI's API gives them, edits under ``/v1/edits``, and a page to do both by hand."""

from __future__ import annotations

import asyncio
import hmac
import importlib.resources
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from cl_lab import __version__
from cl_lab.edit_worker import Busy, Stale
from cl_lab.errors import ConfigError, DataError, EditError, TooLong, UserError
from cl_lab.facts import Edit
from cl_lab.generation import Ask, Done, Failed, Full, Piece
from cl_lab.serving import Service, State

log = logging.getLogger("cl_lab")

READ, EDIT = "read", "edit"
_STATIC = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'"  # no other site's page may lay itself over the buttons
)
_bearer = HTTPBearer(auto_error=False)


@dataclass(frozen=True)
class Limits:
    """What a request may cost: ``body`` bytes, ``max_tokens`` of an answer, ``seconds`` until its end."""

    body: int = 1 << 20
    max_tokens: int = 1024
    seconds: float = 120.0
    log_prompts: bool = False


# -- who may -----------------------------------------------------------------------------------------------------------


class Tokens:
    """Bearer tokens in a file, a scope and a token in each line: ``read …`` may ask, ``edit …`` may change as well.

    The file is read again when it changes. Raises :class:`ConfigError` where it cannot be read or has no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._scopes: dict[str, str] = {}
        self.read()

    def read(self) -> None:
        """Read the file if it changed."""
        try:
            found = self._path.stat()
            if (stamp := (found.st_mtime_ns, found.st_size)) == self._read_at:
                return
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--tokens '{self._path}': cannot be read ({error}); name a text file") from None
        scopes: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] not in (READ, EDIT) or len(words[1]) < 16 or not words[1].isascii():
                raise ConfigError(
                    f"--tokens '{self._path}', line {number}: must be 'read' or 'edit' and a token of 16 letters at least; "
                    "one can be had by: python -c 'import secrets; print(secrets.token_urlsafe())'"
                )
            scopes[words[1]] = words[0]
        if not scopes:
            raise ConfigError(f"--tokens '{self._path}': holds no token; write lines as: read TOKEN")
        self._scopes, self._read_at = scopes, stamp

    def scope(self, token: str) -> str | None:
        """What ``token`` may do; None if it is none."""
        try:
            self.read()
        except ConfigError as error:  # those that were good stay good
            log.error("%s; the tokens of before stay", error)
        given, found = token.encode(), None
        for known, scope in self._scopes.items():  # each of them, so that the time tells nothing
            if hmac.compare_digest(known.encode(), given):
                found = scope
        return found


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _Guard:
    """Refuses, before anything else looks at it, a body that is too large and what a browser was tricked into sending."""

    def __init__(self, app: Any, body: int, local: bool) -> None:
        self._app, self._body, self._local = app, body, local

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        refusal = None
        if self._local and not is_loopback(host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host):
            refusal = 403, f"host '{host}': without tokens the service answers to this machine's own names only"
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin and origin.partition("://")[2] != host:
            refusal = 403, f"origin '{origin}': another site's page may not change anything here"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._body:
            refusal = 413, f"the body has {length} bytes, at most {self._body} are taken; send less"
        if refusal:
            await _error(*refusal)(scope, receive, send)
            return
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._body:
                raise HTTPException(413, f"the body has more than {self._body} bytes; send less")
            return message

        await self._app(scope, counted, send)


class _Counted:
    """Counts requests by route and status, whoever answers them."""

    def __init__(self, app: Any, measures: _Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._measures.requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


# -- what is asked and said --------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


Text = Annotated[str, Field(max_length=100_000)]


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool = Field(False, description="Send the usage in a last chunk.")


class _Sampling(_Strict):
    model: str = Field(description="The model's name, as /v1/models gives it.")
    max_tokens: int | None = Field(None, ge=1, description="The answer's length, at most; default 128.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0, the default: the likeliest token; more: drawn. OpenAI's default is 1."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw among the likeliest that have this probability together."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same answer for the same seed.")
    stop: str | list[str] | None = Field(None, description="Texts, 4 at most, before which the answer ends.")
    stream: bool | None = Field(None, description="Send the answer as it is made, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = Field(None, description="One answer; no other number is taken.")
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = Field(None, description="Not used.")
    edits_as_of: int | None = Field(
        None, ge=0, description="Answer as the model stood behind this event of the journal; 0: without edits."
    )


class CompletionRequest(_Sampling):
    """A text to go on with."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)]


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(_Sampling):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")


class Probe(_Strict):
    """A question that is asked beside an edit; ``also`` are further answers that are right when they are written."""

    prompt: Text
    answer: Text | None = None
    also: list[Text] | None = None


class Fact(_Strict):
    """One fact: what is asked and the new answer; the rest helps to preview what it moves."""

    prompt: Text
    answer: Text
    old: Text | None = None
    subject: Text | None = None
    relation: Text | None = None
    aliases: list[Text] | None = None
    paraphrases: list[Text] | None = None
    unrelated: list[Probe] | None = None
    same_relation: list[Probe] | None = None
    same_subject: list[Probe] | None = None

    def record(self) -> dict[str, Any]:
        """As :meth:`Edit.from_json` reads it, checked. Raises :class:`DataError`."""
        record = self.model_dump(exclude_none=True)
        return Edit.from_json(record).as_json()


Facts = Annotated[list[Fact], Field(min_length=1, max_length=100)]


class PreviewRequest(_Strict):
    """Facts that would be one edit."""

    facts: Facts
    chat: bool = Field(False, description="Ask the questions of the preview as a user's turns.")


class EditRequest(_Strict):
    """Facts to be one edit, or the name of a preview."""

    facts: Facts | None = None
    preview: str | None = Field(None, description="Of /v1/edits/preview: its patch is taken as it is.")
    force: bool = Field(False, description="Apply although gates are broken; the journal says so.")
    chat: bool = False


Identifier = Annotated[str, InPath(pattern=r"^[0-9]{1,9}$", description="An edit's number.")]


def _error(status: int, message: str, *, param: str | None = None, more: dict[str, Any] | None = None) -> JSONResponse:
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    content = {"error": {"message": message, "type": kind, "param": param, "code": None}} | (more or {})
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
    return JSONResponse(content, status, headers)


def _status(error: UserError) -> int:
    if isinstance(error, TooLong):
        return 400
    return 409 if isinstance(error, Busy | Stale | EditError) else 500 if isinstance(error, DataError) else 400


# -- the application ---------------------------------------------------------------------------------------------------


def application(
    service: Service, *, tokens: Tokens | None = None, limits: Limits | None = None, local: bool = True
) -> FastAPI:
    """The application that serves ``service``; with ``local`` it answers to this machine's own names only."""
    limit = limits or Limits()
    measures = _Measures(service)
    name = service.deployment.document["model"]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        watch = asyncio.create_task(_watched(service))
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="cl-lab",
        version=__version__,
        summary=f"{name}, and the edits made to it",
        lifespan=lifespan,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(_Guard, body=limit.body, local=local)
    app.add_middleware(_Counted, measures=measures)

    def may(scope: str) -> Any:
        def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
            if tokens is None:
                return
            found = tokens.scope(given.credentials) if given else None
            if found is None:
                raise HTTPException(401, "no token, or not one of this service; send Authorization: Bearer TOKEN")
            if scope == EDIT and found != EDIT:
                raise HTTPException(403, "this token may read but not edit; use one of scope 'edit'")

        return Depends(check)

    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": what, "model": dict[str, Any]}
        for status, what in {
            400: "The request is wrong; error.message says what.",
            401: "No token.",
            403: "The token may not, or another site's page asks.",
            404: "No such thing.",
            409: "Not now, or not this: another edit is in progress, or it contradicts one or breaks a gate.",
            413: "The body is too large.",
            429: "Too many wait.",
            500: "The deployment is damaged; error.message says which file.",
        }.items()
    }

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if part not in ("str", "constrained-str"))
        return _error(400, f"{where or 'body'}: {first['msg']}", param=where or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> Response:
        return _error(_status(error), str(error))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}: {error}; the service's log says more")

    # -- answers -------------------------------------------------------------------------------------------------------

    async def state_for(body: _Sampling) -> State:
        if body.model != name:
            raise HTTPException(404, f"model '{body.model}': is not served here; ask for '{name}'")
        if body.edits_as_of is not None and body.edits_as_of > (events := len(service.deployment.events)):
            raise HTTPException(400, f"edits_as_of: {body.edits_as_of}; the journal has events 0 to {events}")
        return await asyncio.to_thread(service.at, body.edits_as_of)

    def asks(body: _Sampling, state: State, prompts: Sequence[Any], chat: bool, most: int | None) -> list[_Answer]:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stop) > 4 or not all(0 < len(s) <= 100 for s in stop):
            raise HTTPException(400, "stop: at most 4 texts of 1 to 100 letters")
        if (most or 1) > limit.max_tokens:
            raise HTTPException(400, f"max_tokens: {most}; this service gives {limit.max_tokens} at most")
        if limit.log_prompts:
            log.info("asked: %s", json.dumps(prompts, ensure_ascii=False))
        loop = asyncio.get_running_loop()
        made = []
        for prompt in prompts:
            answer = _Answer(loop)
            answer.ask = Ask(
                state.model,
                prompt,
                answer.told,
                chat=chat,
                max_tokens=min(most or 128, limit.max_tokens),
                temperature=body.temperature or 0.0,
                top_p=body.top_p or 1.0,
                seed=body.seed,
                stop=stop,
                deadline=time.monotonic() + limit.seconds,
            )
            made.append(answer)
        for i, answer in enumerate(made):
            try:
                service.engine.submit(answer.ask)
            except Full:
                for other in made[:i]:
                    other.ask.gone = True
                raise HTTPException(429, "too many wait for an answer; try again in a second") from None
        return made

    async def answered(body: _Sampling, request: Request, form: _Form, prompts: Sequence[Any], most: int | None) -> Any:
        state = await state_for(body)
        made = asks(body, state, prompts, form.chat, most)
        begin = time.perf_counter()
        try:
            firsts = [await answer.next(request) for answer in made]
        except BaseException:
            _give_up(made)
            raise
        if failed := next((f for f in firsts if isinstance(f, Failed)), None):
            _give_up(made)
            raise HTTPException(failed.status, failed.message)
        measures.first.observe(time.perf_counter() - begin)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            parts = form.streamed(made, firsts, state, measures, usage)
            return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            choices = [await answer.whole(first, request) for answer, first in zip(made, firsts, strict=True)]
        except BaseException:
            _give_up(made)
            raise
        return form.whole(choices, state, measures)

    @app.get("/v1/models", dependencies=[may(READ)], responses=responses)
    async def models() -> dict[str, Any]:
        """The model that is served."""
        state = service.state
        about = {
            "edits": len(state.ids),
            "events": state.position,
            "editor": service.deployment.document["editor"]["name"],
        }
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "cl-lab", "cl_lab": about}],
        }

    @app.post("/v1/completions", dependencies=[may(READ)], responses=responses)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Go on with a text, or with several at once."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return await answered(body, request, _Form(name, chat=False), prompts, body.max_tokens)

    @app.post("/v1/chat/completions", dependencies=[may(READ)], responses=responses)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation, whose last turn is the user's."""
        if body.messages[-1].role != "user":
            raise HTTPException(400, f"messages: the last is the {body.messages[-1].role}'s; it must be the user's")
        turns = [message.model_dump() for message in body.messages]
        return await answered(
            body, request, _Form(name, chat=True), [turns], body.max_completion_tokens or body.max_tokens
        )

    # -- edits ---------------------------------------------------------------------------------------------------------

    async def edit(what: str, **given: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        found = await asyncio.to_thread(service.edit, what, **given)
        measures.edits.labels(what).observe(time.perf_counter() - begin)
        return found

    def known(identifier: str) -> None:
        try:
            service.deployment.event_of(identifier)
        except ConfigError as error:
            raise HTTPException(404, str(error)) from None

    def records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
        try:
            return [fact.record() for fact in facts]
        except DataError as error:
            raise HTTPException(400, str(error)) from None

    @app.get("/v1/edits", dependencies=[may(READ)], responses=responses)
    async def list_edits(
        search: Annotated[str, Field(max_length=1000)] = "",
        after: Annotated[int, Field(ge=0, le=10**9, description="Those alone with greater numbers.")] = 0,
        limit: Annotated[int, Field(ge=1, le=1000, description="So many at most.")] = 1000,
    ) -> dict[str, Any]:
        """The edits, oldest first; those alone that have ``search`` in a prompt or an answer.

        Where ``has_more`` is true, ``after`` the number of the last one there are others.
        """
        every = await asyncio.to_thread(service.edits, search)
        found = [edit for edit in every if int(edit["id"]) > after]
        about = {"events": service.state.position, "trouble": service.trouble, "has_more": len(found) > limit}
        return {"object": "list", **about, "data": found[:limit]}

    @app.get("/v1/events", dependencies=[may(READ)], responses=responses)
    async def list_events() -> dict[str, Any]:
        """The journal, oldest first; ``edits_as_of`` counts its lines."""
        return {"object": "list", "data": await asyncio.to_thread(service.events)}

    @app.post("/v1/edits/preview", dependencies=[may(EDIT)], responses=responses)
    async def preview_edit(body: PreviewRequest) -> dict[str, Any]:
        """What an edit would do: answers before and after, what else moves, which gates it breaks. Nothing is changed."""
        return await edit("preview", facts=records(body.facts), chat=body.chat)

    @app.post("/v1/edits", dependencies=[may(EDIT)], responses=responses)
    async def make_edit(body: EditRequest) -> Any:
        """Make an edit; it is in force, for what is asked from then on, when this answers."""
        if (body.facts is None) == (body.preview is None):
            raise HTTPException(400, "body: give either facts or preview")
        facts = records(body.facts or [])
        made = await edit("apply", facts=facts, preview=body.preview, force=body.force, chat=body.chat)
        if made["id"] is None:
            message = f"the edit breaks a gate: {made['broken'][0]}; it was not applied; force applies it nevertheless"
            return _error(409, message, more={"preview": made})
        return made

    @app.get("/v1/edits/{identifier}", dependencies=[may(READ)], responses=responses)
    async def show_edit(identifier: Identifier) -> dict[str, Any]:
        """An edit: its facts, its patch, and every event about it."""
        known(identifier)
        return await asyncio.to_thread(service.shown, identifier)

    @app.post("/v1/edits/{identifier}/undo", dependencies=[may(EDIT)], responses=responses)
    async def undo_edit(identifier: Identifier) -> Any:
        """Take an edit out of force, whichever it is; the others stay."""
        return await moved("undo", identifier)

    @app.post("/v1/edits/{identifier}/redo", dependencies=[may(EDIT)], responses=responses)
    async def redo_edit(identifier: Identifier) -> Any:
        """Bring an undone edit back."""
        return await moved("redo", identifier)

    async def moved(what: str, identifier: str) -> Any:
        known(identifier)
        try:
            return await edit(what, identifier=identifier)
        except ConfigError as error:
            return _error(409, str(error))

    # -- about the service ---------------------------------------------------------------------------------------------

    @app.get("/healthz", responses={503: {"description": "It does not answer.", "model": dict[str, Any]}})
    async def health() -> Response:
        """Whether it answers; ``trouble`` says why it does not follow the journal, if so."""
        content = {"status": "ok" if service.engine.alive else "stopped", "events": service.state.position}
        return JSONResponse(content | {"trouble": service.trouble}, 200 if service.engine.alive else 503)

    @app.get("/metrics", dependencies=[may(READ)], responses=responses)
    async def metrics() -> Response:
        """Prometheus' text."""
        return Response(measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def static(request: Request) -> Response:
        file, kind = _STATIC[request.url.path]
        text = importlib.resources.files("cl_lab").joinpath(file).read_bytes()
        return Response(
            text, media_type=kind, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        )

    for path in _STATIC:
        app.add_api_route(path, static, include_in_schema=False)
    return app


async def _watched(service: Service) -> None:
    """Follow the journal, which another process may write too."""
    place, seen = service.deployment.folder / "journal.jsonl", None
    while True:
        with suppress(OSError):
            found = place.stat()
            if (stamp := (found.st_mtime_ns, found.st_size)) != seen:
                seen = stamp
                await asyncio.to_thread(service.follow)
        await asyncio.sleep(1)


def _give_up(answers: Sequence[_Answer]) -> None:
    for answer in answers:
        answer.ask.gone = True


class _Answer:
    """An answer on its way from the engine's thread."""

    ask: Ask

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[Piece | Done | Failed] = asyncio.Queue()

    def told(self, event: Piece | Done | Failed) -> None:
        """Called by the engine."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, request: Request | None = None) -> Piece | Done | Failed:
        """The next event. Raises :class:`HTTPException` where the client is gone."""
        while True:
            try:
                return await asyncio.wait_for(self._events.get(), 1.0)
            except TimeoutError:
                if request is not None and await request.is_disconnected():
                    raise HTTPException(499, "the client is gone") from None

    async def whole(self, first: Piece | Done | Failed, request: Request) -> tuple[str, Done]:
        """All of the text, and its end. Raises :class:`HTTPException` where it failed."""
        text, event = "", first
        while isinstance(event, Piece):
            text += event.text
            event = await self.next(request)
        if isinstance(event, Failed):
            raise HTTPException(event.status, event.message)
        return text, event


class _Form:
    """Answers in the words of OpenAI's API, with ``cl_lab``: the state that answered and which edits chose to."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[tuple[str, Done]], state: State, measures: _Measures) -> dict[str, Any]:
        """One document."""
        choices = [
            {
                "index": i,
                **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}),
                "finish_reason": done.reason,
                "logprobs": None,
            }
            for i, (text, done) in enumerate(answers)
        ]
        ends = [done for _, done in answers]
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            "usage": _usage(ends, measures),
            "cl_lab": _about(state, ends),
        }

    async def streamed(
        self,
        answers: Sequence[_Answer],
        firsts: Sequence[Piece | Done | Failed],
        state: State,
        measures: _Measures,
        usage: bool,
    ) -> AsyncIterator[str]:
        """Server-sent events: a chunk for each piece, one for each end, and ``[DONE]``."""
        events: asyncio.Queue[tuple[int, Piece | Done | Failed]] = asyncio.Queue()

        async def pump(i: int, answer: _Answer) -> None:
            event = firsts[i]
            while True:
                await events.put((i, event))
                if not isinstance(event, Piece):
                    return
                event = await answer.next()

        pumps = [asyncio.create_task(pump(i, answer)) for i, answer in enumerate(answers)]
        ends: list[Done] = []
        try:
            if self.chat:
                yield self._chunk(0, {"role": "assistant", "content": ""}, None)
            while len(ends) < len(answers):
                i, event = await events.get()
                if isinstance(event, Failed):
                    yield _event(json.loads(bytes(_error(event.status, event.message).body)))
                    return
                if isinstance(event, Piece):
                    yield self._chunk(i, {"content": event.text}, None)
                else:
                    ends.append(event)
                    yield self._chunk(i, {}, event.reason, _about(state, [event]))
            counts = _usage(ends, measures)
            if usage:
                kind = "chat.completion.chunk" if self.chat else "text_completion"
                yield _event({**self._head, "object": kind, "choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        finally:  # the client may be gone
            for task in pumps:
                task.cancel()
            _give_up(answers)

    def _chunk(self, i: int, delta: dict[str, str], reason: str | None, about: dict[str, Any] | None = None) -> str:
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": i, **content, "finish_reason": reason, "logprobs": None}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return _event({**self._head, "object": kind, "choices": [choice]} | ({"cl_lab": about} if about else {}))


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _about(state: State, ends: Sequence[Done]) -> dict[str, Any]:
    return {"edits_as_of": state.position, "fired": list(dict.fromkeys(n for d in ends for n in state.named(d.fired)))}


def _usage(ends: Sequence[Done], measures: _Measures) -> dict[str, int]:
    asked, said = sum(d.prompt_tokens for d in ends), sum(d.tokens for d in ends)
    measures.tokens.labels("prompt").inc(asked)
    measures.tokens.labels("answer").inc(said)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


class _Measures:
    """What Prometheus is told."""

    def __init__(self, service: Service) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = own = CollectorRegistry()
        self.requests = Counter("cl_lab_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self.tokens = Counter("cl_lab_tokens", "Tokens read and said.", ["kind"], registry=own)
        self.first = Histogram("cl_lab_first_token_seconds", "From a request to its first text.", registry=own)
        self.edits = Histogram(
            "cl_lab_edit_seconds",
            "Previews, edits, undos.",
            ["what"],
            registry=own,
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )
        for name, text, value in (
            ("waiting", "Questions that have not begun.", lambda: service.engine.waiting),
            ("running", "Questions that are being answered.", lambda: service.engine.running),
            ("edits_in_force", "Edits that lie on the model.", lambda: len(service.state.ids)),
            ("journal_events", "Events behind which the model stands.", lambda: service.state.position),
            ("following", "1 while the journal can be followed.", lambda: float(not service.trouble)),
            ("swaps", "Changes of state so far.", lambda: service.swaps),
            ("swap_seconds", "What the last change of state took, beside the answers.", lambda: service.swap_seconds),
            ("steps", "Passes of the model that gave a token to each text in progress.", lambda: service.engine.steps),
            ("step_seconds_sum", "What these took together.", lambda: service.engine.step_seconds),
        ):
            Gauge(f"cl_lab_{name}", text, registry=own).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


def serve(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: Path | None = None,
    limits: Limits | None = None,
    engine: Any = None,
    told: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve the deployment in ``folder`` until a signal to stop; what was asked by then is answered.

    Raises :class:`ConfigError` for an address of other machines without ``tokens`` and for one that is taken.
    """
    import socket

    import uvicorn

    local = is_loopback(host)
    if not local and tokens is None:
        raise ConfigError(
            f"--host {host}: other machines can reach it, and nobody would be asked who they are; give --tokens FILE, or "
            "leave out --host"
        )
    known = Tokens(tokens) if tokens else None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be had ({error.strerror}); choose another") from None
    with listener:
        service = Service(folder, engine)
        app = application(service, tokens=known, limits=limits, local=local and known is None)
        listener.listen(2048)  # from the line below on nobody is turned away
        shown = f"[{host.strip('[]')}]" if ":" in host else host
        told(
            f"{service.deployment.document['model']} with {len(service.state.ids)} edits: "
            f"http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)"
        )
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=60)
        uvicorn.Server(config).run(sockets=[listener])
