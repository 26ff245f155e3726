"""Log-decay summed over the tokens of each sequence, all sequences in one scan.

A sum over a part of the row is a difference of two sums from its start, in float64: the last 64 of 2^20 tokens come out
to float32's rounding, where a difference of two float32 sums is off by 0.08.

Shapes: t time (of all sequences, one after the other), h value head, s sequence. Lengths: tokens.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def sum_from_start(g_th: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Log-decay from its sequence's start to each token's end: [T, H], contiguous, in g's dtype."""
    return _Running.apply(g_th, lengths, False)


def sum_to_end(g_th: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Log-decay from each token's end to its sequence's end: [T, H], contiguous, in g's dtype."""
    return _Running.apply(g_th, lengths, True)


def sum_of_all(g_th: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Log-decay over each sequence: [S, H], in g's dtype; 0 for an empty one."""
    return _OfAll.apply(g_th, lengths)


class _Running(torch.autograd.Function):
    """A custom backward pass, because that of `index_select` adds atomically and so in no fixed order."""

    @staticmethod
    def forward(ctx, g_th, lengths, to_end):
        ctx.lengths, ctx.to_end = lengths, to_end
        return _running(g_th, lengths, to_end=to_end)

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_th):
        others_th = _running(dsum_th, ctx.lengths, to_end=not ctx.to_end)  # sums from the start count the token itself
        return others_th - dsum_th if ctx.to_end else others_th + dsum_th, None, None


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g_th, lengths):
        ctx.lengths = lengths
        _, start_hs, end_hs = _cumulative(g_th, lengths)
        return _tokens_first(end_hs - start_hs, g_th)

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_sh):
        return dsum_sh.index_select(0, _row_tables(ctx.lengths, dsum_sh.device)[0]), None


def _running(g_th: torch.Tensor, lengths: tuple[int, ...], *, to_end: bool) -> torch.Tensor:
    until_ht, start_hs, end_hs = _cumulative(g_th, lengths)
    row_t, _ = _row_tables(lengths, g_th.device)
    bound_ht = (end_hs if to_end else start_hs).index_select(1, row_t)
    return _tokens_first(bound_ht - until_ht if to_end else until_ht - bound_ht, g_th)


def _cumulative(g_th: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 sums from the row's start to each token's end [H, T], and to the sequences' starts and ends [H, S]."""
    before_ht = F.pad(g_th.t().double(), (1, 0)).cumsum(1)  # time innermost, along which a scan is faster
    _, bounds_s = _row_tables(lengths, g_th.device)
    at_bounds_hs = before_ht.index_select(1, bounds_s)
    return before_ht[:, 1:], at_bounds_hs[:, :-1], at_bounds_hs[:, 1:]


def _tokens_first(x_ht: torch.Tensor, g_th: torch.Tensor) -> torch.Tensor:
    """[T, H], contiguous, in g's dtype; where `to` has nothing to convert, it copies nothing either."""
    return x_ht.t().to(g_th.dtype, memory_format=torch.contiguous_format).contiguous()


@lru_cache(maxsize=8)  # as large as a row: enough for the micro-batches in work at a time, and no more
def _row_tables(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's sequence [T], and the sequences' boundaries [S + 1]: int64."""
    bounds = list(accumulate(lengths, initial=0))
    with torch.inference_mode(False):  # what a call in inference mode leaves in the cache must serve training too
        return torch.repeat_interleave(torch.tensor(lengths)).to(device), torch.tensor(bounds).to(device)
