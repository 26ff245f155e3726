"""What comes before a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def run_aside(work: Callable[[], object]) -> None:
    """Run `work` on a stream of its own, as torch asks before a capture: no graph holds what it compiles and takes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
