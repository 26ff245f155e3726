"""Tests that need what this machine lacks are skipped, and say so."""

from __future__ import annotations

import os
import shutil

# Before torch is imported, for tests and the processes they start: the threads of two workers, or of several ranks,
# would spin against each other on a few cores, and some tests then take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import browser

SLURM = all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch")))

NEEDS = {
    "gpu": (torch.cuda.is_available(), "needs a CUDA GPU, and there is none here"),
    "browser": (browser.IS_HERE, "needs Chromium and playwright: see make test-browser"),
    "slurm": (SLURM and os.geteuid() == 0, "needs SLURM's daemons, and root to start them: see make test-slurm"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `item` if one of its markers asks for something that is not here."""
    for marker, (present, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not present:
            pytest.skip(reason)
