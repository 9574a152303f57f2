"""What a person sees in the terminal while something runs: log lines and progress bars, all on stderr."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

_REFRESH_SECONDS = 0.2


def configure_logging(level: int = logging.INFO) -> None:
    """One line per message on stderr; warnings and errors say so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    logger = logging.getLogger("cl_lab")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        # Of a defect alone: what a user can mend is told without.
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _started_bar(unit: str, *more: str) -> Any:
    """A bar on stderr that counts ``unit`` and shows when it will be done; ``more`` are Rich's texts behind it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    bar = Progress(*counts, *map(TextColumn, more), console=Console(stderr=True), transient=True)
    bar.start()
    return bar


class StepProgress:
    """A progress bar with ETA over a run's optimiser steps; on a pipe or in CI it prints one line per experience.

    Implements :class:`cl_lab.trainer.Observer`. ``prefix`` stands before the description.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._bar: Any = None
        self._task: Any = None
        self._waiting = 0
        self._shown = 0.0

    def __enter__(self) -> StepProgress:
        if sys.stderr.isatty():
            self._bar = _started_bar("steps", "{task.fields[loss]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, total_steps: int, done_steps: int) -> None:
        """See :class:`cl_lab.trainer.Observer`."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(
                f"{self.prefix}initial evaluation", total=total_steps, completed=done_steps, loss=""
            )

    def stepped(self, experience: Any, step: int, loss: float | None) -> None:
        """See :class:`cl_lab.trainer.Observer`."""
        self._waiting += 1
        if self._bar is None or (now := time.monotonic()) - self._shown < _REFRESH_SECONDS:
            return
        shown = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        self._bar.update(
            self._task, advance=self._waiting, description=f"{self.prefix}experience {experience.index}", **shown
        )
        self._waiting, self._shown = 0, now

    def told(self, text: str) -> None:
        """A line about what is done; nothing beside a bar."""
        if self._bar is None:
            logging.getLogger("cl_lab").info("%s%s", self.prefix, text)

    def scored(self, record: Any) -> None:
        """See :class:`cl_lab.trainer.Observer`."""
        if self._bar is not None or not record.matrix:
            return
        row = record.matrix[-1]
        seen = row[: len(record.matrix)]
        logging.getLogger("cl_lab").info(
            "%sexperience %d of %d learnt: %s so far %.4f (%.1f s)",
            self.prefix,
            len(record.matrix),
            len(row),
            record.score,
            sum(seen) / len(seen),
            record.train_seconds + record.eval_seconds,
        )


class EditProgress:
    """A progress bar with ETA over the edits of a file; on a pipe or in CI a line for every tenth of them."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._tenth = 0

    def __enter__(self) -> EditProgress:
        if sys.stderr.isatty():
            self._bar = _started_bar("edits")
            self._task = self._bar.add_task("asking the model as it is", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def told(self, made: int, of: int, what: str) -> None:
        """``made`` edits ``of`` so many are made, ``what`` being the last."""
        if self._bar is not None:
            self._bar.update(self._task, description=what[:40], total=of, completed=made)
        elif 10 * made // of > self._tenth or made == of:
            self._tenth = 10 * made // of
            logging.getLogger("cl_lab").info("%d of %d edits made: %s", made, of, what)
