"""A group of runs of one mode: trained as one ensemble, looked at as it goes, stopped and continued.

Shapes: r run, w weight.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from data_pipeline.files import write_bytes
from loglinear.experiments.console import ExperimentConsole
from loglinear.experiments.ensemble import Ensemble, Run, Trainer
from loglinear.experiments.measures import LevelScaleRecorder, Record, gradient_norms, rounded, score_sets
from loglinear.experiments.order import Order
from loglinear.experiments.protocol import Experiment, Mode
from loglinear.experiments.tasks import TaskData

LOOK_EVERY = 20  # steps between two looks at the clock, which wait for the GPU


@dataclass(frozen=True)
class GroupPlan:
    """Which runs: pairs of a learning rate and a seed."""

    experiment: str
    phase: str
    mode: Mode
    runs: tuple[tuple[float, int], ...]

    @property
    def title(self) -> str:
        """How the terminal calls it."""
        return f"{self.experiment} {self.mode} {self.phase}"


class Group:
    """The runs of `plan` in training.

    Attributes:
        curves: for each run its records so far.
        seconds: of training so far, all runs together.
    """

    def __init__(
        self, plan: GroupPlan, experiment: Experiment, data: TaskData, device: torch.device, state: Path
    ) -> None:
        """Start, or go on from what a stopped group of the same plan and protocol left in the folder `state`."""
        self.plan, self.experiment, self._data = plan, experiment, data
        config = experiment.config(plan.mode)
        dtype = torch.bfloat16 if experiment.precision == "bf16" else torch.float32
        self.ensemble = Ensemble(config, [Run(rate, seed) for rate, seed in plan.runs], device, dtype)
        self._trainer = Trainer(self.ensemble, config, data.train)
        seeds = [seed for _, seed in plan.runs]
        self._order = Order([len(part) for part in data.train], experiment.batch, experiment.steps, seeds)
        self._levels = LevelScaleRecorder(self.ensemble, data.validation[-1])
        self.curves: list[list[Record]] = [[] for _ in plan.runs]
        self.seconds = 0.0
        width = self.ensemble.weights_rw.shape[1]  # another where the weights are laid out otherwise
        key = json.dumps([plan.phase, plan.runs, experiment.fingerprint, width])
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        self._file = state / f"{plan.experiment}-{plan.mode}-{digest}.safetensors"
        if self._file.exists():
            self._restore()

    def train(self, must_stop: Callable[[], bool], console: ExperimentConsole) -> bool:
        """Train to the end, unless `must_stop`; then keep everything in a file.

        Returns:
            Whether the end was reached.
        """
        trainer, steps = self._trainer, self.experiment.steps
        started = time.monotonic() - self.seconds
        while trainer.step < steps:
            trainer.train_step(*self._order.at(trainer.step))
            if trainer.step in self.experiment.record_steps:
                self._record()
            if trainer.step % LOOK_EVERY == 0 or trainer.step == steps:
                self._wait()
                self.seconds = time.monotonic() - started
                console.step(self.plan.title, trainer.step, steps)
                if trainer.step < steps and must_stop():
                    self._save()
                    return False
        self._save()  # the test may be cut short
        return True

    def forget(self) -> None:
        """Remove what a stop left, once the results are written."""
        self._file.unlink(missing_ok=True)

    def _record(self) -> None:
        trainer, trained = self._trainer, self.experiment.model.seq_len
        validation = score_sets(self.ensemble, self.plan.mode, trained, self._data.validation)
        gradients = gradient_norms(self.ensemble, trainer.gradient_rw)
        levels = self._levels.take() if self.plan.phase == "final" else [[] for _ in self.plan.runs]
        for run, curve in enumerate(self.curves):
            record = {"step": trainer.step, "train_loss": rounded(float(trainer.loss_r[run]))}
            record |= {"gradient_norm": rounded(float(trainer.norm_r[run])), "gradient_norms": gradients[run]}
            curve.append(record | {"validation": validation[run], "levels": levels[run]})

    def _wait(self) -> None:
        """Until the GPU has done what it was told."""
        self._trainer.loss_r.sum().item()

    def _save(self) -> None:
        about = {"step": self._trainer.step, "seconds": self.seconds, "curves": self.curves}
        state = {name: tensor.cpu() for name, tensor in self._trainer.state().items()}
        write_bytes(self._file, safetensors.torch.save(state, metadata={"about": json.dumps(about)}))

    def _restore(self) -> None:
        with safetensors.safe_open(self._file, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            state = {name: file.get_tensor(name) for name in ("weights", "first", "second")}
        self._trainer.restore(state, about["step"])
        self.seconds, self.curves = about["seconds"], about["curves"]
