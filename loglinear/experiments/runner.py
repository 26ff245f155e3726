"""Runs an experiment mode by mode: first the sweep that chooses its learning rate, then the runs that are reported.

A group, all runs of one mode and purpose that are missing, trains as one ensemble. Finished runs are in the results
and never repeated; a group that is stopped leaves its state and goes on from there, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch

from data_pipeline.files import make_folder
from loglinear.errors import UserError
from loglinear.experiments.console import ExperimentConsole
from loglinear.experiments.group import Group, GroupPlan
from loglinear.experiments.measures import Record, score_sets
from loglinear.experiments.protocol import FIRST_SWEEP_SEED, Experiment, Mode
from loglinear.experiments.results import Result, append_results, check_protocol, read_results
from loglinear.experiments.selection import best_rate
from loglinear.experiments.tasks import RowSet, TaskData, make_data
from loglinear.train.folder import git_revision
from loglinear.train.signals import StopRequest

Phase = Literal["sweep", "final"]


@dataclass(frozen=True)
class Settings:
    """What of an experiment is run, and where things lie.

    Attributes:
        modes: in this order; None takes the protocol's.
        seeds: those to report; None takes the protocol's.
        rate: a learning rate, instead of the one that the sweep chooses; then there is no sweep.
        minutes: after which the work stops cleanly; None never.
        out: folder of the results.
        state: folder of groups that were stopped, and of what is made from the novels.
        novels: folder of the novels.
    """

    modes: tuple[Mode, ...] | None
    seeds: tuple[int, ...] | None
    rate: float | None
    minutes: float | None
    out: Path
    state: Path
    novels: Path | None


def run_experiment(name: str, experiment: Experiment, settings: Settings) -> bool:
    """Run what is missing of `experiment`, which is called `name`.

    Returns:
        Whether all of it is finished; otherwise time was over or somebody asked to stop.

    Raises:
        UserError: it has no such mode, results are of another protocol, or a folder cannot be written to.
    """
    return _Runner(name, experiment, settings).go()


class _Runner:
    """Everything that lives while an experiment runs."""

    def __init__(self, name: str, experiment: Experiment, settings: Settings) -> None:
        self.name, self.experiment, self.settings = name, experiment, settings
        self.modes = settings.modes or experiment.modes
        for mode in self.modes:
            if mode not in experiment.modes:
                raise UserError(f"{name} has no mode {mode!r}: take some of {', '.join(experiment.modes)}")
        self.seeds = tuple(range(experiment.seeds)) if settings.seeds is None else settings.seeds
        if max(self.seeds) >= FIRST_SWEEP_SEED:
            raise UserError(f"seeds from {FIRST_SWEEP_SEED} on choose learning rates: take smaller ones to report")
        self.path = settings.out / f"{name}.jsonl"
        check_protocol(self.path, read_results(self.path), experiment.fingerprint)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.stop = StopRequest()
        self.stop.listen()
        self.deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
        self._data: TaskData | None = None

    def go(self) -> bool:
        """Mode after mode, until all is finished or it is time to stop."""
        with ExperimentConsole() as console:
            for mode in self.modes:
                if not self._mode(mode, console):
                    console.say("Stopped: the same command goes on from here.")
                    return False
            console.say(f"{self.name}: all runs are finished; their results are in {self.path}.")
        return True

    def _mode(self, mode: Mode, console: ExperimentConsole) -> bool:
        experiment, rate = self.experiment, self.settings.rate
        if rate is None:
            seeds = range(FIRST_SWEEP_SEED, FIRST_SWEEP_SEED + experiment.sweep_seeds)
            if not self._phase("sweep", mode, [(rate, seed) for rate in experiment.rates for seed in seeds], console):
                return False
            rate = best_rate(read_results(self.path), mode)
        return self._phase("final", mode, [(rate, seed) for seed in self.seeds], console)

    def _phase(self, phase: Phase, mode: Mode, runs: Sequence[tuple[float, int]], console: ExperimentConsole) -> bool:
        done = {
            (result["rate"], result["seed"])
            for result in read_results(self.path)
            if (result["phase"], result["mode"]) == (phase, mode)
        }
        missing = tuple(run for run in runs if run not in done)
        if not missing:
            return True
        if self._must_stop():
            return False
        for folder in (self.settings.out, self.settings.state):
            make_folder(folder)
        plan = GroupPlan(self.name, phase, mode, missing)
        group = Group(plan, self.experiment, self.data(console), self.device, self.settings.state)
        if not group.train(self._must_stop, console):
            return False
        trained_at = time.monotonic()
        tested = score_sets(group.ensemble, mode, self.experiment.model.seq_len, self._tests(phase))
        group.seconds += time.monotonic() - trained_at
        append_results(self.path, [self._result(group, index, tested[index]) for index in range(len(missing))])
        group.forget()
        console.say(f"{plan.title}: {len(missing)} runs finished in {group.seconds:.0f} s")
        return True

    def _tests(self, phase: Phase) -> Sequence[RowSet]:
        assert self._data is not None
        return self._data.test if phase == "final" else ()

    def data(self, console: ExperimentConsole) -> TaskData:
        """The rows, on the device; made when they are first needed."""
        if self._data is None:
            console.say(f"{self.name}: making the data")
            self._data = make_data(self.experiment, self.settings.novels, self.settings.state).to(self.device)
        return self._data

    def _must_stop(self) -> bool:
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return self.stop.asked or late

    def _result(self, group: Group, index: int, tested: list[Record]) -> Result:
        plan, (rate, seed) = group.plan, group.plan.runs[index]
        return {
            "experiment": self.name,
            "phase": plan.phase,
            "mode": plan.mode,
            "rate": rate,
            "seed": seed,
            "curve": group.curves[index],
            "test": tested,
            "steps": self.experiment.steps,
            "parameters": group.ensemble.models[0].parameter_count(),
            "together": len(plan.runs),
            "seconds": round(group.seconds / len(plan.runs), 2),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "revision": git_revision(),
            "date": date.today().isoformat(),
            "protocol": self.experiment.fingerprint,
            "command": self._command(plan, rate, seed),
        }

    def _command(self, plan: GroupPlan, rate: float, seed: int) -> str:
        """What makes a run again: alone, or with its mode's whole sweep; elsewhere, so that nothing is in the way."""
        parts = ["loglinear", "experiment", self.name, "--modes", plan.mode, "--out", "runs/again"]
        if self.settings.novels is not None:
            parts += ["--novels", "FOLDER"]
        if plan.phase == "final":
            parts += ["--rate", f"{rate:g}", "--seeds", str(seed)]
        return " ".join(parts)
