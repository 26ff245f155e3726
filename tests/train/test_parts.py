"""The small parts of the loop: schedule, stop requests, metrics file, optimizer groups, peak speed."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loglinear.config import Config, ModelConfig, OptimizerConfig
from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.ops.lambda_map import LambdaMap
from loglinear.ops.peak import PEAK_TFLOPS_BF16, peak_flops
from loglinear.train.folder import RunFolder, truncate_metrics
from loglinear.train.level_scales import LevelScaleStatistics
from loglinear.train.monitor import Monitor
from loglinear.train.optim import make_optimizer
from loglinear.train.schedule import learning_rate
from loglinear.train.signals import ASKING, StopRequest
from loglinear.train.timing import StepTimer


def scheduled(steps: int, **schedule: object) -> Config:
    return Config.model_validate({"optimizer": {"lr": 2.0}, "train": {"steps": steps}, "schedule": schedule})


def test_cosine_by_hand() -> None:
    config = scheduled(8, warmup_steps=4, final_ratio=0.1)
    rates = [learning_rate(config, step) for step in range(8)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[5] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rates[7] == pytest.approx(0.2)


def test_wsd_by_hand() -> None:
    config = scheduled(10, kind="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])


@given(st.sampled_from(["cosine", "wsd"]), st.integers(0, 20), st.integers(1, 20), st.floats(0, 1))
def test_a_schedule_rises_then_falls_within_its_bounds(kind: str, warmup: int, decay: int, final: float) -> None:
    steps = warmup + decay + 5
    own = {"decay_steps": decay} if kind == "wsd" else {}
    config = scheduled(steps, kind=kind, warmup_steps=warmup, final_ratio=final, **own)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0.0 <= rate <= 2.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(later <= before + 1e-12 for before, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rates[-1] == pytest.approx(2.0 * final)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", ASKING)
def test_a_signal_only_asks(number: signal.Signals) -> None:
    request = StopRequest()
    request.listen()
    assert not request.asked
    os.kill(os.getpid(), number)
    assert request.asked


@pytest.mark.usefixtures("handlers")
def test_a_second_interrupt_from_the_keyboard_is_not_ignored() -> None:
    request = StopRequest()
    request.listen()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_metrics_beyond_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    truncate_metrics(path, 2)
    assert path.read_text() == "".join(lines[:2])
    truncate_metrics(tmp_path / "absent", 2)


def test_only_matrices_decay() -> None:
    model = build_model(ModelConfig(layers=2, pattern=("log_linear", "softmax")), seed=0)
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert decayed | others == set(names.values())
    assert {"blocks.0.mixer.q_proj.weight", "embedding.weight", "blocks.1.mlp.down.weight"} <= decayed
    assert {"norm.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias", "blocks.0.mixer.D"} <= others


def test_lambda_is_taken_at_the_tokens_that_read_a_level() -> None:
    """A token reads its own level 0, and level l if bit l - 1 of its position is set."""
    model = build_model(ModelConfig(layers=1, vocab_size=9), seed=0)
    statistics = LevelScaleStatistics(model)
    scales: list[torch.Tensor] = []
    model.blocks[0].mixer.lambda_map.register_forward_hook(lambda module, inputs, output: scales.append(output))
    with torch.no_grad():
        torch.nn.init.normal_(model.embedding.weight)
        for parameter in model.blocks[0].mixer.lambda_map.parameters():
            parameter.normal_()
        model(torch.arange(13)[None] % 9)
        assert not list(statistics.take()), "it was not to record"
        statistics.recording = True
        model(torch.arange(13)[None] % 9)
    found = {level: values for layer, level, values in statistics.take() if layer == 0}
    readers = {0: range(13), 1: range(1, 13, 2), 2: (2, 3, 6, 7, 10, 11), 3: (4, 5, 6, 7, 12), 4: range(8, 13)}
    assert set(found) == set(readers)
    for level, tokens in readers.items():
        assert found[level].equal(scales[1][0, list(tokens), :, level].flatten())
    assert not list(statistics.take())


@pytest.mark.parametrize("broken", [math.nan, 1e30])
def test_lambdas_of_a_broken_step_are_shown_as_far_as_they_can_be(tmp_path: Path, broken: float) -> None:
    """TensorBoard makes no histogram of them, and says so with an error, which must not end the run."""
    config = ModelConfig(dim=16, layers=2, vocab_size=9, seq_len=8)
    model, folder = build_model(config, 0), RunFolder(tmp_path)
    statistics = LevelScaleStatistics(model)
    first = next(module for module in model.modules() if isinstance(module, LambdaMap))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(broken)
    statistics.recording = True
    model(torch.arange(8)[None])
    monitor = Monitor(folder, Config(model=config), 0, 1.0, 1.0)
    monitor.level_scales(1, statistics)
    monitor.close()
    shown = EventAccumulator(str(folder.tensorboard)).Reload()
    assert "lambda_mean/layer_00/level_00" in shown.Tags()["scalars"]
    assert shown.Tags()["histograms"] == []


def test_phases_add_up_and_start_anew() -> None:
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with timer("forward"):
            math.factorial(2000)
    with timer("backward"):
        pass
    seconds = timer.take()
    assert set(seconds) == {"forward", "backward"}
    assert seconds["forward"] > seconds["backward"] >= 0
    assert timer.take() == {}


def test_the_peak_is_the_users_or_measured_or_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_flops(gpu, given_tflops=3.0) == 3e12
    assert 1e9 < peak_flops(cpu, None) < 1e14
    names = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A100-SXM4-80GB": 312.0}
    for name, tflops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, None) == tflops * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Other 9000")
    with pytest.raises(UserError, match=r"the peak speed of 'Other 9000' is not known: set train.peak_tflops"):
        peak_flops(gpu, None)
    assert all(tflops > 0 for tflops in PEAK_TFLOPS_BF16.values())
