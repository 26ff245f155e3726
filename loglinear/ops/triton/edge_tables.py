"""Which tokens read which bucket or are summed in it, as the kernels of `edges.py` read it: rows of int32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from loglinear.ops.checks import Sequences
from loglinear.ops.edges import Place, final_places, initial_places, token_slices

TILE = 64  # tokens that a program handles at once
ITEM, ITEMS = 1024, 32  # tokens that a program sums at least, and parts of a bucket at most: sums of parts take memory


@dataclass(frozen=True)
class EdgeTables:
    """Index tables on the device.

    Attributes:
        sequences: their number.
        tile: [tiles, 3], first token, end, sequence; every token is in one of them.
        bucket: [tiles, J], the buckets of a tile's tokens, -1 for none.
        item: [items, 3], first token, end, which of the tokens' J buckets; in the order of places.
        place: [places, 4], first item, end, sequence, bucket.
    """

    sequences: int
    tile: torch.Tensor
    bucket: torch.Tensor
    item: torch.Tensor
    place: torch.Tensor


@lru_cache(maxsize=64)
def initial_tables(sequences: Sequences, device: torch.device) -> EdgeTables:
    """Of the buckets that sequences start with: all their tokens read them."""
    places = initial_places(sequences)
    own = [[place.bucket for place in places if place.sequence == number] for number in range(len(sequences.lengths))]
    tiles = [
        (tile, number, buckets)
        for number, (now, buckets) in enumerate(zip(token_slices(sequences), own, strict=True))
        for tile in _cut(now, TILE)
    ]
    return _tables(len(own), tiles, places, device)


@lru_cache(maxsize=64)
def final_tables(sequences: Sequences, device: torch.device) -> EdgeTables:
    """Of the buckets that sequences end with: every token is in one of them."""
    places = final_places(sequences)
    tiles = [(tile, place.sequence, [place.bucket]) for place in places for tile in _cut(place.tokens, TILE)]
    return _tables(len(sequences.lengths), tiles, places, device)


def _tables(
    sequences: int, tiles: list[tuple[slice, int, list[int]]], places: Sequence[Place], device: torch.device
) -> EdgeTables:
    most = max(len(buckets) for _, _, buckets in tiles)
    items = [[(part, place.slot) for part in _cut(place.tokens, _item(place.tokens))] for place in places]
    ends = torch.tensor([0, *map(len, items)]).cumsum(0).tolist()

    def put(rows: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32).to(device)

    return EdgeTables(
        sequences,
        tile=put([(tile.start, tile.stop, number) for tile, number, _ in tiles]),
        bucket=put([(*buckets, *[-1] * (most - len(buckets))) for _, _, buckets in tiles]),
        item=put([(part.start, part.stop, slot) for parts in items for part, slot in parts]),
        place=put([(*ends[n : n + 2], place.sequence, place.bucket) for n, place in enumerate(places)]),
    )


def _item(tokens: slice) -> int:
    """Tokens in each item of a bucket, whole tiles."""
    return max(ITEM, TILE * -(-(tokens.stop - tokens.start) // (TILE * ITEMS)))


def _cut(tokens: slice, size: int) -> Iterator[slice]:
    for first in range(tokens.start, tokens.stop, size):
        yield slice(first, min(first + size, tokens.stop))
