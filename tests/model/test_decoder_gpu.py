"""Decoding through CUDA graphs: the logits of float64 on a CPU, and the same text."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from loglinear.config import LevelScaleName, LogLinearConfig
from loglinear.model.decoder import Decoder
from loglinear.model.generation import generate
from tests.model.model_cases import PATTERNS, awake, random_tokens, tiny
from tests.ops.op_cases import relative_error

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


@pytest.mark.parametrize("batch", [1, 3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level_scale", get_args(LevelScaleName))
@torch.no_grad()
def test_steps_are_those_of_decode_in_both_dtypes(level_scale: LevelScaleName, dtype: torch.dtype, batch: int) -> None:
    """Not much further from float64 than `decode` in the same dtype is, over steps of which one fills a bucket."""
    own = LogLinearConfig(heads=4, head_dim=32, groups=2, state_dim=16, level_scale=level_scale, level_scale_hidden=16)
    model = awake(tiny(log_linear=own, dim=96, mlp_dim=72)).to(dtype).cuda()
    exact_model = awake(tiny(log_linear=own, dim=96, mlp_dim=72)).to(dtype).double()
    tokens_bt = random_tokens(batch, 40)
    _, exact = exact_model.decode(tokens_bt[:, :28], exact_model.initial_state(batch))
    _, plain = model.decode(tokens_bt[:, :28].cuda(), model.initial_state(batch))
    decoder, found, decoded, wanted = Decoder(model, plain), [], [], []
    for t in range(28, 40):
        now_b1 = tokens_bt[:, t : t + 1]
        found.append(decoder.step(now_b1.cuda()).double().cpu())
        logits_bv, plain = model.decode(now_b1.cuda(), plain)
        decoded.append(logits_bv.double().cpu())
        logits_bv, exact = exact_model.decode(now_b1, exact)
        wanted.append(logits_bv)
    errors = [relative_error(torch.stack(x), torch.stack(wanted)) for x in (found, decoded)]
    assert errors[0] < 1.5 * errors[1] + 1e-5


def test_generated_text_is_that_without_graphs() -> None:
    model = awake(tiny()).cuda()
    plain, captured = (
        list(generate(model, [1, 2, 3], 50, seed=5, device="cuda", graphs=graphs)) for graphs in (False, True)
    )
    assert captured == plain
