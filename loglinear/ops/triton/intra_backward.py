"""Gradients within a chunk: the two diagonal blocks, where every pair has a level of its own, and the second half
reading the first, at one level.

Both add to what earlier kernels wrote, dv and parts of dq and dk. How the loss depends on decays is rows minus columns
of one fp32 matrix, so that a pair's two ends cancel outside of it.

Shapes: c chunk (row of the tables), t slot of a query, s slot of a key within its half, h value head,
g query/key group, n state (key) size, p value head size, l level, w part of a sum over heads.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import HALF, LEVELS_IN_HALF, level_weights, row_tokens, store_level_sums
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.tables import CHUNK, Tables


def intra_gradients(
    q_tgn: torch.Tensor,
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    do_thp: torch.Tensor,
    scales_chlt: torch.Tensor | None,
    decay_cht: torch.Tensor,
    dq_wtgn: torch.Tensor,
    dk_wtgn: torch.Tensor,
    dv_thp: torch.Tensor,
    dscales_chlt: torch.Tensor | None,
    scale: float,
    tables: Tables,
    sizes: Sizes,
) -> list[torch.Tensor]:
    """Add to dq, dk and dv, and fill in levels 0 to 7 of `dscales_chlt`.

    Returns:
        Two tensors [C, H, T], how the loss depends on the decay up to each slot.
    """
    levels = 0 if scales_chlt is None else scales_chlt.shape[2]
    parts = len(dq_wtgn)
    ddecays_cht = [torch.empty_like(decay_cht), torch.empty_like(decay_cht)]
    for kernel, blocks, ddecay_cht in zip(
        (_diagonal_gradients, _second_half_gradients), (2, 1), ddecays_cht, strict=True
    ):
        kernel[(blocks * tables.rows, sizes.groups * parts)](
            q_tgn, k_tgn, v_thp, do_thp, scales_chlt, decay_cht, dq_wtgn, dk_wtgn, dv_thp, dscales_chlt, ddecay_cht,
            tables.row_token, tables.row_slots, scale, levels, len(q_tgn),
            H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK, HALF=HALF,
            BLOCK_P=sizes.value_block(128), AT_ONCE=sizes.per_group // parts, DK_STRIDE=len(dk_wtgn) // parts,
            LEVELS=min(levels, LEVELS_IN_HALF), PRECISION=sizes.precision, num_warps=4, num_stages=sizes.stages(2),
        )  # fmt: skip
    return ddecays_cht


@triton.jit
def _add(ptr, offsets, value, mask):
    """Add to what an earlier kernel stored; no other program touches these numbers."""
    before = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr + offsets, (before + value).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _value_products(
    do_ptr, v_ptr, at, do_valid, v_valid, P: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr
):
    """do v^T over all value numbers, a block at a time."""
    do_tp = tl.load(do_ptr + at, mask=do_valid[:, None], other=0.0)
    v_sp = tl.load(v_ptr + at, mask=v_valid[:, None], other=0.0)
    product_ts = tl.dot(do_tp, tl.trans(v_sp), input_precision=PRECISION)
    for block in tl.static_range(BLOCK_P, P, BLOCK_P):
        do_more_tp = tl.load(do_ptr + block + at, mask=do_valid[:, None], other=0.0)
        v_more_sp = tl.load(v_ptr + block + at, mask=v_valid[:, None], other=0.0)
        product_ts = tl.dot(do_more_tp, tl.trans(v_more_sp), product_ts, input_precision=PRECISION)
    return product_ts


@triton.jit
def _add_value_gradients(
    do_ptr, dv_ptr, at, weights_ts, first_dv_sp, do_valid, v_valid,
    P: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv += weights^T do, a block at a time; what dv was in the first block is loaded already."""
    do_tp = tl.load(do_ptr + at, mask=do_valid[:, None], other=0.0)
    weights_ts = weights_ts.to(do_tp.dtype)
    dv_sp = first_dv_sp.to(tl.float32) + tl.dot(tl.trans(weights_ts), do_tp, input_precision=PRECISION)
    tl.store(dv_ptr + at, dv_sp.to(dv_ptr.dtype.element_ty), mask=v_valid[:, None])
    for block in tl.static_range(BLOCK_P, P, BLOCK_P):
        do_more_tp = tl.load(do_ptr + block + at, mask=do_valid[:, None], other=0.0)
        dv_more_sp = tl.dot(tl.trans(weights_ts), do_more_tp, input_precision=PRECISION)
        _add(dv_ptr + block, at, dv_more_sp, v_valid[:, None])


@triton.jit(do_not_specialize=["L", "tokens"])
def _diagonal_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, scales_ptr, decay_ptr, dq_ptr, dk_ptr, dv_ptr, dscales_ptr, ddecay_ptr,
    row_token_ptr, row_slots_ptr, scale, L, tokens,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, DK_STRIDE: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, first_slot = tl.program_id(0) // 2, tl.program_id(0) % 2 * HALF
    first_head = tl.program_id(1) * AT_ONCE
    groups: tl.constexpr = H // R
    s, n, p = tl.arange(0, HALF), tl.arange(0, N), tl.arange(0, BLOCK_P)
    token, valid_s = row_tokens(row_token_ptr, row_slots_ptr, row, s + first_slot)
    token += first_slot
    to_group = (token * groups + first_head // R) * N
    q_at = s[:, None] * (groups * N) + n[None, :]
    v_at = s[:, None] * (H * P) + p[None, :]
    q_tn = tl.load(q_ptr + to_group + q_at, mask=valid_s[:, None], other=0.0)
    k_sn = tl.load(k_ptr + to_group + q_at, mask=valid_s[:, None], other=0.0)
    scores_ts = tl.dot(q_tn, tl.trans(k_sn), input_precision=PRECISION)
    scores_ts *= scale
    dscores_ts = tl.zeros([HALF, HALF], tl.float32)
    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        slots = of_row * CHUNK + first_slot + s
        to_head = (token * H + head) * P
        dv_sp = tl.load(dv_ptr + to_head + v_at, mask=valid_s[:, None], other=0.0)
        weight_ts = _value_products(do_ptr + to_head, v_ptr + to_head, v_at, valid_s, valid_s, P, BLOCK_P, PRECISION)
        decay_s = tl.load(decay_ptr + slots)
        decay_ts = tl.where(s[:, None] >= s[None, :], decay_s[:, None] - decay_s[None, :], float("-inf"))
        decay_ts = tl.exp2(decay_ts)
        weight_ts *= decay_ts
        if LEVELS:
            levels_at = of_row * L * CHUNK + first_slot
            store_level_sums(dscales_ptr + levels_at, CHUNK, s, scores_ts * weight_ts, HALF, LEVELS)
            scales_ts = level_weights(scales_ptr + levels_at, CHUNK, s, HALF, LEVELS)
            weight_ts *= scales_ts
            decay_ts *= scales_ts
        dscores_ts += weight_ts
        exponent_ts = tl.where(s[:, None] == s[None, :], 0.0, scores_ts * weight_ts)
        exponent_s = tl.sum(exponent_ts, 1) - tl.sum(exponent_ts, 0)
        tl.store(ddecay_ptr + slots, exponent_s)
        _add_value_gradients(
            do_ptr + to_head, dv_ptr + to_head, v_at, scores_ts * decay_ts, dv_sp,
            valid_s, valid_s, P, BLOCK_P, PRECISION,
        )  # fmt: skip
    part = (tl.program_id(1) % (R // AT_ONCE)).to(tl.int64) * tokens * groups * N
    dscores_ts = (scale * dscores_ts).to(q_tn.dtype)
    _add(dq_ptr + part + to_group, q_at, tl.dot(dscores_ts, k_sn, input_precision=PRECISION), valid_s[:, None])
    dk_sn = tl.dot(tl.trans(dscores_ts), q_tn, input_precision=PRECISION)
    _add(dk_ptr + part * DK_STRIDE + to_group, q_at, dk_sn, valid_s[:, None])


@triton.jit(do_not_specialize=["L", "tokens"])
def _second_half_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, scales_ptr, decay_ptr, dq_ptr, dk_ptr, dv_ptr, dscales_ptr, ddecay_ptr,
    row_token_ptr, row_slots_ptr, scale, L, tokens,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, DK_STRIDE: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first_head = tl.program_id(1) * AT_ONCE
    groups: tl.constexpr = H // R
    s, n, p = tl.arange(0, HALF), tl.arange(0, N), tl.arange(0, BLOCK_P)
    token, valid_s = row_tokens(row_token_ptr, row_slots_ptr, row, s)
    _, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, s + HALF)
    k_to_group = (token * groups + first_head // R) * N
    q_to_group = k_to_group + HALF * groups * N
    q_at = s[:, None] * (groups * N) + n[None, :]
    v_at = s[:, None] * (H * P) + p[None, :]
    q_tn = tl.load(q_ptr + q_to_group + q_at, mask=valid_t[:, None], other=0.0)
    k_sn = tl.load(k_ptr + k_to_group + q_at, mask=valid_s[:, None], other=0.0)
    scores_ts = tl.dot(q_tn, tl.trans(k_sn), input_precision=PRECISION)
    scores_ts *= scale
    dscores_ts = tl.zeros([HALF, HALF], tl.float32)
    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        slots = of_row * CHUNK + s
        v_head_ptr = v_ptr + (token * H + head) * P
        dv_head_ptr = dv_ptr + (token * H + head) * P
        dv_sp = tl.load(dv_head_ptr + v_at, mask=valid_s[:, None], other=0.0)
        do_head_ptr = do_ptr + ((token + HALF) * H + head) * P
        middle = tl.load(decay_ptr + of_row * CHUNK + HALF - 1)
        to_middle_s = tl.exp2(middle - tl.load(decay_ptr + slots))
        from_middle_t = tl.exp2(tl.load(decay_ptr + slots + HALF) - middle)
        products_ts = to_middle_s[None, :] * _value_products(
            do_head_ptr, v_head_ptr, v_at, valid_t, valid_s, P, BLOCK_P, PRECISION
        )
        exponent_ts = scores_ts * products_ts
        dscale_t = from_middle_t * tl.sum(exponent_ts, 1)
        if LEVELS:
            level = (of_row * L + LEVELS) * CHUNK + s
            exists = LEVELS + 0 * s < L
            dtype = dscales_ptr.dtype.element_ty
            tl.store(dscales_ptr + level, tl.zeros_like(dscale_t).to(dtype), mask=exists)
            tl.store(dscales_ptr + level + HALF, dscale_t.to(dtype), mask=exists)
            scale_t = tl.load(scales_ptr + level + HALF, mask=exists, other=0.0).to(tl.float32)
            from_middle_t *= scale_t
            dscale_t *= scale_t
        tl.store(ddecay_ptr + slots + HALF, dscale_t)
        tl.store(ddecay_ptr + slots, -tl.sum(exponent_ts * from_middle_t[:, None], 0))
        dscores_ts += from_middle_t[:, None] * products_ts
        weights_ts = scores_ts * from_middle_t[:, None] * to_middle_s[None, :]
        _add_value_gradients(do_head_ptr, dv_head_ptr, v_at, weights_ts, dv_sp, valid_t, valid_s, P, BLOCK_P, PRECISION)
    part = (tl.program_id(1) % (R // AT_ONCE)).to(tl.int64) * tokens * groups * N
    dscores_ts = (scale * dscores_ts).to(q_tn.dtype)
    _add(dq_ptr + part + q_to_group, q_at, tl.dot(dscores_ts, k_sn, input_precision=PRECISION), valid_t[:, None])
    dk_sn = tl.dot(tl.trans(dscores_ts), q_tn, input_precision=PRECISION)
    _add(dk_ptr + part * DK_STRIDE + k_to_group, q_at, dk_sn, valid_s[:, None])
