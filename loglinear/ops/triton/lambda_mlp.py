"""The adaptive lambda map in one pass: two layers and a softplus on each head's level logits.

Nothing but the logits is kept for the backward pass; hidden values live in registers and are computed again.

Shapes: i token and head, one after the other, l level, m hidden size.
Source: arXiv 2605.06946.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import softplus
from loglinear.ops.triton.operator import operator
from loglinear.ops.triton.partial_sums import empty_sums, gradients, steps_of_a_program

BLOCK_I = 32  # with two warps: small products, many programs
MOST_PROGRAMS = 1536  # a dozen a multiprocessor of a large GPU
HIDDEN_SIZES = (16, 32, 64, 128)
MOST_LEVELS = 32


@operator("loglinear::lambda_mlp")
def lambda_mlp(
    logits_il: torch.Tensor,
    weight1_ml: torch.Tensor,
    bias1_m: torch.Tensor,
    weight2_lm: torch.Tensor,
    bias2_l: torch.Tensor,
) -> torch.Tensor:
    """softplus(W2 gelu(W1 logits + b1) + b2) of every row, in the dtype of the logits, summed in fp32.

    Args:
        logits_il: [tokens * heads, L], contiguous, L at most `MOST_LEVELS`.
        weight1_ml: [M, L], M one of `HIDDEN_SIZES`.
        bias1_m: [M].
        weight2_lm: [L, M].
        bias2_l: [L].
    """
    scales_il = torch.empty_like(logits_il)
    rows = len(logits_il)
    steps = triton.cdiv(rows, BLOCK_I * MOST_PROGRAMS)
    _forward[(triton.cdiv(rows, BLOCK_I * steps),)](
        logits_il, weight1_ml, bias1_m, weight2_lm, bias2_l, scales_il, rows, steps, **_constants(logits_il, bias1_m)
    )
    return scales_il


def _constants(logits_il: torch.Tensor, bias1_m: torch.Tensor) -> dict[str, Any]:
    levels = logits_il.shape[1]
    precision = "tf32x3" if logits_il.dtype == torch.float32 else "tf32"
    block_l = max(16, triton.next_power_of_2(levels))
    return {
        "L": levels,
        "M": len(bias1_m),
        "BLOCK_L": block_l,
        "BLOCK_I": BLOCK_I,
        "PRECISION": precision,
        "num_warps": 2,
    }


@lambda_mlp.register_fake
def _(logits_il, weight1_ml, bias1_m, weight2_lm, bias2_l):
    return torch.empty_like(logits_il)


@operator("loglinear::lambda_mlp_backward")
def _lambda_mlp_backward(
    dscales_il: torch.Tensor,
    logits_il: torch.Tensor,
    weight1_ml: torch.Tensor,
    bias1_m: torch.Tensor,
    weight2_lm: torch.Tensor,
    bias2_l: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the logits and, as `empty_sums` lays them out, of both layers' weights and biases."""
    dlogits_il = torch.empty_like(logits_il)
    rows, weights = len(logits_il), (weight1_ml, bias1_m, weight2_lm, bias2_l)
    steps, programs = steps_of_a_program(rows, BLOCK_I, MOST_PROGRAMS)
    sums = empty_sums(weights, programs)
    _backward[(programs,)](
        dscales_il, logits_il, *weights, dlogits_il, sums, sums.stride(0), rows, steps, **_constants(logits_il, bias1_m)
    )
    return dlogits_il, sums.sum(0)


@_lambda_mlp_backward.register_fake
def _(dscales_il, logits_il, *weights):
    return torch.empty_like(logits_il), empty_sums(weights)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dscales_il):
    logits_il, *weights = ctx.saved_tensors
    dlogits_il, sums = _lambda_mlp_backward(dscales_il.contiguous(), logits_il, *weights)
    return dlogits_il, *gradients(sums, weights)


lambda_mlp.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _load_weights(
    weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, L: tl.constexpr, M: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """Both layers, W1 as [l, m] and W2 as [m, l]; zero for levels that do not exist."""
    m, level = tl.arange(0, M), tl.arange(0, BLOCK_L)
    exists_lm = (level < L)[:, None] & (m >= 0)[None, :]
    weight1_lm = tl.load(weight1_ptr + m[None, :] * L + level[:, None], mask=exists_lm, other=0.0)
    weight2_lm = tl.load(weight2_ptr + level[:, None] * M + m[None, :], mask=exists_lm, other=0.0)
    bias1_m = tl.load(bias1_ptr + m).to(tl.float32)
    bias2_l = tl.load(bias2_ptr + level, mask=level < L, other=0.0).to(tl.float32)
    return weight1_lm, bias1_m, tl.trans(weight2_lm), bias2_l


@triton.jit
def _hidden(logits_il, weight1_lm, bias1_m, PRECISION: tl.constexpr):
    """The first layer, and Phi of it: gelu(x) = x * Phi(x)."""
    x_im = tl.dot(logits_il, weight1_lm, input_precision=PRECISION) + bias1_m[None, :]
    return x_im, 0.5 * (1.0 + tl.erf(x_im * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows", "steps"])
def _forward(
    logits_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, scales_ptr, rows, steps,
    L: tl.constexpr, M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    weight1_lm, bias1_m, weight2_ml, bias2_l = _load_weights(
        weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, L, M, BLOCK_L
    )
    dtype = logits_ptr.dtype.element_ty
    weight1_lm, weight2_ml = weight1_lm.to(dtype), weight2_ml.to(dtype)
    level = tl.arange(0, BLOCK_L)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        at_il = i.to(tl.int64)[:, None] * L + level[None, :]
        exists_il = (i < rows)[:, None] & (level < L)[None, :]
        logits_il = tl.load(logits_ptr + at_il, mask=exists_il, other=0.0)
        x_im, phi_im = _hidden(logits_il, weight1_lm, bias1_m, PRECISION)
        y_il = tl.dot((x_im * phi_im).to(dtype), weight2_ml, input_precision=PRECISION) + bias2_l[None, :]
        tl.store(scales_ptr + at_il, softplus(y_il).to(scales_ptr.dtype.element_ty), mask=exists_il)


@triton.jit(do_not_specialize=["rows", "steps"])
def _backward(
    dscales_ptr, logits_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr,
    dlogits_ptr, sums_ptr, STRIDE_SUMS, rows, steps,
    L: tl.constexpr, M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    weight1_lm, bias1_m, weight2_ml, bias2_l = _load_weights(
        weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, L, M, BLOCK_L
    )
    dtype = logits_ptr.dtype.element_ty
    weight1_lm, weight2_ml = weight1_lm.to(dtype), weight2_ml.to(dtype)
    level, m = tl.arange(0, BLOCK_L), tl.arange(0, M)
    dweight1_ml, dweight2_ml = tl.zeros([M, BLOCK_L], tl.float32), tl.zeros([M, BLOCK_L], tl.float32)
    dbias1_m, dbias2_l = tl.zeros([M], tl.float32), tl.zeros([BLOCK_L], tl.float32)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        at_il = i.to(tl.int64)[:, None] * L + level[None, :]
        exists_il = (i < rows)[:, None] & (level < L)[None, :]
        logits_il = tl.load(logits_ptr + at_il, mask=exists_il, other=0.0)
        x_im, phi_im = _hidden(logits_il, weight1_lm, bias1_m, PRECISION)
        hidden_im = (x_im * phi_im).to(dtype)
        y_il = tl.dot(hidden_im, weight2_ml, input_precision=PRECISION) + bias2_l[None, :]
        dscales_il = tl.load(dscales_ptr + at_il, mask=exists_il, other=0.0).to(tl.float32)
        dy_il = dscales_il * tl.sigmoid(y_il)
        dbias2_l += tl.sum(dy_il, 0)
        dy_il = dy_il.to(dtype)
        dweight2_ml = tl.dot(tl.trans(hidden_im), dy_il, dweight2_ml, input_precision=PRECISION)
        slope_im = phi_im + x_im * 0.3989422804014327 * tl.exp(-0.5 * x_im * x_im)
        dx_im = slope_im * tl.dot(dy_il, tl.trans(weight2_ml), input_precision=PRECISION)
        dbias1_m += tl.sum(dx_im, 0)
        dx_im = dx_im.to(dtype)
        dweight1_ml = tl.dot(tl.trans(dx_im), logits_il, dweight1_ml, input_precision=PRECISION)
        dlogits_il = tl.dot(dx_im, tl.trans(weight1_lm), input_precision=PRECISION)
        tl.store(dlogits_ptr + at_il, dlogits_il.to(dtype), mask=exists_il)
    exists_ml = (m >= 0)[:, None] & (level < L)[None, :]
    sums_ptr += tl.program_id(0) * STRIDE_SUMS
    tl.store(sums_ptr + m[:, None] * L + level[None, :], dweight1_ml, mask=exists_ml)
    tl.store(sums_ptr + M * L + m, dbias1_m)
    tl.store(sums_ptr + M * L + M + level[None, :] * M + m[:, None], dweight2_ml, mask=exists_ml)
    tl.store(sums_ptr + 2 * M * L + M + level, dbias2_l, mask=level < L)
