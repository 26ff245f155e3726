"""The chunked op costs T log T, and the benchmark that shows it on a clock writes what it measured."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loglinear.bench import ops as bench
from loglinear.ops import log_linear_attention
from tests.ops.op_cases import Sizes, random_inputs

LENGTHS = [4096 << doubling for doubling in range(5)]


def flops(time: int, training: bool) -> int:
    """FLOPs of the matrix products of a call, as torch counts them while it runs."""
    inputs = random_inputs(0, 1, time, Sizes(heads=2, state_dim=8, head_dim=8, levels=17)).fresh(torch.float32)
    with FlopCounterMode(display=False) as counter:
        o, _ = log_linear_attention(**inputs.arguments())
        if training:
            o.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True])
def test_work_grows_as_t_log_t(training: bool) -> None:
    per_token = [flops(time, training) / time for time in LENGTHS]
    steps = [later - earlier for earlier, later in pairwise(per_token)]
    half_a_bucket = 2 * 2 * 8 * 8 / 2  # each doubling makes every second chunk read one state more
    assert steps == pytest.approx([(4 if training else 1) * half_a_bucket] * 4, rel=0.02)


def test_the_exponent_of_a_power_is_its_exponent() -> None:
    assert bench.exponent([1000, 2000, 8000], [3.0, 12.0, 192.0]) == pytest.approx(2.0)


def test_the_benchmark_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (64, 128, 256))
    monkeypatch.setattr(bench, "FIT_FROM", 64)
    timings = bench.bench_ops(tmp_path / "bench")
    assert [(timing.op, timing.tokens) for timing in timings] == [
        (op, tokens) for op in ("log-linear", "softmax") for tokens in (64, 128, 256)
    ]
    assert all(timing.forward_ms > 0 for timing in timings)
    record = json.loads((tmp_path / "bench" / "ops.json").read_text())
    assert [entry["tokens"] for entry in record["points"]] == [64, 128, 256] * 2
    table = (tmp_path / "bench" / "ops.md").read_text()
    assert f"| 256 | {timings[2].forward_ms:,.1f} | {timings[2].training_ms:,.1f} |" in table
    assert (tmp_path / "bench" / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_an_op_that_takes_too_long_is_not_tried_at_longer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (64, 128, 256))
    monkeypatch.setattr(bench, "PATIENCE", 0.0)
    assert [(timing.op, timing.tokens) for timing in bench.bench_ops()] == [("log-linear", 64), ("softmax", 64)]
