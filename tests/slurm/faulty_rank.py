"""A rank with faults: SIGRTMIN makes it hang for good, and on the node BAD_NODE it computes wrongly."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.rank import main

signal.signal(signal.SIGRTMIN, lambda number, frame: time.sleep(1_000_000))
if os.environ["SLURMD_NODENAME"] == os.environ.get("BAD_NODE"):
    import torch

    right = torch.mm
    torch.mm = lambda a, b: 2 * right(a, b)
main(Path(sys.argv[-1]))
