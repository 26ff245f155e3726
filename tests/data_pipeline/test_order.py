"""The order is a pure function of the seed and a sample's number, and every pass takes each sample once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import SampleOrder, shuffled

orders = st.builds(SampleOrder, seed=st.integers(), window=st.integers(1, 20))
totals = st.integers(1, 100)


def one_pass(order: SampleOrder, total: int, epoch: int) -> list[int]:
    return [order.locate(epoch * total + place, total) for place in range(total)]


@given(order=orders, total=totals, epoch=st.integers(0, 3))
def test_each_pass_takes_every_sample_once(order: SampleOrder, total: int, epoch: int) -> None:
    assert sorted(one_pass(order, total, epoch)) == list(range(total))


@given(order=orders, total=totals, data=st.data())
def test_the_order_is_the_same_before_the_total_is_known(order: SampleOrder, total: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, total - 1))
    if order.needed(number) <= total:
        known = data.draw(st.integers(order.needed(number), total))
        assert order.locate(number, known) == order.locate(number, total)


@given(order=orders, total=totals)
def test_the_first_pass_takes_the_windows_in_stream_order(order: SampleOrder, total: int) -> None:
    windows = [sample // order.window for sample in one_pass(order, total, 0)]
    assert windows == sorted(windows)


def test_passes_and_seeds_differ() -> None:
    passes = [one_pass(SampleOrder(seed, 10), 105, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, passes))) == len(passes)
    later_windows = [sample // 10 for sample in passes[1][::10]]
    assert later_windows[:10] != sorted(later_windows[:10])
    assert later_windows[10] == 10, "the shorter last window stays last"


@given(size=st.integers(1, 300), key=st.text(max_size=5))
def test_a_shuffle_is_a_permutation(size: int, key: str) -> None:
    assert sorted(shuffled(place, size, key) for place in range(size)) == list(range(size))


def test_a_shuffle_is_even() -> None:
    """Every place goes everywhere equally often; 5 standard deviations of 4,000 trials."""
    trials, size = 4000, 9
    went = np.zeros((size, size))
    for key in range(trials):
        for place in range(size):
            went[place, shuffled(place, size, str(key))] += 1
    assert abs(went - trials / size).max() < 5 * (trials / size) ** 0.5


def test_any_sample_of_a_trillion_is_found_at_once() -> None:
    order, total = SampleOrder(seed=1, window=4096), 10**12
    found = [order.locate(3 * total + place, total) for place in range(5000)]
    assert len(set(found)) == 5000
    assert 0 <= min(found) <= max(found) < total
    assert len({sample // 4096 for sample in found}) == 2, "two windows, far from the first of the stream"


def test_the_order_never_changes() -> None:
    """These numbers are a promise: a run that is resumed with a newer version goes on in the same order."""
    assert one_pass(SampleOrder(seed=0, window=4), 10, 0) == [3, 0, 1, 2, 5, 6, 4, 7, 8, 9]
    assert one_pass(SampleOrder(seed=0, window=4), 10, 1) == [0, 2, 1, 3, 4, 7, 5, 6, 8, 9]
