"""A deployment in service: its states as models that share their tensors, the engine that answers, the edits made live."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_lab.deployment import Deployment, named
from cl_lab.edit_worker import EditWorker
from cl_lab.editable import EditableModel
from cl_lab.errors import UserError
from cl_lab.generation import Engine
from cl_lab.patches import Patch

log = logging.getLogger("cl_lab")

_OLD_STATES = 4
"""States of the past that are kept, beside the present one, for those who ask as of then."""


@dataclass(frozen=True, eq=False)
class State:
    """The model behind event ``position`` of the journal, with the edits ``ids`` on it, oldest first."""

    position: int
    ids: tuple[str, ...]
    model: EditableModel

    def named(self, patches: Sequence[Patch]) -> list[str]:
        """The ids of edits whose patches these are."""
        return named(patches, self.model, self.ids)


class Service:
    """What a server needs of a deployment. Reads the model; raises as :class:`~cl_lab.deployment.Deployment` does.

    States change by :meth:`follow` alone, which reads the journal: edits may come from here or from another process.
    """

    def __init__(self, folder: Path, engine: Engine | None = None) -> None:
        self.deployment = Deployment(folder)
        self.engine = engine or Engine()
        self.worker = EditWorker(folder)
        model = self.deployment.base()
        ids = self.deployment.active()
        self.deployment.bring(model, [], ids)
        self.state = State(len(self.deployment.events), tuple(ids), model)
        self.trouble = ""
        """Why the journal can no longer be followed; empty while it can."""
        self.swaps = self.swap_seconds = 0.0
        self._old: OrderedDict[int, State] = OrderedDict()
        self._moving = threading.RLock()
        self._facts: dict[str, list[dict[str, Any]]] = {}

    def start(self) -> None:
        """Begin to answer, and have the process that edits come up."""
        self.engine.start()
        self.worker.start()

    def close(self, seconds: float = 30.0) -> None:
        """Answer what was asked, finish the edit in progress, and stop; each has ``seconds``."""
        self.engine.close(seconds)
        self.worker.close(seconds)

    def at(self, position: int | None) -> State:
        """The state behind an event of the journal, the present one for None.

        Raises :class:`ConfigError` for a position that is not in the journal, and as :meth:`Deployment.patch`.
        """
        state = self.state
        if position is None or position == state.position:
            return state
        with self._moving:
            if position not in self._old:
                self._old[position] = self._made(position)
                while len(self._old) > _OLD_STATES:
                    self._old.popitem(last=False)
            self._old.move_to_end(position)
            return self._old[position]

    def follow(self) -> None:
        """Go where the journal is. A journal or a patch that is damaged leaves the service in the state it is in."""
        with self._moving:
            begin = time.perf_counter()
            try:
                self.deployment.read()
                if len(self.deployment.events) != self.state.position:
                    self.state = self._made(len(self.deployment.events))
                    self.swaps, self.swap_seconds = self.swaps + 1, time.perf_counter() - begin
                self.trouble = ""
            except UserError as error:
                if str(error) != self.trouble:
                    log.error("the service stays at event %d: %s", self.state.position, error)
                self.trouble = str(error)

    def edit(self, what: str, **given: Any) -> dict[str, Any]:
        """Preview, apply, undo or redo, as :meth:`EditWorker.call`; a change is in force when this returns."""
        answer = self.worker.call(what, **given)
        if what != "preview":
            self.follow()
        return answer

    def edits(self, search: str = "") -> list[dict[str, Any]]:
        """The edits whose prompt or answer has ``search`` in it, oldest first, as ``cl-lab edit list`` has them."""
        with self._moving:
            active = set(self.deployment.active())
            rows: list[dict[str, Any]] = [
                {
                    "id": event.id,
                    "time": event.time,
                    "event": event.n,
                    "in_force": event.id in active,
                    "forced": event.forced,
                    "facts": self._facts_of(event.id),
                }
                for event in self.deployment.events
                if event.kind == "apply"
            ]
        wanted = search.casefold()
        return [r for r in rows if any(wanted in f"{f['prompt']}\n{f['answer']}".casefold() for f in r["facts"])]

    def shown(self, identifier: str) -> dict[str, Any]:
        """All there is to say of an edit, as ``cl-lab edit show`` has it. Raises :class:`ConfigError` for none."""
        with self._moving:
            self.deployment.event_of(identifier)
            patch = self.deployment.patch(identifier)
            return {
                "id": identifier,
                "in_force": identifier in self.deployment.active(),
                "facts": self._facts_of(identifier),
                "patch": {"kind": patch.kind, "editor": patch.editor, "bytes": patch.nbytes, "notes": patch.notes},
                "fires": patch.fires(self.state.model),
                "events": [dataclasses.asdict(e) for e in self.deployment.events if e.id == identifier],
            }

    def events(self) -> list[dict[str, Any]]:
        """The journal, oldest first."""
        with self._moving:
            return [dataclasses.asdict(event) for event in self.deployment.events]

    def _facts_of(self, identifier: str) -> list[dict[str, Any]]:
        if identifier not in self._facts:  # they never change
            self._facts[identifier] = [e.as_json() for e in self.deployment.edits(identifier)]
        return self._facts[identifier]

    def _made(self, position: int) -> State:
        wanted = self.deployment.active(position)
        model = self.state.model.twin()
        self.deployment.bring(model, self.state.ids, wanted)
        return State(position, tuple(wanted), model)
