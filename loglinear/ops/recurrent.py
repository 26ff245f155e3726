"""Log-linear attention one token after the other: decoding, and a second witness for the chunked form.

Shapes: b batch (sequences), t time, h value head, g query/key group, n state (key) size, p value head size,
l level, k bucket.
"""

from __future__ import annotations

import torch

from loglinear.errors import UserError
from loglinear.ops.checks import check_inputs, compute_dtype
from loglinear.ops.device import without_autocast
from loglinear.ops.state import LogLinearState, StateInPlace, occupied_buckets


def recurrent_step(
    state: LogLinearState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    level_scales: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[torch.Tensor, LogLinearState]:
    """Read one token per sequence; the sequences may stand at different positions.

    After the token the buckets merge as a binary counter carries: at position p the buckets below the number of
    trailing ones of p, together with the new token, become one bucket.

    Args:
        state: B sequences, buckets [B, H, K, N, P].
        q, k: [B, G, N].
        v: [B, H, P].
        g: [B, H], log-decay, at most 0.
        level_scales: [B, H, L], or None for all ones.
        scale: multiplies q.

    Returns:
        o [B, H, P] in v's dtype, and the state after the token.

    Raises:
        UserError: `level_scales` has too few levels for the positions in `state`.

    Source: arXiv 2506.04761.
    """
    _check_levels(level_scales, state.positions)
    if _has_kernel(state, q, k, v, g, level_scales):
        return step_in_triton(state, q, k, v, g, level_scales, scale)
    with without_autocast(v.device):
        dtype = state.buckets.dtype
        per_group = v.shape[1] // q.shape[1]
        q_bhn, k_bhn = (x.to(dtype).repeat_interleave(per_group, 1) for x in (q, k))
        state = state.with_buckets(int(state.positions.max()).bit_length())
        decayed_bhknp = state.buckets * g.to(dtype).exp()[..., None, None, None]
        new_bhnp = k_bhn[..., :, None] * v.to(dtype)[..., None, :]

        occupied_bk = occupied_buckets(state.positions, state.buckets.shape[2]).to(v.device)
        read_bhkp = torch.einsum("bhn,bhknp->bhkp", q_bhn * scale, decayed_bhknp) * occupied_bk[:, None, :, None]
        own_bhp = torch.einsum("bhn,bhnp->bhp", q_bhn * scale, new_bhnp)
        o_bhp = _weigh(own_bhp, read_bhkp, level_scales, state.positions)
        return o_bhp.to(v.dtype), _carry(decayed_bhknp, new_bhnp, state.positions)


def recurrent_step_in_place(
    state: StateInPlace,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    level_scales: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """`recurrent_step` by the kernel, for a CUDA graph: it overwrites a bucket and waits for nothing.

    Arguments are those of `recurrent_step`, except that the token's log-decay is in `state.sums_sh` already;
    `level_scales` has a level more than the state has buckets, at least.

    Returns:
        o [B, H, P] in v's dtype.
    """
    from loglinear.ops.triton.step import launch_step

    q, k, v = (x.contiguous() for x in (q, k, v))
    level_scales = None if level_scales is None else level_scales.contiguous()
    buckets, sums = state.buckets, (state.sums_sh, state.sums_shk)
    return launch_step(buckets, buckets, *sums, state.positions, q, k, v, level_scales, scale)


def _has_kernel(state: LogLinearState, *tensors: torch.Tensor | None) -> bool:
    """Whether Triton runs there, in fp32, and nobody wants gradients."""
    given = [x for x in (state.buckets, *tensors) if x is not None]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return state.buckets.is_cuda and state.buckets.dtype == torch.float32 and not wants_gradient


def step_in_triton(
    state: LogLinearState,
    q_bgn: torch.Tensor,
    k_bgn: torch.Tensor,
    v_bhp: torch.Tensor,
    g_bh: torch.Tensor,
    scales_bhl: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, LogLinearState]:
    """`recurrent_step` in one launch; shapes are its own, the state is fp32."""
    from loglinear.ops.triton.step import step

    positions = state.positions + 1
    count = max(int(positions.max()).bit_length(), state.buckets.shape[2])
    o_bhp, buckets_bhknp = step(
        state.buckets.contiguous(),
        state.positions.to(v_bhp.device, non_blocking=True),
        *(x.contiguous() for x in (q_bgn, k_bgn, v_bhp, g_bh.float())),
        None if scales_bhl is None else scales_bhl.contiguous(),
        scale,
        count,
    )
    return o_bhp, LogLinearState(buckets_bhknp, positions)


def _check_levels(scales_bhl: torch.Tensor | None, positions_b: torch.Tensor) -> None:
    needed = int(positions_b.max()).bit_length() + 1
    if scales_bhl is not None and scales_bhl.shape[2] < needed:
        raise UserError(
            f"level_scales has {scales_bhl.shape[2]} levels, but position {int(positions_b.max())} needs "
            f"{needed}: give it a last dimension of at least {needed}"
        )


def _weigh(
    own_bhp: torch.Tensor,
    read_bhkp: torch.Tensor,
    scales_bhl: torch.Tensor | None,
    positions_b: torch.Tensor,
) -> torch.Tensor:
    """Sum of what each level read, times its scale: level 0 is the token itself, level k + 1 is bucket k."""
    if scales_bhl is None:
        return own_bhp + read_bhkp.sum(2)
    scales_bhl = scales_bhl.to(own_bhp.dtype)
    active = int(positions_b.max()).bit_length()
    past_bhp = torch.einsum("bhk,bhkp->bhp", scales_bhl[:, :, 1 : active + 1], read_bhkp[:, :, :active])
    return scales_bhl[:, :, :1] * own_bhp + past_bhp


def _carry(decayed_bhknp: torch.Tensor, new_bhnp: torch.Tensor, positions_b: torch.Tensor) -> LogLinearState:
    """Add the token's own matrix to the binary counter of buckets."""
    trailing_ones = [(~position & position + 1).bit_length() - 1 for position in positions_b.tolist()]
    carry_b = torch.tensor(trailing_ones)
    positions_b = positions_b + 1
    state = LogLinearState(decayed_bhknp, positions_b).with_buckets(int(positions_b.max()).bit_length())
    bucket_k = torch.arange(state.buckets.shape[2])
    occupied_bk = occupied_buckets(positions_b - 1, len(bucket_k))
    merges_bk = (bucket_k < carry_b[:, None]).to(new_bhnp)
    stays_bk = ((bucket_k > carry_b[:, None]) & occupied_bk).to(new_bhnp)
    target_bk = (bucket_k == carry_b[:, None]).to(new_bhnp)
    merged_bhnp = new_bhnp + torch.einsum("bk,bhknp->bhnp", merges_bk, state.buckets)
    buckets_bhknp = state.buckets * stays_bk[:, None, :, None, None]
    buckets_bhknp = buckets_bhknp + merged_bhnp[:, :, None] * target_bk[:, None, :, None, None]
    return LogLinearState(buckets_bhknp, positions_b)


def recurrent_log_linear_attention(
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
    """Log-linear attention over whole sequences by `recurrent_step`; O(T log T) time, differentiable.

    Arguments, result and errors are those of `loglinear.ops.log_linear_attention`.
    Source: arXiv 2506.04761.
    """
    sequences = check_inputs(q, k, v, g, level_scales, initial_state, cu_seqlens)
    dtype = compute_dtype(q, k, v, g, level_scales)
    if initial_state is None:
        sizes = (len(sequences.lengths), v.shape[2], q.shape[3], v.shape[3])
        initial_state = LogLinearState.empty(*sizes, dtype=dtype, device=v.device)
    state = LogLinearState(initial_state.buckets.to(dtype), initial_state.positions)
    scales = level_scales
    if cu_seqlens is None:
        o, state = _scan(state, q, k, v, g, scales, scale)
        return o, state if output_final_state else None
    outputs, states = [], []
    token = 0
    for number, length in enumerate(sequences.lengths):
        now = slice(token, token + length)
        part = None if scales is None else scales[:, now]
        o, last = _scan(state[number : number + 1], q[:, now], k[:, now], v[:, now], g[:, now], part, scale)
        outputs.append(o)
        states.append(last)
        token += length
    return torch.cat(outputs, 1), LogLinearState.concatenate(states) if output_final_state else None


def _scan(
    state: LogLinearState,
    q_btgn: torch.Tensor,
    k_btgn: torch.Tensor,
    v_bthp: torch.Tensor,
    g_bth: torch.Tensor,
    scales_bthl: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, LogLinearState]:
    outputs = []
    for t in range(v_bthp.shape[1]):
        now = (q_btgn[:, t], k_btgn[:, t], v_bthp[:, t], g_bth[:, t])
        o_bhp, state = recurrent_step(state, *now, None if scales_bthl is None else scales_bthl[:, t], scale=scale)
        outputs.append(o_bhp)
    return torch.stack(outputs, 1) if outputs else v_bthp, state
