"""Documents to tokens, in worker processes; what comes out has the order of what went in."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from data_pipeline.sources import Document, Skipped
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError

CHUNK_CHARS = 1 << 19  # about 0.1 s of work
CHUNK_ITEMS = 1024
QUEUE = 4  # chunks a worker: bounds memory, and keeps all busy while a source lists its files


@dataclass(frozen=True)
class Encoded:
    """One document: its tokens, bos first, the bytes of its text in UTF-8, and its split."""

    tokens: np.ndarray
    text_bytes: int
    held_out: bool


def is_held_out(text: str, fraction: float) -> bool:
    """Whether `text` belongs to the held-out `fraction`; copies of a text always stay together."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def encode_stream(
    items: Iterable[Document | Skipped], data: DataConfig, tokenizer: Path
) -> Generator[Encoded | Skipped, None, None]:
    """`items` with every document tokenised by one of `data.prepare_workers` processes.

    Raises:
        UserError: a worker was killed.
    """
    workers, start = data.prepare_workers, (tokenizer, data.tokenizer.bos, data.held_out)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start) as pool:
        pending: deque[Future[list[Encoded | Skipped]]] = deque()
        try:
            for chunk in _chunks(items):
                pending.append(_submit(pool, chunk))
                if len(pending) > QUEUE * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a tokenising process was killed, perhaps for want of memory; lower data.prepare_workers"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _submit(pool: ProcessPoolExecutor, chunk: list[Document | Skipped]) -> Future[list[Encoded | Skipped]]:
    """Let a worker encode `chunk`; what holds no document is done already."""
    skipped: list[Encoded | Skipped] = [item for item in chunk if isinstance(item, Skipped)]
    if len(skipped) < len(chunk):
        return pool.submit(_encode_chunk, chunk)
    done: Future[list[Encoded | Skipped]] = Future()
    done.set_result(skipped)
    return done


def _chunks(items: Iterable[Document | Skipped]) -> Iterator[list[Document | Skipped]]:
    chunk: list[Document | Skipped] = []
    chars = 0
    for item in items:
        chunk.append(item)
        chars += len(item.text) if isinstance(item, Document) else 0
        if chars >= CHUNK_CHARS or len(chunk) >= CHUNK_ITEMS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Worker:
    tokenizer: Tokenizer
    held_out: float

    def encode(self, text: str) -> Encoded:
        (tokens,) = self.tokenizer.encode_batch([text])
        return Encoded(tokens, len(text.encode()), is_held_out(text, self.held_out))


_worker: _Worker  # one a worker process


def _start_worker(tokenizer: Path, bos: str | None, held_out: float) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(Tokenizer(tokenizer, bos), held_out)


def _end_with_parent() -> None:
    """End this process when its parent is gone: the pool's own pipes do not tell a worker that."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_chunk(chunk: list[Document | Skipped]) -> list[Encoded | Skipped]:
    return [_worker.encode(item.text) if isinstance(item, Document) else item for item in chunk]
