"""Every malformed input of the op is refused with a sentence that names it, by every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loglinear.errors import UserError
from loglinear.ops import LogLinearState, chunk_log_linear_attention, recurrent_step
from tests.ops.op_cases import FORMS

Arguments = dict[str, Any]


def arguments(**changes: Any) -> Arguments:
    """A good call of B = 1, T = 6, G = 2, H = 4, N = 3, P = 2 with L = 4, and what is to change about it."""
    good = {
        "q": torch.ones(1, 6, 2, 3),
        "k": torch.ones(1, 6, 2, 3),
        "v": torch.ones(1, 6, 4, 2),
        "g": torch.zeros(1, 6, 4),
        "level_scales": torch.ones(1, 6, 4, 4),
    }
    return {**good, **changes}


def state(count: int = 1, position: int = 1, **changes: Any) -> LogLinearState:
    named = {"buckets": torch.zeros(1, 4, count, 3, 2), "positions": torch.tensor([position]), **changes}
    return LogLinearState(**named)


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values)


ERRORS: list[tuple[Arguments, str]] = [
    ({"q": torch.ones(6, 2, 3)}, r"q has 3 dimensions, but must be \[B, T, G, N\]"),
    ({"v": torch.ones(1, 6, 8)}, r"v has 3 dimensions, but must be \[B, T, H, P\]"),
    ({"k": torch.ones(1, 6, 2, 5)}, r"k has shape \[1, 6, 2, 5\], but must have q's shape \[1, 6, 2, 3\]"),
    ({"v": torch.ones(1, 7, 4, 2)}, r"v has \[B, T\] = \[1, 7\], but q has \[1, 6\]"),
    ({"v": torch.ones(1, 6, 3, 2)}, "v has 3 heads, which must be a positive multiple of the 2 groups of q"),
    ({"v": torch.ones(1, 6, 0, 2)}, "v has 0 heads, which must be a positive multiple"),
    ({"g": torch.ones(1, 6, 2)}, r"g has shape \[1, 6, 2\], but must be \[B, T, H\] = \[1, 6, 4\]"),
    ({"level_scales": torch.ones(1, 6, 4)}, r"level_scales has shape .* must be \[B, T, H, L\] = \[1, 6, 4, 'L'\]"),
    ({"level_scales": torch.ones(1, 6, 2, 4)}, r"level_scales has shape .* must be \[B, T, H, L\]"),
    ({"level_scales": torch.ones(1, 6, 4, 3)}, "level_scales has 3 levels, but 6 tokens need 4"),
    ({"initial_state": state(2, 3)}, "level_scales has 4 levels, but 9 tokens need 5"),
    ({"g": torch.zeros(1, 6, 4, dtype=torch.int64)}, r"g has dtype torch.int64: convert it to a floating-point"),
    ({"k": torch.ones(1, 6, 2, 3).bfloat16()}, "k has dtype torch.bfloat16, but v has torch.float32"),
    ({"q": torch.ones(1, 6, 2, 3).double()}, "q has dtype torch.float64, but v has torch.float32"),
    ({"g": torch.zeros(1, 6, 4, device="meta")}, "g is on meta, but v is on cpu: move it there"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens is torch.float32 of shape \[2\], but must be int32"),
    ({"cu_seqlens": bounds(0)}, r"cu_seqlens is torch.int64 of shape \[1\]"),
    ({"cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens is torch.int64 of shape \[1, 2\]"),
    ({"cu_seqlens": bounds(1, 6)}, "cu_seqlens runs from 1 to 6, but must run from 0 to T = 6"),
    ({"cu_seqlens": bounds(0, 5)}, "cu_seqlens runs from 0 to 5, but must run from 0 to T = 6"),
    ({"cu_seqlens": bounds(0, 4, 3, 6)}, "cu_seqlens decreases somewhere, but must be sorted"),
    ({"initial_state": state(), "cu_seqlens": bounds(0, 2, 6)}, "this call needs \\[2, 4, 'K', 3, 2\\]"),
    ({"initial_state": state(buckets=torch.zeros(1, 4, 3, 2))}, r"initial_state has buckets of shape \[1, 4, 3, 2\]"),
    ({"initial_state": state(buckets=torch.zeros(1, 4, 1, 2, 2))}, "initial_state has buckets of shape"),
    ({"initial_state": state(buckets=torch.zeros(1, 4, 1, 3, 2, device="meta"))}, "initial_state is on meta"),
    ({"initial_state": state(positions=bounds(1, 1))}, r"initial_state.positions must be int64 of shape \[1\]"),
    ({"initial_state": state(positions=torch.tensor([1.0]))}, "initial_state.positions must be int64"),
    ({"initial_state": state(1, 2)}, r"initial_state has 1 buckets, but its positions 2\.\.2 need 2"),
    ({"initial_state": state(1, -1)}, r"its positions -1\.\.-1"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("changes", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_a_malformed_input_is_named(form: str, changes: Arguments, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        FORMS[form](**arguments(**changes))


def empty(batch: int, time: int) -> Arguments:
    return {name: x[:batch, :time] for name, x in arguments().items()}


def two_rows() -> Arguments:
    return {name: x.expand(2, *x.shape[1:]) for name, x in arguments().items()}


def without_groups() -> Arguments:
    return arguments(q=torch.ones(1, 6, 0, 3), k=torch.ones(1, 6, 0, 3))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: empty(1, 0), r"q has \[B, T\] = \[1, 0\]: give at least one token"),
        (lambda: empty(0, 6), r"q has \[B, T\] = \[0, 6\]: give at least one token"),
        (lambda: {**two_rows(), "cu_seqlens": bounds(0, 6)}, "into one row, but the batch is 2: reshape it to B = 1"),
        (without_groups, "v has 4 heads, which must be a positive multiple of the 0 groups"),
    ],
)
def test_a_call_without_tokens_or_with_too_many_rows_is_refused(call: Callable[[], Arguments], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        chunk_log_linear_attention(**call())


@pytest.mark.parametrize("form", FORMS)
def test_the_good_call_is_good(form: str) -> None:
    o, final = FORMS[form](**arguments(), initial_state=state(), output_final_state=True)
    assert o.shape == (1, 6, 4, 2)
    assert final is not None
    assert final.positions.tolist() == [7]


@pytest.mark.parametrize("chunk", [0, -4, 3, 48])
def test_a_chunk_is_a_power_of_two(chunk: int) -> None:
    with pytest.raises(UserError, match=f"chunk is {chunk}, but must be a power of two"):
        chunk_log_linear_attention(**arguments(), chunk=chunk)


def test_a_step_needs_a_scale_for_every_level_it_reads() -> None:
    now = {name: x[:, 0] for name, x in arguments().items()}
    with pytest.raises(UserError, match="level_scales has 4 levels, but position 9 needs 5"):
        recurrent_step(state(4, 9), **now)
