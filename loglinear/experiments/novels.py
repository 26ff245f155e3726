"""Novels as rows of tokens: training rows, and test rows that know which novel they are of.

Shapes: e example, t time, n label.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.files import write_bytes
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from loglinear.errors import UserError
from loglinear.experiments.examples import Examples


@dataclass(frozen=True)
class Novel:
    """A document and what it is called."""

    source: str
    text: str


def read_novels(path: Path) -> list[Novel]:
    """The documents of a .jsonl.xz file, an object with `text` and `source` a line, in its order.

    Raises:
        UserError: the file is missing, damaged, or of another form.
    """
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        return [Novel(record["source"], record["text"]) for record in records]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the novels' folder with --novels") from None
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no JSON lines with text and source, compressed by xz") from None


def novels_tokenizer(novels: Sequence[Novel], vocab_size: int, train_bytes: int, folder: Path) -> Tokenizer:
    """A tokenizer trained on the first `train_bytes` bytes of every novel's share, kept in `folder`.

    Raises:
        UserError: the novels are too small for so many pieces.
    """
    share = train_bytes // len(novels)
    texts = [novel.text[:share] for novel in novels]
    digest = hashlib.sha256("\0".join([str(vocab_size), *texts]).encode()).hexdigest()[:12]
    path = folder / f"tokenizer-{digest}.model"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts, vocab_size, path)
    return Tokenizer(path)


def next_token_rows(
    documents: Sequence[np.ndarray], length: int, most: int | None = None
) -> tuple[Examples, list[int]]:
    """Rows of `length` tokens that follow each other in a document, and the next token of each; rests are left out.

    Args:
        documents: tokens of each document, one-dimensional.
        length: T, tokens a row.
        most: rows of a document, at most.

    Returns:
        The rows [E, T] with as many labels, and the document of each.

    Raises:
        UserError: no document is long enough.
    """
    rows, owner = [], []
    for number, tokens in enumerate(documents):
        count = (len(tokens) - 1) // length if most is None else min(most, (len(tokens) - 1) // length)
        rows += [tokens[start : start + length + 1] for start in range(0, count * length, length)]
        owner += [number] * count
    if not rows:
        raise UserError(f"no document has {length + 1} tokens: take a shorter length, or other novels")
    both = torch.from_numpy(np.stack(rows).astype(np.int32))
    return Examples(both[:, :-1].contiguous(), None, both[:, 1:].contiguous()), owner


def tokenise(tokenizer: Tokenizer, novels: Sequence[Novel], folder: Path) -> list[np.ndarray]:
    """The tokens of every novel, with bos in front; kept in `folder`, because it takes a minute."""
    digest = hashlib.sha256("\0".join([tokenizer.sha256, *(novel.text for novel in novels)]).encode()).hexdigest()[:12]
    path = folder / f"tokens-{digest}.npy"
    if not path.exists():
        encoded = tokenizer.encode_batch([novel.text for novel in novels])
        lengths = np.array([len(tokens) for tokens in encoded], np.int32)
        write_bytes(path, _npy(np.concatenate([[len(encoded)], lengths, *encoded]).astype(np.int32)))
    stored = np.load(path)
    lengths, tokens = stored[1 : 1 + stored[0]], stored[1 + stored[0] :]
    return np.split(tokens, np.cumsum(lengths)[:-1])


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()
