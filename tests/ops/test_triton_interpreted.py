"""The Triton kernels on a CPU, in Triton's interpreter and in fp32: every branch, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.ops.triton_cases import CASES, ENDS, STEPS

Errors = dict[str, dict[str, float]]  # of each output and gradient, by case


def interpreted(module: str) -> Errors:
    """What a program of cases prints, in a process of its own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured() -> Errors:
    return interpreted("tests.ops.triton_cases")


@pytest.mark.parametrize("case", [*CASES, *ENDS, *STEPS])
def test_the_kernels_follow_the_definition(case: str, measured: Errors) -> None:
    assert {name: error for name, error in measured[case].items() if not error < 5e-6} == {}


def test_the_operations_around_the_op_follow_pytorch() -> None:
    measured = interpreted("tests.ops.neighbour_cases")
    assert len(measured) == 16
    assert {name: errors for name, errors in measured.items() if not max(errors.values()) < 1e-6} == {}
