"""Ensembles on a GPU: steps captured as CUDA graphs with a branch a run, against the same steps elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loglinear.experiments.ensemble import Ensemble, Run, Trainer
from loglinear.experiments.examples import Cell, Examples
from loglinear.experiments.mqar import spread_recall
from loglinear.experiments.order import Order
from loglinear.experiments.protocol import MODES, Mode
from tests.experiments.small import small_experiment

pytestmark = pytest.mark.gpu

RUNS = (Run(3e-3, 0), Run(1e-2, 1), Run(3e-3, 2))
STEPS = 6
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def rows(length: int) -> Examples:
    return spread_recall(Cell(length, 4, 64), 16, np.random.default_rng(length))


def train(mode: Mode, device: torch.device, runs: Sequence[Run] = RUNS, *, graphs: bool = True) -> Trainer:
    """A few steps on two lengths, with head sizes that the kernels have."""
    own = {"heads": 2, "head_dim": 64, "state_dim": 16}
    model = small_experiment("mqar").model.model_dump() | {"dim": 64, "log_linear": own, "seq_len": 256}
    model["softmax"] = {"heads": 2, "head_dim": 64}
    task = {"kind": "mqar", "train": [(256, 4, 64)], "validation": [], "test": [], "longer": []}
    config = small_experiment("mqar", model=model, task=task, batch=8).config(mode)
    parts = [rows(length).to(device) for length in (64, 256)]
    trainer = Trainer(Ensemble(config, runs, device, torch.float32), config, parts)
    if not graphs:
        trainer._capture = lambda part: lambda: trainer._update(part)
    order = Order([64, 64], 8, STEPS, [run.seed for run in runs])
    for step in range(STEPS):
        trainer.train_step(*order.at(step))
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_captured_steps_are_the_steps_themselves(mode: Mode) -> None:
    """What a graph replays equals what is launched, but for torch's sums by atomics, and what a CPU computes."""
    captured, launched = (train(mode, GPU, graphs=graphs) for graphs in (True, False))
    torch.testing.assert_close(captured.ensemble.weights_rw, launched.ensemble.weights_rw, rtol=1e-3, atol=2e-4)
    assert captured.loss_r.tolist() == pytest.approx(launched.loss_r.tolist(), rel=1e-4)
    on_cpu = train(mode, CPU)
    assert captured.loss_r.tolist() == pytest.approx(on_cpu.loss_r.tolist(), rel=2e-2)
    assert captured.norm_r.tolist() == pytest.approx(on_cpu.norm_r.tolist(), rel=5e-2)


@pytest.mark.parametrize("mode", ["mlp", "softmax"])
def test_a_branch_of_a_graph_is_the_run_alone(mode: Mode) -> None:
    """No run reads what another writes; scores too are each run's own, and those that a CPU gives its weights."""
    group = train(mode, GPU)
    losses_rbn, hits_rbn = group.ensemble.score(rows(256).to(GPU))
    for index, run in enumerate(RUNS):
        alone = train(mode, GPU, [run])
        mine_w, wanted_w = group.ensemble.weights_rw[index], alone.ensemble.weights_rw[0]
        torch.testing.assert_close(mine_w, wanted_w, rtol=1e-3, atol=2e-4)
        assert float(group.loss_r[index]) == pytest.approx(float(alone.loss_r[0]), rel=1e-4)
    on_cpu = Ensemble(group.config, RUNS, CPU, torch.float32)
    on_cpu.weights_rw.copy_(group.ensemble.weights_rw)
    wanted_rbn, likeliest_rbn = on_cpu.score(rows(256))
    torch.testing.assert_close(losses_rbn.cpu(), wanted_rbn, rtol=1e-2, atol=1e-2)
    assert (hits_rbn.cpu() == likeliest_rbn).float().mean() > 0.99
