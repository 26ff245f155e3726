"""`loglinear submit, jobs, logs, cancel, sweep`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="A run's YAML file; examples are in configs/.", metavar="CONFIG")]
SweepFile = Annotated[Path, typer.Argument(help="A sweep's YAML file; see configs/sweep/.", metavar="SWEEP")]
RunDir = Annotated[Path, typer.Argument(help="The folder of a submitted run (its run.dir).", metavar="RUN_DIR")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change: of the run, or after `cluster.` of the cluster, such as cluster.nodes=2.",
        metavar="[SECTION.KEY=VALUE]...",
    ),
]
Cluster = Annotated[str, typer.Option(help="A YAML file such as those in configs/cluster/, or `local`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted, and submit nothing.")]

app = typer.Typer()


@app.command()
def submit(
    config: ConfigFile,
    cluster: Cluster,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    depends_on: Annotated[list[Path] | None, typer.Option(help="A run's folder that must finish first.")] = None,
) -> None:
    """Train as a SLURM job, or in the background of this machine; it survives faults and goes on by itself."""
    from launch import submit as submission
    from launch.cluster import load_cluster, split_overrides
    from loglinear.config import load_config

    of_run, of_cluster = split_overrides(overrides or ())
    settings, place = load_config(config, of_run), load_cluster(cluster, of_cluster)
    planned = submission.plan(settings, place)
    if dry_run:
        typer.echo(submission.dry_run(planned, place, depends_on or ()))
        return
    submitted = submission.submit(planned, place, depends_on or ())
    run_dir = shlex.quote(os.path.relpath(planned.job.run_dir))
    typer.echo(f"Job {submitted.id}: {place.nodes} x {place.ranks_of_node} ranks train in {run_dir}.")
    typer.echo(f"  its log:          {submitted.log}")
    typer.echo(f"  its ranks' logs:  {planned.job.root / 'logs'}")
    typer.echo(f"  how far it is:    loglinear jobs {run_dir}")
    typer.echo(f"  what it says:     loglinear logs {run_dir} --follow")
    typer.echo(f"  curves:           tensorboard --logdir {run_dir}")
    typer.echo(f"  save and end it:  loglinear cancel {run_dir}")


@app.command()
def jobs(folder: Annotated[Path, typer.Argument(help="A run's folder, or one of many.")] = Path("runs")) -> None:
    """Show state, step, loss, speed, time left and last checkpoint of submitted runs."""
    from rich.console import Console

    from launch import status

    Console().print(status.table(status.statuses(status.find_jobs(folder))))


@app.command()
def logs(
    run_dir: RunDir,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which start of the ranks; the last if not given.")] = None,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="The job's own log instead.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as the log grows.")] = False,
) -> None:
    """Print what a rank of a submitted run said, or why and when its ranks were started."""
    from launch import status
    from launch.job import JobFolder

    job = JobFolder.of(run_dir)
    log = job.submission().log if supervisor else status.last_log(job, rank, attempt)
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(log)])
    typer.echo(log.read_text(encoding="utf-8", errors="replace"), nl=False)


@app.command()
def cancel(
    run_dir: RunDir,
    seconds: Annotated[float, typer.Option(min=0, help="How long it may take to save; it is ended then.")] = 600.0,
) -> None:
    """Let a run save and end; the same `submit` goes on from there."""
    from rich.console import Console

    from launch import status
    from launch.job import JobFolder

    with Console().status("waiting until it has saved"):
        row = status.cancel(JobFolder.of(run_dir), seconds)
    saved = f"saved after step {row.checkpoint[0]}" if row.checkpoint else "ended before it could save"
    typer.echo(f"Job {row.id} has ended: {saved}. The same submit goes on from there.")


@app.command()
def sweep(
    sweep_file: SweepFile,
    cluster: Cluster,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train variants of a run, a few at once, and compare them in a table and in TensorBoard."""
    from launch import submit as submission
    from launch.cluster import load_cluster, split_overrides
    from launch.sweep import TABLE_FILE, configurations, load_sweep

    variants = load_sweep(sweep_file)
    of_run, of_cluster = split_overrides(overrides or ())
    place = load_cluster(cluster, of_cluster)
    planned = [submission.plan(settings, place) for settings in configurations(variants, of_run)]
    if dry_run:
        for each in planned:
            typer.echo(os.path.relpath(each.job.run_dir))
        typer.echo(submission.dry_run(planned[0], place, variants.depends_on))
        return
    submitted = submission.submit_many(planned, place, variants)
    shown = shlex.quote(os.path.relpath(variants.folder))
    typer.echo(f"Jobs {submitted[0].id} to {submitted[-1].id}: {len(planned)} runs, {variants.parallel} at once.")
    typer.echo(f"  how far they are:  loglinear jobs {shown}")
    typer.echo(f"  results so far:    {variants.folder / TABLE_FILE}")
    typer.echo(f"  curves, settings:  tensorboard --logdir {shown}")
