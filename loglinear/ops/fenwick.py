"""Levels of the Fenwick partition: which bucket of the past a query reads a key from.

Integer arithmetic only, because a floating-point log2 is wrong at some powers of two.
Source: log-linear attention, arXiv 2506.04761.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.ndarray)


def num_levels(length: int) -> int:
    """The number of levels that a sequence of `length` tokens needs: ceil(log2 length) + 1.

    Args:
        length: tokens in the sequence, counted from its very start; at least 1.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"a sequence needs at least one token, got length {length}")
    return (length - 1).bit_length() + 1


def level(t: int, s: int) -> int:
    """The level at which query position `t` sees key position `s` (0-based, s <= t).

    Level 0 is the token itself; level l >= 1 holds the positions [(t >> l) << l, + 2^(l-1)) when bit l-1 of t
    is set, and is empty otherwise.

    Raises:
        ValueError: `s` lies after `t` or before the sequence.
    """
    if not 0 <= s <= t:
        raise ValueError(f"a key position must lie in 0..t, got s = {s} for t = {t}")
    return (t ^ s).bit_length()


def bit_length(x: np.ndarray) -> np.ndarray:
    """Bit length of every element of a non-negative int64 array, as int64 of the same shape."""
    remaining = x.astype(np.int64)
    bits = np.zeros_like(remaining)
    for width in (32, 16, 8, 4, 2, 1):
        large = (remaining >> width) > 0
        bits += large * width
        remaining = np.where(large, remaining >> width, remaining)
    return bits + (remaining > 0)


def level_table(size: int) -> np.ndarray:
    """Levels of all pairs among `size` positions: int64 [size, size], row t, column s, and -1 where s > t."""
    position = np.arange(size, dtype=np.int64)
    table = bit_length(position[:, None] ^ position[None, :])
    return np.where(position[:, None] >= position[None, :], table, -1)


def bucket_start(position: Integers, bucket: Integers) -> Integers:
    """First position of the bucket of 2^bucket tokens that a query at `position` reads (bit `bucket` is set)."""
    return (position >> (bucket + 1)) << (bucket + 1)


def buckets_at(position: int, since: int = 0) -> list[int]:
    """The buckets that hold tokens after `position` tokens, those alone that hold one from position `since` on."""
    occupied = (bucket for bucket in range(position.bit_length()) if position >> bucket & 1)
    return [bucket for bucket in occupied if bucket_start(position, bucket) + (1 << bucket) > since]


def set_bits(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The set bits below `bits` of all elements of an int64 vector: their bit and the index of their element.

    For the number of tokens that a state has seen these are the state's occupied buckets.
    """
    bit, element = np.nonzero(values >> np.arange(bits)[:, None] & 1)
    return bit, element
