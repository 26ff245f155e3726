"""The files of one checkpoint, and how they become complete.

`step-00000250/` holds `rank-00000.safetensors` (one a rank: flat pieces of the weights and of AdamW's moments, the
rank's random state), `index.json` (which file holds which piece of which parameter, SHA-256 of every file),
`state.json` (step, place in the data, configuration, revision), and, written last, `COMPLETE`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loglinear.checkpoint_folders import COMPLETE, TEMPORARY
from loglinear.checkpoint_folders import complete_checkpoints as complete_checkpoints
from loglinear.checkpoint_folders import folder_name as folder_name
from loglinear.checkpoint_folders import is_checkpoint as is_checkpoint
from loglinear.checkpoint_folders import step_of as step_of
from loglinear.errors import UserError

INDEX, STATE = "index.json", "state.json"


def shard_name(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}.safetensors"


def write_shard(folder: Path, rank: int, tensors: dict[str, torch.Tensor]) -> str:
    """Write one rank's tensors, flush them to the disk, and return the SHA-256 of what the disk gives back.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    path = folder / shard_name(rank)
    write_tensors(path, tensors)
    _sync(path)
    return sha256(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, which may be read by whom the umask says; safetensors would let its owner alone.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:  # what it makes of a full disk, or of a folder that is not there
        raise OSError(str(error)) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` and flush it to the disk."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def complete(temporary: Path) -> Path:
    """Give a whole checkpoint its final name, then its marker, which vouches for the JSON files; returns it."""
    final = temporary.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step
    temporary.rename(final)
    _sync(final.parent)
    digests = {name: sha256(final / name) for name in (INDEX, STATE)}
    marker = final / (COMPLETE + TEMPORARY)
    write_json(marker, digests)
    marker.rename(final / COMPLETE)
    _sync(final)
    return final


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a complete checkpoint, checked against its marker.

    Raises:
        UserError: it is damaged.
    """
    try:
        expected = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))[name]
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() == expected:
            return json.loads(content)
    except (OSError, ValueError, KeyError):
        pass
    raise damaged(folder / name)


def verify_shard(folder: Path, name: str, expected: str) -> None:
    """Check a shard's SHA-256.

    Raises:
        UserError: the file is missing or its content is not what was written.
    """
    path = folder / name
    found = sha256(path) if path.exists() else "no file"
    if found != expected:
        raise damaged(path, f" (SHA-256 {expected} expected, {found} found)")


def open_shard(folder: Path, name: str) -> Any:
    """A shard for reading by tensor and by slice, mapped rather than loaded; use as a context manager."""
    return safe_open(folder / name, framework="pt")


def damaged(path: Path, detail: str = "") -> UserError:
    """The error for a file that cannot be trusted."""
    return UserError(
        f"checkpoint file {path} is damaged{detail}: remove the folder {path.parent}, and the run goes on from the "
        "checkpoint before"
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
