"""The ranks as a grid of data x context x tensor, and the groups along its axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from loglinear.config import ParallelConfig
from loglinear.errors import UserError
from loglinear.parallel.world import PATIENCE, World

AXES = ("data", "context", "tensor", "replicas")


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one along one axis.

    Attributes:
        name: of the axis.
        size: how many they are, this one included.
        index: which of them this one is.
        group: torch's process group, None in a grid that lives in one process.
    """

    name: str
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

    @property
    def readers(self) -> int:
        """How many ranks read each sample."""
        return self.context.size * self.tensor.size


class ModelParallelUnit:
    """What DeepSpeed asks of Megatron's `mpu`: the ranks that share a replica, and those that hold the same weights."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self) -> Any:
        """The tensor ranks' group."""
        return self._mesh.tensor.group

    def get_model_parallel_rank(self) -> int:
        """Which tensor rank this is."""
        return self._mesh.tensor.index

    def get_model_parallel_world_size(self) -> int:
        """How many tensor ranks there are."""
        return self._mesh.tensor.size

    def get_data_parallel_group(self) -> Any:
        """The group that gradients are reduced over, and that ZeRO shards over."""
        return self._mesh.replicas.group

    def get_data_parallel_rank(self) -> int:
        """Which of them this is."""
        return self._mesh.replicas.index

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.replicas.size


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


def last_rank(data: int, parallel: ParallelConfig) -> Mesh:
    """The mesh as its last rank would see it, in a process that has no others: for planning, without groups."""
    sizes = {"data": data, "context": parallel.context, "tensor": parallel.tensor}
    sizes["replicas"] = data * parallel.context
    ranks = data * parallel.context * parallel.tensor
    axes = {name: Axis(name, size, size - 1, None) for name, size in sizes.items()}
    return Mesh(World(ranks - 1, ranks, torch.device("meta")), **axes)


def lone_mesh(device: torch.device) -> Mesh:
    """The mesh of a process that works alone, without groups."""
    return Mesh(World(0, 1, device), **{name: Axis(name, 1, 0, None) for name in AXES})


def make_mesh(world: World, parallel: ParallelConfig) -> Mesh:
    """Arrange all ranks; every rank must call it.

    Raises:
        UserError: the number of ranks does not fit.
    """
    data = world.together(lambda: data_parallel_size(parallel, world.size))[0]
    shape = (data, parallel.context, parallel.tensor)
    grid_dct = torch.arange(world.size).view(shape)
    return Mesh(
        world,
        data=_axis("data", world, grid_dct.permute(1, 2, 0).flatten(0, 1)),
        context=_axis("context", world, grid_dct.permute(0, 2, 1).flatten(0, 1)),
        tensor=_axis("tensor", world, grid_dct.flatten(0, 1)),
        replicas=_axis("replicas", world, grid_dct.flatten(0, 1).T),
    )


def _axis(name: str, world: World, groups: torch.Tensor) -> Axis:
    """This rank's row among `groups`, ranks [groups, members]; all ranks make all groups, in one order."""
    own = None
    for ranks in groups.tolist():
        group = dist.new_group(ranks, timeout=PATIENCE)
        if world.rank in ranks:
            own = Axis(name, len(ranks), ranks.index(world.rank), group)
    assert own is not None
    return own
