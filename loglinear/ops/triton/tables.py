"""The index plan of the chunked op as the kernels read it: one row of integers per chunk, read, piece or run.

A read is a pair of a row and a run whose state its queries read; reads are sorted by row. A run that is read is read
by consecutive rows; a piece is at most `PIECE` of them, the work of one program that computes the run's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from loglinear.ops.checks import Sequences
from loglinear.ops.plan import Plan, make_plan

CHUNK = 128
AT_ONCE = 3  # heights of the tree that a launch goes through: states between them are not rounded
PIECE = 32  # rows: bounds the longest program, and with it the tail of the launch


@dataclass(frozen=True)
class Tables:
    """Index tables on the device, int32 unless said otherwise. A source is a run that is read.

    Right rows of pairs have no state in memory, since only their pair's run needs it: states count all other runs.
    """

    rows: int
    states: int
    row_states: int  # states that are of rows; those of longer runs follow
    reads: int
    pieces: int
    pairs: int  # runs of two chunks
    source_heights: int  # how many different heights sources may have
    row_token: torch.Tensor  # int64, token in slot 0 of each row (before the sequence where slots are padding)
    row_slots: torch.Tensor  # [rows, 2], first slot with a token and the end of them
    row_levels: torch.Tensor  # bit mask of the levels that a row's reads have
    row_gradient: torch.Tensor  # piece that holds the gradient of a row's state, -1 where that is zero
    read_start: torch.Tensor  # [rows + 1], reads of each row
    read: torch.Tensor  # [reads + 1, 4]: state, level, height, source; one more, so that a loop may look ahead
    read_gap: torch.Tensor  # [reads + 1, 2]: boundaries at the run's end and before the row
    pair: torch.Tensor  # [pairs of rows, 4]: left row, its state, right row, state of both; -1 for what does not exist
    merge: torch.Tensor  # [runs of more than one chunk, 2]: states of the left half, or -1, and of the right one
    merge_trees: tuple[torch.Tensor, ...]  # bottom up, [trees, 7] each: see `_merge_trees`
    source_trees: tuple[torch.Tensor, ...]  # top down, [trees, 4] each: see `_source_trees`
    state_gap: torch.Tensor  # [states, 2]: boundaries at the run's end and its parent's
    source: torch.Tensor  # [sources, 7]: state, pieces from, to, parent's gradient or -1, rows from, to, height
    piece: torch.Tensor  # [pieces, 5], longest first: rows from, to, boundary, level, where its sum goes


@lru_cache(maxsize=64)
def make_tables(sequences: Sequences, device: torch.device) -> Tables:
    """The tables for sequences of these lengths and starts, in tokens."""
    plan = make_plan(sequences, CHUNK, torch.device("cpu"))
    merges = plan.merges
    merge = np.stack([x.numpy() for x in (merges.left, merges.right, merges.since, merges.until)], 1)
    merge[merges.missing.numpy(), 0] = -1
    row_token, row_slots = _rows(sequences)
    row, read = _reads(plan)
    source, piece = _sources(row, read)
    heights = (slice(0, plan.rows), *(slice(h.start + plan.rows, h.stop + plan.rows) for h in merges.heights))
    run_gap, above = _parents(heights, merge, source)
    levels = np.zeros(plan.rows, np.int64)
    np.bitwise_or.at(levels, row, 1 << read[:, 1])
    of_source = np.searchsorted(source[:, 0], read[:, 0])
    pair = _pairs(plan.rows, merge[merges.heights[0] if merges.heights else slice(0)])
    has_state = np.ones(len(run_gap), bool)
    has_state[pair[pair[:, 2] >= 0, 1]] = False
    state = np.append(np.cumsum(has_state) - 1, -1)  # of a run; of run -1 too
    one_more = ((0, 1), (0, 0))

    def put(table: np.ndarray, dtype: type = np.int32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table.astype(dtype))).to(device)

    return Tables(
        rows=plan.rows,
        states=int(has_state.sum()),
        row_states=int(has_state[: plan.rows].sum()),
        reads=len(read),
        pieces=len(piece),
        pairs=merges.heights[0].stop if merges.heights else 0,
        source_heights=len(heights),
        row_token=put(row_token, np.int64),
        row_slots=put(row_slots),
        row_levels=put(levels),
        row_gradient=put(above[: plan.rows, 0]),
        read_start=put(np.searchsorted(row, np.arange(plan.rows + 1))),
        read=put(np.pad(np.column_stack([state[read[:, 0]], read[:, 1:3], of_source]), one_more)),
        read_gap=put(np.pad(np.column_stack([read[:, 3], row]), one_more)),
        pair=put(np.column_stack([pair[:, 0], state[pair[:, 0]], pair[:, 1], state[pair[:, 2]]])),
        merge=put(state[merge[:, :2]]),
        merge_trees=tuple(map(put, _merge_trees(merge[:, :2] - plan.rows, merges.heights))),
        source_trees=tuple(map(put, _source_trees(source[:, 5], source[:, 1], above[source[:, 0], 1]))),
        state_gap=put(run_gap[has_state]),
        source=put(np.column_stack([state[source[:, 0]], source[:, 1:3], above[source[:, 0], 1], source[:, 3:]])),
        piece=put(piece),
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


def _pairs(rows: int, merge: np.ndarray) -> np.ndarray:
    """The rows that merge, with their run, and each of the others alone. `merge` is of the runs of two chunks."""
    merged = np.column_stack([merge[:, :2], np.arange(rows, rows + len(merge))])
    alone = np.setdiff1d(np.arange(rows), merged[:, :2])
    return np.concatenate([merged, np.column_stack([alone, np.full((len(alone), 2), -1)])])


def _sources(row: np.ndarray, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each run that is read: run, pieces from, to, rows from, to, height. And the table `piece`."""
    run, first, count = np.unique(read[:, 0], return_index=True, return_counts=True)
    pieces = -(-count // PIECE)
    end = np.cumsum(pieces)
    source = np.column_stack([run, end - pieces, end, row[first], row[first] + count, read[first, 2]])
    owner = np.repeat(np.arange(len(run)), pieces)
    number = np.arange(len(owner))
    begin = source[owner, 3] + (number - source[owner, 1]) * PIECE
    stop = np.minimum(begin + PIECE, source[owner, 4])
    piece = np.column_stack([begin, stop, read[first, 3][owner], read[first, 1][owner], number])
    return source, piece[np.argsort(begin - stop, kind="stable")]


def _merge_trees(halves: np.ndarray, heights: tuple[slice, ...]) -> Iterator[np.ndarray]:
    """The merges of `AT_ONCE` heights at a time as binary trees, for the heights above the pairs.

    A tree has its top in slot 0, the halves of slot i in slots 2 i + 1 and 2 i + 2, and -1 in slots without a merge.
    Its lowest merges are in the last four slots, so a tree of fewer heights begins in slot 2 or 6.

    Args:
        halves: [merges, 2], the merge that makes each half.
        heights: merges of each height.
    """
    for first in range(1, len(heights), AT_ONCE):
        group = heights[first : first + AT_ONCE]
        slot = np.full(len(halves), -1)
        tree = np.full(len(halves), -1)
        trees = 0
        for depth, height in zip(range(AT_ONCE - len(group), AT_ONCE), reversed(group), strict=True):
            tops = np.flatnonzero(slot[height] < 0) + height.start
            slot[tops], tree[tops] = (2 << depth) - 2, trees + np.arange(len(tops))
            trees += len(tops)
            for side in (0, 1) if depth + 1 < AT_ONCE else ():
                half = halves[height, side]
                exists = half >= group[0].start
                slot[half[exists]] = 2 * slot[height][exists] + 1 + side
                tree[half[exists]] = tree[height][exists]
        table = np.full((trees, (1 << AT_ONCE) - 1), -1)
        merges = slice(group[0].start, group[-1].stop)
        table[tree[merges], slot[merges]] = np.arange(merges.start, merges.stop)
        yield table


def _source_trees(height: np.ndarray, first_piece: np.ndarray, parent_piece: np.ndarray) -> Iterator[np.ndarray]:
    """The sources of `AT_ONCE` heights at a time as trees: a source's gradient takes part in those below it.

    A tree is a source, the ones one and two heights below that need its gradient, and the one two heights below that
    needs the first's; -1 for what does not exist.

    Args:
        height, first_piece, parent_piece: [sources], the last -1 where no gradient comes from above.
    """
    sources = np.arange(len(height))
    of_piece = np.full(int(first_piece.max(initial=-1)) + 2, -1)  # the last one for piece -1
    of_piece[first_piece] = sources
    parent = of_piece[parent_piece]
    for top in range(int(height.max(initial=-1)), -1, -AT_ONCE):
        in_group = (height <= top) & (height > top - AT_ONCE)
        has_parent = in_group & (parent >= 0) & (height[parent] <= top)
        roots = np.flatnonzero(in_group & ~has_parent)
        tree = np.full(len(height), -1)
        tree[roots] = np.arange(len(roots))
        table = np.full((len(roots), 4), -1)
        table[:, 0] = roots
        children = np.flatnonzero(has_parent & (tree[parent] >= 0))
        table[tree[parent[children]], height[parent[children]] - height[children]] = children
        grandchildren = np.flatnonzero(has_parent & (tree[parent] < 0))
        table[tree[parent[parent[grandchildren]]], 3] = grandchildren
        yield table


def _parents(heights: tuple[slice, ...], merge: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The table `run_gap`, and for every run the pieces that hold the gradients of its state and of its parent's.

    A right half is decayed to its end already, so its gradient is its parent's and has no memory of its own.
    A left half is a source if it has a parent, because the rows of the right half read it.
    """
    rows, runs = heights[0].stop, heights[-1].stop
    left, right, since, until = merge.T
    above = np.arange(rows, runs)
    parent, run_gap = np.full(runs, -1), np.zeros((runs, 2), np.int64)
    parent[right] = above
    has_left = left >= 0
    parent[left[has_left]] = above[has_left]
    run_gap[left[has_left]] = np.column_stack([since, until])[has_left]
    own = np.full(runs, -1)
    own[source[:, 0]] = source[:, 1]
    gradient = np.full((runs, 2), -1)
    for height in reversed(heights):
        gradient[height, 1] = np.where(parent[height] >= 0, gradient[parent[height], 0], -1)
        gradient[height, 0] = np.where(own[height] >= 0, own[height], gradient[height, 1])
    return run_gap, gradient
