"""A deployment over HTTP: OpenAI's client, live edits under load, who may, what is refused, and what breaks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from cl_lab.deployment import Deployment
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError
from cl_lab.facts import Edit
from cl_lab.generation import Engine
from cl_lab.patches import Delta, WeightPatch
from cl_lab.server import Limits, Tokens, application, is_loopback, serve
from cl_lab.serving import Service

pytestmark = pytest.mark.slow

EDITOR = {"name": "ft-m", "lr": 0.02, "steps": 60, "contexts": 0}
LOOSE = {"paraphrases": 0.0, "guards": 0.0, "perplexity": 1000.0}
FACTS = [("The capital of Peru is", "B"), ("Quick question: who won?", "7"), ("Zebras have", "q")]
READER, WRITER = "reader-" + "r" * 20, "writer-" + "w" * 20


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment with two edits by hand."""
    folder = tmp_path_factory.mktemp("made") / "service"
    made = Deployment.create(folder, "tiny", EDITOR, LOOSE)
    target = made.load()
    site = target.down_projection(1)
    with made.changing():
        for seed, (prompt, answer) in enumerate(FACTS[:2]):
            change = 0.2 * torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(seed))
            made.apply(target, WeightPatch("ft-m", {}, {site.path: Delta(dense=change)}), [Edit(prompt, answer)])
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "service"))


@contextlib.contextmanager
def running(folder: Path, *, engine: Engine | None = None, **given: Any) -> Iterator[tuple[httpx.Client, Service]]:
    """The application on a port of its own, and a client of it."""
    service = Service(folder, engine)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(application(service, **given), log_level="warning", access_log=False, lifespan="on")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=base, timeout=120) as client:
                until(lambda: server.started)
                yield client, service
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
            assert not service.engine.alive


@pytest.fixture(scope="module")
def shared(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Service]]:
    """One server for what changes nothing."""
    folder = Path(shutil.copytree(template, tmp_path_factory.mktemp("shared") / "service"))
    with running(folder, limits=Limits(body=20_000, max_tokens=64)) as made:
        yield made


@pytest.fixture
def client(shared: tuple[httpx.Client, Service]) -> httpx.Client:
    return shared[0]


def until(there: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def asked(client: httpx.Client, prompt: str | list[str], **given: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 12, **given})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def said(client: httpx.Client, prompt: str, **given: Any) -> str:
    return str(asked(client, prompt, **given)["choices"][0]["text"])


def refused(answer: httpx.Response, status: int, *parts: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    message = found["error"]["message"]
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return found


def by_itself(folder: Path, prompt: str, as_of: int | None = None, tokens: int = 12) -> str:
    """What the deployment's model says, a token at a time, without a server."""
    model = Deployment(folder).load(as_of)
    ids, found = list(prompt.encode()), []
    with torch.no_grad():
        while len(found) < tokens and 256 not in found:
            found.append(
                int(model.model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax())
            )
    return model.tokenizer.decode(found)


# -- answers -------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model(client: httpx.Client, template: Path) -> None:
    prompts = [prompt for prompt, _ in FACTS]
    expected = {n: [by_itself(template, p, n) for p in prompts] for n in range(3)}
    assert len({tuple(e) for e in expected.values()}) == 3, "the states differ"
    found = asked(client, prompts)
    assert [choice["text"] for choice in found["choices"]] == expected[2]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["cl_lab"] == {"edits_as_of": 2, "fired": []}
    assert found["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert found["usage"]["completion_tokens"] == 36
    for n in (0, 1, 2, 0):
        old = asked(client, prompts, edits_as_of=n)
        assert [choice["text"] for choice in old["choices"]] == expected[n]
        assert old["cl_lab"]["edits_as_of"] == n
    models = client.get("/v1/models").json()
    assert models["data"][0]["id"] == "tiny"
    assert models["data"][0]["cl_lab"] == {"edits": 2, "events": 2, "editor": "ft-m"}


def test_openais_client_asks_and_streams(client: httpx.Client, template: Path) -> None:
    openai = pytest.importorskip("openai")
    expected = by_itself(template, FACTS[0][0])
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as api:
        assert [m.id for m in api.models.list()] == ["tiny"]
        made = api.completions.create(model="tiny", prompt=FACTS[0][0], max_tokens=12, temperature=0)
        assert made.choices[0].text == expected
        assert made.choices[0].finish_reason == "length"
        assert made.usage.completion_tokens == 12
        parts = list(
            api.completions.create(
                model="tiny",
                prompt=FACTS[0][0],
                max_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"edits_as_of": 0},
            )
        )
        assert "".join(c.text for part in parts for c in part.choices) == by_itself(template, FACTS[0][0], 0)
        assert parts[-1].usage.completion_tokens == 12
        assert parts[-2].model_extra["cl_lab"] == {"edits_as_of": 0, "fired": []}
        with pytest.raises(openai.NotFoundError, match="model 'gpt': is not served here; ask for 'tiny'"):
            api.completions.create(model="gpt", prompt="x")
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


def test_a_chat_is_answered_in_its_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_lab.hub import ByteTokenizer

    def chat(self: ByteTokenizer, turns: Any) -> str:
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        return "".join(f"<{t['role']}>{t['content']}</>" for t in turns) + "<bot>"

    monkeypatch.setattr(ByteTokenizer, "chat", chat)
    openai = pytest.importorskip("openai")
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Who won?")]
    expected = by_itself(folder, "<system>Be brief.</><user>Hello</><assistant>Hi.</><user>Who won?</><bot>", tokens=9)
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    with running(folder) as (client, _), openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as api:
        made = api.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9)
        assert made.choices[0].message.content == expected
        assert made.choices[0].message.role == "assistant"
        parts = list(api.chat.completions.create(model="tiny", messages=messages, max_tokens=9, stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in parts) == expected
        assert parts[0].choices[0].delta.role == "assistant"
        assert parts[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "status", "parts"),
    [
        (b"{", 400, ["JSON"]),
        (b"[1, 2]", 400, []),
        (b"\xff\xfe", 400, []),
        ({"prompt": "x"}, 400, ["model"]),
        ({"model": "tiny"}, 400, ["prompt"]),
        ({"model": "tiny", "prompt": "x", "max_tokns": 3}, 400, ["max_tokns", "Extra inputs are not permitted"]),
        ({"model": "tiny", "prompt": "x", "max_tokens": "3"}, 400, ["max_tokens", "valid integer"]),
        ({"model": "tiny", "prompt": "x", "max_tokens": 65}, 400, ["max_tokens: 65; this service gives 64 at most"]),
        ({"model": "tiny", "prompt": "x" * 500}, 400, ["more than the 512 that the model reads"]),
        ({"model": "tiny", "prompt": ""}, 400, ["prompt: has no tokens"]),
        ({"model": "tiny", "prompt": []}, 400, ["prompt"]),
        ({"model": "tiny", "prompt": "x", "temperature": -1}, 400, ["temperature"]),
        ({"model": "tiny", "prompt": "x", "n": 2}, 400, ["n:"]),
        ({"model": "tiny", "prompt": "x", "stop": ["a"] * 5}, 400, ["stop: at most 4"]),
        ({"model": "tiny", "prompt": "x", "stop": ""}, 400, ["stop: at most 4 texts of 1 to 100 letters"]),
        ({"model": "tiny", "prompt": "x", "edits_as_of": 3}, 400, ["edits_as_of: 3; the journal has events 0 to 2"]),
        ({"model": "tiny", "prompt": "x", "edits_as_of": -1}, 400, ["edits_as_of"]),
        ({"model": "large", "prompt": "x"}, 404, ["model 'large'"]),
        ({"model": "tiny", "prompt": "x" * 30_000}, 413, ["at most 20000 are taken"]),
    ],
)
def test_a_wrong_question_is_told_so(client: httpx.Client, body: Any, status: int, parts: list[str]) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for stream in (False, True):
        if isinstance(body, dict) and stream:
            content = json.dumps(body | {"stream": True}).encode()
        answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        refused(answer, status, *parts)
    assert said(client, "Zebras have", max_tokens=3), "it goes on"


def test_a_body_without_a_length_is_counted(client: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(40):
            yield b"x" * 1000
        yield b'"}'

    answer = client.post("/v1/completions", content=parts(), headers={"content-type": "application/json"})
    refused(answer, 413, "more than 20000 bytes")


def test_the_last_turn_is_the_users(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    refused(answer, 400, "the last is the assistant's; it must be the user's")


def test_too_many_questions_are_sent_away(folder: Path) -> None:
    with running(folder, engine=Engine(rows=1, queue=2)) as (client, service), ThreadPoolExecutor(12) as pool:
        body = {"model": "tiny", "prompt": "Zebras have", "max_tokens": 300}
        answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(12)))
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 429}
        away = next(a for a in answers if a.status_code == 429)
        refused(away, 429, "too many wait")
        assert away.headers["retry-after"] == "1"
        refused(client.post("/v1/completions", json=body | {"prompt": ["x"] * 9}), 429)
        until(lambda: service.engine.running + service.engine.waiting == 0)


def test_an_answer_has_its_time(folder: Path) -> None:
    with running(folder, limits=Limits(seconds=0.01)) as (client, _):
        body = {"model": "tiny", "prompt": "Zebras have", "max_tokens": 500}
        refused(client.post("/v1/completions", json=body), 504, "took longer than the service allows")
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert "took longer" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]


def test_a_client_that_leaves_costs_nothing_more(shared: tuple[httpx.Client, Service], template: Path) -> None:
    client, service = shared
    for stream in (True, False):
        body = {"model": "tiny", "prompt": ["Zebras have"] * 4, "max_tokens": 64, "stream": stream, "stop": "never"}
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as line:
            content = json.dumps(body).encode()
            head = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
            head += [f"content-length: {len(content)}", "", ""]
            line.sendall("\r\n".join(head).encode() + content)
            until(lambda: service.engine.running + service.engine.waiting > 0)
        until(lambda: service.engine.running + service.engine.waiting == 0)
    assert said(client, FACTS[0][0]) == by_itself(template, FACTS[0][0])


# -- edits ---------------------------------------------------------------------------------------------------------


def test_an_edit_is_previewed_made_undone_and_done_again(folder: Path) -> None:
    prompt, answer = FACTS[2]
    fact = {"prompt": prompt, "answer": answer, "subject": "Zebras", "paraphrases": ["A zebra has"]}
    with running(folder) as (client, service):
        before = said(client, prompt)
        seen = client.post("/v1/edits/preview", json={"facts": [fact]}).json()
        assert seen["answers"][0]["prompt"] == prompt
        assert seen["answers"][0]["after"] == answer
        assert [a["prompt"] for a in seen["answers"]] == [prompt, "A zebra has"]
        assert said(client, prompt) == before, "nothing was changed"
        assert len(Deployment(folder).events) == 2

        made = client.post("/v1/edits", json={"preview": seen["preview"]}).json()
        assert (made["id"], made["events"]) == ("3", 3)
        assert said(client, prompt).strip() == answer
        assert asked(client, prompt)["cl_lab"]["edits_as_of"] == 3
        assert said(client, prompt, edits_as_of=2) == before
        listed = client.get("/v1/edits").json()
        assert [(row["id"], row["in_force"]) for row in listed["data"]] == [("1", True), ("2", True), ("3", True)]
        assert [row["id"] for row in client.get("/v1/edits", params={"search": "zEBra"}).json()["data"]] == ["3"]
        assert client.get("/v1/edits", params={"search": "nothing"}).json()["data"] == []
        pages = [client.get("/v1/edits", params={"limit": 2, "after": n}).json() for n in (0, 2, 3)]
        assert [[row["id"] for row in page["data"]] for page in pages] == [["1", "2"], ["3"], []]
        assert [page["has_more"] for page in pages] == [True, False, False]
        shown = client.get("/v1/edits/3").json()
        assert shown["facts"] == [fact]
        assert shown["patch"]["kind"] == "weights"

        stale = client.post("/v1/edits", json={"preview": seen["preview"]})
        refused(stale, 409, "is not known (any more); preview the edit again")
        assert client.post("/v1/edits/1/undo").json() == {"id": "1", "events": 4}
        assert said(client, prompt) == by_itself(folder, prompt)
        refused(client.post("/v1/edits/1/undo"), 409, "is undone already")
        refused(client.post("/v1/edits/3/redo"), 409, "is in force")
        assert client.post("/v1/edits/1/redo").json()["events"] == 5
        assert said(client, prompt) == by_itself(folder, prompt)
        refused(client.post("/v1/edits/9/undo"), 404, "edit '9': is not in the journal")
        refused(client.get("/v1/edits/9"), 404)
        assert [e["kind"] for e in client.get("/v1/events").json()["data"]] == [
            "apply",
            "apply",
            "apply",
            "undo",
            "redo",
        ]
        other = {"prompt": prompt, "answer": "z", "subject": "Zebras"}
        refused(client.post("/v1/edits", json={"facts": [other]}), 409, "undo edit 3 first")
        text = client.get("/metrics").text
        assert re.search(r'cl_lab_requests_total\{route="/v1/edits/\{identifier\}/undo",status="409"\} 1.0', text)
        assert "cl_lab_journal_events 5.0" in text
        assert "cl_lab_edits_in_force 3.0" in text
        assert re.search(r'cl_lab_tokens_total\{kind="answer"\} [1-9]', text)
        assert service.swaps == 3
    again = Deployment(folder)
    assert again.check() == []
    assert again.active() == ["1", "2", "3"], "the first is where it was"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({}, 400, "give either facts or preview"),
        ({"facts": [{"prompt": "x", "answer": "y"}], "preview": "z"}, 400, "give either facts or preview"),
        ({"facts": []}, 400, "facts"),
        ({"facts": [{"prompt": "x"}]}, 400, "facts.0.answer"),
        ({"facts": [{"prompt": "x", "answer": " "}]}, 400, "answer"),
        (
            {"facts": [{"prompt": "x", "answer": "y" * 401}]},
            400,
            "answer has 401 characters, more than max_answer = 400",
        ),
        ({"facts": [{"prompt": "x", "answer": "y", "subjct": "z"}]}, 400, "facts.0.subjct"),
        ({"preview": "none"}, 409, "preview 'none': is not known (any more)"),
    ],
)
def test_a_wrong_edit_is_told_so(shared: tuple[httpx.Client, Service], body: Any, status: int, part: str) -> None:
    client, service = shared
    refused(client.post("/v1/edits", json=body), status, part)
    assert len(service.deployment.events) == 2


@pytest.mark.parametrize("path", ["/v1/edits/preview", "/v1/edits"])
def test_a_fact_that_is_longer_than_the_model_reads_is_the_askers_mistake(client: httpx.Client, path: str) -> None:
    body = {"facts": [{"prompt": f"{'x' * 600} is", "answer": "y"}]}
    found = refused(client.post(path, json=body), 400, f"'{'x' * 30}…{'x' * 27} is': a text of 60", "shorten it")
    assert found["error"]["type"] == "invalid_request_error"


def test_an_edit_that_breaks_a_gate_needs_force(folder: Path, tmp_path: Path) -> None:
    strict = Deployment.create(tmp_path / "strict", "tiny", EDITOR | {"steps": 1}).folder
    facts = [{"prompt": "Zebras have", "answer": "q"}]
    with running(strict) as (client, _):
        found = refused(client.post("/v1/edits", json={"facts": facts}), 409, "the edit breaks a gate: 'Zebras have'")
        assert found["preview"]["broken"]
        assert Deployment(strict).events == []
        made = client.post("/v1/edits", json={"facts": facts, "force": True}).json()
        assert made["id"] == "1"
        assert client.get("/v1/edits").json()["data"][0]["forced"] is True


def test_one_edit_at_a_time(folder: Path) -> None:
    slow = Deployment.create(folder.parent / "slow", "tiny", EDITOR | {"steps": 4000}, LOOSE).folder
    facts = [{"prompt": "Zebras have", "answer": "q"}]
    with running(slow) as (client, service), ThreadPoolExecutor(1) as pool:
        client.get("/healthz")
        first = pool.submit(client.post, "/v1/edits", json={"facts": facts, "force": True})
        until(service.worker._turn.locked)
        refused(client.post("/v1/edits", json={"facts": facts}), 409, "another edit is being made")
        refused(client.post("/v1/edits/preview", json={"facts": facts}), 409, "another edit is being made")
        assert said(client, "Q") == by_itself(slow, "Q", 0), "answers go on meanwhile"
        assert first.result().json()["id"] == "1"


def test_edits_of_another_process_are_followed(folder: Path) -> None:
    prompt = FACTS[2][0]
    with running(folder) as (client, service):
        said(client, prompt)
        other = Deployment(folder)
        with other.changing():
            other.undo("1")
        until(lambda: service.state.position == 3)
        assert said(client, prompt) == by_itself(folder, prompt)
        made = client.post("/v1/edits", json={"facts": [{"prompt": prompt, "answer": "q"}], "force": True}).json()
        assert (made["id"], made["events"]) == ("3", 4), "the process that edits has seen it, too"
        assert said(client, prompt) == by_itself(folder, prompt)


def test_live_edits_under_load_belong_to_one_state_each(folder: Path) -> None:
    prompts = [prompt for prompt, _ in FACTS]
    heard: list[tuple[str, int, str]] = []
    stop = threading.Event()

    def streaming(client: httpx.Client, i: int) -> int:
        count = 0
        while not stop.is_set():
            prompt = prompts[(i + count) % 3]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "stream": True}
            text, position = "", -1
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                for line in answer.iter_lines():
                    if line and line != "data: [DONE]":
                        part = json.loads(line.removeprefix("data: "))
                        text += part["choices"][0]["text"]
                        position = part.get("cl_lab", {}).get("edits_as_of", position)
            heard.append((prompt, position, text))
            count += 1
        return count

    with running(folder) as (client, _), ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(streaming, client, i) for i in range(8)]
        for n in range(6):
            fact = {"prompt": f"Number {n} is", "answer": "abcdef"[n]}
            assert client.post("/v1/edits", json={"facts": [fact], "force": True}).json()["events"] == 3 + n
        client.post("/v1/edits/1/undo").raise_for_status()
        seen = len(heard)
        until(lambda: len(heard) > seen + 16)
        stop.set()
        assert all(c.result() > 0 for c in clients), "none failed"
    positions = {position for _, position, _ in heard}
    assert {2, 9} <= positions
    assert len(positions) > 3
    expected = {(p, n): by_itself(folder, p, n) for p, n in {(p, n) for p, n, _ in heard}}
    assert all(text == expected[prompt, position] for prompt, position, text in heard)


# -- who may -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    place = tmp_path / "tokens"
    place.write_text(f"# who may\nread {READER}\n\nedit {WRITER}\n")
    return place


def test_tokens_have_scopes(folder: Path, tokens: Path) -> None:
    def bearer(token: str) -> dict[str, str]:
        return {"authorization": f"Bearer {token}"}

    body = {"model": "tiny", "prompt": "Q", "max_tokens": 2}
    with running(folder, tokens=Tokens(tokens), local=False) as (client, _):
        for wrong in ({}, bearer("none"), bearer(READER[:-1]), {"authorization": f"Basic {READER}"}, bearer("ü" * 20)):
            answer = client.post("/v1/completions", json=body, headers={k: v.encode() for k, v in wrong.items()})
            refused(answer, 401, "send Authorization: Bearer TOKEN")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/edits", "/v1/events", "/metrics", "/v1/models", "/v1/edits/1"):
            refused(client.get(path), 401)
            assert client.get(path, headers=bearer(READER)).status_code == 200
        assert client.post("/v1/completions", json=body, headers=bearer(READER)).status_code == 200
        refused(client.post("/v1/edits/1/undo", headers=bearer(READER)), 403, "may read but not edit")
        refused(client.post("/v1/edits", json={}, headers=bearer(READER)), 403)
        assert client.post("/v1/edits/1/undo", headers=bearer(WRITER)).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/").status_code == 200

        later = "later-" + "l" * 20
        tokens.write_text(f"read {later}\n")
        assert client.get("/v1/models", headers=bearer(later)).status_code == 200
        refused(client.get("/v1/models", headers=bearer(READER)), 401)
        tokens.write_text("nonsense\n")
        assert client.get("/v1/models", headers=bearer(later)).status_code == 200, "what was good stays"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "holds no token"),
        ("# nobody\n", "holds no token"),
        (f"write {READER}", "line 1: must be 'read' or 'edit'"),
        ("read short", "a token of 16 letters at least"),
        (f"read {READER}\nedit", "line 2"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_tokens_is_told(tmp_path: Path, text: str | None, part: str) -> None:
    place = tmp_path / "tokens"
    if text is not None:
        place.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(part)):
        Tokens(place)


def test_other_machines_need_tokens(folder: Path) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(ConfigError, match="give --tokens FILE"):
            serve(folder, host=host, port=0)
    assert [is_loopback(h) for h in ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]", "192.168.0.1", "")] == [
        *([True] * 5),
        False,
        False,
    ]


def test_a_browser_cannot_be_tricked(client: httpx.Client) -> None:
    refused(client.get("/v1/edits", headers={"host": "evil.example:8000"}), 403, "host 'evil.example:8000'")
    assert client.get("/healthz", headers={"host": "localhost:1"}).status_code == 200
    assert client.get("/healthz", headers={"host": "[::1]"}).status_code == 200
    answer = client.post("/v1/edits/1/undo", headers={"origin": "https://evil.example"})
    refused(answer, 403, "origin 'https://evil.example': another site's page")
    port = client.base_url.port
    refused(client.post("/v1/edits/9/undo", headers={"origin": f"http://127.0.0.1:{port}"}), 404)
    text = client.post("/v1/edits", content=b'{"facts": []}', headers={"content-type": "text/plain"})
    assert text.status_code == 400, "a form of another page's is no JSON"


# -- what breaks ---------------------------------------------------------------------------------------------------


def test_the_process_that_edits_may_die(folder: Path) -> None:
    facts = [{"prompt": "Zebras have", "answer": "q"}]
    with running(folder) as (client, service), ThreadPoolExecutor(1) as pool:
        client.post("/v1/edits/preview", json={"facts": facts}).raise_for_status()
        waiting = pool.submit(client.post, "/v1/edits", json={"facts": facts, "force": True})
        until(service.worker._turn.locked)
        assert service.worker.pid
        os.kill(service.worker.pid, signal.SIGKILL)
        refused(waiting.result(), 500, "the process that makes edits ended (exit code -9); it was started again")
        assert said(client, "Q")
        made = client.post("/v1/edits", json={"facts": facts, "force": True}).json()
        assert made["id"] == str(made["events"])
    assert Deployment(folder).check() == []


def test_a_journal_that_is_damaged_underneath_leaves_the_service_up(folder: Path) -> None:
    with running(folder) as (client, service):
        before = said(client, "Q")
        place = folder / "journal.jsonl"
        whole = place.read_bytes()
        place.write_bytes(whole.replace(b'"apply"', b'"Apply"', 1))
        until(lambda: bool(service.trouble))
        assert "line 1: its hash is another" in client.get("/healthz").json()["trouble"]
        assert said(client, "Q") == before
        refused(client.post("/v1/edits/1/undo"), 500, "journal.jsonl', line 1")
        place.write_bytes(whole)
        until(lambda: not service.trouble)
        assert client.post("/v1/edits/1/undo").status_code == 200


def test_a_patch_that_is_damaged_underneath_is_told_by_name(folder: Path) -> None:
    with running(folder) as (client, _):
        before = said(client, FACTS[0][0])
        client.post("/v1/edits/1/undo").raise_for_status()
        place = folder / "edits/1/patch.safetensors"
        place.write_bytes(place.read_bytes()[:-1] + b"!")
        refused(client.post("/v1/edits/1/redo"), 500, "edits/1/patch.safetensors", "the file was changed")
        refused(client.post("/v1/completions", json={"model": "tiny", "prompt": "Q", "edits_as_of": 1}), 500, "edits/1")
        assert said(client, FACTS[0][0], edits_as_of=0) != before
        assert said(client, FACTS[0][0]) == by_itself(folder, FACTS[0][0], 3)


def test_a_base_that_was_changed_is_not_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_lab.errors import DataError

    other = load_editable("tiny")
    other.model.get_output_embeddings().weight.data[0, 0] += 1
    monkeypatch.setattr("cl_lab.deployment.load_editable", lambda name: other)
    with pytest.raises(DataError, match="the base model was changed underneath"):
        Service(folder)


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_stop(folder: Path) -> None:
    command = [sys.executable, "-m", "cl_lab", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.search(r"tiny with 2 edits: (http://127\.0\.0\.1:\d+) ", line)
            assert found, line
            port = found[1].rpartition(":")[2]
            taken = subprocess.run([*command[:-1], port], capture_output=True, text=True, check=False)
            assert taken.returncode == 2
            assert f"--port {port}: cannot be had" in taken.stderr
            body = {"model": "tiny", "prompt": "Zebras have", "max_tokens": 400, "stream": True}
            with httpx.stream("POST", f"{found[1]}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                *_, last = (line for line in lines if line)
            assert last == "data: [DONE]", "what had begun was answered"
            assert process.wait(60) == -signal.SIGTERM, "of what it was told, in the end"
            assert process.stderr
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.filterwarnings("ignore")
def test_no_request_of_a_fuzzer_breaks_it(folder: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    with running(folder, limits=Limits(max_tokens=16)) as (client, service):
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
        schema.config.update(base_url=str(client.base_url))
        counts: dict[int, int] = {}
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == 12
        for operation, mode in itertools.product(operations, schemathesis.GenerationMode):

            @hypothesis.settings(
                max_examples=25, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.seed(1)
            @hypothesis.given(case=operation.as_strategy(mode))
            def fuzz(case: Any) -> None:
                answer = case.call()
                counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, answer.text

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong about /healthz
                fuzz()
        assert said(client, "Q")
        assert service.engine.alive
    assert counts[200] > 100
    assert sum(n for status, n in counts.items() if status >= 400) > 100
    assert Deployment(folder).check() == []
