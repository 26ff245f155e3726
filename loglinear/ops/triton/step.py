"""One decoding step of a batch of sequences in one launch: read all buckets, decayed, and carry.

Shapes: s sequence, h value head, g query/key group, k bucket, n state (key) size, p value head size, l level.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.operator import operator

# Values of a head in a program: few, so that there are more programs than heads, unless there are heads enough.
FEW_VALUES, MANY_VALUES, MANY_HEADS = 8, 32, 256
LOADED = 32  # of each row of several buckets at once


@operator("loglinear::step")
def step(
    buckets_shknp: torch.Tensor,
    positions_s: torch.Tensor,
    q_sgn: torch.Tensor,
    k_sgn: torch.Tensor,
    v_shp: torch.Tensor,
    g_sh: torch.Tensor,
    scales_shl: torch.Tensor | None,
    scale: float,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [S, H, P] in v's dtype, and the buckets after the token, fp32 [S, H, `count`, N, P].

    Args:
        buckets_shknp: fp32 [S, H, K, N, P], contiguous.
        positions_s: int64 [S] on the same device, tokens seen so far; below 2^K.
        q_sgn, k_sgn: [S, G, N], contiguous.
        v_shp: [S, H, P], contiguous.
        g_sh: fp32 [S, H], contiguous.
        scales_shl: [S, H, L], contiguous, or None.
        scale: multiplies q.
        count: buckets that any sequence needs after the token, at least K.

    Source: arXiv 2506.04761.
    """
    sequences, heads, _, size, values = buckets_shknp.shape
    out_shknp = buckets_shknp.new_empty(sequences, heads, count, size, values)
    o_shp = launch_step(buckets_shknp, out_shknp, g_sh, None, positions_s, q_sgn, k_sgn, v_shp, scales_shl, scale)
    return o_shp, out_shknp


@step.register_fake
def _(buckets_shknp, positions_s, q_sgn, k_sgn, v_shp, g_sh, scales_shl, scale, count):
    sequences, heads, _, size, values = buckets_shknp.shape
    return torch.empty_like(v_shp), buckets_shknp.new_empty(sequences, heads, count, size, values)


def launch_step(
    buckets_shknp: torch.Tensor,
    out_shknp: torch.Tensor,
    decay_sh: torch.Tensor,
    sums_shk: torch.Tensor | None,
    positions_s: torch.Tensor,
    q_sgn: torch.Tensor,
    k_sgn: torch.Tensor,
    v_shp: torch.Tensor,
    scales_shl: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Outputs as `step`'s, other arguments too; the buckets go to `out_shknp`.

    Args:
        out_shknp: [S, H, `count`, N, P], contiguous; in place, `buckets_shknp` itself.
        decay_sh: the token's log-decay, fp32 [S, H]; in place `sums_sh` of `StateInPlace`, which counts it already.
        sums_shk: None; in place those of `StateInPlace`.
    """
    sequences, heads, buckets, size, values = buckets_shknp.shape
    o_shp = torch.empty_like(v_shp)
    most = FEW_VALUES if sequences * heads < MANY_HEADS else MANY_VALUES
    block_p = min(most, triton.next_power_of_2(values))
    blocks = triton.cdiv(values, block_p)
    _step[(sequences * heads * blocks,)](
        buckets_shknp, positions_s, decay_sh, sums_shk, q_sgn, k_sgn, v_shp, scales_shl, o_shp, out_shknp, scale,
        buckets, out_shknp.shape[2], 0 if scales_shl is None else scales_shl.shape[2],
        H=heads, R=heads // q_sgn.shape[1], N=size, BLOCK_N=triton.next_power_of_2(size),
        P=values, BLOCK_P=block_p, BLOCKS=blocks,
        SCALED=scales_shl is not None, IN_PLACE=sums_shk is not None, BLOCK_K=LOADED // block_p, num_warps=4,
    )  # fmt: skip
    return o_shp


@triton.jit(do_not_specialize=["buckets", "count", "L"])
def _step(
    buckets_ptr, positions_ptr, decay_ptr, sums_ptr, q_ptr, k_ptr, v_ptr, scales_ptr, o_ptr, out_ptr, scale,
    buckets, count, L,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
    SCALED: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The token's own matrix and the full buckets below the first empty one go there, as a counter carries.

    Several buckets at a time, because one load after the other would wait for memory most of the time. Programs that
    share a head's rows of memory are neighbours. In place, `decay_ptr` and `sums_ptr` are the sums of `StateInPlace`,
    and nothing but the bucket that fills is written; else `decay_ptr` is the token's log-decay.
    """
    of_head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    sequence, head = of_head // H, of_head % H
    n, p = tl.arange(0, BLOCK_N), tl.program_id(0) % BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    of_group = (sequence * (H // R) + head // R) * N
    q_n = scale * tl.load(q_ptr + of_group + n, mask=n < N, other=0.0).to(tl.float32)
    k_n = tl.load(k_ptr + of_group + n, mask=n < N, other=0.0).to(tl.float32)
    v_p = tl.load(v_ptr + of_head * P + p, mask=p < P, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + sequence)
    carries = position ^ (position + 1)  # bits up to the first empty bucket, the target
    target = tl.sum((carries >> tl.arange(0, 64)) & 1, 0) - 1
    decay = tl.load(decay_ptr + of_head)
    level_scale = 1.0
    if SCALED:
        level_scale = tl.load(scales_ptr + of_head * L).to(tl.float32)
    o_p = level_scale * tl.sum(q_n * k_n, 0) * v_p
    carried_np = k_n[:, None] * v_p[None, :]
    exists_np = (n < N)[:, None] & (p < P)[None, :]
    at_np = n[:, None] * P + p[None, :]
    for first in range(0, count, BLOCK_K):
        bucket_k = first + tl.arange(0, BLOCK_K)
        full_k, carries_k = (position >> bucket_k) & 1 == 1, (carries >> bucket_k) & 1 == 1
        at_knp = bucket_k[:, None, None] * (N * P) + at_np[None]
        exists_knp = (bucket_k < count)[:, None, None] & exists_np[None]
        before_ptr = buckets_ptr + of_head * buckets * N * P + at_knp
        state_knp = tl.load(before_ptr, mask=exists_knp & full_k[:, None, None], other=0.0)
        since_k = decay + tl.zeros([BLOCK_K], decay.dtype)
        if IN_PLACE:  # fp64, as wherever decays are summed over many tokens
            since_k -= tl.load(sums_ptr + of_head * count + bucket_k, mask=full_k, other=0.0)
        decay_k = tl.where(full_k, tl.exp(since_k.to(tl.float32)), 0.0)
        state_knp *= decay_k[:, None, None]
        read_kp = tl.sum(q_n[None, :, None] * state_knp, 1)
        if SCALED:
            scale_k = tl.load(scales_ptr + of_head * L + bucket_k + 1, mask=full_k, other=0.0).to(tl.float32)
            read_kp *= scale_k[:, None]
        o_p += tl.sum(read_kp, 0)
        carried_np += tl.sum(tl.where(carries_k[:, None, None], state_knp, 0.0), 0)
        if not IN_PLACE:
            after_knp = tl.where(carries_k[:, None, None], 0.0, state_knp)
            stays_knp = exists_knp & (bucket_k != target)[:, None, None]
            tl.store(out_ptr + of_head * count * N * P + at_knp, after_knp, mask=stays_knp)
    tl.store(out_ptr + (of_head * count + target) * N * P + at_np, carried_np, mask=exists_np)
    if IN_PLACE:  # nobody reads it now, because the bucket was empty
        tl.store(sums_ptr + of_head * count + target, decay)
    tl.store(o_ptr + of_head * P + p, o_p.to(o_ptr.dtype.element_ty), mask=p < P)
