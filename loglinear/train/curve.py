"""The loss of a run as a picture, for those who do not open TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path


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
