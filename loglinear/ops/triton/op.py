"""The op on a GPU: the kernels in order, as two custom operators that torch.compile and checkpointing can see.

Shapes: b batch, t time (all sequences, one after the other), h value head, g query/key group, n state (key) size,
p value head size, l level, c chunk (row of the tables), x run, s sequence, k bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from loglinear.ops.checks import Sequences, check_inputs
from loglinear.ops.device import without_autocast
from loglinear.ops.edges import read_initial_state, state_after
from loglinear.ops.plan import plan_counts
from loglinear.ops.state import LogLinearState
from loglinear.ops.triton.config import LEAST_VALUE, Sizes, fits
from loglinear.ops.triton.decay_backward import decay_gradients
from loglinear.ops.triton.intra_backward import intra_gradients
from loglinear.ops.triton.keys import key_gradients
from loglinear.ops.triton.operator import operator
from loglinear.ops.triton.output import outputs
from loglinear.ops.triton.prepare import Decays, levels_innermost, slots_innermost, sum_decays
from loglinear.ops.triton.queries import query_gradients
from loglinear.ops.triton.states import run_states
from loglinear.ops.triton.tables import CHUNK, make_tables
from loglinear.ops.triton.tree_backward import bring_down, piece_gradients

Tensor = torch.Tensor


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels are known to work for the sizes and the dtype of q [B, T, G, N] and v [B, T, H, P]."""
    return v.dtype in (torch.bfloat16, torch.float16, torch.float32) and fits(q, v)


def triton_log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: LogLinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LogLinearState | None]:
    """The kernels. Arguments, result and errors are those of `loglinear.ops.log_linear_attention`.

    Sizes and dtypes must be such that `supports(q, v)`. bf16 inputs are multiplied as they are and summed in fp32,
    fp16 ones are computed as fp32, which has the range that long sums need.

    Source: arXiv 2506.04761, in a form that is parallel over chunks.
    """
    sequences = check_inputs(q, k, v, g, level_scales, initial_state, cu_seqlens)
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    q_tgn, k_tgn, v_thp = (x.to(dtype).flatten(0, 1).contiguous() for x in (q, k, v))
    g_th = g.float().flatten(0, 1).contiguous()
    scales_thl = None if level_scales is None else level_scales.flatten(0, 1).contiguous()
    lengths, starts = list(sequences.lengths), list(sequences.starts)
    values = v.shape[3]
    padded_thp = v_thp if values >= LEAST_VALUE else F.pad(v_thp, (0, LEAST_VALUE - values))
    o_thp = _forward(q_tgn, k_tgn, padded_thp, g_th, scales_thl, lengths, starts, scale)[0][..., :values]
    with without_autocast(v.device):
        if initial_state is not None:
            o_thp = read_initial_state(o_thp, q_tgn, g_th, scales_thl, scale, initial_state, sequences)
        state = None
        if output_final_state:  # in fp32, because decoding adds to it for as long as the sequence goes on
            state = state_after(k_tgn.float(), v_thp.float(), g_th, initial_state, sequences)
    return o_thp.reshape(v.shape).to(v.dtype), state


@operator("loglinear::forward")
def _forward(
    q_tgn: Tensor,
    k_tgn: Tensor,
    v_thp: Tensor,
    g_th: Tensor,
    scales_thl: Tensor | None,
    lengths: Sequence[int],
    starts: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, and what backward reads again: states of runs, level scales (empty without), the fields of `Decays`."""
    tables = make_tables(Sequences(tuple(lengths), tuple(starts)), v_thp.device)
    sizes = Sizes.of(q_tgn, v_thp)
    decays = sum_decays(g_th, tables)
    scales_chlt = None if scales_thl is None else slots_innermost(scales_thl, tables)
    states_xhnp = run_states(k_tgn, v_thp, decays, tables, sizes)
    o_thp = outputs(q_tgn, k_tgn, v_thp, scales_chlt, decays, states_xhnp, scale, tables, sizes)
    scales_or_empty = g_th.new_empty(0) if scales_chlt is None else scales_chlt
    return o_thp, states_xhnp, scales_or_empty, decays.slot_cht, decays.boundary_xh, decays.state_xh, decays.read_mh


@_forward.register_fake
def _(q_tgn, k_tgn, v_thp, g_th, scales_thl, lengths, starts, scale):
    counts = plan_counts(Sequences(tuple(map(int, lengths)), tuple(map(int, starts))), CHUNK)
    heads, value = v_thp.shape[1:]
    scales = (0,) if scales_thl is None else (counts.rows, heads, scales_thl.shape[2], CHUNK)
    return (
        torch.empty_like(v_thp),
        v_thp.new_empty(counts.runs - counts.pairs, heads, q_tgn.shape[2], value),
        (g_th if scales_thl is None else scales_thl).new_empty(scales),
        g_th.new_empty(counts.rows, heads, CHUNK),
        g_th.new_empty(counts.rows + 1, heads, dtype=torch.float64),
        g_th.new_empty(counts.runs - counts.pairs, heads),
        g_th.new_empty(counts.reads + 1, heads),
    )


@operator("loglinear::backward")
def _backward(
    do_thp: Tensor,
    q_tgn: Tensor,
    k_tgn: Tensor,
    v_thp: Tensor,
    states_xhnp: Tensor,
    scales_chlt: Tensor,
    decay_cht: Tensor,
    boundary_xh: Tensor,
    state_decay_xh: Tensor,
    read_decay_mh: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and level scales (empty without)."""
    tables = make_tables(Sequences(tuple(lengths), tuple(starts)), v_thp.device)
    sizes = Sizes.of(q_tgn, v_thp)
    decays = Decays(decay_cht, boundary_xh, state_decay_xh, read_decay_mh)
    scales = scales_chlt if len(scales_chlt) else None
    dpieces_yhnp = piece_gradients(q_tgn, do_thp, scales, decays, scale, tables, sizes)
    spans_mh = bring_down(dpieces_yhnp, states_xhnp, decays, tables, sizes)
    dv_thp = torch.empty_like(v_thp)
    dk_wtgn, dto_end_bcht = key_gradients(k_tgn, v_thp, decays, dpieces_yhnp, dv_thp, tables, sizes)
    del dpieces_yhnp
    dscales_chlt = None if scales is None else torch.empty_like(scales_chlt)
    dq_wtgn, dreads_cht, dreads_uech = query_gradients(
        q_tgn, do_thp, scales, decays, states_xhnp, dscales_chlt, scale, tables, sizes
    )
    dintra_cht = intra_gradients(
        q_tgn, k_tgn, v_thp, do_thp, scales, decay_cht, dq_wtgn, dk_wtgn, dv_thp, dscales_chlt, scale,
        tables, sizes,
    )  # fmt: skip
    dg_th = decay_cht.new_empty(v_thp.shape[:2])
    decay_gradients([dreads_cht, *dintra_cht], dto_end_bcht, dreads_uech, spans_mh, dg_th, tables)
    dscales_thl = dg_th.new_empty(0)
    if dscales_chlt is not None:
        dscales_thl = levels_innermost(dscales_chlt, len(v_thp), tables)
    dq_tgn, dk_tgn = (_sum(parts_wtgn).to(q_tgn.dtype) for parts_wtgn in (dq_wtgn, dk_wtgn))
    return dq_tgn, dk_tgn, dv_thp, dg_th, dscales_thl


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


@_backward.register_fake
def _(do_thp, q_tgn, k_tgn, v_thp, states_xhnp, scales_chlt, decay_cht, *_):
    scales = (*v_thp.shape[:2], scales_chlt.shape[2]) if scales_chlt.ndim == 4 else (0,)
    dg_th = decay_cht.new_empty(v_thp.shape[:2])
    return (*map(torch.empty_like, (q_tgn, k_tgn, v_thp)), dg_th, scales_chlt.new_empty(scales))


def _setup_context(ctx, inputs, output) -> None:
    q_tgn, k_tgn, v_thp, _, scales_thl, ctx.lengths, ctx.starts, ctx.scale = inputs
    ctx.scaled = scales_thl is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q_tgn, k_tgn, v_thp, *output[1:])


def _autograd(ctx, do_thp, *_):
    dq, dk, dv, dg, dscales = _backward(do_thp.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.starts, ctx.scale)
    return dq, dk, dv, dg, dscales if ctx.scaled else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
