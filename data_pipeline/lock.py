"""Who is preparing a folder: one process at a time holds its lock, and the lock goes with the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import LOG_FILE
from loglinear.errors import UserError

PATIENCE = 5.0  # seconds; whoever asks `is_preparing` holds the lock for a moment too
TAIL_LINES = 8


@contextmanager
def preparation_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which the operating system frees however this process ends.

    Raises:
        UserError: another process holds it.
    """
    lock = _lock(folder)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(f"another process is preparing {folder}; wait for it, or set another data.dir") from None
    try:
        yield
    finally:
        lock.release()


def is_preparing(folder: Path) -> bool:
    """Whether a living process is preparing `folder`."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def log_tail(folder: Path) -> str:
    """The last lines that a preparation in the background printed, or an empty text."""
    try:
        lines = (folder / LOG_FILE).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])


def preparation_ended(folder: Path) -> UserError:
    """The error of those who wait for a preparation that ended before it was complete."""
    tail = log_tail(folder)
    said = f"; its last words:\n{tail}" if tail else ""
    return UserError(
        f"the preparation of {folder} ended before it was complete: run `{PREPARE_COMMAND}` to continue it{said}"
    )


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / "prepare.lock", is_singleton=False)
