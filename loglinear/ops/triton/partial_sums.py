"""How a sum over all tokens is split: each program adds up its own tokens, and the programs' sums are added in order.

So two runs give equal bits, and what is written between is small.
"""

from __future__ import annotations

LEAST_STEPS = 8


def steps_of_a_program(rows: int, block: int, most_programs: int) -> tuple[int, int]:
    """How many blocks of rows a program adds up, and the number of programs, at most `most_programs`."""
    blocks = -(-rows // block)
    steps = max(LEAST_STEPS, -(-blocks // most_programs))
    return steps, -(-blocks // steps)
