"""The table of the GPU benchmark, from made-up times; measuring needs a GPU."""

from __future__ import annotations

import pytest
import torch

from loglinear.bench import kernels as bench
from loglinear.errors import UserError


def timings() -> list[bench.Timing]:
    ours = [bench.Timing(bench.OURS, length, length, length / 1e3, length / 5e2, 1.5) for length in (32768, 1048576)]
    return [*ours, bench.Timing("softmax, cuDNN", 32768, 65536, 15.0, 56.0, 2.7)]


def test_the_table_has_a_row_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    lines = bench._markdown(timings(), bench.Ceilings(700.0, 4.0)).splitlines()
    assert lines[0].startswith("a GPU, ")
    assert lines[4].startswith("| 32,768 | 32.77 / 65.54, 1.50 | 15.00 / 56.00, 2.70 | ")
    assert lines[5].startswith("| 1,048,576 | 1048.58 / 2097.15, 1.50 | - | ")
    assert lines[-1].startswith("Ours, forward + backward, grows as T^1.000 ")


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA GPU"):
        bench.bench_kernels()
