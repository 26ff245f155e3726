"""Meshes of two GPUs through NCCL, with the Triton kernels: the numbers of one process in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.parity import PATTERNS, TOLERANCES, Case, run_cases
from tests.processes import exit_codes, start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CASES = [Case(mesh, pattern) for mesh in ((2, 1, 1), (1, 2, 1), (1, 1, 2)) for pattern in PATTERNS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_logits_and_every_gradient_are_those_of_one_process(tmp_path: Path, dtype: torch.dtype) -> None:
    """Relative to each parameter's gradient, with a floor of a hundredth of the whole one's."""
    cases = [*CASES, Case((1, 1, 2), "hybrid", sequence=False), Case((1, 1, 2), "log_linear", groups=2)]
    ranks = start_ranks(2, run_cases, cases, tmp_path, dtype, log=tmp_path / "log", on_gpus=True)
    codes = exit_codes(ranks, seconds=300)
    differences = "\n".join(file.read_text() for file in sorted(tmp_path.glob("rank-*"))).strip()
    assert codes == [0, 0], differences + (tmp_path / "log").read_text()
    assert not differences, f"above {TOLERANCES[dtype]}: {differences}"
