"""What a person sees in the terminal."""

from __future__ import annotations

import logging

import pytest

from cl_lab.display import configure_logging


def test_a_defect_is_told_with_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user can mend is logged without, in one line."""
    logger = logging.getLogger("cl_lab")
    monkeypatch.setattr(logger, "handlers", [])
    for name in ("level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    configure_logging()
    for defect in (True, False):
        try:
            raise IndexError("a plug-in's own")
        except IndexError as error:
            logger.warning("mine seed 0 failed:\n%s", error, exc_info=defect)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == lines[-1] == "warning: mine seed 0 failed: a plug-in's own"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2] == "IndexError: a plug-in's own"
    assert any("test_display.py" in line for line in lines[2:-2])
