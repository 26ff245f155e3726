"""How well the model predicts held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from data_pipeline.batch import IGNORED, Batch
from loglinear.parallel import Mesh


@torch.no_grad()
def held_out_loss(loss_sum: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], mesh: Mesh) -> float:
    """Mean cross-entropy per token over the batches of all ranks, in nats.

    Args:
        loss_sum: cross-entropy summed over the labels of this rank's part of a batch.
        batches: those of this rank's place along the data axis, as many as at every other place.
        mesh: the ranks to sum over.
    """
    total = tokens = 0.0
    for batch in batches:
        total += loss_sum(batch).item()
        tokens += (batch.labels != IGNORED).sum().item()
    total, tokens = mesh.world.sum(total, tokens)
    return total / tokens * mesh.context.size  # every context rank counted the tokens of whole samples
