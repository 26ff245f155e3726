"""The output: what each query reads within its chunk and from the states of runs.

A chunk is two halves. Within a half every pair has a level of its own; the second half reads the first at one level.
Both are blocks [all slots, one half], which a program lays over each other: the two diagonal blocks make one tile.

Shapes: c chunk (row of the tables), t slot of a query, s slot of a key within its half, h value head,
g query/key group, n state (key) size, p value head size, l level, x run.
"""

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
    block_p = min(sizes.value, 64)
    at_once = sizes.heads_at_once(tables.rows, 8)
    grid = (tables.rows, sizes.heads // at_once, sizes.value // block_p)
    _outputs[grid](
        q_tgn, k_tgn, v_thp, o_thp, scales_chlt, decays.slot_cht, decays.read_mh, states_xhnp,
        tables.row_token, tables.row_slots, tables.read_start, tables.read, scale, levels,
        H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK, HALF=HALF,
        BLOCK_P=block_p, AT_ONCE=at_once, LEVELS=min(levels, LEVELS_IN_HALF), PRECISION=sizes.precision,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return o_thp


@triton.jit
def _outputs(
    q_ptr, k_ptr, v_ptr, o_ptr, scales_ptr, decay_ptr, read_gap_ptr, states_ptr,
    row_token_ptr, row_slots_ptr, read_start_ptr, read_ptr, scale, L,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first_head = tl.program_id(1) * AT_ONCE
    t, s, n = tl.arange(0, CHUNK), tl.arange(0, HALF), tl.arange(0, N)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    _, valid0_s = row_tokens(row_token_ptr, row_slots_ptr, row, s)
    _, valid1_s = row_tokens(row_token_ptr, row_slots_ptr, row, s + HALF)
    groups: tl.constexpr = H // R
    to_group = (token * groups + first_head // R) * N
    k_at = s[:, None] * (groups * N) + n[None, :]
    q_at = t[:, None] * (groups * N) + n[None, :]
    q_tn = tl.load(q_ptr + to_group + q_at, mask=valid_t[:, None], other=0.0)
    k0_sn = tl.load(k_ptr + to_group + k_at, mask=valid0_s[:, None], other=0.0)
    k1_sn = tl.load(k_ptr + to_group + HALF * groups * N + k_at, mask=valid1_s[:, None], other=0.0)
    scores0_ts = tl.dot(q_tn, tl.trans(k0_sn), input_precision=PRECISION)
    scores1_ts = tl.dot(q_tn, tl.trans(k1_sn), input_precision=PRECISION)
    is_first_t = t < HALF
    own_scores_ts = tl.where(is_first_t[:, None], scores0_ts, scores1_ts)
    causal_ts = (t % HALF)[:, None] >= s[None, :]
    read_from, read_to = tl.load(read_start_ptr + row), tl.load(read_start_ptr + row + 1)
    v_at = s[:, None] * (H * P) + p[None, :]
    o_at = t[:, None] * (H * P) + p[None, :]

    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        scales_row_ptr = scales_ptr
        if LEVELS:
            scales_row_ptr += of_row * L * CHUNK
        gap, read_scale_t = load_read(
            read_ptr, read_gap_ptr, scales_row_ptr, CHUNK, read_from, head, t, H, LEVELS > 0
        )
        to_head = (token * H + head) * P
        v0_sp = tl.load(v_ptr + to_head + v_at, mask=valid0_s[:, None], other=0.0)
        v1_sp = tl.load(v_ptr + to_head + HALF * H * P + v_at, mask=valid1_s[:, None], other=0.0)
        decay_t = tl.load(decay_ptr + of_row * CHUNK + t)
        decay0_s = tl.load(decay_ptr + of_row * CHUNK + s)
        decay1_s = tl.load(decay_ptr + of_row * CHUNK + HALF + s)
        middle = tl.load(decay_ptr + of_row * CHUNK + HALF - 1)

        own_decay_ts = tl.where(is_first_t[:, None], decay0_s[None, :], decay1_s[None, :])
        own_decay_ts = tl.where(causal_ts, decay_t[:, None] - own_decay_ts, float("-inf"))
        own_ts = own_scores_ts * tl.exp2(own_decay_ts)
        from_middle_t = tl.exp2(tl.where(is_first_t, float("-inf"), decay_t - middle))
        if LEVELS:
            own_ts *= level_weights(scales_row_ptr, CHUNK, t, CHUNK, LEVELS)
            from_middle_t *= tl.load(scales_row_ptr + tl.minimum(L - 1, LEVELS) * CHUNK + t).to(tl.float32)
        before_ts = scores0_ts * from_middle_t[:, None] * tl.exp2(middle - decay0_s)[None, :]
        weights0_ts = tl.where(is_first_t[:, None], own_ts, before_ts).to(v0_sp.dtype)
        weights1_ts = tl.where(is_first_t[:, None], 0.0, own_ts).to(v0_sp.dtype)
        o_tp = tl.dot(weights0_ts, v0_sp, input_precision=PRECISION)
        o_tp = tl.dot(weights1_ts, v1_sp, o_tp, input_precision=PRECISION)

        for read in range(read_from, read_to):
            run = tl.load(read_ptr + 4 * read).to(tl.int64)
            state_np = tl.load(states_ptr + (run * H + head) * N * P + (n[:, None] * P + p[None, :]))
            weight_t = read_scale_t * tl.exp2(decay_t + gap)
            gap, read_scale_t = load_read(
                read_ptr, read_gap_ptr, scales_row_ptr, CHUNK, read + 1, head, t, H, LEVELS > 0
            )
            o_tp += weight_t[:, None] * tl.dot(q_tn, state_np, input_precision=PRECISION)
        tl.store(o_ptr + to_head + o_at, (o_tp * scale).to(v0_sp.dtype), mask=valid_t[:, None])
