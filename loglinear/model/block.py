"""One block of the decoder: a mixer and an MLP, each behind a norm and beside a residual."""

from __future__ import annotations

import torch
from torch import nn

from loglinear.config import ModelConfig
from loglinear.model.attention import KeyValueCache, SoftmaxMixer
from loglinear.model.layers import Documents, RMSNorm, SwiGLU
from loglinear.model.mixer import LogLinearMixer, MixerState

MIXERS = {"log_linear": LogLinearMixer, "softmax": SoftmaxMixer}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); `config.pattern` says which mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = MIXERS[config.mixer_of(layer)](config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_dim)

    def forward(
        self, x_btd: torch.Tensor, documents: Documents, state: MixerState | KeyValueCache | None = None
    ) -> tuple[torch.Tensor, MixerState | KeyValueCache | None]:
        """Shapes [B, T, D] in and out; `state` as in `LogLinearMixer.forward`."""
        mixed_btd, state = self.mixer(self.mixer_norm(x_btd), documents, state)
        x_btd = x_btd + mixed_btd
        return x_btd + self.mlp(self.mlp_norm(x_btd)), state

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token, averaged over a document of `seq_len` tokens, two per multiply-add."""
        return self.mixer.flops_per_token(seq_len) + self.mlp.flops_per_token()
