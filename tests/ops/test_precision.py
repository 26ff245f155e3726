"""Rounding: fp32 and bf16 inputs against float64 on the same numbers, and decays and scales of extreme size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loglinear.ops import log_linear_attention
from tests.ops.op_cases import Inputs, Sizes, boundaries, random_inputs, random_state, relative_error, run

SIZES = Sizes(groups=2, state_dim=16, head_dim=8, levels=12)


def rounded_inputs(dtype: torch.dtype, decay: float = 0.3) -> Inputs:
    """Packed documents behind initial states, in numbers that `dtype` can hold; g and the state stay fp32."""
    inputs = random_inputs(0, 1, 700, SIZES, decay)
    inputs = replace(inputs, cu_seqlens=boundaries([450, 0, 250]))
    inputs = replace(inputs, initial_state=random_state(0, (77, 3, 64), SIZES)).fresh(torch.float32)
    named = {name: getattr(inputs, name).detach().to(dtype) for name in ("q", "k", "v", "level_scales")}
    return replace(inputs, **named)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-3)])
def test_rounding_is_that_of_the_dtype(dtype: torch.dtype, bound: float) -> None:
    """bf16 is rounded once at the end, for everything in between is fp32."""
    inputs = rounded_inputs(dtype)
    actual, wanted = run("chunk", inputs), run("naive", inputs.fresh(torch.float64))
    assert actual.o.dtype == dtype
    assert actual.final.buckets.dtype == torch.float32
    assert relative_error(actual.o, wanted.o) < bound
    assert relative_error(actual.final.buckets, wanted.final.buckets) < 2e-6
    for name, gradient in wanted.gradients.items():
        assert actual.gradients[name].dtype == inputs.leaves()[name].dtype
        assert relative_error(actual.gradients[name], gradient) < bound, name


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_strong_decays_and_large_scales_stay_finite_and_right(form: str) -> None:
    """-50 a token makes -3200 a chunk: exp of its negative would overflow even float64."""
    inputs = rounded_inputs(torch.float32)
    strong_bth = torch.rand(inputs.g.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    g_bth = torch.where(strong_bth, -50.0, inputs.g.detach())
    assert inputs.level_scales is not None
    inputs = replace(inputs, g=g_bth, level_scales=inputs.level_scales * 1e3)
    actual, wanted = run(form, inputs), run("naive", inputs.fresh(torch.float64))
    bound = 5e-5 if form == "chunk" else 2e-6  # differences of sums near -1000 lose digits in fp32
    assert relative_error(actual.o, wanted.o) < bound
    assert relative_error(actual.final.buckets, wanted.final.buckets) < bound
    for name, gradient in wanted.gradients.items():
        assert actual.gradients[name].isfinite().all(), name
        assert relative_error(actual.gradients[name], gradient) < bound, name


def test_nothing_is_left_of_the_past_behind_a_wall_of_decay() -> None:
    inputs = random_inputs(2, 1, 300, SIZES)
    wall = replace(inputs, g=torch.full_like(inputs.g, -1e4)).fresh(torch.float32)
    o, _ = log_linear_attention(**wall.arguments())
    own_bth = torch.einsum("bthn,bthn->bth", *(x.float().repeat_interleave(2, 2) for x in (inputs.q, inputs.k)))
    assert inputs.level_scales is not None
    wanted_bthp = (inputs.level_scales[..., 0] * own_bth)[..., None] * inputs.v
    assert relative_error(o, wanted_bthp) < 1e-6


def test_a_long_past_of_strong_decays_costs_no_digits() -> None:
    """Decays between chunks are differences of a float64 sum: here of sums near -8000, where fp32 has steps of 5e-4."""
    inputs = random_inputs(3, 1, 8192, Sizes(heads=1, levels=14), decay=0.01)
    g_bth = inputs.g.clone()
    g_bth[:, :4096] -= 2.0
    inputs = replace(inputs, g=g_bth).fresh(torch.float32)
    o, _ = log_linear_attention(**inputs.arguments())
    wanted, _ = log_linear_attention(**inputs.fresh(torch.float64).arguments())
    assert relative_error(o[:, 4096:], wanted[:, 4096:]) < 3e-6


def test_autocast_does_not_reach_into_the_op() -> None:
    inputs = random_inputs(4, 1, 130, SIZES).fresh(torch.float32)
    wanted, _ = log_linear_attention(**inputs.arguments())
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = log_linear_attention(**inputs.arguments())
    assert torch.equal(o, wanted)
