"""The Triton kernels on a CPU, in Triton's interpreter and in fp32: every branch, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.ops.triton_cases import CASES


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Errors of all cases, from one process: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.triton_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_follow_the_definition(case: str, measured: dict[str, dict[str, float]]) -> None:
    assert {name: error for name, error in measured[case].items() if not error < 5e-6} == {}
