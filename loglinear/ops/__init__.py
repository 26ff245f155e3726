"""Log-linear attention: the mathematics, with nothing of models or ranks.

`log_linear_attention` is the op to use; `naive_log_linear_attention` is its definition, for tests;
`recurrent_step` is its decoding form.
"""

from loglinear.ops.attention import log_linear_attention
from loglinear.ops.chunk import chunk_log_linear_attention
from loglinear.ops.fenwick import num_levels
from loglinear.ops.naive import naive_log_linear_attention
from loglinear.ops.recurrent import recurrent_log_linear_attention, recurrent_step
from loglinear.ops.state import LogLinearState

__all__ = [
    "LogLinearState",
    "chunk_log_linear_attention",
    "log_linear_attention",
    "naive_log_linear_attention",
    "num_levels",
    "recurrent_log_linear_attention",
    "recurrent_step",
]
