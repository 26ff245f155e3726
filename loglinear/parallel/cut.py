"""Where the cuts between context ranks fall in a batch: pure arithmetic on document boundaries.

A batch is `samples` sequences of T tokens, packed documents inside; context rank r holds tokens [r t, r t + t) of
every sample, t = T / ranks. A document that a cut goes through continues on the next rank. Every rank computes the
tables of all ranks from the same boundaries, so that nothing about them has to be sent.

Shapes: r rank, b sample, j bucket that is sent, m contribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loglinear.model.layers import Documents
from loglinear.ops.fenwick import bucket_start, buckets_at, level
from loglinear.parallel.mesh import Mesh


@dataclass(frozen=True)
class Contributions:
    """Which bucket of which rank goes into which bucket of the state that this rank's samples begin with.

    Attributes:
        source: index among [ranks, samples, buckets sent].
        target: index among [samples, buckets of the initial state].
        rank, sample: of the source.
    """

    source: torch.Tensor
    target: torch.Tensor
    rank: torch.Tensor
    sample: torch.Tensor


@dataclass(frozen=True)
class Pieces:
    """The document pieces of a row, apart: the first of every sample, which may go on from an earlier rank, and others.

    Attributes:
        first_tokens: int64, where the tokens of the first pieces lie in the row.
        first_bounds: int32 [samples + 1], their boundaries side by side.
        other_tokens, other_bounds: of the others; None if there are none.
    """

    first_tokens: torch.Tensor
    first_bounds: torch.Tensor
    other_tokens: torch.Tensor | None
    other_bounds: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class CutDocuments(Documents):
    """This rank's part of a batch of packed documents, as one row.

    Attributes:
        samples: rows of the batch.
        sample_length: T, tokens of a whole sample.
        heads: int64 [samples], tokens that the document at each sample's start has on earlier ranks.
        tails: int32 [samples + 1], boundaries of the last document pieces of all samples, side by side.
        tail_tokens: int64, where their tokens lie in the row.
        tail_starts: int64 [samples], tokens of their documents before them.
        sent_bj: int64 [samples, J], buckets of the tails' states that later ranks read; -1 where there are fewer.
        contributions: what this rank makes its initial states from.
        pieces: the document pieces of this rank's row.
        starts: for each whole sample, where documents begin in it.
    """

    samples: int
    sample_length: int
    heads: torch.Tensor
    tails: torch.Tensor
    tail_tokens: torch.Tensor
    tail_starts: torch.Tensor
    sent_bj: torch.Tensor
    contributions: Contributions
    pieces: Pieces
    starts: tuple[tuple[int, ...], ...]


def cut_documents(cu_seqlens: torch.Tensor, samples: int, ranks: int, rank: int, device: torch.device) -> CutDocuments:
    """What context rank `rank` of `ranks` must know of a batch.

    Args:
        cu_seqlens: int32 [documents + 1] on the CPU, boundaries in the samples x T tokens; every sample starts one.
        samples: rows of the batch.
        ranks: context ranks; T divides by them.
        rank: this one.
        device: where the tables go.
    """
    bounds = cu_seqlens.numpy().astype(np.int64)
    sample_length = int(bounds[-1]) // samples
    length = sample_length // ranks
    starts_rb = np.arange(samples) * sample_length + np.arange(ranks)[:, None] * length
    tail_rb = _tails(bounds, starts_rb, length)
    sent = {(r, b): _sent(tail_rb[r, b]) for r in range(ranks) for b in range(samples)}
    most = max(map(len, sent.values()))
    positions, row_bounds, pieces = _pieces(bounds, starts_rb[rank], length, device)
    heads = np.array([tail_rb[rank - 1, b].end if rank and tail_rb[rank - 1, b].goes_on else 0 for b in range(samples)])
    own_tails = [tail_rb[rank, b] for b in range(samples)]
    sizes = np.array([tail.end - tail.start for tail in own_tails])
    padded = [sent[rank, b] + [-1] * (most - len(sent[rank, b])) for b in range(samples)]

    def put(values: object) -> torch.Tensor:
        return _send(torch.from_numpy(np.asarray(values, dtype=np.int64)), device)

    return CutDocuments(
        positions_bt=put(positions)[None],
        length=int(np.diff(bounds).max()),
        cu_seqlens=torch.from_numpy(row_bounds.astype(np.int32)),
        samples=samples,
        sample_length=sample_length,
        heads=torch.from_numpy(heads.astype(np.int64)),
        tails=_boundaries(sizes),
        tail_tokens=put(np.concatenate([(b + 1) * length - size + np.arange(size) for b, size in enumerate(sizes)])),
        tail_starts=torch.tensor([tail.start for tail in own_tails], dtype=torch.int64),
        sent_bj=put(padded).view(samples, most),
        contributions=Contributions(*map(put, _contributions(tail_rb, sent, most, heads, rank))),
        pieces=pieces,
        starts=tuple(_document_starts(bounds, sample * sample_length, sample_length) for sample in range(samples)),
    )


def local_batch(
    inputs_bt: torch.Tensor, labels_bt: torch.Tensor, cu_seqlens: torch.Tensor, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor, Documents]:
    """This context rank's part of a batch of packed documents, on its device; a GPU is not waited for.

    Args:
        inputs_bt, labels_bt: int64 [B, T].
        cu_seqlens: int32 [documents + 1] on the CPU, boundaries in the B x T tokens.
        mesh: the ranks.

    Returns:
        Inputs and labels [B, T / ranks], and where documents lie in them.
    """
    axis, device = mesh.context, mesh.world.device
    inputs_bt, labels_bt = _send(inputs_bt, device), _send(labels_bt, device)
    if axis.size == 1:
        return inputs_bt, labels_bt, Documents.packed(cu_seqlens, device)
    documents = cut_documents(cu_seqlens, len(inputs_bt), axis.size, axis.index, device)
    # Whole samples are sent: a part of them would first have to be copied into memory that is not pinned.
    inputs_bt, labels_bt = (x.chunk(axis.size, 1)[axis.index].contiguous() for x in (inputs_bt, labels_bt))
    return inputs_bt, labels_bt, documents


def _send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device, behind what that has to do before; torch keeps pinned memory until a copy from it is done."""
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Tail:
    """The last document piece of a sample on a rank: tokens [start, end) of its document."""

    start: int
    end: int
    goes_on: bool  # on the next rank


def _tails(bounds: np.ndarray, starts_rb: np.ndarray, length: int) -> np.ndarray:
    def tail(start: int) -> _Tail:
        end = start + length
        document = bounds[np.searchsorted(bounds, end - 1, side="right") - 1]
        goes_on = bounds[np.searchsorted(bounds, end)] != end
        return _Tail(int(max(start - document, 0)), int(end - document), bool(goes_on))

    return np.vectorize(tail, otypes=[object])(starts_rb)


def _sent(tail: _Tail) -> list[int]:
    """Buckets at the tail's end that hold tokens of the tail itself."""
    return buckets_at(tail.end, tail.start) if tail.goes_on else []


def _pieces(
    bounds: np.ndarray, starts_b: np.ndarray, length: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, Pieces]:
    """Positions of the row's tokens in their documents, boundaries of its pieces, and the pieces."""
    tokens = (starts_b[:, None] + np.arange(length)).ravel()  # in the whole batch
    document = bounds[np.searchsorted(bounds, tokens, side="right") - 1]  # where each token's begins
    begins = tokens == document
    begins[::length] = True  # of every sample
    first = np.flatnonzero(begins)
    row_bounds = np.append(first, len(tokens))
    is_first = np.repeat(first % length == 0, np.diff(row_bounds))

    def select(wanted: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = np.diff(row_bounds)[wanted[first]]
        return _send(torch.from_numpy(np.flatnonzero(wanted)), device), _boundaries(sizes)

    others = select(~is_first) if not is_first.all() else (None, None)
    return tokens - document, row_bounds, Pieces(*select(is_first), *others)


def _document_starts(bounds: np.ndarray, start: int, length: int) -> tuple[int, ...]:
    """Where documents begin in the sample of `length` tokens from `start` on."""
    first, end = np.searchsorted(bounds, (start, start + length))
    return tuple((bounds[first:end] - start).tolist())


def _contributions(
    tail_rb: np.ndarray, sent: dict[tuple[int, int], list[int]], most: int, heads: np.ndarray, rank: int
) -> list[list[int]]:
    """Rows: source, target, rank and sample, one column a contribution."""
    buckets = initial_buckets(heads)
    columns = []
    for b, head in enumerate(heads.tolist()):
        first = rank
        while head and (first == rank or tail_rb[first, b].start > 0):
            first -= 1  # the rank on which the document begins
            for j, bucket in enumerate(sent[first, b]):
                home = level(head, bucket_start(tail_rb[first, b].end, bucket)) - 1
                columns.append(((first * len(heads) + b) * most + j, b * buckets + home, first, b))
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[], [], [], []]


def initial_buckets(heads: np.ndarray | torch.Tensor) -> int:
    """Buckets of the initial state of samples that begin after `heads` tokens of a document."""
    return int(heads.max()).bit_length()


def _boundaries(sizes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
