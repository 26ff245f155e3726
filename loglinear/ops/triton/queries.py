"""Gradients of what queries read from the states of runs: with respect to q, level scales and decays.

Shapes: c chunk (row of the tables), t slot, h value head, g query/key group, n state (key) size, p value head size,
l level, x run, e height of a run, w part of a sum over heads, u block of slots.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import load_read, row_tokens
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.prepare import Decays
from loglinear.ops.triton.tables import CHUNK, Tables

BLOCK_T = 64  # slots of a program: with half a chunk two programs fit a multiprocessor


def query_gradients(
    q_tgn: torch.Tensor,
    do_thp: torch.Tensor,
    scales_chlt: torch.Tensor | None,
    decays: Decays,
    states_xhnp: torch.Tensor,
    dscales_chlt: torch.Tensor | None,
    scale: float,
    tables: Tables,
    sizes: Sizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the reads of states add to the gradients; fills in their levels of `dscales_chlt`.

    Returns:
        dq_wtgn, parts of dq, fp32.
        ddecay_cht, how the loss depends on the decay up to each query.
        dreads_uech, its sums over 16 slots of a row, of the read of a run of height e, where there is one. No two
            warps share 16 slots, so these sums need no barrier.
    """
    at_once = sizes.heads_at_once(tables.rows, 32)
    parts = sizes.per_group // at_once
    dq_wtgn = q_tgn.new_empty(parts, *q_tgn.shape, dtype=torch.float32)
    ddecay_cht = torch.empty_like(decays.slot_cht)
    dreads_uech = ddecay_cht.new_empty(CHUNK // 16, tables.source_heights, tables.rows, sizes.heads)
    _query_gradients[(tables.rows * (CHUNK // BLOCK_T), sizes.heads // at_once)](
        q_tgn, do_thp, scales_chlt, decays.slot_cht, decays.read_mh, states_xhnp, dq_wtgn, dscales_chlt, ddecay_cht,
        dreads_uech, tables.row_token, tables.row_slots, tables.read_start, tables.read,
        scale, 0 if scales_chlt is None else scales_chlt.shape[2], len(q_tgn), tables.rows, tables.source_heights,
        H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK,
        BLOCK_T=BLOCK_T, BLOCK_P=sizes.value_block(128), AT_ONCE=at_once, SCALED=scales_chlt is not None,
        PRECISION=sizes.precision, num_warps=4, num_stages=sizes.stages(2),
    )  # fmt: skip
    return dq_wtgn, ddecay_cht, dreads_uech


@triton.jit(do_not_specialize=["L", "tokens", "rows", "heights"])
def _query_gradients(
    q_ptr, do_ptr, scales_ptr, decay_ptr, read_gap_ptr, states_ptr, dq_ptr, dscales_ptr, ddecay_ptr,
    dreads_ptr, row_token_ptr, row_slots_ptr, read_start_ptr, read_ptr, scale, L, tokens, rows, heights,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, block_t = tl.program_id(0) // (CHUNK // BLOCK_T), tl.program_id(0) % (CHUNK // BLOCK_T)
    first_head = tl.program_id(1) * AT_ONCE
    groups: tl.constexpr = H // R
    t, n, p = block_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, N), tl.arange(0, BLOCK_P)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    to_group = (token * groups + first_head // R) * N
    q_at = t[:, None] * (groups * N) + n[None, :]
    do_at = t[:, None] * (H * P) + p[None, :]
    state_at = n[:, None] * P + p[None, :]
    u = block_t * (BLOCK_T // 16) + tl.arange(0, BLOCK_T // 16)
    q_tn = tl.load(q_ptr + to_group + q_at, mask=valid_t[:, None], other=0.0)
    read_from, read_to = tl.load(read_start_ptr + row), tl.load(read_start_ptr + row + 1)
    dq_tn = tl.zeros([BLOCK_T, N], tl.float32)
    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        scales_row_ptr = scales_ptr
        if SCALED:
            scales_row_ptr += of_row * L * CHUNK
        gap, scale_t = load_read(read_ptr, read_gap_ptr, scales_row_ptr, CHUNK, read_from, head, t, H, SCALED)
        decay_t = tl.load(decay_ptr + of_row * CHUNK + t)
        ddecay_t = tl.zeros([BLOCK_T], tl.float32)
        do_head_ptr = do_ptr + (token * H + head) * P
        do_tp = tl.load(do_head_ptr + do_at, mask=valid_t[:, None], other=0.0)
        for read in range(read_from, read_to):
            state = tl.load(read_ptr + 4 * read).to(tl.int64)
            state_ptr = states_ptr + (state * H + head) * N * P
            dread_tn = tl.dot(do_tp, tl.trans(tl.load(state_ptr + state_at)), input_precision=PRECISION)
            for block in tl.static_range(BLOCK_P, P, BLOCK_P):
                do_more_tp = tl.load(do_head_ptr + block + do_at, mask=valid_t[:, None], other=0.0)
                state_pn = tl.trans(tl.load(state_ptr + block + state_at))
                dread_tn = tl.dot(do_more_tp, state_pn, dread_tn, input_precision=PRECISION)
            weight_t = scale * tl.exp2(decay_t + gap)
            scale_now_t = scale_t
            gap, scale_t = load_read(read_ptr, read_gap_ptr, scales_row_ptr, CHUNK, read + 1, head, t, H, SCALED)
            dscale_t = weight_t * tl.sum(dread_tn * q_tn.to(tl.float32), 1)
            dq_tn += (weight_t * scale_now_t)[:, None] * dread_tn
            if SCALED:
                at_level = (of_row * L + tl.load(read_ptr + 4 * read + 1)) * CHUNK
                tl.store(dscales_ptr + at_level + t, dscale_t.to(dscales_ptr.dtype.element_ty))
            dscale_t *= scale_now_t
            ddecay_t += dscale_t
            height = tl.load(read_ptr + 4 * read + 2)
            at_height_u = ((u * heights + height).to(tl.int64) * rows + row) * H + head
            tl.store(dreads_ptr + at_height_u, tl.sum(tl.reshape(dscale_t, [BLOCK_T // 16, 16]), 1))
        tl.store(ddecay_ptr + of_row * CHUNK + t, ddecay_t)
    part = tl.program_id(1) % (R // AT_ONCE)
    dq_ptr += part.to(tl.int64) * tokens * groups * N + to_group
    tl.store(dq_ptr + q_at, dq_tn, mask=valid_t[:, None])
