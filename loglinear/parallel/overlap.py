"""Gradients of inputs are summed over the tensor ranks while those of weights are still computed.

A half of a block begins with linear layers that all read what it takes in, and that gradient has to be summed over the
ranks. Autograd runs the nodes that were made later first. So the nodes that compute the gradients of these layers'
weights are made before the one that takes the input in: backward runs all gradients of the input, starts the sum,
computes the weights' gradients meanwhile, and waits for the sum only then. Source of the idea: Megatron-LM.

Shapes: b batch, t time, d width that a layer reads, o that it makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from loglinear.parallel.collectives import Pending, all_gather, start_all_reduce, start_reduce_scatter
from loglinear.parallel.mesh import Axis


class ColumnLinear(nn.Linear):
    """A linear layer without bias whose weight's gradient can come later than its input's."""

    def __init__(self, layer: nn.Linear) -> None:
        """Take the place of `layer`, with its weight."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self._later: _Later | None = None

    def prepare(self) -> None:
        """Make the node of the weight's gradient, for the next call."""
        self._later = _Later(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shapes [B, T, D] in and [B, T, O] out."""
        later, self._later = self._later, None
        return super().forward(input) if later is None else _Linear.apply(input, later.alias_od, later)


def enter(x_btd: torch.Tensor, axis: Axis, time: int | None, readers: Sequence[ColumnLinear]) -> torch.Tensor:
    """As `gather` along `time`, or as `copy_to` if that is None; the sum of the gradient hides behind `readers`.

    Args:
        x_btd: [B, T, D].
        axis: the tensor ranks.
        time: the dimension that is cut, or None.
        readers: will be called with the result, once each.
    """
    coming: list[Pending] = []
    x_btd = _Finish.apply(x_btd, coming)
    for layer in readers:
        layer.prepare()
    return _Start.apply(x_btd, axis, time, coming)


class _Later:
    """What the gradient of a weight is made of, from one node to the other."""

    def __init__(self, weight_od: torch.Tensor) -> None:
        self.parts: tuple[torch.Tensor, torch.Tensor] | None = None
        self.alias_od = _Weight.apply(weight_od, self)


class _Weight(torch.autograd.Function):
    """The weight as it is; backward computes its gradient from what `_Linear` has left."""

    @staticmethod
    def forward(ctx: Any, weight_od: torch.Tensor, later: _Later) -> torch.Tensor:
        ctx.later = later
        return weight_od.view_as(weight_od)

    @staticmethod
    def backward(ctx: Any, nothing_od: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert ctx.later.parts is not None
        (dy_bto, x_btd), ctx.later.parts = ctx.later.parts, None
        return dy_bto.flatten(0, -2).T @ x_btd.flatten(0, -2), None


class _Linear(torch.autograd.Function):
    """x W^T; backward computes the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x_btd: torch.Tensor, alias_od: torch.Tensor, later: _Later) -> torch.Tensor:
        ctx.save_for_backward(x_btd, alias_od)
        ctx.later = later
        return F.linear(x_btd, alias_od)

    @staticmethod
    def backward(ctx: Any, dy_bto: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_btd, alias_od = ctx.saved_tensors
        ctx.later.parts = (dy_bto, x_btd)
        nothing_od = dy_bto.new_zeros(()).expand_as(alias_od)  # `_Weight` is to run, and makes the gradient
        return dy_bto @ alias_od, nothing_od, None


class _Start(torch.autograd.Function):
    """Takes in what this rank holds; backward starts the sum, which `_Finish` waits for."""

    @staticmethod
    def forward(ctx: Any, x_btd: torch.Tensor, axis: Axis, time: int | None, coming: list[Pending]) -> torch.Tensor:
        ctx.axis, ctx.time, ctx.coming = axis, time, coming
        return x_btd.view_as(x_btd) if time is None else all_gather(x_btd, axis, time)

    @staticmethod
    def backward(ctx: Any, dx_btd: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.time is None:
            pending = start_all_reduce(dx_btd, ctx.axis)
        else:
            pending = start_reduce_scatter(dx_btd, ctx.axis, ctx.time)
        ctx.coming.append(pending)
        return pending.tensor, None, None, None


class _Finish(torch.autograd.Function):
    """x as it is; backward hands on the gradient once its sum is there."""

    @staticmethod
    def forward(ctx: Any, x_btd: torch.Tensor, coming: list[Pending]) -> torch.Tensor:
        ctx.coming = coming
        return x_btd.view_as(x_btd)

    @staticmethod
    def backward(ctx: Any, unfinished_btd: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.coming.pop().wait(), None
