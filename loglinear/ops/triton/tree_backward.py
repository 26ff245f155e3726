"""Gradients of the states: gathered from the rows that read them, then brought down the tree.

A left half's state also shows how the loss depends on the decay over the right half: <its share of the parent's
gradient, its state>. Those products go to `spans`; sums of positive and negative parts of one long scan would not do.

Shapes: c chunk (row of the tables), t slot, h value head, g query/key group, n state (key) size, p value head size,
x run, y piece, f a matrix [n, p] as one vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import row_tokens
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.prepare import Decays
from loglinear.ops.triton.tables import CHUNK, Tables


def piece_gradients(
    q_tgn: torch.Tensor,
    do_thp: torch.Tensor,
    scales_chlt: torch.Tensor | None,
    decays: Decays,
    scale: float,
    tables: Tables,
    sizes: Sizes,
) -> torch.Tensor:
    """Gradients of the states of runs from the readers in each piece: [pieces, H, N, P]."""
    dpieces_yhnp = do_thp.new_empty(tables.pieces, sizes.heads, sizes.state, sizes.value)
    block_n, block_p = min(sizes.state, 128), min(sizes.value, 128)
    at_once = sizes.heads_at_once(tables.pieces, 128 // block_p)
    grid = (sizes.heads // at_once, tables.pieces, sizes.state // block_n * (sizes.value // block_p))
    if tables.pieces:
        _piece_gradients[grid](
            q_tgn, do_thp, scales_chlt, decays.slot_cht, decays.boundary_xh, dpieces_yhnp,
            tables.row_token, tables.row_slots, tables.piece, scale,
            0 if scales_chlt is None else scales_chlt.shape[2],
            H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK,
            BLOCK_N=block_n, BLOCK_P=block_p, AT_ONCE=at_once, SCALED=scales_chlt is not None,
            PRECISION=sizes.precision, num_warps=8 if at_once * block_p > 64 else 4, num_stages=2,
        )  # fmt: skip
    return dpieces_yhnp


@triton.jit
def _load_weights(
    decay_ptr, boundary_ptr, scales_ptr, run_end_h, row, level, h, t, L,
    H: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What weighs a row's read of a run: the decay from the run's end to each slot, and the level's scale."""
    of_row_h = row * H + h
    gap_h = (tl.load(boundary_ptr + of_row_h) - run_end_h).to(tl.float32)
    decay_th = tl.load(decay_ptr + of_row_h[None, :] * CHUNK + t[:, None]) + gap_h[None, :]
    scale_th = tl.full(decay_th.shape, 1.0, tl.float32)
    if SCALED:
        scale_th = tl.load(scales_ptr + (of_row_h * L + level)[None, :] * CHUNK + t[:, None]).to(tl.float32)
    return decay_th, scale_th


@triton.jit
def _piece_gradients(
    q_ptr, do_ptr, scales_ptr, decay_ptr, boundary_ptr, dpieces_ptr,
    row_token_ptr, row_slots_ptr, piece_ptr, scale, L,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first_head, piece = tl.program_id(0) * AT_ONCE, tl.program_id(1)
    t, h = tl.arange(0, CHUNK), first_head.to(tl.int64) + tl.arange(0, AT_ONCE)
    n = tl.program_id(2) // (P // BLOCK_P) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, AT_ONCE * BLOCK_P)  # the values of several heads side by side
    first_p = tl.program_id(2) % (P // BLOCK_P) * BLOCK_P
    piece_ptr += 5 * piece
    since, level, out = tl.load(piece_ptr + 2), tl.load(piece_ptr + 3), tl.load(piece_ptr + 4)
    first, end = tl.load(piece_ptr), tl.load(piece_ptr + 1)
    groups: tl.constexpr = H // R
    q_at = t[:, None] * (groups * N) + n[None, :]
    do_at = t[:, None] * (H * P) + column[None, :]
    run_end_h = tl.load(boundary_ptr + since * H + h)
    dstate_nf = tl.zeros([BLOCK_N, AT_ONCE * BLOCK_P], tl.float32)
    decay_th, scale_th = _load_weights(
        decay_ptr, boundary_ptr, scales_ptr, run_end_h, first, level, h, t, L, H, CHUNK, SCALED
    )
    for row in range(first, end):
        weight_th = scale * scale_th * tl.exp2(decay_th)
        weight_thp = tl.broadcast_to(weight_th[:, :, None], [CHUNK, AT_ONCE, BLOCK_P])
        decay_th, scale_th = _load_weights(
            decay_ptr, boundary_ptr, scales_ptr, run_end_h, min(row + 1, end - 1), level, h, t, L, H, CHUNK, SCALED
        )  # fmt: skip
        token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
        q_row_ptr = q_ptr + (token * groups + first_head // R) * N
        q_tn = tl.load(q_row_ptr + q_at, mask=valid_t[:, None], other=0.0)
        do_row_ptr = do_ptr + (token * H + first_head) * P + first_p
        do_tf = tl.load(do_row_ptr + do_at, mask=valid_t[:, None], other=0.0)
        weighted_tf = (do_tf * tl.reshape(weight_thp, [CHUNK, AT_ONCE * BLOCK_P])).to(do_tf.dtype)
        dstate_nf = tl.dot(tl.trans(q_tn), weighted_tf, dstate_nf, input_precision=PRECISION)
    dpieces_ptr += (out.to(tl.int64) * H + first_head) * N * P
    out_f = column // BLOCK_P * (N * P) + column % BLOCK_P + first_p
    dstate_nf = dstate_nf.to(dpieces_ptr.dtype.element_ty)
    tl.store(dpieces_ptr + n[:, None] * P + out_f[None, :], dstate_nf)


def run_gradients(
    dpieces_yhnp: torch.Tensor,
    states_xhnp: torch.Tensor,
    decays: Decays,
    spans_xh: torch.Tensor,
    tables: Tables,
    sizes: Sizes,
) -> torch.Tensor:
    """Gradients of the states of all runs of more than one chunk, from the top down: [runs - rows, H, N, P].

    Fills in `spans_xh` for these runs.
    """
    druns_xhnp = states_xhnp.new_empty(tables.runs - tables.rows, sizes.heads, sizes.state, sizes.value)
    for runs in reversed(tables.heights):
        _run_gradients[(runs.stop - runs.start, sizes.heads)](
            dpieces_yhnp, states_xhnp, druns_xhnp, decays.run_xh, spans_xh, tables.run,
            runs.start + tables.rows, tables.rows,
            H=sizes.heads, F=sizes.flat, BLOCK=sizes.flat_block, num_warps=8,
        )  # fmt: skip
    return druns_xhnp


@triton.jit
def share_of_parent(druns_ptr, run_ptr, run_decay_ptr, rows, run, head, f, H: tl.constexpr, F: tl.constexpr):
    """What a run's gradient gets from its parent's, at the positions `f` of a state."""
    parent = tl.load(run_ptr + 4 * run)
    decay = tl.exp2(tl.load(run_decay_ptr + run * H + head))
    parent_ptr = druns_ptr + ((parent - rows).to(tl.int64) * H + head) * F
    return decay * tl.load(parent_ptr + f, mask=parent + 0 * f >= 0, other=0.0).to(tl.float32)


@triton.jit
def _run_gradients(
    dpieces_ptr, states_ptr, druns_ptr, run_decay_ptr, spans_ptr, run_ptr, first, rows,
    H: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, head = first + tl.program_id(0), tl.program_id(1)
    is_left = tl.load(run_ptr + 4 * run + 1)
    span = tl.zeros([], tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        state_ptr = states_ptr + (run.to(tl.int64) * H + head) * F
        state_f = tl.load(state_ptr + f, mask=is_left + 0 * f > 0, other=0.0).to(tl.float32)
        gradient_f = share_of_parent(druns_ptr, run_ptr, run_decay_ptr, rows, run, head, f, H, F)
        span += tl.sum(gradient_f * state_f, 0)
        for piece in range(tl.load(run_ptr + 4 * run + 2), tl.load(run_ptr + 4 * run + 3)):
            gradient_f += tl.load(dpieces_ptr + (tl.cast(piece, tl.int64) * H + head) * F + f).to(tl.float32)
        tl.store(druns_ptr + ((run - rows).to(tl.int64) * H + head) * F + f, gradient_f.to(druns_ptr.dtype.element_ty))
    tl.store(spans_ptr + run.to(tl.int64) * H + head, span)
