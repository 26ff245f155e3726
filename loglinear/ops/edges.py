"""The state handed in and out of a call, and no more memory than it needs.

In PyTorch that is one matrix product for each bucket; on a GPU `triton/edges.py` does all in one launch. What is as
large as the outputs is made again in the backward pass.

Shapes: t time (of all sequences, one after the other; in a product: of one bucket's tokens), h value head, g query/key
group, r head within its group, n state (key) size, p value head size, f = r p, l level, s sequence, k bucket, j which
of the buckets that a sequence starts with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from loglinear.ops.checks import Sequences, check_inputs, compute_dtype
from loglinear.ops.device import has_kernels, without_autocast
from loglinear.ops.fenwick import bit_length, bucket_start, buckets_at, level
from loglinear.ops.running_sums import sum_from_start, sum_of_all, sum_to_end
from loglinear.ops.state import LogLinearState


class Place(NamedTuple):
    """A bucket of a sequence, and the tokens that it takes in or that read it."""

    tokens: slice
    sequence: int
    bucket: int
    slot: int  # which row of the weights is its own


def read_initial_state(
    o_thp: torch.Tensor,
    q_tgn: torch.Tensor,
    g_th: torch.Tensor,
    scales_thl: torch.Tensor | None,
    scale: float,
    state: LogLinearState,
    sequences: Sequences,
) -> torch.Tensor:
    """o [T, H, P] plus what every query reads from the buckets of its sequence's initial state."""
    places = initial_places(sequences)
    if not places:
        return o_thp
    weights_jth = _read_weights(g_th, scales_thl, scale, sequences)
    if kernels := _kernels(q_tgn, o_thp):
        buckets_shknp = state.buckets.float().contiguous()
        return kernels.read_buckets(o_thp.contiguous(), q_tgn, buckets_shknp, weights_jth, *sequences)
    return _ReadBuckets.apply(o_thp, q_tgn, state.buckets, weights_jth, places)


def _read_weights(
    g_th: torch.Tensor, scales_thl: torch.Tensor | None, scale: float, sequences: Sequences
) -> torch.Tensor:
    """What weighs each token's read of its sequence's j-th bucket [J, T, H]; anything where there is none."""
    decay_th = sum_from_start(g_th, sequences.lengths).exp() * scale
    levels_jt = _read_levels(sequences, g_th.device)
    if scales_thl is None:
        return decay_th.expand(len(levels_jt), -1, -1)
    heads = scales_thl.shape[1]
    scales_jth = [scales_thl.gather(2, of_t[:, None, None].expand(-1, heads, 1)).squeeze(2) for of_t in levels_jt]
    return torch.stack(scales_jth) * decay_th


@lru_cache(maxsize=8)  # as large as several rows
def _read_levels(sequences: Sequences, device: torch.device) -> torch.Tensor:
    """The level at which each token sees its sequence's j-th initial bucket: int64 [J, T], 0 if there is none."""
    places = initial_places(sequences)
    levels_jt = np.zeros((1 + max(place.slot for place in places), sum(sequences.lengths)), np.int64)
    for place in places:
        start, end = sequences.starts[place.sequence], sequences.ends[place.sequence]
        levels_jt[place.slot, place.tokens] = bit_length(np.arange(start, end) ^ bucket_start(start, place.bucket))
    with torch.inference_mode(False):  # what a call in inference mode leaves in the cache must serve training too
        return torch.from_numpy(levels_jt).to(device)


def _kernels(k_tgn: torch.Tensor, v_thp: torch.Tensor) -> ModuleType | None:
    """The module of kernels, where they run; Triton is imported only there."""
    if not has_kernels(v_thp):
        return None
    from loglinear.ops.triton import edges

    return edges if edges.supports_edges(k_tgn, v_thp) else None


class _ReadBuckets(torch.autograd.Function):
    """o[tokens] += weight * q^T S for every place."""

    @staticmethod
    def forward(ctx, o_thp, q_tgn, buckets_shknp, weights_jth, places):
        ctx.save_for_backward(q_tgn, buckets_shknp, weights_jth)
        ctx.places = places
        total_thp = o_thp.to(compute_dtype(o_thp), copy=True)
        for place in places:
            now = place.tokens
            read_gtf = _product(q_tgn[now].transpose(0, 1), _bucket(buckets_shknp, place, q_tgn))
            total_thp[now] += _by_time(read_gtf, o_thp) * weights_jth[place.slot, now, :, None]
        return total_thp.to(o_thp.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, do_thp):
        q_tgn, buckets_shknp, weights_jth = ctx.saved_tensors
        dq_tgn = torch.zeros_like(q_tgn, dtype=compute_dtype(q_tgn))
        dbuckets_shknp, dweights_jth = torch.zeros_like(buckets_shknp), torch.zeros_like(weights_jth)
        for place in ctx.places:
            now = place.tokens
            q_gtn, do_now_thp = q_tgn[now].transpose(0, 1), do_thp[now]
            bucket_gnf = _bucket(buckets_shknp, place, q_tgn)
            dweights_jth[place.slot, now] = (_by_time(_product(q_gtn, bucket_gnf), do_thp) * do_now_thp).sum(2)
            dread_gtf = _by_group(do_now_thp * weights_jth[place.slot, now, :, None], q_tgn)
            dq_tgn[now] += _product(dread_gtf, bucket_gnf.transpose(1, 2)).transpose(0, 1)
            dbuckets_shknp[place.sequence, :, place.bucket] = _by_head(
                _product(q_gtn.transpose(1, 2), dread_gtf), do_thp
            )
        return do_thp, dq_tgn.to(q_tgn.dtype), dbuckets_shknp, dweights_jth, None


def final_state(
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, positions: torch.Tensor, cu_seqlens: torch.Tensor
) -> LogLinearState:
    """What these tokens alone leave in the buckets of sequences that had seen `positions` tokens before them.

    The state after them is this one plus what the state before them becomes. Differentiable.

    Args:
        k: keys [1, T, G, N].
        v: values [1, T, H, P].
        g: log-decay [1, T, H].
        positions: int64 [S] on the CPU.
        cu_seqlens: int32 or int64 [S + 1] on the CPU, boundaries of the S sequences' tokens.

    Returns:
        Buckets [S, H, K, N, P]; those that these tokens do not reach are zero.

    Raises:
        UserError: shapes, dtypes, devices or boundaries do not fit together.
    """
    lengths = check_inputs(k, k, v, g, None, None, cu_seqlens).lengths
    return state_after(k[0], v[0], g[0], None, Sequences(lengths, tuple(positions.tolist())))


def state_after(
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    g_th: torch.Tensor,
    initial: LogLinearState | None,
    sequences: Sequences,
) -> LogLinearState:
    """The buckets after the last token of every sequence, at least fp32: sums of exp(G_end - G_s) k_s v_s^T."""
    count = max(max(sequences.ends).bit_length(), 0 if initial is None else initial.buckets.shape[2])
    with without_autocast(v_thp.device):
        weight_th = sum_to_end(g_th, sequences.lengths).exp()
        buckets_shknp = _sums(k_tgn, v_thp, weight_th, sequences, count)
        if initial is not None:
            _add_what_was_there(buckets_shknp, initial, g_th, sequences)
    return LogLinearState(buckets_shknp, torch.tensor(sequences.ends))


def _sums(
    k_tgn: torch.Tensor, v_thp: torch.Tensor, weight_th: torch.Tensor, sequences: Sequences, count: int
) -> torch.Tensor:
    """The weighted sums of k v^T over each bucket that sequences end with: [S, H, count, N, P]."""
    if kernels := _kernels(k_tgn, v_thp):
        return kernels.sum_buckets(k_tgn.contiguous(), v_thp.contiguous(), weight_th.float()[None], *sequences, count)
    return _OuterSums.apply(k_tgn, v_thp, weight_th, final_places(sequences), count, len(sequences.ends))


def _add_what_was_there(
    buckets_shknp: torch.Tensor, initial: LogLinearState, g_th: torch.Tensor, sequences: Sequences
) -> None:
    """Add to the final buckets those of the initial state, decayed, each to the one that it is a part of by then."""
    decays_sh11 = sum_of_all(g_th, sequences.lengths).exp()[:, :, None, None]
    for _, number, bucket, _ in initial_places(sequences):
        home = level(sequences.ends[number], bucket_start(sequences.starts[number], bucket)) - 1
        buckets_shknp[number, :, home] += decays_sh11[number] * initial.buckets[number, :, bucket]


class _OuterSums(torch.autograd.Function):
    """S = sum over a place's tokens of weight * k v^T, for every place: [S, H, K, N, P]."""

    @staticmethod
    def forward(ctx, k_tgn, v_thp, weight_th, places, count, sequences):
        ctx.save_for_backward(k_tgn, v_thp, weight_th)
        ctx.places = places
        shape = sequences, v_thp.shape[1], count, k_tgn.shape[2], v_thp.shape[2]
        buckets_shknp = v_thp.new_zeros(shape, dtype=compute_dtype(k_tgn, v_thp, weight_th))
        for place in places:
            now = place.tokens
            weighted_gtf = _by_group(v_thp[now] * weight_th[now, :, None], k_tgn)
            sum_gnf = _product(k_tgn[now].permute(1, 2, 0), weighted_gtf)
            buckets_shknp[place.sequence, :, place.bucket] = _by_head(sum_gnf, v_thp)
        return buckets_shknp

    @staticmethod
    @once_differentiable
    def backward(ctx, dbuckets_shknp):
        k_tgn, v_thp, weight_th = ctx.saved_tensors
        dk_tgn, dv_thp, dweight_th = map(torch.zeros_like, (k_tgn, v_thp, weight_th))
        for place in ctx.places:
            now = place.tokens
            dsum_gnf = _bucket(dbuckets_shknp, place, k_tgn)
            weighted_gtf = _by_group(v_thp[now] * weight_th[now, :, None], k_tgn)
            dk_tgn[now] = _product(weighted_gtf, dsum_gnf.transpose(1, 2)).transpose(0, 1).to(k_tgn.dtype)
            dweighted_thp = _by_time(_product(k_tgn[now].transpose(0, 1), dsum_gnf), v_thp)
            dv_thp[now] = (dweighted_thp * weight_th[now, :, None]).to(v_thp.dtype)
            dweight_th[now] = (dweighted_thp * v_thp[now]).sum(2).to(weight_th.dtype)
        return dk_tgn, dv_thp, dweight_th, None, None, None


def initial_places(sequences: Sequences) -> tuple[Place, ...]:
    """Every bucket that holds tokens at a sequence's start, and all tokens of the sequence, which read it."""
    return tuple(
        Place(now, number, bucket, slot)
        for number, now in enumerate(token_slices(sequences))
        for slot, bucket in enumerate(buckets_at(sequences.starts[number]))
    )


def final_places(sequences: Sequences) -> tuple[Place, ...]:
    """Every bucket that holds tokens of this call at a sequence's end, and those tokens; each is in one of them."""
    places = []
    for number, now in enumerate(token_slices(sequences)):
        start, end = sequences.starts[number], sequences.ends[number]
        for bucket in buckets_at(end, start):
            first = now.start + bucket_start(end, bucket) - start
            places.append(Place(slice(max(first, now.start), first + (1 << bucket)), number, bucket, 0))
    return tuple(places)


def token_slices(sequences: Sequences) -> Iterator[slice]:
    """The tokens of each sequence, where all lie one after the other."""
    first = 0
    for length in sequences.lengths:
        yield slice(first, first + length)
        first += length


def _product(a_gmx: torch.Tensor, b_gxn: torch.Tensor) -> torch.Tensor:
    """a b of every group, at least fp32."""
    dtype = compute_dtype(a_gmx, b_gxn)
    return torch.bmm(a_gmx.to(dtype), b_gxn.to(dtype))


def _bucket(buckets_shknp: torch.Tensor, place: Place, q_tgn: torch.Tensor) -> torch.Tensor:
    """The bucket of a place as [G, N, F], in the dtype of the queries or keys that it is multiplied by."""
    bucket_grnp = buckets_shknp[place.sequence, :, place.bucket].unflatten(0, (q_tgn.shape[1], -1))
    return bucket_grnp.to(q_tgn.dtype).transpose(1, 2).flatten(2)


def _by_head(x_gnf: torch.Tensor, v_thp: torch.Tensor) -> torch.Tensor:
    """[G, N, F] as [H, N, P]."""
    return x_gnf.unflatten(2, (-1, v_thp.shape[2])).transpose(1, 2).flatten(0, 1)


def _by_time(x_gtf: torch.Tensor, v_thp: torch.Tensor) -> torch.Tensor:
    """[G, T, F] as [T, H, P]."""
    return x_gtf.transpose(0, 1).reshape(-1, *v_thp.shape[1:])


def _by_group(x_thp: torch.Tensor, q_tgn: torch.Tensor) -> torch.Tensor:
    """[T, H, P] as [G, T, F], in q's dtype."""
    return x_thp.to(q_tgn.dtype).flatten(1).unflatten(1, (q_tgn.shape[1], -1)).transpose(0, 1)
