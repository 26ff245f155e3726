"""Runs side by side against the same runs alone, trained by plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loglinear.config import Config
from loglinear.experiments.ensemble import Ensemble, Run, Trainer
from loglinear.experiments.examples import Cell, Examples
from loglinear.experiments.mqar import spread_recall
from loglinear.experiments.protocol import MODES, Mode
from loglinear.model import build_model
from loglinear.train.optim import make_optimizer
from loglinear.train.schedule import learning_rate
from tests.experiments.small import small_experiment

RUNS = (Run(1e-2, 3), Run(3e-3, 4), Run(1e-2, 5))
CPU = torch.device("cpu")
BATCH, CLIP = 4, 5.3  # some gradients are larger, some smaller


def config_of(mode: Mode) -> Config:
    return small_experiment("mqar", batch=BATCH, optimizer={"clip_norm": CLIP}).config(mode)


def parts() -> list[Examples]:
    return [spread_recall(Cell(length, 2, 12), 16, np.random.default_rng(length)) for length in (16, 32)]


def plan(steps: int) -> list[tuple[int, torch.Tensor]]:
    """Which part a step takes, and which rows each run."""
    rng = torch.Generator().manual_seed(0)
    return [(step % 2, torch.randint(12, (len(RUNS), BATCH), generator=rng)) for step in range(steps)]


def train_alone(config: Config, run: int, steps: Sequence[tuple[int, torch.Tensor]]) -> torch.nn.Module:
    model = build_model(config.model, RUNS[run].seed)
    optimizer = make_optimizer(model, config.optimizer)
    for step, (part, rows_rb) in enumerate(steps):
        rows = parts()[part].take(rows_rb[run])
        labels_bt = torch.full(rows.tokens_et.shape, -100)
        labels_bt.scatter_(1, rows.positions_en.long(), rows.labels_en.long())
        loss = model(rows.tokens_et.long(), labels_bt) / rows.labels_en.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) / config.optimizer.lr * RUNS[run].rate
        optimizer.step()
    return model


@pytest.mark.parametrize("mode", MODES)
def test_runs_side_by_side_are_runs_alone(mode: Mode) -> None:
    """Six steps on two lengths, every run with its own rate, seed and rows; clipping and decay are at work."""
    config, steps = config_of(mode), plan(6)
    ensemble = Ensemble(config, RUNS, CPU, torch.float32)
    trainer = Trainer(ensemble, config, parts())
    norms = []
    for part, rows_rb in steps:
        trainer.train_step(part, rows_rb)
        norms += trainer.norm_r.tolist()
    assert min(norms) < config.optimizer.clip_norm < max(norms)
    for run in range(len(RUNS)):
        for name, wanted in train_alone(config, run, steps).named_parameters():
            actual = dict(ensemble.split(ensemble.weights_rw[run]))[name]
            moved = (wanted - build_model(config.model, RUNS[run].seed).get_parameter(name)).norm()
            assert (actual - wanted).norm() < 2e-3 * moved + 1e-6, (run, name)


@pytest.mark.parametrize("mode", ["mlp", "softmax"])
def test_scores_are_the_models_own(mode: Mode) -> None:
    """Shared rows, longer than any that was trained; losses and hits at the labels, by the model itself."""
    config, rows = config_of(mode), spread_recall(Cell(80, 5, 3), 16, np.random.default_rng(9))
    ensemble = Ensemble(config, RUNS, CPU, torch.float32)
    losses_rbn, hits_rbn = ensemble.score(ensemble.weights_rw, rows)
    for run in range(len(RUNS)):
        logits_btv = build_model(config.model, RUNS[run].seed)(rows.tokens_et.long())
        places_bn, labels_bn = rows.positions_en.long(), rows.labels_en.long()
        asked_bnv = logits_btv.log_softmax(-1)[torch.arange(3)[:, None], places_bn]
        wanted_bn = -asked_bnv.gather(2, labels_bn[..., None])[..., 0]
        torch.testing.assert_close(losses_rbn[run], wanted_bn, rtol=1e-4, atol=1e-5)
        assert hits_rbn[run].equal(asked_bnv.argmax(-1) == labels_bn)


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    config, steps = config_of("mlp"), plan(4)
    weights = []
    for spoil in (False, True):
        ensemble = Ensemble(config, RUNS, CPU, torch.float32)
        trainer = Trainer(ensemble, config, parts())
        for step, (part, rows_rb) in enumerate(steps):
            if spoil and step == 1:
                ensemble.weights_rw[1] = torch.nan
            trainer.train_step(part, rows_rb)
        weights.append(ensemble.weights_rw)
        assert trainer.loss_r.isfinite().tolist() == [True, not spoil, True]
    assert weights[0][[0, 2]].equal(weights[1][[0, 2]])


def test_bf16_is_used_for_computing_alone() -> None:
    config = config_of("mlp")
    ensemble = Ensemble(config, RUNS[:1], CPU, torch.bfloat16)
    rows = parts()[0]
    losses, _ = ensemble.score(ensemble.weights_rw, rows)
    exact, _ = Ensemble(config, RUNS[:1], CPU, torch.float32).score(ensemble.weights_rw, rows)
    assert losses.dtype == ensemble.weights_rw.dtype == torch.float32
    assert 0 < (losses - exact).abs().max() < 0.05
