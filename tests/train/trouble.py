"""Training runs to which something happens at given steps; what ranks run."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import Batch
from data_pipeline.loader import TrainLoader, _Share
from loglinear.checkpoint.zero import fragments, optimizer_step
from loglinear.config import Config
from loglinear.train import run
from loglinear.train.engine import Engine
from loglinear.train.stability import Guard


def copies(engine: Any) -> list[torch.Tensor]:
    """All weights and moments that this rank owns, and the count of updates."""
    own = [view.clone() for fragment in fragments(engine) for view in fragment.tensors.values()]
    return [*own, torch.tensor(optimizer_step(engine))]


def train_poisoned(config: Config, bad: Mapping[int, float], stop_after: int | None = None) -> None:
    """The last rank's loss in call n of `Engine.step` is multiplied by `bad[n]`; the other ranks see no harm.

    A refused step must leave all that the rank owns untouched. After call `stop_after` the rank is asked to stop.
    """
    calls, rank, ranks = iter(range(1, 10_000)), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plain_step, plain_loss = Engine.step, Engine.loss_sum
    poison = [1.0]

    def step(self: Engine, *args: Any) -> Any:
        call = next(calls)
        poison[0] = bad.get(call, 1.0) if rank == ranks - 1 else 1.0
        before = copies(self.deepspeed)
        result = plain_step(self, *args)
        after = copies(self.deepspeed)
        assert (result.refusal is not None) == (call in bad), f"call {call}: {result.refusal}"
        untouched = all(first.equal(second) for first, second in zip(before, after, strict=True))
        assert untouched == (call in bad)
        if call == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def loss_sum(self: Engine, batch: Batch) -> torch.Tensor:
        return plain_loss(self, batch) * poison[0]

    Engine.step, Engine.loss_sum = step, loss_sum
    run.train(config)


def train_doubted(config: Config) -> None:
    """The last rank refuses the first step, of which the others see no harm."""
    calls, plain = iter(range(1, 10_000)), Guard.judge
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def judge(self: Guard, *args: float) -> str | None:
        return "it is doubted" if next(calls) == 1 and rank == ranks - 1 else plain(self, *args)

    Guard.judge = judge
    run.train(config)


def train_signalled(config: Config, step: int, number: int) -> None:
    """When `step` begins the last rank gets the signal."""
    rank, ranks, plain = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), run._Run._step

    def _step(self: run._Run, now: int) -> Any:
        if now == step and rank == ranks - 1:
            os.kill(os.getpid(), number)
        return plain(self, now)

    run._Run._step = _step
    run.train(config)


def train_without(config: Config, jumps: Mapping[int, int]) -> None:
    """Nothing happens, but behind `step` steps the data jump over `jumps[step]` steps' samples."""
    plain = _Share.numbers

    def numbers(self: _Share, index: int) -> range:
        jumped = sum(window for step, window in jumps.items() if index >= step * self.micro_batches)
        return plain(self, index + jumped * self.micro_batches)

    _Share.numbers = numbers
    run.train(config)


def train_struck(config: Config, call: int, strike: Callable[[torch.Tensor], object]) -> None:
    """Before call `call` of `Engine.step` something happens to one master weight, [1], of the last rank."""
    calls, plain_step = iter(range(1, 10_000)), Engine.step
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def step(self: Engine, *args: Any) -> Any:
        if next(calls) == call and rank == ranks - 1:
            own = next(piece for piece in fragments(self.deepspeed) if piece.name.endswith("mlp.down.weight"))
            strike(own.tensors["weight"][:1])
        return plain_step(self, *args)

    Engine.step = step
    run.train(config)


def flip(weight: torch.Tensor) -> None:
    """A cosmic ray: the highest bit of an fp32's exponent."""
    weight.view(torch.int32).bitwise_xor_(1 << 30)


def make_infinite(weight: torch.Tensor) -> None:
    weight.fill_(math.inf)


def train_scrambled(config: Config, first: int, last: int) -> None:
    """The labels of the steps from `first` to `last` are random tokens: a bad part of the data."""
    plain = TrainLoader.__iter__

    def batches(self: TrainLoader) -> Any:
        for index, batch in enumerate(plain(self)):
            step = self._share.start_sample // self._share.global_batch + index // self.micro_batches_per_step + 1
            if first <= step <= last:
                generator = torch.Generator().manual_seed(index)
                labels = torch.randint(config.model.vocab_size, batch.labels.shape, generator=generator)
                batch = batch._replace(labels=labels)
            yield batch

    TrainLoader.__iter__ = batches
    run.train(config)


def events(folder: Path) -> list[dict[str, Any]]:
    """What went wrong; only valid JSON counts."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all(math.isfinite(event["step"]) for event in found)
    return found
