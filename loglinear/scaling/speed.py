"""Training steps timed: tokens a second, utilisation, peak memory, and what communication costs.

Exposed communication is read from torch's profiler: the time in which a GPU runs kernels of NCCL and no other. It
counts what a step really waits for, while a step with its communication taken out would also lose what it hides. A
kernel of NCCL waits for the slowest rank, and that waiting counts too.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from loglinear.config import Config
from loglinear.model import LanguageModel
from loglinear.ops.peak import TRAINING_FLOPS, peak_flops
from loglinear.parallel import Mesh
from loglinear.scaling.engines import Meshes, fresh_model, trainer
from loglinear.scaling.results import Result
from loglinear.scaling.tasks import Task

WARM_UP, STEPS, PROFILED = 2, 4, 1


def measure(task: Task, meshes: Meshes) -> Result:
    """Time steps of a task's run.

    Returns:
        seconds: of a step, the median; parameters; tokens: of a step; tokens_per_second: of all ranks together; mfu;
        recomputes: whether blocks are recomputed in the backward pass. On GPUs also peak_bytes: of the rank that
        needs most; communication_seconds and exposed_seconds: of a step, the mean over the ranks. None elsewhere, or
        where the profiler sees no kernels.
    """
    config, mesh = task.config, meshes.of(task.config.parallel)
    on_gpu = mesh.world.device.type == "cuda"
    with torch.device("meta"):
        whole = LanguageModel(config.model)
    with trainer(config, mesh, fresh_model(config, mesh)) as running:
        seconds, peak_bytes = _time(running.step, mesh)
        communication, exposed = _profile(running.step, mesh) if on_gpu else (None, None)
    tokens = config.train.global_batch * config.model.seq_len
    return {
        "model": config.run.name,
        "layout": task.layout,
        "ranks": task.ranks,
        "length": config.model.seq_len,
        "parameters": whole.parameter_count(),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": tokens * _flops(whole, config) / seconds / (peak_of(mesh, config) * mesh.world.size),
        "peak_bytes": peak_bytes,
        "communication_seconds": communication,
        "exposed_seconds": exposed,
        "recomputes": config.recomputed_blocks > 0,
    }


def peak_of(mesh: Mesh, config: Config) -> float:
    """FLOP/s of a rank's device at best; every rank must call it.

    Raises:
        UserError: the GPU is not known.
    """
    return mesh.world.together(lambda: peak_flops(mesh.world.device, config.train.peak_tflops))[0]


def _flops(whole: LanguageModel, config: Config) -> int:
    return TRAINING_FLOPS * whole.flops_per_token(config.model.seq_len)


def _time(step: Callable[[], object], mesh: Mesh) -> tuple[float, int | None]:
    """The median seconds of a step, which all ranks start together; and bytes at the peak of the fullest GPU."""
    device, seconds = mesh.world.device, []
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _meet(device)
        start = time.perf_counter()
        step()
        _meet(device)
        seconds.append(time.perf_counter() - start)
    median = mesh.world.from_first(statistics.median(seconds[WARM_UP:]))
    if device.type != "cuda":
        return median, None
    return median, max(mesh.world.gather(torch.cuda.max_memory_allocated(device)))


def _meet(device: torch.device) -> None:
    """Wait for this rank's GPU, and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def _profile(step: Callable[[], object], mesh: Mesh) -> tuple[float | None, float | None]:
    """Seconds of a step in NCCL's kernels, and in them alone: means over the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED):
                step()
            torch.cuda.synchronize(mesh.world.device)
        profiler.export_chrome_trace(str(trace))
        own = communication(json.loads(trace.read_text())["traceEvents"])
    every = mesh.world.gather(own)
    if None in every:
        return None, None
    busy, exposed = (statistics.mean(kind) / PROFILED for kind in zip(*every, strict=True))
    return busy, exposed


def communication(events: Iterable[dict[str, Any]]) -> tuple[float, float] | None:
    """Seconds in which kernels of NCCL ran, and in which no other kernel did, from a Chrome trace's events.

    None if there are no kernels, as where the profiler may not look at the GPU.
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return None
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in kernels]
    is_nccl = ["nccl" in event["name"] for event in kernels]
    busy = _covered(span for span, mine in zip(spans, is_nccl, strict=True) if mine)
    others = _covered(span for span, mine in zip(spans, is_nccl, strict=True) if not mine)
    return busy / 1e6, (_covered(spans) - others) / 1e6  # a trace counts in microseconds


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of [start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
