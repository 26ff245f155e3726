"""The examples of docs/ops.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from loglinear.ops import naive_log_linear_attention
from tests.ops.op_cases import relative_error

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"


def test_the_examples_of_the_page_run() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    arguments = (names[name] for name in ("q", "k", "v", "g", "level_scales"))
    wanted, _ = naive_log_linear_attention(*arguments)
    assert relative_error(names["o"], wanted) < 1e-5
    assert names["state"].positions.tolist() == [1020, 1020]
