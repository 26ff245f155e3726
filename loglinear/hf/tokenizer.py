"""A run's tokenizer as a `tokenizer.json` that gives the same ids.

A sentencepiece model writes a space as U+2581. In the converted file pieces hold the space itself, so that the
character U+2581 in a text is no piece and goes byte by byte, as it does here (`data_pipeline.tokenizer_models`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_models import PROBE, SPACE_MARK
from loglinear.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces in a sentencepiece model
UNIGRAM, BPE = 1, 2
PROBES = (PROBE, "", " ", "   a", "a\n\n  b \n", "def f(x):\n\treturn x  # \u00fc\u2581\u4e2d\n" * 3)


def fast_tokenizer(path: Path, bos: str | None) -> tokenizers.Tokenizer:
    """The tokenizer in `path` for Hugging Face's library; it puts bos first unless it is told to add nothing.

    Of a unigram model's segmentations that are equally likely, it may take another one.

    Args:
        path: a sentencepiece model that leaves text as it is, or a `tokenizer.json`.
        bos: the piece that starts a document, where a `tokenizer.json` does not tell it.

    Raises:
        UserError: `path` cannot be read, or the conversion would give other ids.
    """
    ours = Tokenizer(path, bos)
    content = path.read_bytes()
    fast = tokenizers.Tokenizer.from_str(content.decode()) if content[:1] == b"{" else _from_sentencepiece(content)
    fast.no_padding()
    fast.no_truncation()
    name = ours.pieces([ours.bos_id])[0]
    if fast.encode("", add_special_tokens=True).ids != [ours.bos_id]:
        add_bos = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, ours.bos_id)])
        before = [fast.post_processor] if fast.post_processor is not None else []
        fast.post_processor = processors.Sequence([*before, add_bos])  # pyright: ignore[reportAttributeAccessIssue]
    fast.encode_special_tokens = True  # what looks like one in a text is text
    for probe in PROBES:
        if fast.encode(probe, add_special_tokens=False).ids != ours.encode(probe):
            raise UserError(
                f"{path} cannot be converted: it changes text first, and would give other tokens for {probe!r}"
            )
    return fast


def _from_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    pieces = [(piece.piece.replace(SPACE_MARK, " "), piece.score, piece.type) for piece in proto.pieces]
    fast = tokenizers.Tokenizer(_model(proto.trainer_spec, pieces))
    fast.add_special_tokens([piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    fixed = [AddedToken(piece, normalized=False) for piece, _, kind in pieces if kind == USER_DEFINED]
    fast.add_tokens(fixed)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore
    return fast


def _model(trainer: Any, pieces: list[tuple[str, float, int]]) -> Any:
    if trainer.model_type == UNIGRAM:
        # Text that looks like "<s>" or "<0x41>" is text: any other way to write it is better.
        scored = [(piece, score if kind in (NORMAL, USER_DEFINED) else -1e6) for piece, score, kind in pieces]
        return models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=True)
    if trainer.model_type == BPE:
        ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
        unknown = pieces[trainer.unk_id][0]
        return models.BPE(ids, list(_merges(pieces)), unk_token=unknown, byte_fallback=True)
    raise UserError("the run's sentencepiece model is neither BPE nor unigram, and cannot be converted")


def _merges(pieces: list[tuple[str, float, int]]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first, as sentencepiece merges."""
    normal = {piece for piece, _, kind in pieces if kind == NORMAL}
    for piece, _, kind in sorted(pieces, key=lambda scored: -scored[1]):
        if kind == NORMAL:
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            yield from (pair for pair in halves if normal.issuperset(pair))
