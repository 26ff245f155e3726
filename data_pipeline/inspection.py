"""What is in prepared data: shares, lengths, what packing would cost, and some documents."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.documents import Part, bounds, open_parts
from data_pipeline.packing import pack_best_fit
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import DataConfig

MOST_SHARDS = 32  # of a source that are looked at, evenly spread
SHOWN_CHARS, SHOWN_PIECES = 400, 48
BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Sample:
    """Some shards of a source: their documents (with bos), and what packing them would cost.

    Of data that are packed, the documents are what follows a bos in a row.
    """

    documents: list[np.ndarray]
    cut: int
    cut_concatenated: int
    filling: float


def sample(part: Part, bos_id: int, seq_len: int) -> Sample:
    """The documents of at most `MOST_SHARDS` shards, and the cost of packing them into rows of `seq_len` tokens."""
    chosen = np.unique(np.linspace(0, part.index.shards - 1, MOST_SHARDS).round().astype(int))
    documents, padding, tokens = [], 0, 0
    cuts: Counter[str] = Counter()
    for shard in chosen:
        row = part.tokens("train", int(shard))
        found = [row[start:end] for start, end in zip(*bounds(row, bos_id), strict=True)]
        packed = pack_best_fit(found, seq_len, bos_id)
        cuts.update(cut=packed.cut, concatenated=packed.cut_concatenated)
        padding, tokens = padding + packed.padding, tokens + len(packed.tokens)
        documents += found
    return Sample(documents, cuts["cut"], cuts["concatenated"], padding / max(tokens, 1))


def histogram(lengths: list[int]) -> list[tuple[int, int]]:
    """How many lengths are at least 2^k and less than 2^(k + 1), for each k from the least to the largest."""
    counts = Counter(length.bit_length() - 1 for length in lengths)
    return [(1 << power, counts[power]) for power in range(min(counts), max(counts) + 1)]


def inspect(data: DataConfig, vocab_size: int, seq_len: int, documents: int, console: Console) -> None:
    """Print what is in `data` to `console`.

    Args:
        data: what is prepared.
        vocab_size: embeddings of the model.
        seq_len: tokens of a training sample.
        documents: how many documents of each source to show.
        console: where to.

    Raises:
        UserError: the preparation is not complete, or a file is damaged.
    """
    tokenizer, found = open_parts(data, vocab_size)
    console.print(_shares(data, found))
    for part in found:
        taken = sample(part, tokenizer.bos_id, seq_len)
        if not taken.documents:
            continue
        _print_lengths(part, taken, seq_len, console)
        for number in range(min(documents, len(taken.documents))):
            chosen = taken.documents[number * len(taken.documents) // documents]
            _print_document(chosen, tokenizer, console)


def _shares(data: DataConfig, found: list[Part]) -> Table:
    table = Table(title=str(data.dir))
    for column in ("source", "documents", "tokens", "bytes/token", "share", "weight", "held-out documents"):
        table.add_column(column, justify="left" if column == "source" else "right")
    total = sum(part.index.train.tokens for part in found)
    weights = [source.weight or math.nan for source in data.sources] if data.is_mixture else [math.nan]
    for part, weight in zip(found, weights, strict=True):
        train = part.index.train
        asked = f"{weight / sum(weights):.2%}" if data.is_mixture else "-"
        cells = (train.documents, train.tokens, train.text_bytes / max(train.tokens, 1), train.tokens / total)
        formats = ("{:,}", "{:,}", "{:.2f}", "{:.2%}")
        shown = (text.format(cell) for text, cell in zip(formats, cells, strict=True))
        table.add_row(part.name or "all", *shown, asked, f"{part.index.held_out.documents:,}")
    return table


def _print_lengths(part: Part, taken: Sample, seq_len: int, console: Console) -> None:
    lengths = [len(document) for document in taken.documents]
    middle, most = np.percentile(lengths, [50, 90])
    where = f"{part.name}: " if part.name else ""
    console.print(
        f"\n{where}tokens of a document, of {len(lengths):,}: least {min(lengths):,}, median {middle:,.0f},"
        f" mean {np.mean(lengths):,.0f}, 90 % below {most:,.0f}, most {max(lengths):,}",
        highlight=False,
    )
    bars = histogram(lengths)
    highest = max(count for _, count in bars)
    for least, count in bars:
        console.print(f"  from {least:>11,}  {count:>9,}  {'█' * math.ceil(BAR * count / highest)}", highlight=False)
    if part.data.best_fit is None:
        console.print(
            f"  samples of {seq_len:,} tokens cut {taken.cut_concatenated:,} of them; data.best_fit would cut"
            f" {taken.cut:,}, and {taken.filling:.2%} of the tokens would be filling",
            highlight=False,
        )
    else:
        packing = part.index.packing
        console.print(
            f"  packed: {packing.cut:,} documents are cut, where concatenation would cut"
            f" {packing.cut_concatenated:,}; {packing.padding / part.index.train.tokens:.2%} of the tokens are filling",
            highlight=False,
        )


def _print_document(document: np.ndarray, tokenizer: Tokenizer, console: Console) -> None:
    text = tokenizer.decode(document[1 : SHOWN_CHARS + 1])[:SHOWN_CHARS]
    pieces = tokenizer.pieces(document[:SHOWN_PIECES])
    console.rule(f"a document of {len(document):,} tokens, as text and as pieces")
    console.print(text, markup=False, highlight=False)
    console.rule(style="dim")
    console.print(" | ".join(piece.replace("\n", "\\n") for piece in pieces), markup=False, highlight=False)
