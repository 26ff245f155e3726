"""Ensembles on a GPU: kernels under vmap, and steps captured as CUDA graphs, against the same steps on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loglinear.experiments.ensemble import Ensemble, Run, Trainer
from loglinear.experiments.examples import Cell
from loglinear.experiments.mqar import spread_recall
from loglinear.experiments.order import Order
from loglinear.experiments.protocol import MODES, Mode
from tests.experiments.small import small_experiment

pytestmark = pytest.mark.gpu

RUNS = (Run(3e-3, 0), Run(1e-2, 1), Run(3e-3, 2))
STEPS = 6


def train(mode: Mode, device: torch.device, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A few steps on two lengths, with head sizes that the kernels have."""
    own = {"heads": 2, "head_dim": 64, "state_dim": 16}
    model = small_experiment("mqar").model.model_dump() | {"dim": 64, "log_linear": own, "seq_len": 256}
    model["softmax"] = {"heads": 2, "head_dim": 64}
    task = {"kind": "mqar", "train": [(256, 4, 64)], "validation": [], "test": [], "longer": []}
    config = small_experiment("mqar", model=model, task=task, batch=8).config(mode)
    parts = [spread_recall(Cell(length, 4, 64), 16, np.random.default_rng(length)).to(device) for length in (64, 256)]
    trainer = Trainer(Ensemble(config, RUNS, device, torch.float32), config, parts)
    if not graphs:
        monkeypatch.setattr(trainer, "_capture", lambda part: lambda: trainer._update(part))
    order = Order([64, 64], 8, STEPS, [run.seed for run in RUNS])
    for step in range(STEPS):
        trainer.train_step(*order.at(step))
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_captured_steps_are_the_steps_themselves(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph replays equals what is launched, but for torch's sums by atomics, and what a CPU computes."""
    gpu = torch.device("cuda")
    captured, launched = (train(mode, gpu, graphs, monkeypatch) for graphs in (True, False))
    torch.testing.assert_close(captured.ensemble.weights_rw, launched.ensemble.weights_rw, rtol=1e-3, atol=2e-4)
    assert captured.loss_r.tolist() == pytest.approx(launched.loss_r.tolist(), rel=1e-4)
    on_cpu = train(mode, torch.device("cpu"), False, monkeypatch)
    assert captured.loss_r.tolist() == pytest.approx(on_cpu.loss_r.tolist(), rel=2e-2)
    assert captured.norm_r.tolist() == pytest.approx(on_cpu.norm_r.tolist(), rel=5e-2)
