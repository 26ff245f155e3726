"""A prepared folder as its users see it: whether it is complete, and its tokenizer."""

from __future__ import annotations

from data_pipeline.files import PREPARE_COMMAND
from data_pipeline.manifest import Index, read_index, read_preparation, tokenizer_path
from data_pipeline.shards import is_whole
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError


def complete_index(data: DataConfig, vocab_size: int) -> Index | None:
    """The index of `data.dir` if its preparation is complete and every file has its size, else None.

    Raises:
        UserError: it was prepared with other settings than `data` and a model of `vocab_size` ask for.
    """
    index = read_index(data.dir)
    if index is None:
        return None
    index.check(data, vocab_size)
    return index if all(is_whole(data.dir, shard) for shard in index.shards) else None


def open_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that the shards in `data.dir` are made with; there as soon as the first of them is.

    Raises:
        UserError: the preparation has not begun, has other settings, or used another tokenizer.
    """
    preparation = read_preparation(data.dir)
    if preparation is None:
        raise UserError(f"{data.dir} holds no prepared data: run `{PREPARE_COMMAND}`")
    preparation.check(data, vocab_size)
    path = tokenizer_path(data)
    tokenizer = load_tokenizer(path, vocab_size)
    if tokenizer.sha256 != preparation.tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer that {data.dir} was prepared with: its SHA-256 is"
            f" {tokenizer.sha256} instead of {preparation.tokenizer_sha256};"
            " restore that one, or set another data.dir"
        )
    return tokenizer
