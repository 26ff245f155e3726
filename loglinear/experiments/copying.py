"""Selective copying: a few tokens among noise, to be repeated in order at the end.

Shapes: e example, t time, n token.
"""

from __future__ import annotations

import numpy as np

from loglinear.errors import UserError
from loglinear.experiments.examples import Cell, Examples, distinct

NOISE = 0  # the last token of the vocabulary asks for an answer; those between them are data


def selective_copying(cell: Cell, vocab_size: int, rng: np.random.Generator) -> Examples:
    """`cell.items` = M data tokens at random places among noise, then M marks, at which they are due in their order.

    As Mamba has it (arXiv 2312.00752; there 16 tokens, a vocabulary of 16, and 4096 tokens of noise), except that a
    row is `cell.length` tokens in all, noise, data and marks. Data tokens are uniform on 1 .. V - 2, and may repeat.

    Raises:
        UserError: the vocabulary or the length is too small.
    """
    length, items, examples = cell
    if vocab_size < 3 or 2 * items > length:
        raise UserError(f"{items} tokens to copy need a row of {2 * items} and a vocabulary of 3, at least")
    body = length - items
    data_en = rng.integers(1, vocab_size - 1, size=(examples, items))
    places_en = np.sort(distinct(rng, 0, body, examples, items), 1)
    tokens_et = np.full((examples, length), NOISE)
    np.put_along_axis(tokens_et, places_en, data_en, 1)
    tokens_et[:, body:] = vocab_size - 1
    positions_en = np.broadcast_to(np.arange(body, length), (examples, items))
    return Examples.of(tokens_et, positions_en, data_en)
