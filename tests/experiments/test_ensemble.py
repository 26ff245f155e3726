"""Runs side by side against the same runs alone, trained by plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loglinear.config import Config
from loglinear.experiments.ensemble import Ensemble, Run, Trainer, score_rows
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
    losses_rbn, hits_rbn = ensemble.score(rows)
    for run in range(len(RUNS)):
        logits_btv = build_model(config.model, RUNS[run].seed)(rows.tokens_et.long())
        places_bn, labels_bn = rows.positions_en.long(), rows.labels_en.long()
        asked_bnv = logits_btv.log_softmax(-1)[torch.arange(3)[:, None], places_bn]
        wanted_bn = -asked_bnv.gather(2, labels_bn[..., None])[..., 0]
        torch.testing.assert_close(losses_rbn[run], wanted_bn, rtol=1e-4, atol=1e-5)
        assert hits_rbn[run].equal(asked_bnv.argmax(-1) == labels_bn)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_of_a_group_is_the_run_alone_bit_for_bit(mode: Mode, dtype: torch.dtype) -> None:
    config, steps = config_of(mode), plan(4)
    group = Trainer(Ensemble(config, RUNS, CPU, dtype), config, parts())
    alone = Trainer(Ensemble(config, RUNS[1:2], CPU, dtype), config, parts())
    for part, rows_rb in steps:
        group.train_step(part, rows_rb)
        alone.train_step(part, rows_rb[1:2])
        assert group.loss_r[1].equal(alone.loss_r[0])
    for name, of_run in alone.state().items():
        assert group.state()[name][1].equal(of_run[0]), name
    for scored, of_run in zip(group.ensemble.score(parts()[1]), alone.ensemble.score(parts()[1]), strict=True):
        assert scored[1].equal(of_run[0])


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
    """A step on fp32 weights by gradients of the bf16 model; and scores afterwards, of the weights after it."""
    config, rows = config_of("mlp"), parts()[0].take(slice(0, BATCH))
    ensemble = Ensemble(config, RUNS[:1], CPU, torch.bfloat16)
    Trainer(ensemble, config, parts()).train_step(0, torch.arange(BATCH)[None])

    start, computing = (build_model(config.model, RUNS[0].seed) for _ in range(2))
    losses_bn, _ = score_rows(computing.to(torch.bfloat16), rows)
    losses_bn.mean().backward()
    for parameter, rounded in zip(start.parameters(), computing.parameters(), strict=True):
        parameter.grad = rounded.grad.float()
    torch.nn.utils.clip_grad_norm_(start.parameters(), CLIP)
    optimizer = make_optimizer(start, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, 0) / config.optimizer.lr * RUNS[0].rate
    optimizer.step()
    for (name, actual), wanted in zip(ensemble.split(ensemble.weights_rw[0]), start.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted.detach(), rtol=1e-5, atol=1e-6, msg=name)
        wanted.data.copy_(actual)  # for the scores, which rounding amplifies

    losses_rbn, _ = ensemble.score(rows)
    exact_bn, _ = score_rows(start, rows)
    assert losses_rbn.dtype == ensemble.weights_rw.dtype == torch.float32
    assert losses_rbn[0].equal(score_rows(start.to(torch.bfloat16), rows)[0])
    assert 0 < (losses_rbn[0] - exact_bn).abs().max() < 0.05


def test_a_trainer_goes_on_from_a_state_bit_for_bit() -> None:
    """Also in bf16, where the models compute with a copy of the weights, and as to AdamW's own count of steps."""
    config, steps = config_of("mlp"), plan(5)
    whole = Trainer(Ensemble(config, RUNS, CPU, torch.bfloat16), config, parts())
    for step in steps[:3]:
        whole.train_step(*step)
    again = Trainer(Ensemble(config, RUNS, CPU, torch.bfloat16), config, parts())
    again.restore({name: tensor.clone() for name, tensor in whole.state().items()}, whole.step)
    assert again.ensemble.score(parts()[0])[0].equal(whole.ensemble.score(parts()[0])[0])
    for step in steps[3:]:
        whole.train_step(*step)
        again.train_step(*step)
    assert again.ensemble.weights_rw.equal(whole.ensemble.weights_rw)


def test_runs_see_and_move_their_own_memory_alone() -> None:
    """Parameters are views of their run's row, apart from each other, and begin where aligned reads may begin."""
    ensemble = Ensemble(config_of("mlp"), RUNS, CPU, torch.float32)
    for model, weights_w in zip(ensemble.models, ensemble.weights_rw, strict=True):
        marked_w = torch.zeros_like(weights_w)
        for parameter, (_, part), (_, marks) in zip(
            model.parameters(), ensemble.split(weights_w), ensemble.split(marked_w), strict=True
        ):
            assert parameter.data_ptr() == part.data_ptr()
            assert (part.data_ptr() - ensemble.weights_rw.data_ptr()) % 256 == 0
            marks += 1
        assert marked_w.max() == 1
        assert weights_w[marked_w == 0].eq(0).all()
