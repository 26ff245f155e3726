"""Calls of the Triton kernels and how far each output and gradient is from the definition in float64.

As a program it computes CASES on a CPU in Triton's interpreter and prints the errors as JSON; the variable that turns
the interpreter on must be set before Triton is imported, so tests start it as a process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.library import opcheck

from loglinear.ops import (
    LogLinearState,
    StateInPlace,
    edges,
    final_state,
    naive_log_linear_attention,
    recurrent,
    recurrent_step,
    recurrent_step_in_place,
)
from loglinear.ops.triton import edge_tables, op, step, tables, triton_log_linear_attention
from loglinear.ops.triton import edges as edge_kernels
from tests.ops.op_cases import (
    Inputs,
    Result,
    Sizes,
    boundaries,
    occupied,
    random_inputs,
    random_state,
    relative_error,
)

SMALL = Sizes(groups=1, heads=2, state_dim=16, head_dim=16, levels=11)
WIDE = replace(SMALL, head_dim=64)  # from here on kernels make the states that are handed in and out
OPERATOR_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def packed(lengths: list[int], starts: tuple[int, ...] | None = None, sizes: Sizes = SMALL) -> Inputs:
    """Documents in one row, behind initial states that hold `starts` tokens."""
    inputs = replace(random_inputs(3, 1, sum(lengths), sizes), cu_seqlens=boundaries(lengths))
    if starts is not None:
        inputs = replace(inputs, initial_state=random_state(4, starts, sizes))
    return inputs


CASES: dict[str, Callable[[], Inputs]] = {
    "one token": lambda: random_inputs(0, 1, 1, SMALL),
    "half a chunk": lambda: random_inputs(0, 1, 64, replace(SMALL, levels=7)),
    "levels of a short sequence": lambda: random_inputs(0, 1, 20, replace(SMALL, levels=6)),
    "several rows, ragged": lambda: random_inputs(1, 2, 300, SMALL),
    "whole chunks": lambda: random_inputs(1, 1, 512, SMALL),
    "a deep tree": lambda: random_inputs(1, 1, 2200, replace(SMALL, heads=1, levels=13)),
    "groups": lambda: random_inputs(2, 1, 200, replace(SMALL, groups=2, heads=4)),
    "heads that are no power of two": lambda: random_inputs(2, 1, 140, replace(SMALL, heads=3)),
    "sizes": lambda: random_inputs(2, 1, 200, replace(SMALL, state_dim=32, head_dim=64)),
    "no level scales": lambda: random_inputs(2, 1, 300, replace(SMALL, levels=None)),
    "documents": lambda: packed([100, 3, 0, 397, 128]),
    "a state": lambda: packed([300], (137,), WIDE),
    "states and documents": lambda: packed([60, 0, 200], (0, 130, 517), WIDE),
    "a state, narrow values": lambda: packed([300], (137,)),
    "a state without level scales": lambda: packed([150], (200,), replace(WIDE, levels=None)),
}


ENDS: dict[str, Callable[[], Inputs]] = {  # of which `final_state` is taken
    "ends of documents": lambda: packed([60, 0, 200], (0, 130, 517), WIDE),
    "ends of documents with groups": lambda: packed([150, 9], (9, 0), replace(WIDE, groups=2, heads=6)),
    "ends of documents, narrow values": lambda: packed([60, 0, 200], (0, 130, 517)),
}


FEW, MANY = 1000, 1  # heads from which on tiles are wide
STEPS = {  # levels, and such a number
    "decoding steps": (10, FEW),
    "decoding steps without level scales": (None, FEW),
    "decoding steps of many heads": (10, MANY),
}


def _weigh(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A scalar whose gradient is random and exact in every dtype, and the same for whatever form made `x`."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(x.shape, generator=rng).bfloat16().double()
    return (x.cpu().double() * weights).sum()


def run(form: Callable, inputs: Inputs) -> Result:
    """Outputs, final state and gradients of a form from random gradients of both; o is in the dtype of `inputs`."""
    inputs = inputs.fresh()
    o, final = form(**inputs.arguments(), output_final_state=True)
    leaves = inputs.leaves()
    loss = _weigh(o, 1) + _weigh(final.buckets, 2)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    filled = dict(zip(leaves, gradients, strict=True))
    if inputs.initial_state is not None:  # empty buckets are zero by contract, so nobody asks for their gradient
        filled["initial_state"] = filled["initial_state"] * occupied(inputs.initial_state).to(filled["g"])
    return Result(o.detach(), final, filled)


def errors(inputs: Inputs, reference: Callable = naive_log_linear_attention) -> dict[str, float]:
    """Relative error of every output and gradient of the kernels, absolute where the truth is zero."""
    actual, wanted = run(triton_log_linear_attention, inputs), run(reference, inputs.fresh(torch.float64))
    pairs = {"o": (actual.o, wanted.o), "final state": (actual.final.buckets, wanted.final.buckets)}
    pairs |= {name: (actual.gradients[name], wanted.gradients[name]) for name in wanted.gradients}
    return {
        name: relative_error(have, want) if float(want.detach().norm()) > 1e-12 else float(have.detach().norm())
        for name, (have, want) in pairs.items()
    }


def end_errors(inputs: Inputs) -> dict[str, float]:
    """Relative errors of what these tokens alone leave, and of its gradients; the definition starts with zeros."""
    state = inputs.initial_state
    assert state is not None
    exact = replace(inputs, initial_state=LogLinearState(state.buckets * 0, state.positions)).fresh(torch.float64)
    final = naive_log_linear_attention(**exact.arguments(), output_final_state=True)[1]
    assert final is not None
    have, want = inputs.fresh(), exact.leaves()
    bounds = {"positions": state.positions, "cu_seqlens": inputs.cu_seqlens}
    own = final_state(*(have.leaves()[name] for name in "kvg"), **bounds)
    gradients = [
        torch.autograd.grad(_weigh(buckets, 2), [leaves[name] for name in "kvg"])
        for buckets, leaves in ((own.buckets, have.leaves()), (final.buckets, want))
    ]
    measured = {f"d{name}": relative_error(*pair) for name, *pair in zip("kvg", *gradients, strict=True)}
    return measured | {"state": relative_error(own.buckets, final.buckets)}


def step_errors(device: str, sizes: Sizes) -> dict[str, float]:
    """Relative errors of three decoding steps of sequences at different positions, one of which fills a new bucket."""
    exact = random_state(1, (0, 5, 7, 62), sizes)
    state = LogLinearState(exact.buckets.float().to(device), exact.positions)
    roomy = state.with_buckets(state.buckets.shape[2] + 1)
    in_place = StateInPlace.copy_of(roomy, exact.positions.to(device, copy=True))
    poison_empty_buckets(in_place)
    measured = {}
    for number in range(3):
        now = random_inputs(number, 4, 1, sizes)
        tensors = [x if x is None else x[:, 0] for x in (now.q, now.k, now.v, now.g, now.level_scales)]
        wanted, exact = recurrent_step(exact, *tensors, scale=0.5)
        given = [x if x is None else x.float().to(device) for x in tensors]
        o, state = recurrent.step_in_triton(state, *given, 0.5)
        q, k, v, g, scales = given
        in_place.sums_sh.add_(g)
        o_in_place = recurrent_step_in_place(in_place, q, k, v, scales, scale=0.5)
        in_place.positions.add_(1)
        measured[f"o {number}"] = relative_error(o.cpu(), wanted)
        measured[f"state {number}"] = relative_error(state.buckets.cpu(), exact.buckets)
        measured[f"o in place {number}"] = relative_error(o_in_place.cpu(), wanted)
        settled = in_place.as_state(in_place.positions.cpu()).buckets.cpu()
        measured[f"state in place {number}"] = relative_error(settled, exact.with_buckets(settled.shape[2]).buckets)
        assert state.positions.tolist() == exact.positions.tolist()
    return measured


def poison_empty_buckets(state: StateInPlace) -> None:
    """What is in a bucket that is not occupied must not matter."""
    for number, position in enumerate(state.positions.tolist()):
        for bucket in range(state.buckets.shape[2]):
            if not position >> bucket & 1:
                state.buckets[number, :, bucket], state.sums_shk[number, :, bucket] = torch.nan, torch.nan


def check_operator() -> None:
    """Schema, fake implementation and autograd of the custom operator agree with what it does."""
    inputs = random_inputs(5, 1, 300, SMALL).fresh(torch.float32)
    for scales in (inputs.leaves()["level_scales"], None):
        tensors = [
            x if x is None else x[0].detach().requires_grad_() for x in (*list(inputs.leaves().values())[:4], scales)
        ]
        opcheck(op._forward.definition, (*tensors, [300], [0], 1.0), test_utils=OPERATOR_CHECKS)
    q, k, v, g, _ = (x if x is None else x.detach().requires_grad_() for x in tensors)
    weights, buckets = (x.detach().requires_grad_() for x in (g.expand(2, -1, -1), torch.rand(1, 2, 3, 16, 64)))
    v = torch.rand(300, 2, 64, requires_grad=True)
    ends = ((k, v, weights[:1].detach().requires_grad_(), [300], [5], 9), (v, q, buckets, weights, [300], [5]))
    for kernel, arguments in zip((edge_kernels.sum_buckets, edge_kernels.read_buckets), ends, strict=True):
        opcheck(kernel.definition, arguments, test_utils=OPERATOR_CHECKS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tables.PIECE, edge_tables.ITEM = 2, 64  # so that what is long is split at these lengths already
    check_operator()
    with patch.object(edges, "has_kernels", lambda x: x.dtype != torch.float64):
        measured = {name: errors(case().fresh(torch.float32)) for name, case in CASES.items()}
        measured |= {name: end_errors(case().fresh(torch.float32)) for name, case in ENDS.items()}
    odd = Sizes(groups=2, heads=4, state_dim=24, head_dim=40)
    for name, (levels, many_heads) in STEPS.items():
        with patch.object(step, "MANY_HEADS", many_heads):
            measured[name] = step_errors("cpu", replace(odd, levels=levels))
    print(json.dumps(measured))
