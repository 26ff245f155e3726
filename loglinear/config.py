"""The whole description of a run: validated, frozen, read from YAML, overridden by `section.key=value`.

Nothing here imports torch, so a mistake is found before anything is allocated.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    Field,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from loglinear.config_data import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from loglinear.config_model import (
    BeyondName,
    LevelScaleName,
    LogLinearConfig,
    MixerName,
    ModelConfig,
    SoftmaxConfig,
)
from loglinear.config_section import NAME_PATTERN, Section
from loglinear.config_text import apply_override, explain, read_yaml, set_value
from loglinear.errors import UserError

__all__ = [
    "BeyondName",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LevelScaleName",
    "LogLinearConfig",
    "MixerName",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SoftmaxConfig",
    "SourceConfig",
    "StabilityConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
]

Fraction = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Beta = typing.Annotated[float, Field(ge=0.0, lt=1.0)]


class RunConfig(Section):
    """What a run is called, where it writes, and what its weights start from.

    name: of the run, and of its folder.
    dir: the folder that the run writes to; runs/`name` if not given.
    seed: of the weights at the start, and of texts that are generated; the order of the data has its own.
    init_from: weights that `loglinear export` wrote, in either format; without it they are drawn from `seed`.
    """

    name: str = "run"
    dir: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    init_from: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise ValueError(
                f"name {self.name!r} names a folder: take letters, digits, dots, dashes and underscores,"
                " and begin with none of the marks"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where everything that the run writes lies."""
        return self.dir or Path("runs") / self.name


class OptimizerConfig(Section):
    """AdamW.

    lr: the peak learning rate.
    betas: decay of the two moments.
    eps: added to the root of the second moment.
    weight_decay: acts on matrices alone.
    clip_norm: the norm that the whole gradient is clipped to.
    """

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)


class ScheduleConfig(Section):
    """The learning rate: linear warm-up to the peak, then down.

    kind: cosine over all steps after the warm-up, or wsd: constant, with a linear decay at the end.
    warmup_steps: steps of the warm-up.
    decay_steps: steps of wsd's final decay.
    final_ratio: the last learning rate, as a share of the peak.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    final_ratio: Fraction = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "wsd" and self.decay_steps == 0:
            raise ValueError("kind wsd needs decay_steps, the length of its final decay")
        if self.kind == "cosine" and self.decay_steps:
            raise ValueError("decay_steps belongs to kind wsd; a cosine decays over all steps after the warm-up")
        return self


def _true_false_or_a_number(value: object, validate: ValidatorFunctionWrapHandler) -> bool | int:
    """One error where pydantic has two, one for each type."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError(f"{value!r} is neither true nor false nor a number of blocks") from None


class TrainConfig(Section):
    """Steps and batches, which count sequences; precision and memory.

    steps: steps of the whole run.
    global_batch: sequences of a step, over all ranks.
    micro_batch: sequences in one pass of one rank.
    precision: of weights and activations; with bf16 the optimizer keeps fp32 weights beside them.
    zero_stage: what ranks share instead of repeating it: 1 the optimizer's state, 2 gradients too, 3 weights too.
    activation_checkpointing: whether blocks are computed again in the backward pass instead of being kept; or how many,
        from the first on.
    peak_tflops: dense bf16 TFLOP/s of the device, for utilisation; known for common GPUs, measured on a CPU.
    hang_seconds: a rank that finishes no step, evaluated batch or save for so long reports where it is, and ends.
    """

    steps: PositiveInt = 1000
    global_batch: PositiveInt = 8
    micro_batch: PositiveInt = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[1, 2, 3] = 1
    activation_checkpointing: Annotated[bool | PositiveInt, WrapValidator(_true_false_or_a_number)] = False
    peak_tflops: float | None = Field(default=None, gt=0)
    hang_seconds: float = Field(default=900.0, gt=0, le=7 * 24 * 3600)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        return self

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of each of `ranks` data-parallel ranks in one step.

        Raises:
            UserError: the global batch does not divide evenly.
        """
        per_rank, rest = divmod(self.global_batch, self.micro_batch * ranks)
        if rest:
            raise UserError(
                f"train.global_batch ({self.global_batch}) must be a multiple of train.micro_batch"
                f" ({self.micro_batch}) times the number of data-parallel ranks ({ranks})"
            )
        return per_rank


class ParallelConfig(Section):
    """How many ranks share a model replica. All other ranks are data-parallel.

    tensor: ranks that split the weights.
    context: ranks that split the sequences.
    sequence: whether the tensor ranks also split norms and residuals along time.
    """

    tensor: PositiveInt = 1
    context: PositiveInt = 1
    sequence: bool = True


class EvalConfig(Section):
    """Held-out evaluation during training.

    every: steps from one evaluation to the next.
    samples: sequences to evaluate on, at most.
    prompt: a text that the model continues after each evaluation.
    generate_tokens: how many tokens it is continued by; 0 for none.
    """

    every: PositiveInt = 250
    samples: PositiveInt = 256
    prompt: str = "def "
    generate_tokens: int = Field(default=64, ge=0)


class MonitorConfig(Section):
    """What is written for TensorBoard, and for others.

    every: steps from one record of scalars to the next.
    levels_every: steps from one record of lambda's statistics to the next.
    wandb: a project of Weights & Biases that gets the same scalars.
    """

    every: PositiveInt = 10
    levels_every: PositiveInt = 100
    wandb: str | None = Field(default=None, min_length=1)


class StabilityConfig(Section):
    """A step is refused if its loss or gradient norm is not finite, or a spike.

    window: steps that a new one is compared with.
    spike: robust deviations above their median that are a spike.
    rollback_after: refusals in a row after which the run goes back to its last checkpoint and on with later data.
    """

    window: int = Field(default=128, ge=8)
    spike: float = Field(default=10.0, gt=0)
    rollback_after: PositiveInt = 3


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept.

    every: steps from one checkpoint to the next.
    keep_last: how many of the last ones are kept.
    keep_every: those whose step is a multiple of it are kept too.
    """

    every: PositiveInt = 250
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(f"keep_every ({self.keep_every}) must be a multiple of every ({self.every})")
        return self


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()
    stability: StabilityConfig = StabilityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        busy = self.schedule.warmup_steps + self.schedule.decay_steps
        if busy > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps ({busy}) exceed train.steps ({self.train.steps})"
            )
        for name, value, divisor, why in self._divisions():
            if value % divisor:
                raise ValueError(f"{name} ({value}) must be a multiple of {why} ({divisor})")
        self._check_mixers()
        if self.recomputed_blocks > self.model.layers:
            raise ValueError(
                f"train.activation_checkpointing ({self.recomputed_blocks}) exceeds model.layers ({self.model.layers}):"
                " write true for all blocks"
            )
        if self.data.best_fit not in (None, self.model.seq_len):
            raise ValueError(f"data.best_fit ({self.data.best_fit}) must equal model.seq_len ({self.model.seq_len})")
        for stage in self.data.curriculum:
            if stage.seq_len is not None and self.model.seq_len % stage.seq_len:
                raise ValueError(
                    f"data.curriculum: seq_len ({stage.seq_len}) must divide model.seq_len ({self.model.seq_len})"
                )
        return self

    @property
    def recomputed_blocks(self) -> int:
        """How many blocks, from the first on, are computed again in the backward pass."""
        chosen = self.train.activation_checkpointing
        return chosen * self.model.layers if isinstance(chosen, bool) else chosen

    def _divisions(self) -> typing.Iterator[tuple[str, int, int, str]]:
        """What must divide evenly over the ranks of a model replica."""
        model, tensor, context = self.model, self.parallel.tensor, self.parallel.context
        yield "model.vocab_size", model.vocab_size, tensor, "parallel.tensor"
        yield "model.mlp_dim", model.mlp_dim, tensor, "parallel.tensor"
        for mixer in sorted(set(model.pattern)):
            heads = model.log_linear.heads if mixer == "log_linear" else model.softmax.heads
            yield f"model.{mixer}.heads", heads, tensor, "parallel.tensor"
        yield "model.seq_len", model.seq_len, context, "parallel.context"
        if self.parallel.sequence:
            tokens = self.train.micro_batch * model.seq_len // context
            yield "train.micro_batch x model.seq_len / parallel.context", tokens, tensor, "parallel.tensor"

    def _check_mixers(self) -> None:
        own, tensor, context = self.model.log_linear, self.parallel.tensor, self.parallel.context
        groups, local = own.groups, self.model.seq_len // context
        if "log_linear" not in self.model.pattern:
            return
        if context > 1 and local < own.conv_width - 1:
            raise ValueError(
                f"model.seq_len / parallel.context ({local}) must be at least model.log_linear.conv_width - 1"
                f" ({own.conv_width - 1}): take fewer context ranks"
            )
        if groups % tensor and tensor % groups:
            raise ValueError(
                f"model.log_linear.groups ({groups}) must be a multiple of parallel.tensor ({tensor}), or divide it"
            )

    def with_absolute_paths(self) -> Config:
        """The same run, described so that any working directory will do to read what it writes."""
        tokenizer = self.data.tokenizer
        if tokenizer.path is not None:
            tokenizer = tokenizer.model_copy(update={"path": tokenizer.path.absolute()})
        data = self.data.model_copy(update={"dir": self.data.dir.absolute(), "tokenizer": tokenizer})
        init_from = None if self.run.init_from is None else self.run.init_from.absolute()
        run = self.run.model_copy(update={"dir": self.run.folder.absolute(), "init_from": init_from})
        return self.model_copy(update={"data": data, "run": run})

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(
    path: str | Path, overrides: typing.Sequence[str] = (), settings: typing.Mapping[str, typing.Any] | None = None
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and then settings by such names, validate.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or values contradict each other.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        apply_override(tree, override)
    for dotted, value in (settings or {}).items():
        set_value(tree, dotted, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Config)}") from None
