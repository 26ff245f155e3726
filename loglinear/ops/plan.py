"""The index arithmetic of the chunked op: which chunk reads which states, known before any tensor is touched.

Sequences are laid out in whole chunks aligned to absolute positions: one that starts at position t0 begins in slot
t0 % C of chunk t0 // C. The chunks of all sequences form one list of rows. A run is 2^e chunks of one sequence,
aligned to 2^e; it lacks the chunks before the sequence's start, but reaches its end. Its state is decayed to its end.
Ids of runs go height by height (e = 0 are the rows). Boundary b is the instant before row b, or after row b - 1.

Everything is vectorised over rows, because packed documents make a new plan for every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from loglinear.ops.checks import Sequences
from loglinear.ops.fenwick import set_bits

Table = torch.Tensor  # int64 with one dimension, unless said otherwise


@dataclass(frozen=True)
class Merges:
    """The runs of more than one chunk: state = exp(G[until] - G[since]) * left + right, G at boundaries."""

    heights: tuple[slice, ...]  # the runs of 2, 4, 8, ... chunks in the tables below
    left: Table
    right: Table
    missing: torch.Tensor  # bool, the sequence starts after the left half, and `left` is any id
    since: Table
    until: Table


@dataclass(frozen=True)
class Reads:
    """Pairs of a row and a state that its queries read; the state is decayed to boundary `since`."""

    row: Table
    source: Table
    since: Table
    level: Table


@dataclass(frozen=True)
class Plan:
    """Everything that the chunked op indexes by."""

    rows: int
    slots: Table | None  # slot of every token among rows * C; None when tokens fill the rows exactly
    merges: Merges
    reads: Reads  # source: a run


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cache outlives the caller's mode, and autograd refuses tables made in inference mode
def make_plan(sequences: Sequences, chunk: int, device: torch.device) -> Plan:
    """The plan for these lengths and starts, with its tables on `device`.

    Args:
        sequences: lengths and starts, in tokens.
        chunk: tokens in a chunk, a power of two.
        device: where the tables go.
    """
    layout = _Layout(sequences, chunk)

    def put(tables: Iterable[np.ndarray]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in tables]

    slots = _slots(layout)
    return Plan(
        rows=layout.rows,
        slots=None if len(slots) == layout.rows * chunk else put([slots])[0],
        merges=Merges(layout.slices(), *put(_merges(layout))),
        reads=Reads(*put(_reads(layout))),
    )


class Counts(NamedTuple):
    """The lengths of a plan's lists."""

    rows: int
    pairs: int  # runs of two chunks
    runs: int
    reads: int


def plan_counts(sequences: Sequences, chunk: int) -> Counts:
    """What `make_plan` would list for these sequences, known without making any tensor."""
    layout = _Layout(sequences, chunk)
    pairs, runs = (int(layout.run_counts[heights].sum()) for heights in (slice(1, 2), slice(None)))
    return Counts(layout.rows, pairs, runs, len(_reads(layout)[0]))


class _Layout:
    """Rows, runs and boundaries. A chunk or run is named by its sequence and its index from position 0."""

    def __init__(self, sequences: Sequences, chunk: int) -> None:
        self.chunk = chunk
        self.lengths = np.array(sequences.lengths, dtype=np.int64)
        self.starts = np.array(sequences.starts, dtype=np.int64)
        self.ends = self.starts + self.lengths
        self.first = self.starts // chunk
        row_counts = np.where(self.lengths > 0, -(-self.ends // chunk) - self.first, 0)
        self.rows = int(row_counts.sum())
        self.base = np.cumsum(row_counts) - row_counts  # boundary before each sequence
        self.row_sequence, self.row_chunk = _ranges(self.first, row_counts)

        # Only runs that somebody reads are built: the last reader is the last chunk.
        last_reader = np.where(self.lengths > 0, (self.ends - 1) // chunk, self.first)
        self.heights = max(1, int((last_reader ^ self.first).max()).bit_length())
        height = np.arange(self.heights)[:, None]
        self.first_run = self.first >> height  # [heights, sequences]
        self.run_counts = (last_reader >> height) - self.first_run
        self.run_counts[0] = row_counts
        before = np.cumsum(self.run_counts).reshape(self.run_counts.shape) - self.run_counts
        self.run_zero = before - self.first_run  # id that the run with index 0 has, or would have

    def slices(self) -> tuple[slice, ...]:
        """Where the runs of each height above the rows lie among all runs above the rows."""
        ends = np.cumsum(self.run_counts[1:].sum(1)).tolist()
        return tuple(slice(start, end) for start, end in itertools.pairwise([0, *ends]))

    def boundary(self, sequence: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        """The boundary before a chunk."""
        return self.base[sequence] + chunk - self.first[sequence]

    def runs_before(self, sequence: np.ndarray, chunk: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the queries of some chunks read: the 2^e chunks before (c >> e) << e for every set bit e of c.

        Returns:
            Of each read: which of the given chunks, the id of the run, the boundary at its end, and e.
        """
        height, reader = set_bits(chunk, self.heights)
        index = chunk[reader] >> height
        known = index > self.first_run[height, sequence[reader]]  # others lie before the sequence's start
        height, reader, index = height[known], reader[known], index[known]
        sequence = sequence[reader]
        run = self.run_zero[height, sequence] + index - 1
        return reader, run, self.boundary(sequence, index << height), height


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The elements of all ranges [first[i], + count[i]), one range after the other, and the i of each: (i, element)."""
    owner = np.repeat(np.arange(len(count)), count)
    before = np.cumsum(count) - count
    return owner, np.arange(len(owner)) - before[owner] + first[owner]


def _slots(layout: _Layout) -> np.ndarray:
    sequence, position = _ranges(layout.starts, layout.lengths)
    return position + (layout.base - layout.first)[sequence] * layout.chunk


def _merges(layout: _Layout) -> tuple[np.ndarray, ...]:
    owner, index = _ranges(layout.first_run[1:].ravel(), layout.run_counts[1:].ravel())
    below, sequence = np.divmod(owner, len(layout.starts))  # height of the halves
    right = layout.run_zero[below, sequence] + 2 * index + 1
    missing = 2 * index < layout.first_run[below, sequence]
    until = layout.boundary(sequence, (2 * index + 2) << below)
    since = np.where(missing, until, layout.boundary(sequence, (2 * index + 1) << below))
    return np.where(missing, right, right - 1), right, missing, since, until


def _reads(layout: _Layout) -> tuple[np.ndarray, ...]:
    row, run, since, height = layout.runs_before(layout.row_sequence, layout.row_chunk)
    return row, run, since, layout.chunk.bit_length() + height
