"""A small corpus and its prepared folder, made once for all tests; and examples that may take their time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_pipeline.prepare import prepare
from loglinear.config import DataConfig
from tests.corpus import VOCAB, data_config, write_corpus

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


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
