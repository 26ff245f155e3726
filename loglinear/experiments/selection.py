"""Which learning rate of the sweep a mode is reported at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from loglinear.experiments.results import Result


def validation_score(result: Result) -> float:
    """Minus the last validation loss, mean over its sets: the higher the better; minus infinity if it is not finite."""
    losses = [record["loss"] for record in result["curve"][-1]["validation"]]
    return -math.inf if None in losses else -statistics.fmean(losses)


def sweep_scores(results: Sequence[Result], mode: str) -> dict[float, float]:
    """Mean validation score of each learning rate in a mode's sweep."""
    scores: dict[float, list[float]] = {}
    for result in results:
        if (result["phase"], result["mode"]) == ("sweep", mode):
            scores.setdefault(result["rate"], []).append(validation_score(result))
    return {rate: statistics.fmean(of_rate) for rate, of_rate in sorted(scores.items())}


def best_rate(results: Sequence[Result], mode: str) -> float:
    """The rate with the highest mean validation score over the sweep's seeds; the smallest of those that tie."""
    scores = sweep_scores(results, mode)
    assert scores, "the sweep comes first"
    return max(scores, key=lambda rate: (scores[rate], -rate))
