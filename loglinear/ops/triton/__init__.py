"""Log-linear attention in Triton."""

from loglinear.ops.triton.op import supports, triton_log_linear_attention

__all__ = ["supports", "triton_log_linear_attention"]
