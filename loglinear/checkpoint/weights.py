"""From the pieces in a checkpoint's files to whole parameters, or to the pieces of another layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loglinear.checkpoint import files
from loglinear.checkpoint.zero import WEIGHT
from loglinear.errors import UserError


class PieceReader:
    """Reads any range of any saved parameter, whatever the layout that saved it.

    Use as a context manager. Files are mapped, so memory is used for what is read alone.
    """

    def __init__(self, folder: Path) -> None:
        """Open the checkpoint in `folder`; the shards' content is taken as verified."""
        self._folder = folder
        self.parameters: dict[str, Any] = files.read_json(folder, files.INDEX)["parameters"]
        self._shards: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read_into(self, target: torch.Tensor, name: str, start: int, kind: str) -> None:
        """Fill the flat `target` with elements start .. of a parameter's weight or moment.

        Args:
            target: one-dimensional.
            name: of the parameter.
            start: the first element to read, in the flattened parameter.
            kind: `weight`, `exp_avg` or `exp_avg_sq`.
        """
        filled = 0
        for piece in self.parameters[name]["pieces"]:
            first = max(start, piece["start"])
            last = min(start + target.numel(), piece["start"] + piece["numel"])
            if first < last:
                saved = self._shard(piece["file"]).get_slice(tensor_name(name, kind))
                target[first - start : last - start] = saved[first - piece["start"] : last - piece["start"]]
                filled += last - first
        assert filled == target.numel(), f"{name}: {filled} of {target.numel()} elements are saved"

    def _shard(self, name: str) -> Any:
        if name not in self._shards:
            self._shards[name] = self._stack.enter_context(files.open_shard(self._folder, name))
        return self._shards[name]


def tensor_name(parameter: str, kind: str) -> str:
    """The name in a shard of a piece of a parameter."""
    return f"{kind}/{parameter}"


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model that is not sharded with the fp32 weights of a complete checkpoint.

    Raises:
        UserError: the checkpoint's parameters are not the model's.
    """
    with PieceReader(folder) as reader, torch.no_grad():
        _check_parameters(folder, reader, model)
        for name, parameter in model.named_parameters():
            flat = torch.empty(parameter.numel())
            reader.read_into(flat, name, 0, WEIGHT)
            parameter.copy_(flat.view_as(parameter))


def _check_parameters(folder: Path, reader: PieceReader, model: nn.Module) -> None:
    own = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    saved = {name: entry["shape"] for name, entry in reader.parameters.items()}
    for name in _differing(own, saved):
        raise UserError(
            f"{folder} holds {name} with shape {saved.get(name)}, but this model has {own.get(name)}: "
            "load it with the configuration that it was trained with"
        )


def _differing(own: dict[str, Any], saved: dict[str, Any]) -> Iterator[str]:
    return (name for name in own | saved if own.get(name) != saved.get(name))
