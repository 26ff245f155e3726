"""What things cost: floating-point operations of matrix products, two per multiply-add."""

from __future__ import annotations

from torch import nn

from loglinear.ops.chunk import CHUNK


def linear_flops(layer: nn.Linear) -> int:
    """Forward FLOPs of a linear layer for a token."""
    return 2 * layer.in_features * layer.out_features


def attention_flops(seq_len: int, heads: int, groups: int, state_dim: int, head_dim: int) -> int:
    """Forward FLOPs of log-linear attention for a token, averaged over a document of `seq_len` tokens.

    The causal half of the chunk's own block, the chunk's state, and the states that the chunk reads.
    """
    chunk = min(CHUNK, seq_len)
    chunks = -(-seq_len // chunk)
    states_read = sum(c.bit_count() for c in range(chunks)) / chunks
    within = chunk * (groups * state_dim + heads * head_dim)
    return round(within + 2 * heads * state_dim * head_dim * (1 + states_read))
