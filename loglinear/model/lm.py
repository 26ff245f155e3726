"""The decoder-only language model.

Shapes: b batch, t time, d model width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loglinear.config import ModelConfig
from loglinear.model.attention import KeyValueCache
from loglinear.model.block import Block
from loglinear.model.layers import Documents, RMSNorm
from loglinear.model.mixer import MixerState
from loglinear.ops.checks import at_least_fp32
from loglinear.ops.flops import linear_flops
from loglinear.ops.lambda_map import LambdaMap
from loglinear.ops.neighbours import cross_entropy


@dataclass(frozen=True)
class DecodeState:
    """One state a layer, after `position` tokens."""

    layers: tuple[MixerState | KeyValueCache, ...]
    position: int


class CrossEntropy(nn.Module):
    """Summed over the labels that are not -100, in nats."""

    def forward(self, logits_btv: torch.Tensor, labels_bt: torch.Tensor) -> torch.Tensor:
        """A scalar, fp32 at least, from logits [B, T, V] and int64 labels, as many."""
        return cross_entropy(logits_btv.flatten(0, 1), labels_bt.flatten())


class LanguageModel(nn.Module):
    """Embedding, `config.layers` blocks, norm, head.

    Attributes:
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.whole_logits = nn.Identity()
        self.loss = CrossEntropy()
        self._initialise(config)

    def forward(
        self,
        inputs_bt: torch.Tensor,
        labels_bt: torch.Tensor | None = None,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss that training needs.

        Args:
            inputs_bt: token ids, int64 [B, T].
            labels_bt: the next token of each, int64 [B, T], -100 where there is none to predict.
            documents: packed ones lie in the B * T tokens read row after row; without any, every row is a document.

        Returns:
            fp32: the cross-entropy summed over labels (a scalar, in nats) if there are labels, else logits [B, T, V].
        """
        logits_btv = self.head(self.hidden(inputs_bt, documents))
        if labels_bt is None:
            return self.whole_logits(at_least_fp32(logits_btv)).view(*inputs_bt.shape, -1)
        return self.loss(logits_btv, labels_bt)

    def hidden(self, inputs_bt: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """What the head reads of tokens [B, T], as in `forward`: [B, T, D], or [1, B * T, D] of packed documents."""
        batch, time = inputs_bt.shape
        documents = documents or Documents.rows(batch, time, 0, inputs_bt.device)
        x_btd = self.embedding(inputs_bt if documents.cu_seqlens is None else inputs_bt.view(1, -1))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_btd, _ = checkpoint(block, x_btd, documents, use_reentrant=True)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                x_btd, _ = block(x_btd, documents)
        return self.norm(x_btd)

    def initial_state(self, batch: int) -> DecodeState:
        """The state before the first token of `batch` documents."""
        return DecodeState(tuple(block.mixer.initial_state(batch) for block in self._blocks()), 0)

    def decode(self, tokens_bt: torch.Tensor, state: DecodeState) -> tuple[torch.Tensor, DecodeState]:
        """Read on from `state`: a prompt at once by the chunked form, a single token by the recurrent form.

        Args:
            tokens_bt: token ids, int64 [B, T].
            state: what came before.

        Returns:
            fp32 logits [B, V] after the last token, and the state there.
        """
        batch, time = tokens_bt.shape
        documents = Documents.rows(batch, time, state.position, tokens_bt.device)
        x_btd = self.embedding(tokens_bt)
        layers = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x_btd, after = block(x_btd, documents, before)
            layers.append(after)
        logits_bv = self.whole_logits(at_least_fp32(self.head(self.norm(x_btd[:, -1]))))
        return logits_bv, DecodeState(tuple(layers), state.position + time)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token, averaged over a document of `seq_len` tokens; training costs three times it."""
        return linear_flops(self.head) + sum(block.flops_per_token(seq_len) for block in self._blocks())

    def parameter_count(self) -> int:
        """Number of parameters; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _blocks(self) -> list[Block]:
        """The blocks, as what they are to a type checker."""
        return list(self.blocks)  # pyright: ignore[reportReturnType]

    def _initialise(self, config: ModelConfig) -> None:
        """Normal weights of `init_std`, those that write to the residual stream smaller by sqrt(2 * layers).

        Lambda maps initialise themselves: a generic start would undo lambda = 1.
        """
        own = {child for module in self.modules() if isinstance(module, LambdaMap) for child in module.modules()}
        for name, module in self.named_modules():
            if module in own or not isinstance(module, nn.Linear | nn.Embedding):
                continue
            writes_residual = name.endswith(("out_proj", "down"))
            std = config.init_std / (2 * config.layers) ** 0.5 if writes_residual else config.init_std
            nn.init.normal_(module.weight, std=std)


def build_model(config: ModelConfig, seed: int, *, activation_checkpointing: bool = False) -> LanguageModel:
    """A model whose weights depend on `config` and `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config, activation_checkpointing=activation_checkpointing)
