"""Many runs that differ in a few settings: a SLURM array, one run folder each, compared at the end."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock
from pydantic import Field, PositiveInt, ValidationError, model_validator

from data_pipeline.files import write_bytes
from loglinear.config import Config, load_config
from loglinear.config_section import NAME_PATTERN, Section
from loglinear.config_text import explain, read_yaml
from loglinear.errors import UserError

SWEEP_FILE = "sweep.resolved.yaml"
TABLE_FILE = "table.md"
COMPARISON = "comparison"  # TensorBoard's folder of settings beside results
LONGEST_NAME = 120


class SweepConfig(Section):
    """Runs of one configuration that differ in `overrides`.

    name: of the sweep.
    dir: its folder, where each run has a folder of its own; runs/`name` if not given.
    config: the run that all are variants of.
    grid: settings and their values, of which every combination is a run.
    runs: or the combinations themselves, by the names of the runs.
    parallel: how many run at once.
    depends_on: folders of runs that must finish before.
    """

    name: str
    dir: Path | None = None
    config: Path
    grid: dict[str, tuple[Any, ...]] = Field(default={})
    runs: dict[str, dict[str, Any]] = Field(default={})
    parallel: PositiveInt = 4
    depends_on: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (self.name, *self.runs):
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(f"{name!r} names a folder: take letters, digits, dots, dashes and underscores")
        if bool(self.grid) == bool(self.runs):
            raise ValueError("give either grid, of which every combination is a run, or runs, by their names")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]} has no values")
        return self

    @property
    def folder(self) -> Path:
        """Where the runs' folders lie."""
        return (self.dir or Path("runs") / self.name).absolute()

    def variants(self) -> dict[str, dict[str, Any]]:
        """The settings of every run, by its name."""
        if self.runs:
            return self.runs
        combinations = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return {_name(number, settings): settings for number, settings in enumerate(combinations)}


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's YAML file.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or there is nothing to combine.
    """
    try:
        return SweepConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, SweepConfig)}") from None


def configurations(sweep: SweepConfig, overrides: Sequence[str] = ()) -> list[Config]:
    """The configuration of every run; `overrides` go to all of them.

    Raises:
        UserError: one of them is not valid; the run is named.
    """
    return list(_configurations(sweep, overrides))


def write_sweep(sweep: SweepConfig) -> None:
    """Make the sweep's folder and describe it there.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        resolved = sweep.model_copy(update={"dir": sweep.folder, "config": sweep.config.absolute()})
        text = yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False)
        write_bytes(sweep.folder / SWEEP_FILE, text.encode())
    except OSError as error:
        raise UserError(
            f"cannot write to the sweep's folder {sweep.folder} ({error.strerror}): set another dir"
        ) from None


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        name: of the run.
        settings: in which it differs.
        step: of its last record, 0 if it has none.
        loss, held_out_loss: the last ones, in nats per token.
    """

    name: str
    settings: Mapping[str, Any]
    step: int
    loss: float | None
    held_out_loss: float | None


def update_report(run_dir: Path) -> None:
    """If the run belongs to a sweep, write that sweep's table and TensorBoard comparison anew."""
    folder = run_dir.parent
    if not (folder / SWEEP_FILE).exists():
        return
    sweep = load_sweep(folder / SWEEP_FILE)
    if run_dir.name not in sweep.variants():
        return
    with FileLock(folder / "report.lock"):
        rows = [_row(folder / name, settings) for name, settings in sweep.variants().items()]
        temporary = folder / (TABLE_FILE + ".tmp")
        temporary.write_text(markdown(rows), encoding="utf-8")
        temporary.replace(folder / TABLE_FILE)
        _compare(run_dir.name, rows, folder)


def markdown(rows: Sequence[Row]) -> str:
    """A table, the best held-out loss first."""
    settings = list(dict.fromkeys(key for row in rows for key in row.settings))
    lines = [["run", *settings, "step", "loss", "held-out loss"], ["---"] * (len(settings) + 4)]
    for row in sorted(rows, key=lambda row: (row.held_out_loss is None, row.held_out_loss)):
        results = [_shown(row.loss), _shown(row.held_out_loss)]
        lines.append([row.name, *(str(row.settings.get(key, "")) for key in settings), str(row.step), *results])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _configurations(sweep: SweepConfig, overrides: Sequence[str]) -> Iterator[Config]:
    for name, settings in sweep.variants().items():
        place = {"run.name": name, "run.dir": sweep.folder / name}
        try:
            yield load_config(sweep.config, overrides, {**settings, **place})
        except UserError as error:
            raise UserError(f"run {name} of sweep {sweep.name}: {error}") from None


def _name(number: int, settings: Mapping[str, Any]) -> str:
    """A folder's name that says what is in it; the number keeps it unique."""
    told = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in settings.items())
    return f"{number:02d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', told)}"[:LONGEST_NAME]


def _row(run_dir: Path, settings: Mapping[str, Any]) -> Row:
    from loglinear.train.folder import RunFolder, read_records

    records = read_records(RunFolder(run_dir).metrics)
    last = {key: record[key] for record in records for key in ("step", "loss", "held_out_loss") if key in record}
    return Row(run_dir.name, settings, int(last.get("step", 0)), last.get("loss"), last.get("held_out_loss"))


def _compare(name: str, rows: Sequence[Row], folder: Path) -> None:
    """Put the run `name` into TensorBoard's table of settings and results (its HPARAMS page), once.

    Each run names the settings of all, since the table has the columns of any one of them.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    (row,) = (row for row in rows if row.name == name)
    results = {"final/loss": row.loss, "final/held_out_loss": row.held_out_loss}
    columns, _, _ = hparams({key: value for each in rows for key, value in _plain(each.settings).items()}, results)
    _, start, end = hparams(_plain(row.settings), {})
    shutil.rmtree(folder / COMPARISON / name, ignore_errors=True)  # what it had told before
    with SummaryWriter(str(folder / COMPARISON / name)) as writer:
        for summary in (columns, start, end):
            writer.file_writer.add_summary(summary, row.step)  # pyright: ignore[reportOptionalMemberAccess]
        for tag, value in results.items():
            if value is not None:
                writer.add_scalar(tag, value, row.step)


def _plain(settings: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Settings as TensorBoard takes them."""
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
