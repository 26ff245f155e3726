"""Documents as they lie in token files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.manifest import Index, Split, parts
from data_pipeline.prepared import complete_index, open_tokenizer
from data_pipeline.shards import open_tokens
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError


@dataclass(frozen=True)
class Part:
    """A prepared folder that is complete: its name in the mixture, and what it holds."""

    name: str
    data: DataConfig
    index: Index

    def tokens(self, split: Split, shard: int) -> np.ndarray:
        """The tokens (tokens,) of a file, after its checksum was found right.

        Raises:
            UserError: the file is missing or damaged.
        """
        return open_tokens(self.data.dir, self.index.file(split, shard), self.index.dtype)


def open_parts(data: DataConfig, vocab_size: int) -> tuple[Tokenizer, list[Part]]:
    """The tokenizer and all parts of `data`, for those who need them complete.

    Raises:
        UserError: a preparation is not complete, or has other settings.
    """
    tokenizer = open_tokenizer(data, vocab_size)
    found = []
    for name, part in parts(data).items():
        index = complete_index(part, vocab_size)
        if index is None:
            raise UserError(f"{part.dir} is not completely prepared: run `loglinear data prepare CONFIG` before")
        found.append(Part(name, part, index))
    return tokenizer, found


def bounds(tokens: np.ndarray, bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Where documents, or pieces of them at the start of packed rows, start at their bos, and where they end.

    Filling, which is bos before bos, is no document.
    """
    starts = np.flatnonzero(tokens == bos_id)
    ends = np.append(starts[1:], len(tokens))
    real = ends - starts > 1
    return starts[real], ends[real]
