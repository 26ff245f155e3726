"""The small layers that every block shares.

Shapes: b batch, t time, c channel, d model width, h head, p head size, w taps of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from loglinear.ops.checks import at_least_fp32
from loglinear.ops.flops import linear_flops
from loglinear.ops.neighbours import (
    causal_conv_silu,
    linear_onto,
    norm_gated_linear,
    rms_norm,
    rms_norm_and_residual,
    silu_product,
    skip_gate_norm,
)
from loglinear.ops.projections import Projections


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a batch, and where in its own document each token stands.

    Attributes:
        positions_bt: int64 [B, T], 0 at the first token of a document.
        length: at least the largest position + 1; known on the host, so that nobody waits for the GPU to learn it.
        cu_seqlens: int32 [documents + 1], boundaries of the documents packed into one row (then B = 1), or None
            when every row is one document.
    """

    positions_bt: torch.Tensor
    length: int
    cu_seqlens: torch.Tensor | None = None

    @staticmethod
    def rows(batch: int, time: int, start: int | torch.Tensor, device: torch.device) -> Documents:
        """Every row is one document, of which `start` tokens came before: one number, or int64 [B] on the CPU."""
        if isinstance(start, torch.Tensor) and bool((start == start[0]).all()):
            start = int(start[0])
        if isinstance(start, int):  # made there, because a CUDA graph cannot copy from the CPU
            return Documents(torch.arange(start, start + time, device=device).expand(batch, time), start + time)
        start_b1 = start[:, None]
        positions_bt = (start_b1 + torch.arange(time)).to(device, non_blocking=True)
        return Documents(positions_bt, int(start_b1.max()) + time)

    @staticmethod
    def packed(cu_seqlens: torch.Tensor, device: torch.device, starts: torch.Tensor | None = None) -> Documents:
        """Documents side by side in one row.

        Args:
            cu_seqlens: int32 boundaries [documents + 1] on the CPU, the last of them T.
            device: where the positions go.
            starts: int64 [documents] on the CPU, tokens of each that came before; None for none.
        """
        lengths = cu_seqlens.diff()
        starts = torch.zeros_like(lengths) if starts is None else starts
        zero_t = (cu_seqlens[:-1] - starts).to(torch.int64).repeat_interleave(lengths)
        positions_t = torch.arange(len(zero_t)) - zero_t
        return Documents(positions_t[None].to(device, non_blocking=True), int((starts + lengths).max()), cu_seqlens)

    def pieces(self, x_btc: torch.Tensor) -> list[torch.Tensor]:
        """Each packed document's own part of x [1, T, ...]: as many tensors [1, length, ...]."""
        assert self.cu_seqlens is not None
        return list(x_btc.split(self.cu_seqlens.diff().tolist(), 1))


class ShortConv(nn.Module):
    """A causal depthwise convolution over the last `width` tokens of the same document, then SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Conv1d initialises: uniform within 1 / sqrt(taps)."""
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_btc: torch.Tensor, documents: Documents, past_bwc: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes [B, T, C] in and out; `past_bwc` [B, width - 1, C] are the inputs before the first token."""
        packed = documents.cu_seqlens is not None
        return causal_conv_silu(x_btc, self.weight, self.bias, documents.positions_bt, past_bwc, packed=packed)


class GatedRMSNorm(nn.Module):
    """RMSNorm((o + skip * v) * silu(z)) within each head, one weight of [P] for all heads.

    Within heads rather than across them, so that heads can lie on different ranks.
    Source: Mamba-2, arXiv 2405.21060.
    """

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(
        self, o_bthp: torch.Tensor, v_bthp: torch.Tensor, z_bthp: torch.Tensor, skip_h: torch.Tensor
    ) -> torch.Tensor:
        """Shapes [B, T, H, P] in and out, and [H]."""
        return skip_gate_norm(o_bthp, v_bthp, z_bthp, skip_h, self.weight, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight. Source: arXiv 1910.07467."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        """Shapes [B, T, D] in and out."""
        return rms_norm(x_btd, self.weight, self.eps)


class PreNorm(RMSNorm):
    """The norm that begins a half of a block, and the residual beside it."""

    def forward(self, x_btd: torch.Tensor, addend_btd: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual x normalised, and x, after `addend` of the half before is added to it: [B, T, D] in and out."""
        return rms_norm_and_residual(x_btd, addend_btd, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.project: nn.Module = Projections()

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        """Shapes [B, T, D] in and out."""
        return self.down(silu_product(*self.project(x_btd, (self.gate, self.up))))

    def step(self, x_bd: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """x + self(norm(x)) for one token of each document, [B, D] in and out, without gradients or hooks."""
        hidden_be = norm_gated_linear(x_bd, norm.weight, norm.eps, self.gate.weight, self.up.weight)
        return linear_onto(x_bd, hidden_be, self.down.weight)

    def flops_per_token(self) -> int:
        """Forward FLOPs of a token, two per multiply-add."""
        return sum(linear_flops(layer) for layer in (self.gate, self.up, self.down))


def rotate(x_bthp: torch.Tensor, positions_bt: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions: pairs (i, i + P / 2) turned by position * base^(-2 i / P). Source: arXiv 2104.09864.

    Args:
        x_bthp: queries or keys [B, T, H, P], P even.
        positions_bt: int64 [B, T].
        base: wavelength of the slowest pair over 2 pi, about.
    """
    half = x_bthp.shape[-1] // 2
    exact = at_least_fp32(x_bthp)
    frequency_p = base ** (-torch.arange(half, device=x_bthp.device, dtype=exact.dtype) / half)
    angle_bt1p = (positions_bt[..., None] * frequency_p)[:, :, None]
    cos, sin = angle_bt1p.cos(), angle_bt1p.sin()
    first, second = exact.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_bthp.dtype)
