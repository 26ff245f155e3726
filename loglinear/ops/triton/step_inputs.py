"""What a decoding step of the op reads, in one launch: three short convolutions, weighed values, and decays summed.

Shapes: i token, c channel, w tap, h head, p head size.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import softplus

BLOCK_C = 128


def step_inputs(
    inputs_ic: tuple[torch.Tensor, ...],
    weights_wc: tuple[torch.Tensor, ...],
    biases_c: tuple[torch.Tensor, ...],
    pasts_iwc: tuple[torch.Tensor, ...],
    raw_ih: torch.Tensor,
    bias_h: torch.Tensor,
    a_log_h: torch.Tensor,
    sums_ih: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """q, k and v [I, C] behind their convolutions, and v * step [I, C]; all between in fp32.

    Args:
        inputs_ic: of q, k and v, [I, C] each, contiguous; so are the next three.
        weights_wc: [W, C] each, of the token itself first.
        biases_c: [C] each.
        pasts_iwc: [I, W - 1, C] each, the inputs before; they then end with these.
        raw_ih: [I, H], contiguous; step = softplus(raw + bias).
        bias_h, a_log_h: [H]; the log-decay is -exp(A_log) * step.
        sums_ih: fp64 [I, H], contiguous, to which the log-decay is added.
    """
    outputs = tuple(map(torch.empty_like, inputs_ic))
    (rows, heads), counts = raw_ih.shape, tuple(x.shape[1] for x in inputs_ic)
    weighted_ic = torch.empty_like(inputs_ic[2])
    blocks = [triton.cdiv(count, BLOCK_C) for count in counts]
    firsts = tuple(accumulate(blocks[:-1], initial=0))
    _step_inputs[(sum(blocks), rows)](
        inputs_ic, weights_wc, biases_c, pasts_iwc, outputs, firsts, counts,
        raw_ih, bias_h, a_log_h, sums_ih, weighted_ic,
        H=heads, P=counts[2] // heads, W=len(weights_wc[0]), BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return *outputs, weighted_ic


@triton.jit
def _step_inputs(
    x_ptrs, weight_ptrs, bias_ptrs, past_ptrs, y_ptrs, firsts, counts,
    raw_ptr, raw_bias_ptr, a_log_ptr, sums_ptr, weighted_ptr,
    H: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    for number in tl.static_range(3):
        last = block < firsts[number + 1] if number + 1 < 3 else block >= 0
        if (block >= firsts[number]) & last:
            c, C = (block - firsts[number]) * BLOCK_C + tl.arange(0, BLOCK_C), counts[number]
            x_ptr, past_ptr = x_ptrs[number] + row * C, past_ptrs[number] + row * (W - 1) * C
            y_c = _convolve(x_ptr, weight_ptrs[number], bias_ptrs[number], past_ptr, c, C, W)
            y_c = y_c.to(weighted_ptr.dtype.element_ty)
            tl.store(y_ptrs[number] + row * C + c, y_c, mask=c < C)
            if number == 2:
                head_c = c // P
                raw_c = tl.load(raw_ptr + row * H + head_c, mask=c < C, other=0.0).to(tl.float32)
                step_c = softplus(raw_c + tl.load(raw_bias_ptr + head_c, mask=c < C, other=0.0).to(tl.float32))
                weighted_c = (y_c.to(tl.float32) * step_c).to(weighted_ptr.dtype.element_ty)
                tl.store(weighted_ptr + row * C + c, weighted_c, mask=c < C)
                rate_c = tl.exp(tl.load(a_log_ptr + head_c, mask=c < C, other=0.0).to(tl.float32))
                begins_c = (c < C) & (c % P == 0)  # a head
                sum_c = tl.load(sums_ptr + row * H + head_c, mask=begins_c, other=0.0)
                tl.store(sums_ptr + row * H + head_c, sum_c - (rate_c * step_c).to(tl.float64), mask=begins_c)


@triton.jit
def _convolve(x_ptr, weight_ptr, bias_ptr, past_ptr, c, C, W: tl.constexpr):
    """silu(bias + taps times the last W inputs) in fp32, whose past moves on by a token."""
    own_c = tl.load(x_ptr + c, mask=c < C, other=0.0)
    sum_c = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    sum_c += tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32) * own_c.to(tl.float32)
    for place in range(W - 1):  # the oldest first, so that each moves to where the one before it was
        before_c = tl.load(past_ptr + place * C + c, mask=c < C, other=0.0)
        tap_c = tl.load(weight_ptr + (W - 1 - place) * C + c, mask=c < C, other=0.0).to(tl.float32)
        sum_c += tap_c * before_c.to(tl.float32)
        if place > 0:
            tl.store(past_ptr + (place - 1) * C + c, before_c, mask=c < C)
    if W > 1:
        tl.store(past_ptr + (W - 2) * C + c, own_c, mask=c < C)
    return sum_c * tl.sigmoid(sum_c)
