"""What the results of an experiment amount to: numbers by mode, comparisons, failures. No text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loglinear.experiments.protocol import Experiment, Mode, NovelsTask, Statistics
from loglinear.experiments.results import Result
from loglinear.experiments.selection import best_rate
from loglinear.experiments.statistics import Difference, holm, is_difference, paired_bootstrap

DEFAULT_POLICY = "clamp"  # what untrained levels get wherever nothing else is said
Measure = Callable[[Result], np.ndarray]  # of a run, one number a unit


@dataclass(frozen=True)
class Outcome:
    """One thing that modes are compared by."""

    name: str
    measure: Measure


@dataclass(frozen=True)
class Comparison:
    """The focus minus a rival in one outcome.

    Attributes:
        adjusted_p: after Holm's correction over all comparisons of the experiment.
        counts: whether the protocol calls it a difference.
    """

    rival: Mode
    outcome: str
    seeds: int
    difference: Difference
    adjusted_p: float
    counts: bool


@dataclass(frozen=True)
class Summary:
    """An experiment and its results so far.

    Attributes:
        name: of the experiment.
        experiment: its protocol.
        rules: how it is judged.
        results: every finished run.
    """

    name: str
    experiment: Experiment
    rules: Statistics
    results: Sequence[Result]

    @cached_property
    def final(self) -> dict[Mode, list[Result]]:
        """The reported runs by mode, in order of their seeds, at the rate that the sweep chose; absent without one."""
        found: dict[Mode, list[Result]] = {}
        for mode in self.experiment.modes:
            if not any((r["phase"], r["mode"]) == ("sweep", mode) for r in self.results):
                continue
            key = "final", mode, best_rate(self.results, mode)
            runs = [r for r in self.results if (r["phase"], r["mode"], r["rate"]) == key]
            if runs:
                found[mode] = sorted(runs, key=lambda result: result["seed"])
        return found

    @property
    def is_novels(self) -> bool:
        """Whether it is measured by loss, of which less is better, instead of accuracy."""
        return isinstance(self.experiment.task, NovelsTask)

    @property
    def gpu_minutes(self) -> float:
        """Time of all runs in training and test, those of the sweep included."""
        return sum(result["seconds"] for result in self.results) / 60

    @property
    def missing(self) -> int:
        """Runs of the protocol that are not finished."""
        sweep = len(self.experiment.rates) * self.experiment.sweep_seeds
        wanted = len(self.experiment.modes) * (sweep + self.experiment.seeds)
        swept = sum(result["phase"] == "sweep" for result in self.results)
        reported = sum(result["seed"] < self.experiment.seeds for runs in self.final.values() for result in runs)
        return wanted - swept - reported

    def sets(self, kind: str) -> list[str]:
        """Names of the sets of a kind that were record_of, in order."""
        tests = (test for runs in self.final.values() for result in runs[:1] for test in result["test"])
        return list(dict.fromkeys(test["set"] for test in tests if test["kind"] == kind))

    def outcomes(self) -> list[Outcome]:
        """What modes are compared by: the mean over the test, and over what is longer than training."""
        if self.is_novels:
            bounds, trained = region_bounds(self.experiment), self.experiment.model.seq_len
            return [
                Outcome("loss within the trained length", lambda r: _loss_between(r, bounds, 0, trained)),
                Outcome("loss beyond it", lambda r: _loss_between(r, bounds, trained, bounds[-1])),
            ]
        return [
            Outcome("test", lambda r: np.array([_mean_accuracy(r, "test")])),
            Outcome("longer than trained", lambda r: np.array([_mean_accuracy(r, "longer")])),
        ]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The focus against every other log-linear mode on the seeds that both have, in every outcome."""
        rules, focus = self.rules, self.rules.focus
        ours = {result["seed"]: result for result in self.final.get(focus, [])}
        found: list[tuple[Mode, str, int, Difference]] = []
        for rival, runs in self.final.items():
            if rival == focus or rival == "softmax":
                continue
            theirs = {result["seed"]: result for result in runs}
            seeds = sorted(ours.keys() & theirs.keys())
            for outcome in self.outcomes() if len(seeds) > 1 else ():
                rows = [outcome.measure(ours[seed]) - outcome.measure(theirs[seed]) for seed in seeds]
                bootstrap = paired_bootstrap(np.stack(rows), rules.resamples, rules.confidence)
                found.append((rival, outcome.name, len(seeds), bootstrap))
        adjusted = holm([difference.p for *_, difference in found])
        return [
            Comparison(*row, p, is_difference(row[3], p, rules.significance, self.experiment.margin))
            for row, p in zip(found, adjusted, strict=True)
        ]

    def failures(self, mode: Mode) -> dict[str, list[int]]:
        """Seeds of reported runs that failed, by how."""
        failed: dict[str, list[int]] = {"diverged": [], "collapsed": [], "learned nothing": []}
        for result in self.final.get(mode, []):
            kind = failure(result, self.rules)
            if kind is not None:
                failed[kind].append(result["seed"])
        return failed


def failure(result: Result, rules: Statistics) -> str | None:
    """How a run failed, if it did: its loss was not finite, it fell from its best, or it never got anywhere."""
    losses = [record["train_loss"] for record in result["curve"]]
    losses += [each["loss"] for record in result["curve"] for each in record["validation"]]
    if None in losses:
        return "diverged"
    accuracies = validation_accuracies(result)
    if max(accuracies) < rules.unlearned:
        return "learned nothing"
    return "collapsed" if accuracies[-1] < max(accuracies) - rules.collapse else None


def validation_accuracies(result: Result) -> list[float]:
    """Mean accuracy over the validation sets at every record."""
    return [statistics.fmean(each["accuracy"] for each in record["validation"]) for record in result["curve"]]


def record_of(result: Result, kind: str, name: str, policy: str = DEFAULT_POLICY) -> Result:
    """The record of a set under a policy for untrained levels, or under none where none can differ."""
    records = [test for test in result["test"] if (test["kind"], test["set"]) == (kind, name)]
    chosen = {test["beyond"]: test for test in records}
    if policy == "extend" and policy not in chosen:
        policy = "clamp"  # the same except under a softmax
    return chosen[policy] if policy in chosen else chosen[None]


def novel_losses(result: Result, policy: str = DEFAULT_POLICY) -> np.ndarray:
    """Loss by novel and region, [novels, regions], in order of the novels' names."""
    name = next(test["set"] for test in result["test"] if test["kind"] == "novels")
    regions = record_of(result, "novels", name, policy)["regions"]
    return np.array([regions[source] for source in sorted(regions)], np.float64)


def region_bounds(experiment: Experiment) -> list[int]:
    """Where regions of novels begin, and where the last one ends."""
    task = experiment.task
    assert isinstance(task, NovelsTask)
    return [0, *task.edges, task.test_length]


def _mean_accuracy(result: Result, kind: str) -> float:
    names = dict.fromkeys(test["set"] for test in result["test"] if test["kind"] == kind)
    return statistics.fmean(record_of(result, kind, name)["accuracy"] for name in names)


def _loss_between(result: Result, bounds: Sequence[int], first: int, end: int) -> np.ndarray:
    """Each novel's mean loss at the positions from `first` to `end`, both of them bounds."""
    inside = slice(bounds.index(first), bounds.index(end))
    widths = np.diff(bounds)[inside]
    return novel_losses(result)[:, inside] @ (widths / widths.sum())
