"""The short causal convolution and its SiLU: one pass forward, two backward.

Shapes: i token (all rows of a batch, one after the other), c channel, w tap, or first of all the bias.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.operator import operator
from loglinear.ops.triton.partial_sums import empty_sums, gradients, steps_of_a_program

BLOCK_I, BLOCK_C = 16, 64
MOST_PROGRAMS = 256  # for each block of channels


@operator("loglinear::causal_conv_silu")
def causal_conv_silu(
    x_btc: torch.Tensor, weight_wc: torch.Tensor, bias_c: torch.Tensor, positions_bt: torch.Tensor
) -> torch.Tensor:
    """silu(bias + sum over w of weight[w] * x at w tokens before), in x's dtype, summed in fp32.

    Args:
        x_btc: [B, T, C], contiguous.
        weight_wc: [W, C], of the token itself first.
        bias_c: [C].
        positions_bt: int64 [B, T], of each token in its own document; earlier documents are not read.
    """
    y_btc = torch.empty_like(x_btc)
    batch, time, channels = x_btc.shape
    _forward[(triton.cdiv(batch * time, BLOCK_I), triton.cdiv(channels, BLOCK_C))](
        x_btc, weight_wc, bias_c, positions_bt, y_btc, batch * time, time, *positions_bt.stride(), channels,
        W=len(weight_wc), BLOCK_I=BLOCK_I, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return y_btc


@causal_conv_silu.register_fake
def _(x_btc, weight_wc, bias_c, positions_bt):
    return torch.empty_like(x_btc)


@operator("loglinear::causal_conv_silu_backward")
def _causal_conv_silu_backward(
    dy_btc: torch.Tensor,
    x_btc: torch.Tensor,
    weight_wc: torch.Tensor,
    bias_c: torch.Tensor,
    positions_bt: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and, as `empty_sums` lays them out, of weight and bias."""
    dsum_btc, dx_btc = (torch.empty_like(x_btc) for _ in range(2))
    batch, time, channels = x_btc.shape
    tokens, blocks = batch * time, triton.cdiv(channels, BLOCK_C)
    steps, programs = steps_of_a_program(tokens, BLOCK_I, MOST_PROGRAMS)
    sums = empty_sums((weight_wc, bias_c), programs)
    where = (tokens, time, *positions_bt.stride(), channels)
    taps = {"W": len(weight_wc), "BLOCK_I": BLOCK_I, "BLOCK_C": BLOCK_C}
    _before_silu[(programs, blocks)](
        dy_btc, x_btc, weight_wc, bias_c, positions_bt, dsum_btc, sums, sums.stride(0), *where, steps,
        **taps, num_warps=8,
    )  # fmt: skip
    _to_inputs[(triton.cdiv(tokens, BLOCK_I), blocks)](
        dsum_btc, weight_wc, positions_bt, dx_btc, *where, **taps, num_warps=4
    )
    return dx_btc, sums.sum(0)


@_causal_conv_silu_backward.register_fake
def _(dy_btc, x_btc, weight_wc, bias_c, positions_bt):
    return torch.empty_like(x_btc), empty_sums((weight_wc, bias_c))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy_btc):
    dx_btc, sums = _causal_conv_silu_backward(dy_btc.contiguous(), *ctx.saved_tensors)
    return dx_btc, *gradients(sums, ctx.saved_tensors[1:3]), None


causal_conv_silu.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _load_positions(positions_ptr, i, tokens, T, STRIDE_B, STRIDE_T):
    """Positions of tokens; no token stands at -1."""
    return tl.load(positions_ptr + i // T * STRIDE_B + i % T * STRIDE_T, mask=i < tokens, other=-1)


@triton.jit
def _convolve(
    x_ptr, weight_ptr, bias_c, i, position_i, c, C, W: tl.constexpr
):  # fmt: skip
    """bias + sum of taps at tokens i, fp32; zero taps before the document."""
    y_ic = tl.zeros([i.shape[0], c.shape[0]], tl.float32) + bias_c[None, :]
    for back in tl.static_range(W):
        seen_ic = (position_i >= back)[:, None] & (c < C)[None, :]
        x_ic = tl.load(x_ptr + (i - back).to(tl.int64)[:, None] * C + c[None, :], mask=seen_ic, other=0.0)
        weight_c = tl.load(weight_ptr + back * C + c, mask=c < C, other=0.0).to(tl.float32)
        y_ic += weight_c[None, :] * x_ic.to(tl.float32)
    return y_ic


@triton.jit(do_not_specialize=["tokens", "T"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, positions_ptr, y_ptr, tokens, T, STRIDE_B, STRIDE_T, C,
    W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias_c = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    position_i = _load_positions(positions_ptr, i, tokens, T, STRIDE_B, STRIDE_T)
    y_ic = _convolve(x_ptr, weight_ptr, bias_c, i, position_i, c, C, W)
    y_ic *= tl.sigmoid(y_ic)
    y_at = y_ptr + i.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_at, y_ic.to(y_ptr.dtype.element_ty), mask=(i < tokens)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["tokens", "T", "steps"])
def _before_silu(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, positions_ptr, dsum_ptr, sums_ptr, STRIDE_SUMS,
    tokens, T, STRIDE_B, STRIDE_T, C, steps,
    W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of what goes into the SiLU, which is computed again, and its products with what the taps saw."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias_c = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    sums = (tl.zeros([BLOCK_I, BLOCK_C], tl.float32),)  # of the bias; the taps' follow
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BLOCK_I, BLOCK_C], tl.float32),)  # noqa: RUF005 (Triton knows no star)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        position_i = _load_positions(positions_ptr, i, tokens, T, STRIDE_B, STRIDE_T)
        y_ic = _convolve(x_ptr, weight_ptr, bias_c, i, position_i, c, C, W)
        at_ic = i.to(tl.int64)[:, None] * C + c[None, :]
        exists_ic = (i < tokens)[:, None] & (c < C)[None, :]
        share_ic = tl.sigmoid(y_ic)
        dsum_ic = tl.load(dy_ptr + at_ic, mask=exists_ic, other=0.0).to(tl.float32)
        dsum_ic *= share_ic * (1.0 + y_ic * (1.0 - share_ic))
        tl.store(dsum_ptr + at_ic, dsum_ic.to(dsum_ptr.dtype.element_ty), mask=exists_ic)
        added = (sums[0] + dsum_ic,)
        for back in tl.static_range(W):
            seen_ic = (position_i >= back)[:, None] & (c < C)[None, :]
            x_ic = tl.load(x_ptr + at_ic - back * C, mask=seen_ic, other=0.0).to(tl.float32)
            added = added + (sums[back + 1] + dsum_ic * x_ic,)  # noqa: RUF005
        sums = added
    sums_ptr += tl.program_id(0).to(tl.int64) * STRIDE_SUMS + c
    for back in tl.static_range(W):
        tl.store(sums_ptr + back * C, tl.sum(sums[back + 1], 0), mask=c < C)
    tl.store(sums_ptr + W * C, tl.sum(sums[0], 0), mask=c < C)


@triton.jit(do_not_specialize=["tokens", "T"])
def _to_inputs(
    dsum_ptr, weight_ptr, positions_ptr, dx_ptr, tokens, T, STRIDE_B, STRIDE_T, C,
    W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each token's share of the gradients of the W sums that it went into."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at_ic = i.to(tl.int64)[:, None] * C + c[None, :]
    dx_ic = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for ahead in tl.static_range(W):
        position_i = _load_positions(positions_ptr, i + ahead, tokens, T, STRIDE_B, STRIDE_T)
        reads_ic = (position_i >= ahead)[:, None] & (c < C)[None, :]
        weight_c = tl.load(weight_ptr + ahead * C + c, mask=c < C, other=0.0).to(tl.float32)
        dsum_ic = tl.load(dsum_ptr + at_ic + ahead * C, mask=reads_ic, other=0.0).to(tl.float32)
        dx_ic += weight_c[None, :] * dsum_ic
    tl.store(dx_ptr + at_ic, dx_ic.to(dx_ptr.dtype.element_ty), mask=(i < tokens)[:, None] & (c < C)[None, :])
