"""Layers that read one input, held to separate layers of torch in float64.

Shapes: b batch, t time, d width that is read, e width that is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from loglinear.ops.projections import NARROW, projections

WIDTHS = (5, NARROW + 44, 3, NARROW + 1, 4)
ALL = (0, 1, 2, 3, 4)


def leaves(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x_btd, *weights_ed = (
        torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((2, 7, 6), *((width, 6) for width in WIDTHS))
    )
    return x_btd, weights_ed


def loss(outputs: tuple[torch.Tensor, ...], used: tuple[int, ...]) -> torch.Tensor:
    return sum(((index + 1) * outputs[index]).sin().sum() for index in used)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("used", [ALL, (1,), (0, 2), (2,), (0, 1, 4)])
@pytest.mark.parametrize("frozen", [(), (0,), (0, 2, 4), (1, 2), ("x",)])
def test_outputs_and_every_gradient_are_those_of_separate_layers(used: tuple[int, ...], frozen: tuple) -> None:
    x_btd, weights_ed = leaves()
    for name in frozen:
        (x_btd if name == "x" else weights_ed[name]).requires_grad_(False)
    learning = [tensor for tensor in (x_btd, *weights_ed) if tensor.requires_grad]
    separate = tuple(F.linear(x_btd, weight_ed) for weight_ed in weights_ed)
    together = projections(x_btd, weights_ed)
    for found, expected in zip(together, separate, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if not any(tensor.requires_grad for tensor in (x_btd, *(weights_ed[index] for index in used))):
        return
    expected = torch.autograd.grad(loss(separate, used), learning, allow_unused=True)
    for found, wanted in zip(
        torch.autograd.grad(loss(together, used), learning, allow_unused=True), expected, strict=True
    ):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def profiled(function: Callable[[], object]) -> Counter[str]:
    """How often torch calls each of its operators."""
    with torch.profiler.profile() as profile:
        function()
    return Counter({event.key: event.count for event in profile.key_averages()})


def test_narrow_layers_are_one_product_and_products_sum_the_gradients_of_the_input() -> None:
    """Two wide layers and one of all narrow ones: three products and no addition; autograd would add four times."""
    x_btd, weights_ed = leaves()
    outputs: list[torch.Tensor] = []
    forward = profiled(lambda: outputs.extend(projections(x_btd, weights_ed)))
    assert forward["aten::mm"] == 3
    backward = profiled(lambda: torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs]))
    assert backward["aten::addmm"] == 2
    assert backward["aten::mm"] == 1 + 3  # one for the input, and those of the weights
    assert backward["aten::add"] == 0


def test_weights_are_not_copied_for_fewer_tokens_than_they_have_rows() -> None:
    x_btd, weights_ed = leaves()
    assert profiled(lambda: projections(x_btd, weights_ed))["aten::cat"] == 1
    assert profiled(lambda: projections(x_btd[:, :1], weights_ed))["aten::cat"] == 0


def test_torch_counts_its_flops() -> None:
    x_btd, weights_ed = leaves()
    with FlopCounterMode(display=False) as counter:
        loss(projections(x_btd, weights_ed), ALL).backward()
    assert counter.get_total_flops() == 3 * 2 * x_btd.numel() * sum(WIDTHS)


def test_it_is_understood_by_the_meta_device() -> None:
    x_btd, weights_ed = leaves()
    on_meta = x_btd.detach().to("meta").requires_grad_()
    sum(y.sum() for y in projections(on_meta, [w.detach().to("meta") for w in weights_ed])).backward()
    assert on_meta.grad is not None
    assert on_meta.grad.shape == x_btd.shape
