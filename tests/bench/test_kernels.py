"""Which ops the benchmark of kernels takes. The packages need a GPU; stand-ins here have their names and arguments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from loglinear.bench.kernels import PACKAGES, _ops

STAND_IN = """
from torch.nn import functional as F

def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    assert softmax_scale is None
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)
    return RESULT
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that can be imported, and that are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        sys.modules.pop(name, None)


def test_flash_attention_3_and_4_take_part_where_they_are_installed(packages: Path) -> None:
    before = _ops().keys()
    files = {"flash_attn_interface.py": "o", "flash_attn/cute/__init__.py": "o, None"}
    for name, result in files.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(STAND_IN.replace("RESULT", result))
    importlib.invalidate_caches()
    ops = _ops()
    assert ops.keys() - before == PACKAGES.keys()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 20, 3, 8) for _ in range(3))
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    for name in PACKAGES:
        torch.testing.assert_close(ops[name][0](q, k, v), o)
