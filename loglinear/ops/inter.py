"""What the chunked op reads across chunks: states of runs of chunks.

Shapes: c chunk (row of the plan), t slot, g query/key group, r head within its group, n state (key) size,
p value head size, l level, x run, m pair of a row and a state that it reads.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from loglinear.ops.layout import Chunks, slices
from loglinear.ops.plan import Merges, Reads


def run_states(chunks: Chunks, merges: Merges) -> torch.Tensor:
    """States of all runs, from the single chunks upwards, each decayed to its end: [X, G, N, R, P]."""
    to_end_cgrt = chunks.decay_cgrt[..., -1:] - chunks.decay_cgrt
    gap_ygr = chunks.gap(merges.since, merges.until).masked_fill(merges.missing[:, None, None], -torch.inf)
    return _RunStates.apply(chunks.k_cgtn, chunks.v_cgtrp, to_end_cgrt, gap_ygr, merges)


def _outer(k_cgtn: torch.Tensor, v_cgtrp: torch.Tensor, exponent_cgrt: torch.Tensor) -> torch.Tensor:
    """Sum over slots of exp(exponent) k v^T: [C, G, N, R, P]."""
    weighted_cgtrp = v_cgtrp * _per_slot(exponent_cgrt.exp())
    state = k_cgtn.transpose(2, 3) @ weighted_cgtrp.flatten(3)
    return state.unflatten(3, v_cgtrp.shape[3:])


def _per_slot(x_cgrt: torch.Tensor) -> torch.Tensor:
    """[C, G, R, T] to multiply [C, G, T, R, P] by."""
    return x_cgrt.transpose(2, 3)[..., None]


def _per_state(x_xgr: torch.Tensor) -> torch.Tensor:
    """[X, G, R] to multiply [X, G, N, R, P] by."""
    return x_xgr[:, :, None, :, None]


class _RunStates(torch.autograd.Function):
    """An up-sweep into one tensor; the backward pass is the down-sweep. y: runs of more than one chunk."""

    @staticmethod
    def forward(ctx, k_cgtn, v_cgtrp, to_end_cgrt, gap_ygr, merges):
        rows = len(k_cgtn)
        states_xgnrp = k_cgtn.new_empty(rows + len(gap_ygr), k_cgtn.shape[1], k_cgtn.shape[3], *v_cgtrp.shape[3:])
        for c in slices(rows, v_cgtrp[0].numel(), v_cgtrp.device):
            states_xgnrp[c] = _outer(k_cgtn[c], v_cgtrp[c], to_end_cgrt[c])
        decay_ygr = gap_ygr.exp()
        for y in merges.heights:
            left_ygnrp = states_xgnrp.index_select(0, merges.left[y])
            right_ygnrp = states_xgnrp.index_select(0, merges.right[y])
            above = slice(rows + y.start, rows + y.stop)
            states_xgnrp[above] = right_ygnrp.addcmul_(left_ygnrp, _per_state(decay_ygr[y]))
        ctx.save_for_backward(k_cgtn, v_cgtrp, to_end_cgrt, decay_ygr, states_xgnrp)
        ctx.merges = merges
        return states_xgnrp

    @staticmethod
    @once_differentiable
    def backward(ctx, dstates_xgnrp):
        k_cgtn, v_cgtrp, to_end_cgrt, decay_ygr, states_xgnrp = ctx.saved_tensors
        rows = len(k_cgtn)
        dgap_ygr = torch.empty_like(decay_ygr)
        if len(decay_ygr):
            dstates_xgnrp = dstates_xgnrp.clone()
        for y in reversed(ctx.merges.heights):
            left, right = ctx.merges.left[y], ctx.merges.right[y]
            below, above = slice(rows + y.start), slice(rows + y.start, rows + y.stop)
            dstates_xgnrp[below].index_add_(0, right, dstates_xgnrp[above])
            dleft_ygnrp = dstates_xgnrp[above] * _per_state(decay_ygr[y])
            dstates_xgnrp[below].index_add_(0, left, dleft_ygnrp)
            dgap_ygr[y] = dleft_ygnrp.mul_(states_xgnrp.index_select(0, left)).sum((2, 4))
        dk_cgtn, dv_cgtrp, dto_end_cgrt = map(torch.empty_like, (k_cgtn, v_cgtrp, to_end_cgrt))
        for c in slices(rows, v_cgtrp[0].numel(), v_cgtrp.device):
            decay_cgtr1 = _per_slot(to_end_cgrt[c].exp())
            dstates_cgnf = dstates_xgnrp[c].flatten(3)
            dk_cgtn[c] = (v_cgtrp[c] * decay_cgtr1).flatten(3) @ dstates_cgnf.transpose(2, 3)
            dweighted_cgtf = k_cgtn[c] @ dstates_cgnf
            dv_c = torch.mul(dweighted_cgtf.view_as(v_cgtrp[c]), decay_cgtr1, out=dv_cgtrp[c])
            dto_end_cgrt[c] = (dv_c * v_cgtrp[c]).sum(4).transpose(2, 3)
        return dk_cgtn, dv_cgtrp, dto_end_cgrt, dgap_ygr, None


def add_reads(o_cgtrp: torch.Tensor, chunks: Chunks, reads: Reads, states_xgnrp: torch.Tensor) -> torch.Tensor:
    """Add q^T S, decayed and scaled, for every pair of a row and a state, to the outputs, in place."""
    if len(reads.row) == 0:
        return o_cgtrp
    exponent_mgrt = chunks.decay_cgrt.index_select(0, reads.row) + chunks.gap(reads.since, reads.row)[..., None]
    weights_mgrt = exponent_mgrt.exp()
    if chunks.scales_clgrt is not None:
        levels = chunks.scales_clgrt.shape[1]
        scales_mgrt = chunks.scales_clgrt.flatten(0, 1).index_select(0, reads.row * levels + reads.level)
        weights_mgrt = weights_mgrt * scales_mgrt
    return _AddReads.apply(o_cgtrp, chunks.q_cgtn, states_xgnrp, weights_mgrt, reads.row, reads.source)


class _AddReads(torch.autograd.Function):
    """o[row] += weights * (q[row] @ states[source]), a few pairs at a time; nothing of O(T log T) is kept."""

    @staticmethod
    def forward(ctx, o_cgtrp, q_cgtn, states_xgnrp, weights_mgrt, row, source):
        ctx.mark_dirty(o_cgtrp)
        ctx.save_for_backward(q_cgtn, states_xgnrp, weights_mgrt, row, source)
        for m in slices(len(row), o_cgtrp[0].numel(), q_cgtn.device):
            read_mgtf = q_cgtn.index_select(0, row[m]) @ states_xgnrp.index_select(0, source[m]).flatten(3)
            read_mgtrp = read_mgtf.unflatten(3, o_cgtrp.shape[3:])
            o_cgtrp.index_add_(0, row[m], read_mgtrp.mul_(_per_slot(weights_mgrt[m])))
        return o_cgtrp

    @staticmethod
    @once_differentiable
    def backward(ctx, do_cgtrp):
        q_cgtn, states_xgnrp, weights_mgrt, row, source = ctx.saved_tensors
        dq_cgtn, dstates_xgnrp = torch.zeros_like(q_cgtn), torch.zeros_like(states_xgnrp)
        dweights_mgrt = torch.empty_like(weights_mgrt)
        for m in slices(len(row), do_cgtrp[0].numel(), q_cgtn.device):
            q_mgtn, states_mgnf = (
                q_cgtn.index_select(0, row[m]),
                states_xgnrp.index_select(0, source[m]).flatten(3),
            )
            do_mgtrp = do_cgtrp.index_select(0, row[m])
            read_mgtrp = (q_mgtn @ states_mgnf).view_as(do_mgtrp)
            dweights_mgrt[m] = read_mgtrp.mul_(do_mgtrp).sum(4).transpose(2, 3)
            dread_mgtf = do_mgtrp.mul_(_per_slot(weights_mgrt[m])).flatten(3)
            dq_cgtn.index_add_(0, row[m], dread_mgtf @ states_mgnf.transpose(2, 3))
            dstates_mgnf = q_mgtn.transpose(2, 3) @ dread_mgtf
            dstates_xgnrp.index_add_(0, source[m], dstates_mgnf.unflatten(3, do_cgtrp.shape[3:]))
        return do_cgtrp, dq_cgtn, dstates_xgnrp, dweights_mgrt, None, None
