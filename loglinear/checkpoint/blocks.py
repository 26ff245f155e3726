"""Parts of a parameter, as rectangles of a matrix: what one layout saved and another wants to read.

Every parameter is seen as a matrix: its first dimension by all others. A rank holds a block of it (its tensor shard),
flattened row after row, and ZeRO cuts a range out of that. Such a range is at most three rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from loglinear.parallel.shard import Shard


class Block(NamedTuple):
    """Rows [row, row + rows) and columns [column, column + columns) of a parameter's matrix."""

    row: int
    rows: int
    column: int
    columns: int

    @staticmethod
    def of(shard: Shard) -> Block:
        """The block that a tensor rank holds."""
        rows, columns = shard.shape[0], torch.Size(shard.shape[1:]).numel()
        if shard.dim == 0:
            return Block(shard.start, shard.size, 0, columns)
        assert len(shard.shape) == 2
        return Block(0, rows, shard.start, shard.size)

    def intersection(self, other: Block) -> Block:
        """What both hold; `rows` or `columns` is 0 if nothing."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        last_row = min(self.row + self.rows, other.row + other.rows)
        last_column = min(self.column + self.columns, other.column + other.columns)
        return Block(row, max(last_row - row, 0), column, max(last_column - column, 0))


class Rectangle(NamedTuple):
    """A block whose elements lie row after row from element `offset` of a flat range on."""

    block: Block
    offset: int


def rectangles(block: Block, start: int, numel: int) -> Iterator[Rectangle]:
    """The range [start, start + numel) of a flattened block: a part of a row, whole rows, a part of a row."""
    end = start + numel
    position = start
    while position < end:
        row, column = divmod(position, block.columns)
        if column or end - position < block.columns:
            part = Block(block.row + row, 1, block.column + column, min(block.columns - column, end - position))
        else:
            part = Block(block.row + row, (end - position) // block.columns, block.column, block.columns)
        yield Rectangle(part, position - start)
        position += part.rows * part.columns


def view(flat: torch.Tensor, rectangle: Rectangle, wanted: Block) -> torch.Tensor:
    """The elements of `wanted`, inside the rectangle: a view [rows, columns] of the flat range [elements]."""
    block, offset = rectangle
    matrix = flat[offset : offset + block.rows * block.columns].view(block.rows, block.columns)
    row, column = wanted.row - block.row, wanted.column - block.column
    return matrix[row : row + wanted.rows, column : column + wanted.columns]
