"""How fast documents become tokens, and shards become batches, beside the libraries that others use."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from data_pipeline.files import make_folder
from data_pipeline.loader import TrainLoader
from data_pipeline.manifest import tokenizer_path
from data_pipeline.prepare import prepare
from data_pipeline.prepared import open_tokenizer
from data_pipeline.rows import Rows
from data_pipeline.shards import ShardReader
from data_pipeline.sources import Document, iterate_documents
from loglinear.bench.machine import keep, machine
from loglinear.config import DataConfig, SourceConfig, TokenizerConfig

COMMAND = "loglinear bench data"
SEQ_LEN, BATCH, VOCAB = 8192, 8, 4096
SECONDS = 3.0  # of a loader, after one pass that warms the files
COPIES = 3  # of the text, so that a preparation runs for a while
TOKENIZER_BYTES = 2_000_000
RAW_BYTES = 8_000_000  # of text that sentencepiece itself encodes for comparison
ROUNDS = 3  # of everything; the best counts, since others may use the machine

Batches = Iterable[Any]


@dataclass(frozen=True)
class Speed:
    """What was measured, and how much of it a second: bytes of text, or tokens of training batches."""

    what: str
    amount: float
    unit: str


def bench_data(out: Path | None = None) -> list[Speed]:
    """Time tokenising and loading on this machine, on the source of Python's standard library; print a table.

    Args:
        out: a folder for `data.json`; None writes nothing.

    Returns:
        Tokenising in bytes of text a second, and loading in tokens a second and process, of samples of 8,192
        tokens in batches of 8.

    Raises:
        UserError: `out` cannot be written to.
    """
    if out is not None:
        make_folder(out)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(
            dir=Path(folder) / "shards",
            sources=(SourceConfig(kind="stdlib"),) * COPIES,
            tokenizer=TokenizerConfig(train_bytes=TOKENIZER_BYTES),
            prepare_workers=os.cpu_count() or 1,
        )
        speeds = [*_tokenising(data, console), *_loading(data, Path(folder), console)]
    table = Table(title=", ".join(f"{name} {value}" for name, value in machine(COMMAND).items()))
    for column in ("what", "speed"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for speed in speeds:
        table.add_row(speed.what, f"{speed.amount / 1e6:,.2f} million {speed.unit}")
    console.print(table)
    if out is not None:
        keep(out / "data.json", machine(COMMAND), speeds)
        console.print(f"written: {out / 'data.json'}", highlight=False)
    return speeds


def _tokenising(data: DataConfig, console: Console) -> Iterator[Speed]:
    """Sentencepiece's own batch encode in one process, and a whole preparation in as many as there are cores."""
    import sentencepiece

    console.print("preparing the data", highlight=False)
    prepare(data, VOCAB)  # trains the tokenizer, which is not timed
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path(data)))
    texts, cores = _texts(data), data.prepare_workers
    size = sum(len(text.encode()) for text in texts)
    raw = max(size / _cpu_seconds(lambda: model.encode(texts, num_threads=1)) for _ in range(ROUNDS))
    runs = [_prepare_again(data) for _ in range(ROUNDS)]
    wall, cpu = max(wall for wall, _ in runs), max(cpu for _, cpu in runs)
    yield Speed("sentencepiece's own batch encode, a CPU second", raw, "bytes")
    yield Speed(f"loglinear data prepare, a CPU second ({cpu / raw:.0%} of that)", cpu, "bytes")
    share = f"{wall / raw / cores:.0%} of {cores} times that"
    yield Speed(f"loglinear data prepare, {cores} processes, a second ({share})", wall, "bytes")


def _prepare_again(data: DataConfig) -> tuple[float, float]:
    """Bytes of text a second, and a second of all processors together."""
    for file in (*data.dir.glob("*.bin"), *data.dir.glob("shard-*.json"), data.dir / "index.json"):
        file.unlink()
    start, cpu = time.perf_counter(), _cpu()
    index = prepare(data, VOCAB)
    size = index.train.text_bytes + index.held_out.text_bytes
    return size / (time.perf_counter() - start), size / (_cpu() - cpu)


def _cpu() -> float:
    """Seconds of processors that this process and its ended children took."""
    return sum(os.times()[:4])


def _cpu_seconds(action: Callable[[], object]) -> float:
    start = _cpu()
    action()
    return _cpu() - start


def _texts(data: DataConfig) -> list[str]:
    texts: list[str] = []
    size = 0
    for item in iterate_documents(data.sources, data.seed):
        if size >= RAW_BYTES:
            break
        if isinstance(item, Document):
            texts.append(item.text)
            size += len(item.text.encode())
    return texts


def _loading(data: DataConfig, folder: Path, console: Console) -> Iterator[Speed]:
    """The loaders of the same samples, each in this process and with a worker."""
    samples = _samples(data)
    makers = {"loglinear": _ours(data), "datasets + DataLoader": _datasets(samples)}
    try:
        makers["mosaicml-streaming + DataLoader"] = _streaming(samples, folder / "mds")
    except (ImportError, RuntimeError) as error:  # its torchvision may not fit the build of torch
        console.print(f"mosaicml-streaming is left out ({error}): pip install 'loglinear\\[bench]'", highlight=False)
    for name, make in makers.items():
        for workers in (0, 1):
            console.print(f"timing {name}, {workers} workers", highlight=False)
            yield Speed(f"{name}, {_place(workers)}", _tokens_per_second(make(workers)), "tokens/s")


def _place(workers: int) -> str:
    return "in the training process" if workers == 0 else f"{workers} worker process"


def _samples(data: DataConfig) -> np.ndarray:
    """All training samples (samples, SEQ_LEN + 1)."""
    reader = ShardReader(data.dir, "train", open_tokenizer(data, VOCAB).sha256)
    rows = Rows(reader, SEQ_LEN, data.best_fit)
    return np.stack([rows.read(row) for row in range(len(rows))])


def _ours(data: DataConfig) -> Callable[[int], Batches]:
    def make(workers: int) -> Batches:
        changed = data.model_copy(update={"loader_workers": workers})
        return TrainLoader(changed, vocab_size=VOCAB, seq_len=SEQ_LEN, global_batch=BATCH, micro_batch=BATCH)

    return make


def _datasets(samples: np.ndarray) -> Callable[[int], Batches]:
    import datasets

    rows = datasets.Dataset.from_dict({"tokens": list(samples)}).with_format("numpy")

    def make(workers: int) -> Batches:
        return _endless(DataLoader(rows, BATCH, shuffle=True, num_workers=workers, collate_fn=_collate, drop_last=True))  # pyright: ignore[reportArgumentType]

    return make


def _streaming(samples: np.ndarray, folder: Path) -> Callable[[int], Batches]:
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}) as writer:
        for row in samples:
            writer.write({"tokens": row})

    def make(workers: int) -> Batches:
        rows = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        return _endless(DataLoader(rows, BATCH, num_workers=workers, collate_fn=_collate, drop_last=True))

    return make


def _collate(rows: list[dict[str, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (BATCH, SEQ_LEN), as a model takes them; where documents start is left out."""
    tokens_bt = torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))
    return tokens_bt[:, :-1].contiguous(), tokens_bt[:, 1:].contiguous()


def _endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def _tokens_per_second(batches: Batches) -> float:
    """The best of some rounds, in the middle of an endless stream whose files are warm."""
    stream = iter(batches)
    for _ in islice(stream, 150):
        pass
    best = 0.0
    for _ in range(ROUNDS):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            next(stream)
            count += 1
        best = max(best, count * BATCH * SEQ_LEN / elapsed)
    return best
