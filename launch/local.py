"""The supervisor of a run on this machine: a process of its own that goes on when the terminal is closed."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from launch.cluster import ClusterConfig
from launch.job import JobFolder
from launch.supervisor import supervise
from loglinear.errors import UserError

POLL_SECONDS = 0.2


def start(
    job: JobFolder, cluster: ClusterConfig, *, after: Sequence[Path] = (), slots: tuple[Path, int] | None = None
) -> str:
    """Start a supervisor; returns its process's number as soon as it lives.

    Args:
        job: what it is to run.
        cluster: `setup` is run before it.
        after: folders of runs that must finish first.
        slots: a folder and how many of those that share it may run at once.

    Raises:
        UserError: it ended at once; its log is named.
    """
    options = [option for run_dir in after for option in ("--after", str(run_dir))]
    options += [] if slots is None else ["--slots", str(slots[0]), "--parallel", str(slots[1])]
    command = shlex.join([sys.executable, "-u", "-m", "launch.local", str(job.root), *options])
    script = "\n".join(["set -e", *cluster.setup, f"exec {command}"])
    before = len(job.attempts())
    with job.local_log.open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    while not is_alive(job) and process.poll() is None:
        time.sleep(POLL_SECONDS / 10)
    if process.poll() and len(job.attempts()) == before:
        raise UserError(f"the run ended before it began: {job.local_log} says why")
    return str(process.pid)


def is_alive(job: JobFolder) -> bool:
    """Whether a local supervisor holds the job."""
    try:
        with FileLock(job.lock, timeout=0):
            return False
    except Timeout:
        return True


def main(arguments: Sequence[str]) -> None:
    """Wait for what must come before, then train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--after", type=Path, action="append", default=[])
    parser.add_argument("--slots", type=Path)
    parser.add_argument("--parallel", type=int, default=1)
    given = parser.parse_args(arguments)
    with FileLock(JobFolder(given.job).lock):
        while any(is_alive(JobFolder.of(run_dir)) for run_dir in given.after):
            time.sleep(POLL_SECONDS)
        after = [str(run_dir) for run_dir in given.after]
        if given.slots is None:
            supervise(str(given.job), after)
            return
        with _slot(given.slots, given.parallel):
            supervise(str(given.job), after)


@contextmanager
def _slot(folder: Path, count: int) -> Iterator[None]:
    """One of `count` places."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for number in range(count):
            try:
                with FileLock(folder / f"{number}.lock", timeout=0):
                    yield
                    return
            except Timeout:
                time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])
