"""Gradients of inputs are summed over the tensor ranks while those of weights are still computed.

The linear layers that begin a half of a block all read what it takes in, and that gradient has to be summed over the
ranks. They are one step of autograd (`loglinear.ops.projections`), which takes in what the rank holds and, backward,
starts the sum between the input's gradient and the weights'. Source of the idea: Megatron-LM, arXiv 1909.08053.

Shapes: b batch, t time, d width that is read, e width that is made (of each layer its own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from loglinear.ops.projections import input_gradient, products, stack, weight_gradients
from loglinear.parallel.collectives import all_gather, start_all_reduce, start_reduce_scatter
from loglinear.parallel.mesh import Axis


def column_projections(
    x_btd: torch.Tensor, weights_ed: Sequence[torch.Tensor], axis: Axis, cut: int | None
) -> tuple[torch.Tensor, ...]:
    """`projections` of all tokens by this rank's rows of every weight.

    Args:
        x_btd: what this rank holds of the input [B, T, D].
        weights_ed: [E, D] each.
        axis: the tensor ranks.
        cut: the dimension of x that is cut among them, or None if each holds the whole.

    Returns:
        [B, T, E] for each weight.
    """
    return _ColumnProjections.apply(x_btd, axis, cut, *weights_ed)  # pyright: ignore[reportReturnType]


class _ColumnProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_btd: torch.Tensor, axis: Axis, cut: int | None, *weights_ed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        whole_btd = x_btd if cut is None else all_gather(x_btd, axis, cut).contiguous()
        ctx.axis, ctx.cut = axis, cut
        ctx.save_for_backward(whole_btd, *weights_ed)
        ctx.set_materialize_grads(False)
        return products(whole_btd, weights_ed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_bte: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        whole_btd, *weights_ed = ctx.saved_tensors
        stacks = stack(dys_bte, weights_ed)
        dx_btd = input_gradient(stacks)
        if ctx.cut is None:
            coming = start_all_reduce(dx_btd, ctx.axis)
        else:
            coming = start_reduce_scatter(dx_btd, ctx.axis, ctx.cut)
        gradients = weight_gradients(stacks, whole_btd, ctx.needs_input_grad[3:])
        return coming.wait(), None, None, *gradients
