"""The order of training samples: a pure function of the seed and of a sample's number.

Sample i of the stream is its tokens [i T, i T + T], T + 1 of them for a sequence length of T; neighbours
share one token, so that every token but the very first is a label once. The stream is cut into windows of
`window` samples, and samples are shuffled inside their window. In the first pass (epoch 0) the windows come
in stream order, so training may begin while later shards are still being made, and sees the same order as if
it had waited; that is why the files of a folder are shuffled before (see `iterate_documents`). In later
passes the full windows are shuffled too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True)
class SampleOrder:
    """Which of the stream's samples is trained on when, for endless passes over it."""

    seed: int
    window: int

    def needed(self, number: int) -> int:
        """How many samples the stream must have for number `number` to be known before its end is."""
        return (number // self.window + 1) * self.window

    def locate(self, number: int, total: int) -> int:
        """The index in the stream of the `number`-th training sample, counted from 0 through all passes.

        `total` is the number of samples in the stream; while that is unknown, any number from
        `needed(number)` up to it gives the same answer.
        """
        epoch, place = divmod(number, total)
        window, offset = divmod(place, self.window)
        full_windows = total // self.window
        if epoch and window < full_windows:  # a shorter last window stays last
            window = int(_permutation(f"{self.seed} {epoch}", full_windows)[window])
        size = min(self.window, total - window * self.window)
        return window * self.window + int(_permutation(f"{self.seed} {epoch} {window}", size)[offset])


@lru_cache(maxsize=16)
def _permutation(key: str, size: int) -> np.ndarray:
    """The permutation (size,) that belongs to `key`.

    It comes from raw Philox words, which are the same in all versions of NumPy; its own shuffles are not.
    """
    seed = int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "big")
    words = np.random.Philox(key=seed).random_raw(size)
    return np.argsort(words, kind="stable")
