"""Decoding steps in place on a CPU, in Triton's interpreter: the logits of float64, and how few launches they take."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from loglinear.config import LevelScaleName
from tests.ops.test_triton_interpreted import interpreted

NAMES = get_args(LevelScaleName)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return interpreted("tests.model.decoder_cases")


@pytest.mark.parametrize("level_scale", NAMES)
def test_steps_in_place_give_the_logits_of_float64_while_a_bucket_fills(
    level_scale: str, measured: dict[str, Any]
) -> None:
    errors = measured["errors"][level_scale]
    assert len(errors) == (3 if level_scale == "mlp" else 1)
    assert max(errors) < 1e-6


def test_a_block_of_the_adaptive_form_takes_seven_launches(measured: dict[str, Any]) -> None:
    launches = measured["launches"]["mlp"]
    assert sum(launches.values()) <= 7, launches


@pytest.mark.parametrize("level_scale", NAMES)
def test_every_form_reads_each_weight_of_the_model_in_one_of_four_launches(
    level_scale: str, measured: dict[str, Any]
) -> None:
    launches = measured["launches"][level_scale]
    products = ("_norm_linears", "_skip_gate_norm_onto", "_norm_silu_product", "_linear_onto")
    assert [launches[name] for name in products] == [1, 1, 1, 1]
    assert "aten.mm.default" not in launches
