"""What autograd really holds of a model with the kernels, in Triton's interpreter or on a GPU, beside its plan.

As a program it prints JSON: for every case the planned bytes and those held. The variable that turns the interpreter on
must be set before Triton is imported, so tests start it as a process.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from loglinear.config import Config, MixerName
from loglinear.model import LanguageModel, layers
from loglinear.ops import attention, neighbours
from loglinear.train.plan import make_plan

PATTERNS: dict[str, tuple[MixerName, ...]] = {
    "log_linear": ("log_linear",),
    "softmax": ("softmax",),
    "hybrid": ("log_linear", "softmax"),
}


def config_of(pattern: tuple[MixerName, ...], layers: int = 3, **train: Any) -> Config:
    """Three layers if not told otherwise, four chunks a sequence, dimensions that are all different."""
    return Config.model_validate(
        {
            "model": {
                "vocab_size": 70,
                "seq_len": 256,
                "dim": 48,
                "layers": layers,
                "mlp_dim": 56,
                "pattern": pattern,
                "log_linear": {"heads": 4, "head_dim": 16, "groups": 2, "state_dim": 24},
                "softmax": {"heads": 3, "head_dim": 32},
            },
            "train": {"global_batch": 12, "micro_batch": 3, **train},
        }
    )


class Ledger:
    """The bytes of all storages that autograd holds: now, and the most at any time."""

    def __init__(self, model: nn.Module) -> None:
        self.not_counted = {parameter.data_ptr() for parameter in model.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.most = 0

    def change(self, tensor: torch.Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.not_counted:
            return
        before = self.holders[storage.data_ptr()]
        self.holders[storage.data_ptr()] += by
        self.now += storage.nbytes() * ((before + by > 0) - (before > 0))
        self.most = max(self.most, self.now)


@dataclass
class Held:
    """A tensor in autograd's hands, which leaves the ledger as soon as they let go of it."""

    tensor: torch.Tensor
    ledger: Ledger

    def __post_init__(self) -> None:
        self.ledger.change(self.tensor, 1)

    def __del__(self) -> None:
        self.ledger.change(self.tensor, -1)


def measured(config: Config, device: str) -> int:
    """The most that autograd holds in a forward and backward pass of one micro-batch, in bytes."""
    torch.manual_seed(0)
    model = LanguageModel(config.model, recomputed_blocks=config.recomputed_blocks)
    model.to(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision])
    tokens_bt = torch.randint(config.model.vocab_size, (config.train.micro_batch, config.model.seq_len), device=device)
    ledger = Ledger(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Held(tensor, ledger), lambda held: held.tensor):
        model(tokens_bt, tokens_bt).backward()
    assert ledger.now == 0
    return ledger.most


class SiluProduct(torch.autograd.Function):
    """liger-kernel's, which the interpreter cannot run: it keeps what it is given, and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return dys[0] * up * torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate))), dys[0] * F.silu(gate)


def measured_in_interpreter(config: Config) -> int:
    """`measured` with the kernels in the interpreter."""
    everywhere = [patch.object(module, "has_kernels", lambda x: True) for module in (neighbours, attention)]
    with everywhere[0], everywhere[1], patch.object(layers, "silu_product", SiluProduct.apply):
        return measured(config, "cpu")


CASES = {
    f"{name} {precision} recomputing {recomputed}": config_of(
        PATTERNS[name], layers=2, activation_checkpointing=recomputed, precision=precision, micro_batch=1
    )
    for name, precision, recomputed in (
        ("log_linear", "fp32", False),
        ("log_linear", "fp32", True),
        ("log_linear", "bf16", False),
        ("log_linear", "bf16", 1),
        ("softmax", "fp32", False),
        ("hybrid", "bf16", True),
    )
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    planned = {name: make_plan(config, 1).memory["activations"] for name, config in CASES.items()}
    print(json.dumps({name: (planned[name], measured_in_interpreter(config)) for name, config in CASES.items()}))
