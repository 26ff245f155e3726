"""The trees that the kernels go through in one launch: everything once, and nothing before what it needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loglinear.ops.checks import Sequences
from loglinear.ops.triton.tables import CHUNK, Tables, make_tables

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> Tables:
    """Several sequences of up to 300 chunks, some of which go on from a state."""
    lengths = draw(st.lists(st.integers(0, 300 * CHUNK), min_size=1, max_size=4).filter(any))
    starts = draw(st.lists(st.integers(0, 100 * CHUNK), min_size=len(lengths), max_size=len(lengths)))
    return make_tables(Sequences(tuple(lengths), tuple(starts)), CPU)


def members(trees: torch.Tensor) -> list[int]:
    return sorted(trees[trees >= 0].tolist())


@settings(max_examples=40)
@given(tables=layouts())
def test_every_merge_above_the_pairs_is_in_one_tree_below_its_parent(tables: Tables) -> None:
    merges = [member for trees in tables.merge_trees for member in members(trees)]
    assert sorted(merges) == list(range(tables.pairs, len(tables.merge)))
    made = {tables.row_states + merge for merge in range(tables.pairs)}  # states there are before the first launch
    for trees in tables.merge_trees:
        for tree in trees.tolist():
            for slot, merge in reversed(list(enumerate(tree))):
                if merge < 0:
                    continue
                for side, state in enumerate(tables.merge[merge].tolist()):
                    half = tree[2 * slot + 1 + side] if slot < 3 else -1
                    assert state < 0 or (state in made if slot >= 3 else state == tables.row_states + half)
        made |= {tables.row_states + merge for merge in members(trees)}


@settings(max_examples=40)
@given(tables=layouts())
def test_every_source_is_in_one_tree_with_those_that_need_its_gradient(tables: Tables) -> None:
    sources = [member for trees in tables.source_trees for member in members(trees)]
    assert sorted(sources) == list(range(len(tables.source)))
    first_piece, parent_piece = tables.source[:, 1].tolist(), tables.source[:, 3].tolist()
    made = {-1}  # pieces that are whole before a launch
    for trees in tables.source_trees:
        for top, near, far, below_near in trees.tolist():
            assert parent_piece[top] in made
            for source, parent in ((near, top), (far, top), (below_near, near)):
                assert source < 0 or parent_piece[source] == first_piece[parent]
        made |= {first_piece[source] for source in members(trees)}


@pytest.mark.parametrize(("chunks", "launches"), [(2, 0), (8, 1), (16, 1), (17, 1), (33, 2), (8192, 4)])
def test_a_launch_goes_through_three_heights(chunks: int, launches: int) -> None:
    assert len(make_tables(Sequences((chunks * CHUNK,), (0,)), CPU).merge_trees) == launches
