"""The ranks as a grid of data x context x tensor, and the groups along its axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from loglinear.config import ParallelConfig
from loglinear.errors import UserError
from loglinear.parallel.world import World


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one along one axis.

    Attributes:
        size: how many they are, this one included.
        index: which of them this one is.
        group: torch's process group, None in a grid that lives in one process.
    """

    size: int
    index: int
    group: Any


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands in the grid. Tensor neighbours have neighbouring ranks, then context, then data.

    Attributes:
        world: all ranks.
        data: ranks that read other samples.
        context: ranks that read other parts of the same samples.
        tensor: ranks that hold other parts of the same weights and read the same tokens.
        replicas: data x context, the ranks that hold the same weights; ZeRO shards over them.
    """

    world: World
    data: Axis
    context: Axis
    tensor: Axis
    replicas: Axis


def data_parallel_size(parallel: ParallelConfig, ranks: int) -> int:
    """The data axis of `ranks` ranks.

    Raises:
        UserError: they do not divide by context x tensor.
    """
    inner = parallel.context * parallel.tensor
    if ranks % inner:
        raise UserError(
            f"{ranks} ranks do not divide into groups of parallel.context ({parallel.context}) x parallel.tensor"
            f" ({parallel.tensor}): start a multiple of {inner} ranks"
        )
    return ranks // inner


def make_mesh(world: World, parallel: ParallelConfig) -> Mesh:
    """Arrange all ranks; every rank must call it.

    Raises:
        UserError: the number of ranks does not fit.
    """
    shape = (data_parallel_size(parallel, world.size), parallel.context, parallel.tensor)
    grid_dct = torch.arange(world.size).view(shape)
    return Mesh(
        world,
        data=_axis(world, grid_dct.permute(1, 2, 0).flatten(0, 1)),
        context=_axis(world, grid_dct.permute(0, 2, 1).flatten(0, 1)),
        tensor=_axis(world, grid_dct.flatten(0, 1)),
        replicas=_axis(world, grid_dct.flatten(0, 1).T),
    )


def _axis(world: World, groups: torch.Tensor) -> Axis:
    """This rank's row among `groups`, ranks [groups, members]; all ranks make all groups, in one order."""
    own = None
    for ranks in groups.tolist():
        group = dist.new_group(ranks)
        if world.rank in ranks:
            own = Axis(len(ranks), ranks.index(world.rank), group)
    assert own is not None
    return own
