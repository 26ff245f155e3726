"""States of chunks and of runs of chunks: the up-sweep of a binary tree.

Shapes: c chunk (row of the tables), t slot, h value head, g query/key group, n state (key) size, p value head size,
x run, f a matrix [n, p] as one vector.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import row_tokens
from loglinear.ops.triton.config import Sizes
from loglinear.ops.triton.prepare import Decays
from loglinear.ops.triton.tables import CHUNK, Tables


def run_states(
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    decays: Decays,
    tables: Tables,
    sizes: Sizes,
) -> torch.Tensor:
    """States of runs (which ones, see `Tables`), each decayed to its end, in v's dtype: [states, H, N, P]."""
    states_xhnp = v_thp.new_empty(tables.states, sizes.heads, sizes.state, sizes.value)
    block_p = min(sizes.value, 64)
    grid = (len(tables.pair) * sizes.heads, sizes.value // block_p)
    _pair_states[grid](
        k_tgn, v_thp, decays.slot_cht, decays.state_xh, states_xhnp, tables.row_token, tables.row_slots, tables.pair,
        H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK,
        BLOCK_P=block_p, PRECISION=sizes.precision, num_warps=8,
    )  # fmt: skip
    block = sizes.flat_block
    for trees in tables.merge_trees:
        _merge[(len(trees) * sizes.heads, sizes.flat // block)](
            states_xhnp, decays.state_xh, tables.merge, trees, tables.row_states,
            H=sizes.heads, F=sizes.flat, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return states_xhnp


@triton.jit
def _chunk_state(
    k_ptr, v_ptr, decay_ptr, row_token_ptr, row_slots_ptr, row, head, n, p,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of one chunk, decayed to its end."""
    t = tl.arange(0, CHUNK)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    groups: tl.constexpr = H // R
    k_ptr += (token * groups + head // R) * N
    k_tn = tl.load(k_ptr + t[:, None] * (groups * N) + n[None, :], mask=valid_t[:, None], other=0.0)
    v_ptr += (token * H + head) * P
    v_tp = tl.load(v_ptr + t[:, None] * (H * P) + p[None, :], mask=valid_t[:, None], other=0.0)
    decay_ptr += (row.to(tl.int64) * H + head) * CHUNK
    to_end_t = tl.exp2(tl.load(decay_ptr + CHUNK - 1) - tl.load(decay_ptr + t))
    weighted_tp = (v_tp * to_end_t[:, None]).to(v_tp.dtype)
    return tl.dot(tl.trans(k_tn), weighted_tp, input_precision=PRECISION)


@triton.jit
def _pair_states(
    k_ptr, v_ptr, decay_ptr, state_decay_ptr, states_ptr, row_token_ptr, row_slots_ptr, pair_ptr,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states of a left row and of its run with the right one. Nobody reads the right one's, so it is not stored."""
    pair, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.arange(0, N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    state_at = n[:, None] * P + p[None, :]
    left, right = tl.load(pair_ptr + 4 * pair), tl.load(pair_ptr + 4 * pair + 2)
    dtype = states_ptr.dtype.element_ty
    state_np = tl.zeros([N, BLOCK_P], tl.float32)
    if left >= 0:
        state_np = _chunk_state(
            k_ptr, v_ptr, decay_ptr, row_token_ptr, row_slots_ptr, left, head, n, p, H, R, N, P, CHUNK, PRECISION
        )
        of_left = tl.load(pair_ptr + 4 * pair + 1).to(tl.int64) * H + head
        tl.store(states_ptr + of_left * N * P + state_at, state_np.to(dtype))
        state_np *= tl.exp2(tl.load(state_decay_ptr + of_left))
    if right >= 0:
        state_np += _chunk_state(
            k_ptr, v_ptr, decay_ptr, row_token_ptr, row_slots_ptr, right, head, n, p, H, R, N, P, CHUNK, PRECISION
        )
        of_both = tl.load(pair_ptr + 4 * pair + 3).to(tl.int64) * H + head
        tl.store(states_ptr + of_both * N * P + state_at, state_np.to(dtype))


@triton.jit
def _load_half(states_ptr, merge_ptr, merge, side, head, f, H: tl.constexpr, F: tl.constexpr):
    """The state of a half, fp32; zero if there is none."""
    state = tl.load(merge_ptr + 2 * merge + side, mask=merge >= 0, other=-1).to(tl.int64)
    return tl.load(states_ptr + (state * H + head) * F + f, mask=state + 0 * f >= 0, other=0.0).to(tl.float32)


@triton.jit
def _merge_halves(
    states_ptr, state_decay_ptr, merge_ptr, merge, left_f, right_f, row_states, head, f,
    H: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The left half decayed over the right one, plus that; stored, and returned unrounded."""
    left = tl.load(merge_ptr + 2 * merge, mask=merge >= 0, other=-1)
    decay = tl.exp2(tl.load(state_decay_ptr + left * H + head, mask=left >= 0, other=0.0))
    merged_f = right_f + decay * left_f
    out = (merge + row_states).to(tl.int64) * H + head
    tl.store(states_ptr + out * F + f, merged_f.to(states_ptr.dtype.element_ty), mask=merge + 0 * f >= 0)
    return merged_f


@triton.jit(do_not_specialize=["row_states"])
def _merge(
    states_ptr, state_decay_ptr, merge_ptr, tree_ptr, row_states,
    H: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tree of up to seven merges, slots 3 to 6 before 1 and 2 before 0."""
    tree_ptr += 7 * (tl.program_id(0) // H)
    head = tl.program_id(0) % H
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tops = ()
    for side in tl.static_range(2):
        halves = ()
        for half in tl.static_range(2):
            merge = tl.load(tree_ptr + 3 + 2 * side + half)
            left_f = _load_half(states_ptr, merge_ptr, merge, 0, head, f, H, F)
            right_f = _load_half(states_ptr, merge_ptr, merge, 1, head, f, H, F)
            merged_f = _merge_halves(
                states_ptr, state_decay_ptr, merge_ptr, merge, left_f, right_f, row_states, head, f, H, F
            )
            halves = halves + (merged_f,)  # noqa: RUF005 (Triton knows no star)
        merge = tl.load(tree_ptr + 1 + side)
        merged_f = _merge_halves(
            states_ptr, state_decay_ptr, merge_ptr, merge, halves[0], halves[1], row_states, head, f, H, F
        )
        tops = tops + (merged_f,)  # noqa: RUF005
    _merge_halves(
        states_ptr, state_decay_ptr, merge_ptr, tl.load(tree_ptr), tops[0], tops[1], row_states, head, f, H, F
    )
