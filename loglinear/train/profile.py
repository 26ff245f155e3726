"""Where the time and the memory of a few training steps go, for people to look at in Perfetto and PyTorch's viewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline.batch import Batch, make_batch
from data_pipeline.files import make_folder
from loglinear.config import Config
from loglinear.parallel import make_mesh, parallel_model, start_world
from loglinear.train.engine import Engine
from loglinear.train.schedule import learning_rate
from loglinear.train.stability import Guard
from loglinear.train.timing import StepTimer

MICRO_BATCHES = 2  # of a step at most: one that accumulates and one that is followed by the update; others repeat
WARM_UP = 2  # steps, in which kernels are compiled and memory is allocated for good
HISTORY = 200_000  # allocations that a snapshot remembers


def profile_steps(config: Config, out: Path, steps: int) -> None:
    """Train `steps` steps on random tokens and write what they did; under torchrun every rank writes its own.

    A step has at most two micro-batches for each rank: a trace of dozens takes minutes to write and to open.

    Args:
        config: the run's; nothing of its run folder or its data is touched.
        out: the folder for `rank-*.trace.json.gz`, a Chrome trace, and on a GPU `rank-*.memory.pickle`, a snapshot.
        steps: to record.

    Raises:
        UserError: the configuration does not fit the ranks, or `out` cannot be written to.
    """
    make_folder(out)
    world = start_world()
    mesh = make_mesh(world, config.parallel)
    on_gpu = world.device.type == "cuda"
    count = min(MICRO_BATCHES, world.together(lambda: config.train.micro_batches(mesh.data.size))[0])
    batch = {"global_batch": count * mesh.data.size * config.train.micro_batch}
    config = config.model_copy(update={"train": config.train.model_copy(update=batch)})
    engine = Engine(parallel_model(mesh, config, fresh=True), config, mesh, Guard(config.stability))
    batches, timer = [random_batch(config, number) for number in range(count)], _NamedPhases(world.device)

    def train(number: int) -> None:
        for step in range(number):
            with record_function("step"):
                engine.step(batches, learning_rate(config, step), False, timer)

    train(WARM_UP)
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, profile_memory=True, record_shapes=True) as profiler:
        train(steps)
    name = f"rank-{world.rank:05d}"
    profiler.export_chrome_trace(str(out / f"{name}.trace.json.gz"))
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(out / f"{name}.memory.pickle"))
    if world.rank == 0:
        print(profiler.key_averages().table(sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=15))
        print(f"written: {out}/rank-*.trace.json.gz, for https://ui.perfetto.dev")
        if on_gpu:
            print(f"written: {out}/rank-*.memory.pickle, for https://pytorch.org/memory_viz")
    world.close()


class _NamedPhases(StepTimer):
    """Names the phases of a step in the trace."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with record_function(phase), super().__call__(phase):
            yield


def random_batch(config: Config, seed: int) -> Batch:
    """A micro-batch of whole sequences; token 0 starts each."""
    shape = (config.train.micro_batch, config.model.seq_len + 1)
    tokens_bt = np.random.default_rng(seed).integers(1, config.model.vocab_size, shape)
    return make_batch(list(tokens_bt), config.model.seq_len, 0, [config.model.seq_len] * len(tokens_bt))
