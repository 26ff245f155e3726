"""Real processes: waiting for what they do, and ranks that meet through gloo."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch.distributed import TCPStore

from loglinear.errors import UserError

# Children are forked from a process that has imported everything, so that a start takes seconds less.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])
_afresh = multiprocessing.get_context("spawn")  # for GPUs, which a fork cannot use
# Ranks meet at a store that is there already, as torchrun's do: a port chosen for them could be taken until they come.
_stores: WeakKeyDictionary[BaseProcess, TCPStore] = WeakKeyDictionary()  # by each start's first rank
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Return as soon as `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_running(pid: int) -> bool:
    """Whether a process lives; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_ranks(
    count: int, target: Callable[..., Any], *args: Any, log: Path | None = None, on_gpus: bool = False
) -> list[BaseProcess]:
    """Start `target(*args)` in `count` processes with the environment that torchrun gives its ranks.

    A `UserError` ends a rank with exit code 2; what the ranks print goes to `log`.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start, environment = (_afresh, {"DS_ACCELERATOR": "cuda"}) if on_gpus else (_context, _ENVIRONMENT)
    ranks: list[BaseProcess] = [
        start.Process(target=_rank, args=(rank, count, store.port, log, target, args)) for rank in range(count)
    ]
    _stores[ranks[0]] = store
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    for process in ranks:
        process.start()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return ranks


def exit_codes(ranks: list[BaseProcess], seconds: float = 300.0) -> list[int | None]:
    """Wait for all ranks to end; whoever has not after `seconds` is killed."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def _rank(
    rank: int, count: int, port: int, log: Path | None, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    try:
        target(*args)
    except UserError as error:
        os.write(1, f"{error}\n".encode())  # at once, so that ranks do not mix their words
        sys.exit(2)
