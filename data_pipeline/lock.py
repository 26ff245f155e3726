"""Who is preparing a folder: one process at a time holds its lock, and the lock goes with the process."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import LOG_FILE
from loglinear.errors import EXIT_REFUSED, UserError

LOCK_FILE = "prepare.lock"
PATIENCE = 5.0  # seconds; whoever asks `is_preparing` shares the lock for a moment
POLL_SECONDS = 0.5
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


def wait_while_preparing(
    folder: Path,
    done: Callable[[], bool],
    *,
    process: subprocess.Popen[bytes] | None = None,
    is_over: Callable[[], bool | None] = lambda: None,
) -> bool:
    """Return once what a preparation of `folder` makes is `done`.

    Args:
        folder: which this process or another prepares.
        done: looks at what is there; asked again after whether the preparation lives, for it may finish in between.
        process: a preparation of one's own, which may not have taken its lock yet.
        is_over: asked again and again, whether to wait no longer.

    Returns:
        False if `is_over` said so before.

    Raises:
        PreparationEndedError: no preparation lives any more.
        UserError: that of one's own ended by bad input.
    """
    while not done():
        if is_over():
            return False
        code = None if process is None else process.poll()
        # Two that start a preparation at once wait for the one that came first.
        alive = (process is not None and code is None) or is_preparing(folder)
        if not alive and not done():
            raise _preparation_ended(folder, UserError if code == EXIT_REFUSED else PreparationEndedError)
        time.sleep(POLL_SECONDS)
    return True


def _preparation_ended(folder: Path, kind: type[UserError]) -> UserError:
    tail = log_tail(folder)
    said = f"; its last words:\n{tail}" if tail else ""
    return kind(
        f"the preparation of {folder} ended before it was complete: run `{PREPARE_COMMAND}` to continue it{said}"
    )


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / LOCK_FILE, is_singleton=False)
