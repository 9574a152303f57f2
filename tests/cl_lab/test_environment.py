"""What a run ran on, and with how many threads."""

from __future__ import annotations

import pytest

from cl_lab import environment


@pytest.mark.parametrize(
    ("own", "processes", "asked", "expected"),
    [
        ("", 1, None, 8),
        ("", 2, None, 4),
        ("", 16, None, 1),
        ("1", 1, None, 1),
        ("3,2", 2, None, 3),
        ("6", 2, None, 4),
        ("1", 2, 5, 5),
        ("many", 2, None, 4),
        ("0", 2, None, 4),
    ],
)
def test_threads(own: str, processes: int, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores shared by the processes, fewer where OMP_NUM_THREADS says so, and what is asked for before both."""
    monkeypatch.setattr(environment, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert environment.threads_for(processes, asked) == expected
