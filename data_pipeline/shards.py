"""Token shards: writing them, and reading a split as one long row of tokens while it may still grow."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_pipeline.encode import Encoded
from data_pipeline.files import PREPARE_COMMAND, sha256_file, write_bytes
from data_pipeline.lock import wait_while_preparing
from data_pipeline.manifest import (
    EXAMPLES,
    DType,
    Index,
    Packing,
    Preparation,
    Shard,
    Skips,
    Split,
    TokenFile,
    file_name,
    read_index,
    read_shard,
    shard_path,
)
from data_pipeline.packing import pack_best_fit
from data_pipeline.sources import Skipped
from loglinear.errors import UserError

MOST_OPEN = 256  # mapped files; the kernel has a limit


@dataclass
class Contents:
    """What goes into one shard; `skipped` names by reason whatever was left out, `EXAMPLES` of each."""

    items: int = 0
    tokens: int = 0
    train: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    skips: Counter[str] = field(default_factory=Counter)

    def add(self, item: Encoded | Skipped) -> None:
        """Take the next item of the stream."""
        self.items += 1
        if isinstance(item, Skipped):
            self.skips[item.reason] += 1
            if self.skips[item.reason] <= EXAMPLES:
                self.skipped.setdefault(item.reason, []).append(item.name)
            return
        self.tokens += len(item.tokens)
        (self.held_out if item.held_out else self.train).append(item)


@dataclass(frozen=True)
class Layout:
    """How documents lie in train files: as they come, or, with `best_fit`, in rows of so many tokens and one."""

    best_fit: int | None
    bos_id: int


def write_shard(
    folder: Path, number: int, first_item: int, contents: Contents, preparation: Preparation, layout: Layout
) -> Shard:
    """Write the token files of shard `number` and then its record.

    Raises:
        UserError: the folder holds a record of this shard with other contents, so the sources have changed.
    """
    dtype = _little_endian(preparation.dtype)
    train, packing = _arrange(contents.train, layout, dtype)
    held_out = _joined(contents.held_out, dtype)
    shard = Shard(
        number=number,
        first_item=first_item,
        end_item=first_item + contents.items,
        dtype=preparation.dtype,
        tokenizer_sha256=preparation.tokenizer_sha256,
        train=_describe(file_name("train", number), contents.train, train),
        held_out=_describe(file_name("held_out", number), contents.held_out, held_out),
        packing=packing,
        skipped={
            reason: Skips(count=contents.skips[reason], first=tuple(names))
            for reason, names in contents.skipped.items()
        },
    )
    if read_shard(folder, number) not in (None, shard):
        raise UserError(
            f"{folder}: shard {number} cannot be made again, for the sources have changed since;"
            " set another data.dir, or delete this one and prepare it anew"
        )
    for file, tokens in ((shard.train, train), (shard.held_out, held_out)):
        write_bytes(folder / file.name, tokens.data)
    shard.save(shard_path(folder, number))
    return shard


def _arrange(documents: Sequence[Encoded], layout: Layout, dtype: np.dtype) -> tuple[np.ndarray, Packing]:
    if layout.best_fit is None:
        return _joined(documents, dtype), Packing()
    packed = pack_best_fit([document.tokens for document in documents], layout.best_fit, layout.bos_id)
    costs = Packing(padding=packed.padding, cut=packed.cut, cut_concatenated=packed.cut_concatenated)
    return packed.tokens.astype(dtype), costs


def _joined(documents: Sequence[Encoded], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(document.tokens for document in documents)], dtype=dtype)


def _describe(name: str, documents: Sequence[Encoded], tokens: np.ndarray) -> TokenFile:
    return TokenFile(
        name=name,
        tokens=len(tokens),
        documents=len(documents),
        text_bytes=sum(document.text_bytes for document in documents),
        sha256=hashlib.sha256(tokens.data).hexdigest(),
    )


def is_whole(folder: Path, file: TokenFile, dtype: DType) -> bool:
    """Whether a token file is there in full size; its checksum is for `open_tokens`."""
    return _size(folder / file.name) == _bytes(file, dtype)


def open_tokens(folder: Path, file: TokenFile, dtype: DType, check_sum: bool = True) -> np.ndarray:
    """The tokens (tokens,) of a file, mapped from disk after its size and, if asked, its checksum were found right.

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
    if check_sum and (found := sha256_file(path)) != file.sha256:
        raise UserError(f"{path} is damaged: its SHA-256 is {found} instead of {file.sha256}; {remedy}")
    little_endian = _little_endian(dtype)
    # as a plain array: slices of a memmap cost ten times as much
    return np.asarray(np.memmap(path, little_endian, "r")) if size else np.empty(0, little_endian)


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
        self._folder = folder
        self._split: Split = split
        self._tokenizer_sha256 = tokenizer_sha256
        self._index: Index | None = None
        self._shards: list[Shard] = []  # while there is no index
        self._starts = [0]  # where each shard starts in the row, and where the last one ends
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._verified: set[int] = set()
        self._refresh()

    @property
    def complete(self) -> bool:
        return self._index is not None

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    def wait_for(self, tokens: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return once the row has that many tokens, or all that it will ever have; call `meanwhile` again and again.

        Raises:
            UserError: the preparation ended before it was complete.
        """
        wait_while_preparing(self._folder, lambda: self.has(tokens), is_over=meanwhile)

    def has(self, tokens: int) -> bool:
        """Whether by now the row has that many tokens, or all that it will ever have."""
        if not self._reaches(tokens):
            self._refresh()
        return self._reaches(tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the row (stop - start,), not to be written to.

        Raises:
            UserError: a shard is missing, truncated or damaged; found before any token of it is served.
        """
        assert 0 <= start <= stop <= self.tokens
        number = bisect_right(self._starts, start) - 1
        parts = []
        while start < stop:
            offset = self._starts[number]
            end = min(stop, self._starts[number + 1])
            parts.append(self._tokens_of(number)[start - offset : end - offset])
            start, number = end, number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def _reaches(self, tokens: int) -> bool:
        return self.complete or self.tokens >= tokens

    def _tokens_of(self, number: int) -> np.ndarray:
        tokens = self._open.pop(number, None)
        if tokens is None:
            dtype = self._index.dtype if self._index else self._shards[number].dtype
            tokens = open_tokens(self._folder, self._file(number), dtype, number not in self._verified)
            self._verified.add(number)
            if len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)
        self._open[number] = tokens
        return tokens

    def _file(self, number: int) -> TokenFile:
        return self._index.file(self._split, number) if self._index else self._shards[number].file(self._split)

    def _refresh(self) -> None:
        self._index = read_index(self._folder)
        if self._index is not None:
            self._check(self._index.tokenizer_sha256, self._folder)
            self._starts = [0, *accumulate(self._index.table(self._split).tokens)]
            return
        while shard := read_shard(self._folder, len(self._shards)):
            self._check(shard.tokenizer_sha256, shard_path(self._folder, shard.number))
            self._shards.append(shard)
            self._starts.append(self._starts[-1] + shard.file(self._split).tokens)

    def _check(self, sha256: str, path: Path) -> None:
        if sha256 != self._tokenizer_sha256:
            raise UserError(
                f"{path} was made with the tokenizer of SHA-256 {sha256}, not with {self._tokenizer_sha256};"
                " restore that tokenizer, or set another data.dir"
            )


def _little_endian(dtype: DType) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _bytes(file: TokenFile, dtype: DType) -> int:
    return file.tokens * np.dtype(dtype).itemsize


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
