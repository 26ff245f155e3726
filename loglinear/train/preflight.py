"""Seconds before training that save hours: do all ranks run the same, and can each of them compute and communicate?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from loglinear import __version__
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.parallel.world import World
from loglinear.train.folder import git_revision
from loglinear.train.watchdog import node_name

EXIT_BAD_NODE = 3  # of ranks that a `FailedNodes` ends
LIBRARIES = ("torch", "triton", "deepspeed", "numpy", "safetensors")  # whose versions may change what is computed
SIDE = {"cpu": 256, "cuda": 4096}  # of the square matrices
TRIES = 5
ALL_REDUCE_FLOATS = 2**18  # 1 MiB
TOLERANCE = 0.02  # of a bf16 product, relative to the largest element of its row
SLOW = 1.5  # times the median


class FailedNodes(RuntimeError):
    """Some nodes cannot compute.

    Attributes:
        nodes: their names.
    """

    def __init__(self, nodes: list[str], of: str) -> None:
        super().__init__(f"preflight: wrong results of {of} on {', '.join(nodes)}; use other nodes")
        self.nodes = nodes


@dataclass(frozen=True)
class Health:
    """What one rank found out about itself.

    Attributes:
        node: where it runs.
        seconds: the fastest of its matrix products.
        correct: whether the product was that of float64.
        sums: whether the sum over ranks, as it arrived here, was right.
    """

    node: str
    seconds: float
    correct: bool
    sums: bool


def preflight(config: Config, world: World) -> str:
    """Check all ranks; returns a line for the log that names slow nodes.

    Raises:
        UserError: ranks differ in configuration, code or libraries.
        FailedNodes: a rank's matrix product or the sum over ranks is wrong.
    """
    require_agreement(world, _code(config))
    seconds, is_right = _matrix_product(world.device)
    all_reduce_seconds, is_sum_right = _all_reduce(world)
    ranks: list[Health] = world.gather(Health(node_name(os.environ), seconds, is_right, is_sum_right))
    if failed := sorted({rank.node for rank in ranks if not rank.correct}):
        raise FailedNodes(failed, "a matrix product")
    if failed := sorted({rank.node for rank in ranks if not rank.sums}):
        raise FailedNodes(failed, "a sum over all ranks")
    return report(ranks, SIDE[world.device.type], all_reduce_seconds)


def report(ranks: list[Health], side: int, all_reduce_seconds: float) -> str:
    """A line for the log; a node is slow if its product took `SLOW` times the median."""
    seconds = [rank.seconds for rank in ranks]
    median = statistics.median(seconds)
    line = (
        f"Preflight: {len(ranks)} ranks on {', '.join(sorted({rank.node for rank in ranks}))} agree;"
        f" a matrix product of {side} takes {min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f} ms,"
        f" an all-reduce of {ALL_REDUCE_FLOATS * 4 / 2**20:g} MiB {all_reduce_seconds * 1e3:.2f} ms."
    )
    slow = {rank.node: rank.seconds for rank in ranks if rank.seconds >= SLOW * median}
    if slow:
        named = ", ".join(f"{node} ({seconds / median:.1f} times the median)" for node, seconds in slow.items())
        line += f" Slow: {named}."
    return line


def require_agreement(world: World, facts: dict[str, str]) -> None:
    """Every rank must state equal `facts`.

    Raises:
        UserError: names the first fact that differs, and two ranks that differ in it; raised on all ranks.
    """
    stated: list[tuple[str, dict[str, str]]] = world.gather((node_name(os.environ), facts))
    first_node, first = stated[0]
    for rank, (node, theirs) in enumerate(stated):
        for name, value in theirs.items():
            if value != first[name]:
                raise UserError(
                    f"rank {rank} on {node} has {name} {value}, but rank 0 on {first_node} has {first[name]}: "
                    "all ranks must see the same files and the same installation"
                )


def _code(config: Config) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if _is_installed(name)}
    return {
        "configuration hash": hashlib.sha256(config.to_yaml().encode()).hexdigest()[:12],
        "code revision": git_revision() or __version__,
    } | versions


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _matrix_product(device: torch.device) -> tuple[float, bool]:
    """Seconds of the fastest of some products, and whether a row of each is right."""
    side = SIDE[device.type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator) for _ in range(2))
    if device.type == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
    expected = a[-1].double() @ b.double()
    a, b = a.to(device), b.to(device)
    seconds, is_right = [], True
    for _ in range(TRIES):
        start = time.perf_counter()
        row = torch.mm(a, b)[-1].double().cpu()  # which waits for the device
        seconds.append(time.perf_counter() - start)
        is_right &= bool((row - expected).abs().max() <= TOLERANCE * expected.abs().max())
    return min(seconds), is_right


def _all_reduce(world: World) -> tuple[float, bool]:
    """Seconds of the second of two sums over all ranks, and whether it is right."""
    for _ in range(2):
        values = torch.full((ALL_REDUCE_FLOATS,), float(world.rank), device=world.device)
        start = time.perf_counter()
        dist.all_reduce(values)
        total = (values.min().item(), values.max().item())
    expected = world.size * (world.size - 1) / 2
    return time.perf_counter() - start, total == (expected, expected)
