"""The parts of a block against what they are by definition.

Shapes: b batch, t time (s of keys), d model width, c channel, h head, n state (key) size, p head size.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from loglinear.config import ModelConfig
from loglinear.model.attention import SoftmaxMixer
from loglinear.model.layers import Documents, GatedRMSNorm, ShortConv, SwiGLU, rotate
from loglinear.model.mixer import LogLinearMixer
from loglinear.ops import naive_log_linear_attention
from loglinear.ops.projections import weights_of
from tests.model.model_cases import awake, tiny

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixer_of(model: torch.nn.Module, kind: type[torch.nn.Module]) -> torch.nn.Module:
    return next(module for module in model.modules() if isinstance(module, kind))


def conv1d(conv: ShortConv, x_btc: torch.Tensor) -> torch.Tensor:
    """The same convolution by torch's own: tap `back` reads the token `back` places before."""
    weight_c1w = conv.weight.flip(0).t()[:, None]
    padded_bct = F.pad(x_btc.transpose(1, 2), (conv.width - 1, 0))
    return F.silu(F.conv1d(padded_bct, weight_c1w, conv.bias, groups=x_btc.shape[2])).transpose(1, 2)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 9])
def test_short_convolution_is_torchs_own(width: int, time: int) -> None:
    conv, x_btc = ShortConv(5, width), normal(2, time, 5)
    torch.testing.assert_close(conv(x_btc, Documents.rows(2, time, 0, CPU)), conv1d(conv, x_btc))


def test_short_convolution_stops_at_documents() -> None:
    conv, x_btc = ShortConv(5, 4), normal(1, 12, 5)
    bounds = torch.tensor([0, 1, 1, 3, 12], dtype=torch.int32)
    parts = [conv1d(conv, x_btc[:, start:end]) for start, end in ((0, 1), (1, 3), (3, 12))]
    torch.testing.assert_close(conv(x_btc, Documents.packed(bounds, CPU)), torch.cat(parts, 1))


def test_short_convolution_goes_on_from_its_past() -> None:
    conv, x_btc = ShortConv(5, 4), normal(2, 12, 5)
    later_btc = conv(x_btc[:, 5:], Documents.rows(2, 7, 5, CPU), x_btc[:, 2:5])
    torch.testing.assert_close(later_btc, conv1d(conv, x_btc)[:, 5:])


def test_documents_know_positions_and_the_longest() -> None:
    documents = Documents.packed(torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32), CPU)
    assert documents.positions_bt.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert documents.length == 5
    rows = Documents.rows(2, 3, 4, CPU)
    assert rows.positions_bt.tolist() == [[4, 5, 6]] * 2
    assert rows.length == 7


def log_linear_by_hand(mixer: LogLinearMixer, config: ModelConfig, x_btd: torch.Tensor) -> torch.Tensor:
    """The mixer as its papers write it, around the naive op."""
    own, time = config.log_linear, x_btd.shape[1]
    q, k, v = (
        conv1d(conv, x_btd @ proj.weight.t())
        for conv, proj in (
            (mixer.q_conv, mixer.q_proj),
            (mixer.k_conv, mixer.k_proj),
            (mixer.v_conv, mixer.v_proj),
        )
    )
    q_btgn, k_btgn = (x.unflatten(2, (own.groups, own.state_dim)) for x in (q, k))
    v_bthp = v.unflatten(2, (own.heads, own.head_dim))
    step_bth = torch.log1p(torch.exp(x_btd @ mixer.dt_proj.weight.t() + mixer.dt_bias))
    g_bth = -mixer.A_log.exp() * step_bth
    of_token = [x_btd @ weight_ed.t() for weight_ed in weights_of(mixer.lambda_map.token_layers())]
    scales_bthl = mixer.lambda_map(of_token, torch.arange(time).expand(len(x_btd), -1), time)
    o_bthp, _ = naive_log_linear_attention(q_btgn, k_btgn, step_bth[..., None] * v_bthp, g_bth, scales_bthl)
    o_bthp = o_bthp + mixer.D[:, None] * v_bthp
    gated_bthp = o_bthp * F.silu(x_btd @ mixer.z_proj.weight.t()).view_as(o_bthp)
    size = (gated_bthp.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return (gated_bthp / size * mixer.norm.weight).flatten(2) @ mixer.out_proj.weight.t()


def test_log_linear_mixer_is_what_it_says() -> None:
    config, x_btd = tiny(), normal(2, 70, 16)
    mixer = mixer_of(awake(config), LogLinearMixer)
    assert isinstance(mixer, LogLinearMixer)
    torch.nn.init.uniform_(mixer.D)
    torch.nn.init.uniform_(mixer.norm.weight)
    y_btd, state = mixer(x_btd, Documents.rows(2, 70, 0, CPU))
    assert state is None
    torch.testing.assert_close(y_btd, log_linear_by_hand(mixer, config, x_btd), rtol=1e-4, atol=1e-4)


def turned(x_bthp: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions as multiplication by complex numbers exp(i t base^(-2 j / P))."""
    half = x_bthp.shape[-1] // 2
    pairs_bthp = torch.complex(*x_bthp.double().split(half, -1))
    frequency_p = torch.tensor([base ** (-2 * j / (2 * half)) for j in range(half)], dtype=torch.float64)
    angle_tp = torch.arange(x_bthp.shape[1], dtype=torch.float64)[:, None] * frequency_p
    turned_bthp = pairs_bthp * torch.polar(torch.ones_like(angle_tp), angle_tp)[:, None]
    return torch.cat([turned_bthp.real, turned_bthp.imag], -1).float()


def test_softmax_mixer_is_what_it_says() -> None:
    config, x_btd = tiny(("softmax",)), normal(2, 30, 16)
    mixer = mixer_of(awake(config), SoftmaxMixer)
    assert isinstance(mixer, SoftmaxMixer)
    q, k, v = ((x_btd @ proj.weight.t()).view(2, 30, 3, 8) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores_bhts = torch.einsum("bthp,bshp->bhts", turned(q, 1e4), turned(k, 1e4)) / math.sqrt(8)
    future_ts = torch.ones(30, 30).triu(1).bool()
    shares_bhts = scores_bhts.masked_fill(future_ts, -torch.inf).softmax(-1)
    wanted_btd = torch.einsum("bhts,bshp->bthp", shares_bhts, v).flatten(2) @ mixer.out_proj.weight.t()
    y_btd, state = mixer(x_btd, Documents.rows(2, 30, 0, CPU))
    assert state is None
    torch.testing.assert_close(y_btd, wanted_btd, rtol=1e-4, atol=1e-4)


def test_rotary_positions_are_relative() -> None:
    q, k = normal(1, 6, 2, 8), normal(1, 6, 2, 8, seed=1)
    scores = []
    for shift in (0, 1000):
        positions_bt = torch.arange(6)[None] + shift
        scores.append(torch.einsum("bthp,bshp->bhts", rotate(q, positions_bt, 1e4), rotate(k, positions_bt, 1e4)))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(rotate(q[:, :1], torch.zeros(1, 1, dtype=torch.int64), 1e4), q[:, :1])
    assert (rotate(q, torch.arange(6)[None], 1e4) - q).abs().max() > 0.1


def test_gated_norm_and_swiglu_are_what_they_say() -> None:
    x, v, z = (normal(2, 3, 4, 6, seed=seed) for seed in range(3))
    skip_h = torch.tensor([0.0, 1.0, -2.0, 0.5])
    gated = (x + skip_h[:, None] * v) * z * torch.sigmoid(z)
    wanted = gated / (gated.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(GatedRMSNorm(6, 0.1)(x, v, z, skip_h), wanted)
    mlp, x_btd = SwiGLU(5, 7), normal(1, 3, 5)
    gate = x_btd @ mlp.gate.weight.t()
    wanted = (gate * torch.sigmoid(gate) * (x_btd @ mlp.up.weight.t())) @ mlp.down.weight.t()
    torch.testing.assert_close(mlp(x_btd), wanted)


def test_a_block_without_an_mlp_is_its_mixer_beside_a_residual() -> None:
    config = tiny(mlp_dim=0)
    model, x_btd = awake(config), normal(2, 12, config.dim)
    documents, block = Documents.rows(2, 12, 0, CPU), model.blocks[0]
    mixed_btd, _ = block.mixer(block.mixer_norm(x_btd)[0], documents)
    torch.testing.assert_close(block(x_btd, documents)[0], x_btd + mixed_btd)
    assert not [name for name, _ in model.named_parameters() if "mlp_norm" in name or ".mlp.gate" in name]
    assert block.flops_per_token(12) == block.mixer.flops_per_token(12)
