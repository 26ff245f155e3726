"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Adds up seconds by phase; waits for the GPU at each change of phase only while `precise`."""

    def __init__(self, device: torch.device) -> None:
        self.precise = False
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside towards `phase`."""
        start = self._now()
        yield
        self._seconds[phase] += self._now() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, which starts anew."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _now(self) -> float:
        if self.precise and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
