"""How well the model predicts held-out text. Shapes: b batch, t time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data_pipeline.batch import IGNORED, Batch
from loglinear.model import LanguageModel
from loglinear.ops.fenwick import bit_length
from loglinear.parallel import Mesh, local_batch


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


@dataclass(frozen=True)
class PositionLoss:
    """Mean cross-entropy in nats of the `tokens` labels whose inputs stand at positions [start, end) of a document."""

    start: int
    end: int
    loss: float
    tokens: int


@torch.no_grad()
def losses_by_position(model: LanguageModel, batches: Iterable[Batch], mesh: Mesh) -> list[PositionLoss]:
    """The loss by how far into its document a token stands: at 0, 1, 2 to 3, 4 to 7 and so on, as far as there are any.

    These are the tokens whose oldest bucket is of one size, so the last rows tell what long memory is worth.

    Args:
        model: this rank's part.
        batches: those of this rank's place along the data axis.
        mesh: the ranks to sum over; none share sequences.
    """
    sums = torch.zeros(2, 64, dtype=torch.float64)
    for batch in batches:
        inputs_bt, labels_bt, documents = local_batch(*batch, mesh)
        surprise = F.cross_entropy(
            model(inputs_bt, documents=documents).flatten(0, 1), labels_bt.flatten(), reduction="none"
        )
        level = torch.from_numpy(bit_length(documents.positions_bt.flatten().cpu().numpy()))
        counts = labels_bt.flatten() != IGNORED
        for kind, values in enumerate((surprise, counts)):
            sums[kind].index_add_(0, level, values.cpu().double())
    sums /= mesh.tensor.size  # each of these ranks has counted the same
    losses, counts = torch.tensor(mesh.world.sum(*sums.flatten().tolist())).view(2, -1).tolist()
    bins = ((0 if level == 0 else 1 << (level - 1), 1 << level) for level in range(64))
    found = zip(bins, losses, counts, strict=True)
    return [PositionLoss(*place, loss / int(count), int(count)) for place, loss, count in found if count]
