"""Gradients of the states: gathered from the rows that read them, then brought down the tree.

A left half's state also shows how the loss depends on the decay over the right half: <its share of the parent's
gradient, its state>. Those products go to `spans`; sums of positive and negative parts of one long scan would not do.

Shapes: c chunk (row of the tables), t slot, h value head, g query/key group, n state (key) size, p value head size,
x run, m source (a run that is read), y piece, f a matrix [n, p] as one vector or values of several heads.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import row_tokens
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.prepare import Decays
from loglinear.ops.triton.tables import CHUNK, Tables

BLOCK_T = 64  # slots at a time: with half a chunk two programs fit a multiprocessor


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
    block_p = sizes.value_block(128)
    at_once = sizes.heads_at_once(tables.pieces, 128 // block_p) if block_p == sizes.value else 1
    grid = (sizes.heads // at_once, tables.pieces, sizes.value // block_p)
    if tables.pieces:
        _piece_gradients[grid](
            q_tgn, do_thp, scales_chlt, decays.slot_cht, decays.boundary_xh, dpieces_yhnp,
            tables.row_token, tables.row_slots, tables.piece, scale,
            0 if scales_chlt is None else scales_chlt.shape[2],
            H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK,
            BLOCK_T=BLOCK_T, BLOCK_P=block_p, AT_ONCE=at_once, SCALED=scales_chlt is not None,
            PRECISION=sizes.precision, num_warps=4, num_stages=sizes.stages(2),
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


@triton.jit(do_not_specialize=["L"])
def _piece_gradients(
    q_ptr, do_ptr, scales_ptr, decay_ptr, boundary_ptr, dpieces_ptr,
    row_token_ptr, row_slots_ptr, piece_ptr, scale, L,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_head, piece = tl.program_id(0) * AT_ONCE, tl.program_id(1)
    t, h = tl.arange(0, BLOCK_T), first_head.to(tl.int64) + tl.arange(0, AT_ONCE)
    n = tl.arange(0, N)
    column = tl.arange(0, AT_ONCE * BLOCK_P)  # the values of several heads side by side
    first_p = tl.program_id(2) * BLOCK_P
    piece_ptr += 5 * piece
    since, level, out = tl.load(piece_ptr + 2), tl.load(piece_ptr + 3), tl.load(piece_ptr + 4)
    first, end = tl.load(piece_ptr), tl.load(piece_ptr + 1)
    groups: tl.constexpr = H // R
    q_at = t[:, None] * (groups * N) + n[None, :]
    do_at = t[:, None] * (H * P) + column[None, :]
    run_end_h = tl.load(boundary_ptr + since * H + h)
    dstate_nf = tl.zeros([N, AT_ONCE * BLOCK_P], tl.float32)
    decay_th, scale_th = _load_weights(
        decay_ptr, boundary_ptr, scales_ptr, run_end_h, first, level, h, t, L, H, CHUNK, SCALED
    )
    steps: tl.constexpr = CHUNK // BLOCK_T
    for step in range(first * steps, end * steps):
        weight_th = scale * scale_th * tl.exp2(decay_th)
        weight_thp = tl.broadcast_to(weight_th[:, :, None], [BLOCK_T, AT_ONCE, BLOCK_P])
        ahead = min(step + 1, end * steps - 1)
        decay_th, scale_th = _load_weights(
            decay_ptr, boundary_ptr, scales_ptr, run_end_h, ahead // steps, level, h, ahead % steps * BLOCK_T + t,
            L, H, CHUNK, SCALED,
        )  # fmt: skip
        row, first_slot = step // steps, step % steps * BLOCK_T
        token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, first_slot + t)
        token += first_slot
        q_row_ptr = q_ptr + (token * groups + first_head // R) * N
        q_tn = tl.load(q_row_ptr + q_at, mask=valid_t[:, None], other=0.0)
        do_row_ptr = do_ptr + (token * H + first_head) * P + first_p
        do_tf = tl.load(do_row_ptr + do_at, mask=valid_t[:, None], other=0.0)
        weighted_tf = (do_tf * tl.reshape(weight_thp, [BLOCK_T, AT_ONCE * BLOCK_P])).to(do_tf.dtype)
        dstate_nf = tl.dot(tl.trans(q_tn), weighted_tf, dstate_nf, input_precision=PRECISION)
    dpieces_ptr += (out.to(tl.int64) * H + first_head) * N * P
    out_f = column // BLOCK_P * (N * P) + column % BLOCK_P + first_p
    dstate_nf = dstate_nf.to(dpieces_ptr.dtype.element_ty)
    tl.store(dpieces_ptr + n[:, None] * P + out_f[None, :], dstate_nf)


def bring_down(
    dpieces_yhnp: torch.Tensor, states_xhnp: torch.Tensor, decays: Decays, tables: Tables, sizes: Sizes
) -> torch.Tensor:
    """Complete the gradients of the sources, from the top down, in the first piece of each.

    Returns:
        spans_mh, how the loss depends on the decay over the half to the right of each source, where it has a parent.
    """
    spans_mh = decays.state_xh.new_empty(len(tables.source), sizes.heads)
    for trees in tables.source_trees:
        _bring_down[(len(trees) * sizes.heads,)](
            dpieces_yhnp, states_xhnp, decays.state_xh, spans_mh, tables.source, trees,
            H=sizes.heads, F=sizes.flat, BLOCK=sizes.flat_block, num_warps=4,
        )  # fmt: skip
    return spans_mh


@triton.jit
def _load_parent(dpieces_ptr, source_ptr, source, head, f, H: tl.constexpr, F: tl.constexpr):
    """The gradient of a source's parent, fp32; zero if it has none."""
    parent = tl.load(source_ptr + 7 * source + 3).to(tl.int64)
    return tl.load(dpieces_ptr + (parent * H + head) * F + f, mask=parent + 0 * f >= 0, other=0.0).to(tl.float32)


@triton.jit
def _complete(
    dpieces_ptr, states_ptr, state_decay_ptr, source_ptr, source, head, parent_f, f, H: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """A source's whole gradient, stored, and unrounded; and <what came from above, state>. Zero for source -1."""
    exists = source >= 0
    exists_f = source + 0 * f >= 0
    state = tl.load(source_ptr + 7 * source, mask=exists, other=0).to(tl.int64)
    piece_from = tl.load(source_ptr + 7 * source + 1, mask=exists, other=0)
    piece_to = tl.load(source_ptr + 7 * source + 2, mask=exists, other=0)
    decay = tl.exp2(tl.load(state_decay_ptr + state * H + head))
    own_ptr = dpieces_ptr + (piece_from.to(tl.int64) * H + head) * F
    state_f = tl.load(states_ptr + (state * H + head) * F + f, mask=exists_f, other=0.0).to(tl.float32)
    gradient_f = decay * parent_f
    span = tl.sum(gradient_f * state_f, 0)
    for piece in range(piece_to - piece_from):
        gradient_f += tl.load(own_ptr + tl.cast(piece, tl.int64) * H * F + f).to(tl.float32)
    tl.store(own_ptr + f, gradient_f.to(own_ptr.dtype.element_ty), mask=exists_f)
    return gradient_f, span


@triton.jit
def _bring_down(
    dpieces_ptr, states_ptr, state_decay_ptr, spans_ptr, source_ptr, tree_ptr,
    H: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tree of up to four sources: one, those one and two heights below it, and the one below the first of these."""
    tree_ptr += 4 * (tl.program_id(0) // H)
    head = tl.program_id(0) % H
    top, near = tl.load(tree_ptr), tl.load(tree_ptr + 1)
    far, below_near = tl.load(tree_ptr + 2), tl.load(tree_ptr + 3)
    top_span, near_span = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    far_span, below_near_span = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        parent_f = _load_parent(dpieces_ptr, source_ptr, top, head, f, H, F)
        top_f, span = _complete(
            dpieces_ptr, states_ptr, state_decay_ptr, source_ptr, top, head, parent_f, f, H, F
        )  # fmt: skip
        top_span += span
        _, span = _complete(dpieces_ptr, states_ptr, state_decay_ptr, source_ptr, far, head, top_f, f, H, F)
        far_span += span
        near_f, span = _complete(dpieces_ptr, states_ptr, state_decay_ptr, source_ptr, near, head, top_f, f, H, F)
        near_span += span
        _, span = _complete(dpieces_ptr, states_ptr, state_decay_ptr, source_ptr, below_near, head, near_f, f, H, F)
        below_near_span += span
    tl.store(spans_ptr + top * H + head, top_span)
    tl.store(spans_ptr + near * H + head, near_span, mask=near >= 0)
    tl.store(spans_ptr + far * H + head, far_span, mask=far >= 0)
    tl.store(spans_ptr + below_near * H + head, below_near_span, mask=below_near >= 0)
