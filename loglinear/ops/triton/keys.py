"""Gradients of a chunk's state with respect to its keys, values and decays. The last step of the way down the tree.

Shapes: c chunk (row of the tables), t slot, h value head, g query/key group, n state (key) size, p value head size,
x run, y piece, w part of a sum over heads, b block of the value size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import row_tokens
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.prepare import Decays
from loglinear.ops.triton.tables import CHUNK, Tables
from loglinear.ops.triton.tree_backward import share_of_parent


def key_gradients(
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    decays: Decays,
    states_xhnp: torch.Tensor,
    dpieces_yhnp: torch.Tensor,
    druns_xhnp: torch.Tensor,
    dv_thp: torch.Tensor,
    tables: Tables,
    sizes: Sizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the states of the chunks add to the gradients; writes `dv_thp`.

    Returns:
        dk_wtgn, parts of dk, fp32.
        ddecay_bcht, how the loss depends on the decay from each key's end to the chunk's end, in parts.
        spans_bxh, what `run_gradients` fills in for longer runs, for the rows, in parts.
    """
    block_p = min(sizes.value, 32 if sizes.state == 256 else 64)
    blocks = sizes.value // block_p
    at_once = sizes.heads_at_once(tables.rows, 8)
    parts = sizes.per_group // at_once * blocks
    dk_wtgn = k_tgn.new_empty(parts, *k_tgn.shape, dtype=torch.float32)
    ddecay_bcht = decays.slot_cht.new_empty(blocks, *decays.slot_cht.shape)
    spans_bxh = ddecay_bcht.new_empty(blocks, tables.rows, sizes.heads)
    _key_gradients[(tables.rows, sizes.heads // at_once, blocks)](
        k_tgn, v_thp, decays.slot_cht, decays.run_xh, states_xhnp, dpieces_yhnp, druns_xhnp, dk_wtgn, dv_thp,
        ddecay_bcht, spans_bxh, tables.row_token, tables.row_slots, tables.run, len(k_tgn), tables.rows,
        H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK,
        BLOCK_P=block_p, AT_ONCE=at_once, PRECISION=sizes.precision, num_warps=8, num_stages=2,
    )  # fmt: skip
    return dk_wtgn, ddecay_bcht, spans_bxh


@triton.jit
def _key_gradients(
    k_ptr, v_ptr, decay_ptr, run_decay_ptr, states_ptr, dpieces_ptr, druns_ptr, dk_ptr, dv_ptr,
    ddecay_ptr, spans_ptr, row_token_ptr, row_slots_ptr, run_ptr, tokens, rows,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(2)
    first_head = tl.program_id(1) * AT_ONCE
    t, n = tl.arange(0, CHUNK), tl.arange(0, N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    groups: tl.constexpr = H // R
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    to_group = (token * groups + first_head // R) * N
    k_at = t[:, None] * (groups * N) + n[None, :]
    v_at = t[:, None] * (H * P) + p[None, :]
    k_tn = tl.load(k_ptr + to_group + k_at, mask=valid_t[:, None], other=0.0)
    is_left = tl.load(run_ptr + 4 * row + 1)
    piece = tl.load(run_ptr + 4 * row + 2)
    is_read = tl.load(run_ptr + 4 * row + 3) > piece
    f_np = n[:, None] * P + p[None, :]
    dk_tn = tl.zeros([CHUNK, N], tl.float32)
    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        share_np = share_of_parent(druns_ptr, run_ptr, run_decay_ptr, rows, row, head, f_np, H, N * P)
        state_np = tl.load(states_ptr + of_row * N * P + f_np, mask=is_left + 0 * f_np > 0, other=0.0)
        # One row reads a state of one chunk, so there is at most one piece.
        piece_ptr = dpieces_ptr + (piece.to(tl.int64) * H + head) * N * P
        dpiece_np = tl.load(piece_ptr + f_np, mask=is_read & (f_np >= 0), other=0.0)
        dstate_np = (share_np + dpiece_np.to(tl.float32)).to(k_tn.dtype)
        span = tl.sum(tl.sum(share_np * state_np.to(tl.float32), 1), 0)
        tl.store(spans_ptr + (block.to(tl.int64) * rows + row) * H + head, span)

        to_head = (token * H + head) * P
        v_tp = tl.load(v_ptr + to_head + v_at, mask=valid_t[:, None], other=0.0)
        at_row = decay_ptr + of_row * CHUNK
        to_end_t = tl.exp2(tl.load(at_row + CHUNK - 1) - tl.load(at_row + t))
        dv_tp = to_end_t[:, None] * tl.dot(k_tn, dstate_np, input_precision=PRECISION)
        tl.store(dv_ptr + to_head + v_at, dv_tp.to(v_tp.dtype), mask=valid_t[:, None])
        ddecay_at = (block.to(tl.int64) * rows * H + of_row) * CHUNK + t
        tl.store(ddecay_ptr + ddecay_at, tl.sum(dv_tp * v_tp.to(tl.float32), 1))
        weighted_tp = (v_tp * to_end_t[:, None]).to(v_tp.dtype)
        dk_tn = tl.dot(weighted_tp, tl.trans(dstate_np), dk_tn, input_precision=PRECISION)
    part = (tl.program_id(1) % (R // AT_ONCE)) * (P // BLOCK_P) + block
    dk_ptr += part.to(tl.int64) * tokens * groups * N + to_group
    tl.store(dk_ptr + k_at, dk_tn, mask=valid_t[:, None])
