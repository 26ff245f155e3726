"""Log-decays of all sequences in one scan are those of each sequence alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loglinear.ops.running_sums import sum_from_start, sum_of_all, sum_to_end

LENGTHS = (5, 0, 14, 1, 0)
ALONE = {
    sum_from_start: lambda g_th: g_th.cumsum(0),
    sum_to_end: lambda g_th: torch.stack([g_th[t + 1 :].sum(0) for t in range(len(g_th))]) if len(g_th) else g_th,
    sum_of_all: lambda g_th: g_th.sum(0, keepdim=True),
}
by_name = pytest.mark.parametrize("form", ALONE, ids=lambda form: form.__name__)


@by_name
def test_each_sequence_is_summed_alone(form: Callable) -> None:
    g_th = torch.randn(sum(LENGTHS), 3, dtype=torch.float64)
    wanted = torch.cat([ALONE[form](now_th) for now_th in g_th.split(LENGTHS)])
    torch.testing.assert_close(form(g_th, LENGTHS), wanted, rtol=0, atol=1e-13)


@by_name
def test_gradients(form: Callable) -> None:
    g_th = torch.randn(sum(LENGTHS), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g_th: form(g_th, LENGTHS), (g_th,))


@by_name
def test_what_came_before_a_sequence_costs_no_accuracy(form: Callable) -> None:
    g_th = -2 * torch.rand(1 << 20, 1)
    lengths = ((1 << 20) - 64, 64)
    last = form(g_th, lengths)[-1 if form is sum_of_all else -64 :]
    torch.testing.assert_close(last.double(), ALONE[form](g_th[-64:].double()), rtol=1e-6, atol=1e-5)


@by_name
def test_rows_come_out_contiguous_in_the_dtype_given(form: Callable) -> None:
    for dtype in (torch.float32, torch.float64):
        out = form(torch.randn(sum(LENGTHS), 3, dtype=dtype), LENGTHS)
        assert out.dtype == dtype
        assert out.is_contiguous()
