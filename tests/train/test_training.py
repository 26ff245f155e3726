"""What a step computes, under every ZeRO stage and number of ranks, and what a run shows."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from data_pipeline.loader import TrainLoader
from data_pipeline.prepared import complete_index
from loglinear.config import Config, DataConfig
from loglinear.model import build_model
from loglinear.train.folder import RunFolder
from loglinear.train.run import train
from loglinear.train.schedule import learning_rate
from tests.processes import exit_codes, start_ranks
from tests.train.small import GLOBAL_BATCH, SEQ_LEN, STEPS, losses, records, saved_tensors, small_config

TRUTH_STEPS = 6
Truth = tuple[list[float], list[float], dict[str, torch.Tensor]]  # losses, gradient norms, weights


def run(config: Config, ranks: int = 1, log: Path | None = None) -> Path:
    assert exit_codes(start_ranks(ranks, train, config, log=log)) == [0] * ranks
    return config.run.folder


def plain_training(config: Config) -> Truth:
    """Losses, gradient norms and weights by plain PyTorch, every document on its own, in float64."""
    model = build_model(config.model, config.run.seed).double()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    own = config.optimizer
    groups = [{"params": decayed, "weight_decay": own.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=own.betas, eps=own.eps)
    loader = TrainLoader(
        config.data, vocab_size=config.model.vocab_size, seq_len=SEQ_LEN, global_batch=8, micro_batch=GLOBAL_BATCH
    )
    values, norms = [], []
    for step, batch in enumerate(islice(loader, TRUTH_STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = torch.zeros((), dtype=torch.float64)
        inputs, labels = batch.inputs.flatten(), batch.labels.flatten()
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            logits = model(inputs[None, start:end]).double()
            loss = loss + F.cross_entropy(logits[0], labels[start:end], reduction="sum")
        loss = loss / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), own.clip_norm)))
        values.append(loss.item())
        optimizer.step()
    return values, norms, {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}


def clipped(folder: Path, data: DataConfig, stage: int = 1) -> Config:
    train = {"steps": TRUTH_STEPS, "zero_stage": stage}
    return small_config(folder, data, train=train, optimizer={"clip_norm": 0.5})


@pytest.fixture(scope="module")
def truth(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return plain_training(clipped(tmp_path_factory.mktemp("truth"), prepared))


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (3, 2), (1, 4)])
def test_a_step_is_that_of_plain_pytorch(
    prepared: DataConfig, truth: Truth, tmp_path: Path, stage: int, ranks: int
) -> None:
    expected_losses, expected_norms, weights = truth
    run(clipped(tmp_path / "run", prepared, stage), ranks)
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx(expected_losses, abs=1e-5)
    assert [record["grad_norm"] for record in steps] == pytest.approx(expected_norms, rel=1e-4)
    assert max(expected_norms) > 0.5, "else the clipping is not tested"
    assert {record["tokens"] for record in steps} == {GLOBAL_BATCH * SEQ_LEN}
    saved = saved_tensors(tmp_path / "run")
    for name, weight in weights.items():
        torch.testing.assert_close(saved[f"weight/{name}"].double(), weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch": 8}, {"micro_batch": 1}, {"activation_checkpointing": True}],
    ids=["one micro-batch", "eight micro-batches", "activation checkpointing"],
)
def test_how_a_batch_is_computed_does_not_change_the_curve(
    prepared: DataConfig, reference: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = run(small_config(tmp_path / "run", prepared, train=changes))
    torch.testing.assert_close(losses(folder), losses(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(prepared: DataConfig, reference: Path, tmp_path: Path, stage: int) -> None:
    folder = run(small_config(tmp_path / "run", prepared, train={"precision": "bf16", "zero_stage": stage}), ranks=2)
    torch.testing.assert_close(losses(folder), losses(reference), rtol=0, atol=0.05)


def test_a_model_learns_more_than_the_frequencies_of_tokens(prepared: DataConfig, tmp_path: Path) -> None:
    train, optimizer = {"steps": 160}, {"lr": 5e-3, "eps": 1e-8}
    changes = {"train": train, "optimizer": optimizer, "eval": {"every": 160, "samples": 64}}
    folder = run(small_config(tmp_path / "run", prepared, **changes))
    index = complete_index(prepared, 300)
    assert index is not None
    held_out = [record["held_out_loss"] for record in records(folder) if "held_out_loss" in record]
    assert held_out[-1] < index.unigram_entropy - 0.5


def test_tensorboard_shows_what_was_measured(reference: Path) -> None:
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}
    steps = {record["step"]: record for record in records(reference) if "loss" in record}
    shown = range(2, STEPS + 1, 2)
    for tag, name in (("loss/train", "loss"), ("optimizer/grad_norm", "grad_norm"), ("optimizer/learning_rate", "lr")):
        assert scalars[tag] == pytest.approx({step: steps[step][name] for step in shown})
    held_out = {record["step"]: record["held_out_loss"] for record in records(reference) if "held_out_loss" in record}
    assert scalars["loss/held_out"] == pytest.approx(held_out)
    for tag in ("throughput/tokens_per_second", "throughput/mfu", "memory/peak_GiB"):
        assert set(scalars[tag]) == set(shown)
        assert min(scalars[tag].values()) > 0
    model = build_model(RunFolder(reference).load_config().model, seed=0)
    share = 3 * model.flops_per_token(SEQ_LEN) / 1e11  # backward costs twice the forward; train.peak_tflops is 0.1
    for step, speed in scalars["throughput/tokens_per_second"].items():
        assert scalars["throughput/mfu"][step] == pytest.approx(share * speed, rel=1e-5)
    for phase in ("data", "forward", "backward", "optimizer"):
        assert set(scalars[f"step_seconds/{phase}"]) == set(shown)
    for level in range(7):  # those that some document of every batch is long enough for
        tag = f"layer_00/level_{level:02d}"
        means = scalars[f"lambda_mean/{tag}"]
        assert set(means) == {8, 16, 24}
        assert means[8] == pytest.approx(1.0, abs=0.3), "lambda starts at 1"
        histogram = events.Histograms(f"lambda/{tag}")[0].histogram_value
        assert histogram.sum / histogram.num == pytest.approx(means[8], rel=1e-3)
    assert "config/text_summary" in tags["tensors"]
    assert "sample/text_summary" in tags["tensors"]


def test_lambda_moves_away_from_one(reference: Path) -> None:
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    last = events.Scalars("lambda_mean/layer_00/level_01")[-1].value
    assert not math.isclose(last, 1.0, abs_tol=1e-4)


def test_the_console_tells_how_far_it_is_and_what_is_next(prepared: DataConfig, tmp_path: Path) -> None:
    folder = run(small_config(tmp_path / "run", prepared, train={"steps": 4}), log=tmp_path / "log")
    told = (tmp_path / "log").read_text()
    for words in (
        "step 2/4  loss ",
        "tokens/s",
        "unigram entropy of this tokenizer",
        f"tensorboard --logdir {folder}/tensorboard",
        f"loglinear eval {folder}",
        f"loglinear generate {folder} --prompt 'def '",
    ):
        assert words in told
    assert "Warning" not in told
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
