"""One GPU, and meshes of two through NCCL, with the Triton kernels: the numbers of one process in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loglinear.parallel import World, local_batch
from loglinear.parallel.mesh import Axis, Mesh
from loglinear.scaling.parity import TOLERANCES, Case, batch_of, cases_over
from tests.parallel.parity import run_cases
from tests.processes import exit_codes, start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_logits_and_every_gradient_are_those_of_one_process(tmp_path: Path, dtype: torch.dtype, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip("needs two GPUs")
    ranks = start_ranks(gpus, run_cases, cases_over(gpus), tmp_path, dtype, log=tmp_path / "log", on_gpus=True)
    codes = exit_codes(ranks, seconds=300)
    differences = "\n".join(file.read_text() for file in sorted(tmp_path.glob("rank-*"))).strip()
    assert codes == [0] * gpus, differences + (tmp_path / "log").read_text()
    assert not differences, f"above {TOLERANCES[dtype]}: {differences}"


@pytest.mark.parametrize("context", [1, 2])
def test_a_batch_is_sent_without_waiting_for_the_gpu(context: int) -> None:
    """Waiting would be an error; what arrives is what was sent, though its memory is free again before it leaves."""
    batch = batch_of(Case((1, context, 1)))
    axes = {"data": 1, "context": context, "tensor": 1, "replicas": context}
    axes = {name: Axis(name, size, size - 1, None) for name, size in axes.items()}
    here, there = (Mesh(World(0, 1, torch.device(kind)), **axes) for kind in ("cpu", "cuda:0"))
    local_batch(*batch, there)  # memory is pinned for the first time, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        inputs, labels, documents = local_batch(*(x.pin_memory() for x in batch), there)
        other = [torch.full_like(x, 7).pin_memory() for x in batch for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = local_batch(*batch, here)
    assert other
    assert torch.equal(inputs.cpu(), expected[0])
    assert torch.equal(labels.cpu(), expected[1])
    assert torch.equal(documents.positions_bt.cpu(), expected[2].positions_bt)
