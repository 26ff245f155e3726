"""The inputs of the chunked op in its own layout: whole chunks, the heads of a group side by side.

Shapes: b batch, t time (in a chunk: slot), h value head, g query/key group, r head within its group, n state (key)
size, p value head size, l level, c chunk (row of the plan), x boundary between rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loglinear.ops.checks import compute_dtype
from loglinear.ops.plan import Plan, Table


@dataclass(frozen=True)
class Chunks:
    """Queries, keys, values, decays and level scales by chunk; padding slots hold zeros."""

    q_cgtn: torch.Tensor
    k_cgtn: torch.Tensor
    v_cgtrp: torch.Tensor
    decay_cgrt: torch.Tensor  # log-decay from the chunk's start to a slot's end
    boundary_xgr: torch.Tensor  # float64, log-decay from the first boundary to each
    scales_clgrt: torch.Tensor | None

    def gap(self, since: Table, until: Table) -> torch.Tensor:
        """Log-decay between pairs of boundaries, [pairs, G, R]: float64 inside, so exact at any length."""
        return (self.boundary_xgr[until] - self.boundary_xgr[since]).to(self.decay_cgrt.dtype)


def to_chunks(
    plan: Plan,
    chunk: int,
    q_btgn: torch.Tensor,
    k_btgn: torch.Tensor,
    v_bthp: torch.Tensor,
    g_bth: torch.Tensor,
    scales_bthl: torch.Tensor | None,
    scale: float,
) -> Chunks:
    """Lay out the op's inputs by the plan, in the dtype to compute in."""
    dtype = compute_dtype(q_btgn, k_btgn, v_bthp, g_bth, scales_bthl)

    def rows(x_bth: torch.Tensor) -> torch.Tensor:
        """[B, T, heads, ...] as [rows, C, G, heads / G, ...]."""
        x = x_bth.flatten(0, 1).to(dtype)
        if plan.slots is not None:
            x = x.new_zeros(plan.rows * chunk, *x.shape[1:]).index_copy(0, plan.slots, x)
        return x.unflatten(0, (plan.rows, chunk)).unflatten(2, (q_btgn.shape[2], -1))

    decay_cgrt = rows(g_bth).permute(0, 2, 3, 1).cumsum(3)
    return Chunks(
        q_cgtn=(rows(q_btgn) * scale).squeeze(3).transpose(1, 2).contiguous(),
        k_cgtn=rows(k_btgn).squeeze(3).transpose(1, 2).contiguous(),
        v_cgtrp=rows(v_bthp).transpose(1, 2).contiguous(),
        decay_cgrt=decay_cgrt,
        boundary_xgr=torch.nn.functional.pad(decay_cgrt[..., -1].double().cumsum(0), (0, 0, 0, 0, 1, 0)),
        scales_clgrt=None if scales_bthl is None else rows(scales_bthl).permute(0, 4, 2, 3, 1).contiguous(),
    )


def to_tokens(plan: Plan, o_cgtrp: torch.Tensor) -> torch.Tensor:
    """Outputs by chunk as [tokens, H, P], without the padding."""
    o_thp = o_cgtrp.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return o_thp if plan.slots is None else o_thp.index_select(0, plan.slots)


def slices(count: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Cut `count` entries of `elements` numbers each so that what is computed at once stays small.

    On a CPU it then stays in the cache, which is worth more than long loops; on a GPU it need only fit the memory.
    """
    at_once = 1 << (18 if device.type == "cpu" else 26)
    step = max(1, at_once // elements)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))
