"""The held-out set as batches, the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.batch import Batch, make_batch
from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.prepared import open_tokenizer
from data_pipeline.shards import ShardReader
from loglinear.config import DataConfig
from loglinear.errors import UserError


def held_out_batches(
    data: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    batch: int,
    limit_samples: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's part of the first `limit_samples` held-out samples, in an order that never changes.

    Over all ranks every token but the set's first is a label just once. The last sample is padded, and every
    rank gets equally many batches of `batch` samples, if need be of padding alone, so that collectives match.
    Waits for a preparation that is still under way until it has that many samples or is complete.

    Raises:
        UserError: nothing is prepared or held out, other settings were, or a shard is missing or damaged.
    """
    tokenizer = open_tokenizer(data, vocab_size)
    reader = ShardReader(data.dir, "held_out", tokenizer.sha256)
    reader.wait_for(limit_samples * seq_len + 1)
    samples = min(limit_samples, -(-(reader.tokens - 1) // seq_len))
    if samples < 1:
        raise UserError(
            f"{data.dir} holds no held-out text to evaluate on: add documents, or raise data.held_out,"
            f" and run `{PREPARE_COMMAND}`"
        )

    def sample(number: int) -> np.ndarray:
        start = number * seq_len if number < samples else reader.tokens
        return reader.read(start, min(start + seq_len + 1, reader.tokens))

    def batches() -> Iterator[Batch]:
        for first in range(rank * batch, samples + rank * batch, world_size * batch):
            numbers = range(first, first + batch)
            yield make_batch([sample(n) for n in numbers], seq_len, tokenizer.bos_id, tokenizer.unk_id)

    return batches()
