"""Tiny models for tests. Shapes: b batch, t time, v vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loglinear.config import LogLinearConfig, MixerName, ModelConfig, SoftmaxConfig
from loglinear.model import LanguageModel, build_model
from loglinear.model.mixer import LogLinearMixer
from loglinear.ops.lambda_map import LambdaMap

VOCAB = 23
PATTERNS: dict[str, tuple[MixerName, ...]] = {
    "log_linear": ("log_linear",),
    "softmax": ("softmax",),
    "hybrid": ("log_linear", "softmax"),
}


def tiny(pattern: tuple[MixerName, ...] = ("log_linear",), **changes: Any) -> ModelConfig:
    """Two layers of sizes that are all different."""
    settings = {
        "vocab_size": VOCAB,
        "seq_len": 128,
        "dim": 16,
        "layers": 2,
        "pattern": pattern,
        "log_linear": LogLinearConfig(heads=4, head_dim=6, groups=2, state_dim=5, conv_width=4, level_scale_hidden=7),
        "softmax": SoftmaxConfig(heads=3, head_dim=8),
        "mlp_dim": 20,
    }
    return ModelConfig.model_validate({**settings, **changes})


def awake(config: ModelConfig, **options: Any) -> LanguageModel:
    """A model in mid-training: weights are large enough to see, memory is long, and lambda depends on the token."""
    model = build_model(config.model_copy(update={"init_std": 0.25}), seed=1, **options)
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, LambdaMap):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
        if isinstance(module, LogLinearMixer):
            nn.init.uniform_(module.A_log, -5.0, -3.0)
            nn.init.uniform_(module.dt_bias, 0.0, 1.0)
    return model


def random_tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient by name; none may be missing."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def assert_same_gradients(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding in fp32, relative to each gradient's norm."""
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (actual[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6, name
