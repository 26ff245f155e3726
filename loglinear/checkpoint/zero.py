"""Which piece of every parameter a rank owns under DeepSpeed ZeRO: the one file that knows DeepSpeed's insides.

Written against DeepSpeed 0.19. Its own checkpoints are tied to the number of ranks and the stage, or convert with
silent errors; pieces of flat parameters are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loglinear.parallel.shard import Shard, shard_of

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A rank's piece of one parameter.

    Attributes:
        name: of the parameter in the model.
        shard: the part of the parameter that this tensor rank holds.
        start: first element of the piece in the flattened part.
        tensors: live fp32 views of the piece, one-dimensional: the master weight and AdamW's moments.
    """

    name: str
    shard: Shard
    start: int
    tensors: dict[str, torch.Tensor]


def fragments(engine: Any) -> Iterator[Fragment]:
    """The pieces that this rank of a DeepSpeed engine owns; its tensor group may hold the same of uncut parameters."""
    _require_moments(engine)
    piece_of = _stage_3_piece if engine.zero_optimization_stage() == 3 else _stage_1_or_2_piece
    for name, parameter in engine.module.named_parameters():
        piece = piece_of(engine, parameter)
        if piece is not None:
            start, tensors = piece
            yield Fragment(name, shard_of(parameter), start, tensors)


def all_finite(engine: Any) -> bool:
    """Whether every weight and moment that this rank owns is a finite number."""
    tensors = (view for fragment in fragments(engine) for view in fragment.tensors.values())
    return all(bool(torch.isfinite(view).all()) for view in tensors)


def grad_norm(engine: Any) -> float:
    """L2 norm of the gradient before clipping, as soon as DeepSpeed has it: while the optimizer steps, and after.

    It is infinite if the gradient is not finite; DeepSpeed has then left out the optimizer.
    """
    return float(engine.optimizer._global_grad_norm)


def check_gradients_by_norm_alone(engine: Any) -> None:
    """Let stages 1 and 2 find gradients that are not finite in their norm, as they do in fp32.

    In bf16 they would also look at each gradient by itself, five kernels a parameter before anything else of the update
    is launched: 88 of the 573 ms of a step of 356M parameters, measured on an H200.
    """
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.check_overflow = lambda partition_gradients: None


def optimizer_step(engine: Any) -> int:
    """How many updates AdamW has made, for its bias correction."""
    _require_moments(engine)
    return int(_inner(engine).state[_masters(engine)[0]]["step"])


def set_optimizer_step(engine: Any, step: int) -> None:
    """Make AdamW continue as after `step` updates."""
    _require_moments(engine)
    for master in _masters(engine):
        _inner(engine).state[master]["step"].fill_(step)


def _inner(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer


def _masters(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 partitions of this rank, one a group."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in _inner(engine).param_groups for master in group["params"]]


def _require_moments(engine: Any) -> None:
    """Create AdamW's state as its first step would, so that it can be saved or filled before."""
    for master in _masters(engine):
        state = _inner(engine).state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state |= {moment: torch.zeros_like(master) for moment in MOMENTS}


def _stage_1_or_2_piece(engine: Any, parameter: Any) -> tuple[int, dict[str, torch.Tensor]] | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # the parameter lies in other ranks' partitions
        return None
    address = mapping.hp_fragment_address
    (master,) = _inner(engine).param_groups[mapping.param_group_index]["params"]
    flat = {WEIGHT: master.detach(), **{moment: _inner(engine).state[master][moment] for moment in MOMENTS}}
    views = {kind: tensor.narrow(0, address.start, address.numel) for kind, tensor in flat.items()}
    return mapping.lp_fragment_address.start, views


def _stage_3_piece(engine: Any, parameter: Any) -> tuple[int, dict[str, torch.Tensor]] | None:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    padded = parameter.ds_tensor.ds_numel
    start = padded * torch.distributed.get_rank(parameter.ds_process_group)
    numel = min(padded, parameter.ds_numel - start)
    if numel <= 0:  # padding alone
        return None
    flat = {WEIGHT: safe_get_local_fp32_param(parameter).detach()}
    flat |= {moment: safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS}
    return start, {kind: tensor.narrow(0, 0, numel) for kind, tensor in flat.items()}
