"""Softmax attention over sequences cut over the context ranks, with as much work for each of them.

Keys and values are gathered. A query sees all keys before it, so the rank with the last ones would do most of the work.
The queries of each rank are therefore halved, and rank r of R computes those of halves r and 2 R - 1 - r among all
2 R: one of the early and one of the late ones. Queries travel there and outputs back, R times fewer than the keys.
Source: Llama 3, arXiv 2407.21783, section 3.3.2.

Shapes: b sample, t time (of queries), s time of keys, h head, p head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from loglinear.model.attention import causal_attention
from loglinear.model.layers import Documents
from loglinear.parallel.collectives import exchange, gather
from loglinear.parallel.cut import CutDocuments
from loglinear.parallel.mesh import Axis

TIME = 1  # dimension of [B, T, H, P]


class ContextSoftmaxCore(nn.Module):
    """Causal attention within documents, some of which other ranks hold parts of."""

    def __init__(self, core: nn.Module, axis: Axis) -> None:
        super().__init__()
        self._core, self._axis = core, axis

    def forward(
        self, q_bthp: torch.Tensor, k_bshp: torch.Tensor, v_bshp: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """As `SoftmaxCore.forward`."""
        if not isinstance(documents, CutDocuments):
            return self._core(q_bthp, k_bshp, v_bshp, documents)
        q_bthp, k_bshp, v_bshp = (x[0].unflatten(0, (documents.samples, -1)) for x in (q_bthp, k_bshp, v_bshp))
        k_bshp, v_bshp = (gather(x, self._axis, TIME) for x in (k_bshp, v_bshp))
        halves = Halves(self._axis.size, self._axis.index, q_bthp.shape[TIME])
        parts = []
        for start, q_part_bthp in halves.give(q_bthp, self._axis):
            samples = zip(q_part_bthp.split(1), k_bshp.split(1), v_bshp.split(1), strict=True)
            parts.append(
                torch.cat([_attend(*each, start, documents.starts[sample]) for sample, each in enumerate(samples)])
            )
        return halves.take_back(parts, self._axis).flatten(0, 1)[None]


def _attend(
    q_bthp: torch.Tensor, k_bshp: torch.Tensor, v_bshp: torch.Tensor, start: int, documents: tuple[int, ...]
) -> torch.Tensor:
    """Queries [1, T, H, P] from `start` on of a sample [1, S, H, P] whose documents begin at `documents`."""
    end = start + q_bthp.shape[TIME]
    outputs = []
    for first, following in zip(documents, (*documents[1:], end), strict=True):
        begin, stop = max(first, start), min(following, end)
        if begin < stop:
            keys = slice(first, stop)
            outputs.append(causal_attention(q_bthp[:, begin - start : stop - start], k_bshp[:, keys], v_bshp[:, keys]))
    return torch.cat(outputs, TIME)


@dataclass(frozen=True)
class Halves:
    """The halves of all ranks' queries: rank r holds 2 r and 2 r + 1, and computes r and 2 R - 1 - r.

    Attributes:
        ranks: R.
        rank: this one.
        length: tokens that each rank holds of a sample; of an odd number the first half has one more.
    """

    ranks: int
    rank: int
    length: int

    def give(self, x_bthp: torch.Tensor, axis: Axis) -> Iterator[tuple[int, torch.Tensor]]:
        """What this rank computes, of what each holds of samples [B, T, H, P]: first tokens, and [B, T / 2, H, P]."""
        parts = x_bthp.split([self.size(half) for half in self._held], TIME)
        x_tbhp = torch.cat([parts[half % 2] for half in self._sent], TIME).transpose(0, TIME)
        given_tbhp = exchange(x_tbhp, axis, self._rows(self._held, self._computer), self._rows(self.own, self._holder))
        given = given_tbhp.transpose(0, TIME).split([self.size(half) for half in self.own], TIME)
        return zip(map(self.start, self.own), given, strict=True)

    def take_back(self, parts: list[torch.Tensor], axis: Axis) -> torch.Tensor:
        """What was computed of what this rank holds [B, T, H, P], from what it has computed itself."""
        x_tbhp = torch.cat(parts, TIME).transpose(0, TIME)
        back_tbhp = exchange(x_tbhp, axis, self._rows(self.own, self._holder), self._rows(self._held, self._computer))
        back = back_tbhp.transpose(0, TIME).split([self.size(half) for half in self._sent], TIME)
        return torch.cat([back[self._sent.index(half)] for half in self._held], TIME)

    @property
    def _held(self) -> tuple[int, int]:
        return 2 * self.rank, 2 * self.rank + 1

    @property
    def own(self) -> tuple[int, int]:
        """The halves that this rank computes."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    @property
    def _sent(self) -> list[int]:
        """What is held, in the order of the ranks that it goes to."""
        return sorted(self._held, key=self._computer)

    def _computer(self, half: int) -> int:
        return min(half, 2 * self.ranks - 1 - half)

    def _holder(self, half: int) -> int:
        return half // 2

    def size(self, half: int) -> int:
        """Tokens of a half."""
        return (self.length + 1 - half % 2) // 2

    def start(self, half: int) -> int:
        """Its first token."""
        return half // 2 * self.length + half % 2 * self.size(0)

    def _rows(self, halves: tuple[int, int], place: Callable[[int], int]) -> list[int]:
        """Tokens of `halves` by their ranks."""
        return [sum(self.size(half) for half in halves if place(half) == rank) for rank in range(self.ranks)]
