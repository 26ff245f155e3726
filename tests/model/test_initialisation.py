"""Where training starts: the scales of all weights, and Mamba-2's decays and steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from loglinear.config import LogLinearConfig, SoftmaxConfig
from loglinear.model import LanguageModel, build_model
from tests.model.model_cases import tiny


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Large enough that a standard deviation can be measured."""
    own = LogLinearConfig(heads=16, head_dim=16, groups=4, state_dim=16)
    config = tiny(("log_linear", "softmax"), vocab_size=500, dim=128, layers=8, mlp_dim=256, log_linear=own)
    return build_model(config.model_copy(update={"softmax": SoftmaxConfig(heads=8, head_dim=16)}), 0)


def test_weights_are_normal_and_those_that_write_to_the_residual_stream_smaller(model: LanguageModel) -> None:
    seen = set()
    for name, parameter in model.state_dict().items():
        if parameter.ndim != 2 or "lambda_map" in name or "_conv" in name:
            continue
        if name == "head.weight":  # tied: the embedding's
            continue
        layer = name.split(".")[-2]
        wanted = 0.02 / 4 if layer in ("out_proj", "down") else 0.02  # sqrt(2 * 8 layers) = 4
        assert float(parameter.std()) == pytest.approx(wanted, rel=0.06), name
        assert abs(float(parameter.mean())) < 0.1 * wanted, name
        seen.add(layer)
    assert seen == {
        *("embedding", "q_proj", "k_proj", "v_proj", "z_proj", "dt_proj", "out_proj"),
        *("gate", "up", "down"),
    }


def test_decays_and_steps_are_mamba_2s(model: LanguageModel) -> None:
    parameters = model.state_dict()
    decay_h = torch.cat([x.exp() for name, x in parameters.items() if name.endswith("A_log")])
    step_h = torch.cat([F.softplus(x) for name, x in parameters.items() if name.endswith("dt_bias")])
    skip_h = torch.cat([x for name, x in parameters.items() if name.endswith("mixer.D")])
    assert len(decay_h) == len(step_h) == len(skip_h) == 4 * 16
    assert 1 <= decay_h.min() < 2 < 15 < decay_h.max() <= 16
    assert 0.99e-3 < step_h.min() < 2e-3 < 5e-2 < step_h.max() <= 1.01e-1
    assert 5e-3 < step_h.median() < 2e-2, "log-uniform: half of the steps are below 0.01"
    assert (skip_h == 1).all()


def test_convolutions_are_uniform_as_torchs_and_norms_are_one(model: LanguageModel) -> None:
    for name, parameter in model.state_dict().items():
        if "_conv" in name:
            assert 0.4 < parameter.abs().max() <= 0.5, name
            assert float(parameter.std()) == pytest.approx(0.5 / 3**0.5, rel=0.2), name
        if "norm" in name:
            assert (parameter == 1).all(), name
