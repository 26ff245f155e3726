"""The vocabulary cut into rows of the embedding: lookup, and the loss without ever gathering logits.

Shapes: b batch, t time, d model width, v vocabulary (this rank's part), m all tokens of a batch.
Source: Megatron-LM, arXiv 1909.08053.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from loglinear.ops.checks import at_least_fp32
from loglinear.parallel.collectives import all_reduce
from loglinear.parallel.mesh import Axis


def lookup(tokens_bt: torch.Tensor, weight_vd: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part of a sum over the axis: rows of its own tokens [B, T, D], zero for all others."""
    local_bt, mine_bt = _localise(tokens_bt, weight_vd.shape[0], axis)
    return nn.functional.embedding(local_bt, weight_vd) * mine_bt[..., None]


class VocabParallelCrossEntropy(nn.Module):
    """Cross-entropy summed over labels, from each rank's part of the logits."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, logits_btv: torch.Tensor, labels_bt: torch.Tensor) -> torch.Tensor:
        """As `loglinear.model.lm.CrossEntropy`, with V / ranks logits a rank."""
        return _CrossEntropy.apply(at_least_fp32(logits_btv).flatten(0, 1), labels_bt.flatten(), self.axis)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_mv: torch.Tensor, labels_m: torch.Tensor, axis: Axis) -> torch.Tensor:
        valid_m = labels_m != -100
        local_m, mine_m = _localise(labels_m.clamp(min=0), logits_mv.shape[1], axis)
        maximum_m = all_reduce(logits_mv.amax(1), axis, dist.ReduceOp.MAX)
        exponential_mv = (logits_mv - maximum_m[:, None]).exp()
        of_label_m = logits_mv.gather(1, local_m[:, None])[:, 0] * mine_m
        sums_m2 = all_reduce(torch.stack([exponential_mv.sum(1), of_label_m], 1), axis)
        normaliser_m = sums_m2[:, 0]
        ctx.save_for_backward(exponential_mv.div_(normaliser_m[:, None]), local_m, mine_m & valid_m, valid_m)
        losses_m = maximum_m + normaliser_m.log() - sums_m2[:, 1]
        return losses_m.where(valid_m, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        probability_mv, local_m, mine_m, valid_m = ctx.saved_tensors
        dlogits_mv = probability_mv * valid_m[:, None]
        dlogits_mv.scatter_add_(1, local_m[:, None], -mine_m.to(dlogits_mv.dtype)[:, None])
        return dlogits_mv * dloss, None, None


def _localise(tokens: torch.Tensor, rows: int, axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's row among this rank's `rows`, 0 for tokens of other ranks; and whether it is this rank's."""
    local = tokens - axis.index * rows
    mine = (local >= 0) & (local < rows)
    return local.where(mine, 0), mine
