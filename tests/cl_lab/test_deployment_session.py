"""The script that reports/deployment.md is made with, on the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.checkout]

SCRIPT = Path(__file__).parents[2] / "reports" / "deployment_session.py"


def test_a_session_holds_what_it_says(tmp_path: Path) -> None:
    facts = [{"prompt": "The capital of Peru is", "answer": "B"}, {"prompt": "Zebras have", "answer": "q"}]
    for name, records in (("facts", facts), ("others", [{"prompt": "Quick question: who won?"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    knobs = ["lr=0.02", "steps=60", "contexts=0"]
    files = ["--facts", "facts.jsonl", "--others", "others.jsonl"]
    command = [sys.executable, str(SCRIPT), "service", "--model", "tiny", "--editor", "ft-m", "--undo", "1"]
    done = subprocess.run([*command, *files, *knobs], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [edit["id"] for edit in found["edits"]] == ["1", "2"]
    assert found["edits"][1]["after"].startswith("q")
    assert found["undone"]["prompt"] == facts[0]["prompt"]
    assert found["undone"]["as of before"][0] == found["edits"][0]["after"], "as it was behind both edits"
    assert found["reloaded, as served"] == 2
    assert "all as written" in found["check"]
    assert min(found[f"tokens/s {when}"] for when in ("before", "after")) > 0
