"""Needles in haystacks for a run's last checkpoint: by form of the task, length of the text and depth of the needle.

Answers are scored as in the protocol, by teacher forcing: the whole row is read at once, and an answer is right if all
its tokens are the likeliest ones. It is then what greedy decoding would write, so RULER's match of strings holds.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipeline.held_out import held_out_batches
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from loglinear.config import Config
from loglinear.experiments.ensemble import score_rows
from loglinear.experiments.examples import Cell, Examples
from loglinear.experiments.needle import FORMS, needle_examples
from loglinear.model import LanguageModel
from loglinear.parallel import lone_mesh
from loglinear.train.folder import RunFolder
from loglinear.train.inference import load_model

EXAMPLES = 20  # of each form, length and depth
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
HAYSTACKS = 4  # of the longest rows are read from the held-out text, so that rows differ


@dataclass(frozen=True)
class NeedleScore:
    """How a model did at one form, length in tokens, and depth: the share of the text that stands before the needle.

    Attributes:
        right: answers of which every token is the likeliest.
        examples: answers that were due.
        loss: of a token of an answer, in nats.
    """

    form: str
    length: int
    depth: float
    right: int
    examples: int
    loss: float


def evaluate_needles(root: Path, lengths: Sequence[int], samples: int | None) -> list[NeedleScore]:
    """Print a table for the run in `root`; write `needles.json` and the plot `needles.png` into its folder.

    Args:
        root: the run's folder.
        lengths: tokens of a row, answer included; longer than what was trained is as `beyond_trained_levels` says.
        samples: examples of every form, length and depth; `EXAMPLES` if None.

    Raises:
        UserError: there is no run, no complete checkpoint, no held-out text, or less of it than a row holds.
    """
    folder = RunFolder(root)
    config = folder.load_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, step = load_model(folder, config, lone_mesh(device))
    tokenizer = load_tokenizer(folder.tokenizer, config.model.vocab_size, config.data.tokenizer.bos)
    haystack = held_out_sentences(config, tokenizer, HAYSTACKS * max(lengths))
    tokens = config.train.micro_batch * config.model.seq_len
    scores = []
    cells = list(product(FORMS, lengths, DEPTHS))
    for form, length, depth in track(cells, "asking", console=Console(stderr=True), transient=True):
        rows = needle_rows(form, Cell(length, 1, samples or EXAMPLES), depth, haystack, tokenizer)
        scores.append(NeedleScore(form, length, depth, *_score(model, rows, tokens, device)))
    print(f"step {step}: right answers of {samples or EXAMPLES}, by the share of the text before the needle")
    Console().print(_table(scores))
    (root / "needles.json").write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")
    _plot(root / "needles.png", scores)
    return scores


def held_out_sentences(config: Config, tokenizer: Tokenizer, tokens: int) -> list[str]:
    """The first `tokens` tokens of held-out text in pieces, cut behind full stops and at the ends of lines.

    Raises:
        UserError: nothing is prepared or held out.
    """
    seq_len = config.model.seq_len
    samples = held_out_batches(
        config.data,
        vocab_size=config.model.vocab_size,
        seq_len=seq_len,
        batch=1,
        limit_samples=-(-tokens // seq_len),
    )
    row = np.concatenate([sample.inputs.flatten().numpy() for sample in samples])
    documents = np.split(row, np.flatnonzero(row == tokenizer.bos_id))
    pieces = (re.split(r"(?<=\.)\s+|\n+", tokenizer.decode(document)) for document in documents)
    return [piece.strip() for of_document in pieces for piece in of_document if piece.strip()]


def needle_rows(form: str, cell: Cell, depth: float, haystack: list[str], tokenizer: Tokenizer) -> Examples:
    """The rows of one cell, the same for every model that has this tokenizer and haystack.

    Raises:
        UserError: the haystack is shorter than a row.
    """
    rng = np.random.default_rng([list(FORMS).index(form), cell.length, round(100 * depth)])
    return needle_examples(FORMS[form], cell, haystack, tokenizer, rng, depth)


@torch.inference_mode()
def _score(model: LanguageModel, rows: Examples, tokens: int, device: torch.device) -> tuple[int, int, float]:
    """Right answers, answers, and the loss of a token; about `tokens` tokens are read at once."""
    right, loss = 0, 0.0
    at_once = max(1, tokens // rows.length)
    for start in range(0, len(rows), at_once):
        part = rows.take(slice(start, start + at_once)).to(device)
        losses_en, hits_en = score_rows(model, part)
        right += int((hits_en | (part.labels_en < 0)).all(1).sum())
        loss += float(losses_en.double().sum())
    return right, len(rows), loss / int((rows.labels_en >= 0).sum())


def _table(scores: Sequence[NeedleScore]) -> Table:
    table = Table("form")
    for name in ("length", *(f"{depth:.0%}" for depth in DEPTHS), "all", "nats/token"):
        table.add_column(name, justify="right")
    for form, length in dict.fromkeys((score.form, score.length) for score in scores):
        row = [score for score in scores if (score.form, score.length) == (form, length)]
        share = sum(score.right for score in row) / sum(score.examples for score in row)
        loss = statistics.fmean(score.loss for score in row)
        table.add_row(form, f"{length:,}", *(str(score.right) for score in row), f"{share:.1%}", f"{loss:.3f}")
    return table


def _plot(path: Path, scores: Sequence[NeedleScore]) -> None:
    """Accuracy by length and depth, a picture for each form."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lengths = list(dict.fromkeys(score.length for score in scores))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharex=True, sharey=True)
    for place, form in zip(axes.flat, FORMS, strict=True):
        shares = [score.right / score.examples for score in scores if score.form == form]
        table_ld = np.array(shares).reshape(len(lengths), len(DEPTHS))
        place.imshow(table_ld.T, vmin=0, vmax=1, cmap="Greens", aspect="auto")
        for (row, column), share in np.ndenumerate(table_ld.T):
            color = "white" if share > 0.6 else "black"
            place.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
        place.set_title(form, fontsize=10)
        place.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        place.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    figure.supxlabel("tokens of the text")
    figure.supylabel("depth of the needle")
    figure.suptitle("right answers")
    figure.savefig(path, dpi=120)
    plt.close(figure)
