"""Examples of the documentation are what the code takes, gives and computes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.state import DataState
from launch.cluster import ClusterConfig, load_cluster
from launch.sweep import SweepConfig, load_sweep
from loglinear.config import Config, TrainConfig, load_config
from loglinear.ops import naive_log_linear_attention
from tests.docs.pages import PAGES, ROOT, blocks, name, read
from tests.ops.op_cases import relative_error
from tests.slurm.test_faults import FAULTS

DATA, OPS, SLURM = map(read, ("docs/data.md", "docs/ops.md", "docs/slurm.md"))
LOADERS = {Config: load_config, ClusterConfig: lambda path: load_cluster(str(path)), SweepConfig: load_sweep}
EXAMPLES = [
    pytest.param(text, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(read(page), "yaml"))
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_configuration_is_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(text)
    kinds = [kind for kind in LOADERS if set(yaml.safe_load(text)) <= set(kind.model_fields)]
    assert len(kinds) == 1
    LOADERS[kinds[0]](tmp_path / "example.yaml")


def test_the_state_of_data_is_one() -> None:
    (text,) = blocks(DATA, "json")
    assert DataState.from_dict(json.loads(text)).samples == 24_000


def test_the_examples_of_the_op_run() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks(OPS, "python"):
        exec(block, names)
    arguments = (names[name] for name in ("q", "k", "v", "g", "level_scales"))
    wanted, _ = naive_log_linear_attention(*arguments)
    assert relative_error(names["o"], wanted) < 1e-5
    assert names["state"].positions.tolist() == [1020, 1020]


def test_every_fault_has_a_row_with_its_cost() -> None:
    assert set(re.findall(r"^\| (.+?) \| [\d.]+ \| \d+ \|$", SLURM, re.MULTILINE)) == set(FAULTS)
    assert f"`train.hang_seconds` ({TrainConfig().hang_seconds:g})" in SLURM
    assert {"save_seconds", "max_restarts", "exclude_bad_nodes"} <= set(ClusterConfig.model_fields)


@pytest.mark.parametrize("image", ["docker/Dockerfile", "docker/Dockerfile.cpu"])
def test_the_images_checkout_tells_its_revision_to_everyone(image: str, tmp_path: Path) -> None:
    """The setting of the image, in git's own configuration of a system that has nothing else."""
    (command,) = re.findall(
        r" && (git config .+)\nWORKDIR /opt/loglinear\n", (ROOT / image).read_text(encoding="utf-8")
    )
    system = os.environ | {"GIT_CONFIG_SYSTEM": str(tmp_path / "gitconfig"), "GIT_CONFIG_GLOBAL": os.devnull}
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "--quiet", checkout], check=True, env=system)
    # As git sees files of somebody else.
    stranger = system | {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    look = ["git", "-C", str(checkout), "status"]
    assert subprocess.run(look, env=stranger, capture_output=True).returncode == 128
    subprocess.run(command.replace("/opt/loglinear", str(checkout)).split(), check=True, env=system)
    assert subprocess.run(look, env=stranger, capture_output=True).returncode == 0


@pytest.mark.parametrize("image", ["docker/Dockerfile", "docker/Dockerfile.cpu"])
def test_images_install_as_everyone_does(image: str) -> None:
    assert "\nRUN make install\n" in (ROOT / image).read_text(encoding="utf-8")
    assert "\ninstall: " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "`make install`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert image in SLURM
