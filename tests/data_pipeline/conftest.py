"""A small corpus of files and its prepared folder, shared by the tests of this package."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(corpus: Path) -> DataConfig:
    """A complete preparation, not to be changed."""
    data = data_config(corpus.parent / "prepared", corpus)
    prepare(data, VOCAB)
    return data


@pytest.fixture
def own(prepared: DataConfig, tmp_path: Path) -> DataConfig:
    """A copy of it, to be changed."""
    shutil.copytree(prepared.dir, tmp_path / "own")
    return prepared.model_copy(update={"dir": tmp_path / "own"})


@pytest.fixture
def configure(corpus: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    """A configuration of an empty folder with the settings that are given."""
    return lambda **changes: data_config(tmp_path / "fresh", corpus, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder but its lock and what belongs to a background process."""
    apart = {"prepare.lock", "prepare.log", "prepare.yaml"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in apart}
