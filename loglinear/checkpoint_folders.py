"""Which folders are complete checkpoints: for those who look at a run without loading anything, torch included."""

from __future__ import annotations

import re
from pathlib import Path

COMPLETE = "COMPLETE"  # the marker that is written last
TEMPORARY = ".tmp"


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name is one that `folder_name` gave: others, such as a copy beside it, are let alone."""
    return re.fullmatch(r"step-\d{8,}", name) is not None


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders of the complete checkpoints below `root`, oldest first."""
    folders = (marker.parent for marker in root.glob(f"step-*/{COMPLETE}"))
    return sorted((folder for folder in folders if is_checkpoint(folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))
