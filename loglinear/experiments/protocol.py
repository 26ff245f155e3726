"""What is run and how it is judged, fixed before the runs: `protocol.yaml`, validated and frozen."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from loglinear.config import Config, LevelScaleName, ModelConfig, OptimizerConfig, ScheduleConfig, Section
from loglinear.config_text import explain, read_yaml
from loglinear.errors import UserError
from loglinear.experiments.examples import Cell

Mode = LevelScaleName | Literal["softmax"]
MODES: tuple[Mode, ...] = (*get_args(LevelScaleName), "softmax")
PROTOCOL = Path(__file__).with_name("protocol.yaml")
FIRST_SWEEP_SEED = 1000  # seeds that choose learning rates are none of those that are reported


class RecallTask(Section):
    """A task of made-up rows, as [length, items, examples]; `longer` ones are tested by every level policy."""

    kind: Literal["mqar", "mqar_contiguous", "copying"]
    train: tuple[Cell, ...]
    validation: tuple[Cell, ...]
    test: tuple[Cell, ...]
    longer: tuple[Cell, ...]


class NovelsTask(Section):
    """Language modelling on rows of `length` tokens, tested on rows of `test_length`, and needles in haystacks.

    Attributes:
        edges: positions at which the test's loss is split into regions.
        validation_novels: how many of the training novels choose the learning rate instead.
        test_rows: rows of each test novel, at most.
        needles: [length, needles of a kind, examples] of every form of needle.
    """

    kind: Literal["novels"]
    length: PositiveInt
    test_length: PositiveInt
    edges: tuple[PositiveInt, ...]
    validation_novels: PositiveInt
    test_rows: PositiveInt
    tokenizer_bytes: PositiveInt
    needles: tuple[Cell, ...]


class Experiment(Section):
    """One task, and how every mode is trained on it.

    Attributes:
        instead: settings of `model` that differ for a mode, such as an MLP that makes its parameters as many.
        rates: learning rates of the sweep, the same for every mode.
        sweep_seeds: how many seeds choose the rate.
        seeds: how many further seeds are reported, 0 .. seeds - 1.
        records: how many times in a run validation, gradients and level scales are recorded.
        margin: the least difference of means that counts, in the unit of the metric.
    """

    title: str
    modes: tuple[Mode, ...] = MODES
    task: Annotated[RecallTask | NovelsTask, Field(discriminator="kind")]
    model: ModelConfig
    instead: dict[Mode, dict[str, Any]] = Field(default={})
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    steps: PositiveInt
    batch: PositiveInt
    precision: Literal["fp32", "bf16"] = "fp32"
    rates: tuple[PositiveFloat, ...]
    sweep_seeds: PositiveInt
    seeds: PositiveInt
    records: PositiveInt
    margin: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.records > self.steps:
            raise ValueError(f"records ({self.records}) must not be more than steps ({self.steps})")
        for mode in self.modes:
            self.config(mode)
        trained, task = self.model.seq_len, self.task
        if isinstance(task, NovelsTask) and (task.length != trained or trained not in task.edges):
            raise ValueError(f"task.length and one of task.edges must be model.seq_len ({trained})")
        if isinstance(task, RecallTask) and max(cell.length for cell in task.train) != trained:
            raise ValueError(f"model.seq_len ({trained}) must be the longest length of task.train")
        return self

    def config(self, mode: Mode) -> Config:
        """The whole configuration of a run in `mode`."""
        model = self.model.model_dump() | self.instead.get(mode, {})
        model["pattern"] = ("softmax",) if mode == "softmax" else ("log_linear",)
        if mode != "softmax":
            model["log_linear"] = {**model["log_linear"], "level_scale": mode}
        train = {"steps": self.steps, "global_batch": self.batch, "micro_batch": self.batch}
        return Config.model_validate(
            {"model": model, "optimizer": self.optimizer, "schedule": self.schedule, "train": train}
        )

    @property
    def record_steps(self) -> tuple[int, ...]:
        """Numbers of finished steps after which a run is looked at; the last is its end."""
        return tuple(self.steps * (record + 1) // self.records for record in range(self.records))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that a run's result depends on; which runs there are is no such thing."""
        which = {"modes", "rates", "sweep_seeds", "seeds"}
        described = self.model_dump(mode="json", exclude={"title", "margin", *which})
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


class Statistics(Section):
    """A paired bootstrap over seeds of `focus` against every other log-linear mode, corrected by Holm.

    Attributes:
        unlearned: a run whose validation accuracy never reaches this has learned nothing.
        collapse: a run that ends so far below its best validation accuracy has collapsed.
    """

    focus: Mode
    resamples: PositiveInt
    confidence: float = Field(gt=0, lt=1)
    significance: float = Field(gt=0, lt=1)
    unlearned: float = Field(gt=0, lt=1)
    collapse: float = Field(gt=0, lt=1)


class Protocol(Section):
    """All experiments, and how they are judged."""

    statistics: Statistics
    experiments: dict[str, Experiment]

    def experiment(self, name: str) -> Experiment:
        """The experiment called `name`.

        Raises:
            UserError: there is none.
        """
        if name not in self.experiments:
            raise UserError(f"there is no experiment {name!r}: take one of {', '.join(self.experiments)}")
        return self.experiments[name]


def load_protocol(path: Path = PROTOCOL) -> Protocol:
    """Read and validate a protocol.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or values contradict each other.
    """
    try:
        return Protocol.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Protocol)}") from None
