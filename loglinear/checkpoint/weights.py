"""From the pieces in a checkpoint's files to whole parameters, or to the pieces of another layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from loglinear.checkpoint import files
from loglinear.checkpoint.blocks import Block, Rectangle, rectangles, view
from loglinear.checkpoint.zero import WEIGHT
from loglinear.errors import UserError
from loglinear.parallel.shard import Shard, shard_of

READ_AT_ONCE = 1 << 20  # elements
EXPORTED, PREFIX = "model.safetensors", "model."  # of the file and of names in Hugging Face's layout


class PieceReader:
    """Reads any part of any saved parameter, whatever the layout that saved it.

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

    def read_into(self, target: torch.Tensor, name: str, shard: Shard, start: int, kind: str) -> None:
        """Fill the flat `target` with elements start .. of a rank's part of a parameter's weight or moment.

        Args:
            target: one-dimensional.
            name: of the parameter.
            shard: the part of the parameter.
            start: the first element to read, in the flattened part.
            kind: `weight`, `exp_avg` or `exp_avg_sq`.
        """
        wanted = list(rectangles(Block.of(shard), start, target.numel()))
        filled = 0
        for piece in self.parameters[name]["pieces"]:
            saved = self._shard(piece["file"]).get_slice(tensor_name(name, kind))
            for source in rectangles(Block(*piece["block"]), piece["start"], piece["numel"]):
                for rectangle in wanted:
                    filled += _copy(saved, source, target, rectangle)
        assert filled == target.numel(), f"{name}: {filled} of {target.numel()} elements are saved"

    def _shard(self, name: str) -> Any:
        if name not in self._shards:
            self._shards[name] = self._stack.enter_context(files.open_shard(self._folder, name))
        return self._shards[name]


def _copy(saved: Any, source: Rectangle, target: torch.Tensor, rectangle: Rectangle) -> int:
    """Copy what a saved rectangle and a wanted one have in common, some rows at a time; returns its size."""
    common = source.block.intersection(rectangle.block)
    if common.columns == 0:
        return 0
    at_once = max(1, READ_AT_ONCE // source.block.columns)
    for first in range(common.row, common.row + common.rows, at_once):
        rows = min(at_once, common.row + common.rows - first)
        part = common._replace(row=first, rows=rows)
        begin = source.offset + (first - source.block.row) * source.block.columns
        read = saved[begin : begin + rows * source.block.columns]
        lines = Rectangle(source.block._replace(row=first, rows=rows), 0)
        view(target, rectangle, part).copy_(view(read, lines, part))
    return common.rows * common.columns


def tensor_name(parameter: str, kind: str) -> str:
    """The name in a shard of a piece of a parameter."""
    return f"{kind}/{parameter}"


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model, or a tensor rank's part of one, with the fp32 weights of a complete checkpoint.

    Raises:
        UserError: the checkpoint's parameters are not the model's.
    """
    with PieceReader(folder) as reader, torch.no_grad():
        _check_parameters(folder, {name: entry["shape"] for name, entry in reader.parameters.items()}, model)
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1) if parameter.dtype == torch.float32 else torch.empty(parameter.numel())
            reader.read_into(flat, name, shard_of(parameter), 0, WEIGHT)
            parameter.copy_(flat.view_as(parameter))


def whole_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a complete checkpoint by its name: fp32 [its shape]."""
    weights = {}
    with PieceReader(folder) as reader:
        for name, entry in reader.parameters.items():
            shape = tuple(entry["shape"])
            flat = torch.empty(torch.Size(shape).numel())
            reader.read_into(flat, name, Shard(shape, 0, 0, shape[0]), 0, WEIGHT)
            weights[name] = flat.view(shape)
    return weights


def export_weights(folder: Path, out: Path) -> None:
    """Write the whole fp32 weights of a complete checkpoint into one safetensors file, atomically.

    Raises:
        UserError: `out` cannot be written.
    """
    weights = whole_weights(folder)
    temporary = out.with_name(out.name + files.TEMPORARY)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(temporary, weights)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): choose another file") from None


def load_exported(path: Path, model: nn.Module) -> None:
    """Fill a model, or a tensor rank's part of one, with weights that were exported.

    Args:
        path: a safetensors file, or a folder in Hugging Face's layout with one in it.
        model: whose weights are filled.

    Raises:
        UserError: there is no such file, or its parameters are not the model's.
    """
    file = path / EXPORTED if path.is_dir() else path
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"run.init_from: cannot read weights from {file} ({error}): name what export wrote") from None
    with opened as saved, torch.no_grad():
        names = {name.removeprefix(PREFIX): name for name in saved.keys()}  # noqa: SIM118  # it is no dictionary
        shapes = {name: saved.get_slice(full).get_shape() for name, full in names.items()}
        _check_parameters(file, shapes, model)
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            part = (slice(None),) * shard.dim + (slice(shard.start, shard.start + shard.size),)
            parameter.copy_(saved.get_slice(names[name])[part])


def _check_parameters(folder: Path, saved: dict[str, list[int]], model: nn.Module) -> None:
    own = {name: list(shard_of(parameter).shape) for name, parameter in model.named_parameters()}
    for name in _differing(own, saved):
        raise UserError(
            f"{folder} holds {name} with shape {saved.get(name)}, but this model has {own.get(name)}: "
            "load it with the configuration that it was trained with"
        )


def _differing(own: dict[str, Any], saved: dict[str, Any]) -> Iterator[str]:
    return (name for name in own | saved if own.get(name) != saved.get(name))
