"""Every checksum of prepared data, whatever their mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from data_pipeline.manifest import Split, TokenFile, parts, read_index, read_shard
from data_pipeline.prepared import open_tokenizer
from data_pipeline.shards import open_tokens
from loglinear.config import DataConfig
from loglinear.errors import UserError


def verify(
    data: DataConfig, vocab_size: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Read every token file that is prepared so far.

    Args:
        data: what is prepared.
        vocab_size: embeddings of the model.
        progress: told after every file how many are done, and how many there are.

    Returns:
        A sentence for every file that is missing, truncated or damaged.

    Raises:
        UserError: nothing is prepared, other settings were, or a record is damaged.
    """
    open_tokenizer(data, vocab_size)
    files = [(part, file) for part in parts(data).values() for file in _files(part, vocab_size)]
    problems = []
    for number, (part, file) in enumerate(files):
        try:
            open_tokens(part.dir, file, open_tokenizer(part, vocab_size).dtype_name)
        except UserError as error:
            problems.append(str(error))
        progress(number + 1, len(files))
    return problems


def _files(data: DataConfig, vocab_size: int) -> list[TokenFile]:
    open_tokenizer(data, vocab_size)
    index = read_index(data.dir)
    if index is not None:
        return [index.file(split, number) for number in range(index.shards) for split in get_args(Split)]
    files: list[TokenFile] = []
    while shard := read_shard(data.dir, len(files) // 2):
        files += [shard.train, shard.held_out]
    return files
