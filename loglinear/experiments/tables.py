"""Tables of the report, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from loglinear.experiments.measures import LEVEL_COLUMNS
from loglinear.experiments.results import Result
from loglinear.experiments.selection import best_rate, sweep_scores
from loglinear.experiments.summary import Comparison, Summary, failure, novel_losses, record_of, region_bounds

POLICIES = ("clamp", "extend", "one")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is of names and whose others are of numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation over seeds; nan if one of them, as None, is not finite."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return "nan"
    mean = f"{scale * statistics.fmean(finite):.{digits}f}"
    return mean if len(finite) < 2 else f"{mean} ± {scale * statistics.stdev(finite):.{digits}f}"


def sweep_table(summary: Summary) -> str:
    """Mean validation loss of every rate; the chosen one is bold, and starred if a better one may lie beyond it."""
    rates, rows = summary.experiment.rates, []
    for mode in summary.experiment.modes:
        scores = sweep_scores(summary.results, mode)
        cells = [f"{-scores[rate]:.3f}" if rate in scores else "" for rate in rates]
        if scores:
            best = rates.index(best_rate(summary.results, mode))
            cells[best] = f"**{cells[best]}**" + (" *" if best in (0, len(rates) - 1) else "")
        rows.append([mode, *cells])
    return table(["mode", *(f"{rate:g}" for rate in rates)], rows)


def accuracy_table(summary: Summary) -> str:
    """Accuracy in per cent by test set, and the number of seeds."""
    names = summary.sets("test")
    rows = []
    for mode, runs in summary.final.items():
        by_set = [[record_of(run, "test", name)["accuracy"] for run in runs] for name in names]
        means = [statistics.fmean(of_run) for of_run in zip(*by_set, strict=True)]
        rows.append([mode, str(len(runs)), *(spread(values, 100) for values in by_set), spread(means, 100)])
    return table(["mode", "seeds", *names, "mean"], rows)


def seeds_table(summary: Summary) -> str:
    """Every reported seed: mean test accuracy in per cent, or test loss, marked if the run failed."""
    seeds = sorted({run["seed"] for runs in summary.final.values() for run in runs})
    rows = []
    for mode, runs in summary.final.items():
        by_seed = {run["seed"]: _of_a_seed(summary, run) for run in runs}
        rows.append([mode, f"{runs[0]['rate']:g}", *(by_seed.get(seed, "") for seed in seeds)])
    return table(["mode", "rate", *(str(seed) for seed in seeds)], rows)


def longer_table(summary: Summary) -> str:
    """Accuracy in per cent on rows longer than training, by what untrained levels get."""
    names = summary.sets("longer")
    rows = []
    for mode, runs in summary.final.items():
        without = mode in ("none", "softmax")
        for policy in POLICIES[:1] if without else POLICIES:
            by_set = [[record_of(run, "longer", name, policy)["accuracy"] for run in runs] for name in names]
            rows.append([f"{mode}, {'no levels' if without else policy}", *(spread(values, 100) for values in by_set)])
    return table(["mode, policy", *names], rows)


def positions_table(summary: Summary) -> str:
    """Loss in nats per token by position, mean over novels."""
    regions = [f"{start} to {end}" for start, end in pairwise(region_bounds(summary.experiment))]
    rows = []
    for mode, runs in summary.final.items():
        for policy in ("clamp",) if mode in ("none", "softmax") else ("clamp", "one"):
            losses = np.stack([novel_losses(run, policy).mean(0) for run in runs])
            name = mode if mode in ("none", "softmax") else f"{mode}, {policy}"
            rows.append([name, *(spread(column.tolist(), digits=3) for column in losses.T)])
    return table(["mode, policy", *regions], rows)


def novels_table(summary: Summary) -> str:
    """Loss in nats per token of every test novel, mean over positions."""
    widths = np.diff(region_bounds(summary.experiment))
    some = next(iter(summary.final.values()))[0]
    sources = sorted(next(test for test in some["test"] if test["kind"] == "novels")["regions"])
    rows = []
    for index, source in enumerate(sources):
        losses = [
            [float(novel_losses(run)[index] @ widths / widths.sum()) for run in runs] for runs in summary.final.values()
        ]
        rows.append([source, *(spread(values, digits=3) for values in losses)])
    return table(["novel", *summary.final], rows)


def needles_table(summary: Summary) -> str:
    """Needles: answers that are right in every token, in per cent, and the loss of a token of the answer."""
    rows = []
    for name in summary.sets("needle"):
        records = [[record_of(run, "needle", name) for run in runs] for runs in summary.final.values()]
        shown = (
            f"{spread([record['exact'] for record in of_mode], 100, 0)} / "
            f"{spread([record['loss'] for record in of_mode], digits=2)}"
            for of_mode in records
        )
        rows.append([name, *shown])
    return table(["form, tokens", *summary.final], rows)


def comparisons_table(summary: Summary) -> str:
    """The focus minus every rival, with intervals, corrected p, and whether it counts."""
    focus = summary.rules.focus
    rows = [
        [f"{focus} - {c.rival}", c.outcome, str(c.seeds), *_difference(summary, c), "yes" if c.counts else "no"]
        for c in summary.comparisons
    ]
    return table(["modes", "outcome", "seeds", "difference", "interval", "p (Holm)", "counts"], rows)


def overview_table(summaries: Sequence[Summary]) -> str:
    """All comparisons of all experiments: a row for each rival of the focus, bold where the protocol counts it."""
    columns = [
        (summary, outcome.name) for summary in summaries if summary.comparisons for outcome in summary.outcomes()
    ]
    found = {(summary.name, c.outcome, c.rival): c for summary in summaries for c in summary.comparisons}
    rivals = dict.fromkeys(rival for _, _, rival in found)
    rows = []
    for rival in rivals:
        cells = [rival]
        for summary, outcome in columns:
            comparison = found.get((summary.name, outcome, rival))
            text = "" if comparison is None else _difference(summary, comparison)[0]
            cells.append(f"**{text}**" if comparison is not None and comparison.counts else text)
        rows.append(cells)
    notes = (f"{outcome}{' (preliminary)' if summary.missing else ''}" for summary, outcome in columns)
    return table(
        ["rival", *(f"{summary.name}, {note}" for (summary, _), note in zip(columns, notes, strict=True))], rows
    )


def failures_table(summary: Summary) -> str:
    """How many runs failed, and which."""
    rows = []
    for mode in summary.final:
        failures = summary.failures(mode)
        shown = [f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "0" for seeds in failures.values()]
        rows.append([mode, str(len(summary.final[mode])), *shown])
    return table(["mode", "runs", "diverged", "collapsed", "learned nothing"], rows)


def levels_table(summary: Summary) -> str:
    """Lambda at the end of training, all seeds, layers and levels: mean, 5 to 95 %, and the share at the extremes."""
    rows = []
    column = {name: index for index, name in enumerate(LEVEL_COLUMNS)}
    for mode, runs in summary.final.items():
        last = np.array([row for run in runs for row in run["curve"][-1]["levels"]], float)
        if not last.size:
            continue
        for half, chosen in _halves(last, column["level"]):
            mean = np.nanmean(chosen, 0)
            extremes = [f"{100 * mean[column[name]]:.1f}" for name in ("low", "high")]
            middle = [f"{mean[column[name]]:.2f}" for name in ("mean", "q5", "q50", "q95")]
            rows.append([f"{mode}, {half}", *middle, *extremes])
    return table(["mode, levels", "mean", "5 %", "median", "95 %", "% below 0.05", "% above 2"], rows)


def difference_text(summary: Summary, comparison: Comparison) -> str:
    """One comparison as the end of a sentence."""
    difference, interval, p = _difference(summary, comparison)
    unit = "nats" if summary.is_novels else "points"
    verdict = "which counts as a difference" if comparison.counts else "which does not count as a difference"
    return f"{difference} {unit} ({interval}; corrected p {p}), {verdict}"


def _difference(summary: Summary, comparison: Comparison) -> tuple[str, str, str]:
    scale, digits = (1, 3) if summary.is_novels else (100, 1)
    found = comparison.difference
    low, mean, high = (f"{scale * x:+.{digits}f}" for x in (found.low, found.mean, found.high))
    return mean, f"{low} to {high}", f"{comparison.adjusted_p:.2g}"


def _of_a_seed(summary: Summary, run: Result) -> str:
    mark = "*" if failure(run, summary.rules) else ""
    if summary.is_novels:
        loss = next(test["loss"] for test in run["test"] if test["kind"] == "novels")
        return f"{spread([loss], digits=3)}{mark}"
    accuracies = [record_of(run, "test", name)["accuracy"] for name in summary.sets("test")]
    return f"{100 * statistics.fmean(accuracies):.1f}{mark}"


def _halves(rows: np.ndarray, level: int) -> list[tuple[str, np.ndarray]]:
    middle = int(rows[:, level].max() + 1) // 2
    return [(f"0 to {middle - 1}", rows[rows[:, level] < middle]), (f"{middle} and up", rows[rows[:, level] >= middle])]
