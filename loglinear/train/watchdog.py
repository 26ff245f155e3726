"""A rank that is stuck ends within a set time, and the log says what it was doing and where.

A collective whose partner is gone waits for days (`loglinear.parallel.world.PATIENCE`). All ranks are stuck then, so
each of them reports, and the stacks tell which one is elsewhere.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from types import TracebackType

EXIT_HUNG = 4  # of a rank that the watchdog ended
POLL_SECONDS = 0.2
REPORT_SECONDS = 5.0  # between a rank's report and its end, which takes the others down: they report in the meantime
SPARE_SECONDS = 10.0  # after which the C watchdog ends a rank whose main thread never lets another one run


class Watchdog:
    """Ends this process if `beat` was not called for `seconds`. Use as a context manager."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._doing, self._deadline = "", float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._has_struck = False

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._has_struck:
            # Another rank, as stuck as this one, was the first to end: that is why something failed here.
            traceback.print_exception(error)
            self._thread.join()  # which ends this process
        self._closed.set()
        self.rest()

    def beat(self, doing: str) -> None:
        """Something was finished; `doing` names what comes next, for the report."""
        self._doing, self._deadline = doing, time.monotonic() + self._seconds
        faulthandler.dump_traceback_later(self._seconds + SPARE_SECONDS, exit=True)

    def rest(self) -> None:
        """What comes next may take any time."""
        self._deadline = float("inf")
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if time.monotonic() > self._deadline:
                self._has_struck = True
                self._report()
                time.sleep(REPORT_SECONDS)
                os._exit(EXIT_HUNG)

    def _report(self) -> None:
        rank = os.environ.get("RANK", "0")
        print(
            f"watchdog: rank {rank} on {node_name(os.environ)} made no progress for {self._seconds:g} s"
            f" while {self._doing}; its stack:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)


def node_name(environment: Mapping[str, str]) -> str:
    """What SLURM calls this node, or else what it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()
