"""What a model is trained and tested on: rows of tokens, and the places where something is due.

Shapes: e example, t time, n label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class Cell(NamedTuple):
    """One size of a task: `length` tokens a row, `items` things to remember in it, `examples` rows."""

    length: int
    items: int
    examples: int

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.length}/{self.items}"


@dataclass(frozen=True)
class Examples:
    """Rows and their labels.

    Attributes:
        tokens_et: int32 [E, T].
        positions_en: int32 [E, N], where in its row each label is due; None where every position has one.
        labels_en: int32 [E, N], the token that is due.
    """

    tokens_et: torch.Tensor
    positions_en: torch.Tensor | None
    labels_en: torch.Tensor

    @staticmethod
    def of(tokens_et: np.ndarray, positions_en: np.ndarray, labels_en: np.ndarray) -> Examples:
        """From integer arrays."""
        tokens, positions, labels = (
            torch.from_numpy(array.astype(np.int32)) for array in (tokens_et, positions_en, labels_en)
        )
        return Examples(tokens, positions, labels)

    def __len__(self) -> int:
        return len(self.tokens_et)

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.tokens_et.shape[1]

    def to(self, device: torch.device) -> Examples:
        """The same on `device`."""
        return Examples(*(None if x is None else x.to(device) for x in self._fields()))  # pyright: ignore[reportArgumentType]

    def take(self, rows: torch.Tensor | slice) -> Examples:
        """The rows that `rows`, a slice or int64 [...], names; tokens then have shape [..., T]."""
        return Examples(*(None if x is None else x[rows] for x in self._fields()))  # pyright: ignore[reportArgumentType]

    def _fields(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        return self.tokens_et, self.positions_en, self.labels_en


def distinct(rng: np.random.Generator, low: int, high: int, rows: int, count: int) -> np.ndarray:
    """In each row `count` different integers of [low, high), in random order, all such rows being equally likely.

    What repeats an earlier one in its row is drawn again until nothing does. That treats all integers alike, so no
    row of different ones is likelier than another.

    Returns:
        int64 [rows, count].
    """
    assert count <= high - low
    drawn = rng.integers(low, high, size=(rows, count))
    open_rows = np.arange(rows)
    while len(open_rows):
        block = drawn[open_rows]
        order = np.argsort(block, axis=1, kind="stable")
        ordered = np.take_along_axis(block, order, 1)
        again = np.zeros(block.shape, bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        block[again] = rng.integers(low, high, size=int(again.sum()))
        drawn[open_rows] = block
        open_rows = open_rows[again.any(1)]
    return drawn


def weighted_distinct(rng: np.random.Generator, weights: np.ndarray, rows: int, count: int) -> np.ndarray:
    """In each row `count` different indices of `weights`, drawn one after the other in proportion to their weights.

    The largest of log weight + Gumbel noise are such a draw, in order (Efraimidis and Spirakis, 2006).

    Returns:
        int64 [rows, count].
    """
    keys = np.log(weights) + rng.gumbel(size=(rows, len(weights)))
    return np.argsort(-keys, axis=1)[:, :count]
