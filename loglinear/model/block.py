"""One block of the decoder: a mixer and an MLP, each behind a norm and beside a residual."""

from __future__ import annotations

import torch
from torch import nn

from loglinear.config import ModelConfig
from loglinear.model.attention import KeyValueCache, SoftmaxMixer
from loglinear.model.layers import Documents, PreNorm, SwiGLU
from loglinear.model.mixer import LogLinearMixer, MixerState

MIXERS = {"log_linear": LogLinearMixer, "softmax": SoftmaxMixer}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) if there is an MLP; `config.pattern` says which mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = PreNorm(config.dim, config.norm_eps)
        self.mixer = MIXERS[config.mixer_of(layer)](config)
        self.mlp_norm = PreNorm(config.dim, config.norm_eps) if config.mlp_dim else None
        self.mlp = SwiGLU(config.dim, config.mlp_dim) if config.mlp_dim else None

    def forward(
        self, x_btd: torch.Tensor, documents: Documents, state: MixerState | KeyValueCache | None = None
    ) -> tuple[torch.Tensor, MixerState | KeyValueCache | None]:
        """Shapes [B, T, D] in and out; `state` as in `LogLinearMixer.forward`."""
        normed_btd, x_btd = self.mixer_norm(x_btd)
        mixed_btd, state = self.mixer(normed_btd, documents, state)
        if self.mlp is None or self.mlp_norm is None:
            return x_btd + mixed_btd, state
        normed_btd, x_btd = self.mlp_norm(x_btd, mixed_btd)
        return x_btd + self.mlp(normed_btd), state

    def step(self, x_bd: torch.Tensor, documents: Documents, state: MixerState) -> torch.Tensor:
        """`forward` of one token of each document, [B, D] in and out; as `LogLinearMixer.step`, which the mixer has."""
        assert isinstance(self.mixer, LogLinearMixer)
        x_bd = self.mixer.step(x_bd, self.mixer_norm, documents, state)
        if self.mlp is None or self.mlp_norm is None:
            return x_bd
        return self.mlp.step(x_bd, self.mlp_norm)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token, averaged over a document of `seq_len` tokens, two per multiply-add."""
        mlp = 0 if self.mlp is None else self.mlp.flops_per_token()
        return self.mixer.flops_per_token(seq_len) + mlp
