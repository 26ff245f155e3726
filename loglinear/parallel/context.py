"""Mixers whose sequences are cut over the context ranks.

Log-linear attention: a rank makes the states of the document pieces at its samples' ends, all ranks exchange them
(one matrix per head and rank for whole sequences; a number of bytes that does not grow with T), and each adds up what
its own samples begin with. Convolutions gather the last inputs. Softmax attention is in `context_softmax.py`.

Shapes: r context rank, b sample, t time (all samples of this rank in one row), c channel, h value head,
g query/key group, n state (key) size, p value head size, l level, j bucket that is sent, k bucket, m contribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loglinear.model.layers import Documents, ShortConv
from loglinear.ops import LogLinearState, final_state, log_linear_attention
from loglinear.ops.running_sums import sum_of_all
from loglinear.parallel.collectives import gather
from loglinear.parallel.cut import CutDocuments, initial_buckets
from loglinear.parallel.mesh import Axis

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # q, k, v, g, lambda


class ContextLogLinearCore(nn.Module):
    """Log-linear attention over sequences cut over the context ranks; whole ones go to `core`."""

    def __init__(self, core: nn.Module, axis: Axis) -> None:
        super().__init__()
        self._core, self._axis = core, axis

    def forward(
        self,
        memory: LogLinearState | None,
        q_btgn: torch.Tensor,
        k_btgn: torch.Tensor,
        v_bthp: torch.Tensor,
        g_bth: torch.Tensor,
        scales_bthl: torch.Tensor | None,
        documents: Documents,
    ) -> tuple[torch.Tensor, LogLinearState | None]:
        """As `LogLinearCore.forward`."""
        inputs = (q_btgn, k_btgn, v_bthp, g_bth, scales_bthl)
        if not isinstance(documents, CutDocuments):
            return self._core(memory, *inputs, documents)
        if documents.sent_bj.shape[1] == 0:  # no document goes through a cut
            return log_linear_attention(*inputs, cu_seqlens=documents.cu_seqlens)
        buckets_bhknp, received = self._exchange(k_btgn, v_bthp, g_bth, documents)
        return _Keep.apply(_attend(inputs, buckets_bhknp, documents), received), None

    def _exchange(
        self, k_btgn: torch.Tensor, v_bthp: torch.Tensor, g_bth: torch.Tensor, documents: CutDocuments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What this rank's samples begin with [B, H, K, N, P], and all that was received."""
        sent_bjhnp, total_bh = _own_tails(k_btgn, v_bthp, g_bth, documents)
        parcel = torch.cat([sent_bjhnp.flatten(1), total_bh.to(sent_bjhnp.dtype)], 1)
        received = gather(parcel, self._axis, 0)
        states, totals = received.split([parcel.shape[1] - total_bh.shape[1], total_bh.shape[1]], 1)
        state_rbjhnp = states.unflatten(0, (self._axis.size, -1)).unflatten(2, sent_bjhnp.shape[1:])
        total_rbh = totals.unflatten(0, (self._axis.size, -1))
        return _initial_buckets(state_rbjhnp, total_rbh, documents, self._axis.index), received


def _own_tails(
    k_btgn: torch.Tensor, v_bthp: torch.Tensor, g_bth: torch.Tensor, documents: CutDocuments
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the pieces at the samples' ends, the buckets that are sent [B, J, H, N, P], and their log-decay."""
    if len(documents.tail_tokens) == v_bthp.shape[1]:  # whole samples: nothing has to be copied
        k, v, g = k_btgn, v_bthp, g_bth
    else:
        k, v, g = (x.index_select(1, documents.tail_tokens) for x in (k_btgn, v_bthp, g_bth))
    state = final_state(k, v, g, positions=documents.tail_starts, cu_seqlens=documents.tails)
    bucket_bj = documents.sent_bj
    sample_bj = torch.arange(documents.samples, device=v.device)[:, None].expand_as(bucket_bj)
    sent_bjhnp = state.buckets.transpose(1, 2)[sample_bj, bucket_bj]  # where there are fewer, the last, read by nobody
    return sent_bjhnp, sum_of_all(g[0], tuple(documents.tails.diff().tolist()))


def _initial_buckets(
    state_rbjhnp: torch.Tensor, total_rbh: torch.Tensor, documents: CutDocuments, rank: int
) -> torch.Tensor:
    """[B, H, K, N, P]: each contribution decayed over the ranks between its own and this one."""
    own = documents.contributions
    until_rbh = total_rbh.double().cumsum(0)
    gap_mh = (until_rbh[max(rank - 1, 0), own.sample] - until_rbh[own.rank, own.sample]).to(state_rbjhnp.dtype)
    weighted_mhnp = state_rbjhnp.flatten(0, 2).index_select(0, own.source) * gap_mh.exp()[..., None, None]
    samples, buckets = documents.samples, initial_buckets(documents.heads)
    total = state_rbjhnp.new_zeros(samples * buckets, *state_rbjhnp.shape[3:])
    return total.index_add(0, own.target, weighted_mhnp).unflatten(0, (samples, buckets)).transpose(1, 2)


def _attend(inputs: Inputs, buckets_bhknp: torch.Tensor, documents: CutDocuments) -> torch.Tensor:
    """Outputs [1, T, H, P]: the first piece of every sample goes on from its initial state, all others start afresh."""
    state, pieces = LogLinearState(buckets_bhknp, documents.heads), documents.pieces
    if pieces.other_tokens is None:
        return log_linear_attention(*inputs, initial_state=state, cu_seqlens=documents.cu_seqlens)[0]
    first = _select(inputs, pieces.first_tokens)
    others = _select(inputs, pieces.other_tokens)
    o_first = log_linear_attention(*first, initial_state=state, cu_seqlens=pieces.first_bounds)[0]
    o_others = log_linear_attention(*others, cu_seqlens=pieces.other_bounds)[0]
    o_bthp = torch.zeros_like(inputs[2]).index_copy(1, pieces.first_tokens, o_first)
    return o_bthp.index_copy(1, pieces.other_tokens, o_others)


def _select(inputs: Inputs, tokens: torch.Tensor) -> Inputs:
    q, k, v, g, scales = (None if x is None else x.index_select(1, tokens) for x in inputs)
    assert q is not None
    assert k is not None
    assert v is not None
    assert g is not None
    return q, k, v, g, scales


class _Keep(torch.autograd.Function):
    """x, with `received` kept in the graph: every rank takes part in the backward exchange, read or not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(received)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (received,) = ctx.saved_tensors
        return dx, torch.zeros_like(received)


class ContextConvolutions(nn.Module):
    """Short convolutions over sequences cut over the context ranks; those over whole ones go to `convolve`."""

    def __init__(self, convolve: nn.Module, axis: Axis) -> None:
        super().__init__()
        self._convolve, self._axis = convolve, axis

    def forward(
        self,
        convs: Sequence[ShortConv],
        inputs: Sequence[torch.Tensor],
        pasts: Sequence[torch.Tensor | None],
        documents: Documents,
    ) -> list[torch.Tensor]:
        """As `Convolutions.forward`."""
        if not isinstance(documents, CutDocuments):
            return self._convolve(convs, inputs, pasts, documents)
        rows = Documents(documents.positions_bt.view(documents.samples, -1), documents.length, documents.cu_seqlens)
        inputs = [x_btc[0].unflatten(0, (documents.samples, -1)) for x_btc in inputs]
        pasts = last_inputs(inputs, convs[0].width - 1, self._axis)
        outputs = (conv(x_btc, rows, past) for conv, x_btc, past in zip(convs, inputs, pasts, strict=True))
        return [y_btc.flatten(0, 1)[None] for y_btc in outputs]


def last_inputs(inputs: Sequence[torch.Tensor], reach: int, axis: Axis) -> Sequence[torch.Tensor | None]:
    """The last `reach` tokens of each input [B, T, C] on the rank before, all in one exchange: [B, reach, C] each.

    The first rank gets the last one's, which its positions mask.
    """
    if reach == 0:
        return [None] * len(inputs)
    parcel_bwc = torch.cat([x_btc[:, -reach:] for x_btc in inputs], 2)
    ends_rbwc = gather(parcel_bwc, axis, 0).unflatten(0, (axis.size, -1))
    return ends_rbwc[axis.index - 1].split([x_btc.shape[2] for x_btc in inputs], 2)
