"""The model's part of the configuration: its mixers, their sizes and their order."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from loglinear.config_section import Section

LevelScaleName = Literal["none", "static", "scaled", "linear", "mlp", "mlp_token", "mlp_softmax", "mlp_masked_softmax"]
MixerName = Literal["log_linear", "softmax"]
BeyondName = Literal["error", "clamp", "extend", "one"]  # what levels get that were never trained


class LogLinearConfig(Section):
    """A log-linear mixer: H value heads of size P, G query/key groups of state size N.

    heads: H, the value heads.
    head_dim: P, the size of a value head.
    groups: G; each group of queries and keys serves heads / groups value heads.
    state_dim: N, the size of queries and keys.
    conv_width: tokens that the short causal convolution before the op reads.
    level_scale: how lambda, the weight of each bucket, is made.
    level_scale_hidden: hidden units of the lambda maps that are MLPs.
    beyond_trained_levels: lambda of levels that only longer sequences than the trained ones have: error refuses them,
        clamp repeats the last trained level's logit, extend its lambda, one takes 1.
    """

    heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    groups: PositiveInt = 1
    state_dim: PositiveInt = 64
    conv_width: PositiveInt = 4
    level_scale: LevelScaleName = "mlp"
    level_scale_hidden: PositiveInt = 64
    beyond_trained_levels: BeyondName = "clamp"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of groups ({self.groups})")
        return self


class SoftmaxConfig(Section):
    """A softmax attention mixer with rotary positions.

    heads: query heads, and as many of keys and values.
    head_dim: size of a head; even.
    rope_base: base of the rotary frequencies.
    """

    heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    rope_base: float = Field(default=10_000.0, gt=1.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, for rotary positions")
        return self


class ModelConfig(Section):
    """A decoder: blocks of a mixer and an MLP.

    vocab_size: rows of the embedding; at least as many as the tokenizer has pieces.
    seq_len: tokens of a training sequence.
    dim: width of the residual stream.
    layers: number of blocks.
    pattern: mixers of the first blocks, repeated along the depth.
    log_linear: settings of log-linear mixers.
    softmax: settings of softmax mixers.
    mlp_dim: hidden units of the gated MLP; with 0 a block is its mixer alone, as in studies of recall.
    tie_embeddings: whether the output layer is the embedding.
    norm_eps: epsilon of every RMSNorm.
    init_std: standard deviation of weights at the start; 1 / sqrt(2 layers) of it where they write to the residual.
    """

    vocab_size: PositiveInt = 4096
    seq_len: PositiveInt = 512
    dim: PositiveInt = 256
    layers: PositiveInt = 4
    pattern: tuple[MixerName, ...] = Field(default=("log_linear",), min_length=1)
    log_linear: LogLinearConfig = LogLinearConfig()
    softmax: SoftmaxConfig = SoftmaxConfig()
    mlp_dim: int = Field(default=768, ge=0)
    tie_embeddings: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.pattern) > self.layers:
            raise ValueError(f"pattern names {len(self.pattern)} mixers, but there are only {self.layers} layers")
        return self

    def mixer_of(self, layer: int) -> MixerName:
        """The mixer of layer `layer` (0-based): the pattern is repeated along the depth."""
        return self.pattern[layer % len(self.pattern)]
