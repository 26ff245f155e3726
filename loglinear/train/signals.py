"""Signals ask for a stop; the loop honours them at a step's end, when all ranks agree."""

from __future__ import annotations

import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop. A second interrupt from the keyboard ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Take over the signals that schedulers, preemption and users send."""
        for number in ASKING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
