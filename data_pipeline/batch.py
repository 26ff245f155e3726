"""A micro-batch of packed documents. Shapes: b samples, t tokens of a sample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of padding; cross entropy leaves it out


class Batch(NamedTuple):
    """What one forward pass takes.

    Attributes:
        inputs: int64 (b, t).
        labels: int64 (b, t), the token after each input, be it the next document's bos; `IGNORED` on padding.
        cu_seqlens: int32 (documents + 1,), where documents start in the row of all b t inputs, and b t.
            Every sample starts one too, for no state passes from one sample into the next.
    """

    inputs: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory the copy does not block."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def make_batch(samples: list[np.ndarray], seq_len: int, bos_id: int, padding: int) -> Batch:
    """A batch of `samples`, each of at most seq_len + 1 tokens; shorter ones are filled with `padding`."""
    inputs_bt = np.full((len(samples), seq_len), padding, np.int64)
    labels_bt = np.full((len(samples), seq_len), IGNORED, np.int64)
    for row, tokens in enumerate(samples):
        inputs_bt[row, : len(tokens)] = tokens[:seq_len]
        labels_bt[row, : max(len(tokens) - 1, 0)] = tokens[1:]
    return Batch(
        torch.from_numpy(inputs_bt),
        torch.from_numpy(labels_bt),
        torch.from_numpy(_cu_seqlens(inputs_bt, bos_id)),
    )


def _cu_seqlens(inputs_bt: np.ndarray, bos_id: int) -> np.ndarray:
    starts_bt = inputs_bt == bos_id
    starts_bt[:, 0] = True
    return np.append(np.flatnonzero(starts_bt), inputs_bt.size).astype(np.int32)
