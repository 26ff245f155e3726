"""Shards to batches: the endless train stream of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.batch import Batch, make_batch
from data_pipeline.prepared import open_tokenizer
from data_pipeline.state import DataState
from data_pipeline.stream import SampleStream
from loglinear.config import DataConfig
from loglinear.errors import UserError


class TrainLoader:
    """The micro-batches of one rank, step after step, without end.

    Step s takes the `global_batch` samples from `start_sample + s global_batch` on; a rank takes one
    contiguous part of them in micro-batches. So a step's samples are the same for every number of ranks and
    of workers. Batches wait for a preparation that is still under way, except those of a mixture.

    Attributes:
        micro_batches_per_step: how many batches of this rank make a step.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        vocab_size: int,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
    ) -> None:
        """Open `data.dir`, whose preparation must have begun.

        Args:
            data: the shards, and how to shuffle and load them.
            vocab_size: embeddings of the model; the tokenizer may have fewer pieces.
            seq_len: tokens of a sample.
            global_batch: samples of a step over all ranks.
            micro_batch: samples of a batch.
            rank: this one of `world_size` data-parallel ranks.
            world_size: data-parallel ranks.
            start_sample: samples that were consumed before, by all ranks together.

        Raises:
            UserError: nothing is prepared, other settings were, or the batches do not divide evenly.
        """
        if data.best_fit not in (None, seq_len):
            raise UserError(f"data.best_fit ({data.best_fit}) must equal the sample's length ({seq_len})")
        self._data = data
        self._seq_len = seq_len
        self._share = _Share(start_sample, global_batch, micro_batch, rank, world_size)
        self.micro_batches_per_step = self._share.micro_batches
        tokenizer = open_tokenizer(data, vocab_size)
        self._tokenizer_sha256 = tokenizer.sha256
        self._stream = SampleStream(data, tokenizer, seq_len, global_batch)
        self._batches = _MicroBatches(self._stream, seq_len, tokenizer.bos_id, self._share)

    def require(self, steps: int) -> None:
        """Check that the data suffice for `steps` steps of this loader.

        Raises:
            UserError: every source reaches its max_epochs before.
        """
        self._stream.require(self._share.start_sample + steps * self._share.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches from `start_sample` on.

        Raises:
            UserError: a shard is damaged, the preparation died, or the data are shorter than a sample.
        """
        batches = DataLoader(
            self._batches,
            batch_size=None,
            sampler=count(),  # pyright: ignore[reportArgumentType]  # endless, so without a length
            num_workers=self._data.loader_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it would draw from the model's random numbers
        )
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def state(self, steps: int) -> DataState:
        """The state after `steps` steps of this loader."""
        samples = self._share.start_sample + steps * self._share.global_batch
        return DataState(
            samples=samples,
            seed=self._data.seed,
            seq_len=self._seq_len,
            shuffle_window=self._data.shuffle_window,
            contiguous=self._data.contiguous,
            best_fit=self._data.best_fit,
            tokenizer_sha256=self._tokenizer_sha256,
            mixture=self._stream.fingerprint(samples),
        )


@dataclass(frozen=True)
class _Share:
    """Which samples, by their numbers in training order, a rank takes."""

    start_sample: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step.

        Raises:
            UserError: the batches do not divide evenly.
        """
        per_step, rest = divmod(self.global_batch, self.micro_batch * self.world_size)
        if rest:
            raise UserError(
                f"train.global_batch ({self.global_batch}) must be a multiple of train.micro_batch"
                f" ({self.micro_batch}) times the number of data-parallel ranks ({self.world_size})"
            )
        return per_step

    def numbers(self, index: int) -> range:
        """The samples of micro-batch `index`, counted from the rank's first step on."""
        step, within = divmod(index, self.micro_batches)
        first = self.start_sample + step * self.global_batch
        first += (self.rank * self.micro_batches + within) * self.micro_batch
        return range(first, first + self.micro_batch)


class _MicroBatches(Dataset):
    """Micro-batch i of a rank, for any i; what the loader's workers run."""

    def __init__(self, stream: SampleStream, seq_len: int, bos_id: int, share: _Share) -> None:
        self._stream, self._seq_len, self._bos_id, self._share = stream, seq_len, bos_id, share

    def __getitem__(self, index: int) -> Batch | UserError:
        """The batch, or a user's mistake: raised in a worker, it would arrive with a stack trace in it."""
        numbers = self._share.numbers(index)
        try:
            samples = [self._stream.sample(number) for number in numbers]
        except UserError as error:
            return error
        return make_batch(samples, self._seq_len, self._bos_id, [self._stream.context(number) for number in numbers])
