"""What the queries of the chunked op read within their own chunk: a dense block with a static table of levels.

The block of weights is computed again in the backward pass, a few chunks at a time: memory stays O(T).

Shapes: c chunk (row of the plan), g query/key group, r head within its group, t slot of a query, s slot of a key,
n state (key) size, p value head size, l level.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from loglinear.ops.fenwick import level_table
from loglinear.ops.layout import Chunks, slices


def intra(chunks: Chunks) -> torch.Tensor:
    """O = (Q K^T * exp(G_t - G_s) * scales[t, level(t, s)]) V within each chunk: [C, G, T, R, P]."""
    scales_cgrtl = None
    if chunks.scales_clgrt is not None:
        scales_cgrtl = chunks.scales_clgrt.permute(0, 2, 3, 4, 1)
        missing = chunks.q_cgtn.shape[2].bit_length() - scales_cgrtl.shape[4]  # negative: longer than a chunk
        scales_cgrtl = torch.nn.functional.pad(scales_cgrtl, (0, missing)).contiguous()
    return _Intra.apply(chunks.q_cgtn, chunks.k_cgtn, chunks.v_cgtrp, chunks.decay_cgrt, scales_cgrtl)


class _Tables(NamedTuple):
    """What depends on the chunk's size alone."""

    future_ts: torch.Tensor  # -inf where s > t, else 0
    level_ts: torch.Tensor  # int64, the level at which t sees s; 0 where s > t
    is_level_tsl: torch.Tensor  # 1 where t sees s at level l, else 0


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # the cache outlives the caller's mode
def _tables(chunk: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    level_ts = torch.from_numpy(level_table(chunk)).to(device)
    future_ts = torch.zeros(chunk, chunk, dtype=dtype, device=device).masked_fill(level_ts < 0, -torch.inf)
    is_level_tsl = level_ts[..., None] == torch.arange(chunk.bit_length(), device=device)
    return _Tables(future_ts, level_ts.clamp(min=0), is_level_tsl.to(dtype))


def _decay(decay_cgrt: torch.Tensor, future_ts: torch.Tensor) -> torch.Tensor:
    """exp(G_t - G_s), and 0 in the future: masked before exp, which would overflow there."""
    return (decay_cgrt[..., None] - decay_cgrt[..., None, :]).add_(future_ts).exp_()


def _spread(scales_cgrtl: torch.Tensor, level_ts: torch.Tensor) -> torch.Tensor:
    """scales[t, level(t, s)]."""
    return scales_cgrtl.gather(-1, level_ts.expand(*scales_cgrtl.shape[:-1], len(level_ts)))


class _Intra(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_cgtn, k_cgtn, v_cgtrp, decay_cgrt, scales_cgrtl):
        ctx.save_for_backward(q_cgtn, k_cgtn, v_cgtrp, decay_cgrt, scales_cgrtl)
        chunk = q_cgtn.shape[2]
        tables = _tables(chunk, v_cgtrp.dtype, v_cgtrp.device)
        o_cgtrp = torch.empty_like(v_cgtrp)
        for c in slices(len(q_cgtn), decay_cgrt[0].numel() * chunk, v_cgtrp.device):
            weights_cgrts = _decay(decay_cgrt[c], tables.future_ts)
            if scales_cgrtl is not None:
                weights_cgrts *= _spread(scales_cgrtl[c], tables.level_ts)
            weights_cgrts *= (q_cgtn[c] @ k_cgtn[c].transpose(2, 3))[:, :, None]
            o_cgtrp[c] = (weights_cgrts @ v_cgtrp[c].transpose(2, 3)).transpose(2, 3)
        return o_cgtrp

    @staticmethod
    @once_differentiable
    def backward(ctx, do_cgtrp):
        q_cgtn, k_cgtn, v_cgtrp, decay_cgrt, scales_cgrtl = ctx.saved_tensors
        chunk = q_cgtn.shape[2]
        tables = _tables(chunk, v_cgtrp.dtype, v_cgtrp.device)
        dq_cgtn, dk_cgtn, dv_cgtrp, ddecay_cgrt = map(torch.empty_like, (q_cgtn, k_cgtn, v_cgtrp, decay_cgrt))
        dscales_cgrtl = None if scales_cgrtl is None else torch.empty_like(scales_cgrtl)
        for c in slices(len(q_cgtn), decay_cgrt[0].numel() * chunk, v_cgtrp.device):
            # Copied once, in whole rows: the products would copy them again, and one of them column by column.
            do_cgrtp, v_cgrsp = (x_cgtrp[c].transpose(2, 3).contiguous() for x_cgtrp in (do_cgtrp, v_cgtrp))
            scores_cg1ts = (q_cgtn[c] @ k_cgtn[c].transpose(2, 3))[:, :, None]
            mask_cgrts = _decay(decay_cgrt[c], tables.future_ts)
            dweights_cgrts = do_cgrtp @ v_cgrsp.transpose(3, 4)
            if scales_cgrtl is not None and dscales_cgrtl is not None:
                dscales_cgrts = (mask_cgrts * dweights_cgrts).mul_(scores_cg1ts)
                dscales_cgrtl[c] = torch.einsum("cgrts,tsl->cgrtl", dscales_cgrts, tables.is_level_tsl)
                mask_cgrts *= _spread(scales_cgrtl[c], tables.level_ts)
            weights_cgrts = mask_cgrts * scores_cg1ts
            dv_cgtrp[c] = (weights_cgrts.transpose(3, 4) @ do_cgrtp).transpose(2, 3)
            dexponent_cgrts = weights_cgrts.mul_(dweights_cgrts)
            ddecay_cgrt[c] = dexponent_cgrts.sum(4) - dexponent_cgrts.sum(3)
            dscores_cgts = mask_cgrts.mul_(dweights_cgrts).sum(2)
            dq_cgtn[c] = dscores_cgts @ k_cgtn[c]
            dk_cgtn[c] = dscores_cgts.transpose(2, 3) @ q_cgtn[c]
        return dq_cgtn, dk_cgtn, dv_cgtrp, ddecay_cgrt, dscales_cgrtl
