"""The errors a user can cause, and the one way in which they are shown.

Every such error says on one line what is wrong, which value is, and what to do; the command line prints that line and
exits with code 2. Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us (config, data, environment), phrased as *cause, value, fix* on one line."""

    exit_code = 2

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class ConfigError(UserError):
    """A configuration that does not fit its schema."""


class DataError(UserError):
    """Data that is absent, damaged or of another shape than its format says."""


class PluginError(UserError):
    """A plug-in that does not exist, cannot be imported, or clashes with another distribution."""


class TrainingError(UserError):
    """A run that cannot go on (NaN loss, no trainable parameters, …); what was computed stays on disk."""


class EditError(UserError):
    """An edit that cannot be made (a loss that is not finite, no subject in the prompt); the model is as it was."""


class TooLong(DataError, EditError):
    """A text of more tokens than the model reads: where it is a part of the data, and where an editor made it of an edit."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""


class Interrupted(Exception):
    """Raised at a step boundary after SIGINT or SIGTERM, once the state has been saved."""

    def __init__(self, signal_name: str, path: str) -> None:
        super().__init__(f"stopped by {signal_name}; everything so far is saved in {path}; continue with --resume")
        self.signal_name = signal_name


_SHOWN = 30  # letters at the beginning and at the end: of a prompt behind an editor's text the end says more


def shortened(text: str) -> str:
    """A text of the user's on one line, without its middle where it is long, as messages have it."""
    line = " ".join(text.split())
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]}…{line[-_SHOWN:]}"


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to ``word``, else ``"; known: …"``."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names) if names else 'none'}"
