"""What log-linear attention remembers of a sequence: one matrix per occupied bucket.

Shapes: s sequence, h value head, k bucket, n state (key) size, p value head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogLinearState:
    """The buckets of the binary counter after `positions` tokens, O(log T) matrices per head.

    Attributes:
        buckets: [S, H, K, N, P]; bucket b holds 2^b tokens, sum of exp(G_last - G_s) k_s v_s^T, decayed to the
            last token seen; it is occupied iff bit b of the sequence's position is set, and exactly zero otherwise.
        positions: int64 [S], tokens seen by each sequence. On the host, because they decide shapes.

    Source: arXiv 2506.04761, section on decoding.
    """

    buckets: torch.Tensor
    positions: torch.Tensor

    @staticmethod
    def empty(
        sequences: int,
        heads: int,
        state_dim: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LogLinearState:
        """The state before the first token: no bucket at all, K = 0."""
        buckets = torch.zeros(sequences, heads, 0, state_dim, head_dim, dtype=dtype, device=device)
        return LogLinearState(buckets, torch.zeros(sequences, dtype=torch.int64))

    def __getitem__(self, sequences: slice) -> LogLinearState:
        """The states of a range of sequences."""
        return LogLinearState(self.buckets[sequences], self.positions[sequences])

    def with_buckets(self, count: int) -> LogLinearState:
        """The same state with room for at least `count` buckets; new ones are empty."""
        missing = count - self.buckets.shape[2]
        if missing <= 0:
            return self
        padded = torch.nn.functional.pad(self.buckets, (0, 0, 0, 0, 0, missing))
        return LogLinearState(padded, self.positions)

    @staticmethod
    def concatenate(states: list[LogLinearState]) -> LogLinearState:
        """States of consecutive ranges of sequences as one, with as many buckets as the largest has."""
        count = max(state.buckets.shape[2] for state in states)
        padded = [state.with_buckets(count) for state in states]
        return LogLinearState(
            torch.cat([state.buckets for state in padded]), torch.cat([state.positions for state in padded])
        )


@dataclass(frozen=True)
class StateInPlace:
    """What decoding steps overwrite instead of making anew, so that a CUDA graph can hold one.

    A bucket is written when it is filled and then left alone: reading it decays it by what came since. So a step reads
    every occupied bucket and writes one.

    Attributes:
        buckets: fp32 [S, H, K, N, P], decayed to when each was filled, with room for every token to come: nobody checks
            that. Those that are not occupied hold anything.
        sums_shk: fp64 [S, H, K], the sum of log-decays when each was filled.
        sums_sh: fp64 [S, H], that sum now; whoever calls adds to it.
        positions: int64 [S] on the same device; whoever calls counts on.
    """

    buckets: torch.Tensor
    sums_shk: torch.Tensor
    sums_sh: torch.Tensor
    positions: torch.Tensor

    @staticmethod
    def copy_of(state: LogLinearState, positions: torch.Tensor) -> StateInPlace:
        """What `state` holds, in memory of its own; `positions` [S] are its own, where the buckets are."""
        sums_shk = state.buckets.new_zeros(state.buckets.shape[:3], dtype=torch.float64)
        return StateInPlace(state.buckets.clone(), sums_shk, sums_shk.new_zeros(sums_shk.shape[:2]), positions)

    def as_state(self, positions: torch.Tensor) -> LogLinearState:
        """The same as a state of its own; `positions` [S] are these on the host."""
        decay_shk = (self.sums_sh[..., None] - self.sums_shk).exp()
        occupied_sk = occupied_buckets(self.positions, decay_shk.shape[2])
        decayed_shknp = self.buckets * decay_shk.to(self.buckets.dtype)[..., None, None]
        return LogLinearState(decayed_shknp.where(occupied_sk[:, None, :, None, None], 0.0), positions)


def occupied_buckets(positions_s: torch.Tensor, count: int) -> torch.Tensor:
    """Which of `count` buckets hold tokens after `positions_s` [S] tokens, their bits: bool [S, count]."""
    return (positions_s[:, None] >> torch.arange(count, device=positions_s.device)) & 1 == 1
