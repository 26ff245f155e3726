"""The ranks of a run: how they meet, and the few things that they agree on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from loglinear.errors import UserError

Result = TypeVar("Result")

# Of every collective: ranks wait for data for as long as the preparation takes, and one that is stuck is found by
# `loglinear.train.watchdog`, whose time the user sets. In milliseconds it has to fit into 31 bits.
PATIENCE = timedelta(days=14)


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0 .. size - 1; rank 0 talks to the user.
        size: number of processes.
        device: where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, *values: float) -> tuple[float, ...]:
        """Each value summed over all ranks, in float64; every rank gets equal bits."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small `value`, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's small `value` on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def together(self, action: Callable[[], Result]) -> list[Result]:
        """Run `action` on every rank; returns all results, in rank order, on every rank.

        Raises:
            UserError: it raised one on some rank; every rank raises that of the first such rank, of its very class.
        """
        value = error = None
        try:
            value = action()
        except UserError as failure:
            error = type(failure), str(failure)
        outcomes = self.gather((error, value))
        for failed, _ in outcomes:
            if failed is not None:
                kind, message = failed
                raise kind(message)
        return [result for _, result in outcomes]

    def close(self) -> None:
        """Leave the group; the last thing that a rank does."""
        dist.destroy_process_group()


def start_world() -> World:
    """Join the ranks that torchrun started, or be the only one; NCCL on GPUs, gloo on CPUs.

    Must come before any other use of DeepSpeed, which fixes its accelerator when it is imported.
    """
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # whatever port is free
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    _start_deepspeed("nccl" if on_gpu else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def _start_deepspeed(backend: str) -> None:
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # It calls collectives by names that newer torch has given others.
    warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
    # Its shared-memory all-reduce would be compiled for a minute, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)
