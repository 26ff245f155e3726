"""Which rows a run trains on at which step: a function of its seed and of the step's number, so nothing needs saving.

Shapes: r run, b batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loglinear.errors import UserError

PARTS, ROWS = 1, 2  # what random numbers are for


class Order:
    """Steps take parts of the data in proportion to their sizes, and epochs of a part in random order."""

    def __init__(self, sizes: Sequence[int], batch: int, steps: int, seeds: Sequence[int]) -> None:
        """Batches of `batch` rows from parts of `sizes` rows, for runs with `seeds`.

        The parts of the steps are the same for all runs, which may so be trained together; the rows are not. What is
        left of a part at the end of an epoch, less than a batch, is left out.

        Raises:
            UserError: a part is smaller than a batch.
        """
        if min(sizes) < batch:
            raise UserError(f"a part of the data has {min(sizes)} rows, less than a batch of {batch}: take more rows")
        self._sizes, self._batch, self._seeds = sizes, batch, seeds
        share = np.array(sizes) / sum(sizes)
        self._part = np.random.default_rng([PARTS, steps]).choice(len(sizes), size=steps, p=share)
        self._visit = np.zeros(steps, np.int64)
        for part in range(len(sizes)):
            here = self._part == part
            self._visit[here] = np.arange(here.sum())
        self._epochs: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def at(self, step: int) -> tuple[int, torch.Tensor]:
        """The part of step `step`, counted from 0, and each run's rows of it, int64 [R, B]."""
        part = int(self._part[step])
        epoch, place = divmod(int(self._visit[step]), self._sizes[part] // self._batch)
        rows = slice(place * self._batch, (place + 1) * self._batch)
        return part, torch.from_numpy(np.stack([self._epoch(seed, part, epoch)[rows] for seed in self._seeds]))

    def _epoch(self, seed: int, part: int, epoch: int) -> np.ndarray:
        kept = self._epochs.get((seed, part))
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng([ROWS, seed, part, epoch])
            kept = self._epochs[seed, part] = epoch, rng.permutation(self._sizes[part])
        return kept[1]
