"""Refuse malformed inputs of the op with one clear sentence.

Shapes: b batch, t time, h value head, g query/key group, n state (key) size, p value head size, l level,
s sequence, k bucket.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from loglinear.errors import UserError
from loglinear.ops.fenwick import num_levels
from loglinear.ops.state import LogLinearState


class Sequences(NamedTuple):
    """The sequences that a call consists of: row b of the batch, or document s of a packed row."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]  # tokens that each has seen before this call

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that each sequence has seen after this call."""
        return tuple(start + length for start, length in zip(self.starts, self.lengths, strict=True))


def check_inputs(
    q_btgn: torch.Tensor,
    k_btgn: torch.Tensor,
    v_bthp: torch.Tensor,
    g_bth: torch.Tensor,
    scales_bthl: torch.Tensor | None,
    initial_state: LogLinearState | None,
    cu_seqlens: torch.Tensor | None,
) -> Sequences:
    """Check ranks, shapes, dtypes and devices of the op's inputs, and say which sequences they hold.

    Raises:
        UserError: an input does not fit; the message names it and the remedy.
    """
    _check_shapes(q_btgn, k_btgn, v_bthp, g_bth, scales_bthl)
    tensors = {"q": q_btgn, "k": k_btgn, "v": v_bthp, "g": g_bth, "level_scales": scales_bthl}
    _check_kinds({name: tensor for name, tensor in tensors.items() if tensor is not None})
    batch, time = v_bthp.shape[:2]
    lengths = (time,) * batch if cu_seqlens is None else _document_lengths(cu_seqlens, batch, time)
    starts = _starts(initial_state, len(lengths), q_btgn, v_bthp)
    sequences = Sequences(lengths, starts)
    needed = num_levels(max(1, *sequences.ends))
    if scales_bthl is not None and scales_bthl.shape[-1] < needed:
        raise UserError(
            f"level_scales has {scales_bthl.shape[-1]} levels, but {max(sequences.ends)} tokens need {needed}: "
            f"give it a last dimension of at least {needed}"
        )
    return sequences


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 if any input is, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x [...] in fp32, or in float64 if it is that already."""
    return x.to(compute_dtype(x))


def _check_shapes(
    q_btgn: torch.Tensor,
    k_btgn: torch.Tensor,
    v_bthp: torch.Tensor,
    g_bth: torch.Tensor,
    scales_bthl: torch.Tensor | None,
) -> None:
    _check_rank("q", q_btgn, "[B, T, G, N]")
    _check_rank("v", v_bthp, "[B, T, H, P]")
    if k_btgn.shape != q_btgn.shape:
        raise UserError(f"k has shape {list(k_btgn.shape)}, but must have q's shape {list(q_btgn.shape)}")
    batch, time, groups = q_btgn.shape[:3]
    heads = v_bthp.shape[2]
    if v_bthp.shape[:2] != (batch, time):
        raise UserError(f"v has [B, T] = {list(v_bthp.shape[:2])}, but q has {[batch, time]}: they must agree")
    if time == 0 or batch == 0:
        raise UserError(f"q has [B, T] = {[batch, time]}: give at least one token")
    if groups == 0 or heads == 0 or heads % groups:
        raise UserError(f"v has {heads} heads, which must be a positive multiple of the {groups} groups of q")
    if g_bth.shape != v_bthp.shape[:3]:
        raise UserError(f"g has shape {list(g_bth.shape)}, but must be [B, T, H] = {list(v_bthp.shape[:3])}")
    if scales_bthl is not None and (scales_bthl.ndim != 4 or scales_bthl.shape[:3] != v_bthp.shape[:3]):
        raise UserError(
            f"level_scales has shape {list(scales_bthl.shape)}, but must be [B, T, H, L] = {[*v_bthp.shape[:3], 'L']}"
        )


def _check_rank(name: str, tensor: torch.Tensor, shape: str) -> None:
    if tensor.ndim != 4:
        raise UserError(f"{name} has {tensor.ndim} dimensions, but must be {shape}")


def _check_kinds(tensors: dict[str, torch.Tensor]) -> None:
    v_bthp = tensors["v"]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} has dtype {tensor.dtype}: convert it to a floating-point dtype")
        if tensor.device != v_bthp.device:
            raise UserError(f"{name} is on {tensor.device}, but v is on {v_bthp.device}: move it there")
    for name in ("q", "k"):
        if tensors[name].dtype != v_bthp.dtype:
            raise UserError(f"{name} has dtype {tensors[name].dtype}, but v has {v_bthp.dtype}: convert one of them")


def _document_lengths(cu_seqlens: torch.Tensor, batch: int, time: int) -> tuple[int, ...]:
    if batch != 1:
        raise UserError(f"cu_seqlens packs documents into one row, but the batch is {batch}: reshape it to B = 1")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, but must be int32 or int64 of "
            "shape [documents + 1]"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != time:
        raise UserError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}, but must run from 0 to T = {time}")
    lengths = tuple(end - start for start, end in pairwise(bounds))
    if min(lengths) < 0:
        raise UserError("cu_seqlens decreases somewhere, but must be sorted: it is the cumulative sum of lengths")
    return lengths


def _starts(state: LogLinearState | None, count: int, q_btgn: torch.Tensor, v_bthp: torch.Tensor) -> tuple[int, ...]:
    if state is None:
        return (0,) * count
    heads, head_dim = v_bthp.shape[2:]
    buckets = state.buckets
    wanted = [count, heads, "K", q_btgn.shape[3], head_dim]
    fits = buckets.ndim == 5 and all(
        have == want for have, want in zip(buckets.shape, wanted, strict=True) if want != "K"
    )
    if not fits:
        raise UserError(f"initial_state has buckets of shape {list(buckets.shape)}, but this call needs {wanted}")
    if buckets.device != v_bthp.device:
        raise UserError(f"initial_state is on {buckets.device}, but v is on {v_bthp.device}: move it there")
    if state.positions.shape != (count,) or state.positions.dtype != torch.int64:
        raise UserError(f"initial_state.positions must be int64 of shape [{count}], the tokens seen per sequence")
    starts = tuple(state.positions.tolist())
    needed = max(starts).bit_length()
    if min(starts) < 0 or buckets.shape[2] < needed:
        raise UserError(
            f"initial_state has {buckets.shape[2]} buckets, but its positions {min(starts)}..{max(starts)} "
            f"need {needed}: pass a state that this op returned"
        )
    return starts
