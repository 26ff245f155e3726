"""The collectives as functions that autograd understands; each stands beside its transpose.

An axis of one rank costs nothing: the input is returned as it is. On the meta device nothing is sent, and every
collective gives a tensor of the right shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from loglinear.parallel.mesh import Axis

_traffic: ContextVar[Counter[str] | None] = ContextVar("traffic", default=None)


def sum_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of all ranks' x [...], whose gradient all ranks hold alike."""
    return x if axis.size == 1 else _Sum.apply(x, axis)


def gather(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """All ranks' x [..., n, ...] along `dim` as [..., ranks n, ...]; of the summed gradient each takes its part."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def sum_and_scatter(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """This rank's part [..., n, ...] of the sum of all ranks' x [..., ranks n, ...]; transpose of `gather`."""
    return x if axis.size == 1 else _SumAndScatter.apply(x, axis, dim)


def exchange(x: torch.Tensor, axis: Axis, sent: list[int], received: list[int]) -> torch.Tensor:
    """Rows of x [N, ...] to the ranks of the axis, and theirs [M, ...] to this one; its own transpose, turned round.

    Args:
        x: `sent[r]` rows for each rank r, one after the other.
        axis: the ranks.
        sent, received: numbers of rows, by rank.
    """
    return x if axis.size == 1 else _Exchange.apply(x, axis, sent, received)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(dx, ctx.axis, ctx.dim), None, None


class _SumAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(dx, ctx.axis, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return all_to_all(x, axis, sent, received)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return all_to_all(dx, ctx.axis, ctx.received, ctx.sent), None, None, None


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this rank gives to the network inside, by the name of the axis.

    Those of a ring: (ranks - 1) / ranks of the whole tensor for a gather or a scatter, and twice that for a sum.
    """
    counter: Counter[str] = Counter()
    token = _traffic.set(counter)
    try:
        yield counter
    finally:
        _traffic.reset(token)


def _count(whole: torch.Tensor, axis: Axis, times: int) -> None:
    counter = _traffic.get()
    if counter is not None:
        counter[axis.name] += times * whole.nbytes * (axis.size - 1) // axis.size


@dataclass(frozen=True)
class Pending:
    """What a collective gives, maybe not yet.

    Attributes:
        tensor: where it will be.
        work: torch's handle, None if there is nothing to wait for.
        source: what is sent, kept until it has been.
    """

    tensor: torch.Tensor
    work: Any
    source: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The tensor [...]; on a GPU what is computed from now on waits for it, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def all_reduce(x: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """A new tensor with `op` over all ranks' x [...], the same bits on all."""
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), axis, op).wait()


def start_all_reduce(x: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Pending:
    """`all_reduce` that is not waited for; the result overwrites x [...], which is contiguous."""
    _count(x, axis, times=2)
    work = None if x.is_meta else dist.all_reduce(x, op, group=axis.group, async_op=True)
    return Pending(x, work, x)


def all_gather(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """A new tensor [..., ranks n, ...] of all ranks' x [..., n, ...] side by side along `dim`."""
    own = x.movedim(dim, 0).contiguous()
    whole = own.new_empty(axis.size * own.shape[0], *own.shape[1:])
    _count(whole, axis, times=1)
    if not whole.is_meta:
        dist.all_gather_into_tensor(whole, own, group=axis.group)
    return whole.movedim(0, dim)


def all_to_all(x: torch.Tensor, axis: Axis, sent: list[int], received: list[int]) -> torch.Tensor:
    """A new tensor [M, ...] of the `received[r]` rows from each rank r, of their x [N, ...], as in `exchange`."""
    x = x.contiguous()
    result = x.new_empty(sum(received), *x.shape[1:])
    counter = _traffic.get()
    if counter is not None:
        counter[axis.name] += x[: sum(sent) - sent[axis.index]].nbytes
    if not x.is_meta:
        dist.all_to_all_single(result, x, received, sent, group=axis.group)
    return result


def reduce_scatter(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """A new tensor [..., n, ...], this rank's part along `dim` of the sum of all ranks' x [..., ranks n, ...]."""
    return start_reduce_scatter(x, axis, dim).wait()


def start_reduce_scatter(x: torch.Tensor, axis: Axis, dim: int) -> Pending:
    """`reduce_scatter` of x [..., ranks n, ...] that is not waited for."""
    whole = x.movedim(dim, 0).contiguous()
    own = whole.new_empty(whole.shape[0] // axis.size, *whole.shape[1:])
    _count(whole, axis, times=1)
    work = None if whole.is_meta else dist.reduce_scatter_tensor(own, whole, group=axis.group, async_op=True)
    return Pending(own.movedim(0, dim), work, whole)
