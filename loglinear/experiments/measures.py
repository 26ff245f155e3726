"""What is recorded of runs: scores by level policy, gradient norms by parameter group, level scales.

Shapes: r run, e example, t time, n label, w weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from loglinear.config import BeyondName
from loglinear.experiments.ensemble import Ensemble
from loglinear.experiments.protocol import Mode
from loglinear.experiments.tasks import RowSet
from loglinear.ops.lambda_map import LambdaMap
from loglinear.train.level_scales import LevelScaleStatistics

Record = dict[str, Any]

TOKENS_AT_ONCE = 1 << 20  # of a run, in one forward pass of an evaluation
LOGITS_AT_ONCE = 1 << 29  # likewise
LEVEL_ROWS = 4  # rows at which level scales are looked at
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LOW, HIGH = 0.05, 2.0  # level scales below and above are extreme; a start at one is neither
LEVEL_COLUMNS = ("layer", "level", "mean", *(f"q{round(100 * q)}" for q in QUANTILES), "low", "high")
GROUPS = {  # the first pattern that is found in a parameter's name
    "level scales": "lambda_map",
    "decay": r"A_log|dt_bias|dt_proj|\.D$",
    "convolutions": "_conv",
    "norms": r"norm\.weight$",
    "embedding": "^embedding|^head",
    "projections": "_proj",
    "MLP": r"\.mlp\.",
}


def policies(mode: Mode, length: int, trained: int) -> tuple[BeyondName | None, ...]:
    """The policies that can differ for rows of `length` tokens of a model trained on `trained`; None if none can.

    To extend lambda is to repeat the logit, except under a softmax.
    """
    if length <= trained or mode in ("none", "softmax"):
        return (None,)
    return ("clamp", "extend", "one") if mode in ("mlp_softmax", "mlp_masked_softmax") else ("clamp", "one")


def score_sets(ensemble: Ensemble, mode: Mode, trained: int, sets: Sequence[RowSet]) -> list[list[Record]]:
    """For each run a record of every set and policy: accuracy over labels, share of exact rows, loss."""
    records: list[list[Record]] = [[] for _ in ensemble.runs]
    for rows in sets:
        for policy in policies(mode, rows.examples.length, trained):
            for module in (module for model in ensemble.models for module in model.modules()):
                if isinstance(module, LambdaMap):
                    module.beyond = policy or "error"
            losses_ren, hits_ren = _scores(ensemble, rows)
            for run, of_run in enumerate(records):
                record = {"kind": rows.kind, "set": rows.name, "beyond": policy}
                of_run.append(record | _summary(rows, losses_ren[run], hits_ren[run]))
    return records


def gradient_norms(ensemble: Ensemble, gradient_rw: torch.Tensor) -> list[dict[str, float | None]]:
    """Each run's gradient norm by group of parameters."""
    norms: list[dict[str, float | None]] = []
    for gradient_w in gradient_rw:
        squares = dict.fromkeys(GROUPS, 0.0)
        for name, part in ensemble.split(gradient_w):
            squares[group_of(name)] += float(part.square().sum())
        norms.append({group: rounded(square**0.5) for group, square in squares.items() if square})
    return norms


def group_of(name: str) -> str:
    """The group of the parameter called `name`."""
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


class LevelScaleRecorder:
    """Distribution of lambda by layer and level, at the tokens that read the level."""

    def __init__(self, ensemble: Ensemble, rows: RowSet) -> None:
        """Look at the first of `rows`, none of which is longer than what is trained."""
        self._models = ensemble.models
        self._statistics = [LevelScaleStatistics(model) for model in self._models]
        self._tokens_et = rows.examples.tokens_et[:LEVEL_ROWS].long()

    @torch.no_grad()
    def take(self) -> list[list[list[float | None]]]:
        """For each run a row of `LEVEL_COLUMNS` for every layer and level."""
        taken = []
        for model, statistics in zip(self._models, self._statistics, strict=True):
            statistics.recording = True
            model.hidden(self._tokens_et)
            statistics.recording = False
            taken.append([list(map(rounded, row)) for row in _level_rows(statistics)])
        return taken


def rounded(value: float) -> float | None:
    """Five digits, which is more than any of it is good for; None, which JSON has, for what is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _level_rows(statistics: LevelScaleStatistics) -> Iterator[list[float]]:
    for layer, level, scales in statistics.take():
        quantiles = scales.quantile(scales.new_tensor(QUANTILES)).tolist()
        extremes = [float((scales < LOW).float().mean()), float((scales > HIGH).float().mean())]
        yield [layer, level, float(scales.mean()), *quantiles, *extremes]


def _scores(ensemble: Ensemble, rows: RowSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and hits of all runs, [R, E, N] on the CPU, a few rows at a time."""
    examples = rows.examples
    logits = examples.labels_en.shape[1] * ensemble.models[0].head.out_features
    at_once = max(1, min(TOKENS_AT_ONCE // examples.length, LOGITS_AT_ONCE // logits))
    parts = [ensemble.score(examples.take(slice(start, start + at_once))) for start in range(0, len(examples), at_once)]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses, 1).cpu(), torch.cat(hits, 1).cpu()


def _summary(rows: RowSet, losses_en: torch.Tensor, hits_en: torch.Tensor) -> Record:
    due_en = rows.examples.labels_en.cpu() >= 0
    count = due_en.sum()
    summary: Record = {
        "accuracy": rounded(float((hits_en & due_en).sum() / count)),
        "exact": rounded(float((hits_en | ~due_en).all(1).float().mean())),
        "loss": rounded(float(losses_en.double().sum() / count)),
    }
    if rows.edges:
        summary["regions"] = {
            source: _regions(rows, losses_en[[name == source for name in rows.sources]])
            for source in sorted(set(rows.sources))
        }
    return summary


def _regions(rows: RowSet, losses_et: torch.Tensor) -> list[float | None]:
    """Mean loss between the edges, the row's start and its end."""
    bounds = [0, *rows.edges, rows.examples.length]
    means = [losses_et[:, start:end].double().mean() for start, end in pairwise(bounds)]
    return [rounded(float(mean)) for mean in means]
