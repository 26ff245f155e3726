"""From a configuration to a job: everything that can be found wrong is found before anything is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import local, slurm, status
from launch.cluster import ClusterConfig
from launch.job import FOLDER, JobFolder, Submission
from launch.supervisor import supervise
from launch.sweep import SweepConfig, write_sweep
from loglinear.config import Config
from loglinear.errors import UserError


@dataclass(frozen=True)
class Planned:
    """A run that can be submitted.

    Attributes:
        config: with absolute paths.
        job: its folder, which need not exist.
    """

    config: Config
    job: JobFolder


def plan(config: Config, cluster: ClusterConfig) -> Planned:
    """Check that the run fits the ranks, and that nobody is at it.

    Raises:
        UserError: the batch or the grid does not divide over the ranks, or the run is submitted already.
    """
    from loglinear.parallel.mesh import data_parallel_size

    config = config.with_absolute_paths()
    config.train.micro_batches(data_parallel_size(config.parallel, cluster.ranks))
    job = JobFolder(config.run.folder / FOLDER)
    if job.submission_file.exists() and status.is_active(job):
        raise UserError(
            f"{config.run.folder} is being trained by job {job.submission().id} already:"
            f" `loglinear cancel {config.run.folder}` ends that, or choose another run.dir"
        )
    return Planned(config, job)


def dry_run(planned: Planned, cluster: ClusterConfig, after: Sequence[Path] = ()) -> str:
    """The script and the configurations that a submission would use; SLURM is asked whether it would take them.

    Raises:
        UserError: it would not.
    """
    described = f"# cluster\n{cluster.to_yaml()}\n# run\n{planned.config.to_yaml()}"
    if cluster.kind == "local":
        return described
    executor = slurm.make_executor(
        cluster, planned.job.submitit, planned.config.run.name, after=_ids(_unfinished(after, cluster))
    )
    slurm.check(executor, cluster)
    return f"{slurm.script_of(executor)}\n{described}"


def submit(planned: Planned, cluster: ClusterConfig, after: Sequence[Path] = ()) -> Submission:
    """Submit a run that must wait until the runs in the folders `after` have finished.

    Raises:
        UserError: SLURM would not take the job, or one of `after` will not finish; nothing is written then.
    """
    job, waiting = planned.job, _unfinished(after, cluster)
    if cluster.kind == "local":
        job.write(planned.config, cluster)
        number = local.start(job, cluster, after=waiting)
        return _recorded(job, Submission(kind="local", id=number, log=job.local_log))
    executor = slurm.make_executor(cluster, job.submitit, planned.config.run.name, after=_ids(waiting))
    slurm.check(executor, cluster)
    job.write(planned.config, cluster)
    with slurm.submitting():
        handle = executor.submit(supervise, str(job.root), _names(waiting))
    return _recorded(job, Submission(kind="slurm", id=handle.job_id, log=handle.paths.stdout))


def submit_many(planned: Sequence[Planned], cluster: ClusterConfig, sweep: SweepConfig) -> list[Submission]:
    """Submit the runs of a sweep, of which at most `parallel` run at once: as a SLURM array.

    Raises:
        UserError: as for `submit`.
    """
    folder, waiting = sweep.folder, _unfinished(sweep.depends_on, cluster)
    if cluster.kind == "local":
        _write_all(planned, cluster, sweep)
        slots = (folder / "slots", sweep.parallel)
        started = [(each.job, local.start(each.job, cluster, after=waiting, slots=slots)) for each in planned]
        return [_recorded(job, Submission(kind="local", id=number, log=job.local_log)) for job, number in started]
    place, ids = folder / "submitit", _ids(waiting)
    executor = slurm.make_executor(cluster, place, sweep.name, parallel=sweep.parallel, after=ids)
    slurm.check(executor, cluster)
    _write_all(planned, cluster, sweep)
    with slurm.submitting(), executor.batch():
        handles = [executor.submit(supervise, str(each.job.root), _names(waiting)) for each in planned]
    return [
        _recorded(each.job, Submission(kind="slurm", id=handle.job_id, log=handle.paths.stdout))
        for each, handle in zip(planned, handles, strict=True)
    ]


def _write_all(planned: Sequence[Planned], cluster: ClusterConfig, sweep: SweepConfig) -> None:
    write_sweep(sweep)
    for each in planned:
        each.job.write(each.config, cluster)


def _unfinished(after: Sequence[Path], cluster: ClusterConfig) -> list[Path]:
    """Those runs that one on `cluster` must wait for.

    Raises:
        UserError: a run was never submitted, has ended without finishing, or runs where nobody can wait for it.
    """
    waiting = []
    for run_dir in after:
        job = JobFolder.of(run_dir)
        row = status.status(job)
        if row.state in status.ACTIVE:
            if job.submission().kind != cluster.kind:
                raise UserError(
                    f"{run_dir} runs on {job.submission().kind}, and this run on {cluster.kind} cannot wait"
                )
            waiting.append(run_dir)
        elif row.state != "finished":
            raise UserError(f"{run_dir} did not finish ({row.state}), so what depends on it would never start")
    return waiting


def _names(runs: Sequence[Path]) -> list[str]:
    return [str(run_dir.absolute()) for run_dir in runs]


def _ids(runs: Sequence[Path]) -> list[str]:
    return [JobFolder.of(run_dir).submission().id for run_dir in runs]


def _recorded(job: JobFolder, submission: Submission) -> Submission:
    job.submitted(submission)
    return submission
