"""Parameter counts by hand, and FLOPs against what torch counts while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loglinear.config import LogLinearConfig, MixerName, ModelConfig
from loglinear.model import LanguageModel, build_model
from loglinear.model.attention import SoftmaxMixer
from loglinear.model.layers import Documents
from loglinear.model.mixer import LogLinearMixer
from loglinear.ops.flops import attention_flops
from loglinear.ops.lambda_map import LambdaMap
from loglinear.ops.projections import projections, weights_of
from tests.model.model_cases import PATTERNS, random_tokens, tiny

DIM, VOCAB, MLP = 16, 23, 20
H, P, G, N, WIDTH, HIDDEN = 4, 6, 2, 5, 4, 7  # of the tiny log-linear mixer
LEVELS = 8  # of 128 tokens
CHUNK = 64


def log_linear_parameters() -> int:
    projections = DIM * (2 * G * N + 2 * H * P + H) + H * P * DIM
    convolutions = (WIDTH + 1) * (2 * G * N + H * P)
    level_map = DIM * H * LEVELS + (LEVELS * HIDDEN + HIDDEN) + (HIDDEN * LEVELS + LEVELS)
    return projections + convolutions + level_map + 3 * H + P  # A, dt bias and D per head; the norm


PARAMETERS = {"log_linear": log_linear_parameters(), "softmax": 4 * DIM * 3 * 8}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_parameter_counts_by_hand(pattern: tuple[MixerName, ...], tied: bool) -> None:
    model = build_model(tiny(pattern, tie_embeddings=tied, layers=3), 0)
    mixers = sum(PARAMETERS[pattern[layer % len(pattern)]] for layer in range(3))
    wanted = (1 if tied else 2) * VOCAB * DIM + mixers + 3 * (3 * DIM * MLP + 2 * DIM) + DIM
    assert model.parameter_count() == wanted


def test_mixers_repeat_the_pattern() -> None:
    pattern: tuple[MixerName, ...] = ("log_linear", "log_linear", "softmax")
    model = build_model(tiny(pattern, layers=7), 0)
    kinds = ["softmax" if isinstance(block.mixer, SoftmaxMixer) else "log_linear" for block in model.blocks]
    assert kinds == ["log_linear", "log_linear", "softmax", "log_linear", "log_linear", "softmax", "log_linear"]
    assert all(isinstance(block.mixer, LogLinearMixer | SoftmaxMixer) for block in model.blocks)


def causal_half(config: ModelConfig, kind: MixerName, time: int) -> int:
    """FLOPs that torch spends on the future, in blocks that it computes in full: they are not in the formulas."""
    if kind == "softmax":
        return 2 * time * time * config.softmax.heads * config.softmax.head_dim
    own = config.log_linear
    return time * CHUNK * (own.groups * own.state_dim + own.heads * own.head_dim)


def measured(function: Callable[..., object], *arguments: object) -> int:
    """FLOPs of a forward pass as torch counts them; its counter knows attention only as plain products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("time", [64, 256, 1024])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_flops_of_a_model_are_what_torch_counts(pattern: tuple[MixerName, ...], time: int) -> None:
    config = tiny(pattern)
    unused = sum(causal_half(config, config.mixer_of(layer), time) for layer in range(config.layers))
    model = build_model(config, 0)
    assert measured(model, random_tokens(1, time)) == time * model.flops_per_token(time) + unused


@pytest.mark.parametrize("pattern", [("log_linear",), ("softmax",)])
def test_flops_of_every_layer_are_what_torch_counts(pattern: tuple[MixerName, ...]) -> None:
    config, time = tiny(pattern), 256
    model, x_btd = build_model(config, 0), torch.randn(1, 256, DIM)
    documents = Documents.rows(1, time, 0, x_btd.device)
    block, unused = model.blocks[0], causal_half(config, pattern[0], time)
    assert measured(block, x_btd, documents) == time * block.flops_per_token(time) + unused
    assert measured(block.mixer, x_btd, documents) == time * block.mixer.flops_per_token(time) + unused
    assert measured(block.mlp, x_btd) == time * block.mlp.flops_per_token()


@pytest.mark.parametrize("name", ["none", "static", "scaled", "linear", "mlp_token", "mlp_softmax"])
def test_flops_of_level_maps_are_what_torch_counts(name: str) -> None:
    own = LogLinearConfig.model_validate({"heads": H, "level_scale": name})
    level_map = next(m for m in _modules(tiny(log_linear=own)) if isinstance(m, LambdaMap))
    x_btd, positions_bt = torch.randn(1, 64, DIM), torch.arange(64)[None]

    def from_tokens() -> None:
        level_map(projections(x_btd, weights_of(level_map.token_layers())), positions_bt, 64)

    assert measured(from_tokens) == 64 * level_map.flops_per_token()


def _modules(config: ModelConfig) -> list[torch.nn.Module]:
    return list(build_model(config, 0).modules())


def test_training_costs_three_times_the_forward_pass() -> None:
    """But for the recomputed blocks inside chunks, so only the projections and the MLP are compared."""
    model, tokens_bt = build_model(tiny(("softmax",)), 0), random_tokens(1, 64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens_bt, tokens_bt).backward()
    assert counter.get_total_flops() == 3 * measured(model, tokens_bt)


def test_flops_grow_with_the_logarithm_of_the_length() -> None:
    """Each doubling adds half a bucket on average: one more level is active at every second chunk."""
    costs = [attention_flops(64 << doubling, 8, 1, 64, 64) for doubling in range(12)]
    assert {later - earlier for earlier, later in pairwise(costs)} == {8 * 64 * 64}
    model = build_model(tiny(("softmax",)), 0)
    assert isinstance(model, LanguageModel)
    assert model.flops_per_token(2048) - model.flops_per_token(1024) == 2 * 2 * 2 * 24 * 512
