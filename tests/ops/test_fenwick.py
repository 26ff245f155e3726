"""Levels, buckets and level counts, against the bit formulas and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loglinear.ops.fenwick import bit_length, bucket_start, level, level_table, num_levels, set_bits
from tests.ops.op_cases import bucket_of


@pytest.mark.parametrize(
    ("length", "count"),
    [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (256, 9), (257, 10), (2048, 12), (16384, 15), (131072, 18)],
)
def test_level_counts_of_the_design(length: int, count: int) -> None:
    assert num_levels(length) == count


def test_the_level_count_is_one_more_than_the_highest_level_in_use() -> None:
    for length in range(1, 300):
        assert num_levels(length) == 1 + max(level(t, s) for t in (length - 1,) for s in range(t + 1))
        assert num_levels(length) == math.ceil(math.log2(length)) + 1


def test_levels_by_hand() -> None:
    """Position 6 = 110b reads itself, 4..5 at level 2 and 0..3 at level 3; position 7 = 111b also 6 at level 1."""
    assert [level(6, s) for s in range(7)] == [3, 3, 3, 3, 2, 2, 0]
    assert [level(7, s) for s in range(8)] == [3, 3, 3, 3, 2, 2, 1, 0]
    assert [level(8, s) for s in range(9)] == [4] * 8 + [0]
    assert level(2**40 + 1, 2**40) == 1


def test_buckets_hold_exactly_the_keys_of_their_level() -> None:
    for t in range(200):
        for wanted in range(9):
            assert [s for s in range(t + 1) if level(t, s) == wanted] == list(bucket_of(t, wanted))


def test_active_levels_are_one_more_than_the_set_bits() -> None:
    for t in range(1024):
        assert len({level(t, s) for s in range(t + 1)}) == bin(t).count("1") + 1


def test_bucket_start_is_the_first_position_of_the_bucket() -> None:
    for t in range(1, 200):
        for bucket in range(t.bit_length()):
            if t >> bucket & 1:
                assert bucket_start(t, bucket) == bucket_of(t, bucket + 1)[0]


def test_the_table_holds_the_levels_of_all_pairs() -> None:
    table = level_table(37)
    wanted = [[level(t, s) if s <= t else -1 for s in range(37)] for t in range(37)]
    assert table.tolist() == wanted


def test_bit_length_is_pythons() -> None:
    values = [0, 1, 2, 3, *(2**n + change for n in range(2, 62) for change in (-1, 0, 1))]
    assert bit_length(np.array(values)).tolist() == [value.bit_length() for value in values]


def test_set_bits_lists_every_set_bit() -> None:
    bits, elements = set_bits(np.array([0, 5, 6, 8]), 3)
    assert sorted(zip(elements.tolist(), bits.tolist(), strict=True)) == [(1, 0), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_sequence_has_no_levels(length: int) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        num_levels(length)


@pytest.mark.parametrize(("t", "s"), [(3, 4), (3, -1), (-1, -1)])
def test_a_key_must_lie_in_the_past(t: int, s: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 0\.\.t"):
        level(t, s)
