"""A run on random tokens, ready to take steps: what is measured and resharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_pipeline.batch import Batch
from loglinear.config import Config, ParallelConfig
from loglinear.model import LanguageModel
from loglinear.parallel import Mesh, World, make_mesh
from loglinear.parallel.parallelize import parallelize
from loglinear.train.engine import Engine, StepResult
from loglinear.train.profile import random_batch
from loglinear.train.stability import Guard
from loglinear.train.timing import StepTimer


class Meshes:
    """The meshes that were made, since each new group of ranks takes memory for as long as they live."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._made: dict[tuple[int, int], Mesh] = {}

    def of(self, parallel: ParallelConfig) -> Mesh:
        """The mesh of `parallel`; every rank must call it."""
        key = (parallel.context, parallel.tensor)
        if key not in self._made:
            self._made[key] = make_mesh(self.world, parallel)
        return self._made[key]


class Trainer:
    """Takes steps of one and the same batch, which is the same over every mesh."""

    def __init__(self, engine: Engine, config: Config, mesh: Mesh) -> None:
        self.engine, self._rate = engine, config.optimizer.lr
        count = config.train.micro_batches(mesh.data.size)
        first = mesh.data.index * count
        self._batches: list[Batch] = [random_batch(config, first + number) for number in range(count)]
        self._timer = StepTimer(mesh.world.device)

    def step(self) -> StepResult:
        """One optimizer step."""
        return self.engine.step(self._batches, self._rate, False, self._timer)


@contextmanager
def trainer(config: Config, mesh: Mesh, model: LanguageModel) -> Iterator[Trainer]:
    """A trainer of this rank's part of a model, for as long as DeepSpeed keeps it."""
    engine = Engine(model, config, mesh, Guard(config.stability))
    yield Trainer(engine, config, mesh)
    engine.deepspeed.destroy()


def fresh_model(config: Config, mesh: Mesh) -> LanguageModel:
    """This rank's part of a model whose random weights are drawn where it computes, which takes no time on a GPU."""
    torch.manual_seed(config.run.seed)
    with mesh.world.device:
        model = LanguageModel(config.model, recomputed_blocks=config.recomputed_blocks)
    return parallelize(model, mesh, config)
