"""Linear layers that read one input as one step of autograd.

As separate layers each would make a gradient of the input, and autograd would add those up one after the other. Here
every product after the first is summed into what is there. The weights' gradients come after the input's, so that
whoever has to send that one (`loglinear.parallel.overlap`) can do so meanwhile.

Shapes: b batch, t time, d width that is read, e width that is made (of each layer its own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Projections(nn.Module):
    """`projections` of what a layer takes in; without weights, so that another can take its place."""

    def forward(self, x_btd: torch.Tensor, weights_ed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Shapes [B, T, D] and [E, D] each in, [B, T, E] each out."""
        return projections(x_btd, weights_ed)


def projections(x_btd: torch.Tensor, weights_ed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """x times the transpose of every weight.

    Args:
        x_btd: [B, T, D].
        weights_ed: [E, D] each.

    Returns:
        [B, T, E] for each weight, contiguous, in x's dtype.
    """
    return _Projections.apply(x_btd, *weights_ed)  # pyright: ignore[reportReturnType]


def products(x_btd: torch.Tensor, weights_ed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same as separate steps: shapes as those of `projections`."""
    return tuple(F.linear(x_btd, weight_ed) for weight_ed in weights_ed)


def input_gradient(dys_bte: Sequence[torch.Tensor | None], weights_ed: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradient of x [B, T, D], the sum over layers of dy W.

    Args:
        dys_bte: gradients [B, T, E] of the products, None where one was not used; at least one was.
        weights_ed: [E, D] each.
    """
    used = [(dy_bte, weight_ed) for dy_bte, weight_ed in zip(dys_bte, weights_ed, strict=True) if dy_bte is not None]
    (first_bte, first_ed), *others = used
    dx_id = first_bte.flatten(0, -2) @ first_ed
    for dy_bte, weight_ed in others:  # not `addmm_`, which torch's counter of FLOPs does not know
        torch.addmm(dx_id, dy_bte.flatten(0, -2), weight_ed, out=dx_id)
    return dx_id.unflatten(0, first_bte.shape[:-1])


def weight_gradients(
    dys_bte: Sequence[torch.Tensor | None], x_btd: torch.Tensor, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The gradient dy^T x of every weight, [E, D] each; None where it is not needed, or zero.

    Args:
        dys_bte: as in `input_gradient`.
        x_btd: [B, T, D].
        needed: of which weights a gradient is wanted.
    """
    x_id = x_btd.flatten(0, -2)
    return [
        dy_bte.flatten(0, -2).T @ x_id if is_needed and dy_bte is not None else None
        for dy_bte, is_needed in zip(dys_bte, needed, strict=True)
    ]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(x_btd: torch.Tensor, *weights_ed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return products(x_btd, weights_ed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_bte: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x_btd, *weights_ed = ctx.saved_tensors
        needs_dx, *needed = ctx.needs_input_grad
        dx_btd = input_gradient(dys_bte, weights_ed) if needs_dx else None
        return dx_btd, *weight_gradients(dys_bte, x_btd, needed)
