"""The same run under SLURM and under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.slurm.runs import ROOT, Launcher
from tests.train.small import losses, records, saved_tensors

STEPS = 12

pytestmark = pytest.mark.slurm


def test_two_nodes_of_two_ranks_give_what_torchrun_gives_on_four(launcher: Launcher) -> None:
    """Also where sbatch exports nothing, as some clusters have it."""
    length = {"train": {"steps": STEPS}, "eval": {"every": 6}}
    place = {"nodes": 2, "ranks_per_node": 2, "gpus_per_node": 2}
    run = launcher.submit("slurm", launcher.config("slurm", **length), **place, sbatch={"export": "NONE"})
    run.wait_until_finished()
    config, _ = launcher.write("torchrun", launcher.config("torchrun", **length))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    subprocess.run(
        [*command, "-m", "loglinear", "train", str(config)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    other = launcher.folder / "torchrun"
    assert records(run.folder) == records(other)
    expected = saved_tensors(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_tensors(run.folder).items())
    assert len(losses(run.folder)) == STEPS
    assert len(run.starts()[0].nodes) == 2
