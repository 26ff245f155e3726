"""A small corpus of files, and a configuration that prepares it; shared by all tests that need data."""

from __future__ import annotations

import random
from pathlib import Path

from loglinear.config import DataConfig, SourceConfig, TokenizerConfig

VOCAB = 300
SEQ_LEN = 16
DOCUMENTS = 80


def write_corpus(folder: Path, documents: int = DOCUMENTS) -> None:
    """Text files of 30 to 120 random words each, and among them an empty one and one that is not UTF-8."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    folder.mkdir(parents=True)
    for number in range(documents):
        lines = [" ".join(rng.choices(words, k=6)) for _ in range(rng.randint(5, 20))]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))


def data_config(folder: Path, corpus: Path, **changes: object) -> DataConfig:
    """A configuration that prepares `corpus` into about ten shards."""
    settings = {
        "dir": folder,
        "sources": (SourceConfig(kind="folder", path=str(corpus)),),
        "tokenizer": TokenizerConfig(train_bytes=20_000),
        "held_out": 0.2,
        "shard_tokens": 1800,
        "prepare_workers": 2,
        "shuffle_window": 32,
        "loader_workers": 0,
    }
    return DataConfig.model_validate({**settings, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder but its lock and what belongs to a background process."""
    apart = {"prepare.lock", "prepare.log", "prepare.yaml"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in apart}
