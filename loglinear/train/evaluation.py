"""How well the model predicts held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from data_pipeline.batch import IGNORED, Batch
from loglinear.parallel import World


@torch.no_grad()
def held_out_loss(loss_sum: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], world: World) -> float:
    """Mean cross-entropy per token over the batches of all ranks, in nats.

    Args:
        loss_sum: cross-entropy summed over the labels of a batch.
        batches: this rank's, as many as every other rank's.
        world: the ranks to sum over.
    """
    total = tokens = 0.0
    for batch in batches:
        total += loss_sum(batch).item()
        tokens += (batch.labels != IGNORED).sum().item()
    total, tokens = world.sum(total, tokens)
    return total / tokens
