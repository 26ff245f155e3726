"""The three forms agree on outputs, final states and every gradient, whatever the layout. Shapes as in op_cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loglinear.ops import chunk_log_linear_attention
from tests.ops.op_cases import Inputs, Sizes, assert_close, boundaries, random_inputs, random_state, run

FEW = settings(max_examples=300, derandomize=True)


@dataclass(frozen=True)
class Layout:
    """Which sequences a call holds: rows of one length, or packed documents; what they have seen before."""

    lengths: tuple[int, ...]
    packed: bool
    starts: tuple[int, ...] | None
    groups: int = 1
    levels: int | None = 9
    spare: int = 0
    seed: int = 0

    def inputs(self) -> Inputs:
        sizes = Sizes(groups=self.groups, levels=self.levels)
        shape = (1, sum(self.lengths)) if self.packed else (len(self.lengths), self.lengths[0])
        inputs = random_inputs(self.seed, *shape, sizes)
        if self.packed:
            inputs = replace(inputs, cu_seqlens=boundaries(self.lengths))
        if self.starts is not None:
            inputs = replace(inputs, initial_state=random_state(self.seed, self.starts, sizes, self.spare))
        return replace(inputs, scale=0.7)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    packed = draw(st.booleans())
    if packed:
        drawn = draw(st.lists(st.one_of(st.just(0), st.integers(0, 30)), min_size=1, max_size=5).filter(any))
        lengths = tuple(drawn)
    else:
        lengths = (draw(st.integers(1, 75)),) * draw(st.integers(1, 2))
    starts = draw(st.none() | st.tuples(*[st.integers(0, 90)] * len(lengths)))
    return Layout(
        lengths,
        packed,
        starts,
        groups=draw(st.sampled_from([1, 2, 4])),
        levels=draw(st.sampled_from([9, 9, None])),
        spare=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
    )


chunks = st.sampled_from([1, 2, 4, 8, 16, 64])


@FEW
@given(layout=layouts(), chunk=chunks)
@example(Layout((64,), packed=False, starts=None), 16)
@example(Layout((0, 0, 1, 0), packed=True, starts=(0, 7, 8, 63)), 8)
@example(Layout((5, 3), packed=True, starts=(3, 61)), 64)
def test_the_chunked_form_is_the_naive_form(layout: Layout, chunk: int) -> None:
    inputs = layout.inputs()
    assert_close(run("chunk", inputs, chunk=chunk), run("naive", inputs))


@settings(FEW, max_examples=100)
@given(layout=layouts())
def test_the_recurrent_form_is_the_naive_form(layout: Layout) -> None:
    inputs = layout.inputs()
    assert_close(run("recurrent", inputs), run("naive", inputs))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(193,), (64, 0, 63, 65, 1)])
def test_the_usual_chunk_at_several_chunks(groups: int, lengths: Sequence[int]) -> None:
    starts = tuple(37 * number for number in range(len(lengths)))
    inputs = Layout(tuple(lengths), True, starts, groups, levels=11).inputs()
    assert_close(run("chunk", inputs), run("naive", inputs))


def test_gradients_of_outputs_alone_need_no_final_state() -> None:
    inputs = Layout((70,), False, (5,)).inputs().fresh()
    o, final = chunk_log_linear_attention(**inputs.arguments(), chunk=8)
    assert final is None
    gradients = torch.autograd.grad(o.square().sum(), list(inputs.leaves().values()))
    assert all(bool((gradient != 0).any()) for gradient in gradients)


def test_numerical_derivatives_agree_with_the_chunked_form() -> None:
    layout = Layout((7, 0, 4), packed=True, starts=(3, 2, 0), groups=2, levels=5)
    inputs = layout.inputs().fresh()
    leaves = inputs.leaves()

    def outputs(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(leaves, values, strict=True))
        state = replace_buckets(inputs, named.pop("initial_state"))
        o, final = chunk_log_linear_attention(**{**state.arguments(), **named}, output_final_state=True, chunk=4)
        assert final is not None
        return o, final.buckets

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))


def replace_buckets(inputs: Inputs, buckets: torch.Tensor) -> Inputs:
    assert inputs.initial_state is not None
    return replace(inputs, initial_state=replace(inputs.initial_state, buckets=buckets))


def test_two_runs_give_equal_bits() -> None:
    layout = Layout((900, 0, 301), packed=True, starts=(11, 4, 64), groups=2, levels=12)
    first, second = (run("chunk", layout.inputs().fresh(torch.float32)) for _ in range(2))
    assert torch.equal(first.o, second.o)
    assert torch.equal(first.final.buckets, second.final.buckets)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


def test_training_goes_on_after_an_evaluation_in_inference_mode() -> None:
    """Whatever the op remembers of a layout must not be tied to the mode it was first met in."""
    inputs = Layout((83,), False, (21,), seed=5).inputs()
    with torch.inference_mode():
        chunk_log_linear_attention(**inputs.arguments(), output_final_state=True, chunk=8)
    assert_close(run("chunk", inputs, chunk=8), run("naive", inputs))
