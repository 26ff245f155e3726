"""What the chunked op reads across chunks: states of runs of chunks, and the state handed in and out.

Shapes: c chunk (row of the plan), t slot, g query/key group, r head within its group, n state (key) size,
p value head size, l level, x run, m pair of a row and a state that it reads, s sequence, k bucket.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from loglinear.ops.layout import Chunks, slices
from loglinear.ops.plan import Final, Merge, Parts, Reads, Table


def run_states(chunks: Chunks, merges: tuple[Merge, ...]) -> torch.Tensor:
    """States of all runs, from the single chunks upwards, each decayed to its end: [X, G, N, R, P]."""
    to_end_cgrt = chunks.decay_cgrt[..., -1:] - chunks.decay_cgrt
    state_xgnrp = _outer(chunks.k_cgtn, chunks.v_cgtrp, to_end_cgrt)
    states = [state_xgnrp]
    offset = 0
    for merge in merges:
        gap_xgr = chunks.gap(merge.since, merge.until).masked_fill(merge.missing[:, None, None], -torch.inf)
        left_xgnrp = _decayed(state_xgnrp.index_select(0, merge.left - offset), gap_xgr)
        offset += len(state_xgnrp)
        state_xgnrp = left_xgnrp + state_xgnrp.index_select(0, merge.right - offset + len(state_xgnrp))
        states.append(state_xgnrp)
    return torch.cat(states) if merges else state_xgnrp


def _outer(k_cgtn: torch.Tensor, v_cgtrp: torch.Tensor, exponent_cgrt: torch.Tensor) -> torch.Tensor:
    """Sum over slots of exp(exponent) k v^T: [C, G, N, R, P]."""
    weighted_cgtrp = v_cgtrp * exponent_cgrt.exp().transpose(2, 3)[..., None]
    state = k_cgtn.transpose(2, 3) @ weighted_cgtrp.flatten(3)
    return state.unflatten(3, v_cgtrp.shape[3:])


def _decayed(state_xgnrp: torch.Tensor, gap_xgr: torch.Tensor) -> torch.Tensor:
    return state_xgnrp * gap_xgr.exp()[:, :, None, :, None]


def initial_states(buckets_shknp: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """The buckets of an initial state as states that rows read: [S * K, G, N, R, P]."""
    buckets = buckets_shknp.to(chunks.v_cgtrp.dtype).unflatten(1, (chunks.v_cgtrp.shape[1], -1))
    return buckets.permute(0, 3, 1, 4, 2, 5).flatten(0, 1)


def add_reads(
    o_cgtrp: torch.Tensor, chunks: Chunks, reads: Reads, states_xgnrp: torch.Tensor
) -> torch.Tensor:
    """Add q^T S, decayed and scaled, for every pair of a row and a state, to the outputs, in place."""
    if len(reads.row) == 0:
        return o_cgtrp
    exponent_mgrt = (
        chunks.decay_cgrt.index_select(0, reads.row) + chunks.gap(reads.since, reads.row)[..., None]
    )
    weights_mgrt = exponent_mgrt.exp()
    if chunks.scales_clgrt is not None:
        weights_mgrt = weights_mgrt * _scales_of(reads, chunks.scales_clgrt)
    return _AddReads.apply(o_cgtrp, chunks.q_cgtn, states_xgnrp, weights_mgrt, reads.row, reads.source)


def _scales_of(reads: Reads, scales_clgrt: torch.Tensor) -> torch.Tensor:
    """The level scale of each pair and slot: [M, G, R, T]."""
    if reads.level.ndim == 1:
        levels = scales_clgrt.shape[1]
        return scales_clgrt.flatten(0, 1).index_select(0, reads.row * levels + reads.level)
    scales_mlgrt = scales_clgrt.index_select(0, reads.row)
    level_m1grt = reads.level[:, None, None, None].expand(-1, 1, *scales_mlgrt.shape[2:])
    return scales_mlgrt.gather(1, level_m1grt).squeeze(1)


class _AddReads(torch.autograd.Function):
    """o[row] += weights * (q[row] @ states[source]), a few pairs at a time; nothing of O(T log T) is kept."""

    @staticmethod
    def forward(ctx, o_cgtrp, q_cgtn, states_xgnrp, weights_mgrt, row, source):  # noqa: ANN001
        ctx.mark_dirty(o_cgtrp)
        ctx.save_for_backward(q_cgtn, states_xgnrp, weights_mgrt, row, source)
        for m in slices(len(row), o_cgtrp[0].numel(), q_cgtn.device):
            read_mgtf = q_cgtn.index_select(0, row[m]) @ states_xgnrp.index_select(0, source[m]).flatten(3)
            read_mgtrp = read_mgtf.unflatten(3, o_cgtrp.shape[3:])
            o_cgtrp.index_add_(0, row[m], read_mgtrp.mul_(weights_mgrt[m].transpose(2, 3)[..., None]))
        return o_cgtrp

    @staticmethod
    @once_differentiable
    def backward(ctx, do_cgtrp):  # noqa: ANN001
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
            dread_mgtf = do_mgtrp.mul_(weights_mgrt[m].transpose(2, 3)[..., None]).flatten(3)
            dq_cgtn.index_add_(0, row[m], dread_mgtf @ states_mgnf.transpose(2, 3))
            dstates_mgnf = q_mgtn.transpose(2, 3) @ dread_mgtf
            dstates_xgnrp.index_add_(0, source[m], dstates_mgnf.unflatten(3, do_cgtrp.shape[3:]))
        return do_cgtrp, dq_cgtn, dstates_xgnrp, dweights_mgrt, None, None


def final_buckets(
    chunks: Chunks,
    final: Final,
    states_xgnrp: torch.Tensor,
    initial_xgnrp: torch.Tensor | None,
    sequences: int,
) -> torch.Tensor:
    """The buckets after the last token of each sequence: [S, H, K, N, P]."""
    total_xgnrp = states_xgnrp.new_zeros(sequences * final.buckets, *states_xgnrp.shape[1:])
    total_xgnrp = _add_parts(total_xgnrp, chunks, final.runs, states_xgnrp)
    if initial_xgnrp is not None:
        total_xgnrp = _add_parts(total_xgnrp, chunks, final.initial, initial_xgnrp)
    row, holds = final.tails.row, final.tails.holds
    decay_mgrt = chunks.decay_cgrt.index_select(0, row)
    to_end_mgrt = (decay_mgrt[..., -1:] - decay_mgrt).masked_fill(~holds[:, None, None], -torch.inf)
    tails_mgnrp = _outer(chunks.k_cgtn.index_select(0, row), chunks.v_cgtrp.index_select(0, row), to_end_mgrt)
    total_xgnrp = total_xgnrp.index_add(0, final.tails.target, tails_mgnrp)
    return total_xgnrp.unflatten(0, (sequences, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).contiguous()


def _add_parts(
    total_xgnrp: torch.Tensor, chunks: Chunks, parts: Parts, states_xgnrp: torch.Tensor
) -> torch.Tensor:
    states_mgnrp = states_xgnrp.index_select(0, parts.source)
    gap_mgr = chunks.gap(parts.since, parts.until)
    return total_xgnrp.index_add(0, parts.target, _decayed(states_mgnrp, gap_mgr))
