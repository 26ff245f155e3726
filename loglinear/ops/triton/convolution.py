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
    x_btc: torch.Tensor,
    weight_wc: torch.Tensor,
    bias_c: torch.Tensor,
    positions_bt: torch.Tensor,
    past_bwc: torch.Tensor | None,
) -> torch.Tensor:
    """silu(bias + sum over w of weight[w] * x at w tokens before), in x's dtype, summed in fp32.

    Args:
        x_btc: [B, T, C], contiguous.
        weight_wc: [W, C], of the token itself first.
        bias_c: [C].
        positions_bt: int64 [B, T], of each token in its own document; earlier documents are not read.
        past_bwc: [B, W - 1, C], contiguous, the inputs before the first token; if None, that is its document's first.
    """
    y_btc = torch.empty_like(x_btc)
    batch, time, channels = x_btc.shape
    _forward[(triton.cdiv(batch * time, BLOCK_I), triton.cdiv(channels, BLOCK_C))](
        x_btc, past_bwc, weight_wc, bias_c, positions_bt, y_btc, batch * time, time, *positions_bt.stride(), channels,
        W=len(weight_wc), BLOCK_I=BLOCK_I, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return y_btc


@causal_conv_silu.register_fake
def _(x_btc, weight_wc, bias_c, positions_bt, past_bwc):
    return torch.empty_like(x_btc)


@operator("loglinear::causal_conv_silu_backward")
def _causal_conv_silu_backward(
    dy_btc: torch.Tensor,
    x_btc: torch.Tensor,
    weight_wc: torch.Tensor,
    bias_c: torch.Tensor,
    positions_bt: torch.Tensor,
    past_bwc: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of weight and bias as `empty_sums` lays them out, and of the past (empty without one)."""
    dsum_btc, dx_btc = (torch.empty_like(x_btc) for _ in range(2))
    batch, time, channels = x_btc.shape
    tokens, blocks, reach = batch * time, triton.cdiv(channels, BLOCK_C), len(weight_wc) - 1
    steps, programs = steps_of_a_program(tokens, BLOCK_I, MOST_PROGRAMS)
    sums = empty_sums((weight_wc, bias_c), programs)
    where = (time, *positions_bt.stride(), channels)
    taps = {"W": len(weight_wc), "BLOCK_I": BLOCK_I, "BLOCK_C": BLOCK_C}
    _before_silu[(programs, blocks)](
        dy_btc, x_btc, past_bwc, weight_wc, bias_c, positions_bt, dsum_btc, sums, sums.stride(0), tokens, *where, steps,
        **taps, num_warps=8,
    )  # fmt: skip
    dpast_bwc = _empty_past(x_btc, past_bwc)
    for dinput, length, first in ((dx_btc, time, 0), (dpast_bwc, reach, -reach)):
        if dinput.numel():
            _to_inputs[(triton.cdiv(batch * length, BLOCK_I), blocks)](
                dsum_btc, weight_wc, positions_bt, dinput, batch * length, length, *where,
                FIRST=first, **taps, num_warps=4,
            )  # fmt: skip
    return dx_btc, sums.sum(0), dpast_bwc


@_causal_conv_silu_backward.register_fake
def _(dy_btc, x_btc, weight_wc, bias_c, positions_bt, past_bwc):
    return torch.empty_like(x_btc), empty_sums((weight_wc, bias_c)), _empty_past(x_btc, past_bwc)


def _empty_past(x_btc: torch.Tensor, past_bwc: torch.Tensor | None) -> torch.Tensor:
    return x_btc.new_empty(0) if past_bwc is None else torch.empty_like(past_bwc)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy_btc):
    _, weight_wc, bias_c, _, past_bwc = ctx.saved_tensors
    dx_btc, sums, dpast_bwc = _causal_conv_silu_backward(dy_btc.contiguous(), *ctx.saved_tensors)
    return dx_btc, *gradients(sums, (weight_wc, bias_c)), None, None if past_bwc is None else dpast_bwc


causal_conv_silu.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def _load_positions(positions_ptr, row_i, t_i, exists_i, STRIDE_B, STRIDE_T):
    """Positions of tokens t of rows; a token that does not exist stands at -1."""
    return tl.load(positions_ptr + row_i * STRIDE_B + t_i * STRIDE_T, mask=exists_i, other=-1)


@triton.jit
def _seen(x_ptr, past_ptr, i, row_i, t_i, position_i, c, C, BACK: tl.constexpr, W: tl.constexpr):
    """What a tap sees `BACK` tokens before tokens i, which are tokens t of rows, fp32; zero before the document."""
    seen_ic = (position_i >= BACK)[:, None] & (c < C)[None, :]
    in_row_ic = seen_ic
    if past_ptr is not None:
        in_row_ic = seen_ic & (t_i >= BACK)[:, None]
    at_i = (i - BACK).to(tl.int64)
    x_ic = tl.load(x_ptr + at_i[:, None] * C + c[None, :], mask=in_row_ic, other=0.0).to(tl.float32)
    if past_ptr is not None:
        at_i = (row_i * (W - 1) + W - 1 + t_i - BACK).to(tl.int64)
        in_past_ic = seen_ic & (t_i < BACK)[:, None]
        x_ic += tl.load(past_ptr + at_i[:, None] * C + c[None, :], mask=in_past_ic, other=0.0).to(tl.float32)
    return x_ic


@triton.jit
def _convolve(x_ptr, past_ptr, weight_ptr, bias_c, i, row_i, t_i, position_i, c, C, W: tl.constexpr):
    """bias + sum of taps at tokens i, fp32."""
    y_ic = tl.zeros([i.shape[0], c.shape[0]], tl.float32) + bias_c[None, :]
    for back in tl.static_range(W):
        weight_c = tl.load(weight_ptr + back * C + c, mask=c < C, other=0.0).to(tl.float32)
        y_ic += weight_c[None, :] * _seen(x_ptr, past_ptr, i, row_i, t_i, position_i, c, C, back, W)
    return y_ic


@triton.jit(do_not_specialize=["tokens", "T"])
def _forward(
    x_ptr, past_ptr, weight_ptr, bias_ptr, positions_ptr, y_ptr, tokens, T, STRIDE_B, STRIDE_T, C,
    W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias_c = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    row_i, t_i = i // T, i % T
    position_i = _load_positions(positions_ptr, row_i, t_i, i < tokens, STRIDE_B, STRIDE_T)
    y_ic = _convolve(x_ptr, past_ptr, weight_ptr, bias_c, i, row_i, t_i, position_i, c, C, W)
    y_ic *= tl.sigmoid(y_ic)
    y_at = y_ptr + i.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_at, y_ic.to(y_ptr.dtype.element_ty), mask=(i < tokens)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["tokens", "T", "steps"])
def _before_silu(
    dy_ptr, x_ptr, past_ptr, weight_ptr, bias_ptr, positions_ptr, dsum_ptr, sums_ptr, STRIDE_SUMS,
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
        row_i, t_i = i // T, i % T
        position_i = _load_positions(positions_ptr, row_i, t_i, i < tokens, STRIDE_B, STRIDE_T)
        y_ic = _convolve(x_ptr, past_ptr, weight_ptr, bias_c, i, row_i, t_i, position_i, c, C, W)
        at_ic = i.to(tl.int64)[:, None] * C + c[None, :]
        exists_ic = (i < tokens)[:, None] & (c < C)[None, :]
        share_ic = tl.sigmoid(y_ic)
        dsum_ic = tl.load(dy_ptr + at_ic, mask=exists_ic, other=0.0).to(tl.float32)
        dsum_ic *= share_ic * (1.0 + y_ic * (1.0 - share_ic))
        tl.store(dsum_ptr + at_ic, dsum_ic.to(dsum_ptr.dtype.element_ty), mask=exists_ic)
        added = (sums[0] + dsum_ic,)
        for back in tl.static_range(W):
            x_ic = _seen(x_ptr, past_ptr, i, row_i, t_i, position_i, c, C, back, W)
            added = added + (sums[back + 1] + dsum_ic * x_ic,)  # noqa: RUF005
        sums = added
    sums_ptr += tl.program_id(0).to(tl.int64) * STRIDE_SUMS + c
    for back in tl.static_range(W):
        tl.store(sums_ptr + back * C, tl.sum(sums[back + 1], 0), mask=c < C)
    tl.store(sums_ptr + W * C, tl.sum(sums[0], 0), mask=c < C)


@triton.jit(do_not_specialize=["inputs", "LENGTH", "T"])
def _to_inputs(
    dsum_ptr, weight_ptr, positions_ptr, dx_ptr, inputs, LENGTH, T, STRIDE_B, STRIDE_T, C,
    FIRST: tl.constexpr, W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The share of inputs, `LENGTH` a row from token `FIRST` on, in the gradients of the W sums that they went into."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_i = i // LENGTH
    dx_ic = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for ahead in tl.static_range(W):
        t_i = i % LENGTH + FIRST + ahead
        exists_i = (i < inputs) & (t_i >= 0) & (t_i < T)
        position_i = _load_positions(positions_ptr, row_i, t_i, exists_i, STRIDE_B, STRIDE_T)
        reads_ic = (position_i >= ahead)[:, None] & (c < C)[None, :]
        weight_c = tl.load(weight_ptr + ahead * C + c, mask=c < C, other=0.0).to(tl.float32)
        at_i = (row_i * T + t_i).to(tl.int64)
        dsum_ic = tl.load(dsum_ptr + at_i[:, None] * C + c[None, :], mask=reads_ic, other=0.0).to(tl.float32)
        dx_ic += weight_c[None, :] * dsum_ic
    at_ic = i.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(dx_ptr + at_ic, dx_ic.to(dx_ptr.dtype.element_ty), mask=(i < inputs)[:, None] & (c < C)[None, :])
