"""Products of weights with so few tokens that reading the weights is all the work, with what stands before and after.

A norm before a product costs no launch: each program computes it again, from a row that lies in the cache.

Shapes: i token, d input channel, e output channel (of all products, one after the other), h head, p head size.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.gated_norm import gated

MOST_ROWS = 8  # tokens, above which torch's products are faster
BLOCK_E, BLOCK_D = 4, 1024


def norm_linears(
    x_id: torch.Tensor, norm_d: torch.Tensor, eps: float, weights_ed: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """RMSNorm of x times the transpose of every weight, in x's dtype, all between in fp32.

    Args:
        x_id: [I, D], contiguous, I at most `MOST_ROWS`.
        norm_d: [D], weight of the norm.
        eps: added to the mean square.
        weights_ed: [E, D] each, contiguous.
    """
    outputs = tuple(x_id.new_empty(len(x_id), len(weight)) for weight in weights_ed)
    blocks = [triton.cdiv(len(weight), BLOCK_E) for weight in weights_ed]
    firsts = tuple(accumulate(blocks[:-1], initial=0))
    _norm_linears[(sum(blocks), len(x_id))](
        x_id, norm_d, weights_ed, outputs, firsts, tuple(map(len, weights_ed)), eps,
        D=x_id.shape[1], COUNT=len(weights_ed), BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return outputs


def norm_silu_product(
    x_id: torch.Tensor, norm_d: torch.Tensor, eps: float, gate_ed: torch.Tensor, up_ed: torch.Tensor
) -> torch.Tensor:
    """silu(n gate^T) * (n up^T), n the RMSNorm of x: [I, E] in x's dtype. Arguments as those of `norm_linears`."""
    y_ie = x_id.new_empty(len(x_id), len(gate_ed))
    _norm_silu_product[(triton.cdiv(len(gate_ed), BLOCK_E), len(x_id))](
        x_id, norm_d, gate_ed, up_ed, y_ie, len(gate_ed), eps,
        D=x_id.shape[1], BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return y_ie


def linear_onto(onto_ie: torch.Tensor, x_id: torch.Tensor, weight_ed: torch.Tensor) -> torch.Tensor:
    """onto [I, E] + x weight^T, the product summed in fp32. Other arguments as those of `norm_linears`."""
    y_ie = torch.empty_like(onto_ie)
    _linear_onto[(triton.cdiv(len(weight_ed), BLOCK_E), len(x_id))](
        onto_ie, x_id, weight_ed, y_ie, len(weight_ed),
        D=x_id.shape[1], BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return y_ie


def skip_gate_norm_onto(
    onto_ie: torch.Tensor,
    o_ihp: torch.Tensor,
    v_ihp: torch.Tensor,
    z_ihp: torch.Tensor,
    skip_h: torch.Tensor,
    norm_p: torch.Tensor,
    eps: float,
    weight_ed: torch.Tensor,
) -> torch.Tensor:
    """onto + y weight^T, y what `gated_norm.skip_gate_norm` gives: [I, E] in the dtype of `onto_ie`, summed in fp32.

    Args:
        onto_ie: [I, E], contiguous, I at most `MOST_ROWS`.
        o_ihp, v_ihp, z_ihp: [I, H, P], contiguous.
        skip_h: [H].
        norm_p: [P], weight of the norm.
        eps: added to the mean square.
        weight_ed: [E, H * P], contiguous.
    """
    y_ie, (rows, heads, size) = torch.empty_like(onto_ie), o_ihp.shape
    block_p = triton.next_power_of_2(size)
    _skip_gate_norm_onto[(triton.cdiv(len(weight_ed), BLOCK_E), rows)](
        onto_ie, o_ihp, v_ihp, z_ihp, skip_h, norm_p, weight_ed, y_ie, len(weight_ed), eps,
        H=heads, P=size, BLOCK_E=BLOCK_E, BLOCK_H=max(1, BLOCK_D // block_p), BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return y_ie


@triton.jit
def _norm_linears(
    x_ptr, norm_ptr, weight_ptrs, y_ptrs, firsts, counts, eps,
    D: tl.constexpr, COUNT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    x_ptr += row * D
    for product in tl.static_range(COUNT):
        last = block < firsts[product + 1] if product + 1 < COUNT else block >= 0
        if (block >= firsts[product]) & last:
            e, outputs = (block - firsts[product]) * BLOCK_E + tl.arange(0, BLOCK_E), counts[product]
            sum_e = _times(x_ptr, norm_ptr, weight_ptrs[product], e, outputs, D, True, BLOCK_E, BLOCK_D)
            sum_e *= _norm_factor(x_ptr, eps, D, BLOCK_D)
            y_ptr = y_ptrs[product] + row * outputs
            tl.store(y_ptr + e, sum_e.to(y_ptr.dtype.element_ty), mask=e < outputs)


@triton.jit
def _norm_silu_product(
    x_ptr, norm_ptr, gate_ptr, up_ptr, y_ptr, outputs, eps,
    D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(1), tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    x_ptr += row * D
    gate_e = _times(x_ptr, norm_ptr, gate_ptr, e, outputs, D, True, BLOCK_E, BLOCK_D)
    up_e = _times(x_ptr, norm_ptr, up_ptr, e, outputs, D, True, BLOCK_E, BLOCK_D)
    factor = _norm_factor(x_ptr, eps, D, BLOCK_D)
    gate_e *= factor
    product_e = gate_e * tl.sigmoid(gate_e) * up_e * factor
    tl.store(y_ptr + row * outputs + e, product_e.to(y_ptr.dtype.element_ty), mask=e < outputs)


@triton.jit
def _linear_onto(
    onto_ptr, x_ptr, weight_ptr, y_ptr, outputs, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    row, e = tl.program_id(1), tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    sum_e = _times(x_ptr + row * D, x_ptr, weight_ptr, e, outputs, D, False, BLOCK_E, BLOCK_D)
    _store_onto(onto_ptr, y_ptr, row, e, outputs, sum_e)


@triton.jit
def _skip_gate_norm_onto(
    onto_ptr, o_ptr, v_ptr, z_ptr, skip_ptr, norm_ptr, weight_ptr, y_ptr, outputs, eps,
    H: tl.constexpr, P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The norm is within heads, so a block holds whole heads: d = h * BLOCK_P + p."""
    row, e = tl.program_id(1), tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    d, p = tl.arange(0, BLOCK_H * BLOCK_P), tl.arange(0, BLOCK_P)
    norm_p = tl.load(norm_ptr + p, mask=p < P, other=0.0).to(tl.float32)
    sum_ed = tl.zeros([BLOCK_E, BLOCK_H * BLOCK_P], tl.float32)
    for first in tl.static_range(0, H, BLOCK_H):
        head_d, within_d = first + d // BLOCK_P, d % BLOCK_P
        exists_ed = (e < outputs)[:, None] & ((head_d < H) & (within_d < P))[None, :]
        at_ed = e[:, None] * (H * P) + (head_d * P + within_d)[None, :]
        weight_ed = tl.load(weight_ptr + at_ed, mask=exists_ed, other=0.0)  # first: it does not wait for the norm
        h = first + tl.arange(0, BLOCK_H)
        exists_hp = (h < H)[:, None] & (p < P)[None, :]
        skip_h = tl.load(skip_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        at_hp = (row * H + h)[:, None] * P + p[None, :]
        sum_hp, _, z_hp, gate_hp = gated(o_ptr, v_ptr, z_ptr, at_hp, exists_hp, skip_h[:, None])
        x_hp = sum_hp * z_hp * gate_hp
        x_hp *= tl.rsqrt(tl.sum(x_hp * x_hp, 1) / P + eps)[:, None] * norm_p[None, :]
        x_d = tl.reshape(x_hp.to(o_ptr.dtype.element_ty).to(tl.float32), [BLOCK_H * BLOCK_P])
        sum_ed += weight_ed.to(tl.float32) * x_d[None, :]
    _store_onto(onto_ptr, y_ptr, row, e, outputs, tl.sum(sum_ed, 1))


@triton.jit
def _times(
    x_ptr, norm_ptr, weight_ptr, e, outputs,
    D: tl.constexpr, NORMED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The weight's rows `e` times x, which lacks the factor of its norm still, so that no load waits for that."""
    sum_ed = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        exists_ed = (e < outputs)[:, None] & (d < D)[None, :]
        weight_ed = tl.load(weight_ptr + e[:, None] * D + d[None, :], mask=exists_ed, other=0.0)
        x_d = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        if NORMED:
            x_d *= tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        sum_ed += weight_ed.to(tl.float32) * x_d[None, :]
    return tl.sum(sum_ed, 1)


@triton.jit
def _norm_factor(x_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps)."""
    square_d = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_d = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        square_d += x_d * x_d
    return tl.rsqrt(tl.sum(square_d, 0) / D + eps)


@triton.jit
def _store_onto(onto_ptr, y_ptr, row, e, outputs, sum_e):
    """The residual and what a product adds to it, which is rounded first, as where they are two operations."""
    at_e = row * outputs + e
    onto_e = tl.load(onto_ptr + at_e, mask=e < outputs, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + at_e, (onto_e + sum_e.to(dtype).to(tl.float32)).to(dtype), mask=e < outputs)
