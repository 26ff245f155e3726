"""One run that nothing interrupts: what all others are held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from loglinear.config import DataConfig
from loglinear.train.run import train
from tests.processes import exit_codes, start_ranks
from tests.train.small import small_config


@pytest.fixture(scope="session")
def reference(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run by one rank in one go."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert exit_codes(start_ranks(1, train, small_config(folder, prepared))) == [0]
    return folder
