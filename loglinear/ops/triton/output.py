"""The output: what each query reads within its chunk and from the states of runs.

A program has the queries of half a chunk. Among themselves every pair has a level of its own; the second half also
reads the first, at one level, so that weights of rows and columns do.

Shapes: c chunk (row of the tables), t slot of a query, s slot of a key within its half, h value head,
g query/key group, n state (key) size, p value head size, l level, x run.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import HALF, LEVELS_IN_HALF, level_weights, load_read, row_tokens
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.prepare import Decays
from loglinear.ops.triton.tables import CHUNK, Tables


def outputs(
    q_tgn: torch.Tensor,
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    scales_chlt: torch.Tensor | None,
    decays: Decays,
    states_xhnp: torch.Tensor,
    scale: float,
    tables: Tables,
    sizes: Sizes,
) -> torch.Tensor:
    """o [tokens, H, P] in v's dtype."""
    o_thp = torch.empty_like(v_thp)
    levels = 0 if scales_chlt is None else scales_chlt.shape[2]
    block_p = sizes.value_block(64)
    at_once = sizes.heads_at_once(tables.rows, 8)
    grid = (2 * tables.rows, sizes.heads // at_once, sizes.value // block_p)
    _outputs[grid](
        q_tgn, k_tgn, v_thp, o_thp, scales_chlt, decays.slot_cht, decays.read_mh, states_xhnp,
        tables.row_token, tables.row_slots, tables.read_start, tables.read, scale, levels,
        H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK, HALF=HALF,
        BLOCK_P=block_p, AT_ONCE=at_once, LEVELS=min(levels, LEVELS_IN_HALF), PRECISION=sizes.precision,
        num_warps=4, num_stages=1, maxnreg=168 if sizes.roomy else None,  # three programs a multiprocessor
    )  # fmt: skip
    return o_thp


@triton.jit(do_not_specialize=["L"])
def _outputs(
    q_ptr, k_ptr, v_ptr, o_ptr, scales_ptr, decay_ptr, read_gap_ptr, states_ptr,
    row_token_ptr, row_slots_ptr, read_start_ptr, read_ptr, scale, L,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, half = tl.program_id(0) // 2, tl.program_id(0) % 2
    first_head = tl.program_id(1) * AT_ONCE
    s, n = tl.arange(0, HALF), tl.arange(0, N)
    t = half * HALF + s
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    _, before_s = row_tokens(row_token_ptr, row_slots_ptr, row, s)
    before_s &= half > 0
    groups: tl.constexpr = H // R
    q_at = s[:, None] * (groups * N) + n[None, :]
    v_at = s[:, None] * (H * P) + p[None, :]
    first_group = (token * groups + first_head // R) * N
    to_group = first_group + half * HALF * groups * N
    q_tn = tl.load(q_ptr + to_group + q_at, mask=valid_t[:, None], other=0.0)
    k_sn = tl.load(k_ptr + to_group + q_at, mask=valid_t[:, None], other=0.0)
    scores_ts = scale * tl.dot(q_tn, tl.trans(k_sn), input_precision=PRECISION)
    k_sn = tl.load(k_ptr + first_group + q_at, mask=before_s[:, None], other=0.0)
    before_scores_ts = scale * tl.dot(q_tn, tl.trans(k_sn), input_precision=PRECISION)
    read_from, read_to = tl.load(read_start_ptr + row), tl.load(read_start_ptr + row + 1)

    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        scales_row_ptr = scales_ptr
        if LEVELS:
            scales_row_ptr += of_row * L * CHUNK
        gap, read_scale_t = load_read(read_ptr, read_gap_ptr, scales_row_ptr, CHUNK, read_from, head, t, H, LEVELS > 0)
        v_row_ptr = v_ptr + (token * H + head) * P
        v_sp = tl.load(v_row_ptr + half * HALF * H * P + v_at, mask=valid_t[:, None], other=0.0)
        v_before_sp = tl.load(v_row_ptr + v_at, mask=before_s[:, None], other=0.0)
        decay_t = tl.load(decay_ptr + of_row * CHUNK + t)
        decay_s = tl.load(decay_ptr + of_row * CHUNK + s)
        middle = tl.load(decay_ptr + of_row * CHUNK + HALF - 1)
        decay_ts = tl.where(s[:, None] >= s[None, :], decay_t[:, None] - decay_t[None, :], float("-inf"))
        weight_ts = scores_ts * tl.exp2(decay_ts)
        if LEVELS:
            weight_ts *= level_weights(scales_row_ptr, CHUNK, t, HALF, LEVELS)
        o_tp = tl.dot(weight_ts.to(v_sp.dtype), v_sp, input_precision=PRECISION)
        if half > 0:
            from_middle_t = tl.exp2(decay_t - middle)
            if LEVELS:
                from_middle_t *= tl.load(scales_row_ptr + tl.minimum(L - 1, LEVELS) * CHUNK + t).to(tl.float32)
            before_ts = before_scores_ts * from_middle_t[:, None] * tl.exp2(middle - decay_s)[None, :]
            o_tp = tl.dot(before_ts.to(v_sp.dtype), v_before_sp, o_tp, input_precision=PRECISION)

        for read in range(read_from, read_to):
            state = tl.load(read_ptr + 4 * read).to(tl.int64)
            state_np = tl.load(states_ptr + (state * H + head) * N * P + (n[:, None] * P + p[None, :]))
            weight_t = scale * read_scale_t * tl.exp2(decay_t + gap)
            gap, read_scale_t = load_read(
                read_ptr, read_gap_ptr, scales_row_ptr, CHUNK, read + 1, head, t, H, LEVELS > 0
            )
            o_tp += weight_t[:, None] * tl.dot(q_tn, state_np, input_precision=PRECISION)
        o_ptrs = o_ptr + ((token + half * HALF) * H + head) * P + v_at
        tl.store(o_ptrs, o_tp.to(v_sp.dtype), mask=valid_t[:, None])
