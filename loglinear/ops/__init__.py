"""Log-linear attention: the mathematics, with nothing of models or ranks.

`log_linear_attention` is the op to use; `naive_log_linear_attention` is its definition, for tests;
`recurrent_step` is its decoding form.
"""

from loglinear.ops.attention import log_linear_attention
from loglinear.ops.chunk import chunk_log_linear_attention
from loglinear.ops.edges import final_state
from loglinear.ops.fenwick import num_levels
from loglinear.ops.naive import naive_log_linear_attention
from loglinear.ops.recurrent import recurrent_log_linear_attention, recurrent_step, recurrent_step_in_place
from loglinear.ops.state import LogLinearState, StateInPlace

__all__ = [
    "LogLinearState",
    "StateInPlace",
    "chunk_log_linear_attention",
    "final_state",
    "log_linear_attention",
    "naive_log_linear_attention",
    "num_levels",
    "recurrent_log_linear_attention",
    "recurrent_step",
    "recurrent_step_in_place",
]
