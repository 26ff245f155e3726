"""Log-linear attention in chunks: O(T log T), a few large matrix products, differentiable.

The form is parallel over chunks: every chunk's own block, every chunk's state, a binary tree of sums over runs of
chunks, then for every chunk the runs that it reads. This is the path that trains on a CPU.
"""

from __future__ import annotations

import torch

from loglinear.errors import UserError
from loglinear.ops.checks import check_inputs
from loglinear.ops.device import without_autocast
from loglinear.ops.edges import read_initial_state, state_after
from loglinear.ops.inter import add_reads, run_states
from loglinear.ops.intra import intra
from loglinear.ops.layout import to_chunks, to_tokens
from loglinear.ops.plan import make_plan
from loglinear.ops.state import LogLinearState

CHUNK = 64


def chunk_log_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    level_scales: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: LogLinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, LogLinearState | None]:
    """The chunked form. Arguments, result and errors are those of `loglinear.ops.log_linear_attention`.

    Args:
        chunk: tokens in a chunk, a power of two; it changes the cost, and the result by rounding alone.

    Source: arXiv 2506.04761, in a form that is parallel over chunks.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise UserError(f"chunk is {chunk}, but must be a power of two, because chunks are buckets of tokens")
    sequences = check_inputs(q, k, v, g, level_scales, initial_state, cu_seqlens)
    plan = make_plan(sequences, chunk, v.device)
    with without_autocast(v.device):
        chunks = to_chunks(plan, chunk, q, k, v, g, level_scales, scale)
        o_thp = to_tokens(plan, add_reads(intra(chunks), chunks, plan.reads, run_states(chunks, plan.merges)))
        state = None
        if initial_state is not None:
            q_tgn, g_th = (x.to(o_thp.dtype).flatten(0, 1) for x in (q, g))
            scales_thl = None if level_scales is None else level_scales.flatten(0, 1)
            o_thp = read_initial_state(o_thp, q_tgn, g_th, scales_thl, scale, initial_state, sequences)
        if output_final_state:
            k_tgn, v_thp, g_th = (x.to(o_thp.dtype).flatten(0, 1) for x in (k, v, g))
            state = state_after(k_tgn, v_thp, g_th, initial_state, sequences)
    return o_thp.view(v.shape).to(v.dtype), state
