"""From sources to shards; killed at any moment and run again, it leaves the very bytes of an unbroken run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from data_pipeline.encode import Encoded, encode_stream, is_held_out
from data_pipeline.lock import preparation_lock
from data_pipeline.manifest import (
    INDEX_FILE,
    PREPARATION_FILE,
    Index,
    Preparation,
    Shard,
    Skips,
    Totals,
    read_preparation,
    read_shard,
    settings_of,
    tokenizer_path,
)
from data_pipeline.prepared import complete_index, open_tokenizer
from data_pipeline.progress import Progress, Tally
from data_pipeline.shards import Contents, is_whole, open_tokens, write_shard
from data_pipeline.sources import Document, Skipped, iterate_documents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError


def prepare(data: DataConfig, vocab_size: int, progress: Progress = lambda tally: None) -> Index:
    """Make the tokenizer, all shards and the index of `data.dir`, or what of them is missing.

    Args:
        data: what to prepare; `data.prepare_workers` processes tokenise, and do not change the result.
        vocab_size: pieces of a trained tokenizer, and the most that a given one may have.
        progress: told after every document.

    Raises:
        UserError: a source or the tokenizer is unfit, the folder holds data of other settings, another
            process is preparing it, or one of its files is damaged.
    """
    make_folder(data.dir)
    with preparation_lock(data.dir):
        index = complete_index(data, vocab_size)
        if index is not None:
            return index
        for leftover in data.dir.glob("*.tmp"):
            leftover.unlink()
        tally = Tally()
        preparation = _begin(data, vocab_size, tally, progress)
        open_tokenizer(data, vocab_size)  # or say what is wrong with it, before workers start
        shards = _make_shards(data, preparation, tally, progress)
        return _finish(data.dir, preparation, shards)


def make_folder(folder: Path) -> None:
    """Make `data.dir` if it is not there.

    Raises:
        UserError: that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.dir: cannot make {folder} ({error.strerror}); set another data.dir") from None


def _begin(data: DataConfig, vocab_size: int, tally: Tally, progress: Progress) -> Preparation:
    """What the folder is prepared from: as found, or else with a tokenizer and recorded now."""
    preparation = read_preparation(data.dir)
    if preparation is not None:
        preparation.check(data, vocab_size)
    path = tokenizer_path(data)
    if data.tokenizer.path is None and (preparation is None or not path.exists()):
        tally.stage = "training the tokenizer"
        progress(tally)
        train_tokenizer(_training_texts(data), vocab_size, path)
    if preparation is None:
        _forget_shards(data.dir)
        preparation = _describe(data, vocab_size, load_tokenizer(path, vocab_size))
        preparation.save(data.dir / PREPARATION_FILE)
    return preparation


def _training_texts(data: DataConfig) -> Iterator[str]:
    """The first documents to train on, `train_bytes` of UTF-8 in all and at least one."""
    size = 0
    for item in iterate_documents(data.sources, data.seed):
        if isinstance(item, Document) and not is_held_out(item.text, data.held_out):
            yield item.text
            size += len(item.text.encode())
            if size >= data.tokenizer.train_bytes:
                return


def _forget_shards(folder: Path) -> None:
    """Remove records of shards of unknown settings: nothing says any more how they were made."""
    for record in (*folder.glob("shard-*.json"), folder / INDEX_FILE):
        record.unlink(missing_ok=True)


def _describe(data: DataConfig, vocab_size: int, tokenizer: Tokenizer) -> Preparation:
    return Preparation(
        settings=settings_of(data, vocab_size),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=tokenizer.dtype_name,
    )


class _Stream:
    """The tokenised documents of all sources, from any item on; workers start at the first `seek`."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._opened = ExitStack()
        self._position = -1
        self._items: Iterator[Encoded | Skipped] = iter(())

    def seek(self, item: int) -> None:
        """Make `item` the next one."""
        if item != self._position:
            self.close()
            documents = iterate_documents(self._data.sources, self._data.seed, skip=item)
            encoded = encode_stream(
                documents, tokenizer_path(self._data), self._data.held_out, self._data.prepare_workers
            )
            self._items = self._opened.enter_context(closing(encoded))
            self._position = item

    def __iter__(self) -> Iterator[Encoded | Skipped]:
        for item in self._items:
            self._position += 1
            yield item

    def close(self) -> None:
        """End the workers."""
        self._opened.close()


def _make_shards(data: DataConfig, preparation: Preparation, tally: Tally, progress: Progress) -> list[Shard]:
    """All shards in order; those that are whole are kept, the others are made."""
    shards: list[Shard] = []
    first_item = 0
    tally.stage = "tokenising"
    with closing(_Stream(data)) as stream:
        while True:
            shard = _kept(data.dir, len(shards), first_item, tally)
            if shard is None:
                stream.seek(first_item)
                contents = _take(stream, data.shard_tokens, tally, progress)
                if contents.items == 0:
                    return shards
                shard = write_shard(data.dir, len(shards), first_item, contents, preparation)
            shards.append(shard)
            first_item = shard.end_item


def _kept(folder: Path, number: int, first_item: int, tally: Tally) -> Shard | None:
    """A shard of an earlier run, if it is whole."""
    shard = read_shard(folder, number)
    if shard is None or shard.first_item != first_item or not is_whole(folder, shard):
        return None
    both = shard.train + shard.held_out
    tally.count(both.documents, both.text_bytes, both.tokens)
    return shard


def _take(stream: _Stream, shard_tokens: int, tally: Tally, progress: Progress) -> Contents:
    """The next items of the stream: as many as fill a shard, or all that are left."""
    contents = Contents()
    for item in stream:
        contents.add(item)
        if isinstance(item, Encoded):
            tally.count(1, item.text_bytes, len(item.tokens))
            progress(tally)
        if contents.tokens >= shard_tokens:
            break
    return contents


def _finish(folder: Path, preparation: Preparation, shards: list[Shard]) -> Index:
    """Verify every file, sum up, and write the index."""
    counts = np.zeros(preparation.vocab_size, np.int64)
    skipped: dict[str, Skips] = {}
    for shard in shards:
        open_tokens(folder, shard.held_out, shard.dtype)
        counts += np.bincount(open_tokens(folder, shard.train, shard.dtype), minlength=len(counts))
        for reason, skips in shard.skipped.items():
            skipped[reason] = skipped.get(reason, Skips()) + skips
    if not counts.any():
        raise UserError("data.sources: they hold no text to train on; add a source with text")
    index = Index(
        **dict(preparation),
        train=sum((shard.train for shard in shards), Totals()),
        held_out=sum((shard.held_out for shard in shards), Totals()),
        unigram_entropy=_entropy(counts),
        skipped=skipped,
        shards=tuple(shards),
    )
    index.save(folder / INDEX_FILE)
    return index


def _entropy(counts: np.ndarray) -> float:
    """The entropy in nats of what was counted (pieces,)."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
