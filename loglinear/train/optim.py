"""AdamW with weight decay on matrices alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loglinear.config import OptimizerConfig


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose update can be refused at the last moment, when DeepSpeed has summed up the gradient.

    Attributes:
        allowed: asked before every update; if it says no, weights, moments and the count of updates stay.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Any = None) -> Any:
        """Update, if that is allowed."""
        return super().step(closure) if self.allowed() else None


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> GuardedAdamW:
    """AdamW over two groups: weights of at least two dimensions decay; norms, biases and decay rates do not.

    So the tables of heads and levels that `static`, `scaled` and `linear` lambda maps learn decay as matrices do.

    Source: arXiv 1711.05101. The learning rate is set before every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return GuardedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
