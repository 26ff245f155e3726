"""Which rows a run sees: every one once an epoch, in an order of its own, and the same whenever it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from loglinear.errors import UserError
from loglinear.experiments.order import Order

SIZES, BATCH, STEPS = (50, 20), 4, 400


def test_an_epoch_shows_every_row_once_but_for_what_fills_no_batch() -> None:
    order, seen = Order(SIZES, BATCH, STEPS, [3, 8]), {0: [], 1: []}
    for step in range(STEPS):
        part, rows_rb = order.at(step)
        assert rows_rb.shape == (2, BATCH)
        seen[part].append(rows_rb.numpy())
    for part, size in enumerate(SIZES):
        per_epoch = size // BATCH
        for run in range(2):
            rows = np.concatenate([batch[run] for batch in seen[part]])
            for epoch in range(len(seen[part]) // per_epoch):
                shown = rows[epoch * per_epoch * BATCH : (epoch + 1) * per_epoch * BATCH]
                assert len(set(shown.tolist())) == per_epoch * BATCH
                assert set(shown.tolist()) <= set(range(size))
        epochs = np.concatenate([batch[0] for batch in seen[part]])[: 2 * per_epoch * BATCH].reshape(2, -1)
        assert (epochs[0] != epochs[1]).mean() > 0.8, "epochs have orders of their own"
        first, second = (np.concatenate([batch[run] for batch in seen[part]]) for run in range(2))
        assert (first != second).mean() > 0.8, "runs have orders of their own"


def test_parts_are_taken_in_proportion_to_their_sizes() -> None:
    parts = [Order(SIZES, BATCH, STEPS, [0]).at(step)[0] for step in range(STEPS)]
    assert np.mean(parts) == pytest.approx(2 / 7, abs=4 * (10 / 49 / STEPS) ** 0.5)


def test_a_step_is_the_same_whatever_was_asked_before_and_whoever_runs_beside() -> None:
    """A group that goes on at step 300 sees what it would have seen; a run alone sees what it sees in a group."""
    whole, fresh, alone = (Order(SIZES, BATCH, STEPS, seeds) for seeds in ([1, 2], [1, 2], [2]))
    before = [whole.at(step) for step in range(STEPS)]
    for step in (300, 301, 17):
        part, rows_rb = fresh.at(step)
        assert part == before[step][0]
        assert rows_rb.equal(before[step][1])
        assert alone.at(step)[1][0].equal(rows_rb[1])


def test_a_part_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="a part of the data has 3 rows, less than a batch of 4"):
        Order((50, 3), BATCH, STEPS, [0])
