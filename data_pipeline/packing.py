"""Documents into rows of T + 1 tokens, best fit, so that few documents are cut; beside what concatenation would cut.

A row gives T inputs and T labels. A document that is longer than a row keeps whole rows of its own, which follow
each other and overlap by a token; only its beginning, which is shorter, shares a row with other documents, so
whatever does not begin its row begins with bos. What no document fits is filled with bos, which is no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Rows and what they cost.

    Attributes:
        tokens: row after row (rows (T + 1),).
        padding: how many of them are filling.
        cut: documents that did not fit into one row.
        cut_concatenated: documents that a plain cut at every T tokens would part.
    """

    tokens: np.ndarray
    padding: int
    cut: int
    cut_concatenated: int


def pack_best_fit(documents: Sequence[np.ndarray], seq_len: int, bos_id: int) -> Packed:
    """Pack `documents`, each bos and then its pieces, into rows of `seq_len` + 1 tokens.

    Rows come in the order of the first document in each.
    """
    size = seq_len + 1
    pieces = [piece for document in documents for piece in _pieces(document, seq_len)]
    rows = sorted(_best_fit([len(piece) for piece in pieces], size))
    tokens = np.full((len(rows), size), bos_id, documents[0].dtype if documents else np.uint16)
    for row, members in zip(tokens, rows, strict=True):
        filled = np.concatenate([pieces[member] for member in members])
        row[: len(filled)] = filled
    return Packed(
        tokens.reshape(-1),
        padding=tokens.size - sum(map(len, pieces)),
        cut=sum(len(document) > size for document in documents),
        cut_concatenated=cut_by_concatenation(map(len, documents), seq_len),
    )


def cut_by_concatenation(lengths: Iterable[int], seq_len: int) -> int:
    """How many documents a cut of their concatenation at every `seq_len` tokens parts."""
    ends = np.cumsum(np.fromiter(lengths, np.int64))
    starts = np.concatenate([[0], ends[:-1]])
    return int((starts // seq_len != (ends - 1) // seq_len).sum())


def _pieces(document: np.ndarray, seq_len: int) -> Iterator[np.ndarray]:
    """A document's beginning, if that is shorter than a row, and then whole rows."""
    beginning = (len(document) - 1) % seq_len
    if beginning:
        yield document[: beginning + 1]
    for start in range(beginning, len(document) - 1, seq_len):
        yield document[start : start + seq_len + 1]


def _best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Members of each row, in their order: from the longest on, each goes where it leaves the least room."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room that they have
    rooms = 0  # the keys of `with_room` as bits, so that the smallest that suffices is found at once
    for member in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = rooms >> lengths[member]
        if fitting:
            room = lengths[member] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(member)
        left = room - lengths[member]
        with_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return [sorted(members) for members in rows]
