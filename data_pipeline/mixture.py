"""Which source a training sample comes from: computed from the sample's number, by weights that change with stages.

Everything here counts *runs* of consecutive samples (`data.contiguous` of them), from 0. Within a stage the first n
runs hold floor(n w / W) of the first source, and of the runs that are left the others take their part in the same
way, so that shares are exact to a few runs at any time. These regular turns are shuffled in blocks. A source that
reaches its limit ends the stage: the next one goes on without it.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.order import shuffled

BLOCK = 1024  # runs that are shuffled among each other
RESOLUTION = 1 << 40  # of weights: what their sum is scaled to


@dataclass(frozen=True)
class Stage:
    """Runs from `start` on are taken by `weights`, one for each source, not all 0."""

    start: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Phase:
    """Runs `start` to `end` (excluded; None is without end); `taken` is what sources gave before it."""

    start: int
    end: int | None
    weights: tuple[int, ...]
    taken: tuple[int, ...]


class Mixture:
    """The sources of all runs.

    Attributes:
        end: how many runs there are until every source has reached its limit; None is without end.
    """

    def __init__(self, seed: int, stages: Sequence[Stage], limits: Sequence[int | None]) -> None:
        """Work out where the weights change.

        Args:
            seed: of the shuffled turns.
            stages: in the order of their starts, the first of them at 0.
            limits: the most runs of each source; None is without end.
        """
        assert stages[0].start == 0
        self._seed = seed
        self._phases = list(_phases(stages, limits))
        self._starts = [phase.start for phase in self._phases]
        self.end = self._phases[-1].end if self._phases else 0

    def locate(self, run: int) -> tuple[int, int]:
        """The source of a run, and the number of the run among those of that source."""
        assert self.end is None or run < self.end
        phase = self._phases[bisect_right(self._starts, run) - 1]
        source, number = _pick(phase.weights, self._shuffled(phase, run - phase.start))
        return source, phase.taken[source] + number

    def fingerprint(self, runs: int) -> str:
        """Hexadecimal digits that are equal for two mixtures if their first `runs` runs are the same.

        What comes later is left out, so the later stages of a run may be changed while it is under way.
        """
        past = self._past(runs)
        parts = [(phase.start, phase.weights) for phase in past]
        blocks = [self._block(past[-1], (runs - 1 - past[-1].start) // BLOCK)] if past else []
        return hashlib.sha256(json.dumps([parts, blocks]).encode()).hexdigest()[:16]

    def sources(self, runs: int) -> list[int]:
        """Which sources the first `runs` runs may come from."""
        weights = (phase.weights for phase in self._past(runs))
        return [source for source, shares in enumerate(zip(*weights, strict=True)) if any(shares)]

    def _past(self, runs: int) -> list[_Phase]:
        return [phase for phase in self._phases if phase.start < runs]

    def _shuffled(self, phase: _Phase, place: int) -> int:
        if sum(weight > 0 for weight in phase.weights) == 1:
            return place
        block, offset = divmod(place, BLOCK)
        size = self._block(phase, block)
        return block * BLOCK + shuffled(offset, size, f"{self._seed} mixture {phase.start} {block}")

    @staticmethod
    def _block(phase: _Phase, block: int) -> int:
        """How many runs are shuffled in a block: all of it, or what the phase leaves of it."""
        return BLOCK if phase.end is None else min(BLOCK, phase.end - phase.start - block * BLOCK)


def _phases(stages: Sequence[Stage], limits: Sequence[int | None]) -> Iterator[_Phase]:
    """Stages, cut where a source reaches its limit; they end where no source is left."""
    taken = (0,) * len(limits)
    ends = [*(stage.start for stage in stages[1:]), None]
    for stage, stage_end in zip(stages, ends, strict=True):
        start = stage.start
        while stage_end is None or start < stage_end:
            left = [None if limit is None else limit - gave for limit, gave in zip(limits, taken, strict=True)]
            weights = _scaled(0 if rest == 0 else w for w, rest in zip(stage.weights, left, strict=True))
            if not any(weights):
                return
            lengths = [_until(weights, i, rest) for i, rest in enumerate(left) if rest is not None and weights[i]]
            lengths += [] if stage_end is None else [stage_end - start]
            end = start + min(lengths) if lengths else None
            yield _Phase(start, end, weights, taken)
            if end is None:
                return
            gave = _counts(weights, end - start)
            taken = tuple(before + now for before, now in zip(taken, gave, strict=True))
            start = end


def _scaled(weights: Iterator[float]) -> tuple[int, ...]:
    """The weights as integers, so that all that follows is exact."""
    values = list(weights)
    total = sum(values)
    return tuple(max(1, round(value / total * RESOLUTION)) if value else 0 for value in values)


def _pick(weights: Sequence[int], place: int) -> tuple[int, int]:
    """The source of the run at `place` of a phase, and how many runs it gave in that phase before."""
    rest = sum(weights)
    for source, weight in enumerate(weights):
        before = place * weight // rest
        if (place + 1) * weight // rest > before:
            return source, before
        place, rest = place - before, rest - weight
    raise AssertionError("the last source takes whatever is left")


def _counts(weights: Sequence[int], places: int) -> list[int]:
    """How many of the first `places` runs of a phase each source gives."""
    rest, counts = sum(weights), []
    for weight in weights:
        counts.append(places * weight // rest if weight else 0)
        places, rest = places - counts[-1], rest - weight
    return counts


def _until(weights: Sequence[int], source: int, runs: int) -> int:
    """The length of a phase at which `source` has just given `runs` runs: by bisection."""
    low, high = 0, 1
    while _counts(weights, high)[source] < runs:
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _counts(weights, middle)[source] >= runs else (middle, high)
    return high
