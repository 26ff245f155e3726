"""Buckets handed into a call and out of it: one launch for all sequences and buckets, one more for each gradient.

Outputs read buckets, o += weight * q^T S, and buckets are sums, S = sum of weight * k v^T. The gradients of the one
have the form of the other, so two kernels do both.

Shapes: t time (of all sequences, one after the other), h value head, g query/key group, n state (key) size, p value
head size, s sequence, k bucket, j which of the buckets that a tile reads, i tile, m item (a part of a bucket's tokens),
w part of a sum over heads.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loglinear.ops.checks import Sequences
from loglinear.ops.triton.config import LEAST_VALUE, Sizes, fits
from loglinear.ops.triton.edge_tables import TILE, EdgeTables, final_tables, initial_tables
from loglinear.ops.triton.operator import operator

Tensor = torch.Tensor


def supports_edges(k: Tensor, v: Tensor) -> bool:
    """Whether these kernels take keys k [..., N] and values v [..., P]: bf16 as they are, and fp32.

    Values narrower than `LEAST_VALUE`, whose tiles go wrong, would have to be padded: states so small are not worth it.
    """
    dtypes = v.dtype in (torch.bfloat16, torch.float32) and k.dtype == v.dtype
    return dtypes and fits(k, v) and v.shape[-1] >= LEAST_VALUE


@operator("loglinear::read_buckets")
def read_buckets(
    o_thp: Tensor,
    q_tgn: Tensor,
    buckets_shknp: Tensor,
    weights_jth: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
) -> Tensor:
    """o plus what every query reads from the buckets that its sequence starts with, in o's dtype.

    Args:
        o_thp: [T, H, P], contiguous.
        q_tgn: [T, G, N], contiguous.
        buckets_shknp: fp32 [S, H, K, N, P], contiguous.
        weights_jth: fp32 [J, T, H] of each token's j-th occupied bucket; contiguous but perhaps for J.
        lengths, starts: of the sequences.
    """
    tables, sizes = initial_tables(_sequences(lengths, starts), o_thp.device), Sizes.of(q_tgn, o_thp)
    total_thp, block_p = torch.empty_like(o_thp), sizes.value_block(LEAST_VALUE)
    _read[(len(tables.tile), sizes.heads, sizes.value // block_p)](
        o_thp, total_thp, q_tgn, buckets_shknp, weights_jth, weights_jth.stride(0), tables.tile, tables.bucket,
        tables.bucket.shape[1], buckets_shknp.shape[2], **_constants(sizes, block_p), num_warps=4,
    )  # fmt: skip
    return total_thp


@read_buckets.register_fake
def _(o_thp, q_tgn, buckets_shknp, weights_jth, lengths, starts):
    return torch.empty_like(o_thp)


@operator("loglinear::read_buckets_backward")
def _read_buckets_backward(
    do_thp: Tensor,
    q_tgn: Tensor,
    buckets_shknp: Tensor,
    weights_jth: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, buckets and weights."""
    tables = initial_tables(_sequences(lengths, starts), do_thp.device)
    dq_tgn, dweights_jth, _ = _gradients(q_tgn, do_thp, buckets_shknp, weights_jth, tables, with_values=False)
    return dq_tgn, _sums(q_tgn, do_thp, weights_jth, buckets_shknp.shape[2], tables), dweights_jth


@_read_buckets_backward.register_fake
def _(do_thp, q_tgn, buckets_shknp, weights_jth, lengths, starts):
    return torch.empty_like(q_tgn), torch.empty_like(buckets_shknp), _empty_weights(weights_jth)


def _setup_read(ctx, inputs, output) -> None:
    _, *tensors, ctx.lengths, ctx.starts = inputs
    ctx.save_for_backward(*tensors)


def _read_autograd(ctx, do_thp):
    gradients = _read_buckets_backward(do_thp.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.starts)
    return do_thp, *gradients, None, None


read_buckets.register_autograd(_read_autograd, setup_context=_setup_read)


@operator("loglinear::sum_buckets")
def sum_buckets(
    k_tgn: Tensor,
    v_thp: Tensor,
    weights_jth: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
    count: int,
) -> Tensor:
    """What these tokens alone leave in the buckets that their sequences end with: fp32 [S, H, K, N, P].

    Args:
        k_tgn: [T, G, N], contiguous.
        v_thp: [T, H, P], contiguous.
        weights_jth: fp32 [1, T, H], contiguous.
        lengths, starts: of the sequences.
        count: K.
    """
    return _sums(k_tgn, v_thp, weights_jth, count, final_tables(_sequences(lengths, starts), v_thp.device))


@sum_buckets.register_fake
def _(k_tgn, v_thp, weights_jth, lengths, starts, count):
    return weights_jth.new_empty(len(lengths), v_thp.shape[1], count, k_tgn.shape[2], v_thp.shape[2])


@operator("loglinear::sum_buckets_backward")
def _sum_buckets_backward(
    dbuckets_shknp: Tensor,
    k_tgn: Tensor,
    v_thp: Tensor,
    weights_jth: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, values and weights."""
    tables = final_tables(_sequences(lengths, starts), v_thp.device)
    dk_tgn, dweights_jth, dv_thp = _gradients(k_tgn, v_thp, dbuckets_shknp, weights_jth, tables, with_values=True)
    return dk_tgn, dv_thp, dweights_jth


@_sum_buckets_backward.register_fake
def _(dbuckets_shknp, k_tgn, v_thp, weights_jth, lengths, starts):
    return torch.empty_like(k_tgn), torch.empty_like(v_thp), _empty_weights(weights_jth)


def _setup_sum(ctx, inputs, output) -> None:
    *tensors, ctx.lengths, ctx.starts, _ = inputs
    ctx.save_for_backward(*tensors)


def _sum_autograd(ctx, dbuckets_shknp):
    gradients = _sum_buckets_backward(dbuckets_shknp.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.starts)
    return *gradients, None, None, None


sum_buckets.register_autograd(_sum_autograd, setup_context=_setup_sum)


def _gradients(
    x_tgn: Tensor, y_thp: Tensor, buckets_shknp: Tensor, weights_jth: Tensor, tables: EdgeTables, *, with_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For z = S^T x of each token: sum of weight * S y over heads and buckets, <z, y>, and, if wanted, weight * z."""
    sizes = Sizes.of(x_tgn, y_thp)
    at_once, block_p = sizes.heads_at_once(len(tables.tile), 32), sizes.value_block(LEAST_VALUE)
    dx_wtgn = x_tgn.new_empty(sizes.per_group // at_once, *x_tgn.shape, dtype=torch.float32)
    dweights_jth = _empty_weights(weights_jth).zero_()
    dy_thp = torch.empty_like(y_thp) if with_values else y_thp.new_empty(0)
    _to_vectors[(len(tables.tile), sizes.heads // at_once)](
        x_tgn, y_thp, buckets_shknp, weights_jth, weights_jth.stride(0), dx_wtgn, dy_thp, dweights_jth,
        dweights_jth.stride(0), tables.tile, tables.bucket, tables.bucket.shape[1], len(x_tgn), buckets_shknp.shape[2],
        WITH_VALUES=with_values, AT_ONCE=at_once, **_constants(sizes, block_p), num_warps=8,
    )  # fmt: skip
    return dx_wtgn.sum(0).to(x_tgn.dtype), dweights_jth, dy_thp


def _sums(x_tgn: Tensor, y_thp: Tensor, weights_jth: Tensor, count: int, tables: EdgeTables) -> Tensor:
    """S = sum of weight * x y^T over the tokens of each bucket: fp32 [S, H, K, N, P]."""
    sizes, items = Sizes.of(x_tgn, y_thp), len(tables.item)
    block_p = sizes.value_block(LEAST_VALUE)
    sums_mhnp = weights_jth.new_empty(items, sizes.heads, sizes.state, sizes.value)
    buckets_shknp = weights_jth.new_zeros(tables.sequences, sizes.heads, count, sizes.state, sizes.value)
    _sum_items[(items, sizes.heads, sizes.value // block_p)](
        x_tgn, y_thp, weights_jth, weights_jth.stride(0), sums_mhnp, tables.item, **_constants(sizes, block_p),
        num_warps=8,
    )  # fmt: skip
    _add_items[(len(tables.place), sizes.heads, triton.cdiv(sizes.flat, sizes.flat_block))](
        sums_mhnp, buckets_shknp, tables.place, count, H=sizes.heads, FLAT=sizes.flat, BLOCK=sizes.flat_block,
        num_warps=4,
    )  # fmt: skip
    return buckets_shknp


def _sequences(lengths: Sequence[int], starts: Sequence[int]) -> Sequences:
    return Sequences(tuple(lengths), tuple(starts))


def _empty_weights(weights_jth: Tensor) -> Tensor:
    return torch.empty_like(weights_jth, memory_format=torch.contiguous_format)


def _constants(sizes: Sizes, block_p: int) -> dict[str, object]:
    return {
        "H": sizes.heads, "R": sizes.per_group, "N": sizes.state, "P": sizes.value, "TILE": TILE, "BLOCK_P": block_p,
        "PRECISION": sizes.precision,
    }  # fmt: skip


@triton.jit
def _of_tile(tile_ptr, TILE: tl.constexpr):
    """A tile's first token, int64, the offsets of its tokens, which of them exist, and its sequence, int64."""
    tile = tl.program_id(0)
    first, end = tl.load(tile_ptr + 3 * tile), tl.load(tile_ptr + 3 * tile + 1)
    t = tl.arange(0, TILE)
    return first.to(tl.int64), t, first + t < end, tl.load(tile_ptr + 3 * tile + 2).to(tl.int64)


@triton.jit
def _load_bucket(buckets_ptr, sequence, head, bucket, K, n, p, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    at_np = n[:, None] * P + p[None, :]
    return tl.load(buckets_ptr + ((sequence * H + head) * K + bucket) * (N * P) + at_np)


@triton.jit(do_not_specialize=["STRIDE_J", "J", "K"])
def _read(
    o_ptr, total_ptr, q_ptr, buckets_ptr, weights_ptr, STRIDE_J, tile_ptr, bucket_ptr, J, K,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, t, exists_t, sequence = _of_tile(tile_ptr, TILE)
    head = tl.program_id(1)
    n, p = tl.arange(0, N), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_at = (first * (H // R) + head // R) * N + t[:, None] * (H // R * N) + n[None, :]
    q_tn = tl.load(q_ptr + q_at, mask=exists_t[:, None], other=0.0)
    o_at = (first * H + head) * P + t[:, None] * (H * P) + p[None, :]
    o_tp = tl.load(o_ptr + o_at, mask=exists_t[:, None], other=0.0).to(tl.float32)
    for j in range(J):
        bucket = tl.load(bucket_ptr + tl.program_id(0) * J + j)
        if bucket >= 0:
            state_np = _load_bucket(buckets_ptr, sequence, head, bucket, K, n, p, H, N, P)
            weight_at = j * STRIDE_J.to(tl.int64) + (first + t) * H + head
            weight_t = tl.load(weights_ptr + weight_at, mask=exists_t, other=0.0)
            o_tp += weight_t[:, None] * tl.dot(q_tn, state_np.to(q_tn.dtype), input_precision=PRECISION)
    tl.store(total_ptr + o_at, o_tp.to(total_ptr.dtype.element_ty), mask=exists_t[:, None])


@triton.jit(do_not_specialize=["STRIDE_J", "STRIDE_DJ", "J", "tokens", "K"])
def _to_vectors(
    x_ptr, y_ptr, buckets_ptr, weights_ptr, STRIDE_J, dx_ptr, dy_ptr, dweights_ptr, STRIDE_DJ, tile_ptr, bucket_ptr,
    J, tokens, K, WITH_VALUES: tl.constexpr, AT_ONCE: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, t, exists_t, sequence = _of_tile(tile_ptr, TILE)
    first_head = tl.program_id(1) * AT_ONCE
    n = tl.arange(0, N)
    x_at = (first * (H // R) + first_head // R) * N + t[:, None] * (H // R * N) + n[None, :]
    x_tn = tl.load(x_ptr + x_at, mask=exists_t[:, None], other=0.0)
    dx_tn = tl.zeros([TILE, N], tl.float32)
    for head in range(first_head, first_head + AT_ONCE):
        for j in range(J):
            bucket = tl.load(bucket_ptr + tl.program_id(0) * J + j)
            if bucket >= 0:
                weight_at = (first + t) * H + head
                weight_t = tl.load(weights_ptr + j * STRIDE_J.to(tl.int64) + weight_at, mask=exists_t, other=0.0)
                dweight_t = tl.zeros([TILE], tl.float32)
                for block in range(P // BLOCK_P):
                    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
                    y_at = (first * H + head) * P + t[:, None] * (H * P) + p[None, :]
                    y_tp = tl.load(y_ptr + y_at, mask=exists_t[:, None], other=0.0)
                    state_np = _load_bucket(buckets_ptr, sequence, head, bucket, K, n, p, H, N, P).to(x_tn.dtype)
                    z_tp = tl.dot(x_tn, state_np, input_precision=PRECISION)
                    dweight_t += tl.sum(z_tp * y_tp.to(tl.float32), 1)
                    if WITH_VALUES:
                        dy_tp = (z_tp * weight_t[:, None]).to(y_tp.dtype)
                        tl.store(dy_ptr + y_at, dy_tp, mask=exists_t[:, None])
                    weighted_tp = (y_tp * weight_t[:, None]).to(y_tp.dtype)
                    dx_tn = tl.dot(weighted_tp, tl.trans(state_np), dx_tn, input_precision=PRECISION)
                tl.store(dweights_ptr + j * STRIDE_DJ.to(tl.int64) + weight_at, dweight_t, mask=exists_t)
    part = tl.program_id(1) % (R // AT_ONCE)
    tl.store(dx_ptr + part.to(tl.int64) * tokens * (H // R * N) + x_at, dx_tn, mask=exists_t[:, None])


@triton.jit(do_not_specialize=["STRIDE_J"])
def _sum_items(
    x_ptr, y_ptr, weights_ptr, STRIDE_J, sums_ptr, item_ptr,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    n, p = tl.arange(0, N), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    first, end = tl.load(item_ptr + 3 * item), tl.load(item_ptr + 3 * item + 1)
    weights_ptr += tl.load(item_ptr + 3 * item + 2).to(tl.int64) * STRIDE_J + head
    sum_np = tl.zeros([N, BLOCK_P], tl.float32)
    for start in range(first, end, TILE):
        t = (start + tl.arange(0, TILE)).to(tl.int64)
        exists_t = t < end
        x_at = (t * (H // R) + head // R)[:, None] * N + n[None, :]
        x_tn = tl.load(x_ptr + x_at, mask=exists_t[:, None], other=0.0)
        y_at = (t * H + head)[:, None] * P + p[None, :]
        y_tp = tl.load(y_ptr + y_at, mask=exists_t[:, None], other=0.0)
        weight_t = tl.load(weights_ptr + t * H, mask=exists_t, other=0.0)
        weighted_tp = (y_tp * weight_t[:, None]).to(y_tp.dtype)
        sum_np = tl.dot(tl.trans(x_tn), weighted_tp, sum_np, input_precision=PRECISION)
    at_np = (item.to(tl.int64) * H + head) * (N * P) + n[:, None] * P + p[None, :]
    tl.store(sums_ptr + at_np, sum_np)


@triton.jit(do_not_specialize=["K"])
def _add_items(sums_ptr, buckets_ptr, place_ptr, K, H: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """A bucket is the sum of its items, in their order."""
    place_ptr += 4 * tl.program_id(0)
    head = tl.program_id(1)
    f = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, end = tl.load(place_ptr), tl.load(place_ptr + 1)
    sequence, bucket = tl.load(place_ptr + 2).to(tl.int64), tl.load(place_ptr + 3)
    sums_ptr += (first.to(tl.int64) * H + head) * FLAT + f
    sum_f = tl.zeros([BLOCK], tl.float32)
    for _ in range(first, end):
        sum_f += tl.load(sums_ptr, mask=f < FLAT, other=0.0)
        sums_ptr += H * FLAT
    tl.store(buckets_ptr + ((sequence * H + head) * K + bucket) * FLAT + f, sum_f, mask=f < FLAT)
