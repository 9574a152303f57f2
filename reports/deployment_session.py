"""The session of reports/deployment.md: correct a served model over HTTP, ask, undo one, export, reload; figures as JSON.

    python reports/deployment_session.py service --model smollm2-135m > session.json

``service`` is made, served on a free port, and left as it is at the end; what happens is told on stderr. Needs the
development extra, for the ``openai`` client.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

import cl_lab

CL_LAB = (sys.executable, "-m", "cl_lab")
ASIDE = "In the middle of the night the old man"


def main() -> None:
    """Run the session and print its document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("service", type=Path, help="folder of the deployment, which is made")
    parser.add_argument("settings", nargs="*", help="the editor's knobs, for example steps=20")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--editor", default="wise")
    parser.add_argument("--facts", type=Path, default=Path("configs/corrections.jsonl"), help="one edit for each line")
    parser.add_argument("--others", type=Path, default=Path("configs/corrections-others.jsonl"), help="questions aside")
    parser.add_argument("--undo", type=int, default=3, help="the edit that is undone")
    parser.add_argument("--threads", type=int, default=1, help="that answer")
    given = parser.parse_intermixed_args()
    cli("edit", "init", str(given.service), *given.settings, "--model", given.model, "--editor", given.editor)
    facts, others = lines(given.facts), [record["prompt"] for record in lines(given.others)]
    with served(given.service, given.threads) as (url, process):
        document, now = session(url, process, given.model, facts, others, given.undo)
    document["check"] = cli("edit", "check", str(given.service))
    out = given.service.with_name(f"{given.service.name}-export")
    document["export"] = cli("edit", "export", str(given.service), str(out))
    model, prompts = cl_lab.load(out), [fact["prompt"] for fact in facts]
    said = [answer.strip() for answer in model.answer(prompts, max_new_tokens=12)]
    document["reloaded, as served"] = sum(one == other for one, other in zip(said, now, strict=True))
    document["MiB of patches"] = sum(f.stat().st_size for f in (given.service / "edits").rglob("*.safetensors")) / 2**20
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def session(
    url: str, process: psutil.Process, model: str, facts: list[dict[str, Any]], others: list[str], undo: int
) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what is answered to each fact's prompt at the end."""
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    http = httpx.Client(base_url=url, timeout=600)

    def ask(prompt: str, **extra: Any) -> tuple[str, list[str]]:
        made = api.completions.create(model=model, prompt=prompt, max_tokens=12, stop="\n", extra_body=extra)
        extras: Any = made.model_extra
        return made.choices[0].text.strip(), extras["cl_lab"]["fired"]

    def rate() -> float:
        begin, tokens = time.perf_counter(), 0
        for _ in range(5):
            usage: Any = api.completions.create(model=model, prompt=ASIDE, max_tokens=64).usage
            tokens += usage.completion_tokens
        return tokens / (time.perf_counter() - begin)

    def memory() -> dict[str, float]:
        parts = {"answers": process, "edits": process.children(recursive=True)[-1]}
        return {name: part.memory_full_info().uss / 2**20 for name, part in parts.items()}

    http.post("/v1/edits/preview", json={"facts": facts[:1]}).raise_for_status()  # the process that edits is warm then
    document: dict[str, Any] = {"model": model, "tokens/s before": rate(), "MiB before": memory()}
    before, aside = [ask(fact["prompt"]) for fact in facts], [ask(prompt)[0] for prompt in others]
    edits = []
    for n, fact in enumerate(facts):
        begin = time.perf_counter()
        answer = http.post("/v1/edits", json={"facts": [fact]})
        seconds, refused = time.perf_counter() - begin, answer.status_code == 409
        if refused:
            tell(answer.json()["error"]["message"])
            answer = http.post("/v1/edits", json={"facts": [fact], "force": True})
        made = answer.raise_for_status().json()
        moved = [one["prompt"] for one in made["moved"]]
        edits.append({"fact": fact, "before": before[n][0], "id": made["id"], "seconds": seconds, "forced": refused})
        edits[-1] |= {"broken": made["broken"], "moved": moved}
        tell(f"edit {made['id']}: {fact['prompt']} {fact['answer']} ({seconds:.1f} s)")
    after = [ask(fact["prompt"]) for fact in facts]
    for edit, (said, fired) in zip(edits, after, strict=True):
        edit |= {"after": said, "fired": fired, "holds": edit["fact"]["answer"] in said}
    document |= {
        "tokens/s after": rate(),
        "MiB after": memory(),
        "holds": sum(edit["holds"] for edit in edits),
        "others": len(others),
        "others moved": [p for p, was in zip(others, aside, strict=True) if ask(p)[0] != was],
        "seconds an edit": sorted(edit["seconds"] for edit in edits)[len(edits) // 2],
    }
    http.post(f"/v1/edits/{undo}/undo").raise_for_status()
    prompt = facts[undo - 1]["prompt"]
    now = [ask(fact["prompt"]) for fact in facts]
    document |= {
        "undone": {"prompt": prompt, "now": ask(prompt), "as of before": ask(prompt, edits_as_of=len(facts))},
        "as before the edit": now[undo - 1] == before[undo - 1],
        "others the same": sum(a == b for i, (a, b) in enumerate(zip(now, after, strict=True)) if i != undo - 1),
        "edits": edits,
    }
    return document, [said for said, _ in now]


@contextlib.contextmanager
def served(folder: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """The deployment's address and process, until the end of the block."""
    command = [*CL_LAB, "serve", str(folder), "--port", "0", "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+:\d+", line := process.stdout.readline())
            assert found, line
            yield found[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def cli(*arguments: str) -> str:
    """What a command of the laboratory says."""
    tell(f"$ cl-lab {' '.join(arguments)}")
    done = subprocess.run([*CL_LAB, *arguments], capture_output=True, text=True, check=False)
    tell((done.stdout + done.stderr).rstrip())
    done.check_returncode()
    return done.stdout.strip()


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tell(line: str) -> None:
    """On stderr, at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
