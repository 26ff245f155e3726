"""From sources to shards; killed at any moment and run again, it leaves the very bytes of an unbroken run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import get_args

import numpy as np

from data_pipeline.encode import Encoded, encode_stream, is_held_out
from data_pipeline.files import make_folder
from data_pipeline.lock import preparation_lock
from data_pipeline.manifest import (
    INDEX_FILE,
    PREPARATION_FILE,
    Index,
    Packing,
    Preparation,
    Shard,
    Skips,
    Split,
    Table,
    Totals,
    parts,
    read_preparation,
    read_shard,
    settings_of,
    tokenizer_path,
)
from data_pipeline.prepared import complete_index, open_tokenizer
from data_pipeline.progress import Progress, Tally
from data_pipeline.shards import Contents, Layout, is_whole, open_tokens, write_shard
from data_pipeline.sources import Document, Skipped, iterate_documents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from loglinear.config import DataConfig, SourceConfig
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
    make_data_folder(data.dir)
    with preparation_lock(data.dir):
        index = complete_index(data, vocab_size)
        if index is not None and _all_whole(data.dir, index):
            return index
        tally = Tally()
        preparation, layout = _begin(data, vocab_size, tally, progress)
        shards = _make_shards(data, preparation, layout, tally, progress)
        return _finish(data.dir, preparation, layout, shards)


def prepare_all(data: DataConfig, vocab_size: int, progress: Progress = lambda tally: None) -> dict[str, Index]:
    """Prepare `data`, be it a mixture or not: the indices of its parts by name (see `manifest.parts`).

    A mixture's tokenizer is trained on all its sources, each by its weight; they are prepared one after the other.

    Raises:
        UserError: as for `prepare`.
    """
    if not data.is_mixture:
        return {"": prepare(data, vocab_size, progress)}
    make_data_folder(data.dir)
    with preparation_lock(data.dir):
        _begin(data, vocab_size, Tally(), progress)
        return {name: prepare(part, vocab_size, progress) for name, part in parts(data).items()}


def make_data_folder(folder: Path) -> None:
    """Make `data.dir` if it is not there.

    Raises:
        UserError: that is impossible, or it cannot be written to.
    """
    try:
        make_folder(folder)
    except UserError as error:
        raise UserError(f"data.dir: {error}") from None


def _begin(data: DataConfig, vocab_size: int, tally: Tally, progress: Progress) -> tuple[Preparation, Layout]:
    """What the folder is prepared from: as found, or else with a tokenizer and recorded now."""
    for leftover in data.dir.glob("*.tmp"):
        leftover.unlink()
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
        preparation = _describe(data, vocab_size, load_tokenizer(path, vocab_size, data.tokenizer.bos))
        preparation.save(data.dir / PREPARATION_FILE)
    tokenizer = open_tokenizer(data, vocab_size)  # or say what is wrong with it, before workers start
    return preparation, Layout(data.best_fit, tokenizer.bos_id)


def _training_texts(data: DataConfig) -> Iterator[str]:
    """The first documents to train on, `train_bytes` of UTF-8 in all; in a mixture each source gives its share."""
    if not data.is_mixture:
        yield from _first_texts(data, data.sources, data.tokenizer.train_bytes)
        return
    total = sum(source.weight or 0 for source in data.sources)
    for source in data.sources:
        yield from _first_texts(data, [source], data.tokenizer.train_bytes * (source.weight or 0) / total)


def _first_texts(data: DataConfig, sources: Sequence[SourceConfig], train_bytes: float) -> Iterator[str]:
    """The first documents of `sources` that are not held out, until they have `train_bytes`; at least one."""
    size = 0
    for item in iterate_documents(sources, data.seed):
        if isinstance(item, Document) and not is_held_out(item.text, data.held_out):
            yield item.text
            size += len(item.text.encode())
            if size >= train_bytes:
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
            encoded = encode_stream(documents, self._data, tokenizer_path(self._data))
            self._items = self._opened.enter_context(closing(encoded))
            self._position = item

    def __iter__(self) -> Iterator[Encoded | Skipped]:
        for item in self._items:
            self._position += 1
            yield item

    def close(self) -> None:
        """End the workers."""
        self._opened.close()


def _make_shards(
    data: DataConfig, preparation: Preparation, layout: Layout, tally: Tally, progress: Progress
) -> list[Shard]:
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
                shard = write_shard(data.dir, len(shards), first_item, contents, preparation, layout)
            shards.append(shard)
            first_item = shard.end_item


def _kept(folder: Path, number: int, first_item: int, tally: Tally) -> Shard | None:
    """A shard of an earlier run, if it is whole."""
    shard = read_shard(folder, number)
    if shard is None or shard.first_item != first_item:
        return None
    if not all(is_whole(folder, file, shard.dtype) for file in (shard.train, shard.held_out)):
        return None
    both = shard.train + shard.held_out
    tally.count(both.documents, both.text_bytes, both.tokens)
    return shard


def _all_whole(folder: Path, index: Index) -> bool:
    """Whether every token file has its size; their checksums are for `open_tokens`."""
    return all(
        is_whole(folder, index.file(split, number), index.dtype)
        for number in range(index.shards)
        for split in get_args(Split)
    )


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


def _finish(folder: Path, preparation: Preparation, layout: Layout, shards: list[Shard]) -> Index:
    """Verify every file, sum up, and write the index."""
    counts = np.zeros(preparation.vocab_size, np.int64)
    skipped: dict[str, Skips] = {}
    for shard in shards:
        open_tokens(folder, shard.held_out, shard.dtype)
        counts += np.bincount(open_tokens(folder, shard.train, shard.dtype), minlength=len(counts))
        for reason, skips in shard.skipped.items():
            skipped[reason] = skipped.get(reason, Skips()) + skips
    packing = sum((shard.packing for shard in shards), Packing())
    counts[layout.bos_id] -= packing.padding
    if not counts.any():
        raise UserError("data.sources: they hold no text to train on; add a source with text")
    index = Index(
        **dict(preparation),
        train=sum((shard.train for shard in shards), Totals()),
        held_out=sum((shard.held_out for shard in shards), Totals()),
        packing=packing,
        unigram_entropy=_entropy(counts),
        skipped=skipped,
        train_files=Table.of([shard.train for shard in shards]),
        held_out_files=Table.of([shard.held_out for shard in shards]),
    )
    index.save(folder / INDEX_FILE)
    return index


def _entropy(counts: np.ndarray) -> float:
    """The entropy in nats of what was counted (pieces,)."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
