"""What the benchmark of training steps reports, at sizes for a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loglinear.bench.machine import chosen_device
from loglinear.bench.model import Loss, ModelPoint, _Optimizer, _ours, _point, bench_model
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.model import build_model
from tests.model.model_cases import awake, random_tokens, tiny


def run(name: str, pattern: tuple[str, ...]) -> Config:
    tree = {"run": {"name": name}, "model": tiny(pattern).model_dump(), "train": {"peak_tflops": 0.5}}
    return Config.model_validate(tree)


def test_the_output_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = [run("ours", ("log_linear",)), run("softmax", ("softmax",))]
    points = bench_model(configs, (64, 512), 256, "cpu", tmp_path)
    assert [(point.model, point.length, point.tokens) for point in points] == [
        ("ours", 64, 256),
        ("ours", 512, 512),
        ("softmax", 64, 256),
        ("softmax", 512, 512),
    ]
    for point in points:
        assert point.seconds is not None
        config = configs[point.model == "softmax"].model.model_copy(update={"seq_len": point.length})
        model = build_model(config, 0)
        assert point.parameters == model.parameter_count()
        flops = 3 * model.flops_per_token(point.length) * point.tokens
        assert point.mfu == pytest.approx(flops / point.seconds / 0.5e12)
        assert (point.peak_bytes, point.recomputed) == (None, 0)
    record = json.loads((tmp_path / "model.json").read_text())
    assert [ModelPoint(**point) for point in record["points"]] == points
    assert (tmp_path / "model.md").read_text().count("\n| ") == 4
    assert "x |" in capsys.readouterr().out
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("enough", "recomputed"), [(0, 0), (1, 2), (2, 2), (3, 4), (5, None)])
def test_what_does_not_fit_is_tried_with_half_of_the_blocks_recomputed_then_with_all(
    enough: int, recomputed: int | None
) -> None:
    """Of four blocks; None does not fit at all."""
    contender = _ours(run("ours", ("log_linear",)).model_copy(update={"model": tiny(layers=4)}))

    def build(length: int, recomputed: int) -> tuple[torch.nn.Module, Loss]:
        if recomputed < enough:
            raise torch.OutOfMemoryError
        model, loss = contender.build(length, recomputed)
        assert model.recomputed_blocks == recomputed
        return model, loss

    point = _point(replace(contender, build=build), 64, 2, torch.device("cpu"), 0.5e12)
    assert (point.seconds is None) == (recomputed is None)
    assert point.recomputed == (4 if recomputed is None else recomputed)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device(None) == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA GPU"):
        chosen_device("cuda")
    with pytest.raises(UserError, match="--device tpu: take cpu or cuda"):
        chosen_device("tpu")


def test_a_timed_step_in_bf16_is_that_of_adamw_on_fp32_weights() -> None:
    model = awake(tiny()).bfloat16()
    masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    plain = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    timed = _Optimizer(model)
    for step in range(3):
        (model(random_tokens(2, 30, seed=step), random_tokens(2, 30, seed=step + 1)) / 60).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        plain.step()
        timed.update()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            torch.testing.assert_close(parameter, master.bfloat16(), rtol=0.01, atol=1e-6)
            assert parameter.grad is None
