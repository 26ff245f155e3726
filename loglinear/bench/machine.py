"""What a measurement was made on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import write_json
from loglinear.errors import UserError


def chosen_device(name: str | None) -> torch.device:
    """The device called "cpu" or "cuda"; for None a GPU if there is one.

    Raises:
        UserError: it is neither, or there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"--device {name}: take cpu or cuda")
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: this machine has no CUDA GPU; leave the option out to measure its CPU")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def machine(command: str) -> dict[str, str | int]:
    """The date, the processor, its threads, versions, and the command that measured."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": command,
    }


def keep(file: Path, about: dict[str, str | int], points: Sequence[Any], **more: object) -> None:
    """Write what was measured so far, since the rest may take long.

    Args:
        file: where it goes, as JSON; its folder is there.
        about: as `machine` gives it.
        points: dataclasses.
        more: further entries of the record.
    """
    write_json(file, {"machine": about, **more, "points": [asdict(point) for point in points]})


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
