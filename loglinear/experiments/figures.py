"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loglinear.experiments.measures import LEVEL_COLUMNS
from loglinear.experiments.protocol import Mode
from loglinear.experiments.results import Result
from loglinear.experiments.summary import Summary, novel_losses, record_of, region_bounds, validation_accuracies

Axes = Any
COLUMN = {name: index for index, name in enumerate(LEVEL_COLUMNS)}


def draw_figures(summary: Summary, folder: Path) -> dict[str, Path]:
    """Every picture that the results have data for, as PNG files in `folder`, by what it shows."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for title, (draw, wanted) in _figures(summary).items():
        if wanted:
            path = folder / f"{summary.name}-{title.replace(' ', '-')}.png"
            draw(summary, path)
            drawn[title] = path
    return drawn


def _figures(summary: Summary) -> dict[str, tuple[Callable[[Summary, Path], None], bool]]:
    some = bool(summary.final)
    return {
        "accuracy": (_draw_accuracy, some and not summary.is_novels),
        "loss by position": (_draw_positions, some and summary.is_novels),
        "training": (_draw_training, some),
        "gradient norms": (_draw_gradients, some),
        "level scales": (_draw_levels, bool(_with_levels(summary))),
    }


def _draw_accuracy(summary: Summary, path: Path) -> None:
    """Mean and standard deviation over seeds, by size of the test, and by length beyond training."""
    figure, axes = _grid(1, 2, (11, 4))
    for place, kind in zip(axes.flat, ("test", "longer"), strict=True):
        names = summary.sets(kind)
        for mode, runs in summary.final.items():
            table = np.array([[record_of(run, kind, name)["accuracy"] for name in names] for run in runs])
            _line(place, range(len(names)), table, mode)
        place.set_xticks(range(len(names)), names, rotation=30)
        place.set(xlabel="length / items", ylabel="accuracy", ylim=(-0.02, 1.02))
        place.set_title("test" if kind == "test" else "longer than trained, last level's scale kept", fontsize=10)
    axes.flat[0].legend(fontsize=7)
    _save(figure, path)


def _draw_positions(summary: Summary, path: Path) -> None:
    """Loss by position; that of log-linear forms also minus plain linear attention's with the same seed.

    The second shows what is small, so softmax attention, which is far away, is left out of it.
    """
    figure, axes = _grid(1, 2, (11, 4))
    bounds = region_bounds(summary.experiment)
    middles = [
        max(1.0, (start * end) ** 0.5) for start, end in zip([bounds[1] / 4, *bounds[1:-1]], bounds[1:], strict=True)
    ]
    plain = {run["seed"]: novel_losses(run).mean(0) for run in summary.final.get("none", [])}
    for mode, runs in summary.final.items():
        _line(axes.flat[0], middles, np.stack([novel_losses(run).mean(0) for run in runs]), mode)
        beside = [novel_losses(run).mean(0) - plain[run["seed"]] for run in runs if run["seed"] in plain]
        if beside and mode != "softmax":
            _line(axes.flat[1], middles, np.stack(beside), mode)
    for place, label in zip(axes.flat, ("nats per token", "minus plain linear attention"), strict=True):
        place.set(xscale="log", xlabel="position in the row, tokens", ylabel=label)
        place.axvline(summary.experiment.model.seq_len, linestyle=":", color="gray")
    axes.flat[0].legend(fontsize=7)
    _save(figure, path)


def _draw_training(summary: Summary, path: Path) -> None:
    """Validation accuracy of every seed."""
    figure, axes = _panels(summary.final)
    for place, (mode, runs) in zip(axes.flat, summary.final.items(), strict=False):
        for run in runs:
            place.plot(_steps(run), validation_accuracies(run), linewidth=0.8)
        place.set(title=mode, xlabel="step", ylabel="validation accuracy", ylim=(-0.02, 1.02))
    _save(figure, path)


def _draw_gradients(summary: Summary, path: Path) -> None:
    """Median over seeds, by group of parameters."""
    figure, axes = _panels(summary.final)
    for place, (mode, runs) in zip(axes.flat, summary.final.items(), strict=False):
        for group in runs[0]["curve"][0]["gradient_norms"]:
            table = [[record["gradient_norms"].get(group) or np.nan for record in run["curve"]] for run in runs]
            place.plot(_steps(runs[0]), np.nanmedian(np.array(table, float), 0), label=group, linewidth=1)
        place.set(title=mode, xlabel="step", ylabel="gradient norm", yscale="log")
    axes.flat[0].legend(fontsize=6)
    _save(figure, path)


def _draw_levels(summary: Summary, path: Path) -> None:
    """Mean lambda over seeds of every level at every record, and the range of its 5 to 95 % at the end."""
    modes = _with_levels(summary)
    layers = summary.experiment.model.layers
    figure, axes = _grid(len(modes), layers, (3.2 * layers, 2.6 * len(modes)))
    for row, mode in zip(axes, modes, strict=True):
        runs = summary.final[mode]
        for layer, place in enumerate(row):
            tables = [_levels_of(runs, record, layer) for record in range(len(runs[0]["curve"]))]
            for table, step in zip(tables, _steps(runs[0]), strict=True):
                shade = (1 + 4 * step / summary.experiment.steps) / 5
                place.plot(
                    table[:, COLUMN["level"]], table[:, COLUMN["mean"]], color="tab:blue", alpha=shade, linewidth=1
                )
            last = tables[-1]
            place.fill_between(last[:, COLUMN["level"]], last[:, COLUMN["q5"]], last[:, COLUMN["q95"]], alpha=0.2)
            place.set(title=f"{mode}, layer {layer}", xlabel="level", ylabel="lambda")
    _save(figure, path)


def _levels_of(runs: Sequence[Result], record: int, layer: int) -> np.ndarray:
    """Mean over runs of the rows of a layer, [levels, columns]."""
    tables = [[row for row in run["curve"][record]["levels"] if row[0] == layer] for run in runs]
    return np.nanmean(np.array(tables, float), 0)


def _with_levels(summary: Summary) -> list[Mode]:
    return [mode for mode, runs in summary.final.items() if runs[0]["curve"][0]["levels"]]


def _steps(run: Result) -> list[int]:
    return [record["step"] for record in run["curve"]]


def _line(place: Axes, x: Sequence[float], table: np.ndarray, label: str) -> None:
    """Mean over runs, with a bar of a standard deviation; `table` is [runs, points]."""
    spread = table.std(0, ddof=1) if len(table) > 1 else None
    place.errorbar(x, table.mean(0), yerr=spread, label=label, marker="o", markersize=3, linewidth=1, capsize=2)


def _panels(modes: dict[Mode, list[Result]]) -> tuple[Any, Any]:
    columns = min(3, len(modes))
    rows = -(-len(modes) // columns)
    figure, axes = _grid(rows, columns, (3.6 * columns, 2.6 * rows))
    for place in axes.flat[len(modes) :]:
        place.set_visible(False)
    return figure, axes


def _grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
