"""What has become of submitted runs: read from their folders; SLURM is asked for nothing but the state."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from launch import local, slurm
from launch.job import FOLDER, End, JobFolder, Start, Submission
from loglinear.errors import UserError
from loglinear.train.folder import Progress, RunFolder

UNKNOWN = "UNKNOWN"  # SLURM does not say
ACTIVE = {"RUNNING", "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}
POLL_SECONDS = 0.5
ASK_SECONDS = 3.0  # between two requests to save


@dataclass(frozen=True)
class Status:
    """One row of `loglinear jobs`.

    Attributes:
        run_dir: the run's folder.
        id: of the job.
        state: SLURM's word, RUNNING for a live local run, how the last attempt ended, or UNKNOWN.
        note: why it waits or ended.
        progress: what the run last said of itself.
        steps: how many it is to make.
        checkpoint: step and age in seconds of the last complete checkpoint.
        attempts: how often ranks were started.
    """

    run_dir: Path
    id: str
    state: str
    note: str
    progress: Progress | None
    steps: int
    checkpoint: tuple[int, float] | None
    attempts: int


def find_jobs(folder: Path) -> list[JobFolder]:
    """All submitted runs in and below a folder.

    Raises:
        UserError: there is none.
    """
    jobs = [JobFolder(path.parent) for path in sorted(folder.rglob(f"{FOLDER}/job.json"))]
    if not jobs:
        raise UserError(f"{folder} holds no submitted run: `loglinear submit` starts one, or name another folder")
    return jobs


def statuses(jobs: Sequence[JobFolder]) -> list[Status]:
    """Of every job, with one question to SLURM for all of them."""
    submissions = [job.submission() for job in jobs]
    ids = [each.id for each in submissions if each.kind == "slurm"]
    try:
        known = slurm.job_states(ids)
    except UserError as silence:
        known = dict.fromkeys(ids, (UNKNOWN, str(silence)))
    return [_status(job, known.get(submission.id)) for job, submission in zip(jobs, submissions, strict=True)]


def status(job: JobFolder) -> Status:
    """Of one job, for those who act on it.

    Raises:
        UserError: SLURM does not say whether it runs.
    """
    row = statuses([job])[0]
    if row.state == UNKNOWN:
        raise UserError(f"whether job {row.id} still trains {job.run_dir} is not known: {row.note}")
    return row


def is_active(job: JobFolder) -> bool:
    """Whether the job runs, or waits to run.

    Raises:
        UserError: SLURM does not say.
    """
    return status(job).state in ACTIVE


def table(rows: Sequence[Status]) -> Table:
    """What a terminal shows."""
    shown = Table(box=None, header_style="bold")
    for heading in ("run", "job", "state", "step", "loss", "tokens/s", "left", "last checkpoint", "starts", "note"):
        shown.add_column(heading, overflow="fold", no_wrap=heading not in ("run", "note"))
    for row in rows:
        progress = row.progress
        live = progress if row.state in ACTIVE else None
        step = max(progress.step if progress else 0, row.checkpoint[0] if row.checkpoint else 0)
        shown.add_row(
            os.path.relpath(row.run_dir),
            row.id,
            row.state,
            f"{step}/{row.steps}",
            f"{progress.loss:.3f}" if progress else "",
            f"{live.tokens_per_second:,.0f}" if live else "",
            duration(live.seconds_left) if live else "",
            f"step {row.checkpoint[0]}, {duration(row.checkpoint[1])} ago" if row.checkpoint else "none",
            str(row.attempts),
            row.note,
        )
    return shown


def cancel(job: JobFolder, seconds: float) -> Status:
    """Let the run save and end; returns once it has, or has been ended after `seconds` without having saved.

    Raises:
        UserError: it is not running.
    """
    if not is_active(job):
        raise UserError(f"{job.run_dir} is not running, so there is nothing to cancel")
    job.cancel_marker.touch()
    submission, deadline, asked = job.submission(), time.monotonic() + seconds, 0.0
    while (row := statuses([job])[0]).state in ACTIVE | {UNKNOWN}:
        if time.monotonic() > deadline or row.state == "PENDING":
            _end(submission)
        elif time.monotonic() > asked + ASK_SECONDS:  # again, for ranks that were only starting
            asked = time.monotonic()
            _ask_to_save(submission)
        time.sleep(POLL_SECONDS)
    return row


def _ask_to_save(submission: Submission) -> None:
    if submission.kind == "slurm":
        with contextlib.suppress(slurm.NoAnswerError):
            slurm.signal_ranks(submission.id, "USR2")
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(submission.id), signal.SIGTERM)


def _end(submission: Submission) -> None:
    if submission.kind == "slurm":
        with contextlib.suppress(slurm.NoAnswerError):
            slurm.cancel(submission.id)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(submission.id), signal.SIGKILL)


def duration(seconds: float) -> str:
    """About how long, such as 12 s, 5 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _status(job: JobFolder, known: tuple[str, str] | None) -> Status:
    events, submission = job.attempts(), job.submission()
    state, note = known or ("", "")
    if submission.kind == "local" and local.is_alive(job):
        state = "RUNNING"
    folder, steps, checkpoint = RunFolder(job.run_dir), job.config().train.steps, job.last_checkpoint()
    is_made = checkpoint is not None and checkpoint[0] >= steps
    if state not in ACTIVE and (state != UNKNOWN or is_made):  # a run that is made needs no word of SLURM's
        state, note = _last_words(events, state, note)
    return Status(
        run_dir=job.run_dir,
        id=submission.id,
        state=state,
        note="" if note == "None" else note,
        progress=folder.read_progress(),
        steps=steps,
        checkpoint=checkpoint,
        attempts=sum(isinstance(event, Start) for event in events),
    )


def _last_words(events: Sequence[Start | End], state: str, note: str) -> tuple[str, str]:
    """How the last attempt ended, if that was recorded, or SLURM's word."""
    last = events[-1] if events else None
    if isinstance(last, End) and last.outcome != "ended":
        return last.outcome, last.reason
    return state or "lost", note if state else "SLURM knows it no more, and how it ended was not recorded"


def last_log(job: JobFolder, rank: int, attempt: int | None) -> Path:
    """The log of a rank in an attempt, by default the last.

    Raises:
        UserError: there is no such log.
    """
    attempts = sorted((job.root / "logs").glob("attempt-*"))
    folder = job.logs(attempt) if attempt else attempts[-1] if attempts else job.logs(1)
    log = folder / f"rank-{rank}.log"
    if not log.exists():
        raise UserError(f"there is no {log}: the ranks have not started, or there is no such rank or attempt")
    return log
