"""Products of weights with so few tokens that reading the weights is all the work: several of them in one launch.

Shapes: i token, d input channel, e output channel (of all products, one after the other).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

MOST_ROWS = 8  # tokens, above which torch's products are faster
BLOCK_E, BLOCK_D = 4, 1024


def linears(x_id: torch.Tensor, weights_ed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """x times the transpose of every weight, in x's dtype, summed in fp32.

    Args:
        x_id: [I, D], contiguous, I at most `MOST_ROWS`.
        weights_ed: [E, D] each, contiguous.
    """
    outputs = tuple(x_id.new_empty(len(x_id), len(weight)) for weight in weights_ed)
    blocks = [triton.cdiv(len(weight), BLOCK_E) for weight in weights_ed]
    firsts = tuple(accumulate(blocks[:-1], initial=0))
    _linears[(sum(blocks), len(x_id))](
        x_id, weights_ed, outputs, firsts, tuple(map(len, weights_ed)), D=x_id.shape[1], COUNT=len(weights_ed),
        BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return outputs


def silu_product(x_id: torch.Tensor, gate_ed: torch.Tensor, up_ed: torch.Tensor) -> torch.Tensor:
    """silu(x gate^T) * (x up^T): [I, E] in x's dtype, summed in fp32. Arguments as those of `linears`."""
    y_ie = x_id.new_empty(len(x_id), len(gate_ed))
    _silu_product[(triton.cdiv(len(gate_ed), BLOCK_E), len(x_id))](
        x_id, gate_ed, up_ed, y_ie, len(gate_ed), D=x_id.shape[1], BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D, num_warps=4
    )
    return y_ie


@triton.jit
def _linears(
    x_ptr, weight_ptrs, y_ptrs, firsts, counts,
    D: tl.constexpr, COUNT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    for product in tl.static_range(COUNT):
        last = block < firsts[product + 1] if product + 1 < COUNT else block >= 0
        if (block >= firsts[product]) & last:
            e, outputs = (block - firsts[product]) * BLOCK_E + tl.arange(0, BLOCK_E), counts[product]
            sum_e = _times(x_ptr + row * D, weight_ptrs[product], e, outputs, D, BLOCK_E, BLOCK_D)
            y_ptr = y_ptrs[product] + row * outputs
            tl.store(y_ptr + e, sum_e.to(y_ptr.dtype.element_ty), mask=e < outputs)


@triton.jit
def _silu_product(
    x_ptr, gate_ptr, up_ptr, y_ptr, outputs, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    row, e = tl.program_id(1), tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    gate_e = _times(x_ptr + row * D, gate_ptr, e, outputs, D, BLOCK_E, BLOCK_D)
    up_e = _times(x_ptr + row * D, up_ptr, e, outputs, D, BLOCK_E, BLOCK_D)
    product_e = gate_e * tl.sigmoid(gate_e) * up_e
    tl.store(y_ptr + row * outputs + e, product_e.to(y_ptr.dtype.element_ty), mask=e < outputs)


@triton.jit
def _times(x_ptr, weight_ptr, e, outputs, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    sum_ed = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_d = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        exists_ed = (e < outputs)[:, None] & (d < D)[None, :]
        weight_ed = tl.load(weight_ptr + e[:, None] * D + d[None, :], mask=exists_ed, other=0.0)
        sum_ed += weight_ed.to(tl.float32) * x_d[None, :]
    return tl.sum(sum_ed, 1)
