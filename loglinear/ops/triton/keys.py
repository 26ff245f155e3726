"""Gradients of a chunk's state with respect to its keys, values and decays.

Shapes: c chunk (row of the tables), t slot, h value head, g query/key group, n state (key) size, p value head size,
y piece, w part of a sum over heads, b block of the value size.
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


def key_gradients(
    k_tgn: torch.Tensor,
    v_thp: torch.Tensor,
    decays: Decays,
    dpieces_yhnp: torch.Tensor,
    dv_thp: torch.Tensor,
    tables: Tables,
    sizes: Sizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the states of the chunks add to the gradients; writes `dv_thp`.

    Returns:
        dk_wtgn, parts of dk, fp32.
        ddecay_bcht, how the loss depends on the decay from each key's end to the chunk's end, in parts.
    """
    block_p = sizes.value_block(64)
    blocks = sizes.value // block_p
    at_once = sizes.heads_at_once(tables.rows, 32)
    parts = sizes.per_group // at_once * blocks
    dk_wtgn = k_tgn.new_empty(parts, *k_tgn.shape, dtype=torch.float32)
    ddecay_bcht = decays.slot_cht.new_empty(blocks, *decays.slot_cht.shape)
    _key_gradients[(tables.rows, sizes.heads // at_once, blocks)](
        k_tgn, v_thp, decays.slot_cht, dpieces_yhnp, dk_wtgn, dv_thp, ddecay_bcht,
        tables.row_token, tables.row_slots, tables.row_gradient, len(k_tgn), tables.rows,
        H=sizes.heads, R=sizes.per_group, N=sizes.state, P=sizes.value, CHUNK=CHUNK,
        BLOCK_P=block_p, AT_ONCE=at_once, PRECISION=sizes.precision, num_warps=8, num_stages=sizes.stages(3),
    )  # fmt: skip
    return dk_wtgn, ddecay_bcht


@triton.jit(do_not_specialize=["tokens", "rows"])
def _key_gradients(
    k_ptr, v_ptr, decay_ptr, dpieces_ptr, dk_ptr, dv_ptr, ddecay_ptr,
    row_token_ptr, row_slots_ptr, row_gradient_ptr, tokens, rows,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(2)
    first_head = tl.program_id(1) * AT_ONCE
    t, n = tl.arange(0, CHUNK), tl.arange(0, N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    groups: tl.constexpr = H // R
    token, valid_t = row_tokens(row_token_ptr, row_slots_ptr, row, t)
    to_group = (token * groups + first_head // R) * N
    k_at = t[:, None] * (groups * N) + n[None, :]
    v_at = t[:, None] * (H * P) + p[None, :]
    k_tn = tl.load(k_ptr + to_group + k_at, mask=valid_t[:, None], other=0.0)
    gradient = tl.load(row_gradient_ptr + row).to(tl.int64)
    f_np = n[:, None] * P + p[None, :]
    dk_tn = tl.zeros([CHUNK, N], tl.float32)
    for head in range(first_head, first_head + AT_ONCE):
        of_row = row.to(tl.int64) * H + head
        dstate_ptr = dpieces_ptr + (gradient * H + head) * N * P
        dstate_np = tl.load(dstate_ptr + f_np, mask=gradient + 0 * f_np >= 0, other=0.0)
        to_head = (token * H + head) * P
        v_tp = tl.load(v_ptr + to_head + v_at, mask=valid_t[:, None], other=0.0)
        at_row = decay_ptr + of_row * CHUNK
        to_end_t = tl.exp2(tl.load(at_row + CHUNK - 1) - tl.load(at_row + t))
        dv_tp = to_end_t[:, None] * tl.dot(k_tn, dstate_np, input_precision=PRECISION)
        tl.store(dv_ptr + to_head + v_at, dv_tp.to(v_tp.dtype), mask=valid_t[:, None])
        ddecay_at = (block.to(tl.int64) * rows * H + of_row) * CHUNK + t
        tl.store(ddecay_ptr + ddecay_at, tl.sum(dv_tp * v_tp.to(tl.float32), 1))
        weighted_tp = (v_tp * to_end_t[:, None]).to(v_tp.dtype)
        dk_tn = tl.dot(weighted_tp, tl.trans(dstate_np), dk_tn, input_precision=PRECISION)
    part = (tl.program_id(1) % (R // AT_ONCE)) * (P // BLOCK_P) + block
    dk_ptr += part.to(tl.int64) * tokens * groups * N + to_group
    tl.store(dk_ptr + k_at, dk_tn, mask=valid_t[:, None])
