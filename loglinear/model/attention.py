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

from loglinear.config import ModelConfig
from loglinear.model.layers import Documents, rotate
from loglinear.ops.flops import linear_flops

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True)
class KeyValueCache:
    """Keys (already rotated) and values of all tokens so far, [B, S, H, P] each."""

    k_bshp: torch.Tensor
    v_bshp: torch.Tensor


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
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(
        self, x_btd: torch.Tensor, documents: Documents, state: KeyValueCache | None = None
    ) -> tuple[torch.Tensor, KeyValueCache | None]:
        """Mix along time within documents; arguments and result as in `LogLinearMixer.forward`."""
        q_bthp, k_bthp, v_bthp = (
            proj(x_btd).unflatten(2, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_bthp, k_bthp = (rotate(x, documents.positions_bt, self.rope_base) for x in (q_bthp, k_bthp))
        if state is not None:
            k_bthp, v_bthp = torch.cat([state.k_bshp, k_bthp], 1), torch.cat([state.v_bshp, v_bthp], 1)
            state = KeyValueCache(k_bthp, v_bthp)
        if documents.cu_seqlens is None:
            o_bthp = _sdpa(q_bthp, k_bthp, v_bthp)
        else:
            o_bthp = _packed(q_bthp, k_bthp, v_bthp, documents.cu_seqlens)
        return self.out_proj(o_bthp.flatten(2)), state

    def initial_state(self, batch: int) -> KeyValueCache:
        """The empty cache of `batch` documents, with the weights' dtype and device."""
        heads = self.k_proj.out_features // self.head_dim
        empty = self.k_proj.weight.new_zeros(batch, 0, heads, self.head_dim)
        return KeyValueCache(empty, empty)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token, averaged over a document of `seq_len` tokens; only the causal half counts."""
        width = self.q_proj.out_features
        layers = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return sum(map(linear_flops, layers)) + 2 * 2 * width * seq_len // 2


def _sdpa(q_bthp: torch.Tensor, k_bshp: torch.Tensor, v_bshp: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last T of S tokens: [B, T, H, P]."""
    queries, keys = q_bthp.shape[1], k_bshp.shape[1]
    mask_ts = None
    if 1 < queries < keys:
        mask_ts = torch.ones(queries, keys, dtype=torch.bool, device=q_bthp.device).tril(keys - queries)
    o_bhtp = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_bthp, k_bshp, v_bshp)), attn_mask=mask_ts, is_causal=queries == keys
    )
    return o_bhtp.transpose(1, 2)


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
        _sdpa(*(x[:, start:end] for x in (q_bthp, k_bthp, v_bthp))) for start, end in pairwise(bounds) if end > start
    ]
    return torch.cat(parts, 1)
