"""RMSNorm over the last dimension: one pass forward, one backward, which also adds up the weight's gradient.

Shapes: i row, d width.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.operator import operator
from loglinear.ops.triton.partial_sums import steps_of_a_program

MOST_WIDTH = 8192  # a row must fit in the registers of a program
NUMBERS = 2048  # of all rows that a program has at once
MOST_PROGRAMS = 1024


@operator("loglinear::rms_norm")
def rms_norm(x_id: torch.Tensor, weight_d: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in x's dtype, computed in fp32.

    Args:
        x_id: [rows, D], contiguous, D at most `MOST_WIDTH`.
        weight_d: [D].
        eps: added to the mean square.

    Source: arXiv 1910.07467.
    """
    y_id = torch.empty_like(x_id)
    sizes = _sizes(x_id.shape[1])
    _forward[(triton.cdiv(len(x_id), sizes["BLOCK_I"]),)](x_id, None, weight_d, y_id, None, len(x_id), eps, **sizes)
    return y_id


@operator("loglinear::add_rms_norm")
def add_rms_norm(
    x_id: torch.Tensor, addend_id: torch.Tensor, weight_d: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of x + addend, and that sum, rounded to x's dtype before it is read. Shapes as there."""
    y_id, sum_id, sizes = torch.empty_like(x_id), torch.empty_like(x_id), _sizes(x_id.shape[1])
    _forward[(triton.cdiv(len(x_id), sizes["BLOCK_I"]),)](
        x_id, addend_id, weight_d, y_id, sum_id, len(x_id), eps, **sizes
    )
    return y_id, sum_id


def _sizes(width: int) -> dict[str, Any]:
    block_d = 1 << (width - 1).bit_length()
    return {
        "D": width,
        "BLOCK_D": block_d,
        "BLOCK_I": max(1, NUMBERS // block_d),
        "num_warps": 8 if block_d > NUMBERS else 4,
    }


@rms_norm.register_fake
def _(x_id, weight_d, eps):
    return torch.empty_like(x_id)


@add_rms_norm.register_fake
def _(x_id, addend_id, weight_d, eps):
    return torch.empty_like(x_id), torch.empty_like(x_id)


@operator("loglinear::rms_norm_backward")
def _rms_norm_backward(
    dy_id: torch.Tensor, x_id: torch.Tensor, weight_d: torch.Tensor, eps: float, beside_id: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, to which `beside` is added in fp32 if there is one, and of weight."""
    dx_id, sizes = torch.empty_like(x_id), _sizes(x_id.shape[1])
    steps, programs = steps_of_a_program(len(x_id), sizes["BLOCK_I"], MOST_PROGRAMS)
    sums_d = weight_d.new_empty(programs, len(weight_d), dtype=torch.float32)
    _backward[(programs,)](dy_id, x_id, weight_d, beside_id, dx_id, sums_d, len(x_id), steps, eps, **sizes)
    return dx_id, sums_d.sum(0).to(weight_d.dtype)


@_rms_norm_backward.register_fake
def _(dy_id, x_id, weight_d, eps, beside_id=None):
    return torch.empty_like(x_id), torch.empty_like(weight_d)


def _setup_context(ctx, inputs, output) -> None:
    x_id, weight_d, ctx.eps = inputs
    ctx.save_for_backward(x_id, weight_d)


def _autograd(ctx, dy_id, beside_id=None):
    return *_rms_norm_backward(dy_id.contiguous(), *ctx.saved_tensors, ctx.eps, beside_id), None


rms_norm.register_autograd(_autograd, setup_context=_setup_context)


def _setup_context_of_sum(ctx, inputs, output) -> None:
    _, _, weight_d, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight_d)


def _autograd_of_sum(ctx, dy_id, dsum_id):
    dx_id, *others = _autograd(ctx, dy_id, dsum_id.contiguous())
    return dx_id, dx_id, *others


add_rms_norm.register_autograd(_autograd_of_sum, setup_context=_setup_context_of_sum)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, addend_ptr, weight_ptr, y_ptr, sum_ptr, rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i, d = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
    at_id = i.to(tl.int64)[:, None] * D + d[None, :]
    exists_id = (i < rows)[:, None] & (d < D)[None, :]
    x_id = tl.load(x_ptr + at_id, mask=exists_id, other=0.0).to(tl.float32)
    if addend_ptr is not None:
        x_id += tl.load(addend_ptr + at_id, mask=exists_id, other=0.0).to(tl.float32)
        x_id = x_id.to(sum_ptr.dtype.element_ty).to(tl.float32)
        tl.store(sum_ptr + at_id, x_id, mask=exists_id)
    weight_d = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    factor_i = tl.rsqrt(tl.sum(x_id * x_id, 1) / D + eps)
    y_id = x_id * factor_i[:, None] * weight_d[None, :]
    tl.store(y_ptr + at_id, y_id.to(y_ptr.dtype.element_ty), mask=exists_id)


@triton.jit(do_not_specialize=["rows", "steps"])
def _backward(
    dy_ptr, x_ptr, weight_ptr, beside_ptr, dx_ptr, sums_ptr, rows, steps, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    weight_d = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    sums_id = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        at_id = i.to(tl.int64)[:, None] * D + d[None, :]
        exists_id = (i < rows)[:, None] & (d < D)[None, :]
        x_id = tl.load(x_ptr + at_id, mask=exists_id, other=0.0).to(tl.float32)
        dy_id = tl.load(dy_ptr + at_id, mask=exists_id, other=0.0).to(tl.float32)
        beside_id = 0.0 if beside_ptr is None else tl.load(beside_ptr + at_id, mask=exists_id, other=0.0)
        factor_i = tl.rsqrt(tl.sum(x_id * x_id, 1) / D + eps)
        x_id *= factor_i[:, None]
        sums_id += dy_id * x_id
        dy_id *= weight_d[None, :]
        dx_id = factor_i[:, None] * (dy_id - x_id * (tl.sum(dy_id * x_id, 1) / D)[:, None])
        dx_id += beside_id
        tl.store(dx_ptr + at_id, dx_id.to(dx_ptr.dtype.element_ty), mask=exists_id)
    tl.store(sums_ptr + tl.program_id(0) * D + d, tl.sum(sums_id, 0), mask=d < D)
