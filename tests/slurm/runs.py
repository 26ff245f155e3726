"""Runs that are submitted with the command line, and what can be seen of them from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.job import End, JobFolder, Start
from loglinear.config import Config, DataConfig
from loglinear.train.folder import read_records
from tests.slurm.cluster import PATIENCE, Cluster, wait_until
from tests.train.small import small_config

ROOT = Path(__file__).parents[2]
STEPS = 40


@dataclass(frozen=True)
class SubmittedRun:
    """A run under SLURM, looked at from its folder."""

    folder: Path
    job: JobFolder
    cluster: Cluster

    @property
    def id(self) -> str:
        """SLURM's number of the job."""
        return self.job.submission().id

    def step(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in read_records(self.folder / "metrics.jsonl")), default=0)

    def starts(self) -> list[Start]:
        """All starts of its ranks."""
        return [event for event in self.job.attempts() if isinstance(event, Start)]

    def ends(self) -> list[End]:
        """All ends of its ranks that were recorded."""
        return [event for event in self.job.attempts() if isinstance(event, End)]

    def state(self) -> str:
        """What SLURM says of the job."""
        return self.cluster.command("squeue", "-h", "-t", "all", "-j", self.id, "-o", "%T").strip()

    def rank(self, rank: int) -> int:
        """The process of a rank."""
        return self.ranks()[rank]

    def ranks(self) -> dict[int, int]:
        """The processes of its ranks, which are those that were told of the job, apart from the srun that did it."""
        size = self.job.cluster().ranks
        found = {rank: self.cluster.processes(f"SLURM_PROCID={rank}") for rank in range(size)}
        return {rank: pid for rank, pids in found.items() for pid in pids if self._is_rank(pid)}

    def _is_rank(self, pid: int) -> bool:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            return False
        return "python" in command[0] and str(self.job.root) in command

    def is_training(self, attempt: int) -> bool:
        """Whether the ranks of an attempt have made steps."""
        log = self.job.logs(attempt) / "rank-0.log"
        return log.exists() and "\nstep " in log.read_text()

    def last_saved(self) -> int:
        """The step of the last complete checkpoint."""
        return self.job.last_step()

    def wait_until_step(self, step: int) -> None:
        """Return once `step` was recorded."""
        wait_until(lambda: self.step() >= step)

    def wait_until_finished(self) -> None:
        """Return once the job has ended well."""
        wait_until(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
        assert self.state() == "COMPLETED", self.said()

    def said(self) -> str:
        """Everything in its logs."""
        logs = [self.job.submission().log, *sorted(self.job.root.glob("logs/*/*.log"))]
        return "\n".join(f"== {log}\n{log.read_text()}" for log in logs if log.exists())


@dataclass(frozen=True)
class Launcher:
    """Writes configurations below `folder`, and submits them."""

    cluster: Cluster
    data: DataConfig
    folder: Path

    def config(self, name: str, **changes: Any) -> Config:
        """A run of seconds that saves every fourth step."""
        quick = {
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "peak_tflops": 0.1},
            "monitor": {"every": 2, "levels_every": 100},
            "eval": {"every": 20, "samples": 8, "generate_tokens": 4},
        }
        for section, settings in changes.items():
            quick[section] = quick.get(section, {}) | settings
        return small_config(self.folder / name, self.data, **quick)

    def faulty_python(self) -> Path:
        """Instead of Python: it runs ranks that can be made to fail."""
        script = self.folder / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -u {ROOT}/tests/slurm/faulty_rank.py "$@"\n')
        script.chmod(0o755)
        return script

    def write(self, name: str, config: Config, **cluster: Any) -> tuple[Path, Path]:
        """The files of a run and of a part of the cluster."""
        run_file, cluster_file = self.folder / f"{name}.yaml", self.folder / f"{name}-cluster.yaml"
        run_file.write_text(config.to_yaml())
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **cluster.pop("environment", {})}
        settings = {"nodes": 2, "ranks_per_node": 1, "minutes": 10, "save_seconds": 60, "environment": environment}
        cluster_file.write_text(yaml.safe_dump(settings | cluster))
        return run_file, cluster_file

    def submit(self, name: str, config: Config, after: Sequence[SubmittedRun] = (), **cluster: Any) -> SubmittedRun:
        """Submit a run, to start once those of `after` have finished; returns as soon as SLURM has it."""
        run_file, cluster_file = self.write(name, config, **cluster)
        depends_on = [option for run in after for option in ("--depends-on", run.folder)]
        done = loglinear("submit", run_file, "--cluster", cluster_file, *depends_on)
        assert done.returncode == 0, done.stderr
        return self.submitted(config.run.folder)

    def submitted(self, run_dir: Path) -> SubmittedRun:
        """A run that was submitted."""
        return SubmittedRun(run_dir, JobFolder.of(run_dir), self.cluster)


def loglinear(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, as a user gives it."""
    return subprocess.run(
        [sys.executable, "-m", "loglinear", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
