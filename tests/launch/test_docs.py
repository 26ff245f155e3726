"""What docs/slurm.md and the images say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.cluster import ClusterConfig
from loglinear.config import TrainConfig
from tests.slurm.test_faults import FAULTS

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")


def test_every_fault_has_a_row_with_its_cost() -> None:
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \| \d+ \|$", DOCS, re.MULTILINE))
    assert set(rows) == set(FAULTS)


def test_the_settings_that_are_named_exist() -> None:
    assert {"save_seconds", "max_restarts", "exclude_bad_nodes"} <= set(ClusterConfig.model_fields)
    assert f"`train.hang_seconds` ({TrainConfig().hang_seconds:g})" in DOCS


@pytest.mark.parametrize("name", ["docker/Dockerfile", "docker/Dockerfile.cpu"])
def test_images_install_as_everyone_does(name: str) -> None:
    assert "\nRUN make install\n" in (ROOT / name).read_text(encoding="utf-8")
    assert "\ninstall: " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "`make install`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert name in DOCS


def test_examples_of_clusters_exist() -> None:
    named = set(re.findall(r"configs/[\w/]+\.yaml", DOCS))
    assert len(named) >= 4
    assert all((ROOT / name).exists() for name in named)
