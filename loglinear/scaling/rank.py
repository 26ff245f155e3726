"""`python -m loglinear.scaling.rank FOLDER`: one rank, which does the tasks of a list one after the other.

What is measured is written down at once. A task that fails ends the rank, since the others could wait for it; whoever
started the ranks starts new ones for the tasks that are left.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path

import torch

from data_pipeline.files import read_json, write_json
from loglinear.bench.machine import machine
from loglinear.errors import UserError
from loglinear.parallel import World, start_world
from loglinear.scaling import parity, reshard, speed
from loglinear.scaling.engines import Meshes
from loglinear.scaling.results import Result, Results
from loglinear.scaling.tasks import Task
from loglinear.train.watchdog import Watchdog

COMMAND = "loglinear bench scaling"
TASKS, RUNNING, FAILURE = "tasks.json", "running.json", "failure.json"  # in FOLDER/ranks
CHECKPOINT = "checkpoint"
HANG_SECONDS = 300.0  # of one task
OUT_OF_MEMORY = "does not fit"


def main(folder: Path) -> None:
    """Do all tasks."""
    tasks = [Task.model_validate(tree) for tree in read_json(folder / "ranks" / TASKS)["tasks"]]
    results = Results(folder)
    with Watchdog(HANG_SECONDS) as watchdog:
        watchdog.beat("meeting the other ranks")
        world = start_world()
        meshes = Meshes(world)
        if world.rank == 0:
            results.describe(_about(world))
        for task in tasks:
            watchdog.beat(f"measuring {task.name}")
            if world.rank == 0:
                write_json(folder / "ranks" / RUNNING, {"name": task.name})
            result = _do(task, meshes, folder, results)
            gc.collect()  # engines refer to themselves, and the next one needs their memory
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            if world.rank == 0:
                results.add(task.name, result)
        world.close()


def _do(task: Task, meshes: Meshes, folder: Path, results: Results) -> Result:
    if task.kind == "parity":
        return parity.compare_all(meshes.of, task.ranks, getattr(torch, task.dtype))
    if task.kind == "save":
        return reshard.save(task, meshes, folder / CHECKPOINT)
    if task.kind == "load":
        saved = meshes.world.from_first(_saved(task, results) if meshes.world.rank == 0 else None)
        return reshard.load(task, meshes, folder / CHECKPOINT, saved)
    return speed.measure(task, meshes)


def _saved(task: Task, results: Results) -> Result:
    prefix = f"reshard/save {task.config.run.name},"
    return next(result for name, result in results.read().items() if name.startswith(prefix))


def _about(world: World) -> dict[str, str | int]:
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else "cpu"
    return machine(COMMAND) | {"device": name, "backend": "NCCL" if on_gpu else "gloo"}


def _run(folder: Path) -> int:
    """The exit code; why it is not 0 is written down for whoever started the ranks."""
    try:
        main(folder)
    except UserError as error:
        print(f"loglinear: {error}", flush=True)
        failure, code = {"refused": str(error)}, 2
    except torch.OutOfMemoryError:
        traceback.print_exc()
        failure, code = {"error": OUT_OF_MEMORY}, 1
    except Exception as error:
        traceback.print_exc()
        failure, code = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}, 1
    else:
        return 0
    if not (folder / "ranks" / FAILURE).exists():  # else another rank failed before, and this one for want of it
        write_json(folder / "ranks" / FAILURE, failure)
    return code


if __name__ == "__main__":
    code = _run(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # leaving in good order could wait for ranks that do not answer any more
