"""The same run on GPUs: DeepSpeed through NCCL gives the curve of the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loglinear.config import Config, DataConfig
from tests.train.small import STEPS, losses, small_config

pytestmark = pytest.mark.gpu
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
GPU_COUNTS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]


def run(config: Config, gpus: int) -> Path:
    """Train under torchrun, in processes that see the GPUs."""
    file = config.run.folder.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [*command, "-m", "loglinear", "train", str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return config.run.folder


def on_gpu(folder: Path, data: DataConfig, **train: Any) -> Config:
    return small_config(folder, data, train={"peak_tflops": 989.0, **train})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("gpus", GPU_COUNTS)
def test_the_curve_is_that_of_the_cpu(
    prepared: DataConfig, reference: Path, tmp_path: Path, gpus: int, stage: int, precision: str
) -> None:
    folder = run(on_gpu(tmp_path / "run", prepared, zero_stage=stage, precision=precision), gpus)
    torch.testing.assert_close(losses(folder), losses(reference), rtol=0, atol=TOLERANCE[precision])


@pytest.mark.parametrize("gpus", GPU_COUNTS)
def test_a_run_of_the_cpu_goes_on_on_gpus(prepared: DataConfig, reference: Path, tmp_path: Path, gpus: int) -> None:
    """The checkpoint of step 20 was saved without a GPU; what it knows of its random state is left alone."""
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    folder = run(on_gpu(tmp_path / "run", prepared), gpus)
    torch.testing.assert_close(losses(folder), losses(reference), rtol=0, atol=1e-4)
