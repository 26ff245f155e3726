"""The held-out set as batches, the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest

import numpy as np

from data_pipeline.batch import Batch, make_batch
from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import parts
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
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """This rank's part of the first `limit_samples` held-out samples, in an order that never changes.

    Over all ranks every token but a source's first is a label just once. Sources of a mixture take turns, each with
    its first samples. A source's last sample is padded, and every rank gets equally many batches of `batch`
    samples, if need be of padding alone, so that collectives match. Waits for a preparation that is still under
    way until it has that many samples or is complete, and calls `meanwhile` again and again.

    Raises:
        UserError: nothing is prepared or held out, other settings were, or a shard is missing or damaged.
    """
    tokenizer = open_tokenizer(data, vocab_size)
    readers = [ShardReader(part.dir, "held_out", tokenizer.sha256) for part in parts(data).values()]
    for reader in readers:
        reader.wait_for(limit_samples * seq_len + 1, meanwhile)
    places = _places([reader.tokens for reader in readers], seq_len, limit_samples)
    if not places:
        raise UserError(
            f"{data.dir} holds no held-out text to evaluate on: add documents, or raise data.held_out,"
            f" and run `{PREPARE_COMMAND}`"
        )

    def sample(number: int) -> np.ndarray:
        if number >= len(places):
            return np.empty(0, tokenizer.dtype_name)
        source, start = places[number]
        return readers[source].read(start, min(start + seq_len + 1, readers[source].tokens))

    def batches() -> Iterator[Batch]:
        for first in range(rank * batch, len(places) + rank * batch, world_size * batch):
            samples = [sample(number) for number in range(first, first + batch)]
            yield make_batch(samples, seq_len, tokenizer.bos_id, [seq_len] * batch)

    return batches()


def _places(tokens: Sequence[int], seq_len: int, limit: int) -> list[tuple[int, int]]:
    """Source and first token of each sample: of sources with so many `tokens`, taken in turns, at most `limit`."""
    turns = [[(source, start) for start in range(0, count - 1, seq_len)][:limit] for source, count in enumerate(tokens)]
    in_turns = (place for turn in zip_longest(*turns) for place in turn if place is not None)
    return list(islice(in_turns, limit))
