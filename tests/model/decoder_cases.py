"""Decoding steps in place in Triton's interpreter, and what they launch.

As a program it prints JSON: for every level scale the relative errors of the logits of steps against float64, and the
launches of one block's step. The variable that turns the interpreter on must be set before Triton is imported, so tests
start it as a process.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from loglinear.config import LevelScaleName, LogLinearConfig
from loglinear.model.decoder import Decoder, _in_place
from loglinear.model.layers import Documents
from loglinear.model.lm import DecodeState, LanguageModel
from loglinear.ops import neighbours
from tests.model.model_cases import awake, random_tokens, tiny
from tests.ops.op_cases import relative_error

PROMPT = 7  # the first step fills a new bucket, the second reads it


def model_of(level_scale: LevelScaleName) -> LanguageModel:
    """Groups shared by heads, widths that fill no block, and a lambda map that has a kernel."""
    own = LogLinearConfig(heads=4, head_dim=6, groups=2, state_dim=5, level_scale=level_scale, level_scale_hidden=16)
    return awake(tiny(log_linear=own, layers=1))


@torch.no_grad()
def step_errors(level_scale: LevelScaleName, batch: int, steps: int) -> list[float]:
    """Relative errors of the logits of steps by the kernels, after a prompt, against float64 step by step."""
    exact_model, model = model_of(level_scale).double(), model_of(level_scale)
    tokens_bt = random_tokens(batch, PROMPT + steps)
    _, exact = exact_model.decode(tokens_bt[:, :PROMPT], exact_model.initial_state(batch))
    _, state = model.decode(tokens_bt[:, :PROMPT], model.initial_state(batch))
    in_place = with_room(state)
    decoder, found = Decoder(model, state), []
    for t in range(PROMPT, PROMPT + steps):
        wanted_bv, exact = exact_model.decode(tokens_bt[:, t : t + 1], exact)
        decoder._tokens_b1.copy_(tokens_bt[:, t : t + 1])
        with kernels_on_cpu():
            found.append(relative_error(decoder._read(in_place), wanted_bv))
    return found


def with_room(state: DecodeState) -> DecodeState:
    """A copy in place whose buckets hold the steps to come."""
    layers = tuple(replace(layer, memory=layer.memory.with_buckets(4)) for layer in state.layers)
    return _in_place(replace(state, layers=layers))


def kernels_on_cpu() -> Any:
    """The operations around the op take their kernels for anything but float64."""
    return patch.object(neighbours, "_has_kernels", lambda x: x.dtype != torch.float64)


class Launches(TorchDispatchMode):
    """Counts what would be a launch on a GPU: kernels of ours, and operations of torch that read or write memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_ours, allocates = func.namespace == "loglinear", "empty" in func.__name__
        if not (is_ours or allocates or func.is_view):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def launches(level_scale: LevelScaleName) -> dict[str, int]:
    """What one block's step launches, by name."""
    model = model_of(level_scale)
    _, state = model.decode(random_tokens(1, PROMPT), model.initial_state(1))
    documents = Documents.rows(1, 1, PROMPT, torch.device("cpu"))
    run, counting = GridExecutor.__call__, Launches()

    def counted(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        counting.counts[self.fn.__name__] += 1
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own operations
            return run(self, *args, **kwargs)

    (block,) = model.blocks
    x_bd, before = torch.randn(1, 16), with_room(state).layers[0]
    with kernels_on_cpu(), patch.object(GridExecutor, "__call__", counted), counting:
        block.step(x_bd, documents, before)
    return dict(counting.counts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes = {name: (3, 3) if name == "mlp" else (1, 1) for name in get_args(LevelScaleName)}
    measured = {name: step_errors(name, *size) for name, size in sizes.items()}
    print(json.dumps({"errors": measured, "launches": {name: launches(name) for name in sizes}}))
