"""Before and after the other kernels: decays summed within chunks, level scales with slots innermost.

Shapes: c chunk (row of the tables), t slot, h value head, l level, x run or boundary
between rows, m read.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import FIRST_READ_LEVEL, row_tokens
from loglinear.ops.triton.tables import CHUNK, Tables

LOG2_E = tl.constexpr(1.4426950408889634)


class Decays(NamedTuple):
    """Log2-decays, the sums of g that the kernels need."""

    slot_cht: torch.Tensor  # from the chunk's start to each slot's end
    boundary_xh: torch.Tensor  # fp64, [rows + 1, H], from the first boundary to each
    state_xh: torch.Tensor  # from the end of each run with a state to its parent's
    read_mh: torch.Tensor  # from the end of the run that is read to the row that reads it


def sum_decays(g_th: torch.Tensor, tables: Tables) -> Decays:
    """All sums of the log-decays g [tokens, H]."""
    heads = g_th.shape[1]
    slot_cht = g_th.new_empty(tables.rows, heads, CHUNK, dtype=torch.float32)
    boundary_xh = g_th.new_empty(tables.rows + 1, heads, dtype=torch.float64)
    block = min(16, triton.next_power_of_2(heads))
    grid = (tables.rows, triton.cdiv(heads, block))
    _sum_within_chunks[grid](g_th, slot_cht, tables.row_token, tables.row_slots, heads, CHUNK=CHUNK, BLOCK=block)
    _sum_over_chunks[(heads,)](slot_cht, boundary_xh, tables.rows, heads, CHUNK=CHUNK, BLOCK=1024)
    state_xh, read_mh = (_gaps(boundary_xh, pair) for pair in (tables.state_gap, tables.read_gap))
    return Decays(slot_cht, boundary_xh, state_xh, read_mh)


def _gaps(boundary_xh: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """Between pairs of boundaries [pairs, 2]: differences of fp64 sums, so exact at any length."""
    pairs, heads = len(pair), boundary_xh.shape[1]
    gap_mh = boundary_xh.new_empty(pairs, heads, dtype=torch.float32)
    _subtract[(triton.cdiv(pairs * heads, 256),)](boundary_xh, pair, gap_mh, pairs, heads, BLOCK=256)
    return gap_mh


@triton.jit(do_not_specialize=["pairs"])
def _subtract(boundary_ptr, pair_ptr, gap_ptr, pairs, H, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < pairs * H
    since = tl.load(pair_ptr + i // H * 2, mask=exists, other=0)
    until = tl.load(pair_ptr + i // H * 2 + 1, mask=exists, other=0)
    start = tl.load(boundary_ptr + since * H + i % H, mask=exists, other=0.0)
    end = tl.load(boundary_ptr + until * H + i % H, mask=exists, other=0.0)
    tl.store(gap_ptr + i, (end - start).to(tl.float32), mask=exists)


@triton.jit
def _sum_within_chunks(g_ptr, decay_ptr, row_token_ptr, row_slots_ptr, H, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    t = tl.arange(0, CHUNK)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    valid_th = valid_t[:, None] & (h < H)[None, :]
    g_th = tl.load(g_ptr + token * H + t[:, None] * H + h[None, :], mask=valid_th, other=0.0).to(tl.float32)
    decay_th = tl.cumsum(g_th, 0) * LOG2_E
    out_th = (row.to(tl.int64) * H + h[None, :]) * CHUNK + t[:, None]
    tl.store(decay_ptr + out_th, decay_th, mask=(h < H)[None, :] & (t >= 0)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _sum_over_chunks(decay_ptr, boundary_ptr, rows, H, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    total = tl.zeros([], tl.float64)
    tl.store(boundary_ptr + head, total)
    for first in range(0, rows, BLOCK):
        c = first + tl.arange(0, BLOCK)
        last_c = decay_ptr + (c.to(tl.int64) * H + head) * CHUNK + CHUNK - 1
        decay_c = tl.load(last_c, mask=c < rows, other=0.0).to(tl.float64)
        boundary_c = total + tl.cumsum(decay_c, 0)
        tl.store(boundary_ptr + (c.to(tl.int64) + 1) * H + head, boundary_c, mask=c < rows)
        total += tl.sum(decay_c, 0)


def slots_innermost(scales_thl: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Level scales as [C, H, L, T], so that the scales of one level lie side by side."""
    _, heads, levels = scales_thl.shape
    scales_chlt = scales_thl.new_empty(tables.rows, heads, levels, CHUNK)
    _to_slots_innermost[(tables.rows * heads,)](
        scales_thl, scales_chlt, tables.row_token, tables.row_slots, heads, levels,
        CHUNK=CHUNK, BLOCK=triton.next_power_of_2(levels),
    )  # fmt: skip
    return scales_chlt


@triton.jit
def _to_slots_innermost(
    scales_ptr, out_ptr, row_token_ptr, row_slots_ptr, H, L: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    t = tl.arange(0, CHUNK)
    level = tl.arange(0, BLOCK)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    exists_l = level < L
    scales_ptr += (token * H + head) * L
    in_tl = t[:, None] * H * L + level[None, :]
    scales_tl = tl.load(scales_ptr + in_tl, mask=valid_t[:, None] & exists_l[None, :], other=0.0)
    out_ptr += (row.to(tl.int64) * H + head) * L * CHUNK
    tl.store(
        out_ptr + level[:, None] * CHUNK + t[None, :], tl.trans(scales_tl), mask=exists_l[:, None] & (t >= 0)[None, :]
    )


def levels_innermost(dscales_chlt: torch.Tensor, tokens: int, tables: Tables) -> torch.Tensor:
    """Gradients of level scales as [tokens, H, L]; levels that a row does not read become zero."""
    _, heads, levels, _ = dscales_chlt.shape
    dscales_thl = dscales_chlt.new_empty(tokens, heads, levels)
    _to_levels_innermost[(tables.rows * heads,)](
        dscales_chlt, dscales_thl, tables.row_token, tables.row_slots, tables.row_levels, heads, levels,
        CHUNK=CHUNK, BLOCK=triton.next_power_of_2(levels), FIRST_READ_LEVEL=FIRST_READ_LEVEL,
    )  # fmt: skip
    return dscales_thl


@triton.jit
def _to_levels_innermost(
    dscales_ptr, out_ptr, row_token_ptr, row_slots_ptr, row_levels_ptr, H,
    L: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FIRST_READ_LEVEL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    t = tl.arange(0, CHUNK)
    level = tl.arange(0, BLOCK)
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    read_l = (tl.load(row_levels_ptr + row) >> level) & 1 == 1
    written_l = (level < L) & ((level < FIRST_READ_LEVEL) | read_l)
    dscales_ptr += (row.to(tl.int64) * H + head) * L * CHUNK
    in_lt = level[:, None] * CHUNK + t[None, :]
    dscales_lt = tl.load(dscales_ptr + in_lt, mask=written_l[:, None] & (t >= 0)[None, :], other=0.0)
    out_ptr += (token * H + head) * L
    tl.store(
        out_ptr + t[:, None] * H * L + level[None, :],
        tl.trans(dscales_lt),
        mask=valid_t[:, None] & (level < L)[None, :],
    )
