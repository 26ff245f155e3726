"""Token shards: writing them, and reading a split as one long row of tokens while it may still grow."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.encode import Encoded
from data_pipeline.files import PREPARE_COMMAND, sha256_file, write_bytes
from data_pipeline.lock import is_preparing, preparation_ended
from data_pipeline.manifest import (
    DType,
    Preparation,
    Shard,
    Skips,
    Split,
    TokenFile,
    read_index,
    read_shard,
    shard_path,
)
from data_pipeline.sources import Skipped
from loglinear.errors import UserError

POLL_SECONDS = 0.5


@dataclass
class Contents:
    """What goes into one shard."""

    items: int = 0
    tokens: int = 0
    train: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    skipped: dict[str, Skips] = field(default_factory=dict)

    def add(self, item: Encoded | Skipped) -> None:
        """Take the next item of the stream."""
        self.items += 1
        if isinstance(item, Skipped):
            skip = Skips(count=1, first=(item.name,))
            self.skipped[item.reason] = self.skipped.get(item.reason, Skips()) + skip
            return
        self.tokens += len(item.tokens)
        (self.held_out if item.held_out else self.train).append(item)


def write_shard(folder: Path, number: int, first_item: int, contents: Contents, preparation: Preparation) -> Shard:
    """Write the token files of shard `number` and then its record.

    Raises:
        UserError: the folder holds a record of this shard with other contents, so the sources have changed.
    """
    train = _pack(f"train-{number:05d}.bin", contents.train, preparation.dtype)
    held_out = _pack(f"held_out-{number:05d}.bin", contents.held_out, preparation.dtype)
    shard = Shard(
        number=number,
        first_item=first_item,
        end_item=first_item + contents.items,
        dtype=preparation.dtype,
        tokenizer_sha256=preparation.tokenizer_sha256,
        train=train[0],
        held_out=held_out[0],
        skipped=contents.skipped,
    )
    if read_shard(folder, number) not in (None, shard):
        raise UserError(
            f"{folder}: shard {number} cannot be made again, for the sources have changed since;"
            " set another data.dir, or delete this one and prepare it anew"
        )
    for file, tokens in (train, held_out):
        write_bytes(folder / file.name, tokens.data)
    shard.save(shard_path(folder, number))
    return shard


def _pack(name: str, documents: Sequence[Encoded], dtype: DType) -> tuple[TokenFile, np.ndarray]:
    """The record of a token file, and its tokens (tokens,)."""
    empty = np.empty(0, _little_endian(dtype))
    tokens = np.concatenate([empty, *(document.tokens for document in documents)], dtype=empty.dtype)
    file = TokenFile(
        name=name,
        tokens=len(tokens),
        documents=len(documents),
        text_bytes=sum(document.text_bytes for document in documents),
        sha256=hashlib.sha256(tokens.data).hexdigest(),
    )
    return file, tokens


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether both token files are there in full size; their checksums are for `open_tokens`."""
    files = (shard.train, shard.held_out)
    return all(_size(folder / file.name) == _bytes(file, shard.dtype) for file in files)


def open_tokens(folder: Path, file: TokenFile, dtype: DType) -> np.ndarray:
    """The tokens (tokens,) of a file, mapped from disk after its size and checksum were found right.

    Raises:
        UserError: the file is missing, truncated or damaged.
    """
    path = folder / file.name
    remedy = f"delete it and run `{PREPARE_COMMAND}`, which makes it again"
    size, expected = _size(path), _bytes(file, dtype)
    if size is None:
        raise UserError(f"{path} is missing; run `{PREPARE_COMMAND}`, which makes it again")
    if size != expected:
        problem = "truncated" if size < expected else "too long"
        raise UserError(f"{path} is {problem}: {size} bytes instead of {expected}; {remedy}")
    found = sha256_file(path)
    if found != file.sha256:
        raise UserError(f"{path} is damaged: its SHA-256 is {found} instead of {file.sha256}; {remedy}")
    little_endian = _little_endian(dtype)
    return np.memmap(path, little_endian, "r") if size else np.empty(0, little_endian)


class ShardReader:
    """The tokens of one split as one row, shard after shard; the row grows while a preparation runs.

    Attributes:
        tokens: how many tokens are there so far.
        complete: whether that is all.
    """

    def __init__(self, folder: Path, split: Split, tokenizer_sha256: str) -> None:
        """Find the shards that are there.

        Raises:
            UserError: a record is damaged, or a shard was made with another tokenizer.
        """
        self.complete = False
        self._folder = folder
        self._split: Split = split
        self._tokenizer_sha256 = tokenizer_sha256
        self._shards: list[Shard] = []
        self._starts = [0]  # where each shard starts in the row, and where the last one ends
        self._open: dict[int, np.ndarray] = {}
        self._refresh()

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    def wait_for(self, tokens: int) -> None:
        """Return once the row has that many tokens, or all that it will ever have.

        Raises:
            UserError: the preparation ended before it was complete.
        """
        while not self._reaches(tokens):
            alive = is_preparing(self._folder)
            self._refresh()  # after the question: it may have finished just before it ended
            if self._reaches(tokens):
                return
            if not alive:
                raise preparation_ended(self._folder)
            time.sleep(POLL_SECONDS)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the row, as int64 (stop - start,).

        Raises:
            UserError: a shard is missing, truncated or damaged; found before any token of it is served.
        """
        assert 0 <= start <= stop <= self.tokens
        parts = [np.empty(0, np.int64)]
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            offset = self._starts[number]
            end = min(stop, self._starts[number + 1])
            parts.append(self._tokens_of(number)[start - offset : end - offset])
            start, number = end, number + 1
        return np.concatenate(parts, dtype=np.int64)

    def _reaches(self, tokens: int) -> bool:
        return self.complete or self.tokens >= tokens

    def _tokens_of(self, number: int) -> np.ndarray:
        if number not in self._open:
            shard = self._shards[number]
            self._open[number] = open_tokens(self._folder, shard.file(self._split), shard.dtype)
        return self._open[number]

    def _refresh(self) -> None:
        index = read_index(self._folder)
        if index is not None:
            self._append(index.shards[len(self._shards) :])
            self.complete = True
            return
        while shard := read_shard(self._folder, len(self._shards)):
            self._append([shard])

    def _append(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            if shard.tokenizer_sha256 != self._tokenizer_sha256:
                raise UserError(
                    f"{shard_path(self._folder, shard.number)} was made with the tokenizer of SHA-256"
                    f" {shard.tokenizer_sha256}, not with {self._tokenizer_sha256};"
                    " restore that tokenizer, or set another data.dir"
                )
            self._shards.append(shard)
            self._starts.append(self._starts[-1] + shard.file(self._split).tokens)


def _little_endian(dtype: DType) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _bytes(file: TokenFile, dtype: DType) -> int:
    return file.tokens * np.dtype(dtype).itemsize


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
