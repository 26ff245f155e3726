"""The adaptive log-linear mixer: Mamba-2's block around log-linear attention.

Shapes: b batch, t time, d model width, h value head, g query/key group, n state (key) size, p value head size,
l level, w taps of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loglinear.config import ModelConfig
from loglinear.model.layers import Documents, GatedRMSNorm, RMSNorm, ShortConv
from loglinear.ops import (
    LogLinearState,
    StateInPlace,
    log_linear_attention,
    num_levels,
    recurrent_step,
    recurrent_step_in_place,
)
from loglinear.ops.flops import attention_flops, linear_flops
from loglinear.ops.lambda_map import make_lambda_map
from loglinear.ops.neighbours import discretise, norm_linears, skip_gate_norm_onto, step_inputs
from loglinear.ops.projections import Layer, Projections, weights_of

DECAY_RANGE = (1.0, 16.0)  # of A at the start, uniform, as in Mamba-2
STEP_RANGE = (1e-3, 1e-1)  # of softplus(dt bias) at the start, log-uniform, as in Mamba-2


@dataclass(frozen=True)
class MixerState:
    """What the mixer remembers between calls.

    Attributes:
        memory: the buckets, O(log T) matrices per head.
        recent: inputs of the three convolutions at the last width - 1 tokens, [documents, width - 1, channels] each.
    """

    memory: LogLinearState | StateInPlace
    recent: tuple[torch.Tensor, ...]


class LogLinearCore(nn.Module):
    """The op over many tokens, or its decoding step for one; without weights, so that another can take its place."""

    def forward(
        self,
        memory: LogLinearState | None,
        q_btgn: torch.Tensor,
        k_btgn: torch.Tensor,
        v_bthp: torch.Tensor,
        g_bth: torch.Tensor,
        scales_bthl: torch.Tensor | None,
        documents: Documents,
    ) -> tuple[torch.Tensor, LogLinearState | None]:
        """Outputs [B, T, H, P], and the memory after the last token if one was given."""
        if memory is not None and v_bthp.shape[1] == 1 and documents.cu_seqlens is None:
            q, k, v, g = (x[:, 0] for x in (q_btgn, k_btgn, v_bthp, g_bth))
            scales = None if scales_bthl is None else scales_bthl[:, 0]
            o_bhp, memory = recurrent_step(memory, q, k, v, g, scales)
            return o_bhp[:, None], memory
        return log_linear_attention(
            q_btgn,
            k_btgn,
            v_bthp,
            g_bth,
            scales_bthl,
            initial_state=memory,
            output_final_state=memory is not None,
            cu_seqlens=documents.cu_seqlens,
        )


class Convolutions(nn.Module):
    """The short convolutions of q, k and v; their weights are the mixer's, so that another can take its place."""

    def forward(
        self,
        convs: Sequence[ShortConv],
        inputs: Sequence[torch.Tensor],
        pasts: Sequence[torch.Tensor | None],
        documents: Documents,
    ) -> list[torch.Tensor]:
        """[B, T, C] each in and out, behind what came before [documents, width - 1, C]."""
        return [_convolve(*each, documents) for each in zip(convs, inputs, pasts, strict=True)]


class LogLinearMixer(nn.Module):
    """q, k, v, gate z, step dt and level scales from x; short convolutions; log-linear attention; gated norm.

    Sources: Mamba-2 (arXiv 2405.21060), log-linear attention (2506.04761), its adaptive form (2605.06946).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own, dim = config.log_linear, config.dim
        self.head_dim, self.state_dim = own.head_dim, own.state_dim
        keys, values = own.groups * own.state_dim, own.heads * own.head_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.z_proj = nn.Linear(dim, values, bias=False)
        self.dt_proj = nn.Linear(dim, own.heads, bias=False)
        self.project: nn.Module = Projections()
        self.q_conv = ShortConv(keys, own.conv_width)
        self.k_conv = ShortConv(keys, own.conv_width)
        self.v_conv = ShortConv(values, own.conv_width)
        self.convolve: nn.Module = Convolutions()
        self.lambda_map = make_lambda_map(
            own.level_scale,
            dim=dim,
            heads=own.heads,
            levels=num_levels(config.seq_len),
            hidden=own.level_scale_hidden,
            beyond=own.beyond_trained_levels,
        )
        self.dt_bias = nn.Parameter(torch.empty(own.heads))
        self.A_log = nn.Parameter(torch.empty(own.heads))
        self.D = nn.Parameter(torch.empty(own.heads))
        self.core: nn.Module = LogLinearCore()
        self.norm = GatedRMSNorm(own.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decay, step and skip as Mamba-2 starts them."""
        with torch.no_grad():
            self.A_log.uniform_(*DECAY_RANGE).log_()
            step_h = torch.empty_like(self.dt_bias).uniform_(*map(math.log, STEP_RANGE)).exp()
            self.dt_bias.copy_(step_h + torch.log(-torch.expm1(-step_h)))  # the inverse of softplus
            self.D.fill_(1.0)

    def forward(
        self, x_btd: torch.Tensor, documents: Documents, state: MixerState | None = None
    ) -> tuple[torch.Tensor, MixerState | None]:
        """Mix along time within documents.

        Args:
            x_btd: [B, T, D].
            documents: positions and boundaries of the B x T tokens.
            state: what came before the first token; None to start afresh and remember nothing.

        Returns:
            [B, T, D], and the state after the last token if a state was given.
        """
        convs = (self.q_conv, self.k_conv, self.v_conv)
        q, k, v, z, raw_bth, *of_token = self.project(x_btd, self._token_layers())
        inputs = [q, k, v]
        past = (None, None, None) if state is None else state.recent
        q, k, v = self.convolve(convs, inputs, past, documents)
        q_btgn, k_btgn = (x.unflatten(2, (-1, self.state_dim)) for x in (q, k))
        v_bthp, z_bthp = (x.unflatten(2, (-1, self.head_dim)) for x in (v, z))
        g_bth, weighted_bthp, v_bthp = discretise(raw_bth, self.dt_bias, self.A_log, v_bthp)
        scales_bthl = self.lambda_map(of_token, documents.positions_bt, documents.length)
        memory = None if state is None else state.memory
        assert not isinstance(memory, StateInPlace)
        o_bthp, memory = self.core(memory, q_btgn, k_btgn, weighted_bthp, g_bth, scales_bthl, documents)

        y_btc = self.norm(o_bthp, v_bthp, z_bthp, self.D).flatten(2)
        if state is None or memory is None:
            return self.out_proj(y_btc), None
        return self.out_proj(y_btc), MixerState(memory, _recent(state.recent, inputs, documents))

    def step(self, x_bd: torch.Tensor, norm: RMSNorm, documents: Documents, state: MixerState) -> torch.Tensor:
        """x + self(norm(x)) for one token of each document, on a GPU, in few launches and without gradients or hooks.

        Args:
            x_bd: [B, D], contiguous.
            norm: what stands before the mixer.
            documents: positions [B, 1] of the tokens.
            state: in place; overwritten, but for its positions.

        Returns:
            [B, D].
        """
        assert isinstance(state.memory, StateInPlace)
        q, k, v, z, raw_bh, *of_token = norm_linears(x_bd, norm.weight, norm.eps, weights_of(self._token_layers()))
        convs = (self.q_conv, self.k_conv, self.v_conv)
        taps, biases = tuple(conv.weight for conv in convs), tuple(conv.bias for conv in convs)
        steps = (raw_bh, self.dt_bias, self.A_log, state.memory.sums_sh)
        q, k, v, weighted = step_inputs((q, k, v), taps, biases, state.recent, *steps)
        q_bgn, k_bgn = (x.unflatten(1, (-1, self.state_dim)) for x in (q, k))
        v_bhp, z_bhp, weighted_bhp = (x.unflatten(1, (-1, self.head_dim)) for x in (v, z, weighted))
        of_token = [x_be[:, None] for x_be in of_token]
        scales_b1hl = self.lambda_map(of_token, documents.positions_bt, documents.length)
        scales_bhl = None if scales_b1hl is None else scales_b1hl[:, 0]
        o_bhp = recurrent_step_in_place(state.memory, q_bgn, k_bgn, weighted_bhp, scales_bhl)
        gate = (self.D, self.norm.weight, self.norm.eps)
        return skip_gate_norm_onto(x_bd, o_bhp, v_bhp, z_bhp, *gate, self.out_proj.weight)

    def _token_layers(self) -> tuple[Layer, ...]:
        """All linear layers that read the input: q, k, v, z, dt, and those of the lambda map."""
        own = (self.q_proj, self.k_proj, self.v_proj, self.z_proj, self.dt_proj)
        return (*own, *self.lambda_map.token_layers())

    def initial_state(self, batch: int) -> MixerState:
        """The state before the first token of `batch` documents, in fp32, with the weights' device."""
        weight, reach = self.q_proj.weight, self.q_conv.width - 1
        heads = self.v_proj.out_features // self.head_dim  # a weight's own shape is gone while ZeRO 3 holds it
        memory = LogLinearState.empty(batch, heads, self.state_dim, self.head_dim, device=weight.device)
        recent = tuple(
            weight.new_zeros(batch, reach, proj.out_features) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return MixerState(memory, recent)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of a token, averaged over a document of `seq_len` tokens, two per multiply-add."""
        layers = (self.q_proj, self.k_proj, self.v_proj, self.z_proj, self.dt_proj, self.out_proj)
        heads = self.dt_proj.out_features
        groups = self.q_proj.out_features // self.state_dim
        attention = attention_flops(seq_len, heads, groups, self.state_dim, self.head_dim)
        return sum(map(linear_flops, layers)) + self.lambda_map.flops_per_token() + attention


def _convolve(
    conv: nn.Module, x_btc: torch.Tensor, past_swc: torch.Tensor | None, documents: Documents
) -> torch.Tensor:
    """The convolution of each document behind its past: packed ones one by one, since each has a past of its own."""
    if past_swc is None or documents.cu_seqlens is None:
        return conv(x_btc, documents, past_swc)
    positions = documents.pieces(documents.positions_bt)
    alone = (Documents(positions_1t, documents.length) for positions_1t in positions)
    return torch.cat(list(map(conv, documents.pieces(x_btc), alone, past_swc.split(1))), 1)


def _recent(
    past: tuple[torch.Tensor, ...], inputs: list[torch.Tensor], documents: Documents
) -> tuple[torch.Tensor, ...]:
    """The last width - 1 inputs of each convolution, after these."""
    if documents.cu_seqlens is None:
        return tuple(map(_last, past, inputs))
    return tuple(
        torch.cat(list(map(_last, before.split(1), documents.pieces(x))))
        for before, x in zip(past, inputs, strict=True)
    )


def _last(before_bwc: torch.Tensor, x_btc: torch.Tensor) -> torch.Tensor:
    """As many of the last inputs as were given from before."""
    reach = before_bwc.shape[1]
    return torch.cat([before_bwc, x_btc], 1)[:, -reach:] if reach else before_bwc
