"""Documents into rows of T + 1 tokens, best fit, so that few documents are cut; beside what concatenation would cut.

A row gives T inputs and T labels. A document that does not fit into one is cut in any case, so these follow each other
in rows that overlap by a token: of the place of a cut the first row has only the label, the second only the input, and
no row tells that a document ends where it does not. Into the rest of their last row and into rows of their own go the
documents that fit into one. What no document fits is filled with bos, which is no text.
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

    Rows come in the order of the document that each begins with.
    """
    size = seq_len + 1
    pieces = [*_cut_pieces(documents, seq_len), *((n, doc) for n, doc in enumerate(documents) if len(doc) <= size)]
    rows = _best_fit([len(piece) for _, piece in pieces], size)
    rows.sort(key=lambda members: pieces[members[0]][0])
    tokens = np.full((len(rows), size), bos_id, documents[0].dtype if documents else np.uint16)
    for row, members in zip(tokens, rows, strict=True):
        filled = np.concatenate([pieces[member][1] for member in members])
        row[: len(filled)] = filled
    return Packed(
        tokens.reshape(-1),
        padding=tokens.size - sum(len(piece) for _, piece in pieces),
        cut=sum(len(document) > size for document in documents),
        cut_concatenated=cut_by_concatenation(map(len, documents), seq_len),
    )


def cut_by_concatenation(lengths: Iterable[int], seq_len: int) -> int:
    """How many documents a cut of their concatenation at every `seq_len` tokens parts."""
    ends = np.cumsum(np.fromiter(lengths, np.int64))
    starts = np.concatenate([[0], ends[:-1]])
    return int((starts // seq_len != (ends - 1) // seq_len).sum())


def _cut_pieces(documents: Sequence[np.ndarray], seq_len: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of the documents that fit into none, one after the other, each with the document that it begins in.

    All but the last are full. The last has to begin its row, for its first token need not be bos.
    """
    numbers = [number for number, document in enumerate(documents) if len(document) > seq_len + 1]
    if not numbers:
        return
    ends = np.cumsum([len(documents[number]) for number in numbers])
    stream = np.concatenate([documents[number] for number in numbers])
    for start in range(0, len(stream) - 1, seq_len):
        yield numbers[np.searchsorted(ends, start, "right")], stream[start : start + seq_len + 1]


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
