"""The order of samples within a source: a pure function of the seed and of a sample's number.

The stream of a source is cut into windows of `window` samples, and samples are shuffled inside their window. In
the first pass (epoch 0) the windows come in stream order, so training may begin while later shards are still
being made, and sees the same order as if it had waited; that is why the files of a folder are shuffled before
(see `iterate_documents`). In later passes the full windows are shuffled too.

Every shuffle is computed, place by place, and none is stored: any sample is found in constant time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

ROUNDS = 6  # of the Feistel network; from four on it is a pseudorandom permutation if its rounds are functions so
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SampleOrder:
    """Which of a stream's samples is trained on when, for endless passes over it."""

    seed: int
    window: int

    def needed(self, number: int) -> int:
        """How many samples the stream must have for number `number` to be known before its end is."""
        return (number // self.window + 1) * self.window

    def locate(self, number: int, total: int) -> int:
        """The index in the stream of the `number`-th training sample, counted from 0 through all passes.

        `total` is the number of samples in the stream; while that is unknown, any number from
        `needed(number)` up to it gives the same answer.
        """
        epoch, place = divmod(number, total)
        window, offset = divmod(place, self.window)
        full_windows = total // self.window
        if epoch and window < full_windows:  # a shorter last window stays last
            window = shuffled(window, full_windows, f"{self.seed} {epoch}")
        size = min(self.window, total - window * self.window)
        return window * self.window + shuffled(offset, size, f"{self.seed} {epoch} {window}")


def shuffled(place: int, size: int, key: str) -> int:
    """Where `place` goes in the permutation of range(size) that belongs to `key`.

    A Feistel network permutes the numbers of an even count of bits; one that falls outside of range(size) is
    permuted again until it falls inside, which takes four turns at most on average.
    """
    half = ((size - 1).bit_length() + 1) // 2
    keys = list(_round_keys(key))
    while True:
        place = _feistel(place, half, keys)
        if place < size:
            return place


def _round_keys(key: str) -> Iterator[int]:
    digest = blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return (int.from_bytes(digest[i : i + 8], "big") for i in range(0, len(digest), 8))


def _feistel(place: int, half: int, keys: list[int]) -> int:
    """A bijection of the numbers of 2 `half` bits."""
    low_bits = (1 << half) - 1
    left, right = place >> half, place & low_bits
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low_bits)
    return left << half | right


def _mix(word: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of 64 depends on every other."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31
