"""What the benchmark of decoding reports, at sizes for a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loglinear.bench.decode import DecodePoint, bench_decode, random_state, state_bytes
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.model import build_model
from tests.model.model_cases import awake, random_tokens, tiny

LOG_LINEAR = Config.model_validate({"run": {"name": "ours"}, "model": tiny().model_dump()})
SOFTMAX = Config.model_validate({"run": {"name": "softmax"}, "model": tiny(("softmax",)).model_dump()})


def by_hand(model: str, batch: int, context: int) -> int:
    """Bytes: matrices of 5 x 6 for 4 heads and every bucket, or keys and values of 3 heads of 8; 2 layers, fp32."""
    if model == "softmax":
        return 2 * (batch * context * 3 * 8 * 2 * 4 + 8 * batch) + 8 * batch
    matrices = batch * context.bit_length() * 4 * 5 * 6 * 4
    convolutions = batch * 3 * (2 * 5 + 2 * 5 + 4 * 6) * 4
    return 2 * (matrices + convolutions + 8 * batch) + 8 * batch


def test_the_output_is_whole_and_bytes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = bench_decode([LOG_LINEAR, SOFTMAX], (64, 1000), (1, 3), "cpu", tmp_path)
    assert [(point.model, point.batch, point.context) for point in points] == [
        (model, batch, context) for model in ("ours", "softmax") for batch in (1, 3) for context in (64, 1000)
    ]
    for point in points:
        assert point.milliseconds is not None
        assert point.milliseconds > 0
        assert point.state_bytes == by_hand(point.model, point.batch, point.context)
    record = json.loads((tmp_path / "decode.json").read_text())
    assert [DecodePoint(**point) for point in record["points"]] == points
    table = (tmp_path / "decode.md").read_text()
    assert table.count("\n| ") == 6
    assert f"{by_hand('softmax', 3, 1000) / by_hand('ours', 3, 1000):.1f} |" in table
    assert "| 3 | 1,000 |" in capsys.readouterr().out
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("pattern", [("log_linear",), ("softmax",), ("log_linear", "softmax")])
@torch.no_grad()
def test_a_random_state_is_like_that_of_a_prompt(pattern: tuple[str, ...]) -> None:
    model = build_model(tiny(pattern), 0)
    _, wanted = model.decode(random_tokens(3, 77), model.initial_state(3))
    found = random_state(model, 3, 77, 5)
    assert state_bytes(found) == state_bytes(wanted)
    assert found.positions.equal(wanted.positions)
    for ours, prompts in zip(found.layers, wanted.layers, strict=True):
        if hasattr(ours, "memory"):
            assert ours.memory.buckets.shape == prompts.memory.buckets.shape
            occupied = [(layer.memory.buckets != 0).flatten(3).any(3).all(0).all(0) for layer in (ours, prompts)]
            assert occupied[0].equal(occupied[1])
    for _ in range(3):
        _, found = model.decode(random_tokens(3, 1), found)
        _, wanted = model.decode(random_tokens(3, 1), wanted)
    assert state_bytes(found) == state_bytes(wanted)


@torch.no_grad()
def test_the_baselines_cache_in_place_gives_the_same_logits() -> None:
    model = awake(tiny(("softmax",)))
    state = random_state(model, 2, 40, 6)
    plain = type(state)(
        tuple(type(layer).__base__(layer.k_bshp, layer.v_bshp, layer.lengths) for layer in state.layers),
        state.positions,
    )
    for step in range(6):
        tokens_bt = random_tokens(2, 1, seed=step)
        logits_bv, state = model.decode(tokens_bt, state)
        wanted_bv, plain = model.decode(tokens_bt, plain)
        torch.testing.assert_close(logits_bv, wanted_bv)


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(UserError, match="a context of 16 tokens is too short"):
        bench_decode([SOFTMAX], (1024, 16), (1,), "cpu", None)
