"""What happened to a run besides training, for people and for scripts: one JSON object a line, never rewritten."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path


class EventLog:
    """Appends to `events.jsonl`; each event has a time, the step that it happened at, and its kind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, kind: str, step: int, **details: str | float) -> None:
        """Record one event; a number that is not finite, which JSON does not know, becomes its name."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        known = {name: _plain(value) for name, value in details.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": when, "step": step, "event": kind} | known) + "\n")


def _plain(value: str | float) -> str | float:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
