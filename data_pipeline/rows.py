"""The train tokens of a prepared folder as samples: rows of T + 1 tokens, T of them inputs and T labels."""

from __future__ import annotations

import numpy as np

from data_pipeline.shards import ShardReader


class Rows:
    """Sample i of a stream is T + 1 tokens from token i T on: neighbours share one, so that every token but the
    very first is a label once. Of a folder packed by `data.best_fit`, it is the i-th row of T + 1 tokens."""

    def __init__(self, reader: ShardReader, seq_len: int, best_fit: int | None) -> None:
        """Cut what `reader` reads into samples of `seq_len` inputs; `best_fit` is as in the configuration."""
        assert best_fit in (None, seq_len)
        self._reader = reader
        self._size = seq_len + 1
        self._stride = seq_len if best_fit is None else self._size

    @property
    def tokens(self) -> int:
        """How many tokens are there so far."""
        return self._reader.tokens

    @property
    def complete(self) -> bool:
        """Whether that is all."""
        return self._reader.complete

    def __len__(self) -> int:
        return max(0, (self.tokens - self._size) // self._stride + 1)

    def wait_for(self, samples: int) -> None:
        """Return once there are so many samples, or all that there will ever be.

        Raises:
            UserError: the preparation ended before it was complete.
        """
        self._reader.wait_for(self._tokens_of(samples))

    def has(self, samples: int) -> bool:
        """Whether by now there are so many samples, or all that there will ever be."""
        return self._reader.has(self._tokens_of(samples))

    def read(self, sample: int) -> np.ndarray:
        """The tokens (T + 1,) of a sample, not to be written to.

        Raises:
            UserError: a shard is missing, truncated or damaged.
        """
        start = sample * self._stride
        return self._reader.read(start, start + self._size)

    def _tokens_of(self, samples: int) -> int:
        return (samples - 1) * self._stride + self._size
