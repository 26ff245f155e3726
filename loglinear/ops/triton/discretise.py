"""What the op needs of the step size, in one pass: the log-decay, and values weighed by the step.

Shapes: i token, h head, p head size.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import softplus
from loglinear.ops.triton.operator import operator
from loglinear.ops.triton.partial_sums import empty_sums, gradients, steps_of_a_program

BLOCK_I = 16
MOST_PROGRAMS = 256  # for each head


@operator("loglinear::discretise")
def discretise(
    raw_ih: torch.Tensor, bias_h: torch.Tensor, a_log_h: torch.Tensor, v_ihp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """step = softplus(raw + bias); the log-decay -exp(A_log) * step, fp32 [tokens, H], and v * step in v's dtype.

    Args:
        raw_ih: [tokens, H], contiguous.
        bias_h, a_log_h: [H].
        v_ihp: values [tokens, H, P], contiguous.

    Source: Mamba-2, arXiv 2405.21060.
    """
    tokens, heads, size = v_ihp.shape
    g_ih, weighted_ihp = raw_ih.new_empty(tokens, heads, dtype=torch.float32), torch.empty_like(v_ihp)
    _forward[(triton.cdiv(tokens, BLOCK_I), heads)](
        raw_ih, bias_h, a_log_h, v_ihp, g_ih, weighted_ihp, tokens,
        H=heads, P=size, BLOCK_P=triton.next_power_of_2(size), BLOCK_I=BLOCK_I, num_warps=4,
    )  # fmt: skip
    return g_ih, weighted_ihp


@discretise.register_fake
def _(raw_ih, bias_h, a_log_h, v_ihp):
    return torch.empty_like(raw_ih, dtype=torch.float32), torch.empty_like(v_ihp)


@operator("loglinear::discretise_backward")
def _discretise_backward(
    dg_ih: torch.Tensor,
    dweighted_ihp: torch.Tensor,
    raw_ih: torch.Tensor,
    bias_h: torch.Tensor,
    a_log_h: torch.Tensor,
    v_ihp: torch.Tensor,
    beside_ihp: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of raw, of v, to which `beside` is added in fp32 if there is one, and the sums for bias and A_log."""
    tokens, heads, size = v_ihp.shape
    draw_ih, dv_ihp = torch.empty_like(raw_ih), torch.empty_like(v_ihp)
    steps, programs = steps_of_a_program(tokens, BLOCK_I, MOST_PROGRAMS)
    sums = empty_sums((bias_h, a_log_h), programs)
    _backward[(programs, heads)](
        dg_ih, dweighted_ihp, raw_ih, bias_h, a_log_h, v_ihp, beside_ihp, draw_ih, dv_ihp, sums, sums.stride(0),
        tokens, steps,
        H=heads, P=size, BLOCK_P=triton.next_power_of_2(size), BLOCK_I=BLOCK_I, num_warps=4,
    )  # fmt: skip
    return draw_ih, dv_ihp, sums.sum(0)


@_discretise_backward.register_fake
def _(dg_ih, dweighted_ihp, raw_ih, bias_h, a_log_h, v_ihp, beside_ihp=None):
    return torch.empty_like(raw_ih), torch.empty_like(v_ihp), empty_sums((bias_h, a_log_h))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dg_ih, dweighted_ihp, beside_ihp=None):
    saved = ctx.saved_tensors
    draw_ih, dv_ihp, sums = _discretise_backward(dg_ih.contiguous(), dweighted_ihp.contiguous(), *saved, beside_ihp)
    return draw_ih, *gradients(sums, saved[1:3]), dv_ihp


discretise.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    raw_ptr, bias_ptr, a_log_ptr, v_ptr, g_ptr, weighted_ptr, tokens,
    H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    i, p = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_P)
    at_i = i.to(tl.int64) * H + head
    at_ip = at_i[:, None] * P + p[None, :]
    mask = (i < tokens)[:, None] & (p < P)[None, :]
    raw_i = tl.load(raw_ptr + at_i, mask=i < tokens, other=0.0).to(tl.float32)
    step_i = softplus(raw_i + tl.load(bias_ptr + head).to(tl.float32))
    tl.store(g_ptr + at_i, -tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * step_i, mask=i < tokens)
    v_ip = tl.load(v_ptr + at_ip, mask=mask, other=0.0).to(tl.float32)
    tl.store(weighted_ptr + at_ip, (v_ip * step_i[:, None]).to(weighted_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _backward(
    dg_ptr, dweighted_ptr, raw_ptr, bias_ptr, a_log_ptr, v_ptr, beside_ptr, draw_ptr, dv_ptr, sums_ptr, STRIDE_SUMS,
    tokens, steps,
    H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    head, p = tl.program_id(1), tl.arange(0, BLOCK_P)
    bias = tl.load(bias_ptr + head).to(tl.float32)
    decay_rate = tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    dbias_i, da_log_i = tl.zeros([BLOCK_I], tl.float32), tl.zeros([BLOCK_I], tl.float32)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        at_i = i.to(tl.int64) * H + head
        at_ip = at_i[:, None] * P + p[None, :]
        mask = (i < tokens)[:, None] & (p < P)[None, :]
        raw_i = tl.load(raw_ptr + at_i, mask=i < tokens, other=0.0).to(tl.float32) + bias
        step_i = softplus(raw_i)
        dweighted_ip = tl.load(dweighted_ptr + at_ip, mask=mask, other=0.0).to(tl.float32)
        v_ip = tl.load(v_ptr + at_ip, mask=mask, other=0.0).to(tl.float32)
        beside_ip = 0.0 if beside_ptr is None else tl.load(beside_ptr + at_ip, mask=mask, other=0.0)
        dg_i = decay_rate * tl.load(dg_ptr + at_i, mask=i < tokens, other=0.0)
        draw_i = (tl.sum(dweighted_ip * v_ip, 1) - dg_i) * tl.sigmoid(raw_i)
        dbias_i += draw_i
        da_log_i -= dg_i * step_i
        tl.store(draw_ptr + at_i, draw_i.to(draw_ptr.dtype.element_ty), mask=i < tokens)
        dv_ip = dweighted_ip * step_i[:, None] + beside_ip
        tl.store(dv_ptr + at_ip, dv_ip.to(dv_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0) * STRIDE_SUMS + head
    tl.store(sums_ptr, tl.sum(dbias_i, 0))
    tl.store(sums_ptr + H, tl.sum(da_log_i, 0))
