"""Log-linear attention as its definition reads: dense, quadratic, the truth that the other forms are held to.

Shapes: t query time, s key time, h value head, n state (key) size, p value head size, l level, k bucket.
"""

from __future__ import annotations

import numpy as np
import torch

from loglinear.ops.checks import check_inputs, compute_dtype
from loglinear.ops.fenwick import bit_length, bucket_start, buckets_at, level
from loglinear.ops.state import LogLinearState


def naive_log_linear_attention(
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
    """The dense form O = (Q K^T * M_S * M_H) V, for tests; O(T^2) time and memory.

    Arguments, result and errors are those of `loglinear.ops.log_linear_attention`.
    Source: arXiv 2506.04761.
    """
    sequences = check_inputs(q, k, v, g, level_scales, initial_state, cu_seqlens)
    dtype = compute_dtype(q, k, v, g, level_scales)
    heads = v.shape[2]
    per_group = heads // q.shape[2]
    scales = torch.ones(*g.shape, 64) if level_scales is None else level_scales
    q_thn, k_thn, v_thp, g_th, scales_thl = (
        x.flatten(0, 1).to(v.device, dtype)
        for x in (q.repeat_interleave(per_group, 2) * scale, k.repeat_interleave(per_group, 2), v, g, scales)
    )
    outputs, states = [], []
    token = 0
    for number, (length, start) in enumerate(zip(sequences.lengths, sequences.starts, strict=True)):
        now = slice(token, token + length)
        state = _empty(q_thn, v_thp) if initial_state is None else initial_state[number : number + 1]
        o_thp, final = _one_sequence(q_thn[now], k_thn[now], v_thp[now], g_th[now], scales_thl[now], state, start)
        outputs.append(o_thp)
        states.append(final)
        token += length
    o_bthp = torch.cat(outputs).view(v.shape).to(v.dtype)
    return o_bthp, LogLinearState.concatenate(states) if output_final_state else None


def _empty(q_thn: torch.Tensor, v_thp: torch.Tensor) -> LogLinearState:
    sizes = (q_thn.shape[1], q_thn.shape[2], v_thp.shape[2])
    return LogLinearState.empty(1, *sizes, dtype=v_thp.dtype, device=v_thp.device)


def _one_sequence(
    q_thn: torch.Tensor,
    k_thn: torch.Tensor,
    v_thp: torch.Tensor,
    g_th: torch.Tensor,
    scales_thl: torch.Tensor,
    state: LogLinearState,
    start: int,
) -> tuple[torch.Tensor, LogLinearState]:
    """One sequence whose first token has position `start`."""
    time = len(v_thp)
    end = start + time
    cumulative_th = g_th.cumsum(0)
    initial_hknp = state.buckets[0].to(v_thp.dtype)

    scores_hts = torch.einsum("thn,shn->hts", q_thn, k_thn)
    causal_ts = torch.ones(time, time, dtype=torch.bool, device=v_thp.device).tril()
    difference_hts = (cumulative_th[:, None] - cumulative_th[None]).permute(2, 0, 1)
    decay_hts = difference_hts.masked_fill(~causal_ts, -torch.inf).exp()
    position = np.arange(start, end)
    level_ts = torch.from_numpy(bit_length(position[:, None] ^ position)).to(v_thp.device)
    row_t = torch.arange(time, device=v_thp.device)[:, None]
    scales_hts = scales_thl[row_t, :, level_ts].permute(2, 0, 1)
    o_thp = torch.einsum("hts,shp->thp", scores_hts * decay_hts * scales_hts, v_thp)

    for bucket in buckets_at(start):  # every position of an initial bucket has the same level towards a new query
        first = bucket_start(start, bucket)
        level_t = torch.tensor([level(t, first) for t in range(start, end)], device=v_thp.device).long()
        weight_th = scales_thl[row_t[:, 0], :, level_t] * cumulative_th.exp()
        o_thp = o_thp + weight_th[..., None] * torch.einsum("thn,hnp->thp", q_thn, initial_hknp[:, bucket])

    # A query at position `end` would read what the final state holds.
    total_h = g_th.sum(0)
    weighted_thnp = torch.einsum("thn,thp->thnp", k_thn, v_thp * (total_h - cumulative_th).exp()[..., None])
    final = [torch.zeros_like(weighted_thnp.sum(0)) for _ in range(max(end.bit_length(), initial_hknp.shape[1]))]
    for position in range(start, end):
        final[level(end, position) - 1] = final[level(end, position) - 1] + weighted_thnp[position - start]
    for bucket in buckets_at(start):
        home = level(end, bucket_start(start, bucket)) - 1
        final[home] = final[home] + total_h.exp()[:, None, None] * initial_hknp[:, bucket]
    buckets_hknp = torch.stack(final, 1) if final else initial_hknp
    return o_thp, LogLinearState(buckets_hknp[None], torch.tensor([end]))
