"""What ranks are asked to measure: a list of tasks for each number of ranks, made from the user's configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from loglinear.config import Config
from loglinear.config_text import explain
from loglinear.errors import UserError

Kind = Literal["parity", "save", "load", "speed"]
PARTS = ("parity", "reshard", "speed", "weak", "recovery")
DTYPES = ("float32", "bfloat16")  # that parity is shown in
SAMPLES = 8  # of a step of the resharding check, at least


class Layout(BaseModel):
    """How a run lies over the ranks: what `parallel.*` and `train.zero_stage` say."""

    model_config = ConfigDict(frozen=True)
    name: str
    context: int = 1
    tensor: int = 1
    sequence: bool = True
    zero_stage: Literal[1, 2, 3] = 1


class Task(BaseModel):
    """One measurement.

    Attributes:
        name: `part/...`, under which its result stands.
        kind: what the ranks do.
        ranks: how many take part.
        config: the run that is measured, sized for this layout and length.
        layout: its layout's name.
        dtype: of parity, which has models of its own.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    kind: Kind
    ranks: int
    config: Config = Config()
    layout: str = ""
    dtype: str = ""

    def recomputing(self) -> Task:
        """The same with every block recomputed in the backward pass."""
        train = self.config.train.model_copy(update={"activation_checkpointing": True})
        return self.model_copy(update={"config": self.config.model_copy(update={"train": train})})


def layouts(ranks: int) -> list[Layout]:
    """Each way of using all the ranks alone; from four on also context and tensor ranks together."""
    pure = [
        Layout(name="DP ZeRO-1"),
        Layout(name="DP ZeRO-3", zero_stage=3),
        Layout(name="TP", tensor=ranks, sequence=False),
        Layout(name="TP+SP", tensor=ranks),
        Layout(name="CP", context=ranks),
    ]
    mixed = [Layout(name="CP2 TP2", context=2, tensor=2)] if ranks >= 4 else []
    return pure + mixed if ranks > 1 else pure[:1]


def make_tasks(
    configs: Sequence[Config], parts: Sequence[str], lengths: Sequence[int], tokens: int, ranks: int
) -> list[Task]:
    """Everything that ranks do, those of the most ranks first.

    Args:
        configs: runs whose models are measured; resharding, weak scaling and recovery take the first.
        parts: of `PARTS`.
        lengths: of the sequences, in tokens; resharding and weak scaling take the first.
        tokens: of one pass through the model, unless one sequence is longer.
        ranks: as many as there are.

    Raises:
        UserError: a model does not divide over a layout.
    """
    tasks: list[Task] = []
    if "parity" in parts:
        tasks += [Task(name=f"parity/{dtype}", kind="parity", ranks=ranks, dtype=dtype) for dtype in DTYPES]
    if "reshard" in parts:
        tasks += _reshard(configs[0], lengths[0], ranks)
    if "speed" in parts:
        for config in configs:
            for length in lengths:
                tasks += [_speed("speed", config, length, tokens, layout, ranks) for layout in layouts(ranks)]
    if "weak" in parts:
        for size in sizes(ranks):
            tasks += _weak(configs[0], lengths[0], tokens, size)
    return sorted(tasks, key=lambda task: -task.ranks)


def sizes(ranks: int) -> list[int]:
    """Powers of two up to `ranks`, and `ranks`: 1, 2, 4, ..."""
    return sorted({1 << power for power in range(ranks.bit_length())} | {ranks})


def _reshard(config: Config, length: int, ranks: int) -> Iterator[Task]:
    """Saved over data ranks, from four ranks on over tensor ranks too; read by each layout, and by one rank alone."""
    batch = {"global_batch": max(SAMPLES, ranks), "micro_batch": 1, "precision": "fp32"}
    saved = Layout(name="DP x TP2", tensor=2) if ranks >= 4 else layouts(ranks)[0]

    def task(kind: Kind, layout: Layout, ranks: int) -> Task:
        name = f"reshard/{kind} {config.run.name}, {layout.name} on {ranks}"
        return Task(name=name, kind=kind, ranks=ranks, config=_sized(config, length, batch, layout), layout=layout.name)

    yield task("save", saved, ranks)
    for size in sorted({ranks, 1}, reverse=True):
        yield from (task("load", layout, size) for layout in layouts(size))


def _weak(config: Config, length: int, tokens: int, ranks: int) -> Iterator[Task]:
    """As much for each rank at every number of ranks: more sequences over data ranks, longer ones over context."""
    yield _speed("weak", config, length, tokens, Layout(name="DP ZeRO-1"), ranks)
    longer = max(length, tokens) * ranks
    yield _speed("weak", config, longer, longer, Layout(name="CP", context=ranks), ranks)


def _speed(part: str, config: Config, length: int, tokens: int, layout: Layout, ranks: int) -> Task:
    """A step takes a micro-batch for each data-parallel rank of pure data parallelism, whatever the layout."""
    micro_batch = max(1, tokens // length)
    passes = 1 if part == "weak" and layout.context > 1 else ranks
    batch = {"micro_batch": micro_batch, "global_batch": micro_batch * passes}
    name = f"{part}/{config.run.name}/{length}/{layout.name} on {ranks}"
    sized = _sized(config, length, batch, layout)
    return Task(name=name, kind="speed", ranks=ranks, config=sized, layout=layout.name)


def _sized(config: Config, length: int, train: Mapping[str, object], layout: Layout) -> Config:
    tree = config.model_dump(exclude={"data", "schedule", "stability"})
    tree["model"]["seq_len"] = length
    tree["train"] |= {**train, "zero_stage": layout.zero_stage}
    tree["parallel"] = layout.model_dump(include={"context", "tensor", "sequence"})
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        reason = explain(error, Config)
        raise UserError(f"{config.run.name} at {length} tokens cannot be laid out as {layout.name}: {reason}") from None
