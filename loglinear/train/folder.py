"""The folder of a run: what lies where, and what of it must fit when the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.files import write_bytes
from loglinear.config import Config, load_config
from loglinear.errors import UserError

# Sections that fix what the weights mean; all others may change between two parts of a run.
FIXED = ("model",)


@dataclass(frozen=True)
class Progress:
    """How far a run is, in `progress.json`: for those who look on.

    Attributes:
        step: steps made.
        loss: of the last, in nats per token.
        tokens_per_second: over all ranks.
        seconds_left: to the last step, at this speed.
    """

    step: int
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class RunFolder:
    """Files of their own and `checkpoints/`, `tensorboard/` below `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, as last started."""
        return self.root / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer that the model was trained with."""
        return self.root / "tokenizer.model"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for everything that went wrong."""
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The complete checkpoints, and one that is being written."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The run's id in Weights & Biases, if it is shown there."""
        return self.root / "wandb.id"

    @property
    def curve(self) -> Path:
        """A picture of the losses, drawn when the run ends."""
        return self.root / "loss.png"

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made, or cannot be written to.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to run.dir {self.root} ({error.strerror}): choose another run.dir") from None
        if not os.access(self.root, os.W_OK):
            raise UserError(f"cannot write to run.dir {self.root}: choose another run.dir")

    def describe(self, config: Config, tokenizer: Path) -> None:
        """Write down what is trained: the configuration, and a copy of the tokenizer; for others to load the run.

        Raises:
            UserError: there is no room, for instance.
        """
        write_bytes(self.config, config.to_yaml().encode())
        write_bytes(self.tokenizer, tokenizer.read_bytes())

    def load_config(self) -> Config:
        """The configuration of the run.

        Raises:
            UserError: there is no run in this folder.
        """
        if not self.config.exists():
            raise UserError(f"{self.root} is no run folder (no config.yaml in it): name the run.dir of a training run")
        return load_config(self.config)

    def write_progress(self, progress: Progress) -> None:
        """Replace what the last call wrote."""
        temporary = self.root / "progress.json.tmp"
        temporary.write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
        temporary.replace(self.root / "progress.json")

    def read_progress(self) -> Progress | None:
        """What was written last; None if the run has not got that far."""
        try:
            return Progress(**json.loads((self.root / "progress.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def check_unchanged(saved: dict[str, Any], config: Config) -> None:
    """Refuse to go on with a model that is not the saved one.

    Args:
        saved: the configuration in the checkpoint.
        config: the configuration to go on with.

    Raises:
        UserError: names the first setting that differs, and both values.
    """
    present = config.model_dump(mode="json")
    if config.data.curriculum and saved["train"]["global_batch"] != config.train.global_batch:
        raise UserError(
            f"{config.run.folder} was trained with train.global_batch = {saved['train']['global_batch']}, but the"
            f" configuration says {config.train.global_batch}: the steps of data.curriculum are counted in batches, so"
            " restore it to go on, or choose another run.dir for a new run"
        )
    for section in FIXED:
        for name, before, now in _differences(section, saved.get(section), present[section]):
            raise UserError(
                f"{config.run.folder} was trained with {name} = {before}, but the configuration says {now}: "
                "restore it to go on, or choose another run.dir for a new run"
            )


def git_revision() -> str | None:
    """The commit of the code that runs, with `+` if files differ from it; None outside a repository."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` that may be written to at this moment; none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(path: Path, step: int) -> None:
    """Drop records after `step`, and half a line that a crash left, so that every step is recorded once."""
    if not path.exists():
        return
    kept = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if _is_until(line, step))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(kept, encoding="utf-8")
    temporary.replace(path)


def _is_until(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except ValueError:
        return False


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now | before:
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        shown = [yaml.safe_dump(x, default_flow_style=True).splitlines()[0] for x in (before, now)]
        yield name, shown[0], shown[1]
