"""Decoding through CUDA graphs: the logits of float64 on a CPU, and the same text."""

from __future__ import annotations

import pytest
import torch

from loglinear.model.decoder import Decoder
from loglinear.model.generation import generate
from tests.model.model_cases import PATTERNS, awake, random_tokens, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_steps_give_the_logits_of_float64_while_buckets_fill(pattern: str) -> None:
    model = awake(tiny(PATTERNS[pattern], seq_len=64)).double()
    tokens_bt, lengths = random_tokens(3, 70), torch.tensor([9, 1, 5])
    _, exact = model.read(tokens_bt[:, :9], model.initial_state(3), lengths)
    wanted = []
    for t in range(9, 70):
        logits_bv, exact = model.decode(tokens_bt[:, t : t + 1], exact)
        wanted.append(logits_bv)

    model.float().cuda()
    _, state = model.read(tokens_bt[:, :9].cuda(), model.initial_state(3), lengths)
    decoder = Decoder(model, state)
    for t, logits_bv in enumerate(wanted, 9):
        found_bv = decoder.step(tokens_bt[:, t : t + 1].cuda())
        assert found_bv.cpu().double().allclose(logits_bv, rtol=0, atol=1e-4 * float(logits_bv.abs().max())), t


def test_generated_text_is_that_without_graphs() -> None:
    model = awake(tiny()).cuda()
    plain, captured = (
        list(generate(model, [1, 2, 3], 50, seed=5, device="cuda", graphs=graphs)) for graphs in (False, True)
    )
    assert captured == plain
