"""The folder of a job, `RUN_DIR/job/`: what was submitted, and what became of it.

run.yaml, cluster.yaml    the resolved configurations
job.json                  `Submission`: who runs it
attempts.jsonl            an object when ranks start and one when they end: `Start`, `End`
logs/attempt-001/         rank-0.log, rank-1.log, ...: what the ranks of an attempt said
supervisor.log            what a local supervisor said; SLURM's writes into submitit/, where its script is
supervisor.lock           held while a local supervisor lives
cancel                    is there if the run is to end as soon as it has saved
bad_nodes.jsonl           nodes that failed the preflight
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from data_pipeline.files import write_bytes
from launch.cluster import ClusterConfig, load_cluster
from loglinear.checkpoint_folders import COMPLETE, complete_checkpoints, step_of
from loglinear.config import Config, load_config
from loglinear.errors import UserError
from loglinear.train.folder import RunFolder

FOLDER = "job"
Outcome = Literal["finished", "saved", "failed", "refused", "cancelled", "ended", "gave up"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Submission(_Record):
    """Who runs a job.

    Attributes:
        kind: slurm or local.
        id: SLURM's number of the job, or that of the local supervisor's process.
        log: the file that the supervisor writes to.
    """

    kind: Literal["slurm", "local"]
    id: str
    log: Path


class Start(_Record):
    """Ranks start.

    Attributes:
        attempt: 1, 2, ...
        time: seconds since 1970.
        step: of the checkpoint that they go on from; 0 is the beginning.
        nodes: where.
    """

    event: Literal["start"] = "start"
    attempt: int
    time: float
    step: int
    nodes: tuple[str, ...]


class End(_Record):
    """Ranks have ended.

    Attributes:
        attempt: as at the start.
        time: seconds since 1970.
        step: of the last complete checkpoint.
        outcome: finished, saved (and stopped, as a signal asked), failed (a rank died or hung), refused (a user's
            mistake), cancelled, ended (SLURM did it), gave up.
        reason: in words.
        bad_nodes: not to be used again.
        suspects: nodes whose ranks were the first to fail.
    """

    event: Literal["end"] = "end"
    attempt: int
    time: float
    step: int
    outcome: Outcome
    reason: str = ""
    bad_nodes: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()


_ATTEMPT: TypeAdapter[Start | End] = TypeAdapter(Start | End)


@dataclass(frozen=True)
class JobFolder:
    """`RUN_DIR/job`."""

    root: Path

    @classmethod
    def of(cls, run_dir: Path) -> JobFolder:
        """That of a run.

        Raises:
            UserError: the run was never submitted.
        """
        job = cls(run_dir / FOLDER)
        if not job.submission_file.exists():
            raise UserError(
                f"{run_dir} holds no submitted run: name the run.dir of one that `loglinear submit` started"
            )
        return job

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.root.parent

    @property
    def submission_file(self) -> Path:
        """`Submission`, as JSON."""
        return self.root / "job.json"

    @property
    def submitit(self) -> Path:
        """submitit's folder: the script, the supervisor's log, and a pickle that only the job itself reads."""
        return self.root / "submitit"

    @property
    def local_log(self) -> Path:
        """What a local supervisor says."""
        return self.root / "supervisor.log"

    @property
    def lock(self) -> Path:
        """Held while a local supervisor lives."""
        return self.root / "supervisor.lock"

    @property
    def attempts_file(self) -> Path:
        """`Start` and `End`, a JSON object a line."""
        return self.root / "attempts.jsonl"

    @property
    def cancel_marker(self) -> Path:
        """Exists once the run is to end."""
        return self.root / "cancel"

    @property
    def bad_nodes_file(self) -> Path:
        """A JSON list of nodes a line."""
        return self.root / "bad_nodes.jsonl"

    def logs(self, attempt: int) -> Path:
        """The folder of the ranks' logs of an attempt."""
        return self.root / "logs" / f"attempt-{attempt:03d}"

    def write(self, config: Config, cluster: ClusterConfig) -> None:
        """Make the folder, and describe the job in it.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_bytes(self.root / "run.yaml", config.to_yaml().encode())
            write_bytes(self.root / "cluster.yaml", cluster.to_yaml().encode())
            self.cancel_marker.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to run.dir {self.run_dir} ({error.strerror}): choose another") from None

    def config(self) -> Config:
        """The run's configuration."""
        return load_config(self.root / "run.yaml")

    def cluster(self) -> ClusterConfig:
        """The cluster's configuration."""
        return load_cluster(str(self.root / "cluster.yaml"))

    def submitted(self, submission: Submission) -> None:
        """Record who runs the job."""
        write_bytes(self.submission_file, f"{submission.model_dump_json()}\n".encode())

    def submission(self) -> Submission:
        """Who runs the job."""
        return Submission.model_validate_json(self.submission_file.read_text(encoding="utf-8"))

    def record(self, event: Start | End) -> None:
        """Add to the attempts; a node that dies in here leaves them as they were."""
        before = self.attempts_file.read_bytes() if self.attempts_file.exists() else b""
        write_bytes(self.attempts_file, before + f"{event.model_dump_json()}\n".encode())

    def attempts(self) -> list[Start | End]:
        """All that was recorded, over all submissions of this run."""
        path = self.attempts_file
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [_ATTEMPT.validate_json(line) for line in lines]

    def has_finished(self) -> bool:
        """Whether the last thing that was recorded is a good end."""
        last = self.attempts()[-1:]
        return any(isinstance(event, End) and event.outcome == "finished" for event in last)

    def add_bad_nodes(self, nodes: list[str]) -> None:
        """Said by a rank whose preflight failed."""
        with self.bad_nodes_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(nodes) + "\n")

    def take_bad_nodes(self) -> set[str]:
        """What ranks have said since the last call."""
        if not self.bad_nodes_file.exists():
            return set()
        lines = self.bad_nodes_file.read_text(encoding="utf-8").splitlines()
        self.bad_nodes_file.unlink()
        return {node for line in lines for node in json.loads(line)}

    def last_step(self) -> int:
        """The step of the last complete checkpoint, 0 without one."""
        checkpoint = self.last_checkpoint()
        return 0 if checkpoint is None else checkpoint[0]

    def last_checkpoint(self) -> tuple[int, float] | None:
        """Step and age in seconds of the last complete checkpoint."""
        folders = complete_checkpoints(RunFolder(self.run_dir).checkpoints)
        if not folders:
            return None
        return step_of(folders[-1]), time.time() - (folders[-1] / COMPLETE).stat().st_mtime


def failures_in_a_row(attempts: Iterable[Start | End], step: int) -> int:
    """Attempts at the end of the list that began at `step`, where the run still is, and failed.

    One whose end nobody could record, because its node died, counts too; one that SLURM or a user ended does not.
    """
    failures, since = 0, step
    for event in attempts:
        if isinstance(event, Start):
            failures = failures + 1 if event.step == since else 1
            since = event.step
        elif event.outcome != "failed":
            failures = 0
    return failures if since == step else 0
