"""Sizes of a call, and the block shapes that follow from them. Fixed, so that all ranks agree and nothing is tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STATE_SIZES = (16, 32, 64, 128, 256)  # of keys
LARGEST_FP32_STATE = 128  # larger ones fill more than the shared memory of a multiprocessor
VALUE_SIZES = (16, 32, 64, 128, 256)
LEAST_VALUE = 64  # smaller ones are padded: Triton 3.6 multiplies narrower tiles wrongly on Hopper
ENOUGH_PROGRAMS = 500  # several for each multiprocessor of a large GPU


def fits(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether tiles of q [..., N] (or k) and v [..., P] are known to work in v's dtype; fp16 is computed as fp32."""
    largest = max(STATE_SIZES) if v.dtype == torch.bfloat16 else LARGEST_FP32_STATE
    return q.shape[-1] in STATE_SIZES and q.shape[-1] <= largest and v.shape[-1] in VALUE_SIZES


@dataclass(frozen=True)
class Sizes:
    """Heads, groups, state (key) and value sizes of a call."""

    heads: int
    groups: int
    state: int
    value: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q_tgn: torch.Tensor, v_thp: torch.Tensor) -> Sizes:
        """The sizes of a call with queries or keys [T, G, N] and values or outputs [T, H, P]."""
        return cls(v_thp.shape[1], q_tgn.shape[1], q_tgn.shape[2], v_thp.shape[2], v_thp.dtype)

    @property
    def per_group(self) -> int:
        """Value heads that share a query and a key."""
        return self.heads // self.groups

    @property
    def flat(self) -> int:
        """Numbers in a state."""
        return self.state * self.value

    @property
    def flat_block(self) -> int:
        """Numbers of a state that a program handles at once."""
        return min(self.flat, 2048)

    @property
    def precision(self) -> str:
        """How fp32 products run on tensor cores; three tf32 products keep fp32's accuracy."""
        return "tf32x3" if self.dtype == torch.float32 else "tf32"

    @property
    def roomy(self) -> bool:
        """Whether tiles are small enough for shared memory to hold those of several steps ahead."""
        return self.dtype.itemsize == 2 and max(self.state, self.value) <= 128

    def stages(self, most: int) -> int:
        """How many steps ahead a loop loads."""
        return most if self.roomy else 1

    def value_block(self, most: int) -> int:
        """Numbers of a value that a program handles at once."""
        return min(self.value, most if self.dtype.itemsize == 2 else most // 2)

    def heads_at_once(self, rows: int, limit: int) -> int:
        """Heads of a group that one program handles, a power of two, so that there are enough programs."""
        fitting = [1 << n for n in range(limit.bit_length()) if self.per_group % (1 << n) == 0]
        busy = [n for n in fitting if rows * self.heads // n >= ENOUGH_PROGRAMS]
        return max(busy, default=1)
