"""Meshes of two GPUs through NCCL, with the Triton kernels: the numbers of one process in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loglinear.scaling.parity import TOLERANCES, cases_over
from tests.parallel.parity import run_cases
from tests.processes import exit_codes, start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_logits_and_every_gradient_are_those_of_one_process(tmp_path: Path, dtype: torch.dtype) -> None:
    ranks = start_ranks(2, run_cases, cases_over(2), tmp_path, dtype, log=tmp_path / "log", on_gpus=True)
    codes = exit_codes(ranks, seconds=300)
    differences = "\n".join(file.read_text() for file in sorted(tmp_path.glob("rank-*"))).strip()
    assert codes == [0, 0], differences + (tmp_path / "log").read_text()
    assert not differences, f"above {TOLERANCES[dtype]}: {differences}"
