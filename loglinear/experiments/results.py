"""Results as JSON lines: one finished run a line, written once, never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loglinear.errors import UserError

Result = dict[str, Any]


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Add a line for each of `results`; a reader sees all of them or, after a crash, only whole ones.

    Raises:
        UserError: the file cannot be written to.
    """
    lines = "".join(json.dumps(result, separators=(",", ":")) + "\n" for result in results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)  # half a line that a crash left
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another folder with --out") from None


def read_results(path: Path) -> list[Result]:
    """All finished runs in `path`; none if there is no file. Half a line at its end is no result.

    Raises:
        UserError: a line is no JSON object.
    """
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            results.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number} is no JSON object: restore the file from its history") from None
    return results


def check_protocol(path: Path, results: Sequence[Result], fingerprint: str) -> None:
    """Refuse results of another protocol beside those of this one.

    Raises:
        UserError: a result was made by another protocol.
    """
    others = {result["protocol"] for result in results} - {fingerprint}
    if others:
        raise UserError(
            f"{path} has results of protocol {min(others)}, but protocol.yaml is {fingerprint} now:"
            " restore it, or give another folder by --out"
        )
