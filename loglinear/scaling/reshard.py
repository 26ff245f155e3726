"""Saved over one layout, loaded over another: the losses that follow are those of never stopping.

In fp32, on one batch again and again: its loss falls fast, so that a weight or a moment in the wrong place shows.
"""

from __future__ import annotations

import time
from pathlib import Path

from loglinear.checkpoint import CheckpointStore, load_weights
from loglinear.parallel import parallel_model
from loglinear.scaling.engines import Meshes, Trainer, fresh_model, trainer
from loglinear.scaling.results import Result
from loglinear.scaling.tasks import Task

BEFORE, AFTER = 3, 3  # steps
TOLERANCE = 0.01  # of the fall of the loss; with moments that are lost, its first step alone is off by many times that


def save(task: Task, meshes: Meshes, folder: Path) -> Result:
    """Train, save, train on.

    Returns:
        seconds and bytes of the checkpoint; losses: of the steps after it; fall: of the loss over all steps.
    """
    mesh = meshes.of(task.config.parallel)
    store = CheckpointStore(folder, task.config.checkpoint, mesh)
    with trainer(task.config, mesh, fresh_model(task.config, mesh)) as running:
        before = _losses(running, BEFORE)
        start = time.perf_counter()
        saved = store.save(running.engine.deepspeed, BEFORE, {"step": BEFORE})
        seconds = time.perf_counter() - start
        losses = _losses(running, AFTER)
    folder = mesh.world.from_first(saved)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "layout": task.layout,
        "ranks": task.ranks,
        "seconds": seconds,
        "bytes": size,
        "losses": losses,
        "fall": before[0] - losses[-1],
    }


def load(task: Task, meshes: Meshes, folder: Path, saved: Result) -> Result:
    """Load what another layout saved, and train on; `saved` is what `save` returned.

    Returns:
        seconds: of verifying and loading; losses; error: the largest difference from those of never stopping; agrees.
    """
    config, mesh = task.config, meshes.of(task.config.parallel)
    store = CheckpointStore(folder, config.checkpoint, mesh)
    start = time.perf_counter()
    snapshot = store.latest()
    assert snapshot is not None
    model = parallel_model(mesh, config, fresh=False)
    load_weights(snapshot.folder, model)
    with trainer(config, mesh, model) as running:
        store.restore(snapshot, running.engine.deepspeed)
        seconds = time.perf_counter() - start
        losses = _losses(running, AFTER)
    error = max(abs(found - truth) for found, truth in zip(losses, saved["losses"], strict=True))
    return {
        "layout": task.layout,
        "ranks": task.ranks,
        "seconds": seconds,
        "losses": losses,
        "error": error,
        "agrees": error <= TOLERANCE * saved["fall"],
    }


def _losses(running: Trainer, steps: int) -> list[float]:
    return [running.step().loss for _ in range(steps)]
