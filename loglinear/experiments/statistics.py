"""Whether two modes differ: a paired bootstrap over seeds, corrected for the number of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RANDOM = 0  # seed of the resampling


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, its percentile interval, and how surprising it were without any."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(differences: np.ndarray, resamples: int, confidence: float) -> Difference:
    """Resample seeds, and units within them, with replacement (Efron and Tibshirani, 1993, chapters 13 and 16).

    Args:
        differences: [seeds] or [seeds, units], one mode's result minus the other's with the same seed on the same
            unit (a novel). Seeds and units are resampled independently of each other.
        resamples: how many times.
        confidence: of the percentile interval, such as 0.95.

    Returns:
        The mean, its interval, and p: twice the smaller share of resampled means on one side of zero, those at zero
        counted on both, with one more resample than there were on each side, so that p is never 0. Where a run's
        loss was not finite there is no mean, and p is 1.
    """
    table = np.asarray(differences, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if not np.isfinite(table).all():
        return Difference(math.nan, math.nan, math.nan, 1.0)
    seeds, units = table.shape
    rng = np.random.default_rng(RANDOM)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    unit_counts = rng.multinomial(units, np.full(units, 1 / units), size=resamples)
    means = np.einsum("rs,su,ru->r", seed_counts, table, unit_counts, optimize=True) / (seeds * units)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    tolerance = 1e-12 * max(1.0, float(np.abs(table).max()))
    sides = (means <= tolerance).sum(), (means >= -tolerance).sum()
    p = min(1.0, 2 * (int(min(sides)) + 1) / (resamples + 1))
    return Difference(float(table.mean()), float(low), float(high), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given, that keep the chance of any false difference (Holm, 1979).

    The i-th smallest of m is multiplied by m - i + 1; a larger one never gets less than a smaller one, and none
    more than 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def is_difference(difference: Difference, adjusted_p: float, significance: float, margin: float) -> bool:
    """Whether it counts: significant after the correction, and not smaller than what anybody would care for."""
    return adjusted_p < significance and abs(difference.mean) >= margin
