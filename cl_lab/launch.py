"""Starting ranks on this machine, and asking a run to stop in good order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from cl_lab.environment import threads_for

_GRACE_SECONDS = 30.0  # for the other ranks to save and leave once one has ended


def is_rank() -> bool:
    """Whether a launcher (ours, ``accelerate launch``, ``deepspeed``, ``torchrun``) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Ranks the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_ranks(module: str, arguments: Sequence[str], processes: int, threads: int | None) -> int:
    """Run ``python -m module arguments`` as ``processes`` ranks; returns 0, or the first failing rank's exit code.

    When one rank fails the others are stopped. SIGINT and SIGTERM are passed on, so that the ranks save and leave.
    """
    port = str(_free_port())
    each = str(threads_for(processes, threads))
    ranks: list[subprocess.Popen[bytes]] = []
    with _passed_on(ranks):
        for rank in range(processes):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": each,
            }
            # DeepSpeed logs to stdout, which may have been promised to a JSON document.
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments], env=environment, stdout=sys.stderr.fileno()
                )
            )
        return _wait(ranks)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed = 0
    deadline: float | None = None
    while any(r.poll() is None for r in ranks):
        codes = [r.poll() for r in ranks]
        if deadline is None and any(codes):
            failed = next(c for c in codes if c)
            deadline = time.monotonic() + _GRACE_SECONDS
            for r in ranks:
                if r.poll() is None:
                    r.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for r in ranks:
                if r.poll() is None:
                    r.kill()
        time.sleep(0.05)
    return failed or next((r.returncode for r in ranks if r.returncode), 0)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with _handlers(pass_on):
        yield


class StopRequest:
    """Notes SIGINT and SIGTERM, for the trainer to act on at the next step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __call__(self) -> str | None:
        return self.name

    def note(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM become a :class:`StopRequest` (in the main thread; elsewhere nothing changes)."""
    request = StopRequest()
    with _handlers(request.note):
        yield request


@contextmanager
def _handlers(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in held.items():
            signal.signal(number, old)
