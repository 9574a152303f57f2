"""The process that makes a served deployment's edits, so that answering has a Python and a core of its own.

It alone writes the folder; the service reads the journal behind it. So an edit over HTTP is what ``cl-lab edit apply`` is,
and should the process die, the folder is as after any kill and the service goes on.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_lab.deployment import Deployment
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, DataError, EditError, PluginError, TooLong, TrainingError, UserError
from cl_lab.facts import Edit
from cl_lab.patches import Patch

log = logging.getLogger("cl_lab")

_PREVIEWS = 8
"""Previews whose patches are kept, to be applied without making them again."""


class Busy(UserError):
    """Another edit is being made."""


class Stale(UserError):
    """A preview that is not known any more, or was made before the last change."""


_TOLD: dict[str, type[UserError]] = {
    error.__name__: error
    for error in (ConfigError, DataError, EditError, PluginError, TooLong, TrainingError, UserError, Busy, Stale)
}
"""What the process may say went wrong, by the names it says it by."""


class EditWorker:
    """The process, from the side of the service: one request at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = threading.Lock()
        self._process: Any = None
        self._pipe: Any = None

    def start(self) -> None:
        """Start the process, which reads the model meanwhile."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._folder), name="cl-lab edits", daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._process.pid if self._process else None

    def call(self, what: str, **given: Any) -> dict[str, Any]:
        """Have it ``preview``, ``apply``, ``undo`` or ``redo``; see :class:`_Desk`. Blocks.

        Raises :class:`Busy` while another call is served, what the deployment raises, and :class:`RuntimeError` where the
        process failed; if it is gone another is started.
        """
        if not self._turn.acquire(blocking=False):
            raise Busy("another edit is being made; try again when it is done")
        try:
            if self._process is None or not self._process.is_alive():
                self.start()
            try:
                self._pipe.send((what, given))
                kind, answer = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join(5)
                code = self._process.exitcode
                self.start()
                raise RuntimeError(
                    f"the process that makes edits ended (exit code {code}); it was started again"
                ) from None
        finally:
            self._turn.release()
        if kind == "done":
            found: dict[str, Any] = answer
            return found
        raise _TOLD.get(kind, RuntimeError)(answer)

    def close(self, seconds: float = 30.0) -> None:
        """Let it finish what it does, for so long at most, and end it."""
        done = self._turn.acquire(timeout=seconds)
        try:
            if self._process is not None:
                self._process.kill()  # what it may have in hand nobody asked for
                self._process.join()
                self._pipe.close()
        finally:
            if done:
                self._turn.release()


class _Desk:
    """The deployment from the side of the process: its model, kept as the journal says, and the last previews."""

    def __init__(self, folder: Path) -> None:
        self.deployment = Deployment(folder)
        self.model: EditableModel = self.deployment.base()
        self._there: list[str] = []
        self._previews: OrderedDict[str, tuple[int, Patch, list[Edit], dict[str, Any]]] = OrderedDict()
        self._follow()

    def preview(self, facts: Sequence[Mapping[str, Any]], chat: bool = False) -> dict[str, Any]:
        """What an edit would do; ``preview`` in the answer names it to :meth:`apply`."""
        edits = [Edit.from_json(record) for record in facts]
        self.deployment.read()
        self._follow()
        patch, seen = self.deployment.propose(self.model, edits, chat=chat)
        name = secrets.token_hex(8)
        self._previews[name] = len(self.deployment.events), patch, edits, seen
        while len(self._previews) > _PREVIEWS:
            self._previews.popitem(last=False)
        return {"preview": name, **seen}

    def apply(
        self,
        facts: Sequence[Mapping[str, Any]] = (),
        preview: str | None = None,
        force: bool = False,
        chat: bool = False,
    ) -> dict[str, Any]:
        """Make an edit, unless it breaks a gate and ``force`` is not said: ``id`` is then None."""
        edits = [Edit.from_json(record) for record in facts]
        with self.deployment.changing():
            self._follow()
            if preview is None:
                patch, seen = self.deployment.propose(self.model, edits, chat=chat)
            elif preview not in self._previews:
                raise Stale(f"preview '{preview}': is not known (any more); preview the edit again")
            else:
                n, patch, edits, seen = self._previews[preview]
                if n != len(self.deployment.events):
                    raise Stale(
                        f"preview '{preview}': was made behind event {n}, the journal has {len(self.deployment.events)}; "
                        "preview the edit again"
                    )
            identifier = None
            if force or not seen["broken"]:
                identifier = self.deployment.apply(self.model, patch, edits, forced=bool(seen["broken"]))
                self._there.append(identifier)
                self._previews.clear()
        return {"id": identifier, "events": len(self.deployment.events), **seen}

    def undo(self, identifier: str) -> dict[str, Any]:
        """Take an edit out of force."""
        return self._change(self.deployment.undo, identifier)

    def redo(self, identifier: str) -> dict[str, Any]:
        """Bring it back."""
        return self._change(self.deployment.redo, identifier)

    def warm(self) -> None:
        """Make an edit for nothing: what the editor hears of the model first need not be waited for by the first user."""
        from cl_lab import registry

        editor: Any = registry.create("editors", self.deployment.document["editor"], "editor")
        prompt = "The colour of the fourth door is"
        editor.propose(self.model, [Edit(prompt, "green", subject="the fourth door")], ())

    def _change(self, change: Any, identifier: str) -> dict[str, Any]:
        with self.deployment.changing():
            change(identifier)
            self._follow()
        return {"id": identifier, "events": len(self.deployment.events)}

    def _follow(self) -> None:
        """Bring the model to where the journal is."""
        wanted = self.deployment.active()
        if wanted != self._there:
            self.deployment.bring(self.model, self._there, wanted)
            self._there = wanted


def _work(pipe: Any, folder: Path) -> None:
    """The process: answer requests until the pipe is closed."""
    import torch

    from cl_lab.display import configure_logging

    configure_logging()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service ends this process when it has drained
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)  # answers first
    torch.set_num_threads(1)
    desk: _Desk | None = None
    cold = True
    while True:
        # The model is read, and the editor warmed, while nobody asks; what goes wrong there the first request will tell.
        while not pipe.poll(0 if desk is None or cold else None):
            try:
                if desk is None:
                    desk = _Desk(folder)
                else:
                    cold = False
                    desk.warm()
            except Exception as error:  # noqa: BLE001 - nobody asked yet; the first who does is told
                log.warning("edits: %s", error)
                break
        try:
            what, given = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            desk = desk or _Desk(folder)
            if what not in ("preview", "apply", "undo", "redo"):
                raise ConfigError(f"'{what}': is nothing that can be done to an edit")
            answer = "done", getattr(desk, what)(**given)
        except UserError as error:
            answer = next(c.__name__ for c in type(error).__mro__ if c.__name__ in _TOLD), str(error)
        except Exception as error:
            log.exception("an edit failed")
            desk, answer = None, ("failed", f"{type(error).__name__}: {error}")
        pipe.send(answer)
