"""The gradient of the log-decays, put together from four kinds of pairs of a query and a key around a token.

Both in the token's chunk: rows minus columns of a block. Only the query there: a sum over later queries. Only the key
there: a sum over earlier keys. Neither: later readers of the states that the token's row reads, and the halves to the
right in merges of states. Only the first kind subtracts, and that within one chunk and one fp32 matrix, so rounding
of the operands does not add up over a sequence.

Shapes: c chunk (row of the tables), t slot, h value head, m source (a run that is read), e height of a run,
b block of the value size, u block of slots.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel's constants and the options of its launch are not what the type checker takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loglinear.ops.triton.common import row_tokens
from loglinear.ops.triton.tables import CHUNK, Tables


def decay_gradients(
    ddecays_cht: list[torch.Tensor],
    dto_end_bcht: torch.Tensor,
    dreads_uech: torch.Tensor,
    spans_mh: torch.Tensor,
    dg_th: torch.Tensor,
    tables: Tables,
) -> None:
    """Fill in `dg_th` [tokens, H] from the sums that the other kernels left."""
    heads = dg_th.shape[1]
    block = min(16, triton.next_power_of_2(heads))
    blocks = triton.cdiv(heads, block)
    later_ech = torch.empty_like(dreads_uech[0])
    if len(tables.source):
        _later_readers[(len(tables.source), blocks)](
            dreads_uech, later_ech, tables.source, tables.rows, heads, dreads_uech.stride(0),
            PARTS=len(dreads_uech), BLOCK_ROWS=64, BLOCK=block,
        )  # fmt: skip
    _decay_gradients[(tables.rows, blocks)](
        *ddecays_cht, dto_end_bcht, later_ech, spans_mh, dg_th, tables.row_token, tables.row_slots,
        tables.read_start, tables.read, tables.rows, heads,
        PARTS=len(dto_end_bcht), CHUNK=CHUNK, BLOCK=block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "stride"])
def _later_readers(
    dreads_ptr, later_ptr, source_ptr, rows, H, stride,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For every row that reads a source: the sum over the rows after it that read the same one."""
    source_ptr += 7 * tl.program_id(0)
    first, end = tl.load(source_ptr + 4), tl.load(source_ptr + 5)
    height = tl.load(source_ptr + 6).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    later_h = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.cdiv(end - first, BLOCK_ROWS)):
        row_c = end - (block + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at_ch = (height * rows + row_c[:, None]) * H + h[None, :]
        valid_ch = (row_c >= first)[:, None] & (h < H)[None, :]
        next_ch = valid_ch & (row_c + 1 < end)[:, None]
        after_ch = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            after_ch += tl.load(dreads_ptr + part * stride + at_ch + H, mask=next_ch, other=0.0)
        sums_ch = tl.cumsum(after_ch, 0, reverse=True) + later_h[None, :]
        tl.store(later_ptr + at_ch, sums_ch, mask=valid_ch)
        later_h += tl.sum(after_ch, 0)


@triton.jit(do_not_specialize=["rows"])
def _decay_gradients(
    reads_ptr, diagonal_ptr, second_half_ptr, dto_end_ptr, later_ptr, spans_ptr, dg_ptr,
    row_token_ptr, row_slots_ptr, read_start_ptr, read_ptr, rows, H,
    PARTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    t = tl.arange(0, CHUNK)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists_h = h < H
    exists_th = (t >= 0)[:, None] & exists_h[None, :]
    around_h = tl.zeros([BLOCK], tl.float32)
    for read in range(tl.load(read_start_ptr + row), tl.load(read_start_ptr + row + 1)):
        height, source = tl.load(read_ptr + 4 * read + 2), tl.load(read_ptr + 4 * read + 3)
        later_at = (height.to(tl.int64) * rows + row) * H + h
        around_h += tl.load(later_ptr + later_at, mask=exists_h, other=0.0)
        around_h += tl.load(spans_ptr + source * H + h, mask=exists_h, other=0.0)
    at_th = (row.to(tl.int64) * H + h[None, :]) * CHUNK + t[:, None]
    queries_th = tl.load(reads_ptr + at_th, mask=exists_th, other=0.0)
    queries_th += tl.load(diagonal_ptr + at_th, mask=exists_th, other=0.0)
    queries_th += tl.load(second_half_ptr + at_th, mask=exists_th, other=0.0)
    before_th = exists_th & (t > 0)[:, None]
    keys_th = tl.zeros([CHUNK, BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        part_at = dto_end_ptr + (part * rows + row).to(tl.int64) * H * CHUNK + h[None, :] * CHUNK + t[:, None] - 1
        keys_th += tl.load(part_at, mask=before_th, other=0.0)
    dg_th = tl.cumsum(queries_th, 0, reverse=True) + tl.cumsum(keys_th, 0) + around_h[None, :]
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    dg_at = t[:, None] * H + h[None, :]
    tl.store(dg_ptr + token * H + dg_at, dg_th.to(dg_ptr.dtype.element_ty), mask=valid_t[:, None] & exists_h[None, :])
