"""How a preparation tells how far it is: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from data_pipeline.contamination import Report
from data_pipeline.manifest import Index

LINE_SECONDS = 10.0
SHOWN_NAMES = 4


@dataclass
class Tally:
    """What is done so far, earlier runs included; `text_bytes` counts UTF-8."""

    stage: str = ""
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def count(self, documents: int, text_bytes: int, tokens: int) -> None:
        """Add to the three sums."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens


Progress = Callable[[Tally], None]


@contextmanager
def console_progress(console: Console | None = None) -> Iterator[Progress]:
    """Show a tally on `console`, by default the standard error."""
    console = console or Console(stderr=True)
    describe = _Description()
    if not console.is_terminal:
        yield _Lines(console, describe)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda tally: bar.update(task, description=describe(tally))


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on the standard error from when it is told how many things are done, and how many there are."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=None)

    def tell(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()


def describe_contamination(report: Report) -> str:
    """A report in a few lines."""
    lines = [
        f"{report.contaminated_documents:,} of {report.held_out_documents:,} held-out documents share {report.gram}"
        f" tokens in a row with training data; {report.copied_documents:,} are there as a whole"
    ]
    for example in report.examples[:SHOWN_NAMES]:
        text = " ".join(str(example["text"]).split())
        lines.append(f"  held-out document {example['held_out_document']} in {example['train_file']}: {text}")
    return "\n".join(lines)


def summary(index: Index) -> str:
    """A complete preparation in a few lines."""
    train, held_out = index.train, index.held_out
    lines = [
        f"{train.documents:,} documents ({train.text_bytes / 1e6:,.1f} MB, {train.tokens:,} tokens)"
        f" to train on, {held_out.documents:,} ({held_out.tokens:,} tokens) held out,"
        f" in {index.shards:,} shards",
        f"{index.vocab_size:,} pieces, unigram entropy {index.unigram_entropy:.3f} nats a token",
    ]
    if index.packing.cut_concatenated:
        packing = index.packing
        lines.append(
            f"best fit: {packing.cut:,} documents cut, where concatenation would cut {packing.cut_concatenated:,};"
            f" filling is {packing.padding / train.tokens:.2%} of the tokens"
        )
    for reason, skips in sorted(index.skipped.items()):
        names = ", ".join(skips.first[:SHOWN_NAMES]) + (", ..." if skips.count > SHOWN_NAMES else "")
        lines.append(f"left out {skips.count:,} ({reason}): {names}")
    return "\n".join(lines)


class _Description:
    """A tally in words, with the speed of the present stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._since = 0.0
        self._bytes_then = 0

    def __call__(self, tally: Tally) -> str:
        now = time.monotonic()
        if tally.stage != self._stage or tally.text_bytes < self._bytes_then:  # or the next source's
            self._stage, self._since, self._bytes_then = tally.stage, now, tally.text_bytes
        if tally.documents == 0:
            return tally.stage
        speed = (tally.text_bytes - self._bytes_then) / 1e6 / max(now - self._since, 1e-3)
        return (
            f"{tally.stage}: {tally.documents:,} documents, {tally.tokens:,} tokens,"
            f" {tally.text_bytes / 1e6:,.1f} MB at {speed:.1f} MB/s"
        )


class _Lines:
    """A line at the start of every stage and then every `LINE_SECONDS`."""

    def __init__(self, console: Console, describe: _Description) -> None:
        self._console = console
        self._describe = describe
        self._stage = ""
        self._next = 0.0

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if tally.stage == self._stage and now < self._next:
            return
        self._stage, self._next = tally.stage, now + LINE_SECONDS
        self._console.print(self._describe(tally), highlight=False)
