"""The order of all training samples over all sources: sample n is computed from n, the configuration and the data."""

from __future__ import annotations

import hashlib
from bisect import bisect_right

import numpy as np

from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import parts
from data_pipeline.mixture import Mixture, Stage
from data_pipeline.order import SampleOrder
from data_pipeline.rows import Rows
from data_pipeline.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError


class SampleStream:
    """Training sample n, counted from 0 over all ranks and passes, for any n in any order.

    Attributes:
        end: how many samples there are before every source has reached its max_epochs; None is without end.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, seq_len: int, global_batch: int) -> None:
        """Open the shards of `data`, whose preparation has begun, and that of a mixture is complete.

        Args:
            data: the shards, their mixture, curriculum and order.
            tokenizer: that of `data`.
            seq_len: tokens T of a sample.
            global_batch: samples of a step, by which the curriculum counts.

        Raises:
            UserError: a mixture is not complete, a source is shorter than a sample, or a record is damaged.
        """
        self._sources = [_Source(part, tokenizer, seq_len, name, data.is_mixture) for name, part in parts(data).items()]
        self._contiguous = data.contiguous
        self._mixture = Mixture(data.seed, _stages(data, global_batch), self._limits(data))
        self._contexts = {0: seq_len} | {
            stage.from_step * global_batch: stage.seq_len for stage in data.curriculum if stage.seq_len is not None
        }
        self._context_starts = list(self._contexts)
        self.end = None if self._mixture.end is None else self._mixture.end * data.contiguous

    def sample(self, number: int) -> np.ndarray:
        """The tokens (T + 1,) of a sample, as soon as its place in its source is known; not to be written to.

        Raises:
            UserError: a shard is damaged, the preparation died, the data are shorter than a sample, or have ended.
        """
        self.require(number + 1)
        run, within = divmod(number, self._contiguous)
        source, source_run = self._mixture.locate(run)
        return self._sources[source].read(source_run, within)

    def context(self, number: int) -> int:
        """The length in tokens of the sequences that sample `number` is made of."""
        return self._contexts[self._context_starts[bisect_right(self._context_starts, number) - 1]]

    def require(self, samples: int) -> None:
        """Check that there are so many samples.

        Raises:
            UserError: every source has reached its max_epochs before.
        """
        if self.end is not None and samples > self.end:
            raise UserError(
                f"data.sources: after {self.end} samples every source has reached its max_epochs, and {samples} are"
                " asked for; lower train.steps, or raise max_epochs"
            )

    def fingerprint(self, samples: int) -> str:
        """Hexadecimal digits that are equal for two streams that mix and cut the first `samples` samples alike."""
        contexts = [item for item in self._contexts.items() if item[0] < samples]
        runs = -(-samples // self._contiguous)
        sources = "".join(self._sources[source].label for source in self._mixture.sources(runs))
        return hashlib.sha256(f"{contexts} {self._mixture.fingerprint(runs)}{sources}".encode()).hexdigest()[:16]

    def _limits(self, data: DataConfig) -> list[int | None]:
        """The runs that each source may give."""
        epochs = [source.max_epochs for source in data.sources] if data.is_mixture else [None]
        return [
            None if most is None else int(most * source.runs)
            for most, source in zip(epochs, self._sources, strict=True)
        ]


class _Source:
    """One stream of documents, in runs of `data.contiguous` samples."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, seq_len: int, name: str, is_mixed: bool) -> None:
        self._rows = Rows(ShardReader(data.dir, "train", tokenizer.sha256), seq_len, data.best_fit)
        self._size = data.contiguous
        self._order = SampleOrder(data.seed, data.shuffle_window // data.contiguous)
        self._where = f"source {name!r}" if name else "the prepared data"
        self._seq_len, self._is_mixed = seq_len, is_mixed
        if is_mixed and not self._rows.complete:
            raise UserError(f"{data.dir} is not complete, and a mixture must be: run `{PREPARE_COMMAND}`")
        if is_mixed:
            self._check()

    @property
    def label(self) -> str:
        """A mixture's source by its name and size; "" for one that is alone, and may still grow."""
        return f" {self._where} of {self._rows.tokens} tokens" if self._is_mixed else ""

    @property
    def runs(self) -> int:
        """Runs of a pass, so far; samples that do not fill another one are left out."""
        return len(self._rows) // self._size

    def read(self, number: int, within: int) -> np.ndarray:
        """Sample `within` of the `number`-th training run."""
        self._rows.wait_for(self._order.needed(number) * self._size)
        self._check()
        return self._rows.read(self._order.locate(number, self.runs) * self._size + within)

    def _check(self) -> None:
        if self.runs < 1:
            raise UserError(
                f"{self._where} hold{'s' if self._where[0] == 's' else ''} {self._rows.tokens} tokens to train on,"
                f" less than data.contiguous = {self._size} samples of model.seq_len + 1 = {self._seq_len + 1};"
                " add documents, or set one of them lower"
            )


def _stages(data: DataConfig, global_batch: int) -> list[Stage]:
    """The weights of all sources, from which run on."""
    starts = {0: tuple(source.weight or 1.0 for source in data.sources) if data.is_mixture else (1.0,)}
    for stage in data.curriculum:
        if stage.weights is not None:
            weights = tuple(stage.weights.get(source.name or "", 0.0) for source in data.sources)
            starts[-(-stage.from_step * global_batch // data.contiguous)] = weights
    return [Stage(start, weights) for start, weights in starts.items()]
