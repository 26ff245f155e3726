"""Who is preparing a folder: one process at a time holds its lock, and the lock goes with the process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import LOG_FILE
from loglinear.errors import UserError

LOCK_FILE = "prepare.lock"
PATIENCE = 5.0  # seconds; whoever asks `is_preparing` shares the lock for a moment
TAIL_LINES = 8


class PreparationEndedError(UserError):
    """Somebody or something ended a preparation, which goes on when it is started again."""


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
    """Whether a living process is preparing `folder`.

    To ask, the lock is shared: two that ask at once must not take each other for a preparation.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def log_tail(folder: Path) -> str:
    """The last lines that a preparation in the background printed, or an empty text."""
    try:
        lines = (folder / LOG_FILE).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])


def preparation_ended(folder: Path, refused: bool = False) -> UserError:
    """The error of those who wait for a preparation that ended before it was complete; `refused` if of bad input."""
    tail = log_tail(folder)
    said = f"; its last words:\n{tail}" if tail else ""
    kind = UserError if refused else PreparationEndedError
    return kind(
        f"the preparation of {folder} ended before it was complete: run `{PREPARE_COMMAND}` to continue it{said}"
    )


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / LOCK_FILE, is_singleton=False)
