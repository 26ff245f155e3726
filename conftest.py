"""Tests that need what this machine lacks are skipped, and say so."""

from __future__ import annotations

import shutil

import pytest
import torch

NEEDS = {
    "gpu": (torch.cuda.is_available(), "needs a CUDA GPU, and there is none here"),
    "slurm": (shutil.which("slurmctld") is not None, "needs SLURM, and slurmctld is not installed here"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `item` if one of its markers asks for something that is not here."""
    for marker, (present, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not present:
            pytest.skip(reason)
