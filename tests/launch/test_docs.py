"""What docs/slurm.md and the images say is what the code does."""

from __future__ import annotations

import os
import re
import subprocess
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
def test_the_images_checkout_tells_its_revision_to_everyone(name: str, tmp_path: Path) -> None:
    """The setting of the image, in git's own configuration of a system that has nothing else."""
    (command,) = re.findall(r" && (git config .+)\nWORKDIR /opt/loglinear\n", (ROOT / name).read_text(encoding="utf-8"))
    system = os.environ | {"GIT_CONFIG_SYSTEM": str(tmp_path / "gitconfig"), "GIT_CONFIG_GLOBAL": os.devnull}
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "--quiet", checkout], check=True, env=system)
    # As git sees files of somebody else.
    stranger = system | {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    look = ["git", "-C", str(checkout), "status"]
    assert subprocess.run(look, env=stranger, capture_output=True).returncode == 128
    subprocess.run(command.replace("/opt/loglinear", str(checkout)).split(), check=True, env=system)
    assert subprocess.run(look, env=stranger, capture_output=True).returncode == 0


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
