"""What several kernels share: where a row's tokens lie, and the level at which a slot sees another.

Shapes: t slot of a query, s slot of a key, h value head, l level.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import triton
import triton.language as tl

HALF = 64  # tokens in half a chunk: the largest block whose levels differ from pair to pair
LEVELS_IN_HALF = 7  # 0 for the token itself, 1..6 for halves of blocks of 2..64
FIRST_READ_LEVEL = 8  # levels from here on are read from states; level 7 is the second half reading the first


@triton.jit
def row_tokens(
    row_token_ptr: tl.tensor,
    row_slots_ptr: tl.tensor,
    row: tl.tensor,
    t: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The token in slot 0 of a row, int64, and which of the slots `t` have one.

    It may lie before the first token. Offsets from it fit 32 bits, which spares registers.
    """
    first = tl.load(row_slots_ptr + 2 * row)
    end = tl.load(row_slots_ptr + 2 * row + 1)
    return tl.load(row_token_ptr + row), (t >= first) & (t < end)


@triton.jit
def load_read(
    read_ptr: tl.tensor,
    read_gap_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    stride: tl.tensor,
    read: tl.tensor,
    head: tl.tensor,
    t: tl.tensor,
    H: tl.constexpr,
    SCALED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What weighs a read: the decay from the run's end to the row, and the level's scale for each slot."""
    gap = tl.load(read_gap_ptr + read * H + head)
    scale_t = tl.full([t.shape[0]], 1.0, tl.float32)
    if SCALED:
        scale_t = tl.load(scales_ptr + tl.load(read_ptr + 4 * read + 1) * stride + t).to(tl.float32)
    return gap, scale_t


@triton.jit
def _load_scale(scales_ptr, stride, t, level, LEVELS: tl.constexpr):
    """Scales of one level; of the last one there is for levels that no pair has."""
    return tl.load(scales_ptr + min(level, LEVELS - 1) * stride + t).to(tl.float32)


@triton.jit
def level_weights(
    scales_ptr: tl.tensor,
    stride: tl.tensor,
    t: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tensor:
    """Level scale of each pair in blocks [slots t, the 64 slots of t's half].

    Of the four groups of 16 keys only a query's own has levels that differ from key to key (0 to 4); another has level
    5 or 6. So selecting costs one operation a pair instead of one for every level.
    """
    s, j = tl.arange(0, 16), tl.arange(0, 4)
    distance_ts = (t % 16)[:, None] ^ s[None, :]
    own_ts = _load_scale(scales_ptr, stride, t, 4, LEVELS)[:, None]
    for step in tl.static_range(4):
        scale_t = _load_scale(scales_ptr, stride, t, 3 - step, LEVELS)
        own_ts = tl.where(distance_ts < (1 << (3 - step)), scale_t[:, None], own_ts)
    group_tj = (t % 64 // 16)[:, None] ^ j[None, :]
    near_t = _load_scale(scales_ptr, stride, t, 5, LEVELS)
    far_t = _load_scale(scales_ptr, stride, t, 6, LEVELS)
    other_tj = tl.where(group_tj == 1, near_t[:, None], far_t[:, None])
    weight_tjs = tl.where((group_tj == 0)[:, :, None], own_ts[:, None, :], other_tj[:, :, None])
    return tl.reshape(weight_tjs, [ROWS, 64])


@triton.jit
def _store_sum(ptr, stride, t, level, sum_t, LEVELS: tl.constexpr):
    if level < LEVELS:
        tl.store(ptr + level * stride + t, sum_t.to(ptr.dtype.element_ty))


@triton.jit
def store_level_sums(
    ptr: tl.tensor,
    stride: tl.tensor,
    t: tl.tensor,
    pairs_ts: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """Sum a block [slots t, the 64 slots of t's half] over the keys of each level, and store the sums."""
    s, j = tl.arange(0, 16), tl.arange(0, 4)
    pairs_tjs = tl.reshape(pairs_ts, [ROWS, 4, 16])
    group_tj = (t % 64 // 16)[:, None] ^ j[None, :]
    other_tj = tl.sum(pairs_tjs, 2)
    _store_sum(ptr, stride, t, 5, tl.sum(tl.where(group_tj == 1, other_tj, 0.0), 1), LEVELS)
    _store_sum(ptr, stride, t, 6, tl.sum(tl.where(group_tj > 1, other_tj, 0.0), 1), LEVELS)
    own_ts = tl.sum(tl.where((group_tj == 0)[:, :, None], pairs_tjs, 0.0), 1)
    distance_ts = (t % 16)[:, None] ^ s[None, :]
    for level in tl.static_range(5):
        at_level_ts = (distance_ts < (1 << level)) & (distance_ts >= (1 << level) // 2)
        _store_sum(ptr, stride, t, level, tl.sum(tl.where(at_level_ts, own_ts, 0.0), 1), LEVELS)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)), also where exp(x) would overflow or vanish beside 1."""
    small = tl.exp(-tl.abs(x))
    rest = tl.where(small < 1e-3, small * (1.0 - 0.5 * small), tl.log(1.0 + small))
    return tl.maximum(x, 0.0) + rest
