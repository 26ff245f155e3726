"""A rank is killed in the middle of a run: how long until the run trains again?"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import status
from launch import submit as submission
from launch.cluster import ClusterConfig
from launch.job import End, JobFolder, Start
from loglinear.config import Config
from loglinear.scaling.results import Result
from loglinear.train.folder import RunFolder, read_records

EVERY, AFTER = 5, 3  # a checkpoint every so many steps; the rank is killed so many after one
VOCAB, TRAIN_BYTES = 1024, 1_000_000  # of the tokenizer, which is trained on Python's standard library
STEPS = 100_000  # more than will be made
PATIENCE = 300.0  # seconds for each event to come
POLL_SECONDS = 0.05


class NoRecovery(RuntimeError):
    """What should have happened did not."""


def measure_recovery(config: Config, length: int, cluster: ClusterConfig, folder: Path) -> Result:
    """Train under the local supervisor, kill the last rank, and watch.

    Args:
        config: whose model is trained.
        length: of the sequences, in tokens.
        cluster: this machine and its ranks.
        folder: for the run and its data; the run's folder must not exist.

    Returns:
        killed_after, from_step: steps made then, and those of the checkpoint that it went on from; and seconds from
        the kill until noticed_seconds: all ranks had ended; started_seconds: new ones were started; trains_seconds:
        they had made a step; caught_up_seconds: they had made all the steps that were made before.

    Raises:
        NoRecovery: the run did not train, or not again.
    """
    run = _run(config, length, cluster.ranks, folder)
    submission.submit(submission.plan(run, cluster), cluster)
    job, metrics = JobFolder.of(run.run.folder), RunFolder(run.run.folder).metrics
    try:
        _wait(job, lambda: 0 < job.last_step() <= _steps(metrics) - AFTER)
        return _kill_and_watch(job, metrics)
    finally:
        if status.is_active(job):
            status.cancel(job, PATIENCE)


def _kill_and_watch(job: JobFolder, metrics: Path) -> Result:
    first = metrics.stat().st_ino
    os.kill(_ranks(job)[-1], signal.SIGKILL)
    killed, steps = time.time(), _steps(metrics)
    start = _wait(job, lambda: next((event for event in job.attempts()[2:] if isinstance(event, Start)), None))
    end = job.attempts()[1]
    assert isinstance(end, End)
    # The new ranks put another file in its place, without the steps that they make again.
    _wait(job, lambda: metrics.stat().st_ino != first and _steps(metrics) > start.step)
    trains = time.time()
    _wait(job, lambda: _steps(metrics) >= steps)
    return {
        "ranks": job.cluster().ranks,
        "killed_after": steps,
        "from_step": start.step,
        "noticed_seconds": end.time - killed,
        "started_seconds": start.time - killed,
        "trains_seconds": trains - killed,
        "caught_up_seconds": time.time() - killed,
    }


def _run(config: Config, length: int, ranks: int, folder: Path) -> Config:
    """The model on text that every machine has."""
    tree = config.model_dump(include={"run", "model", "optimizer", "train"})
    tree["run"] |= {"dir": folder / "run", "init_from": None}
    tree["model"] |= {"vocab_size": VOCAB, "seq_len": length}
    tree["train"] |= {"steps": STEPS, "global_batch": ranks, "micro_batch": 1}
    tree["data"] = {"dir": folder / "data", "tokenizer": {"train_bytes": TRAIN_BYTES}}
    tree["eval"] = {"every": STEPS}
    tree["monitor"] = {"every": 1, "levels_every": STEPS}
    tree["checkpoint"] = {"every": EVERY}
    return Config.model_validate(tree)


def _wait(job: JobFolder, event: Callable[[], Any]) -> Any:
    """What `event` gives, as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := event()):
        if time.monotonic() > deadline or not status.is_active(job):
            raise NoRecovery(f"the run stopped, or did not go on for {PATIENCE:g} s: {job.local_log} says why")
        time.sleep(POLL_SECONDS)
    return found


def _steps(metrics: Path) -> int:
    return max((record["step"] for record in read_records(metrics)), default=0)


def _ranks(job: JobFolder) -> list[int]:
    """The processes of the ranks, children of the supervisor, in order."""
    supervisor, ranks = job.submission().id, []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process may end at any moment
            number, _, after = file.read_text().partition(" ")
            if after.rpartition(")")[2].split()[1] == supervisor:
                ranks.append(int(number))
    return sorted(ranks)
