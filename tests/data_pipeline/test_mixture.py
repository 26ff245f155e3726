"""Shares are those that were asked for, limits hold, and every place is computed from its number alone."""

from __future__ import annotations

import pickle
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.mixture import BLOCK, Mixture, Stage

WEIGHTS = (0.61, 0.25, 0.1, 0.04)


def plain(*weights: float) -> Mixture:
    return Mixture(0, [Stage(0, weights)], [None] * len(weights))


def taken(mixture: Mixture, runs: int, first: int = 0) -> list[tuple[int, int]]:
    return [mixture.locate(run) for run in range(first, first + runs)]


def seconds(mixture: Mixture, first: int) -> float:
    """The least time that 300 places take."""
    times = []
    for _ in range(10):
        before = time.perf_counter()
        taken(mixture, 300, first)
        times.append(time.perf_counter() - before)
    return min(times)


def test_a_million_samples_have_the_shares_asked_for() -> None:
    mixture = plain(*WEIGHTS)
    counts = Counter(source for source, _ in taken(mixture, 1_000_000))
    for source, weight in enumerate(WEIGHTS):
        assert counts[source] / 1e6 == pytest.approx(weight, rel=1e-3)


weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)
limits = st.lists(st.one_of(st.none(), st.integers(0, 700)), min_size=5, max_size=5)


@given(weights=weights, limits=limits, second=st.integers(1, 1500), seed=st.integers(0, 3))
def test_every_source_gives_its_runs_in_full_and_once(
    weights: list[float], limits: list[int | None], second: int, seed: int
) -> None:
    limits = limits[: len(weights)]
    mixture = Mixture(seed, [Stage(0, tuple(weights)), Stage(second, tuple(reversed(weights)))], limits)
    runs = 3000 if mixture.end is None else min(mixture.end, 3000)
    numbers: dict[int, list[int]] = defaultdict(list)
    for source, number in taken(mixture, runs):
        numbers[source].append(number)
    for source, given_numbers in numbers.items():
        assert len(set(given_numbers)) == len(given_numbers)
        limit = limits[source]
        assert limit is None or len(given_numbers) <= limit
        gaps = max(given_numbers) + 1 - len(given_numbers)
        assert gaps <= (BLOCK if runs == 3000 and mixture.end != 3000 else 0), "only the last block may be under way"
    if mixture.end is not None and mixture.end <= 3000:
        assert runs == sum(limit or 0 for limit in limits), "it ends when all are at their limits, not before"


def test_a_source_at_its_limit_leaves_its_place_to_the_others() -> None:
    mixture = Mixture(0, [Stage(0, (0.5, 0.3, 0.2))], [1000, None, None])
    counts = Counter(source for source, _ in taken(mixture, 2000))
    assert counts[0] == 1000
    later = Counter(source for source, _ in taken(mixture, 10_240, first=2000))
    assert later[1] / 10_240 == pytest.approx(0.6, abs=1e-3)
    assert later[2] / 10_240 == pytest.approx(0.4, abs=1e-3)


def test_stages_change_the_weights_where_they_start() -> None:
    mixture = Mixture(0, [Stage(0, (1.0, 0.0)), Stage(777, (0.25, 0.75))], [None, None])
    assert {source for source, _ in taken(mixture, 777)} == {0}
    counts = Counter(source for source, _ in taken(mixture, 4 * BLOCK, first=777))
    assert counts == {0: BLOCK, 1: 3 * BLOCK}


def test_any_place_is_found_in_constant_time_and_memory() -> None:
    mixture = plain(*WEIGHTS)
    far = [mixture.locate(10**15 + run) for run in range(20_000)]
    assert Counter(source for source, _ in far)[0] / 20_000 == pytest.approx(0.61, abs=0.02)
    size = len(pickle.dumps(mixture))
    assert size < 2000
    assert seconds(mixture, 10**15) < 5 * seconds(mixture, 0)
    assert len(pickle.dumps(mixture)) == size


def test_turns_are_shuffled_by_the_seed() -> None:
    orders = [[source for source, _ in taken(Mixture(seed, [Stage(0, (1, 1))], [None] * 2), 64)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    runs = [len(list(group)) for group in zip(*[iter(orders[0])] * 2, strict=True) if len(set(group)) == 1]
    assert runs, "turns do not just alternate"


def test_one_source_comes_in_its_order() -> None:
    assert taken(plain(3.0), 5, 10**6) == [(0, 10**6 + i) for i in range(5)]


def test_a_fingerprint_tells_of_the_past_alone() -> None:
    stages = [Stage(0, (1.0, 1.0)), Stage(2000, (1.0, 3.0))]
    now = Mixture(0, stages, [None, None])
    other_future = Mixture(0, [stages[0], Stage(2500, (1.0, 9.0))], [None, None])
    other_past = Mixture(0, [Stage(0, (1.0, 1.1)), stages[1]], [None, None])
    assert now.fingerprint(1000) == other_future.fingerprint(1000)
    assert now.fingerprint(1000) != other_past.fingerprint(1000)
    assert now.fingerprint(2001) != other_future.fingerprint(2001)
    cut = Mixture(0, [stages[0], Stage(1500, (1.0, 3.0))], [None, None])
    assert cut.fingerprint(1400) != now.fingerprint(1400), "the block that is under way would be shuffled anew"
    assert taken(cut, 1024) == taken(now, 1024)
    assert cut.fingerprint(1024) == now.fingerprint(1024)


def test_the_order_never_changes() -> None:
    """These numbers are a promise: a run that is resumed with a newer version goes on in the same order."""
    mixture = Mixture(0, [Stage(0, (2, 1)), Stage(6, (0, 1))], [None, 4])
    assert mixture.end == 8
    assert taken(mixture, 8) == [(0, 1), (0, 3), (1, 0), (1, 1), (0, 0), (0, 2), (1, 2), (1, 3)]
