"""Whether training data hold held-out documents, or any 50 tokens in a row of one.

Every window of tokens t[i..i+n) has the hash sum_j R[t_(i+j)] B^j modulo 2^64 (Karp and Rabin 1987, with a random
word R for each token), which sums of R[t_i] B^i give for all windows at once. Hits are compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from data_pipeline.documents import Part, bounds, open_parts
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import DataConfig

GRAM = 50  # tokens
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
FILTER_BITS = 28  # most bits of a hash that the first, quick look takes
EXAMPLES = 20
EXAMPLE_TOKENS = 60


@dataclass
class Report:
    """What was found.

    Attributes:
        gram: tokens in a row that count as contamination.
        held_out_documents: how many were looked for.
        copied_documents: how many of them are training documents as a whole.
        contaminated_documents: how many of them share a gram with training data, or are copied.
        examples: for some of them, a place of the gram in training data, and its text.
    """

    gram: int = GRAM
    held_out_documents: int = 0
    copied_documents: int = 0
    contaminated_documents: int = 0
    examples: list[dict[str, str | int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The report as what JSON can hold."""
        return asdict(self)


def check_contamination(
    data: DataConfig, vocab_size: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Look for all held-out documents of `data` in all of its training data.

    Args:
        data: what is prepared; its mixture's sources are all compared with each other.
        vocab_size: embeddings of the model.
        progress: told after every shard how many are done, and how many there are.

    Raises:
        UserError: the preparation is not complete, or a file is damaged.
    """
    tokenizer, found = open_parts(data, vocab_size)
    held_out = _HeldOut(found, tokenizer)
    total = sum(part.index.shards for part in found)
    done = 0
    for part in found:
        for shard in range(part.index.shards):
            held_out.compare(part, shard)
            done += 1
            progress(done, total)
    return held_out.report()


class _Hashes:
    """Hashes of windows of one row of tokens."""

    def __init__(self, tokens: np.ndarray, words: np.ndarray) -> None:
        powers = np.full(len(tokens), BASE, np.uint64)
        powers[:1] = 1
        self._sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(words[tokens] * np.cumprod(powers, dtype=np.uint64), out=self._sums[1:])
        powers[1:] = INVERSE
        self._shift_back = np.cumprod(powers, dtype=np.uint64)

    def of(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The hashes of the windows from `starts` to `ends` (excluded)."""
        hashes = (self._sums[ends] - self._sums[starts]) * self._shift_back[starts]
        return (hashes ^ hashes >> np.uint64(32)) * np.uint64(BASE)


class _HeldOut:
    """All held-out documents, and which of them were found so far."""

    def __init__(self, found: list[Part], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = np.random.Philox(key=0).random_raw(tokenizer.vocab_size)
        files = [part.tokens("held_out", shard) for part in found for shard in range(part.index.shards)]
        self._tokens = np.concatenate([np.empty(0, tokenizer.dtype_name), *files])
        self._starts, self._ends = bounds(self._tokens, tokenizer.bos_id)
        hashes = _Hashes(self._tokens, self._words)
        self._documents = _Finder(hashes.of(self._starts + 1, self._ends))
        self._grams = gram_starts(self._tokens, tokenizer.bos_id)
        self._finder = _Finder(hashes.of(self._grams, self._grams + GRAM))
        self._copied = np.zeros(len(self._starts), bool)
        self._shared = np.zeros(len(self._starts), bool)
        self._examples: list[dict[str, str | int]] = []

    def compare(self, part: Part, shard: int) -> None:
        """Note which held-out documents a shard's training data hold."""
        tokens = part.tokens("train", shard)
        hashes = _Hashes(tokens, self._words)
        starts, ends = bounds(tokens, self._tokenizer.bos_id)
        for here, group in self._documents.find(hashes.of(starts + 1, ends)):
            there = self._documents.members(group)
            ours = self._tokens[self._starts[there[0]] : self._ends[there[0]]]
            if np.array_equal(ours, tokens[starts[here] : ends[here]]):
                self._copied[there] = True
                self._documents.settle(group)
        grams = gram_starts(tokens, self._tokenizer.bos_id)
        for here, group in self._finder.find(hashes.of(grams, grams + GRAM)):
            ours, theirs = self._grams[self._finder.members(group)], int(grams[here])
            if np.array_equal(self._tokens[ours[0] : ours[0] + GRAM], tokens[theirs : theirs + GRAM]):
                documents = np.searchsorted(self._starts, ours, side="right") - 1
                if not self._shared[documents[0]]:
                    self._note(int(documents[0]), part, shard, tokens, theirs)
                self._shared[documents] = True
                self._finder.settle(group)

    def report(self) -> Report:
        """What was found."""
        return Report(
            held_out_documents=len(self._starts),
            copied_documents=int(self._copied.sum()),
            contaminated_documents=int((self._copied | self._shared).sum()),
            examples=self._examples,
        )

    def _note(self, document: int, part: Part, shard: int, tokens: np.ndarray, place: int) -> None:
        if len(self._examples) < EXAMPLES:
            self._examples.append(
                {
                    "held_out_document": document,
                    "train_file": str(part.data.dir / part.index.file("train", shard).name),
                    "token": place,
                    "text": self._tokenizer.decode(tokens[place : place + EXAMPLE_TOKENS]),
                }
            )


class _Finder:
    """Which of some hashes equal those that are looked for; equal ones of these are a group, by a number."""

    def __init__(self, wanted: np.ndarray) -> None:
        self._order = np.argsort(wanted, kind="stable")
        self._sorted = wanted[self._order]
        self._settled = np.zeros(len(wanted), bool)
        bits = min(FILTER_BITS, max(8, (8 * len(wanted)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[wanted >> self._shift] = True

    def find(self, hashes: np.ndarray) -> list[tuple[int, int]]:
        """A place in `hashes` for every group that is found there and not settled."""
        likely = np.flatnonzero(self._filter[hashes >> self._shift])
        groups = np.searchsorted(self._sorted, hashes[likely], side="left")
        known = groups < len(self._sorted)
        likely, groups = likely[known], groups[known]
        hits = (self._sorted[groups] == hashes[likely]) & ~self._settled[groups]
        found, first = np.unique(groups[hits], return_index=True)
        return list(zip(likely[hits][first].tolist(), found.tolist(), strict=True))

    def members(self, group: int) -> np.ndarray:
        """The places among the wanted hashes of a group."""
        end = np.searchsorted(self._sorted, self._sorted[group], side="right")
        return self._order[group:end]

    def settle(self, group: int) -> None:
        """Look for a group no more."""
        self._settled[group] = True


def gram_starts(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Where `GRAM` tokens of one document begin."""
    if len(tokens) < GRAM:
        return np.empty(0, np.int64)
    boundaries = np.concatenate([[0], np.cumsum(tokens == bos_id)])
    return np.flatnonzero(boundaries[GRAM:] == boundaries[:-GRAM])
