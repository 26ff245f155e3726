"""The operations around the op in Triton, and how far each output and gradient is from PyTorch in float64.

As a program it computes all cases on a CPU in Triton's interpreter and prints the errors as JSON; the variable that
turns the interpreter on must be set before Triton is imported, so tests start it as a process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch.library import opcheck

from loglinear.ops import neighbours
from loglinear.ops.triton import convolution, cross_entropy, discretise, gated_norm, lambda_mlp, rms_norm
from loglinear.ops.triton.operator import Operator
from tests.ops.op_cases import relative_error
from tests.ops.triton_cases import OPERATOR_CHECKS

EPS = 1e-5
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A call: `form` takes tensors that want gradients, all of them fp32 to begin with."""

    form: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    tensors: tuple[torch.Tensor, ...]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _convolution(tensors: tuple[torch.Tensor, ...], lengths: list[int], start: int = 0) -> Case:
    positions_bt = torch.cat([torch.arange(length) for length in lengths])[None] + start

    def form(x, weight, bias, past=None):
        rows = positions_bt.to(x.device).expand(*x.shape[:2])
        return neighbours.causal_conv_silu(x, weight, bias, rows, past, packed=True)

    return Case(form, tensors)


def _norm(o, v, z, skip, weight):
    return neighbours.skip_gate_norm(o, v, z, skip, weight, EPS)


def _loss(logits: torch.Tensor) -> Case:
    labels = torch.randint(-1, logits.shape[1], logits.shape[:1])
    labels[labels < 0] = IGNORED
    labels[::3] = IGNORED
    return Case(lambda x: neighbours.cross_entropy(x, labels.to(x.device)), (logits,))


def _rms_norm(x, weight):
    return neighbours.rms_norm(x, weight, EPS)


def _rms_norm_and_residual(x, weight, addend=None):
    return neighbours.rms_norm_and_residual(x, addend, weight, EPS)


def _two_norms(x, weight):
    """As in a block, with nothing between them."""
    normed, x = _rms_norm_and_residual(x, weight)
    return _rms_norm_and_residual(x, weight, normed)


def cases(on_gpu: bool) -> Iterator[tuple[str, Case]]:
    """Each with fresh random numbers; sizes that fill no block, and on a GPU those of a model."""
    channels, size, levels, hidden = (70, 24, 14, 32) if not on_gpu else (1024, 64, 17, 64)
    tokens = 300 if not on_gpu else 3001
    lengths = [100, 2, 1, tokens - 103]
    yield (
        "convolution of documents",
        _convolution((normal(1, tokens, channels), normal(4, channels), normal(channels)), lengths),
    )
    yield "convolution of rows", _convolution((normal(2, 50, channels), normal(3, channels), normal(channels)), [50])
    yield (
        "convolution behind a past",
        _convolution(
            (normal(2, 50, channels), normal(4, channels), normal(channels), normal(2, 3, channels)), [50], start=2
        ),
    )
    behind = (normal(3, 2, channels), normal(4, channels), normal(channels), normal(3, 3, channels))
    yield "convolution of fewer tokens than taps behind a past", _convolution(behind, [1, 1], start=1)
    yield "one tap", _convolution((normal(2, 50, channels), normal(1, channels), normal(channels)), [50])
    heads = (normal(2, tokens, 3, size) for _ in range(3))
    yield "skip, gate and norm", Case(_norm, (*heads, normal(3), normal(size)))
    steps = (3 * normal(2, tokens, 3), normal(3), normal(3), normal(2, tokens, 3, size))
    yield "decays and steps", Case(neighbours.discretise, steps)
    mlp = (normal(hidden, levels) / 4, normal(hidden), normal(levels, hidden) / 4, normal(levels))
    yield "lambda", Case(neighbours.adaptive_scales, (normal(2, tokens, 3, levels), *mlp))
    few = (normal(16, 5) / 2, normal(16), normal(5, 16) / 4, normal(5))
    yield "lambda of few levels", Case(neighbours.adaptive_scales, (normal(1, 40, 2, 5), *few))
    yield "RMSNorm", Case(_rms_norm, (normal(2, tokens, channels), normal(channels)))
    beside = Case(_rms_norm_and_residual, (normal(2, tokens, channels), normal(channels)))
    yield "RMSNorm and residual", beside
    yield "RMSNorm of a sum", replace(beside, tensors=(*beside.tensors, normal(2, tokens, channels)))
    compiled = torch.compile(_two_norms, backend="aot_eager", fullgraph=True)
    yield "two norms, compiled", replace(beside, form=compiled)
    yield "cross-entropy", _loss(normal(tokens, 37 * channels))
    if on_gpu:  # a library's
        yield "silu product", Case(neighbours.silu_product, (normal(2, tokens, channels), normal(2, tokens, channels)))


def errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative error of outputs and gradients for inputs and random output gradients that `dtype` can hold."""
    given = [x.to(dtype).to(device).requires_grad_() for x in case.tensors]
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    several_steps = patch.object(lambda_mlp, "MOST_PROGRAMS", 8)
    with patch.object(neighbours, "_has_kernels", lambda x: x.dtype != torch.float64), several_steps:
        actual, wanted = (_outputs(case.form(*tensors)) for tensors in (given, exact))
    weights = [torch.randn_like(x) for x in actual]
    exact_weights = [weight.double().cpu() for weight in weights]
    gradients = torch.autograd.grad(actual, given, weights)
    exact_gradients = torch.autograd.grad(wanted, exact, exact_weights)
    have, want = [*actual, *gradients], [*wanted, *exact_gradients]
    return {str(n): relative_error(x.cpu(), y) for n, (x, y) in enumerate(zip(have, want, strict=True))}


def token_by_token(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of what the op reads of one token after the other, for 1, 2 and 4 taps."""
    found, channels, heads = {}, (130, 20, 150), 6
    for taps in (1, 2, 4):
        shapes = [*((3, 6, c) for c in channels), *((taps, c) for c in channels), *((c,) for c in channels)]
        given = [
            x.to(dtype) for x in (*(normal(*s) for s in shapes), 3 * normal(3, 6, heads), normal(heads), normal(heads))
        ]
        wanted = _inputs_at_once([x.double() for x in given])
        x, weights, biases, (raw, *rates) = (tuple(x.to(device) for x in given[n : n + 3]) for n in (0, 3, 6, 9))
        pasts = tuple(each.new_zeros(3, taps - 1, each.shape[2]) for each in x)
        steps, sums = [], torch.zeros(3, heads, dtype=torch.float64, device=device)
        for t in range(6):
            now = tuple(each[:, t].contiguous() for each in x)
            made = neighbours.step_inputs(now, weights, biases, pasts, raw[:, t].contiguous(), *rates, sums)
            steps.append((*made, sums.clone()))
        actual = [torch.stack(each, 1).cpu() for each in zip(*steps, strict=True)]
        found |= {f"{taps} {n}": relative_error(y, z) for n, (y, z) in enumerate(zip(actual, wanted, strict=True))}
    return found


def _inputs_at_once(given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same of all tokens of each row, in PyTorch."""
    rows = torch.arange(6).expand(3, 6)
    triples = zip(given[:3], given[3:6], given[6:9], strict=True)
    q, k, v = (neighbours.causal_conv_silu(*triple, rows, packed=False) for triple in triples)
    raw, *rates = given[9:]
    g, weighted, _ = neighbours.discretise(raw, *rates, v.unflatten(2, (raw.shape[2], -1)))
    return [q, k, v, weighted.flatten(2), g.cumsum(1)]


def few_rows(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative error of the products of few tokens with what stands around them, within and beyond a block."""
    found = {}
    for width, heads, size in ((70, 5, 14), (1500, 25, 60)):
        given = [x.to(dtype) for x in (normal(3, width), normal(width), *(normal(e, width) for e in (5, 8, 1, 33, 33)))]
        around = [normal(3, 9), *(normal(3, heads, size) for _ in range(3)), normal(heads), normal(size)]
        given += [x.to(dtype) for x in (*around, normal(9, width))]
        wanted = _few_rows_defined(*(x.double() for x in given))
        actual = _few_rows_in_one_launch_each(*(x.to(device) for x in given))
        found |= {
            f"{width} {n}": relative_error(y.cpu(), z) for n, (y, z) in enumerate(zip(actual, wanted, strict=True))
        }
    return found


def _few_rows_defined(x, norm, *tensors: torch.Tensor) -> list[torch.Tensor]:
    *weights, onto, o, v, z, skip, head_norm, narrow = tensors
    silu = torch.nn.functional.silu
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    products = [normed @ weight.T for weight in weights]
    y = (o + skip[:, None] * v) * silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * head_norm
    return [*products, silu(products[3]) * products[4], onto + x @ narrow.T, onto + y.flatten(1) @ narrow.T]


def _few_rows_in_one_launch_each(x, norm, *tensors: torch.Tensor) -> list[torch.Tensor]:
    *weights, onto, o, v, z, skip, head_norm, narrow = tensors
    return [
        *neighbours.norm_linears(x, norm, EPS, tuple(weights)),
        neighbours.norm_gated_linear(x, norm, EPS, *weights[3:]),
        neighbours.linear_onto(onto, x, narrow),
        neighbours.skip_gate_norm_onto(onto, o, v, z, skip, head_norm, EPS, narrow),
    ]


def _outputs(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _operator_calls() -> Iterator[tuple[Operator, list[Any]]]:
    """Each custom operator, and arguments that want gradients."""
    x, weight, bias, positions = normal(1, 20, 8), normal(2, 8), normal(8), torch.arange(20)[None]
    o, v, z = (normal(20, 2, 8) for _ in range(3))
    layers = (normal(16, 5), normal(16), normal(5, 16), normal(5))
    for operator, arguments in (
        (convolution.causal_conv_silu, (x, weight, bias, positions, None)),
        (convolution.causal_conv_silu, (x, weight, bias, positions + 9, normal(1, 1, 8))),
        (gated_norm.skip_gate_norm, (o, v, z, normal(2), normal(8), EPS)),
        (discretise.discretise, (normal(20, 2), normal(2), normal(2), v)),
        (lambda_mlp.lambda_mlp, (normal(40, 5), *layers)),
        (rms_norm.rms_norm, (normal(20, 9), normal(9), EPS)),
        (rms_norm.add_rms_norm, (normal(20, 9), normal(20, 9), normal(9), EPS)),
        (cross_entropy.cross_entropy, (normal(20, 9), torch.arange(20) % 10 - 1)),
    ):
        yield (
            operator,
            [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments],
        )


def check_operators() -> None:
    """Schema, fake implementation and autograd of each custom operator agree with what it does."""
    for operator, arguments in _operator_calls():
        opcheck(operator.definition, arguments, test_utils=OPERATOR_CHECKS)


def check_sums() -> None:
    """One reduction and one cast make the gradients of all weights of a kernel, however many they are."""
    for operator, arguments in _operator_calls():
        if operator is cross_entropy.cross_entropy:
            continue  # it has no weights
        given = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        assert _backward_counts(operator(*arguments), given)["aten::sum"] == 1
    layers = (normal(16, 5), normal(16), normal(5, 16), normal(5))
    for halves in range(5):  # the other layers remain fp32
        weights = [w.bfloat16() if n < halves else w for n, w in enumerate(layers)]
        given = [x.detach().requires_grad_() for x in (normal(40, 5), *weights)]
        counts = _backward_counts(lambda_mlp.lambda_mlp(*given), given)
        assert (counts["aten::sum"], counts["aten::_to_copy"]) == (1, halves > 0)


def _backward_counts(outputs: torch.Tensor | tuple[torch.Tensor, ...], given: list[torch.Tensor]) -> Counter[str]:
    """How often a backward pass calls each operator of torch."""
    with torch.profiler.profile() as profile:
        torch.autograd.grad(outputs, given, outputs)
    return Counter({event.key: event.count for event in profile.key_averages()})


def check_additions() -> None:
    """What comes along an input that is given on is added by the operation's backward pass; autograd adds nothing."""
    for form, shapes in (
        (_rms_norm_and_residual, ((20, 9), (9,))),
        (_rms_norm_and_residual, ((20, 9), (9,), (20, 9))),
        (neighbours.discretise, ((1, 20, 2), (2,), (2,), (1, 20, 2, 8))),
    ):
        given = [normal(*shape).requires_grad_() for shape in shapes]
        assert not [key for key in _backward_counts(form(*given), given) if key.startswith("aten::add")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check_operators()
    check_sums()
    measured = {name: errors(case, torch.float32, "cpu") for name, case in cases(on_gpu=False)}
    measured["inputs, token by token"] = token_by_token(torch.float32, "cpu")
    with patch.object(neighbours, "_has_kernels", lambda x: x.dtype != torch.float64):
        check_additions()
        measured["products of few tokens"] = few_rows(torch.float32, "cpu")
    print(json.dumps(measured))
