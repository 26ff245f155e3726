"""Where a run is to be trained: nodes, GPUs, limits, environment. Validated and frozen, as a run's configuration is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from loglinear.config_section import Section
from loglinear.config_text import apply_override, explain, read_yaml
from loglinear.errors import UserError

LOCAL = "local"  # instead of a file's name: this machine
PREFIX = "cluster."  # of overrides that change the cluster instead of the run


class ContainerConfig(Section):
    """The image that ranks run in.

    image: as the runtime names it.
    runtime: SLURM's pyxis plugin, or Apptainer.
    mounts: folders as outside:inside.
    python: the image's Python.
    """

    image: str
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    python: str = "python3"


class ClusterConfig(Section):
    """A part of a cluster, or this machine; names are sbatch's where there is such an option.

    kind: slurm, or local for processes of this machine.
    nodes: number of nodes.
    gpus_per_node: GPUs of each node; 0 trains on CPUs.
    ranks_per_node: gpus_per_node if not given, and 1 without GPUs.
    cpus_per_rank: cores of each rank; SLURM's default if not given.
    partition: a part of the cluster, as its administrator named it.
    account: the account that the job is charged to.
    qos: the job's quality of service.
    constraint: features that the nodes must have.
    exclude: nodes that the job must not get.
    minutes: the time limit of a job; a run that takes longer is continued in the next.
    save_seconds: how long before the limit the run is told to save.
    max_restarts: this many failures in a row without a new checkpoint end the run.
    exclude_bad_nodes: whether nodes that fail are avoided when the run starts again.
    container: an image for the ranks.
    python: the Python of the ranks where there is no container; the one that submits if not given.
    setup: lines of shell before the ranks start, such as `module load cuda`.
    environment: variables for the ranks, such as NCCL's settings.
    sbatch: further options, such as `reservation: big`, written without dashes in front.
    srun: the same for the command that starts the ranks.
    """

    kind: Literal["slurm", "local"] = "slurm"
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    ranks_per_node: PositiveInt | None = None
    cpus_per_rank: PositiveInt | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    minutes: PositiveInt = 24 * 60
    save_seconds: PositiveInt = 300
    max_restarts: NonNegativeInt = 5
    exclude_bad_nodes: bool = True
    container: ContainerConfig | None = None
    python: Path | None = None
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default={})
    sbatch: dict[str, str | int | bool] = Field(default={})
    srun: dict[str, str | int | bool] = Field(default={})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "local" and self.nodes > 1:
            raise ValueError(f"nodes ({self.nodes}): a local run has one node; set ranks_per_node for more ranks")
        if self.save_seconds >= 60 * self.minutes:
            raise ValueError(
                f"save_seconds ({self.save_seconds}) must be less than the {self.minutes} minutes of a job"
            )
        if self.container is not None and self.python is not None:
            raise ValueError("python belongs to a run without a container; in one, set container.python")
        return self

    @property
    def ranks_of_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Ranks of the run, all together."""
        return self.nodes * self.ranks_of_node

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_cluster(name: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read a cluster's YAML file, or take `local`; then apply overrides such as nodes=4.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or values contradict each other.
    """
    tree = {"kind": "local"} if name == LOCAL else read_yaml(Path(name))
    for override in overrides:
        apply_override(tree, override)
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{name}: {explain(error, ClusterConfig)}") from None


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that change the run, and those that begin with `cluster.`, without that."""
    run = [override for override in overrides if not override.startswith(PREFIX)]
    return run, [override.removeprefix(PREFIX) for override in overrides if override.startswith(PREFIX)]
