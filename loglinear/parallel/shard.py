"""Which part of every parameter a tensor rank holds, and which gradients have to be summed.

`placements` is the whole plan: one row for every kind of parameter. A linear layer whose rows are cut is
column-parallel in Megatron's words (each rank makes some outputs), one whose columns are cut is row-parallel (each
rank's outputs are a part of a sum). Source: Megatron-LM, arXiv 1909.08053; sequence parallelism, arXiv 2205.05198.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from loglinear.config import Config
from loglinear.parallel.mesh import Axis


class Placement(Enum):
    """How the tensor ranks hold a parameter."""

    ROWS = "cut along dimension 0"
    COLUMNS = "cut along dimension 1"
    WHOLE = "held whole by every rank, each with the same gradient"
    SHARED = "held whole by every rank, each with a part of the gradient: the parts are summed"


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a rank holds: `size` of dimension `dim` from `start`, of all `shape`."""

    shape: tuple[int, ...]
    dim: int
    start: int
    size: int

    @property
    def is_cut(self) -> bool:
        """Whether there is more of the parameter than this part."""
        return self.size < self.shape[self.dim]


def placements(config: Config) -> dict[str, Placement]:
    """Placement by a pattern of names; the first that matches a parameter's whole name holds."""
    groups, tensor = config.model.log_linear.groups, config.parallel.tensor
    of_keys = (Placement.ROWS, Placement.COLUMNS) if groups % tensor == 0 else (Placement.SHARED, Placement.SHARED)
    of_norms = Placement.SHARED if config.parallel.sequence else Placement.WHOLE
    log_linear = r"blocks\.\d+\.mixer\."
    by_mixer = [
        (rf"blocks\.({layer})\.mixer\.[qk]_proj\.weight", of_keys[0] if name == "log_linear" else Placement.ROWS)
        for name, layer in _layers_by_mixer(config)
    ]
    return dict(
        [
            (r"embedding\.weight|head\.weight", Placement.ROWS),
            *by_mixer,
            (log_linear + r"[vz]_proj\.weight|" + log_linear + r"dt_proj\.weight", Placement.ROWS),
            (log_linear + r"out_proj\.weight", Placement.COLUMNS),
            (log_linear + r"[qk]_conv\.weight", of_keys[1]),
            (log_linear + r"[qk]_conv\.bias", of_keys[0]),
            (log_linear + r"v_conv\.weight", Placement.COLUMNS),
            (log_linear + r"v_conv\.bias", Placement.ROWS),
            (log_linear + r"(A_log|dt_bias|D)", Placement.ROWS),
            (log_linear + r"norm\.weight", Placement.SHARED),
            (log_linear + r"lambda_map\.(level_proj\.weight|scale_hl|bias_hl)", Placement.ROWS),
            (log_linear + r"lambda_map\.mlp\.(weight|bias)2", _last_of_mlp(config)),
            (log_linear + r"lambda_map\.mlp\.(weight|bias)1", Placement.SHARED),
            (r"blocks\.\d+\.mlp\.(gate|up)\.weight", Placement.ROWS),
            (r"blocks\.\d+\.mlp\.down\.weight", Placement.COLUMNS),
            (r"norm\.weight|blocks\.\d+\.(mixer|mlp)_norm\.weight", of_norms),
        ]
    )


def _layers_by_mixer(config: Config) -> Iterator[tuple[str, str]]:
    """Each mixer's name and its layers, as alternatives of a pattern."""
    for name in sorted(set(config.model.pattern)):
        layers = [layer for layer in range(config.model.layers) if config.model.mixer_of(layer) == name]
        yield name, "|".join(map(str, layers))


def _last_of_mlp(config: Config) -> Placement:
    """The lambda MLP's last layer makes all heads from a token, or one head's levels from that head's logits."""
    return Placement.ROWS if config.model.log_linear.level_scale == "mlp_token" else Placement.SHARED


def placement_of(name: str, plan: dict[str, Placement]) -> Placement:
    """The placement of the parameter called `name`; every parameter must have one."""
    for pattern, placement in plan.items():
        if re.fullmatch(pattern, name):
            return placement
    raise AssertionError(f"no placement for parameter {name}")


def shard_of(parameter: torch.Tensor) -> Shard:
    """The part of its whole [rows, ...] that a parameter is; the whole, if it is not cut."""
    whole = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return getattr(parameter, "shard", Shard(whole, 0, 0, whole[0]))


def cut(parameter: nn.Parameter, placement: Placement, axis: Axis) -> nn.Parameter:
    """This rank's part of a whole parameter, marked for DeepSpeed's gradient norm and for checkpoints."""
    if placement in (Placement.WHOLE, Placement.SHARED):
        return parameter
    dim = 0 if placement is Placement.ROWS else 1
    size = parameter.shape[dim] // axis.size
    shard = Shard(tuple(parameter.shape), dim, axis.index * size, size)
    part = nn.Parameter(parameter.detach().narrow(dim, shard.start, size).clone())
    part.shard = shard  # pyright: ignore[reportAttributeAccessIssue]
    part.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    return part
