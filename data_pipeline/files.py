"""Files that are either whole or absent: written to a temporary name, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from loglinear.errors import UserError

PREPARE_COMMAND = "loglinear data prepare CONFIG"


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, unless they are there: before work whose results go into it.

    Raises:
        UserError: it cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): name another") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into the folder {folder}: name another")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write `path` atomically, so that a reader or a crash never sees half of it.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` atomically as JSON whose bytes depend on the value alone."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: the file is no JSON object, or cannot be read.
        FileNotFoundError: there is no such file; the caller knows what that means.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): correct its folder") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (not a JSON object): delete it and run `{PREPARE_COMMAND}`")
    return value


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
