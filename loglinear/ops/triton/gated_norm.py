"""What follows the op, in one pass: the skip past it, the gate and the norm within each head.

Shapes: i token, h head, p head size.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.operator import operator
from loglinear.ops.triton.partial_sums import empty_sums, gradients, steps_of_a_program

BLOCK_I = 16
MOST_PROGRAMS = 256  # for each head


@operator("loglinear::skip_gate_norm")
def skip_gate_norm(
    o_ihp: torch.Tensor,
    v_ihp: torch.Tensor,
    z_ihp: torch.Tensor,
    skip_h: torch.Tensor,
    weight_p: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """RMSNorm((o + skip * v) * silu(z)) * weight within each head, in o's dtype, computed in fp32.

    Args:
        o_ihp, v_ihp, z_ihp: [tokens, H, P], contiguous.
        skip_h: [H].
        weight_p: [P].
        eps: added to the mean square.
    """
    y_ihp = torch.empty_like(o_ihp)
    tokens, heads, size = o_ihp.shape
    _forward[(triton.cdiv(tokens, BLOCK_I), heads)](
        o_ihp, v_ihp, z_ihp, skip_h, weight_p, y_ihp, tokens, eps,
        H=heads, P=size, BLOCK_P=triton.next_power_of_2(size), BLOCK_I=BLOCK_I, num_warps=4,
    )  # fmt: skip
    return y_ihp


@skip_gate_norm.register_fake
def _(o_ihp, v_ihp, z_ihp, skip_h, weight_p, eps):
    return torch.empty_like(o_ihp)


@operator("loglinear::skip_gate_norm_backward")
def _skip_gate_norm_backward(
    dy_ihp: torch.Tensor,
    o_ihp: torch.Tensor,
    v_ihp: torch.Tensor,
    z_ihp: torch.Tensor,
    skip_h: torch.Tensor,
    weight_p: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of o, v and z and, as `empty_sums` lays them out, of skip and weight."""
    do_ihp, dv_ihp, dz_ihp = (torch.empty_like(o_ihp) for _ in range(3))
    tokens, heads, size = o_ihp.shape
    steps, programs = steps_of_a_program(tokens, BLOCK_I, MOST_PROGRAMS)
    sums = empty_sums((skip_h, weight_p), programs * heads)
    _backward[(programs, heads)](
        dy_ihp, o_ihp, v_ihp, z_ihp, skip_h, weight_p, do_ihp, dv_ihp, dz_ihp, sums, sums.stride(0),
        tokens, steps, eps,
        H=heads, P=size, BLOCK_H=triton.next_power_of_2(heads), BLOCK_P=triton.next_power_of_2(size), BLOCK_I=BLOCK_I,
        num_warps=4,
    )  # fmt: skip
    return do_ihp, dv_ihp, dz_ihp, sums.sum(0)


@_skip_gate_norm_backward.register_fake
def _(dy_ihp, o_ihp, v_ihp, z_ihp, skip_h, weight_p, eps):
    return *(torch.empty_like(o_ihp) for _ in range(3)), empty_sums((skip_h, weight_p))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy_ihp):
    *of_tokens, sums = _skip_gate_norm_backward(dy_ihp.contiguous(), *ctx.saved_tensors, ctx.eps)
    return *of_tokens, *gradients(sums, ctx.saved_tensors[3:]), None


skip_gate_norm.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit
def gated(
    o_ptr: tl.tensor, v_ptr: tl.tensor, z_ptr: tl.tensor, at: tl.tensor, mask: tl.tensor, skip: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The sum with the skip, v, z and sigmoid(z), fp32."""
    v_ip = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sum_ip = tl.load(o_ptr + at, mask=mask, other=0.0).to(tl.float32) + skip * v_ip
    z_ip = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return sum_ip, v_ip, z_ip, tl.sigmoid(z_ip)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    o_ptr, v_ptr, z_ptr, skip_ptr, weight_ptr, y_ptr, tokens, eps,
    H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    i, p = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_P)
    at = (i.to(tl.int64)[:, None] * H + head) * P + p[None, :]
    mask = (i < tokens)[:, None] & (p < P)[None, :]
    sum_ip, _, z_ip, gate_ip = gated(o_ptr, v_ptr, z_ptr, at, mask, tl.load(skip_ptr + head).to(tl.float32))
    x_ip = sum_ip * z_ip * gate_ip
    x_ip *= tl.rsqrt(tl.sum(x_ip * x_ip, 1) / P + eps)[:, None]
    weight_p = tl.load(weight_ptr + p, mask=p < P, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x_ip * weight_p[None, :]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _backward(
    dy_ptr, o_ptr, v_ptr, z_ptr, skip_ptr, weight_ptr, do_ptr, dv_ptr, dz_ptr, sums_ptr, STRIDE_SUMS,
    tokens, steps, eps,
    H: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    head, p = tl.program_id(1), tl.arange(0, BLOCK_P)
    skip = tl.load(skip_ptr + head).to(tl.float32)
    weight_p = tl.load(weight_ptr + p, mask=p < P, other=0.0).to(tl.float32)
    dtype = do_ptr.dtype.element_ty
    dskip_i, dweight_p = tl.zeros([BLOCK_I], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        at = (i.to(tl.int64)[:, None] * H + head) * P + p[None, :]
        mask = (i < tokens)[:, None] & (p < P)[None, :]
        sum_ip, v_ip, z_ip, gate_ip = gated(o_ptr, v_ptr, z_ptr, at, mask, skip)
        x_ip = sum_ip * z_ip * gate_ip
        factor_i = tl.rsqrt(tl.sum(x_ip * x_ip, 1) / P + eps)
        dy_ip = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x_ip *= factor_i[:, None]
        dweight_p += tl.sum(dy_ip * x_ip, 0)
        dy_ip *= weight_p[None, :]
        dx_ip = factor_i[:, None] * (dy_ip - x_ip * (tl.sum(dy_ip * x_ip, 1) / P)[:, None])
        dsum_ip = dx_ip * z_ip * gate_ip
        dz_ip = dx_ip * sum_ip * gate_ip * (1.0 + z_ip * (1.0 - gate_ip))
        dskip_i += tl.sum(dsum_ip * v_ip, 1)
        tl.store(do_ptr + at, dsum_ip.to(dtype), mask=mask)
        tl.store(dv_ptr + at, (skip * dsum_ip).to(dtype), mask=mask)
        tl.store(dz_ptr + at, dz_ip.to(dtype), mask=mask)
    h = tl.arange(0, BLOCK_H)
    sums_ptr += (tl.program_id(0) * H + head) * STRIDE_SUMS
    tl.store(sums_ptr + h, tl.where(h == head, tl.sum(dskip_i, 0), 0.0), mask=h < H)  # zero for the other heads' skips
    tl.store(sums_ptr + H + p, dweight_p, mask=p < P)
