"""AdamW with weight decay on matrices alone."""

from __future__ import annotations

import torch
from torch import nn

from loglinear.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over two groups: weights of at least two dimensions decay; norms, biases and decay rates do not.

    Source: arXiv 1711.05101. The learning rate is set before every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
