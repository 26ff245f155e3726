"""The bootstrap against all resamples counted one by one, Holm's correction against a worked example."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from loglinear.experiments.statistics import Difference, holm, is_difference, paired_bootstrap

RESAMPLES = 100_000


def all_means(table: np.ndarray) -> np.ndarray:
    """The mean of every resample of seeds and units, each as likely as any other."""
    seeds, units = table.shape
    return np.array(
        [
            np.mean([table[seed, unit] for seed in chosen for unit in among])
            for chosen in itertools.product(range(seeds), repeat=seeds)
            for among in itertools.product(range(units), repeat=units)
        ]
    )


@pytest.mark.parametrize(
    "table",
    [
        np.array([[1.0], [2.0], [-0.5], [0.25]]),
        np.array([[0.2, -0.1, 0.7], [0.3, -0.2, 0.1], [-0.4, 0.6, 0.05]]),
    ],
)
def test_the_bootstrap_is_what_all_resamples_give(table: np.ndarray) -> None:
    found, means = paired_bootstrap(table, RESAMPLES, 0.9), all_means(table)
    assert found.mean == pytest.approx(table.mean())
    steps = np.unique(np.abs(np.diff(np.unique(means)))).max()
    assert found.low == pytest.approx(np.quantile(means, 0.05), abs=steps)
    assert found.high == pytest.approx(np.quantile(means, 0.95), abs=steps)
    wanted = 2 * min((means <= 1e-12).mean(), (means >= -1e-12).mean())
    assert found.p == pytest.approx(wanted, abs=4 * (wanted / RESAMPLES) ** 0.5 + 1e-4)


def test_two_seeds_by_hand() -> None:
    """Differences 1 and -1: resamples -1, 0, 0, 1 with a quarter each, so p = 2 * 3/4, at most 1."""
    found = paired_bootstrap(np.array([1.0, -1.0]), RESAMPLES, 0.95)
    assert found == Difference(0.0, -1.0, 1.0, 1.0)


def test_p_is_never_zero_and_one_sign_gives_the_least() -> None:
    found = paired_bootstrap(np.full(10, 0.3), 999, 0.95)
    assert found.p == 2 / 1000
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))


def test_what_is_not_finite_is_no_evidence() -> None:
    found = paired_bootstrap(np.array([0.3, np.nan, 0.3]), 999, 0.95)
    assert math.isnan(found.mean)
    assert found.p == 1
    assert not is_difference(found, found.p, 0.05, 0.02)


def test_normal_differences_give_the_normal_interval() -> None:
    """Of 400 draws: mean +- 1.96 standard errors, and the two-sided p of the normal distribution."""
    draws = np.random.default_rng(1).normal(0.08, 1.0, 400)
    found = paired_bootstrap(draws, RESAMPLES, 0.95)
    error = draws.std() / 20
    assert found.low == pytest.approx(draws.mean() - 1.96 * error, abs=0.06 * error)
    assert found.high == pytest.approx(draws.mean() + 1.96 * error, abs=0.06 * error)
    assert found.p == pytest.approx(math.erfc(abs(draws.mean()) / error / 2**0.5), abs=0.01)


def test_holm_by_hand() -> None:
    """0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 are 0.04, 0.06, 0.06, 0.04, and the last may not fall below 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_difference_must_be_significant_and_large_enough() -> None:
    large, small = Difference(-0.05, -0.07, -0.03, 1e-4), Difference(0.01, 0.005, 0.015, 1e-4)
    assert is_difference(large, 0.04, 0.05, 0.02)
    assert not is_difference(large, 0.06, 0.05, 0.02)
    assert not is_difference(small, 0.04, 0.05, 0.02)
