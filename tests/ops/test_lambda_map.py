"""The eight maps from a token to its level scales: values, starts, gradients, and lengths beyond the trained ones.

Shapes: b batch, t time, d model width, h head, l level, m hidden size of the MLP.
"""

from __future__ import annotations

import math
import typing

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loglinear.config import LevelScaleName, LogLinearConfig, ModelConfig
from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.ops.lambda_map import LambdaMap, make_lambda_map
from loglinear.ops.projections import weights_of

DIM, HEADS, LEVELS, HIDDEN, TIME = 12, 3, 6, 64, 32  # 6 levels serve 32 tokens
NAMES: tuple[LevelScaleName, ...] = typing.get_args(LevelScaleName)
START_AT_ONE: tuple[LevelScaleName, ...] = ("static", "linear", "mlp", "mlp_token")
SOFTMAX: tuple[LevelScaleName, ...] = ("mlp_softmax", "mlp_masked_softmax")
WITH_SCALES = tuple(name for name in NAMES if name != "none")


def make(name: LevelScaleName, beyond: str = "clamp") -> LambdaMap:
    torch.manual_seed(0)
    return make_lambda_map(name, dim=DIM, heads=HEADS, levels=LEVELS, hidden=HIDDEN, beyond=beyond)


def disturbed(name: LevelScaleName) -> LambdaMap:
    """A map in mid-training: every weight is random."""
    module = make(name)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def tokens(batch: int = 2, time: int = TIME) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs, and positions 0, 1, 2, ..."""
    x_btd = torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(1))
    return x_btd, torch.arange(time).expand(batch, time)


def applied(module: LambdaMap, x_btd: torch.Tensor, positions_bt: torch.Tensor, length: int) -> torch.Tensor:
    return module([F.linear(x_btd, weight_ed) for weight_ed in weights_of(module.token_layers())], positions_bt, length)


def scales(module: LambdaMap, batch: int = 2, time: int = TIME) -> torch.Tensor:
    scales_bthl = applied(module, *tokens(batch, time), time)
    assert scales_bthl is not None
    return scales_bthl


def levels_read(t: int) -> list[bool]:
    """Whether a query at position t reads anything at each level: some position s <= t lies there."""
    present = {(t ^ s).bit_length() for s in range(t + 1)}
    return [level in present for level in range(LEVELS)]


def test_there_are_eight_maps() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", WITH_SCALES)
def test_scales_have_a_level_for_every_head_and_token(name: LevelScaleName) -> None:
    scales_bthl = scales(make(name))
    assert scales_bthl.shape == (2, TIME, HEADS, LEVELS)
    assert scales_bthl.dtype == torch.float32


@pytest.mark.parametrize("name", WITH_SCALES)
def test_scales_of_bf16_weights_are_fp32(name: LevelScaleName) -> None:
    x_btd, positions_bt = tokens()
    assert applied(make(name).bfloat16(), x_btd.bfloat16(), positions_bt, TIME).dtype == torch.float32


def test_none_is_nothing() -> None:
    assert applied(make("none"), *tokens(), TIME) is None
    assert list(make("none").parameters()) == []


@pytest.mark.parametrize("name", START_AT_ONE)
def test_training_starts_at_one(name: LevelScaleName) -> None:
    torch.testing.assert_close(scales(make(name)), torch.ones(2, TIME, HEADS, LEVELS))


@pytest.mark.parametrize("name", START_AT_ONE)
def test_training_starts_at_one_in_a_built_model(name: LevelScaleName) -> None:
    """Nothing that initialises the model may touch the maps."""
    config = ModelConfig(vocab_size=16, dim=DIM, layers=2, log_linear=LogLinearConfig(heads=HEADS, level_scale=name))
    maps = [module for module in build_model(config, 3).modules() if isinstance(module, LambdaMap)]
    assert len(maps) == 2
    for module in maps:
        torch.testing.assert_close(scales(module), torch.ones(2, TIME, HEADS, module.levels))


def test_a_built_models_mlp_starts_with_xavier_weights() -> None:
    config = ModelConfig(vocab_size=16, dim=DIM, layers=1, seq_len=512)
    (module,) = (module for module in build_model(config, 3).modules() if isinstance(module, LambdaMap))
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    bound = math.sqrt(6 / (10 + 64))
    assert 0.9 * bound < parameters["mlp.weight1"].abs().max() < bound
    assert not parameters["mlp.bias1"].any()
    assert not parameters["mlp.weight2"].any()
    assert float(parameters["level_proj.weight"].std()) == pytest.approx(DIM**-0.5, rel=0.1)


def test_scaled_starts_dependent_on_the_input_around_0_69() -> None:
    scales_bthl = scales(make("scaled"), batch=8).detach()
    assert scales_bthl.std() > 0.3
    assert float(scales_bthl.median()) == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize("module", [make("mlp_softmax"), disturbed("mlp_softmax")], ids=["start", "later"])
def test_softmax_sums_to_one_over_all_levels(module: LambdaMap) -> None:
    torch.testing.assert_close(scales(module).sum(-1), torch.ones(2, TIME, HEADS))


@pytest.mark.parametrize(
    "module", [make("mlp_masked_softmax"), disturbed("mlp_masked_softmax")], ids=["start", "later"]
)
def test_masked_softmax_sums_to_one_over_the_levels_that_are_read(module: LambdaMap) -> None:
    scales_bthl = scales(module)
    torch.testing.assert_close(scales_bthl.sum(-1), torch.ones(2, TIME, HEADS))
    for t in range(TIME):
        read = torch.tensor(levels_read(t))
        assert int(read.sum()) == bin(t).count("1") + 1
        assert (scales_bthl[:, t][..., read] > 0).all()
        assert not scales_bthl[:, t][..., ~read].any()


def test_masked_softmax_starts_even_over_the_levels_that_are_read() -> None:
    scales_bthl = scales(make("mlp_masked_softmax"))
    torch.testing.assert_close(scales_bthl[0, 5, 0], torch.tensor([1.0, 1, 0, 1, 0, 0]) / 3)


def test_masked_softmax_counts_positions_within_documents() -> None:
    x_btd, _ = tokens(1, 4)
    scales_bthl = applied(disturbed("mlp_masked_softmax"), x_btd, torch.tensor([[0, 1, 0, 4]]), 5)
    assert (scales_bthl[0, :, 0] > 0).tolist() == [levels_read(t) for t in (0, 1, 0, 4)]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_hand(name: LevelScaleName, w: dict[str, torch.Tensor], x_d: torch.Tensor) -> torch.Tensor:
    """Logits [H, L] of one token, before the softplus or softmax."""
    if name == "static":
        return w["scale_hl"]
    if name == "mlp_token":
        hidden_m = gelu(w["mlp.weight1"] @ x_d + w["mlp.bias1"])
        return (w["mlp.weight2"] @ hidden_m + w["mlp.bias2"]).view(HEADS, LEVELS)
    level_hl = (w["level_proj.weight"] @ x_d).view(HEADS, LEVELS)
    if name == "scaled":
        return w["scale_hl"] * level_hl
    if name == "linear":
        return level_hl + w["bias_hl"]
    rows = [w["mlp.weight2"] @ gelu(w["mlp.weight1"] @ row + w["mlp.bias1"]) + w["mlp.bias2"] for row in level_hl]
    return torch.stack(rows)


@pytest.mark.parametrize("name", WITH_SCALES)
def test_values_are_those_of_the_formula(name: LevelScaleName) -> None:
    module = disturbed(name)
    x_btd, _ = tokens()
    actual_bthl = scales(module)
    for t in (0, 1, 21):
        logits_hl = by_hand(name, dict(module.named_parameters()), x_btd[1, t])
        if name == "mlp_masked_softmax":
            weights_hl = logits_hl.exp() * torch.tensor(levels_read(t))
        elif name == "mlp_softmax":
            weights_hl = logits_hl.exp()
        else:
            weights_hl = torch.log1p(logits_hl.exp())
        wanted_hl = weights_hl / weights_hl.sum(-1, keepdim=True) if name in SOFTMAX else weights_hl
        torch.testing.assert_close(actual_bthl[1, t], wanted_hl, rtol=1e-4, atol=1e-6)


def parameter_count(name: LevelScaleName) -> int:
    return sum(parameter.numel() for parameter in make(name).parameters())


def test_parameter_counts() -> None:
    projection = DIM * HEADS * LEVELS
    per_level = HEADS * LEVELS
    mlp = 129 * LEVELS + 64
    assert parameter_count("static") == per_level
    assert parameter_count("scaled") == parameter_count("linear") == projection + per_level
    assert parameter_count("mlp") == projection + mlp
    assert parameter_count("mlp_softmax") == parameter_count("mlp_masked_softmax") == projection + mlp
    assert parameter_count("mlp_token") == DIM * 64 + 64 + 64 * per_level + per_level


@pytest.mark.parametrize("name", WITH_SCALES)
def test_longer_sequences_take_the_last_trained_level(name: LevelScaleName) -> None:
    """Position 112 = 1110000b reads levels 5, the last that was trained, 6 and 7."""
    module = disturbed(name)
    scales_bthl = scales(module, time=113)
    assert scales_bthl.shape[-1] == 8
    last_bhl = scales_bthl[:, 112, :, 5:]
    assert (last_bhl > 0).all()
    torch.testing.assert_close(last_bhl, last_bhl[..., :1].expand(-1, -1, 3))
    if name not in SOFTMAX:
        x_btd, positions_bt = tokens(2, 113)
        short_bthl = applied(module, x_btd[:, :TIME], positions_bt[:, :TIME], TIME)
        torch.testing.assert_close(scales_bthl[:, :TIME, :, :LEVELS], short_bthl)


@pytest.mark.parametrize("name", WITH_SCALES)
def test_longer_sequences_are_refused_where_asked(name: LevelScaleName) -> None:
    module = make(name, beyond="error")
    assert scales(module).shape[-1] == LEVELS
    with pytest.raises(UserError, match=r"33 tokens needs 7 levels, but 6 were trained.*beyond_trained_levels=clamp"):
        applied(module, *tokens(2, 33), 33)


@pytest.mark.parametrize("name", WITH_SCALES)
def test_every_parameter_learns(name: LevelScaleName) -> None:
    """W2 = 0 hides the first layer from the first step alone."""
    module = make(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    target_bthl = torch.rand(2, TIME, HEADS, LEVELS, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        optimizer.zero_grad()
        (scales(module) - target_bthl).square().sum().backward()
        optimizer.step()
    for path, parameter in module.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(dim=-1).all(), f"some rows of {path} get no gradient"


@pytest.mark.parametrize("name", WITH_SCALES)
def test_longer_sequences_get_the_last_lambda_or_one_where_asked(name: LevelScaleName) -> None:
    """Levels that were trained keep what the trained levels alone give; the two further ones do as they are told."""
    module = disturbed(name)
    x_btd, positions_bt = tokens(2, 113)
    with pytest.MonkeyPatch.context() as patch:  # 113 tokens ask for as many levels as there are
        patch.setattr("loglinear.ops.lambda_map.num_levels", lambda length: LEVELS)
        trained_bthl = applied(module, x_btd, positions_bt, 113)
    assert trained_bthl is not None
    for beyond, further in (("extend", trained_bthl[..., -1:]), ("one", torch.ones(()))):
        module.beyond = beyond
        scales_bthl = applied(module, x_btd, positions_bt, 113)
        torch.testing.assert_close(scales_bthl[..., :LEVELS], trained_bthl)
        torch.testing.assert_close(scales_bthl[..., LEVELS:], further.expand(2, 113, HEADS, 2))
