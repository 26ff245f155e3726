"""The collectives as functions that autograd understands; each stands beside its transpose.

An axis of one rank costs nothing: the input is returned as it is. On the meta device nothing is sent, and every
collective gives a tensor of the right shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from loglinear.parallel.mesh import Axis

_traffic: ContextVar[Counter[str] | None] = ContextVar("traffic", default=None)


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x [...], which all ranks of the axis hold alike; the gradient is the sum of theirs."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def sum_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of all ranks' x [...]; transpose of `copy_to`."""
    return x if axis.size == 1 else _Sum.apply(x, axis)


def gather(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """All ranks' x [..., n, ...] along `dim` as [..., ranks n, ...]; of the summed gradient each takes its part."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def sum_and_scatter(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """This rank's part [..., n, ...] of the sum of all ranks' x [..., ranks n, ...]; transpose of `gather`."""
    return x if axis.size == 1 else _SumAndScatter.apply(x, axis, dim)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(dx, ctx.axis), None


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


def all_reduce(x: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """A new tensor with `op` over all ranks' x [...], the same bits on all."""
    total = x.clone(memory_format=torch.contiguous_format)
    _count(total, axis, times=2)
    if not total.is_meta:
        dist.all_reduce(total, op, group=axis.group)
    return total


def all_gather(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """A new tensor [..., ranks n, ...] of all ranks' x [..., n, ...] side by side along `dim`."""
    own = x.movedim(dim, 0).contiguous()
    whole = own.new_empty(axis.size * own.shape[0], *own.shape[1:])
    _count(whole, axis, times=1)
    if not whole.is_meta:
        dist.all_gather_into_tensor(whole, own, group=axis.group)
    return whole.movedim(0, dim)


def reduce_scatter(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """A new tensor [..., n, ...], this rank's part along `dim` of the sum of all ranks' x [..., ranks n, ...]."""
    whole = x.movedim(dim, 0).contiguous()
    own = whole.new_empty(whole.shape[0] // axis.size, *whole.shape[1:])
    _count(whole, axis, times=1)
    if not whole.is_meta:
        dist.reduce_scatter_tensor(own, whole, group=axis.group)
    return own.movedim(0, dim)
