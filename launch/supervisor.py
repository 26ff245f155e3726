"""Keeps one run going: starts its ranks, sees how they end, and starts them again until it is finished.

Under SLURM this is the job: it runs on the job's first node and starts the ranks with srun. A rank that dies or hangs
is followed by new ranks in the same job, within seconds. What SLURM takes away (time limit, preemption, requeue, a
node) comes back through its queue, and so does a job that leaves a bad node behind.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch import slurm
from launch.job import End, JobFolder, Outcome, Start, failures_in_a_row
from launch.ranks import LocalRanks, Ranks, Result, SlurmRanks
from launch.sweep import update_report
from loglinear.errors import EXIT_REFUSED

LONGEST_PAUSE = 60.0  # seconds between restarts of a run that keeps failing
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LAST_WORDS = 2000  # bytes of a log to look for the sentence that a rank ended with


class RunFailed(RuntimeError):
    """The run cannot go on by itself."""


def supervise(folder: str, after: Sequence[str] = ()) -> None:
    """Train the run of a job folder until it is finished, cancelled, or put back into SLURM's queue.

    Args:
        folder: the job's.
        after: folders of runs that have ended, which must have finished.

    Raises:
        RunFailed: one of `after` did not finish, a user's mistake ended the run, or it failed `max_restarts` times in a
            row.
    """
    for run_dir in after:  # SLURM only knows that their jobs ended without an error, as those of a cancelled run do
        if not JobFolder.of(Path(run_dir)).has_finished():
            raise RunFailed(f"{run_dir} did not finish, so what depends on it does not start")
    job = JobFolder(Path(folder))
    cluster = job.cluster()
    job_id = os.environ.get("SLURM_JOB_ID") if cluster.kind == "slurm" else None
    ranks: Ranks = LocalRanks(cluster, job) if job_id is None else SlurmRanks(cluster, job)
    try:
        _Supervisor(job, ranks, job_id).go()
    finally:
        update_report(job.run_dir)


class _Supervisor:
    def __init__(self, job: JobFolder, ranks: Ranks, job_id: str | None) -> None:
        self.job, self.ranks, self.job_id = job, ranks, job_id
        self.cluster, self.steps = job.cluster(), job.config().train.steps
        self.out_of_time = False
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)

    def go(self) -> None:
        """Attempt after attempt, until there is nothing more to do here."""
        self._record_unseen_end()
        while not self._is_over():
            self._give_up_or_pause()
            if self._is_over():
                return  # it was told so in the pause
            start = self._start()
            end = self._judge(start, self.ranks.run(start.attempt))
            self.job.record(end)
            print(f"attempt {end.attempt}: {end.outcome} at step {end.step}. {end.reason}", flush=True)
            if end.outcome == "refused":
                raise RunFailed(end.reason)
            if end.outcome == "ended" or self._has_requeued(end):
                return

    def _record_unseen_end(self) -> None:
        """The run may have made its last step unseen, by hand or as a node was lost; others wait for the word."""
        step = self.job.last_step()
        if step >= self.steps and not self.job.has_finished():
            reason, attempt = "seen when it was started again", self._last_attempt()
            self.job.record(End(attempt=attempt, time=time.time(), step=step, outcome="finished", reason=reason))

    def _is_over(self) -> bool:
        return self.job.last_step() >= self.steps or self.job.cancel_marker.exists()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.job_id is None and number in (signal.SIGTERM, signal.SIGINT):
            self.job.cancel_marker.touch()  # nobody would start a local run again
        elif self.job_id is not None and number == signal.SIGTERM:
            self._requeue_if_out_of_time(self.job_id)
        self.ranks.signal(number)

    def _requeue_if_out_of_time(self, job_id: str) -> None:
        """At once: the ranks did not save when they were told to, and after `KillWait` nobody here is left to do it."""
        if not self.out_of_time and not self._is_over() and slurm.is_at_its_limit(job_id):
            self.out_of_time = True
            slurm.requeue(job_id)

    def _give_up_or_pause(self) -> None:
        attempts, step = self.job.attempts(), self.job.last_step()
        failures = failures_in_a_row(attempts, step)
        if failures > self.cluster.max_restarts:
            last = attempts[-1]
            why = last.reason if isinstance(last, End) else "its node was lost"
            reason = f"{failures} attempts in a row failed without a new checkpoint after step {step}; the last: {why}"
            gave_up = End(attempt=last.attempt, time=time.time(), step=step, outcome="gave up", reason=reason)
            self.job.record(gave_up)
            raise RunFailed(reason)
        if failures > 1:
            time.sleep(min(2.0 ** (failures - 1), LONGEST_PAUSE))

    def _start(self) -> Start:
        attempt = 1 + self._last_attempt()
        self.job.logs(attempt).mkdir(parents=True, exist_ok=True)
        start = Start(attempt=attempt, time=time.time(), step=self.job.last_step(), nodes=self.ranks.nodes)
        self.job.record(start)
        print(f"attempt {attempt} on {', '.join(start.nodes)}: from step {start.step} of {self.steps}", flush=True)
        return start

    def _last_attempt(self) -> int:
        """Its number; 0 before the first."""
        return max((event.attempt for event in self.job.attempts()), default=0)

    def _judge(self, start: Start, result: Result) -> End:
        step = self.job.last_step()
        reason, bad = result.reason, frozenset[str]()
        if step >= self.steps:
            outcome: Outcome = "finished"
        elif self.job.cancel_marker.exists():
            outcome = "cancelled"
        elif result.code == EXIT_REFUSED:
            outcome, reason = "refused", self._last_words(start.attempt) or reason
        elif self.out_of_time:
            outcome, reason = "saved" if step > start.step else "failed", "its time was over"
        elif self._is_slurm_ending_it():
            outcome, reason = "ended", "SLURM ended the job"
        elif result.code == 0:
            outcome, reason = "saved", "asked to stop by a signal"
        else:
            outcome, bad = "failed", self._bad_nodes(result, step)
        return End(
            attempt=start.attempt,
            time=time.time(),
            step=step,
            outcome=outcome,
            reason=reason,
            bad_nodes=tuple(sorted(bad)),
            suspects=tuple(sorted(result.suspects)),
        )

    def _is_slurm_ending_it(self) -> bool:
        """Cancelled, requeued or lost a node: then SLURM does what follows."""
        return self.job_id is not None and slurm.state_of(self.job_id) != "RUNNING"

    def _bad_nodes(self, result: Result, step: int) -> frozenset[str]:
        """Unreachable, found bad by the preflight, or the first to fail twice without a checkpoint in between."""
        ends = [event for event in self.job.attempts() if isinstance(event, End)]
        before = ends[-1].suspects if ends and (ends[-1].outcome, ends[-1].step) == ("failed", step) else ()
        again = result.suspects & set(before)
        is_one_of_many = len(again) < len(self.ranks.nodes)  # else it is the run that is bad
        return result.lost | self.job.take_bad_nodes() | (again if is_one_of_many else set())

    def _has_requeued(self, end: End) -> bool:
        """Whether the job goes on through SLURM's queue."""
        if self.job_id is None or end.outcome not in ("saved", "failed"):
            return False
        if self.out_of_time:
            return True
        exclude = self._excluded() if self.cluster.exclude_bad_nodes and end.bad_nodes else []
        if end.outcome == "failed" and not exclude and slurm.state_of(self.job_id) == "RUNNING":
            return False
        print(f"back into the queue, without {', '.join(exclude) or 'excluding a node'}", flush=True)
        slurm.requeue(self.job_id, exclude)
        return True

    def _excluded(self) -> list[str]:
        bad = {node for event in self.job.attempts() if isinstance(event, End) for node in event.bad_nodes}
        return sorted(bad | set(self.cluster.exclude))

    def _last_words(self, attempt: int) -> str:
        """The sentence with which a rank refused."""
        for log in sorted(self.job.logs(attempt).glob("rank-*.log")):
            tail = log.read_bytes()[-LAST_WORDS:].decode(errors="replace")
            if sentence := tail.rpartition("loglinear: ")[2].strip():
                return sentence.splitlines()[0]
        return ""
