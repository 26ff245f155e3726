"""The Triton kernels on a GPU: dtypes, sizes, layouts, extremes, determinism, compilation, memory.

Truth is the chunked form in float64 on the same numbers. Fresh random numbers in every test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from loglinear.ops import LogLinearState, chunk_log_linear_attention, log_linear_attention, num_levels
from loglinear.ops.triton import step
from loglinear.ops.triton.config import STATE_SIZES, VALUE_SIZES
from tests.ops import neighbour_cases
from tests.ops.op_cases import Inputs, Sizes, boundaries, random_inputs, random_state
from tests.ops.triton_cases import STEPS, end_errors, errors, run, step_errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BOUND = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SIZES = Sizes(groups=1, heads=4, state_dim=128, head_dim=64, levels=13)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is handed out is NaN first, so that what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same call there, in numbers that `dtype` can hold; g and the state stay fp32."""
    inputs = inputs.fresh(torch.float32)
    named = {name: getattr(inputs, name) for name in ("q", "k", "v", "level_scales")}
    moved = {name: x if x is None else x.detach().cuda().to(dtype) for name, x in named.items()}
    state = inputs.initial_state
    if state is not None:
        state = LogLinearState(state.buckets.detach().cuda(), state.positions)
    return replace(inputs, **moved, g=inputs.g.detach().cuda(), initial_state=state)


def fresh_inputs(batch: int, time: int, sizes: Sizes = SIZES, decay: float = 0.3) -> Inputs:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return random_inputs(seed, batch, time, replace(sizes, levels=sizes.levels and num_levels(time)), decay)


def assert_accurate(inputs: Inputs, dtype: torch.dtype) -> None:
    measured = errors(on_gpu(inputs, dtype), chunk_log_linear_attention)
    assert {name: error for name, error in measured.items() if not error < BOUND[dtype]} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("levels", [13, None])
def test_dtypes(dtype: torch.dtype, levels: int | None) -> None:
    assert_accurate(fresh_inputs(2, 700, replace(SIZES, levels=levels)), dtype)


@pytest.mark.parametrize("state_dim", STATE_SIZES)
@pytest.mark.parametrize("head_dim", VALUE_SIZES)
def test_sizes(state_dim: int, head_dim: int) -> None:
    sizes = Sizes(groups=1, heads=2, state_dim=state_dim, head_dim=head_dim, levels=10)
    assert_accurate(fresh_inputs(1, 400, sizes), torch.bfloat16)


@pytest.mark.parametrize(("state_dim", "head_dim"), [(16, 16), (16, 64), (64, 128), (128, 256)])
def test_sizes_in_fp32(state_dim: int, head_dim: int) -> None:
    sizes = Sizes(groups=1, heads=2, state_dim=state_dim, head_dim=head_dim, levels=10)
    assert_accurate(fresh_inputs(1, 300, sizes), torch.float32)


@pytest.mark.parametrize(("state_dim", "head_dim"), [(256, 64), (24, 40)])
def test_other_sizes_are_left_to_the_form_in_pytorch(state_dim: int, head_dim: int) -> None:
    sizes = Sizes(groups=1, heads=2, state_dim=state_dim, head_dim=head_dim, levels=10)
    inputs = on_gpu(fresh_inputs(1, 300, sizes), torch.float32)
    actual, wanted = run(log_linear_attention, inputs), run(chunk_log_linear_attention, inputs)
    torch.testing.assert_close(actual.o, wanted.o)


@st.composite
def layouts(draw: st.DrawFn) -> Inputs:
    """Rows of any length or packed documents, with or without what they have seen before."""
    sizes = replace(SIZES, groups=draw(st.sampled_from([1, 2])), levels=draw(st.sampled_from([14, None])))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 500), min_size=1, max_size=5).filter(any)) if packed else []
    starts = draw(st.none() | st.lists(st.integers(0, 3000), min_size=5, max_size=5))
    seed = draw(st.integers(0, 1 << 30))
    if packed:
        inputs = replace(random_inputs(seed, 1, sum(lengths), sizes), cu_seqlens=boundaries(lengths))
        rows = len(lengths)
    else:
        rows = draw(st.integers(1, 2))
        inputs = random_inputs(seed, rows, draw(st.integers(1, 1500)), sizes)
    if starts is not None:
        inputs = replace(inputs, initial_state=random_state(seed, starts[:rows], sizes))
    return inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("state_dim", "head_dim"), [(16, 16), (64, 32), (16, 64), (64, 128), (128, 64), (128, 256), (256, 128)]
)
def test_what_context_ranks_hand_on(dtype: torch.dtype, state_dim: int, head_dim: int) -> None:
    sizes = Sizes(groups=2, heads=4, state_dim=state_dim, head_dim=head_dim, levels=14)
    inputs = replace(random_inputs(6, 1, 2000, sizes), cu_seqlens=boundaries([500, 0, 1500]))
    inputs = replace(inputs, initial_state=random_state(7, [3001, 5, 0], sizes))
    measured = end_errors(on_gpu(inputs, dtype))
    assert {name: error for name, error in measured.items() if not error < BOUND[dtype]} == {}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(inputs=layouts())
def test_layouts(inputs: Inputs) -> None:
    assert_accurate(inputs, torch.bfloat16)


@pytest.mark.parametrize(("decay", "bound"), [(0.0, 1e-2), (0.01, 5e-3), (5.0, 5e-3), (50.0, 5e-3)])
def test_long_sequences_with_weak_and_strong_decays(decay: float, bound: float) -> None:
    """Without decay all heights of the tree count alike, and states and their gradients are rounded at each."""
    inputs = on_gpu(fresh_inputs(1, 32768, SIZES, decay), torch.bfloat16)
    measured = errors(inputs, chunk_log_linear_attention)
    assert {name: error for name, error in measured.items() if not error < bound} == {}


def test_extreme_decays_and_scales_stay_finite_and_right() -> None:
    inputs = fresh_inputs(1, 1000, SIZES)
    strong_bth = torch.rand(inputs.g.shape) < 0.3
    assert inputs.level_scales is not None
    scales_bthl = 10.0 ** (torch.rand(inputs.level_scales.shape).double() * 6 - 3)
    scales_bthl[:, ::7] = 0.0
    inputs = replace(inputs, g=torch.where(strong_bth, -50.0, inputs.g), level_scales=scales_bthl)
    assert_accurate(inputs, torch.bfloat16)


def test_two_runs_give_equal_bits() -> None:
    inputs = on_gpu(fresh_inputs(2, 3000), torch.bfloat16)
    first, second = (run(log_linear_attention, inputs) for _ in range(2))
    assert torch.equal(first.o, second.o)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


def test_compiled_and_checkpointed_calls_are_the_plain_call() -> None:
    inputs = on_gpu(fresh_inputs(2, 500), torch.bfloat16)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return log_linear_attention(q, k, v, g, scales)[0]

    def checkpointed(*tensors: torch.Tensor) -> torch.Tensor:
        output = checkpoint(plain, *tensors, use_reentrant=False)
        assert isinstance(output, torch.Tensor)
        return output

    results = []
    for op in (plain, torch.compile(plain, fullgraph=True), checkpointed):
        leaves = list(inputs.fresh().leaves().values())
        o = op(*leaves)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, torch.ones_like(o))])
    for other in results[1:]:
        for have, want in zip(other, results[0], strict=True):
            assert torch.equal(have, want)


def test_memory_stays_a_small_multiple_of_the_inputs() -> None:
    """65,536 tokens at T = 32,768, 32 heads of 64, state 128: 2.4 GB at most, all tensors counted."""
    shapes = {"q": (1, 128), "k": (1, 128), "v": (32, 64), "level_scales": (32, 16)}
    tensors = {
        name: torch.rand(2, 32768, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for name, shape in shapes.items()
    }
    inputs = Inputs(**tensors, g=(-torch.rand(2, 32768, 32, device="cuda")).requires_grad_())
    own = [*inputs.leaves().values(), do_bthp := torch.ones_like(inputs.v)]
    others = torch.cuda.memory_allocated() - sum(x.nbytes for x in own)  # what tests before this one have kept
    torch.cuda.reset_peak_memory_stats()
    o, _ = log_linear_attention(**inputs.arguments())
    torch.autograd.grad(o, list(inputs.leaves().values()), do_bthp)
    assert torch.cuda.max_memory_allocated() - others < 2.4e9


@pytest.mark.parametrize(("levels", "many_heads"), STEPS.values())
def test_decoding_steps(levels: int | None, many_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MANY_HEADS", many_heads)
    measured = step_errors("cuda", replace(SIZES, groups=2, levels=levels))
    assert {name: error for name, error in measured.items() if not error < 1e-6} == {}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_the_operations_around_the_op(dtype: torch.dtype, bound: float) -> None:
    measured = {name: neighbour_cases.errors(case, dtype, "cuda") for name, case in neighbour_cases.cases(on_gpu=True)}
    measured["inputs, token by token"] = neighbour_cases.token_by_token(dtype, "cuda")
    measured["products of few tokens"] = neighbour_cases.few_rows(dtype, "cuda")
    assert {name: errors for name, errors in measured.items() if not max(errors.values()) < bound} == {}
