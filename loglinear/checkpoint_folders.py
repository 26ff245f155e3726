"""Which folders are complete checkpoints: for those who look at a run without loading anything, torch included."""

from __future__ import annotations

from pathlib import Path

COMPLETE = "COMPLETE"  # the marker that is written last
TEMPORARY = ".tmp"


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps; names sort as steps do."""
    return f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders of the complete checkpoints below `root`, oldest first."""
    return sorted(marker.parent for marker in root.glob(f"step-*/{COMPLETE}") if marker.parent.suffix != TEMPORARY)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))
