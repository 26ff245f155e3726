"""The index arithmetic of the chunked op: which chunk reads which bucket, known before any tensor is touched.

Sequences are laid out in whole chunks aligned to absolute positions: one that starts at position t0 begins in slot
t0 % C of chunk t0 // C. All chunks of all sequences form one list of rows. A node is an aligned run of 2^e whole
chunks, its state decayed to its end; a run at a sequence's start may lack its left part. Nodes are numbered level by
level, the rows first. A boundary b is the instant before row b (or after row b - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from loglinear.ops.checks import Sequences
from loglinear.ops.fenwick import bit_length, bucket_start, level, set_bits

Table = torch.Tensor  # int64 with one dimension, unless said otherwise


@dataclass(frozen=True)
class Merge:
    """Nodes of one kind: state = exp(G[until] - G[since]) * left + right, G at boundaries."""

    left: Table
    right: Table
    missing: torch.Tensor  # bool, there is no left part, and `left` is any id
    since: Table
    until: Table


@dataclass(frozen=True)
class Reads:
    """Pairs of a row and a state that its queries read; the state is decayed to boundary `since`."""

    row: Table
    source: Table
    since: Table
    level: Table  # of the pair; [pairs, C] for an initial state, whose level may differ between slots


@dataclass(frozen=True)
class Parts:
    """States that are summed into buckets of the final state, `target` = sequence * K + bucket."""

    source: Table
    since: Table
    until: Table
    target: Table


@dataclass(frozen=True)
class Tails:
    """Buckets below one chunk of the final state, from the partial last rows."""

    row: Table
    holds: torch.Tensor  # bool [entries, C], the slots of the bucket
    target: Table


@dataclass(frozen=True)
class Plan:
    """Everything that the chunked op indexes by."""

    rows: int
    slots: Table | None  # slot of every token among rows * C; None when tokens fill the rows exactly
    merges: tuple[Merge, ...]  # the up-sweep
    prefixes: tuple[Merge, ...]  # all that lies before a row as one state, by rounds; `left` counts in the last round
    prefix_row: Table  # rows in the order in which `prefixes` yields their states
    reads: Reads  # source: a node
    initial_reads: Reads  # source: sequence * K_initial + bucket
    final_buckets: int  # K of the final state
    final_nodes: Parts  # source: a node
    final_initial: Parts  # source: sequence * K_initial + bucket
    final_tails: Tails


class _Layout:
    """Rows and nodes, in numpy."""

    def __init__(self, sequences: Sequences, chunk: int) -> None:
        self.chunk = chunk
        self.lengths = np.array(sequences.lengths, dtype=np.int64)
        self.starts = np.array(sequences.starts, dtype=np.int64)
        self.ends = self.starts + self.lengths
        self.first_chunk = self.starts // chunk
        counts = np.where(self.lengths > 0, -(-self.ends // chunk) - self.first_chunk, 0)
        self.base = np.cumsum(counts) - counts  # boundary before each sequence
        self.limit = self.base + counts  # boundary after it
        self.rows = int(counts.sum())
        self.row_sequence = np.repeat(np.arange(len(counts)), counts)
        self.row_chunk = np.arange(self.rows) - self.base[self.row_sequence] + self.first_chunk[self.row_sequence]
        self.merges: list[tuple[np.ndarray, ...]] = []
        self.height_first = [self.base]  # per height, id of each sequence's first node
        self.node_end = np.arange(self.rows) + 1  # boundary at the end of each node
        self._grow()

    def _grow(self) -> None:
        """Merge siblings height by height until no right sibling is left."""
        sequence, index = self.row_sequence, self.row_chunk
        complete = (index + 1) * self.chunk <= self.ends[sequence]
        offset = 0
        while (right := np.flatnonzero((index & 1 == 1) & complete)).size:
            left = np.maximum(right - 1, 0)
            missing = (right == 0) | (sequence[left] != sequence[right])
            since, until = self.node_end[offset + left], self.node_end[offset + right]
            self.merges.append((offset + left, offset + right, missing, since, until))
            offset = len(self.node_end)
            self.node_end = np.concatenate([self.node_end, until])
            sequence, index = sequence[right], index[right] >> 1
            self.height_first.append(offset + np.searchsorted(sequence, np.arange(len(self.starts))))
            complete = np.ones(len(right), dtype=bool)

    def nodes(self, sequence: np.ndarray, height: int, index: np.ndarray) -> np.ndarray:
        """Ids of the aligned runs `index` of 2^height chunks, which must hold tokens of their sequence."""
        return self.height_first[height][sequence] + index - (self.first_chunk[sequence] >> height)


@lru_cache(maxsize=64)
def make_plan(sequences: Sequences, chunk: int, initial_buckets: int, device: torch.device) -> Plan:
    """The plan for these lengths and starts, with its tables on `device`.

    Args:
        sequences: lengths and starts, in tokens.
        chunk: tokens in a chunk, a power of two.
        initial_buckets: K of the initial state, 0 without one.
        device: where the tables go.
    """
    layout = _Layout(sequences, chunk)
    buckets = max(initial_buckets, int(layout.ends.max()).bit_length())

    def put(tables: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in tables]

    prefixes, prefix_row = _prefixes(layout)
    return Plan(
        rows=layout.rows,
        slots=None if _exact(layout) else put([_slots(layout)])[0],
        merges=tuple(Merge(*put(merge)) for merge in layout.merges),
        prefixes=tuple(Merge(*put(merge)) for merge in prefixes),
        prefix_row=put([prefix_row])[0],
        reads=Reads(*put(_reads(layout))),
        initial_reads=Reads(*put(_initial_reads(layout, initial_buckets))),
        final_buckets=buckets,
        final_nodes=Parts(*put(_final_nodes(layout, buckets))),
        final_initial=Parts(*put(_final_initial(layout, initial_buckets, buckets))),
        final_tails=Tails(*put(_final_tails(layout, buckets))),
    )


def _exact(layout: _Layout) -> bool:
    return bool(np.all(layout.lengths % layout.chunk == 0) and np.all(layout.starts % layout.chunk == 0))


def _slots(layout: _Layout) -> np.ndarray:
    first = layout.base * layout.chunk + layout.starts % layout.chunk
    token = np.arange(layout.lengths.sum())
    before = np.cumsum(layout.lengths) - layout.lengths
    return token + np.repeat(first - before, layout.lengths)


def _reads(layout: _Layout) -> tuple[np.ndarray, ...]:
    """Row c reads the run of 2^e chunks before (c >> e) << e for every set bit e of c."""
    chunk_level = layout.chunk.bit_length()
    first = layout.first_chunk[layout.row_sequence]
    rows, sources, levels = [], [], []
    for height in range(len(layout.height_first)):
        index = layout.row_chunk >> height
        row = np.flatnonzero((index & 1 == 1) & (index > first >> height))
        rows.append(row)
        sources.append(layout.nodes(layout.row_sequence[row], height, index[row] - 1))
        levels.append(np.full(len(row), chunk_level + height))
    source = np.concatenate(sources)
    return np.concatenate(rows), source, layout.node_end[source], np.concatenate(levels)


def _prefixes(layout: _Layout) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
    """What lies before row c: all before c with its lowest set bit cleared, then the run that this bit stands for."""
    chunk, sequence = layout.row_chunk, layout.row_sequence
    first = layout.first_chunk[sequence]
    bit = chunk & -chunk
    height = bit_length(bit) - 1
    previous_row = np.arange(layout.rows) - bit  # negative or in another sequence when nothing lies before it
    rounds, order = [], []
    position = np.zeros(layout.rows, dtype=np.int64)  # of a row within its round
    row = np.flatnonzero((chunk > first) & (chunk - bit <= first))
    while row.size:
        source = np.zeros(len(row), dtype=np.int64)
        for each in np.unique(height[row]):
            here = height[row] == each
            source[here] = layout.nodes(sequence[row[here]], int(each), (chunk[row[here]] >> each) - 1)
        missing = np.full(len(row), not rounds)
        left = np.where(missing, 0, position[np.maximum(previous_row[row], 0)])
        since = np.where(missing, 0, previous_row[row])
        rounds.append((left, source, missing, since, row))
        order.append(row)
        position[row] = np.arange(len(row))
        row = np.flatnonzero(_follows(chunk, first, bit, previous_row, row))
    return rounds, np.concatenate(order) if order else np.zeros(0, dtype=np.int64)


def _follows(
    chunk: np.ndarray, first: np.ndarray, bit: np.ndarray, previous_row: np.ndarray, done: np.ndarray
) -> np.ndarray:
    """Rows whose predecessor is among the rows `done`."""
    return (chunk > first) & (chunk - bit > first) & np.isin(previous_row, done)


def _initial_reads(layout: _Layout, initial_buckets: int) -> tuple[np.ndarray, ...]:
    """Every row of a sequence reads each occupied bucket of its initial state."""
    rows, sources, levels = [], [], []
    slot = np.arange(layout.chunk)
    for sequence, start in enumerate(layout.starts.tolist()):
        row = np.arange(layout.base[sequence], layout.limit[sequence])
        for bucket in set_bits(start) if row.size else []:
            time = layout.row_chunk[row][:, None] * layout.chunk + slot
            time = np.clip(time, start, layout.ends[sequence] - 1)  # a padding slot repeats its neighbour's level
            rows.append(row)
            sources.append(np.full(len(row), sequence * initial_buckets + bucket))
            levels.append(bit_length(time ^ bucket_start(start, bucket)))
    row, source = _join(rows), _join(sources)
    since = layout.base[layout.row_sequence[row]]
    return row, source, since, np.concatenate(levels) if levels else np.zeros((0, layout.chunk), dtype=np.int64)


def _final_nodes(layout: _Layout, buckets: int) -> tuple[np.ndarray, ...]:
    """Buckets of whole chunks."""
    shift = layout.chunk.bit_length() - 1
    sources, sequences, targets = [], [], []
    for height in range(len(layout.height_first)):
        index = layout.ends >> (shift + height)
        holds = (index & 1 == 1) & (index > layout.first_chunk >> height) & (layout.lengths > 0)
        sequence = np.flatnonzero(holds)
        sources.append(layout.nodes(sequence, height, index[sequence] - 1))
        sequences.append(sequence)
        targets.append(sequence * buckets + shift + height)
    source, sequence = np.concatenate(sources), np.concatenate(sequences)
    return source, layout.node_end[source], layout.limit[sequence], np.concatenate(targets)


def _final_initial(layout: _Layout, initial_buckets: int, buckets: int) -> tuple[np.ndarray, ...]:
    """The bucket of the final state in which each initial bucket ends up."""
    entries = [
        (sequence * initial_buckets + bucket, sequence * buckets + level(end, bucket_start(start, bucket)) - 1, sequence)
        for sequence, (start, end) in enumerate(zip(layout.starts.tolist(), layout.ends.tolist(), strict=True))
        for bucket in set_bits(start)
    ]
    source, target, sequence = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    return source, layout.base[sequence], layout.limit[sequence], target


def _final_tails(layout: _Layout, buckets: int) -> tuple[np.ndarray, ...]:
    """Buckets of less than a chunk lie in the last row of a sequence that does not fill it."""
    slot = np.arange(layout.chunk)
    entries = [
        (int(layout.limit[sequence]) - 1, sequence * buckets + bucket, bucket, bucket_start(tail, bucket))
        for sequence, tail in enumerate((layout.ends % layout.chunk).tolist())
        if layout.lengths[sequence]
        for bucket in set_bits(tail)
    ]
    row, target, bucket, first = np.array(entries, dtype=np.int64).reshape(-1, 4).T
    holds = (slot >= first[:, None]) & (slot < (first + (1 << bucket))[:, None])
    return row, holds, target


def _join(tables: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(tables) if tables else np.zeros(0, dtype=np.int64)
