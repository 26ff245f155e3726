"""The reviewer's points and the published numbers, each beside what was measured; never more than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loglinear.experiments import tables
from loglinear.experiments.protocol import Mode
from loglinear.experiments.statistics import Difference, paired_bootstrap
from loglinear.experiments.summary import Summary, record_of

NOT_YET = "Not known yet: no run that would tell is finished."


@dataclass(frozen=True)
class Claim:
    """A published comparison of two modes, and the test here that is nearest to it.

    Attributes:
        text: what was published, accuracies in per cent.
        experiment, kind, test: the nearest test.
        modes: that stand for the two sides.
        is_better: whether the second was published as better by more than the protocol's margin, else as equal.
    """

    text: str
    experiment: str
    kind: str
    test: str
    modes: tuple[Mode, Mode]
    is_better: bool


ADAPTIVE: tuple[Mode, Mode] = ("scaled", "mlp")
PUBLISHED = (
    Claim(
        "recall, length 128, 8 pairs: fixed 99.4, softplus MLP 99.2",
        "mqar_contiguous",
        "test",
        "128/8",
        ADAPTIVE,
        is_better=False,
    ),
    Claim("the same with 16 pairs: 99.3, 99.5", "mqar_contiguous", "test", "128/16", ADAPTIVE, is_better=False),
    Claim(
        "the same with 32 pairs: 60.9 (sd 46.7), 99.6", "mqar_contiguous", "test", "128/32", ADAPTIVE, is_better=True
    ),
    Claim(
        "recall trained at 128, tested at 256: 3.3, 33.2; in its repository 51.0 (39.2), 55.1 (23.8)",
        "mqar_contiguous",
        "longer",
        "256/32",
        ADAPTIVE,
        is_better=True,
    ),
    Claim(
        "selective copying, length 1024: 40.6 (19.8), 54.8 (2.3)",
        "copying",
        "test",
        "1024/16",
        ADAPTIVE,
        is_better=True,
    ),
    Claim(
        "log-linear paper, MQAR, length 256, width 64: Mamba-2 89.6, log-linear 92.9",
        "mqar",
        "test",
        "256/64",
        ("none", "scaled"),
        is_better=True,
    ),
)


def in_short(summaries: Sequence[Summary]) -> list[str]:
    """One section: every comparison on one page, and how well the best and the focus do at all."""
    compared = [comparison for summary in summaries for comparison in summary.comparisons]
    if not compared:
        return ["## In short\n", f"{NOT_YET}\n"]
    focus, counted = summaries[0].rules.focus, sum(comparison.counts for comparison in compared)
    return [
        "## In short\n",
        f"`{focus}` minus each rival, in points of accuracy (novels: in nats per token, where less is better). The\n"
        f"protocol counts {counted} of these {len(compared)} comparisons as a difference; they are bold.\n",
        tables.overview_table(summaries),
        "\n".join(_reached(summaries)) + "\n",
    ]


def reviewers_points(summaries: Sequence[Summary]) -> list[str]:
    """One section, point by point."""
    points = (
        ("Variance and significance", _significance),
        ("Is a linear layer enough?", lambda all_of_them: _against(all_of_them, "linear")),
        ("Against decay that is truly fixed", lambda all_of_them: _against(all_of_them, "static")),
        ("Against the log-linear paper's weights", lambda all_of_them: _against(all_of_them, "scaled")),
        ("Against no level scales at all", lambda all_of_them: _against(all_of_them, "none")),
        ("Statistics of lambda", _levels),
        ("Gradient norms", lambda all_of_them: _where(all_of_them, "Gradients")),
        ("Failure modes", _failures),
        ("Lengths beyond training", lambda all_of_them: _where(all_of_them, "Longer than trained")),
    )
    parts = ["## The reviewer's points\n"]
    for title, answer in points:
        lines = list(answer(summaries))
        parts.append(f"### {title}\n\n" + ("\n".join(lines) or NOT_YET) + "\n")
    return parts


def published(summaries: Sequence[Summary]) -> list[str]:
    """One section: published numbers, and the nearest that were measured here."""
    by_name = {summary.name: summary for summary in summaries}
    rows = []
    for claim in PUBLISHED:
        summary = by_name[claim.experiment]
        measured = (f"{mode}: {_accuracy(summary, mode, claim)}" for mode in claim.modes)
        found = _difference(summary, claim)
        shown = "" if found is None else f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
        verdict = "" if found is None else reproduces(found, claim.is_better, summary.experiment.margin)
        rows.append([claim.text, f"{claim.experiment} {claim.test}", *measured, shown, verdict])
    return [
        "## Published numbers\n",
        "Accuracy in per cent, and the second minus the first in points with its interval, paired by seed and not\n"
        "corrected. Sizes, steps and models here are not those of the publications, so what can reproduce is a\n"
        "direction, not a number: that the second is better, or that the two are equal within the protocol's margin.\n"
        "The published `fixed` depends on the input; it is `scaled` here. Published perplexities of language models\n"
        "are for the token after the next, and have no counterpart.\n",
        tables.table(["published", "nearest test here", "measured", "measured", "difference", "reproduces"], rows),
    ]


def reproduces(found: Difference, is_better: bool, margin: float) -> str:
    """Whether a difference that was found is what was published: the second better, or both equal within `margin`."""
    if is_better:
        return "yes" if found.low > 0 else "no, the opposite" if found.high < 0 else "no difference found"
    if -margin <= found.low and found.high <= margin:
        return "yes"
    return "no, they differ" if found.low > 0 or found.high < 0 else "not decided"


def _reached(summaries: Sequence[Summary]) -> Iterator[str]:
    """What the focus and softmax attention reach, without which differences say little."""
    for summary in summaries:
        for outcome in summary.outcomes() if summary.comparisons else ():
            scale, unit, digits = (1, " nats", 3) if summary.is_novels else (100, " %", 1)
            reached = (
                f"{mode} {tables.spread([float(outcome.measure(run).mean()) for run in runs], scale, digits)}{unit}"
                for mode, runs in summary.final.items()
                if mode in (summary.rules.focus, "softmax")
            )
            yield f"- {summary.name}, {outcome.name}: {', '.join(reached)}."


def _significance(summaries: Sequence[Summary]) -> Iterator[str]:
    for summary in summaries:
        compared = summary.comparisons
        if compared:
            counted = sum(comparison.counts for comparison in compared)
            seeds = min(comparison.seeds for comparison in compared)
            yield (
                f"- {summary.name}: {counted} of {len(compared)} comparisons count as a difference, with at least"
                f" {seeds} seeds a mode; every seed is in its table."
            )


def _against(summaries: Sequence[Summary], rival: Mode) -> Iterator[str]:
    for summary in summaries:
        for comparison in summary.comparisons:
            if comparison.rival == rival:
                text = tables.difference_text(summary, comparison)
                yield f"- {summary.name}, {comparison.outcome}: {summary.rules.focus} minus {rival} is {text}."


def _levels(summaries: Sequence[Summary]) -> Iterator[str]:
    for summary in summaries:
        if any(runs[0]["curve"][-1]["levels"] for runs in summary.final.values()):
            yield f"- {summary.name}: table and picture under *Level scales* of its section."


def _where(summaries: Sequence[Summary], heading: str) -> Iterator[str]:
    for summary in summaries:
        if summary.final:
            place = "Loss by position" if summary.is_novels and heading == "Longer than trained" else heading
            yield f"- {summary.name}: under *{place}* of its section."


def _failures(summaries: Sequence[Summary]) -> Iterator[str]:
    for summary in summaries:
        runs = sum(map(len, summary.final.values()))
        if runs:
            failed = [summary.failures(mode) for mode in summary.final]
            counts = (f"{sum(len(of_mode[kind]) for of_mode in failed)} {kind}" for kind in failed[0])
            yield f"- {summary.name}: of {runs} reported runs {', '.join(counts)}."


def _accuracy(summary: Summary, mode: Mode, claim: Claim) -> str:
    runs = summary.final.get(mode)
    if not runs or claim.test not in summary.sets(claim.kind):
        return "not run yet"
    return tables.spread([record_of(run, claim.kind, claim.test)["accuracy"] for run in runs], 100)


def _difference(summary: Summary, claim: Claim) -> Difference | None:
    """The second side minus the first, paired by seed; None unless both have run with two seeds."""
    if claim.test not in summary.sets(claim.kind):
        return None
    one, other = (
        {run["seed"]: record_of(run, claim.kind, claim.test)["accuracy"] for run in summary.final.get(mode, [])}
        for mode in claim.modes
    )
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return None
    paired = np.array([other[seed] - one[seed] for seed in seeds])
    return paired_bootstrap(paired, summary.rules.resamples, summary.rules.confidence)
