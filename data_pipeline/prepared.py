"""A prepared folder as its users see it: whether it is complete, and its tokenizer."""

from __future__ import annotations

import hashlib

from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import (
    INDEX_FILE,
    PREPARATION_FILE,
    Index,
    parts,
    read_index,
    read_preparation,
    shard_path,
    tokenizer_path,
)
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError


def complete_index(data: DataConfig, vocab_size: int) -> Index | None:
    """The index of `data.dir`, no mixture's, if its preparation is complete, else None.

    No token file is looked at, so that this takes as long for many shards as for few: one that is missing or
    damaged is named when it is opened, and made again by a preparation.

    Raises:
        UserError: it was prepared with other settings than `data` and a model of `vocab_size` ask for.
    """
    index = read_index(data.dir)
    return None if index is None else index.check(data, vocab_size)


def is_complete(data: DataConfig, vocab_size: int) -> bool:
    """Whether all of `data`, be it a mixture or not, is prepared.

    Raises:
        UserError: as for `complete_index`.
    """
    return all(complete_index(part, vocab_size) is not None for part in parts(data).values())


def fingerprint(data: DataConfig, complete: bool) -> str:
    """A hash of the records of `data`, of its indices or, while it is not `complete`, of its first shards.

    Processes that see the same folder get the same; one that does not see it gets "missing".
    """
    digest = hashlib.sha256()
    for part in parts(data).values():
        for path in (part.dir / PREPARATION_FILE, part.dir / INDEX_FILE if complete else shard_path(part.dir, 0)):
            if not path.exists():
                return "missing"
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def open_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that `data` is prepared with; there as soon as the first shard is.

    Raises:
        UserError: the preparation has not begun, has other settings, or used another tokenizer.
    """
    preparation = read_preparation(data.dir)
    if preparation is None:
        raise UserError(f"{data.dir} holds no prepared data: run `{PREPARE_COMMAND}`")
    preparation.check(data, vocab_size)
    path = tokenizer_path(data)
    tokenizer = load_tokenizer(path, vocab_size, data.tokenizer.bos)
    if tokenizer.sha256 != preparation.tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer that {data.dir} was prepared with: its SHA-256 is"
            f" {tokenizer.sha256} instead of {preparation.tokenizer_sha256};"
            " restore that one, or set another data.dir"
        )
    return tokenizer
