"""What is said to SLURM, and what it answers: submission through submitit, checks before it, states, requeueing."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import ClusterConfig
from loglinear.errors import UserError

if TYPE_CHECKING:
    import submitit

SECONDS = 60  # that a command of SLURM may take
AGAIN_SECONDS = 2.0  # between questions to a controller that does not answer
UNDISTURBED = ("env", "--ignore-signal=TERM")  # requeueing a job ends its processes, and these too
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")  # variables that say which SLURM is meant
NO_SLURM = "there is no SLURM here (no sbatch): submit on a login node, or take --cluster local"
# What its commands say when the controller is away, restarts, or is too busy.
SILENCE = re.compile("Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|in standby mode")


class NoAnswerError(UserError):
    """SLURM's controller does not answer; it may do so later."""


def make_executor(
    cluster: ClusterConfig, folder: Path, name: str, *, parallel: int | None = None, after: Sequence[str] = ()
) -> submitit.SlurmExecutor:
    """submitit's executor for jobs that each start one supervisor, which starts the ranks.

    Args:
        cluster: what to ask for.
        folder: where submitit keeps its files.
        name: of the job.
        parallel: how many jobs of an array may run at once.
        after: ids of jobs that must have finished well before.

    Raises:
        UserError: there is no SLURM here.
    """
    import submitit

    try:
        executor = submitit.SlurmExecutor(folder)
    except RuntimeError:
        raise UserError(NO_SLURM) from None
    dependency = "afterok:" + ":".join(after) if after else None
    asked: dict[str, Any] = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "time": cluster.minutes,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_of_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_rank,
        "dependency": dependency,
        "signal_delay_s": cluster.save_seconds,
        "setup": [*_exports(cluster), *cluster.setup] or None,
        "array_parallelism": parallel,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,  # the supervisor starts srun, and outlives it
    }
    # A broken dependency would stay pending for ever.
    extra = {"requeue": True} | ({"kill-on-invalid-dep": "yes"} if after else {}) | cluster.sbatch
    chosen = {key: value for key, value in asked.items() if value is not None or key == "wckey"}
    executor.update_parameters(**chosen, additional_parameters=extra)
    return executor


@contextlib.contextmanager
def outside_jobs() -> Iterator[None]:
    """Inside a job, hide what SLURM and torchrun told it: what it submits would take that for its own."""
    from submitit.helpers import clean_env

    is_inside = "SLURM_JOB_ID" in os.environ
    kept = {name: value for name, value in os.environ.items() if name in KEPT or not is_inside}
    with clean_env():
        os.environ.update(kept)
        yield


@contextlib.contextmanager
def submitting() -> Iterator[None]:
    """Within, jobs are submitted.

    Raises:
        UserError: SLURM would have taken them, and does not: a limit on how many may wait, for instance.
    """
    from submitit.core.utils import FailedJobError

    try:
        with outside_jobs():
            yield
    except FailedJobError as error:
        words = " ".join(str(error).split())
        raise UserError(f"SLURM did not take the job: {words}") from None


def script_of(executor: submitit.SlurmExecutor) -> str:
    """The sbatch script that a submission would send."""
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def check(executor: submitit.SlurmExecutor, cluster: ClusterConfig) -> None:
    """Ask SLURM whether it would take such a job.

    Raises:
        UserError: it would not; what there is instead is named.
    """
    _check_partition(cluster)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(script_of(executor))
        script.flush()
        with outside_jobs():
            done = _run(["sbatch", "--test-only", script.name])
    if done.returncode:
        raise UserError(f"SLURM refuses the job: {_words(done.stderr)}; change the cluster's configuration")


def job_states(ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """State (RUNNING, PENDING, ...) and reason of those jobs that SLURM still knows.

    Raises:
        UserError: SLURM does not say.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    said = _ask(["squeue", "--noheader", "--all", "--array", "--states=all", "--format=%i|%A|%T|%r"])
    rows = [line.split("|") for line in said.splitlines()]
    return {id_: (row[2], row[3]) for row in rows if len(row) == 4 for id_ in (row[0], row[1]) if id_ in wanted}


def state_of(job_id: str) -> str:
    """The state of a job, as SLURM's controller has it; while that is away, this waits for it."""
    while True:
        with contextlib.suppress(UserError):
            return _of_job("JobState", job_id)
        time.sleep(AGAIN_SECONDS)


def is_at_its_limit(job_id: str) -> bool:
    """Whether SLURM ends a job because its time is over; the state alone, COMPLETING, does not tell."""
    with contextlib.suppress(UserError):
        return _of_job("Reason", job_id) == "TimeLimit"
    return False


def requeue(job_id: str, exclude: Iterable[str] = ()) -> None:
    """Put the job that this process belongs to back into the queue, to run on other nodes than those of `exclude`.

    Raises:
        UserError: SLURM refuses.
    """
    _insist([*UNDISTURBED, "scontrol", "requeue", job_id])
    if nodes := ",".join(sorted(exclude)):  # may be changed only of a job that waits
        _insist([*UNDISTURBED, "scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}"])


def signal_ranks(job_id: str, name: str) -> None:
    """Send a signal to all ranks of a job that runs, and not to its supervisor."""
    _ask(["scancel", f"--signal={name}", job_id])


def cancel(job_id: str) -> None:
    """End a job, whatever it is doing."""
    _ask(["scancel", job_id])


def node_names(node_list: str) -> tuple[str, ...]:
    """The names in a list such as n[1-3,7]."""
    return tuple(_insist(["scontrol", "show", "hostnames", node_list]).split())


def node_address(node: str) -> str:
    """Where a node is reached."""
    match = re.search(r"\bNodeAddr=(\S+)", _insist(["scontrol", "show", "--oneliner", "node", node]))
    return match[1] if match else node


def _exports(cluster: ClusterConfig) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]


def _check_partition(cluster: ClusterConfig) -> None:
    said = _ask(["sinfo", "--noheader", "--all", "--format=%R|%G|%D|%l"])
    rows = [line.split("|") for line in said.splitlines()]
    names = sorted({row[0] for row in rows})
    if cluster.partition is not None and not set(cluster.partition.split(",")) <= set(names):
        raise UserError(f"there is no partition {cluster.partition!r}: this cluster has {', '.join(names)}")
    asked = [row for row in rows if cluster.partition is None or row[0] in cluster.partition.split(",")]
    where = f"partition {cluster.partition}" if cluster.partition else "any partition here"
    gpus = max((_gpus(row[1]) for row in asked), default=0)
    if cluster.gpus_per_node > gpus:
        raise UserError(f"gpus_per_node ({cluster.gpus_per_node}) is more than a node of {where} has ({gpus})")
    nodes = max((sum(int(row[2]) for row in asked if row[0] == name) for name in names), default=0)
    if cluster.nodes > nodes:
        raise UserError(f"nodes ({cluster.nodes}) is more than {where} has ({nodes})")
    minutes = max(map(_minutes, (row[3] for row in asked)), default=0.0)
    if cluster.minutes > minutes:
        raise UserError(f"minutes ({cluster.minutes}) is more than {where} allows ({minutes:g})")


def _minutes(limit: str) -> float:
    """A time limit that sinfo prints as 30:00, 10:00:00, 1-12:00:00, infinite or n/a."""
    if not limit[0].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = [0, 0, *map(int, clock.split(":"))][-3:]
    return 24 * 60 * int(days or 0) + 60 * hours + minutes + seconds / 60


def _gpus(resources: str) -> int:
    """Of a node whose generic resources sinfo prints as gpu:4, or gpu:h100:8(S:0-1),other:2."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources))


def _of_job(key: str, job_id: str) -> str:
    said = _ask([*UNDISTURBED, "scontrol", "show", "--oneliner", "job", job_id])
    return said.partition(f" {key}=")[2].partition(" ")[0]


def _insist(command: list[str]) -> str:
    """What a command says, however often it must be given: nobody else would ask again for a job.

    Raises:
        UserError: it is refused, or is not there.
    """
    while True:
        with contextlib.suppress(NoAnswerError):
            return _ask(command)
        time.sleep(AGAIN_SECONDS)


def _ask(command: list[str]) -> str:
    """What a command says.

    Raises:
        NoAnswerError: SLURM's controller does not answer.
        UserError: it is refused, or is not there.
    """
    done = _run(command)
    if done.returncode:
        raise UserError(f"SLURM refuses `{shlex.join(command)}`: {_words(done.stderr)}")
    return done.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(
            f"SLURM does not answer `{shlex.join(command)}` within {SECONDS} s: try again later"
        ) from None
    if done.returncode and SILENCE.search(done.stderr):
        raise NoAnswerError(f"SLURM's controller does not answer ({_words(done.stderr)}): try again later")
    return done


def _words(stderr: str) -> str:
    """The last thing that SLURM complains of, without the names of its programs."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("Batch job submission failed: ") if lines else "it gives no reason"
