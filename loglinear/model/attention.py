"""The baseline mixer: causal softmax attention with rotary positions.

Shapes: b batch, t time (s of keys), d model width, h head, p head size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from loglinear.config import ModelConfig
from loglinear.model.layers import Documents, rotate
from loglinear.ops.flops import linear_flops
from loglinear.ops.projections import Projections

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True)
class KeyValueCache:
    """Keys (already rotated) and values of all tokens so far, [B, S, H, P] each.

    Attributes:
        lengths: int64 [B] on the CPU, tokens of each row; they stand in its last columns.
    """

    k_bshp: torch.Tensor
    v_bshp: torch.Tensor
    lengths: torch.Tensor

    def append(self, k_bthp: torch.Tensor, v_bthp: torch.Tensor, tokens: torch.Tensor) -> KeyValueCache:
        """The cache with T columns more; `tokens` int64 [B] of each row's are no padding. This one stays as it is."""
        k_bshp, v_bshp = torch.cat([self.k_bshp, k_bthp], 1), torch.cat([self.v_bshp, v_bthp], 1)
        return KeyValueCache(k_bshp, v_bshp, self.lengths + tokens)


class SoftmaxCore(nn.Module):
    """Attention itself; without weights, so that another can take its place."""

    def forward(
        self, q_bthp: torch.Tensor, k_bshp: torch.Tensor, v_bshp: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Outputs [B, T, H, P] of the last T of S tokens."""
        if documents.cu_seqlens is None:
            return causal_attention(q_bthp, k_bshp, v_bshp)
        return _packed(q_bthp, k_bshp, v_bshp, documents.cu_seqlens)


class SoftmaxMixer(nn.Module):
    """Multi-head softmax attention through torch's SDPA (FlashAttention, cuDNN), or flash-attn for packed documents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own, dim = config.softmax, config.dim
        self.head_dim, self.rope_base = own.head_dim, own.rope_base
        width = own.heads * own.head_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, width, bias=False)
        self.project: nn.Module = Projections()
        self.core: nn.Module = SoftmaxCore()
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(
        self, x_btd: torch.Tensor, documents: Documents, state: KeyValueCache | None = None
    ) -> tuple[torch.Tensor, KeyValueCache | None]:
        """Mix along time within documents; arguments and result as in `LogLinearMixer.forward`."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q_bthp, k_bthp, v_bthp = (x.unflatten(2, (-1, self.head_dim)) for x in self.project(x_btd, layers))
        q_bthp, k_bthp = (rotate(x, documents.positions_bt, self.rope_base) for x in (q_bthp, k_bthp))
        if state is None:
            o_bthp = self.core(q_bthp, k_bthp, v_bthp, documents)
        else:
            o_bthp, state = _attend_and_keep(q_bthp, k_bthp, v_bthp, documents, state)
        return self.out_proj(o_bthp.flatten(2)), state

    def initial_state(self, batch: int) -> KeyValueCache:
        """The empty cache of `batch` documents, with the weights' dtype and device."""
        heads = self.k_proj.out_features // self.head_dim
        empty = self.k_proj.weight.new_zeros(batch, 0, heads, self.head_dim)
        return KeyValueCache(empty, empty, torch.zeros(batch, dtype=torch.int64))

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token, averaged over a document of `seq_len` tokens; only the causal half counts."""
        width = self.q_proj.out_features
        layers = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return sum(map(linear_flops, layers)) + 2 * 2 * width * seq_len // 2


def causal_attention(
    q_bthp: torch.Tensor, k_bshp: torch.Tensor, v_bshp: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention of the last T of S tokens: [B, T, H, P].

    Args:
        q_bthp: queries of the last T columns.
        k_bshp: keys.
        v_bshp: values.
        lengths: int64 [B], tokens of each row, in its last columns; None if all are full.
    """
    queries, keys = q_bthp.shape[1], k_bshp.shape[1]
    mask = None
    if lengths is None and 1 < queries < keys:
        mask = causal_lower_right(queries, keys)  # which no GPU kernel needs memory for
    if lengths is not None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_bthp.device).tril(keys - queries)
        known_bs = torch.arange(keys) >= keys - lengths[:, None]
        at_t = torch.arange(keys - queries, keys, device=q_bthp.device)
        own_ts = torch.arange(keys, device=q_bthp.device) == at_t[:, None]  # padding must see something
        mask = (mask & known_bs[:, None, None].to(q_bthp.device)) | own_ts
    o_bhtp = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_bthp, k_bshp, v_bshp)), attn_mask=mask, is_causal=mask is None and queries > 1
    )
    return o_bhtp.transpose(1, 2)


def _attend_and_keep(
    q_bthp: torch.Tensor, k_bthp: torch.Tensor, v_bthp: torch.Tensor, documents: Documents, cache: KeyValueCache
) -> tuple[torch.Tensor, KeyValueCache]:
    """Causal attention behind the tokens of a cache, and the cache after these; packed ones lie in rows meanwhile."""
    if documents.cu_seqlens is None:
        new = torch.full_like(cache.lengths, q_bthp.shape[1])
    else:
        new = documents.cu_seqlens.diff().to(torch.int64)
        q_bthp, k_bthp, v_bthp = (_to_rows(documents.pieces(x)) for x in (q_bthp, k_bthp, v_bthp))
    cache = cache.append(k_bthp, v_bthp, new)
    ragged = cache.lengths if int(cache.lengths.min()) < cache.k_bshp.shape[1] else None
    o_bthp = causal_attention(q_bthp, cache.k_bshp, cache.v_bshp, ragged)
    if documents.cu_seqlens is not None:
        rows = zip(o_bthp, new.tolist(), strict=True)
        o_bthp = torch.cat([o_thp[len(o_thp) - length :] for o_thp, length in rows])[None]
    return o_bthp, cache


def _to_rows(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Packed documents as rows that are padded on the left: [B, T, ...]."""
    return nn.utils.rnn.pad_sequence([piece[0] for piece in pieces], batch_first=True, padding_side="left")


def _packed(q_bthp: torch.Tensor, k_bthp: torch.Tensor, v_bthp: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Causal attention within each document of one row: [1, T, H, P]."""
    bounds = cu_seqlens.tolist()
    if HAS_FLASH_ATTN and q_bthp.is_cuda and q_bthp.dtype in (torch.float16, torch.bfloat16):
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        longest = max(end - start for start, end in pairwise(bounds))
        boundaries = cu_seqlens.to(q_bthp.device, torch.int32)
        rows = (x[0] for x in (q_bthp, k_bthp, v_bthp))
        return flash_attn_varlen_func(*rows, boundaries, boundaries, longest, longest, causal=True)[None]
    parts = [
        causal_attention(*(x[:, start:end] for x in (q_bthp, k_bthp, v_bthp)))
        for start, end in pairwise(bounds)
        if end > start
    ]
    return torch.cat(parts, 1)
