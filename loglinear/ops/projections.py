"""Linear layers that read one input as one step of autograd.

As separate layers each would make a gradient of the input, and autograd would add those up one after the other. Here
every product after the first is summed into what is there. The weights' gradients come after the input's, so that
whoever has to send that one (`loglinear.parallel.overlap`) can do so meanwhile.

A product of few channels takes as long as it takes to read the input, and backward to read and write the input's
gradient. So all of these are one product, whose weights are stacked.

Shapes: b batch, t time, i token of all rows, d width that is read, e width that is made (of each layer its own).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Channels up to which a product waits for memory. In bf16 each is one FLOP for a byte of input that is read, and half a
# FLOP for a byte of the input's gradient that is read and written. An H200 computes 171 in the time of a byte, so the
# bound is 171 forward and 342 backward.
NARROW = 256


Layer = nn.Linear | torch.Tensor  # without bias, or its weight [E, D]


class Projections(nn.Module):
    """`projections` of what a layer takes in; without weights, so that another can take its place."""

    def forward(self, x_btd: torch.Tensor, layers: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
        """What each layer makes of x [B, T, D], [B, T, E] each; hooks of the layers are not called."""
        return projections(x_btd, weights_of(layers))


def weights_of(layers: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
    """The weight [E, D] of each."""
    return tuple(layer if isinstance(layer, torch.Tensor) else layer.weight for layer in layers)


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
    """The same without a backward pass, [B, T, E] of each weight [E, D]."""
    found: dict[int, torch.Tensor] = {}
    for layers in _multiplied_at_once(range(len(weights_ed)), weights_ed, x_btd):
        y_bte = F.linear(x_btd, _cat([weights_ed[n] for n in layers], 0))
        parts = y_bte.split([len(weights_ed[n]) for n in layers], -1)
        found |= {n: part_bte.contiguous() for n, part_bte in zip(layers, parts, strict=True)}
    return tuple(found[n] for n in range(len(weights_ed)))


class Stacked(NamedTuple):
    """The backward pass of layers that are multiplied at once.

    Attributes:
        layers: which of all.
        weights_ed: of each, [E, D].
        dy_bte: the gradients of their products side by side, [B, T, sum of E].
    """

    layers: list[int]
    weights_ed: list[torch.Tensor]
    dy_bte: torch.Tensor


def stack(dys_bte: Sequence[torch.Tensor | None], weights_ed: Sequence[torch.Tensor]) -> list[Stacked]:
    """Put together what is multiplied at once.

    Args:
        dys_bte: gradients [B, T, E] of the products, None where one was not used; at least one was.
        weights_ed: [E, D] each.
    """
    used = {n: dy_bte for n, dy_bte in enumerate(dys_bte) if dy_bte is not None}
    return [
        Stacked(layers, [weights_ed[n] for n in layers], _cat([used[n] for n in layers], -1))
        for layers in _multiplied_at_once(used, weights_ed, next(iter(used.values())))
    ]


def input_gradient(stacks: Sequence[Stacked]) -> torch.Tensor:
    """The gradient of x [B, T, D], the sum over layers of dy W."""
    first, *others = stacks
    dx_id = first.dy_bte.flatten(0, -2) @ _cat(first.weights_ed, 0)
    for other in others:  # not `addmm_`, which torch's counter of FLOPs does not know
        torch.addmm(dx_id, other.dy_bte.flatten(0, -2), _cat(other.weights_ed, 0), out=dx_id)
    return dx_id.unflatten(0, first.dy_bte.shape[:-1])


def weight_gradients(
    stacks: Sequence[Stacked], x_btd: torch.Tensor, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The gradient dy^T x of every weight, [E, D] each; None where it is not needed, or zero.

    Args:
        stacks: as in `input_gradient`.
        x_btd: [B, T, D].
        needed: of which weights a gradient is wanted.
    """
    found: dict[int, torch.Tensor] = {}
    for layers, weights_ed, dy_bte in stacks:
        if any(needed[n] for n in layers):
            dweight_ed = dy_bte.flatten(0, -2).T @ x_btd.flatten(0, -2)
            found |= zip(layers, dweight_ed.split([len(weight_ed) for weight_ed in weights_ed]), strict=True)
    return [found.get(n) if is_needed else None for n, is_needed in enumerate(needed)]


def _multiplied_at_once(
    layers: Collection[int], weights_ed: Sequence[torch.Tensor], tokens_btc: torch.Tensor
) -> list[list[int]]:
    """Every wide layer alone, and all narrow ones, if reading the tokens once more costs more than copying weights."""
    alone = [[n] for n in layers if len(weights_ed[n]) > NARROW]
    narrow = [n for n in layers if len(weights_ed[n]) <= NARROW]
    if sum(len(weights_ed[n]) for n in narrow) > tokens_btc[..., 0].numel():
        return [*alone, *([n] for n in narrow)]
    return [*alone, narrow] if narrow else alone


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat`, which would copy a single tensor too."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_btd: torch.Tensor, *weights_ed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x_btd, *weights_ed)
        ctx.set_materialize_grads(False)
        return products(x_btd, weights_ed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_bte: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x_btd, *weights_ed = ctx.saved_tensors
        needs_dx, *needed = ctx.needs_input_grad
        stacks = stack(dys_bte, weights_ed)
        dx_btd = input_gradient(stacks) if needs_dx else None
        return dx_btd, *weight_gradients(stacks, x_btd, needed)
