"""States: a sequence may be cut anywhere, and each form goes on from what any other handed over.

Shapes: b batch, t time, h value head, g query/key group, n state (key) size, p value head size, l level, k bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loglinear.ops import LogLinearState, naive_log_linear_attention, recurrent_step
from tests.ops.op_cases import (
    FORMS,
    Inputs,
    Result,
    Sizes,
    assert_close,
    boundaries,
    literal,
    occupied,
    random_inputs,
    random_state,
    run,
    weighted_sum,
)

forms = st.sampled_from(list(FORMS))


def run_in_two_halves(inputs: Inputs, lengths: Sequence[int], cuts: Sequence[int], pair: tuple[str, str]) -> Result:
    """Documents cut at `cuts`: all first parts in one call, all second parts in another, gradients through both."""
    inputs = inputs.fresh()
    starts = boundaries(lengths).tolist()
    halves = (
        [range(start, start + cut) for start, cut in zip(starts, cuts, strict=False)],
        [range(start + cut, start + length) for start, cut, length in zip(starts, cuts, lengths, strict=False)],
    )
    index_t = [torch.tensor(list(itertools.chain(*half)), dtype=torch.int64) for half in halves]
    state = None
    o_bthp = torch.zeros_like(inputs.v)
    for form, half, index in zip(pair, halves, index_t, strict=True):
        part = replace(inputs.tokens(index, [len(tokens) for tokens in half]), initial_state=state)
        o, state = FORMS[form](**part.arguments(), output_final_state=True)
        o_bthp = o_bthp.index_copy(1, index, o)
    assert state is not None
    loss = weighted_sum(o_bthp, 1) + weighted_sum(state.buckets, 2)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Result(o_bthp.detach(), state, dict(zip(leaves, gradients, strict=True)))


@st.composite
def cut_documents(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths of documents and where each is cut; each half holds at least one token."""
    lengths = draw(st.lists(st.integers(0, 45), min_size=1, max_size=3))
    cuts = [draw(st.integers(0, length)) for length in lengths]
    return [length + 2 for length in lengths], [cut + 1 for cut in cuts]


@settings(max_examples=60, derandomize=True)
@given(documents=cut_documents(), pair=st.tuples(forms, forms), groups=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_a_sequence_may_be_cut_anywhere(
    documents: tuple[list[int], list[int]], pair: tuple[str, str], groups: int, seed: int
) -> None:
    lengths, cuts = documents
    inputs = replace(random_inputs(seed, 1, sum(lengths), Sizes(groups=groups)), cu_seqlens=boundaries(lengths))
    assert_close(run_in_two_halves(inputs, lengths, cuts, pair), run("naive", inputs))


@pytest.mark.parametrize("pair", list(itertools.product(FORMS, FORMS)))
def test_any_form_goes_on_from_any_other(pair: tuple[str, str]) -> None:
    lengths, cuts = [100, 21, 64], [67, 0, 64]
    inputs = replace(random_inputs(7, 1, sum(lengths)), cu_seqlens=boundaries(lengths))
    assert_close(run_in_two_halves(inputs, lengths, cuts, pair), run("naive", inputs))


def test_many_cuts_lead_to_the_same_end() -> None:
    """Pieces of one row, handed from form to form."""
    inputs = random_inputs(8, 2, 90)
    state, outputs = None, []
    cuts = [0, 1, 2, 19, 20, 52, 90]
    for form, (start, end) in zip(itertools.cycle(FORMS), itertools.pairwise(cuts), strict=False):
        named = {name: x[:, start:end] for name, x in inputs.leaves().items()}
        o, state = FORMS[form](**named, initial_state=state, output_final_state=True)
        outputs.append(o)
    wanted = run("naive", inputs)
    assert state is not None
    assert_close(Result(torch.cat(outputs, 1), state, wanted.gradients), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_the_final_state_holds_the_buckets_by_definition(form: str) -> None:
    """Bucket b after T tokens: sum over its positions of exp(G_last - G_s) k_s v_s^T, and zero where bit b is 0."""
    inputs = random_inputs(9, 1, 77, Sizes(heads=1))
    state = run(form, inputs).final
    total_t = inputs.g[0, :, 0].cumsum(0)
    assert state.positions.tolist() == [77]
    for bucket, actual_np in enumerate(state.buckets[0, 0]):
        wanted_np = torch.zeros_like(actual_np)
        first = (77 >> (bucket + 1)) << (bucket + 1)
        for s in range(first, first + 2**bucket) if 77 >> bucket & 1 else ():
            wanted_np += (total_t[-1] - total_t[s]).exp() * torch.outer(inputs.k[0, s, 0], inputs.v[0, s, 0])
        torch.testing.assert_close(actual_np, wanted_np, rtol=1e-10, atol=1e-10)


def test_steps_of_sequences_at_different_positions() -> None:
    sizes = Sizes(groups=2)
    positions = (0, 1, 6, 7, 64)
    inputs = replace(random_inputs(10, 5, 20, sizes), initial_state=random_state(10, positions, sizes))
    state = inputs.initial_state
    assert state is not None
    outputs = []
    for t in range(20):
        o_bhp, state = recurrent_step(
            state, *(x[:, t] for name, x in inputs.leaves().items() if name != "initial_state")
        )
        outputs.append(o_bhp)
    o, final = naive_log_linear_attention(**inputs.arguments(), output_final_state=True)
    assert final is not None
    torch.testing.assert_close(torch.stack(outputs, 1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.buckets, final.buckets, rtol=1e-10, atol=1e-10)
    assert state.positions.tolist() == [position + 20 for position in positions]


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_in_empty_buckets_is_never_read(form: str) -> None:
    sizes = Sizes(groups=2)
    state = random_state(13, (5, 8), sizes, spare=1)
    garbage = replace(state, buckets=state.buckets + 1e3 * (1 - occupied(state)))
    inputs = random_inputs(13, 2, 21, sizes)
    clean, dirty = (run(form, replace(inputs, initial_state=initial)) for initial in (state, garbage))
    assert_close(dirty, clean)


def test_decoding_needs_no_more_buckets_than_bits() -> None:
    state = LogLinearState.empty(1, 4, 3, 2, dtype=torch.float64)
    inputs = random_inputs(11, 1, 40)
    outputs = []
    for t in range(40):
        o_bhp, state = recurrent_step(state, *(x[:, t] for x in inputs.leaves().values()))
        outputs.append(o_bhp)
        assert state.buckets.shape[2] == (t + 1).bit_length()
    torch.testing.assert_close(torch.stack(outputs, 1), literal(inputs), rtol=1e-10, atol=1e-10)


def test_states_of_documents_are_cut_and_joined() -> None:
    state = random_state(12, (3, 0, 9), Sizes())
    joined = LogLinearState.concatenate([state[:1].with_buckets(2), state[1:2], state[2:]])
    assert torch.equal(joined.buckets, state.buckets)
    assert torch.equal(joined.positions, state.positions)
    assert state.with_buckets(2) is state
    assert state.with_buckets(6).buckets.shape[2] == 6
