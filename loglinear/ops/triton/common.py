"""What several kernels share: where a row's tokens lie, and the level at which a slot sees another.

Shapes: t slot of a query, s slot of a key, h value head, l level.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF = 64  # tokens in half a chunk: the largest block whose levels differ from pair to pair
LEVELS_IN_HALF = 7  # 0 for the token itself, 1..6 for halves of blocks of 2..64
FIRST_READ_LEVEL = 8  # levels from here on are read from states; level 7 is the second half reading the first


@triton.jit
def row_tokens(row_token_ptr, row_slots_ptr, row, t):
    """Tokens of the slots `t` of a row, int64, and whether the slot has one."""
    token_t = tl.load(row_token_ptr + row) + t
    first = tl.load(row_slots_ptr + 2 * row)
    end = tl.load(row_slots_ptr + 2 * row + 1)
    return token_t, (t >= first) & (t < end)


@triton.jit
def gap(boundary_ptr, since, until, head, heads):
    """Log2-decay between two boundaries; float64 inside, so exact at any length."""
    start = tl.load(boundary_ptr + since * heads + head)
    return (tl.load(boundary_ptr + until * heads + head) - start).to(tl.float32)


@triton.jit
def level_weights(scales_ptr, stride, t, distance_ts, LEVELS: tl.constexpr):
    """Level scale of each pair in a block of half a chunk; `distance_ts` is t XOR s, level its bit length."""
    weight_ts = tl.load(scales_ptr + (LEVELS - 1) * stride + t).to(tl.float32)[:, None]
    for step in tl.static_range(LEVELS - 1):
        level: tl.constexpr = LEVELS - 2 - step
        scale_t = tl.load(scales_ptr + level * stride + t).to(tl.float32)
        weight_ts = tl.where(distance_ts < (1 << level), scale_t[:, None], weight_ts)
    return weight_ts
