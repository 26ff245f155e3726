"""Torch's random state of a rank, as tensors that a shard can hold."""

from __future__ import annotations

from typing import Any

import torch

CPU, GPU = "random/cpu", "random/gpu"


def random_state() -> dict[str, torch.Tensor]:
    """The generators' states, uint8."""
    states = {CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[GPU] = torch.cuda.get_rng_state()
    return states


def restore_random_state(shard: Any) -> None:
    """Set the generators from an open shard; a GPU's state is left alone where it was saved without one."""
    torch.set_rng_state(shard.get_tensor(CPU))
    if torch.cuda.is_available() and GPU in set(shard.keys()):
        torch.cuda.set_rng_state(shard.get_tensor(GPU))
