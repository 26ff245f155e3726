"""The scalars of TensorBoard in Weights & Biases too, for those who keep their runs there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.train.folder import RunFolder

STEP = "step"  # the axis of every curve; W&B's own steps only count calls, and must never go back


def require_wandb(config: Config) -> None:
    """Check that wandb is there, if it is asked for.

    Raises:
        UserError: it is not.
    """
    if config.monitor.wandb is not None and find_spec("wandb") is None:
        raise UserError(f"monitor.wandb={config.monitor.wandb} needs Weights & Biases: pip install 'loglinear[wandb]'")


class WandbRun:
    """A run in the project `monitor.wandb`; its id is kept in the run's folder, so that a resumed run goes on in it.

    wandb works in a process of its own. If that dies, training goes on without.
    """

    def __init__(self, folder: RunFolder, config: Config) -> None:
        """Start it, or go on with it; WANDB_MODE, WANDB_ENTITY and the like mean what they always do.

        Args:
            folder: the run's, where `wandb/` lies too.
            config: the run, shown as its settings.

        Raises:
            UserError: W&B cannot start a run.
        """
        wandb: Any = import_module("wandb")  # Any, since not everybody has it
        known = folder.wandb_id.read_text(encoding="utf-8").strip() if folder.wandb_id.exists() else None
        try:
            self._run: Any = wandb.init(
                project=config.monitor.wandb,
                name=config.run.name,
                id=known,
                resume="allow",
                dir=str(folder.root),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", quiet=True),  # the terminal is ours
            )
        except wandb.Error as error:
            raise UserError(
                f"monitor.wandb={config.monitor.wandb}: W&B cannot start a run ({error});"
                " log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        folder.wandb_id.write_text(self._run.id + "\n", encoding="utf-8")
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show `values` at `step`."""
        self._unless_lost(lambda run: run.log({STEP: step, **values}))

    def close(self) -> None:
        """Send, or write down, what is left."""
        self._unless_lost(lambda run: run.finish())

    def _unless_lost(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # wandb's own are not all of wandb.Error, and none is worth a run
            self._run = None
            reason = str(error) or type(error).__name__
            warnings.warn(f"W&B is lost ({reason}); training goes on, and TensorBoard has all", stacklevel=2)
