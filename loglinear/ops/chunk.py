"""Log-linear attention in chunks: O(T log T), a few large matrix products, differentiable by autograd.

The form is parallel over chunks: every chunk's state, a binary tree of sums over runs of chunks, then for every
chunk its own block and the runs that it reads. This is the path that trains on a CPU.

Shapes: b batch, c chunk (row of the plan), t slot of a query in it, s slot of a key, h value head, g query/key group,
n state (key) size, p value head size, l level, f the heads of a group and their values side by side (H / G * P),
m pair of a row and a state that it reads, x node of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loglinear.ops.checks import check_inputs, compute_dtype
from loglinear.ops.intra import decay_level_mask
from loglinear.ops.plan import Merge, Parts, Plan, Reads, make_plan
from loglinear.ops.state import LogLinearState

CHUNK = 64


@dataclass(frozen=True)
class _Chunks:
    """The inputs in the plan's layout and the dtype to compute in; padding slots hold zeros."""

    q_cgtn: torch.Tensor
    k_cgtn: torch.Tensor
    v_cthp: torch.Tensor
    cumulative_cth: torch.Tensor  # log-decay from the chunk's start to a slot's end
    boundary_bh: torch.Tensor  # float64 [rows + 1, H], log-decay from the first boundary to each
    scales_cthl: torch.Tensor | None

    def gap(self, since: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        """Log-decay between two boundaries, for each pair and head: exact at any length."""
        return (self.boundary_bh[until] - self.boundary_bh[since]).to(self.v_cthp.dtype)

    def fold(self, x_cthp: torch.Tensor) -> torch.Tensor:
        """[C, T, H, P] as [C, G, T, F]."""
        groups = self.q_cgtn.shape[1]
        return x_cthp.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2)

    def unfold(self, x_cgtf: torch.Tensor) -> torch.Tensor:
        """[C, G, T, F] as [C, T, H, P]."""
        return x_cgtf.transpose(1, 2).unflatten(3, (-1, self.v_cthp.shape[3])).flatten(2, 3)


def chunk_log_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    level_scales: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: LogLinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, LogLinearState | None]:
    """The chunked form. Arguments, result and errors are those of `loglinear.ops.log_linear_attention`.

    Source: arXiv 2506.04761, the form that is parallel over chunks.
    """
    sequences = check_inputs(q, k, v, g, level_scales, initial_state, cu_seqlens)
    initial_buckets = 0 if initial_state is None else initial_state.buckets.shape[2]
    plan = make_plan(sequences, CHUNK, initial_buckets, v.device)
    chunks = _to_chunks(plan, q * scale, k, v, g, level_scales)
    nodes_xgnf = _tree(chunks, plan)
    initial_xgnf = None if initial_state is None else _from_state(initial_state, chunks)

    o_cthp = _intra(chunks)
    if level_scales is None:
        _add_reads(o_cthp, chunks, *_prefix_reads(chunks, plan, nodes_xgnf))
    else:
        _add_reads(o_cthp, chunks, plan.reads, nodes_xgnf)
    if initial_xgnf is not None:
        _add_reads(o_cthp, chunks, plan.initial_reads, initial_xgnf)
    o = _to_tokens(plan, o_cthp).view(v.shape).to(v.dtype)
    if not output_final_state:
        return o, None
    return o, LogLinearState(
        _final_buckets(chunks, plan, nodes_xgnf, initial_xgnf, len(sequences.ends)), torch.tensor(sequences.ends)
    )


def _to_chunks(
    plan: Plan,
    q_btgn: torch.Tensor,
    k_btgn: torch.Tensor,
    v_bthp: torch.Tensor,
    g_bth: torch.Tensor,
    scales_bthl: torch.Tensor | None,
) -> _Chunks:
    dtype = compute_dtype(q_btgn, k_btgn, v_bthp, g_bth, scales_bthl)

    def lay_out(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1).to(dtype)
        if plan.slots is not None:
            x = x.new_zeros(plan.rows * CHUNK, *x.shape[1:]).index_copy(0, plan.slots, x)
        return x.unflatten(0, (plan.rows, CHUNK))

    cumulative_cth = lay_out(g_bth).cumsum(1)
    boundary_bh = torch.nn.functional.pad(cumulative_cth[:, -1].double().cumsum(0), (0, 0, 1, 0))
    return _Chunks(
        q_cgtn=lay_out(q_btgn).transpose(1, 2),
        k_cgtn=lay_out(k_btgn).transpose(1, 2),
        v_cthp=lay_out(v_bthp),
        cumulative_cth=cumulative_cth,
        boundary_bh=boundary_bh,
        scales_cthl=None if scales_bthl is None else lay_out(scales_bthl),
    )


def _to_tokens(plan: Plan, o_cthp: torch.Tensor) -> torch.Tensor:
    o_thp = o_cthp.flatten(0, 1)
    return o_thp if plan.slots is None else o_thp.index_select(0, plan.slots)


def _intra(chunks: _Chunks) -> torch.Tensor:
    """What the queries read within their own chunk: [C, T, H, P]."""
    scores_cgts = chunks.q_cgtn @ chunks.k_cgtn.transpose(2, 3)
    levels = CHUNK.bit_length()
    scales = None if chunks.scales_cthl is None else chunks.scales_cthl[..., :levels].transpose(1, 2)
    mask_chts = decay_level_mask(chunks.cumulative_cth.transpose(1, 2), scales)
    groups = scores_cgts.shape[1]
    weights_chts = (mask_chts.unflatten(1, (groups, -1)) * scores_cgts[:, :, None]).flatten(1, 2)
    return (weights_chts @ chunks.v_cthp.transpose(1, 2)).transpose(1, 2).contiguous()


def _tree(chunks: _Chunks, plan: Plan) -> torch.Tensor:
    """States of all rows, and of all runs of 2^e whole chunks by an up-sweep: [X, G, N, F]."""
    to_end_cth = (chunks.cumulative_cth[:, -1:] - chunks.cumulative_cth).exp()
    state = chunks.k_cgtn.transpose(2, 3) @ chunks.fold(chunks.v_cthp * to_end_cth[..., None])
    states = [state]
    offset = 0
    for merge in plan.merges:
        state = _merge(chunks, merge, state, state, offset)
        offset += len(states[-1])
        states.append(state)
    return torch.cat(states)


def _merge(
    chunks: _Chunks, merge: Merge, left_xgnf: torch.Tensor, right_xgnf: torch.Tensor, offset: int
) -> torch.Tensor:
    """exp(gap) * left + right; `offset` is the id of the first node in both."""
    gap_xh = chunks.gap(merge.since, merge.until).masked_fill(merge.missing[:, None], -torch.inf)
    left = left_xgnf.index_select(0, merge.left - offset)
    return _decayed(left, gap_xh) + right_xgnf.index_select(0, merge.right - offset)


def _decayed(state_xgnf: torch.Tensor, gap_xh: torch.Tensor) -> torch.Tensor:
    groups = state_xgnf.shape[1]
    decay_xgr = gap_xh.exp().unflatten(1, (groups, -1))
    state_xgnrp = state_xgnf.unflatten(3, (decay_xgr.shape[2], -1))
    return (state_xgnrp * decay_xgr[:, :, None, :, None]).flatten(3)
