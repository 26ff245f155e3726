"""The index plan of the chunked op as the kernels read it: one row of integers per chunk, read, piece or run.

A read is a pair of a row and a run whose state its queries read; reads are sorted by row. A run that is read is read
by consecutive rows; a piece is at most `PIECE` of them, the work of one program that computes the run's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from loglinear.ops.checks import Sequences
from loglinear.ops.plan import Plan, make_plan

CHUNK = 128
PIECE = 32  # rows: bounds the longest program, and with it the tail of the launch


@dataclass(frozen=True)
class Tables:
    """Index tables on the device, int32 unless said otherwise."""

    rows: int
    runs: int
    reads: int
    pieces: int
    top: int  # heights of runs above the rows
    heights: tuple[slice, ...]  # the runs of 2, 4, 8, ... chunks, counted from the first of them
    row_token: torch.Tensor  # int64, token in slot 0 of each row (before the sequence where slots are padding)
    row_slots: torch.Tensor  # [rows, 2], first slot with a token and the end of them
    row_levels: torch.Tensor  # bit mask of the levels that a row's reads have
    read_start: torch.Tensor  # [rows + 1], reads of each row
    read: torch.Tensor  # [reads + 1, 3]: run, level, height; one more, so that a loop may look ahead
    read_gap: torch.Tensor  # [reads + 1, 2]: boundaries at the run's end and before the row
    merge: torch.Tensor  # [runs of more than one chunk, 2]: left run or -1, right run
    run: torch.Tensor  # [runs, 4]: parent or -1, whether it is a left half, pieces from, to
    run_gap: torch.Tensor  # [runs, 2]: boundaries at the run's end and its parent's
    piece: torch.Tensor  # [pieces, 5], longest first: rows from, to, boundary, level, where its sum goes
    bucket: torch.Tensor  # [runs that are read, 3]: rows from, to that read it, height


@lru_cache(maxsize=64)
def make_tables(sequences: Sequences, device: torch.device) -> Tables:
    """The tables for sequences of these lengths and starts, in tokens."""
    plan = make_plan(sequences, CHUNK, 0, False, torch.device("cpu"))
    merges = plan.merges
    merge = np.stack([x.numpy() for x in (merges.left, merges.right, merges.since, merges.until)], 1)
    merge[merges.missing.numpy(), 0] = -1
    row_token, row_slots = _rows(sequences)
    row, read = _reads(plan)
    run, run_gap, piece, bucket = _runs(plan.rows, merge, row, read)
    levels = np.zeros(plan.rows, np.int64)
    np.bitwise_or.at(levels, row, 1 << read[:, 1])
    one_more = ((0, 1), (0, 0))

    def put(table: np.ndarray, dtype: type = np.int32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table.astype(dtype))).to(device)

    return Tables(
        rows=plan.rows,
        runs=len(run),
        reads=len(read),
        pieces=len(piece),
        top=len(merges.heights),
        heights=merges.heights,
        row_token=put(row_token, np.int64),
        row_slots=put(row_slots),
        row_levels=put(levels),
        read_start=put(np.searchsorted(row, np.arange(plan.rows + 1))),
        read=put(np.pad(read[:, :3], one_more)),
        read_gap=put(np.pad(np.column_stack([read[:, 3], row]), one_more)),
        merge=put(merge[:, :2]),
        run=put(run),
        run_gap=put(run_gap),
        piece=put(piece),
        bucket=put(bucket),
    )


def _rows(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """The token in slot 0 of every row, and its slots that hold tokens."""
    tokens, slots = [], []
    first_token = 0
    for start, end in zip(sequences.starts, sequences.ends, strict=True):
        if end > start:
            position = np.arange(start // CHUNK, -(-end // CHUNK)) * CHUNK
            tokens.append(position - start + first_token)
            slots.append(np.clip(np.stack([start - position, end - position], 1), 0, CHUNK))
        first_token += end - start
    return np.concatenate(tokens), np.concatenate(slots)


def _reads(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the reads in order, and for each: run, level, height, boundary at the run's end."""
    reads = plan.reads
    row, run, since, level = (x.numpy() for x in (reads.row, reads.source, reads.since, reads.level))
    read = np.stack([run, level, level - CHUNK.bit_length(), since], 1)
    order = np.argsort(row, kind="stable")
    return row[order], read[order]


def _runs(
    rows: int, merge: np.ndarray, row: np.ndarray, read: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The tables `run`, `run_gap`, `piece` and `bucket`."""
    run, run_gap = np.zeros((rows + len(merge), 4), np.int64), np.zeros((rows + len(merge), 2), np.int64)
    run[:, 0] = -1
    left, right, since, until = merge.T
    above = np.arange(rows, rows + len(merge))
    run[right, 0] = above
    has_left = left >= 0
    run[left[has_left], 0] = above[has_left]
    run[left[has_left], 1] = 1
    run_gap[left[has_left]] = np.column_stack([since, until])[has_left]

    source, first, count = np.unique(read[:, 0], return_index=True, return_counts=True)
    bucket = np.column_stack([row[first], row[first] + count, read[first, 2]])
    pieces = -(-count // PIECE)
    end = np.cumsum(pieces)
    run[source, 2], run[source, 3] = end - pieces, end
    owner = np.repeat(np.arange(len(source)), pieces)
    slot = np.arange(len(owner))
    begin = bucket[owner, 0] + (slot - (end - pieces)[owner]) * PIECE
    stop = np.minimum(begin + PIECE, bucket[owner, 1])
    piece = np.column_stack([begin, stop, read[first, 3][owner], read[first, 1][owner], slot])
    return run, run_gap, piece[np.argsort(begin - stop, kind="stable")], bucket
