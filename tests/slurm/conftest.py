"""One SLURM for all tests here, and runs to submit to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loglinear.config import DataConfig
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Launcher


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of four GPUs; `squeue` and its like find it."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # sockets want short names
        cluster = Cluster(Path(folder))
        before = dict(os.environ)
        try:
            cluster.start()
            os.environ.update(cluster.environment)
            yield cluster
        finally:
            cluster.stop()
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture(scope="session")
def launcher(cluster: Cluster, prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Submits runs as a user does."""
    return Launcher(cluster, prepared, tmp_path_factory.mktemp("runs"))
