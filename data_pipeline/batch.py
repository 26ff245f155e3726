"""A micro-batch of packed documents. Shapes: b samples, t tokens of a sample."""

from __future__ import annotations

from collections.abc import Sequence
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


def make_batch(samples: Sequence[np.ndarray], seq_len: int, bos_id: int, contexts: Sequence[int]) -> Batch:
    """Inputs and labels of `samples`, each of at most `seq_len` + 1 tokens.

    Shorter samples are filled up with bos, and so are packed ones already. As every document has a token after
    its bos, a bos before another one is filling, and has no label. A sequence starts at a document's bos, where
    filling starts, and after each `contexts[i]` tokens of sample i, which divide `seq_len`.
    """
    tokens_bt = np.full((len(samples), seq_len + 1), bos_id, samples[0].dtype)
    for row_t, sample_t in zip(tokens_bt, samples, strict=True):
        row_t[: len(sample_t)] = sample_t
    is_bos_bt = tokens_bt == bos_id
    labels_bt = tokens_bt[:, 1:].astype(np.int64)
    labels_bt[is_bos_bt[:, :-1] & is_bos_bt[:, 1:]] = IGNORED
    for label_t, sample_t in zip(labels_bt, samples, strict=True):
        label_t[max(len(sample_t) - 1, 0) :] = IGNORED  # the label of a last token is not known
    return Batch(
        torch.from_numpy(tokens_bt[:, :-1].astype(np.int64)),
        torch.from_numpy(labels_bt),
        torch.from_numpy(_cu_seqlens(is_bos_bt, contexts)),
    )


def _cu_seqlens(is_bos_bt: np.ndarray, contexts: Sequence[int]) -> np.ndarray:
    starts_bt = is_bos_bt[:, :-1].copy()
    starts_bt[:, 1:] &= ~is_bos_bt[:, :-2]
    for starts_t, context in zip(starts_bt, contexts, strict=True):
        starts_t[::context] = True
    return np.append(np.flatnonzero(starts_bt), starts_bt.size).astype(np.int32)
