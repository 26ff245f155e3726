"""Multi-query associative recall: pairs of a key and a value, then some keys again, whose values are due.

Shapes: e example, t time, n pair.
"""

from __future__ import annotations

import numpy as np

from loglinear.errors import UserError
from loglinear.experiments.examples import Cell, Examples, distinct, weighted_distinct

POWER = 0.01  # Zoology's a: how strongly queries crowd towards the pairs


def spread_recall(cell: Cell, vocab_size: int, rng: np.random.Generator) -> Examples:
    """MQAR as Zoology makes it (arXiv 2312.04927): queries spread over random tokens, crowding near the pairs.

    `cell.items` = N pairs take the first 2 N tokens, keys from 1 .. V/2 - 1 and values from V/2 .. V - 1, each
    different. The rest has (T - 2 N) // 2 gaps of two tokens; gap i = 1, 2, ... is taken with probability in
    proportion to i^(a - 1), a = 0.01, without replacement. The query stands first in its gap, and its value is due
    there. All other tokens are random.

    Raises:
        UserError: the vocabulary or the length is too small for so many pairs.
    """
    length, pairs, examples = cell
    space = (length - 2 * pairs) // 2
    if space < pairs:
        raise UserError(f"{pairs} pairs need {4 * pairs} tokens, but a row has {length}: take fewer pairs")
    keys_en, values_en = _pairs(cell, vocab_size, rng)
    gap_weights = np.arange(1, space + 1) ** (POWER - 1)
    positions_en = 2 * pairs + 2 * weighted_distinct(rng, gap_weights, examples, pairs)
    tokens_et = rng.integers(vocab_size, size=(examples, length))
    _show(tokens_et, keys_en, values_en)
    np.put_along_axis(tokens_et, positions_en, keys_en, 1)
    return Examples.of(tokens_et, positions_en, values_en)


def contiguous_recall(cell: Cell, vocab_size: int, rng: np.random.Generator) -> Examples:
    """The easier form: pairs first, all keys in another order at the end, and token 0 in between.

    Raises:
        UserError: the vocabulary or the length is too small for so many pairs.
    """
    length, pairs, examples = cell
    if 3 * pairs > length:
        raise UserError(f"{pairs} pairs need {3 * pairs} tokens, but a row has {length}: take fewer pairs")
    keys_en, values_en = _pairs(cell, vocab_size, rng)
    asked_en = distinct(rng, 0, pairs, examples, pairs)
    tokens_et = np.zeros((examples, length), np.int64)
    _show(tokens_et, keys_en, values_en)
    tokens_et[:, length - pairs :] = np.take_along_axis(keys_en, asked_en, 1)
    positions_en = np.broadcast_to(np.arange(length - pairs, length), (examples, pairs))
    return Examples.of(tokens_et, positions_en, np.take_along_axis(values_en, asked_en, 1))


def _pairs(cell: Cell, vocab_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    half = vocab_size // 2
    if cell.items > half - 1:
        raise UserError(f"{cell.items} different keys need a vocabulary of {2 * cell.items + 2}, not {vocab_size}")
    shape = cell.examples, cell.items
    return distinct(rng, 1, half, *shape), distinct(rng, half, vocab_size, *shape)


def _show(tokens_et: np.ndarray, keys_en: np.ndarray, values_en: np.ndarray) -> None:
    pairs = keys_en.shape[1]
    tokens_et[:, 0 : 2 * pairs : 2] = keys_en
    tokens_et[:, 1 : 2 * pairs : 2] = values_en
