"""The public op.

Shapes: b batch, t time, h value head, g query/key group, n state (key) size, p value head size, l level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loglinear.ops.chunk import chunk_log_linear_attention
from loglinear.ops.device import has_kernels
from loglinear.ops.state import LogLinearState


def log_linear_attention(
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
) -> tuple[torch.Tensor, LogLinearState | None]:
    """Log-linear attention: every query reads O(log T) buckets of its past, each with a scale of its own.

    o_t = sum over levels l of level_scales[t, l] * scale * q_t^T S[t, l], where S[t, l] is the sum over the
    tokens s of t's bucket at level l of exp(g_{s+1} + ... + g_t) k_s v_s^T. Positions count from the start of
    the sequence, the tokens behind `initial_state` included.

    Args:
        q, k: queries and keys [B, T, G, N]; group i serves the heads [i H / G, (i + 1) H / G).
        v: values [B, T, H, P], with q's dtype.
        g: log-decay [B, T, H], at most 0, in nats per token.
        level_scales: lambda [B, T, H, L] with L >= `num_levels` of the longest sequence; None means all ones,
            which is linear attention with a scalar gate (Mamba-2).
        scale: multiplies q.
        initial_state: what the B sequences (or, with `cu_seqlens`, the documents) have seen before.
        output_final_state: also return what they have seen after the last token.
        cu_seqlens: int32 or int64 [documents + 1] on the CPU, boundaries of documents packed into one row (then
            B = 1), each with a state of its own.

    Returns:
        o [B, T, H, P] in v's dtype, and the final state (fp32, or fp64 if an input is) or None.

    Raises:
        UserError: shapes, dtypes, devices, levels or boundaries do not fit together; the message names which.

    Source: arXiv 2506.04761; adaptive `level_scales`: arXiv 2605.06946.
    """
    return _form(q, v)(
        q,
        k,
        v,
        g,
        level_scales,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def _form(q_btgn: torch.Tensor, v_bthp: torch.Tensor) -> Callable[..., tuple[torch.Tensor, LogLinearState | None]]:
    """The kernels where they run, else the form in PyTorch; Triton is imported only where there is a GPU."""
    if has_kernels(v_bthp):
        from loglinear.ops.triton import supports, triton_log_linear_attention

        if supports(q_btgn, v_bthp):
            return triton_log_linear_attention
    return chunk_log_linear_attention
