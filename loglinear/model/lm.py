"""The decoder-only language model.

Shapes: b batch, t time, d model width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loglinear.config import ModelConfig
from loglinear.errors import UserError
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
    """One state a layer, and int64 [B] on the CPU: after how many tokens of each document."""

    layers: tuple[MixerState | KeyValueCache, ...]
    positions: torch.Tensor


class CrossEntropy(nn.Module):
    """Summed over the labels that are not -100, in nats."""

    def forward(self, logits_btv: torch.Tensor, labels_bt: torch.Tensor) -> torch.Tensor:
        """A scalar, fp32 at least, from logits [B, T, V] and int64 labels, as many."""
        return cross_entropy(logits_btv.flatten(0, 1), labels_bt.flatten())


class LanguageModel(nn.Module):
    """Embedding, `config.layers` blocks, norm, head.

    Attributes:
        recomputed_blocks: the first so many are computed again in the backward pass instead of keeping their
            activations. The first, because by then the activations of those behind them are spent.
    """

    def __init__(self, config: ModelConfig, *, recomputed_blocks: int = 0) -> None:
        super().__init__()
        self.recomputed_blocks = recomputed_blocks
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
        for index, block in enumerate(self.blocks):
            if index < self.recomputed_blocks and torch.is_grad_enabled():
                x_btd, _ = checkpoint(block, x_btd, documents, use_reentrant=True)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                x_btd, _ = block(x_btd, documents)
        return self.norm(x_btd)

    def initial_state(self, batch: int) -> DecodeState:
        """The state before the first token of `batch` documents."""
        layers = tuple(block.mixer.initial_state(batch) for block in self._blocks())
        return DecodeState(layers, torch.zeros(batch, dtype=torch.int64))

    def decode(self, tokens_bt: torch.Tensor, state: DecodeState) -> tuple[torch.Tensor, DecodeState]:
        """Read on from `state`: a prompt at once by the chunked form, a single token by the recurrent form.

        Args:
            tokens_bt: token ids, int64 [B, T].
            state: what came before.

        Returns:
            fp32 logits [B, V] after the last token, and the state there.
        """
        x_btd, state = self.read(tokens_bt, state)
        return self.logits(x_btd[:, -1]), state

    def read(
        self, tokens_bt: torch.Tensor, state: DecodeState, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, DecodeState]:
        """Read on from `state`, documents of different lengths too.

        Args:
            tokens_bt: token ids, int64 [B, T].
            state: what came before.
            lengths: int64 [B] on the CPU, tokens of each row, which stand in its last columns: what lies before them
                is padding, and no token of that document came before it. None if there is no padding.

        Returns:
            [B, T, D], what `logits` takes (zero at padding), and the state after the last tokens.

        Raises:
            UserError: there is padding between the tokens of a document.
        """
        batch, time = tokens_bt.shape
        if lengths is not None and bool(((lengths < time) & (state.positions > 0)).any()):
            raise UserError("a row has padding behind its first tokens: pad on the left, before the first token")
        is_token_bt = None
        if lengths is None or int(lengths.min()) == time:
            documents = Documents.rows(batch, time, state.positions, tokens_bt.device)
        else:
            bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            documents = Documents.packed(bounds, tokens_bt.device, state.positions)
            is_token_bt = (torch.arange(time) >= time - lengths[:, None]).to(tokens_bt.device)
            tokens_bt = tokens_bt[is_token_bt][None]
        x_btd = self.embedding(tokens_bt)
        layers = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x_btd, after = block(x_btd, documents, before)
            layers.append(after)
        if is_token_bt is not None:
            x_btd = x_btd.new_zeros(batch, time, x_btd.shape[2]).masked_scatter(is_token_bt[..., None], x_btd)
        return x_btd, DecodeState(tuple(layers), state.positions + (time if lengths is None else lengths))

    def logits(self, x_btd: torch.Tensor) -> torch.Tensor:
        """fp32 logits [..., V] of what the last block gave, [..., D]."""
        return self.whole_logits(at_least_fp32(self.head(self.norm(x_btd))))

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


def build_model(config: ModelConfig, seed: int, *, recomputed_blocks: int = 0) -> LanguageModel:
    """A model whose weights depend on `config` and `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config, recomputed_blocks=recomputed_blocks)
