"""Every form against the definition written as loops, and against the special cases that are known by other names.

Shapes: b batch, t query time, s key time, h value head, g query/key group, n state (key) size, p value head size,
l level.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loglinear.ops import log_linear_attention
from tests.ops.op_cases import FORMS, Inputs, Sizes, boundaries, literal, random_inputs, relative_error

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("levels", [5, None])
def test_rows_follow_the_definition(form: str, groups: int, levels: int | None) -> None:
    inputs = replace(random_inputs(0, 2, 13, Sizes(groups=groups, levels=levels)), scale=0.5)
    o, final = FORMS[form](**inputs.arguments())
    assert final is None
    torch.testing.assert_close(o, literal(inputs), **CLOSE)


def test_packed_documents_follow_the_definition(form: str) -> None:
    """Documents of one row know nothing of each other; some are empty, first, in between and last."""
    inputs = replace(random_inputs(1, 1, 30), cu_seqlens=boundaries([0, 9, 1, 0, 17, 3, 0]))
    o, _ = FORMS[form](**inputs.arguments())
    torch.testing.assert_close(o, literal(inputs), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 2, 8, 32])
def test_a_longer_sequence_follows_the_definition(chunk: int) -> None:
    inputs = random_inputs(2, 1, 71, Sizes(heads=1))
    o, _ = FORMS["chunk"](**inputs.arguments(), chunk=chunk)
    torch.testing.assert_close(o, literal(inputs), **CLOSE)


def gated_linear_attention(inputs: Inputs) -> torch.Tensor:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, by a plain recurrence (Mamba-2, RetNet)."""
    batch, time, heads = inputs.g.shape
    q_bthn, k_bthn = (x.repeat_interleave(heads // x.shape[2], 2) for x in (inputs.q, inputs.k))
    state_bhnp = torch.zeros(batch, heads, q_bthn.shape[3], inputs.v.shape[3], dtype=torch.float64)
    outputs = []
    for t in range(time):
        new_bhnp = torch.einsum("bhn,bhp->bhnp", k_bthn[:, t], inputs.v[:, t])
        state_bhnp = inputs.g[:, t].exp()[..., None, None] * state_bhnp + new_bhnp
        outputs.append(torch.einsum("bhn,bhnp->bhp", q_bthn[:, t], state_bhnp))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("given", [True, False])
def test_lambda_of_one_is_gated_linear_attention(form: str, given: bool) -> None:
    inputs = random_inputs(3, 2, 75, Sizes(groups=2, levels=None))
    if given:
        inputs = replace(inputs, level_scales=torch.ones(2, 75, 4, 8, dtype=torch.float64))
    o, _ = FORMS[form](**inputs.arguments())
    torch.testing.assert_close(o, gated_linear_attention(inputs), **CLOSE)


def test_lambda_of_one_without_decay_is_causal_linear_attention(form: str) -> None:
    inputs = random_inputs(4, 1, 75, Sizes(groups=4, levels=None))
    inputs = replace(inputs, g=torch.zeros_like(inputs.g))
    o, _ = FORMS[form](**inputs.arguments())
    scores_bhts = torch.einsum("bthn,bshn->bhts", inputs.q, inputs.k).tril()
    torch.testing.assert_close(o, torch.einsum("bhts,bshp->bthp", scores_bhts, inputs.v), **CLOSE)


@pytest.mark.parametrize("level", range(7))
def test_one_level_alone_reads_its_bucket_and_nothing_else(form: str, level: int) -> None:
    """Keys and queries are 1 and values are the powers of two, so a sum says who is in it."""
    time = 50
    ones_b = torch.ones(1, time, 1, 1, dtype=torch.float64)
    v_bthp = (2.0 ** torch.arange(time, dtype=torch.float64)).view(1, time, 1, 1)
    scales_bthl = torch.zeros(1, time, 1, 7, dtype=torch.float64)
    scales_bthl[..., level] = 1.0
    o, _ = FORMS[form](ones_b, ones_b, v_bthp, torch.zeros(1, time, 1, dtype=torch.float64), scales_bthl)
    wanted = [sum(2**s for s in range(t + 1) if (t ^ s).bit_length() == level) for t in range(time)]
    assert o.flatten().tolist() == wanted


def test_the_public_op_is_one_of_the_forms() -> None:
    inputs = random_inputs(5, 1, 130)
    o, final = log_linear_attention(**inputs.arguments(), output_final_state=True)
    wanted, wanted_final = FORMS["naive"](**inputs.arguments(), output_final_state=True)
    assert relative_error(o, wanted) < 1e-12
    assert final is not None
    assert wanted_final is not None
    assert relative_error(final.buckets, wanted_final.buckets) < 1e-12
