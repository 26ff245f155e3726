"""Recall and copying tasks against what a row must be by definition, and against published statistics."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from loglinear.errors import UserError
from loglinear.experiments.copying import selective_copying
from loglinear.experiments.examples import Cell, Examples, distinct, weighted_distinct
from loglinear.experiments.mqar import contiguous_recall, spread_recall

Task = Callable[[Cell, int, np.random.Generator], Examples]
ZOOLOGY = [(64, 4), (64, 8), (64, 16), (128, 8), (128, 32), (256, 16), (256, 64), (512, 128), (1024, 256)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows(examples: Examples) -> list[tuple[list[int], list[int], list[int]]]:
    assert examples.positions_en is not None
    return list(
        zip(examples.tokens_et.tolist(), examples.positions_en.tolist(), examples.labels_en.tolist(), strict=True)
    )


@pytest.mark.parametrize(("length", "pairs"), ZOOLOGY)
def test_every_query_is_a_key_and_its_label_the_value_shown_beside_it(length: int, pairs: int) -> None:
    for tokens, positions, labels in rows(spread_recall(Cell(length, pairs, 20), 8192, rng())):
        assert len(tokens) == length
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert set(keys) <= set(range(1, 4096))
        assert set(values) <= set(range(4096, 8192))
        shown = dict(zip(keys, values, strict=True))
        assert [shown[tokens[position]] for position in positions] == labels
        assert sorted(labels) == sorted(values), "every pair is asked for once"
        assert {(position - 2 * pairs) % 2 for position in positions} == {0}
        assert 2 * pairs <= min(positions)
        assert max(positions) < length


def test_a_row_of_recall_by_hand() -> None:
    """Two pairs in eight tokens leave two gaps, so the queries stand at 4 and 6, and only 5 and 7 are random."""
    for tokens, positions, labels in rows(spread_recall(Cell(8, 2, 50), 6, rng())):
        assert sorted(tokens[0:4:2]) == [1, 2]
        assert set(tokens[1:4:2]) <= {3, 4, 5}
        assert sorted(positions) == [4, 6]
        assert labels == [tokens[1 + 2 * tokens[0:4:2].index(tokens[position])] for position in positions]


def test_gaps_are_as_crowded_as_zoologys() -> None:
    """The first key's gap i has probability i^-0.99 / sum of them: of 28 gaps the first 25.1 %, the last 0.9 %."""
    positions = np.array([row[1] for row in rows(spread_recall(Cell(64, 4, 40_000), 8192, rng()))])
    share = np.bincount((positions[:, 0] - 8) // 2, minlength=28) / 40_000
    wanted = np.arange(1, 29) ** -0.99
    wanted /= wanted.sum()
    assert wanted[[0, 27]] == pytest.approx([0.2511, 0.0093], abs=1e-4)
    assert np.abs(share - wanted).max() < 4 * (0.25 * 0.75 / 40_000) ** 0.5


def test_the_rest_of_a_row_is_uniform() -> None:
    examples = spread_recall(Cell(64, 4, 4_000), 16, rng())
    assert examples.positions_en is not None
    free = np.ones(examples.tokens_et.shape, bool)
    free[:, :8] = False
    np.put_along_axis(free, examples.positions_en.numpy().astype(np.int64), False, 1)
    counts = np.bincount(examples.tokens_et.numpy()[free], minlength=16)
    assert np.abs(counts / counts.sum() - 1 / 16).max() < 0.003


def test_draws_without_replacement_are_uniform_over_ordered_rows() -> None:
    """All 24 ordered pairs of four integers and, of 4 from 4, all 24 permutations, within five standard errors."""
    for count in (2, 4):
        drawn = distinct(rng(count), 3, 7, 48_000, count)
        seen = Counter(map(tuple, drawn.tolist()))
        possible = list(itertools.permutations(range(3, 7), count))
        assert set(seen) == set(possible)
        expected = 48_000 / len(possible)
        assert max(abs(seen[row] - expected) for row in possible) < 5 * expected**0.5


def test_weighted_draws_are_sequential_draws() -> None:
    """P(a, then b) = w_a / (w_a + w_b + w_c) * w_b / (w_b + w_c), by hand for weights 1, 2, 3."""
    seen = Counter(map(tuple, weighted_distinct(rng(), np.array([1.0, 2.0, 3.0]), 60_000, 2).tolist()))
    wanted = {(0, 1): 1 / 6 * 2 / 5, (0, 2): 1 / 6 * 3 / 5, (1, 0): 2 / 6 * 1 / 4}
    wanted |= {(1, 2): 2 / 6 * 3 / 4, (2, 0): 3 / 6 * 1 / 3, (2, 1): 3 / 6 * 2 / 3}
    for row, probability in wanted.items():
        assert seen[row] / 60_000 == pytest.approx(probability, abs=0.01)


def test_contiguous_queries_stand_at_the_end_behind_filler() -> None:
    for tokens, positions, labels in rows(contiguous_recall(Cell(128, 32, 20), 128, rng())):
        keys, values = tokens[0:64:2], tokens[1:64:2]
        assert tokens[64:96] == [0] * 32
        assert positions == list(range(96, 128))
        assert sorted(tokens[96:]) == sorted(keys)
        shown = dict(zip(keys, values, strict=True))
        assert [shown[key] for key in tokens[96:]] == labels
        assert tokens[96:] != keys


def test_copied_tokens_stand_in_order_among_noise_and_are_due_at_the_marks() -> None:
    for tokens, positions, labels in rows(selective_copying(Cell(256, 16, 50), 16, rng())):
        body = tokens[:240]
        assert [token for token in body if token] == labels
        assert len(labels) == 16
        assert set(labels) <= set(range(1, 15))
        assert tokens[240:] == [15] * 16
        assert positions == list(range(240, 256))


def test_copied_tokens_lie_anywhere_alike() -> None:
    """Each of 48 places holds one of 16 tokens with probability 1/3."""
    examples = selective_copying(Cell(64, 16, 9_000), 16, rng())
    share = (examples.tokens_et[:, :48] != 0).float().mean(0)
    assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / 9_000) ** 0.5


@pytest.mark.parametrize("task", [spread_recall, contiguous_recall, selective_copying])
def test_the_seed_alone_decides(task: Task) -> None:
    cell = Cell(64, 8, 30)
    first, again, other = (task(cell, 64, rng(seed)).tokens_et for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(
    ("task", "cell", "vocab_size", "sentence"),
    [
        (spread_recall, Cell(64, 17, 1), 8192, "17 pairs need 68 tokens, but a row has 64: take fewer pairs"),
        (spread_recall, Cell(64, 8, 1), 16, "8 different keys need a vocabulary of 18, not 16"),
        (contiguous_recall, Cell(64, 22, 1), 8192, "22 pairs need 66 tokens"),
        (selective_copying, Cell(20, 16, 1), 16, "16 tokens to copy need a row of 32"),
    ],
)
def test_what_does_not_fit_is_refused(task: Task, cell: Cell, vocab_size: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        task(cell, vocab_size, rng())
