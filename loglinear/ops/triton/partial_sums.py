"""How a sum over all tokens is split: each program adds up its own tokens, and the programs' sums are added in order.

So two runs give equal bits, and what is written between is small. A program's sums for all weights of a kernel lie in
one row, one weight after the other: one launch adds the rows up, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEAST_STEPS = 8
ALIGNED = 16  # the multiple that Triton looks for in the arguments of a kernel


def steps_of_a_program(rows: int, block: int, most_programs: int) -> tuple[int, int]:
    """How many blocks of rows a program adds up, and the number of programs, at most `most_programs`."""
    blocks = -(-rows // block)
    steps = max(LEAST_STEPS, -(-blocks // most_programs))
    return steps, -(-blocks // steps)


def empty_sums(weights: Sequence[torch.Tensor], *programs: int) -> torch.Tensor:
    """Room for the gradients of all weights as a kernel sums them: fp32 [*programs, numbers of all weights].

    Rows begin at multiples of `ALIGNED`, so that a kernel which is told their stride stores several numbers at once.
    """
    numbers = sum(weight.numel() for weight in weights)
    stride = -(-numbers // ALIGNED) * ALIGNED
    return weights[0].new_empty(*programs, stride, dtype=torch.float32)[..., :numbers]


def gradients(sums: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Cut the sums over all programs into each weight's gradient, of its shape and dtype.

    They share memory, as outputs of a custom operator may not: an operator returns `sums`, its autograd formula cuts.

    Args:
        sums: fp32 [numbers of all weights], contiguous.
        weights: in the order of their sums.
    """
    sizes = [weight.numel() for weight in weights]
    dtypes = dict.fromkeys(weight.dtype for weight in weights)  # nearly always one: a single cast
    cut = {dtype: sums.to(dtype).split(sizes) for dtype in dtypes}
    return tuple(cut[weight.dtype][n].view(weight.shape) for n, weight in enumerate(weights))
