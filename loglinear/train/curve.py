"""The loss of a run as a picture, for those who do not open TensorBoard."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from loglinear.train.evaluation import PositionLoss


def draw_losses(metrics: Path, out: Path, unigram_entropy: float | None) -> None:
    """Draw training and held-out loss against steps.

    Args:
        metrics: the run's `metrics.jsonl`.
        out: the PNG to write.
        unigram_entropy: nats per token of a model that knows only frequencies; a line, if known.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("held_out_loss", "held-out", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle=":", color="gray", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def report_positions(folder: Path, losses: list[PositionLoss]) -> None:
    """Print losses by position; write them to `positions.json` and draw them into `positions.png` in `folder`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    print(f"{'position':>17}  {'tokens':>12}  nats/token  perplexity")
    for part in losses:
        place = f"{part.start:,} to {part.end - 1:,}" if part.end - part.start > 1 else f"{part.start:,}"
        print(f"{place:>17}  {part.tokens:12,}  {part.loss:10.4f}  {math.exp(part.loss):10.3f}")
    (folder / "positions.json").write_text(json.dumps([asdict(part) for part in losses], indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([max(part.start, 0.5) for part in losses], [part.loss for part in losses], "o-")
    axes.set(xscale="log", xlabel="first position of the tokens in their document", ylabel="loss, nats per token")
    figure.savefig(folder / "positions.png", dpi=120)
    plt.close(figure)
