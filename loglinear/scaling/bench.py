"""`loglinear bench scaling`: everything that takes several GPUs to see, in one run of one program.

Ranks are started once for each number of them, and again only after a task has ended them. A task whose memory does
not suffice is tried again with recomputation in the backward pass; other failures are results too.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_pipeline.files import make_folder, read_json, write_json
from launch.cluster import ClusterConfig
from launch.job import JobFolder
from launch.ranks import LocalRanks, Result
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.scaling.rank import CHECKPOINT, FAILURE, OUT_OF_MEMORY, RUNNING, TASKS
from loglinear.scaling.recovery import NoRecovery, measure_recovery
from loglinear.scaling.report import draw, markdown
from loglinear.scaling.results import Results
from loglinear.scaling.tasks import PARTS, Task, make_tasks

RANKS_WITHOUT_GPUS = 2
POLL_SECONDS = 0.5


def bench_scaling(
    configs: Sequence[Config],
    parts: Sequence[str],
    lengths: Sequence[int],
    tokens: int,
    ranks: int | None,
    out: Path,
) -> None:
    """Measure what is not in `out` yet; after a kill, the same call goes on.

    Args:
        configs, parts, lengths, tokens: as in `make_tasks`; recovery is a part too.
        ranks: as many as there are GPUs, or two, if None.
        out: a folder for `scaling.json`, `scaling.md`, `scaling.png`, and logs in `ranks/` and `recovery/`.

    Raises:
        UserError: there is no such part, or a model does not divide over a layout.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"there is no part {part!r} of this benchmark: take some of {', '.join(PARTS)}")
    make_folder(out)
    console, results = Console(), Results(out)
    ranks = ranks or torch.cuda.device_count() or RANKS_WITHOUT_GPUS
    tasks = make_tasks(configs, parts, lengths, tokens, ranks)
    todo = _without_results(tasks, results)
    for stale in ("ranks", CHECKPOINT):
        shutil.rmtree(out / stale, ignore_errors=True)
    attempts = count(1)
    for size, group in groupby(todo, key=lambda task: task.ranks):
        _measure(list(group), cluster_of(size), out, results, attempts)
        _report(results, out)
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    name = f"recovery/{configs[0].run.name} on {ranks}"
    if "recovery" in parts and name not in results.read():
        with console.status("recovery: training, and killing a rank"):
            _recover(name, configs[0], lengths[0], cluster_of(ranks), out, results)
    text = _report(results, out)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {results.file}, scaling.md and scaling.png", highlight=False)


def _report(results: Results, out: Path) -> str:
    """Write the tables and the plot; the tables."""
    text = markdown(results)
    (out / "scaling.md").write_text(text, encoding="utf-8")
    draw(out / "scaling.png", results)
    return text


def cluster_of(ranks: int) -> ClusterConfig:
    """So many ranks of this machine. NVLink's multicast is left alone: containers often do not let it be set up."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return ClusterConfig(kind="local", ranks_per_node=ranks, environment=environment)


def _without_results(tasks: list[Task], results: Results) -> list[Task]:
    """Tasks that have no result yet; what was saved is gone, so resharding is done as a whole."""
    reshard = {task.name for task in tasks if task.kind in ("save", "load")}
    if not reshard <= results.read().keys():
        results.drop(reshard)
    names = results.read().keys()
    return [task for task in tasks if task.name not in names]


def _measure(todo: list[Task], cluster: ClusterConfig, out: Path, results: Results, attempts: Iterator[int]) -> None:
    """Have ranks do tasks until each has a result or has failed."""
    job = JobFolder(out / "ranks")
    ranks = LocalRanks(cluster, job, [sys.executable, "-u", "-m", "loglinear.scaling.rank", str(out)])
    with _progress(f"{cluster.ranks} ranks", {task.name for task in todo}, results):
        while todo:
            attempt = next(attempts)
            job.logs(attempt).mkdir(parents=True)
            write_json(job.root / TASKS, {"tasks": [task.model_dump(mode="json") for task in todo]})
            for stale in (RUNNING, FAILURE):
                (job.root / stale).unlink(missing_ok=True)
            ended = ranks.run(attempt)
            todo = _left(todo, ended, job, attempt, results)


def _left(todo: list[Task], ended: Result, job: JobFolder, attempt: int, results: Results) -> list[Task]:
    """The tasks that remain; what the ranks failed in is tried with less memory, or has failed.

    Raises:
        UserError: a rank refused.
    """
    left = [task for task in todo if task.name not in results.read()]
    if ended.code == 0:
        assert not left
        return []
    failure = read_json(job.root / FAILURE) if (job.root / FAILURE).exists() else {"error": "no reason given"}
    if "refused" in failure:
        raise UserError(failure["refused"])
    running = read_json(job.root / RUNNING)["name"] if (job.root / RUNNING).exists() else left[0].name
    failed = next((task for task in left if task.name == running), None)
    if failed is None:  # they ended behind it
        return left
    others = [task for task in left if task is not failed]
    if failure["error"] == OUT_OF_MEMORY and failed.config.recomputed_blocks < failed.config.model.layers:
        return [failed.recomputing(), *others]
    results.add(failed.name, {"error": f"{failure['error']} ({ended.reason})", "log": str(job.logs(attempt))})
    if failed.kind == "save":
        return [task for task in others if task.kind != "load"]
    return others


def _recover(name: str, config: Config, length: int, cluster: ClusterConfig, out: Path, results: Results) -> None:
    folder = out / "recovery"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        results.add(name, measure_recovery(config, length, cluster, folder.absolute()))
    except NoRecovery as failure:
        results.add(name, {"error": str(failure)})
        return
    for large in (folder / "run" / "checkpoints", folder / "data"):
        shutil.rmtree(large)


@contextmanager
def _progress(name: str, wanted: set[str], results: Results) -> Iterator[None]:
    """Show how many of the results are there, while other processes write them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done = threading.Event()
    with Progress(*columns, transient=True) as bar:
        line = bar.add_task(name, total=len(wanted))

        def follow() -> None:
            while not done.wait(POLL_SECONDS):
                bar.update(line, completed=len(wanted & results.read().keys()))

        follower = threading.Thread(target=follow)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()
