"""The ranks of one attempt: started by srun, or as processes of this machine; one that dies takes all down."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.background import end_with_parent
from launch import slurm
from launch.cluster import ClusterConfig
from launch.job import JobFolder
from loglinear.errors import EXIT_REFUSED

# What a rank is told of its place, and what srun calls it.
PLACE = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
POLL_SECONDS = 0.1
KILL_SECONDS = 5.0  # that ranks have to end after one of them has failed
PORTS = range(20_000, 32_768)  # for ranks to meet at; Linux gives connections those above
# srun's words for a task that ended badly, and for a node that it could not reach.
TASK = re.compile(r"srun: error: (\S+): (tasks? [\d,\-]+): (.+)")
NODE = re.compile(r"srun: error: .*(?:Node failure on|failed on node) ([^\s:]+)")
# Ends that follow from that of another rank, and the end of a rank that was asked to save before it could listen.
CONSEQUENCES = ("Terminated", "Exited with exit code 1")
ASKED = "User defined signal 2"


@dataclass(frozen=True)
class Result:
    """How an attempt ended.

    Attributes:
        code: 0 if all ranks ended well, 2 if a user's mistake ended one.
        reason: which rank failed and how.
        lost: nodes that could not be reached.
        suspects: nodes whose ranks failed, and not because another did.
    """

    code: int
    reason: str = ""
    lost: frozenset[str] = frozenset()
    suspects: frozenset[str] = frozenset()


class Ranks(Protocol):
    """All ranks of a run in one attempt."""

    nodes: tuple[str, ...]

    def run(self, attempt: int) -> Result:
        """Start the ranks, and wait until all have ended."""
        ...

    def signal(self, number: int) -> None:
        """Pass a signal on to every rank that runs."""
        ...


class SlurmRanks:
    """The ranks as a step of the job that this process runs in."""

    def __init__(self, cluster: ClusterConfig, job: JobFolder) -> None:
        self._cluster, self._job = cluster, job
        self.nodes = slurm.node_names(os.environ["SLURM_JOB_NODELIST"])

    def run(self, attempt: int) -> Result:
        """Start the ranks with srun, and wait until all have ended."""
        # This process runs on the first node, where rank 0 will: a port that is free here is free there.
        meeting = _meeting(slurm.node_address(self.nodes[0]))
        # A place that the submitting shell had would be that of every rank.
        environment = {name: value for name, value in os.environ.items() if name not in PLACE}
        command = srun_command(self._cluster, self._job, attempt)
        said: list[str] = []
        with subprocess.Popen(command, env=environment | meeting, stderr=subprocess.PIPE, text=True) as step:
            assert step.stderr is not None
            for line in step.stderr:
                print(line, end="", flush=True)
                said.append(line)
        return read_srun(step.returncode, said)

    def signal(self, number: int) -> None:
        """SLURM signals the ranks itself."""


class LocalRanks:
    """The ranks as processes of this machine; they train, unless they are to run another `command`."""

    def __init__(self, cluster: ClusterConfig, job: JobFolder, command: Sequence[str] | None = None) -> None:
        self._cluster, self._job = cluster, job
        self._command = command or rank_command(cluster, job)
        self.nodes = (socket.gethostname(),)
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, attempt: int) -> Result:
        """Start the ranks, and wait until all have ended; if one fails, the others are ended."""
        meeting = _meeting("127.0.0.1")
        self._processes = [self._start(attempt, rank, meeting) for rank in range(self._cluster.ranks)]
        while any(process.poll() is None for process in self._processes):
            if failed := list(self._failed()):
                self._end()
                return _local_result(failed, self.nodes)
            time.sleep(POLL_SECONDS)
        return _local_result(list(self._failed()), self.nodes)

    def signal(self, number: int) -> None:
        """Pass a signal on to every rank that runs."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _start(self, attempt: int, rank: int, meeting: dict[str, str]) -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._cluster.ranks)}
        with (self._job.logs(attempt) / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen(
                self._command,
                env=os.environ | self._cluster.environment | place | meeting,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(),
            )

    def _failed(self) -> Iterator[tuple[int, int]]:
        """Rank and exit code of those that have ended badly."""
        for rank, process in enumerate(self._processes):
            if process.poll():
                yield rank, process.returncode

    def _end(self) -> None:
        """As srun does: ask, then kill."""
        deadline = time.monotonic() + KILL_SECONDS
        self.signal(signal.SIGTERM)
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()


def srun_command(cluster: ClusterConfig, job: JobFolder, attempt: int) -> list[str]:
    """What starts the ranks inside a job; a rank that fails ends them all."""
    options = [
        "--kill-on-bad-exit=1",
        "--unbuffered",
        "--export=ALL",  # also where sbatch was told, or is set up, to export nothing
        f"--nodes={cluster.nodes}",
        f"--ntasks={cluster.ranks}",
        f"--ntasks-per-node={cluster.ranks_of_node}",
        f"--output={job.logs(attempt)}/rank-%t.log",
    ]
    if cluster.cpus_per_rank:  # srun does not take it over from sbatch
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    if cluster.container and cluster.container.runtime == "pyxis":
        options.append(f"--container-image={cluster.container.image}")
        if cluster.container.mounts:
            options.append(f"--container-mounts={','.join(cluster.container.mounts)}")
    options += [f"--{key}" if value is True else f"--{key}={value}" for key, value in cluster.srun.items()]
    return ["srun", *options, *rank_command(cluster, job)]


def rank_command(cluster: ClusterConfig, job: JobFolder) -> list[str]:
    """What each rank runs."""
    container = cluster.container
    prefix: list[str] = []
    if container and container.runtime == "apptainer":
        mounts = [option for mount in container.mounts for option in ("--bind", mount)]
        prefix = ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else []), *mounts, container.image]
    python = container.python if container else str(cluster.python or sys.executable)
    return [*prefix, python, "-u", "-m", "launch.rank", str(job.root)]


def read_srun(code: int, said: list[str]) -> Result:
    """What srun's words on stderr mean."""
    tasks = [match.groups() for match in map(TASK.match, said) if match]
    first = [task for task in tasks if task[2].strip() not in CONSEQUENCES] or tasks
    lost = frozenset(match[1] for match in map(NODE.match, said) if match)
    reason = "; ".join(f"{what.replace('task', 'rank')} on {node}: {how.strip()}" for node, what, how in first)
    refused = any(how.strip() == f"Exited with exit code {EXIT_REFUSED}" for _, _, how in tasks)
    if tasks and all(how.strip() == ASKED for _, _, how in tasks):
        return Result(0)
    return Result(
        EXIT_REFUSED if refused else code,
        reason or (said[-1].strip() if said and code else ""),
        lost,
        frozenset(node for node, _, _ in first),
    )


def _local_result(failed: list[tuple[int, int]], nodes: tuple[str, ...]) -> Result:
    if not failed:
        return Result(0)
    reason = "; ".join(f"rank {rank}: {_ending(code)}" for rank, code in failed)
    refused = any(code == EXIT_REFUSED for _, code in failed)
    return Result(EXIT_REFUSED if refused else 1, reason, frozenset(), frozenset(nodes))


def _ending(code: int) -> str:
    return signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"Exited with exit code {code}"


def _meeting(address: str) -> dict[str, str]:
    """What tells ranks where to meet: at rank 0, even if the submitting shell ran under torchrun, which has a store."""
    return {"MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def free_port() -> int:
    """A port that nothing listens to, and that no connection will be given before the ranks, seconds later, listen."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError(f"no port from {PORTS[0]} to {PORTS[-1]} is free")
