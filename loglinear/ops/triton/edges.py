"""The state handed in and out of a call: plain PyTorch, because few tokens or few matrices are concerned.

Shapes: t time (of one sequence), h value head, g query/key group, r head within its group, n state (key) size,
p value head size, l level, k bucket.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from loglinear.ops.checks import Sequences
from loglinear.ops.fenwick import bit_length, bucket_start
from loglinear.ops.state import LogLinearState


def read_initial_state(
    o_thp: torch.Tensor,
    q_tgn: torch.Tensor,
    g_th: torch.Tensor,
    scales_thl: torch.Tensor | None,
    scale: float,
    state: LogLinearState,
    sequences: Sequences,
) -> torch.Tensor:
    """Add to o what every query reads from the buckets of its sequence's initial state; fp32."""
    outputs = []
    for number, now in enumerate(_slices(sequences)):
        o_now_thp = o_thp[now].float()
        decay_th = _sum_from_start(g_th[now]).exp() * scale
        start, end = sequences.starts[number], sequences.ends[number]
        for bucket in _occupied(start):
            weight_th = decay_th
            if scales_thl is not None:
                level_t = bit_length(np.arange(start, end) ^ bucket_start(start, bucket))
                index_t11 = torch.from_numpy(level_t).to(o_thp.device)[:, None, None]
                scales_now_thl = scales_thl[now]
                index_th1 = index_t11.expand(-1, scales_now_thl.shape[1], 1)
                weight_th = weight_th * scales_now_thl.gather(2, index_th1).squeeze(2)
            read_thp = _read(q_tgn[now], state.buckets[number, :, bucket])
            o_now_thp = o_now_thp + weight_th[..., None] * read_thp
        outputs.append(o_now_thp)
    return torch.cat(outputs)


def final_state(
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    g_th: torch.Tensor,
    initial: LogLinearState | None,
    sequences: Sequences,
) -> LogLinearState:
    """The buckets after the last token of every sequence, fp32: sums of exp(G_end - G_s) k_s v_s^T."""
    count = max(max(sequences.ends).bit_length(), 0 if initial is None else initial.buckets.shape[2])
    states = []
    for number, now in enumerate(_slices(sequences)):
        start, end = sequences.starts[number], sequences.ends[number]
        weighted_thp = v_thp[now].float() * _sum_to_end(g_th[now]).exp()[..., None]
        buckets: list[torch.Tensor | None] = [None] * count
        for bucket in _occupied(end):
            first = max(bucket_start(end, bucket) - start, 0)
            last = max(bucket_start(end, bucket) + (1 << bucket) - start, 0)
            buckets[bucket] = _outer(k_tgn[now][first:last], weighted_thp[first:last])
        if initial is not None:
            total_h11 = g_th[now].sum(0).exp()[:, None, None]
            for bucket in _occupied(start):
                home = int(bit_length(np.array(end ^ bucket_start(start, bucket)))) - 1
                kept_hnp = total_h11 * initial.buckets[number, :, bucket].float()
                at_home = buckets[home]
                buckets[home] = kept_hnp if at_home is None else at_home + kept_hnp
        empty_hnp = v_thp.new_zeros(v_thp.shape[1], k_tgn.shape[2], v_thp.shape[2], dtype=torch.float32)
        states.append(torch.stack([empty_hnp if bucket is None else bucket for bucket in buckets], 1))
    return LogLinearState(torch.stack(states), torch.tensor(sequences.ends))


def _slices(sequences: Sequences) -> Iterator[slice]:
    first = 0
    for length in sequences.lengths:
        yield slice(first, first + length)
        first += length


def _occupied(position: int) -> list[int]:
    """The buckets that hold tokens after `position` tokens."""
    return [bucket for bucket in range(position.bit_length()) if position >> bucket & 1]


def _sum_from_start(g_th: torch.Tensor) -> torch.Tensor:
    """Log-decay from the start to each token's end; time is innermost for the scan, which is faster there."""
    return g_th.t().contiguous().cumsum(1).t()


def _sum_to_end(g_th: torch.Tensor) -> torch.Tensor:
    """Log-decay from each token's end to the last token's: a sum of its own, not a difference of two."""
    later_ht = torch.nn.functional.pad(g_th[1:].t(), (0, 1))
    return later_ht.flip(1).cumsum(1).flip(1).t()


def _read(q_tgn: torch.Tensor, state_hnp: torch.Tensor) -> torch.Tensor:
    """q^T S of every head: [T, H, P], fp32."""
    state_grnp = state_hnp.float().unflatten(0, (q_tgn.shape[1], -1))
    return torch.einsum("tgn,grnp->tgrp", q_tgn.float(), state_grnp).flatten(1, 2)


def _outer(k_tgn: torch.Tensor, weighted_thp: torch.Tensor) -> torch.Tensor:
    """Sum over time of k v^T of every head: [H, N, P], fp32."""
    weighted_tgrp = weighted_thp.unflatten(1, (k_tgn.shape[1], -1))
    return torch.einsum("tgn,tgrp->grnp", k_tgn.float(), weighted_tgrp).flatten(0, 1)
