"""How much live edits slow answers down: a deployment of its own under load, without edits, with them, and without again."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cl_lab.deployment import Deployment

SERVING: dict[str, Any] = {
    "model": "smollm2-135m",
    "editor": {"name": "wise"},
    "clients": 8,
    "tokens": 24,
    "edits": 20,
    "seconds": 60.0,
}
"""What is served and edited by whom, who asks for answers of how many tokens, and how long each phase without edits is."""

ASIDE = (
    "The river that flows through London is the",
    "Water boils at a temperature of",
    "The largest planet of the solar system is",
    "In the middle of the night the old man",
)
"""Prompts that no edit is about: the latency of their answers is what is compared."""

_WORDS = (
    "amber birch cedar delta ember fjord grove heron ivory juniper kestrel lemon maple nectar onyx pearl quartz raven"
)
_WORDS += " sable topaz"


@dataclass(frozen=True)
class _Answer:
    prompt: str
    text: str
    position: int
    tokens: int
    begun: float
    seconds: float
    first: float


def run(threads: int) -> dict[str, Any]:
    """The one row of benchmark *serving*, answered by ``threads`` threads. Latencies are seconds from asking to the end.

    ``failed`` counts requests without a whole answer, ``mixed`` answers that are not those of the state they say they are
    of, asked again with ``edits_as_of``. Raises as :class:`Deployment` does.
    """
    words = _WORDS.split()[: SERVING["edits"]]
    facts = [
        {"prompt": f"The password of house number {n} is", "answer": word, "subject": f"house number {n}"}
        for n, word in enumerate(words, 1)
    ]
    prompts = [*ASIDE, *(fact["prompt"] for fact in facts[:: max(1, len(facts) // 4)][:4])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Deployment.create(
            Path(scratch) / "service", SERVING["model"], SERVING["editor"], {"paraphrases": 0.0, "guards": 0.0}
        ).folder
        command = [sys.executable, "-m", "cl_lab", "serve", str(folder), "--port", "0", "--threads", str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                found = re.search(r"http://([^:]+):(\d+)", line := process.stdout.readline())
                if found is None:
                    raise RuntimeError(f"the service did not start: {line}")
                return {"threads": threads, **_measured(found[1], int(found[2]), prompts, facts, process.pid)}
            finally:
                process.terminate()


def _measured(
    host: str, port: int, prompts: Sequence[str], facts: Sequence[dict[str, str]], pid: int
) -> dict[str, Any]:
    _post(host, port, "/v1/edits/preview", {"facts": [facts[0]]})  # the process that edits is up and warm then
    before = _memory(pid)
    load = _Load(host, port, prompts)
    quiet = [load.phase(lambda: time.sleep(SERVING["seconds"]))]
    took: list[float] = []

    def edit() -> None:
        for fact in facts:
            begin = time.perf_counter()
            _post(host, port, "/v1/edits", {"facts": [fact], "force": True})
            took.append(time.perf_counter() - begin)

    edited = load.phase(edit)
    quiet.append(load.phase(lambda: time.sleep(SERVING["seconds"])))
    after = _memory(pid)
    mixed = 0
    every = [a for phase in (*quiet, edited) for a in phase]
    for position in sorted({a.position for a in every}):
        body = {"model": SERVING["model"], "prompt": list(prompts), "max_tokens": SERVING["tokens"]}
        again = _post(host, port, "/v1/completions", body | {"edits_as_of": position})["choices"]
        expected = dict(zip(prompts, (choice["text"] for choice in again), strict=True))
        mixed += sum(a.text != expected[a.prompt] for a in every if a.position == position)
    without = [a for phase in quiet for a in phase]
    return {
        "clients": SERVING["clients"],
        "edits": len(took),
        "answers": len(every),
        "failed": load.failed,
        "mixed": mixed,
        "p50 without": _share(without, 0.5),
        "p95 without": _share(without, 0.95),
        "p50 with": _share(edited, 0.5),
        "p95 with": _share(edited, 0.95),
        "ratio of p95": _share(edited, 0.95) / _share(without, 0.95),
        "first token p95 without": _share(without, 0.95, "first"),
        "first token p95 with": _share(edited, 0.95, "first"),
        "tokens/s without": _rate(quiet),
        "tokens/s with": _rate([edited]),
        "seconds an edit": sorted(took)[len(took) // 2],
        "GiB before": before,
        "GiB after": after,
    }


class _Load:
    """Clients that ask one thing after another."""

    def __init__(self, host: str, port: int, prompts: Sequence[str]) -> None:
        self._where, self._prompts = (host, port), prompts
        self.failed = 0

    def phase(self, meanwhile: Callable[[], None]) -> list[_Answer]:
        """What is answered to questions that were begun while ``meanwhile`` ran."""
        stop, heard = threading.Event(), list[_Answer]()

        def client(number: int) -> None:
            count = number
            while not stop.is_set():
                try:
                    heard.append(_ask(*self._where, self._prompts[count % len(self._prompts)]))
                except (OSError, ValueError, KeyError, http.client.HTTPException):
                    self.failed += 1
                count += 1

        threads = [threading.Thread(target=client, args=(n,)) for n in range(SERVING["clients"])]
        for thread in threads:
            thread.start()
        try:
            meanwhile()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        return heard


def _ask(host: str, port: int, prompt: str) -> _Answer:
    body = {"model": SERVING["model"], "prompt": prompt, "max_tokens": SERVING["tokens"], "stream": True}
    body["stream_options"] = {"include_usage": True}
    begin, first, text, found, tokens = time.perf_counter(), 0.0, "", -1, 0
    connection = http.client.HTTPConnection(host, port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(answer.read())
        done = False
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            first = first or time.perf_counter() - begin
            if done := line == b"data: [DONE]\n":
                break
            part = json.loads(line[6:])
            text += "".join(choice["text"] for choice in part["choices"])
            tokens = part.get("usage", {}).get("completion_tokens", tokens)
            found = part.get("cl_lab", {}).get("edits_as_of", found)
        if not done:
            raise ValueError("the answer has no end")
    finally:
        connection.close()
    return _Answer(prompt, text, found, tokens, begin, time.perf_counter() - begin, first)


def _post(host: str, port: int, path: str, body: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection(host, port, timeout=600)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}: {answer.read()!r}")
        return json.load(answer)
    finally:
        connection.close()


def _share(answers: Sequence[_Answer], share: float, what: str = "seconds") -> float:
    """The latency that this share of the answers to :data:`ASIDE` stays below."""
    found = sorted(float(getattr(a, what)) for a in answers if a.prompt in ASIDE)
    return found[min(len(found) - 1, int(share * len(found)))]


def _rate(phases: Sequence[Sequence[_Answer]]) -> float:
    """Tokens a second, of all clients together."""
    seconds = sum(max(a.begun + a.seconds for a in p) - min(a.begun for a in p) for p in phases)
    return sum(a.tokens for p in phases for a in p) / seconds


def _memory(pid: int) -> float:
    """GiB that the service and the process that edits hold, what they share counted once."""
    parent = psutil.Process(pid)
    return float(sum(p.memory_full_info().uss for p in [parent, *parent.children(recursive=True)])) / 2**30
