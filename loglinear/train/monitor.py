"""What a run shows while it trains: TensorBoard, W&B, a line a step in metrics.jsonl."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch.utils.tensorboard import SummaryWriter

from loglinear.config import Config
from loglinear.train.engine import StepResult
from loglinear.train.folder import Progress, RunFolder, truncate_metrics
from loglinear.train.layout import layout
from loglinear.train.level_scales import LevelScaleStatistics
from loglinear.train.weights_and_biases import WandbRun

HISTOGRAM_END = 1e20  # of TensorBoard's last bin; it makes none of values that all lie beyond, or are no numbers


class Monitor:
    """Writes curves for rank 0. Steps count from 1: the value at step n was measured in the n-th step."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        start: int,
        flops_per_token: float,
        peak: float,
        wandb: WandbRun | None = None,
    ) -> None:
        """Go on after step `start`; what an interrupted run wrote beyond it is dropped.

        Args:
            folder: the run's.
            config: how often to write.
            start: steps already made.
            flops_per_token: of training: forward and backward.
            peak: FLOP/s of all ranks together.
            wandb: gets the scalars too; it outlives this monitor.
        """
        truncate_metrics(folder.metrics, start)
        self._every, self._steps, self._folder = config.monitor.every, config.train.steps, folder
        self._metrics = folder.metrics.open("a", encoding="utf-8", buffering=1)
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=start + 1)
        self._wandb = wandb
        if start == 0:
            self._writer.add_text("config", f"```yaml\n{config.to_yaml()}```", 0)
            self._writer.add_custom_scalars(layout(config.model))
        self._flops_per_token, self._peak = flops_per_token, peak
        self._since, self._tokens = time.perf_counter(), 0
        self.tokens_per_second = 0.0
        self._trouble = (0, 0)

    def step(self, step: int, result: StepResult, learning_rate: float, seconds: Mapping[str, float]) -> None:
        """Record one step.

        Args:
            step: its number.
            result: what the engine reported.
            learning_rate: of this step.
            seconds: time by phase; written every `monitor.every` steps.
        """
        record = {"step": step, "loss": result.loss, "lr": learning_rate, "grad_norm": result.grad_norm}
        if result.refusal is not None:  # its values may be no numbers, which JSON does not know
            record = {"step": step, "refusal": result.refusal}
        self._metrics.write(json.dumps(record | {"tokens": result.tokens}) + "\n")
        self._tokens += result.tokens
        now = time.perf_counter()
        self.tokens_per_second = self._tokens / (now - self._since)
        if step % self._every:
            return
        left = (self._steps - step) * result.tokens / self.tokens_per_second
        self._folder.write_progress(Progress(step, result.loss, self.tokens_per_second, left))
        self._since, self._tokens = now, 0
        self._scalars(
            step,
            {
                "loss/train": result.loss,
                "optimizer/learning_rate": learning_rate,
                "optimizer/grad_norm": result.grad_norm,
                "throughput/tokens_per_second": self.tokens_per_second,
                "throughput/mfu": self.tokens_per_second * self._flops_per_token / self._peak,
                "memory/peak_GiB": peak_memory() / 2**30,
            }
            | {f"step_seconds/{phase}": value for phase, value in seconds.items()},
        )

    def stability(self, step: int, refused: int, rollbacks: int) -> None:
        """Show how many steps were refused since the run began, and how often it went back since it was started."""
        if step % self._every == 0 or (refused, rollbacks) != self._trouble:
            self._trouble = (refused, rollbacks)
            self._scalars(step, {"stability/refused_steps": refused, "stability/rollbacks": rollbacks})

    def event(self, step: int, text: str) -> None:
        """Show what went wrong."""
        self._writer.add_text("events", text, step)

    def held_out(self, step: int, loss: float) -> None:
        """Record the held-out loss after `step` steps, in nats per token."""
        self._metrics.write(json.dumps({"step": step, "held_out_loss": loss}) + "\n")
        self._scalars(step, {"loss/held_out": loss})

    def text(self, step: int, text: str) -> None:
        """Show a generated text."""
        self._writer.add_text("sample", f"```\n{text}\n```", step)

    def level_scales(self, step: int, statistics: LevelScaleStatistics) -> None:
        """Show lambda of every layer and level: its mean over the tokens that read the level, and a histogram."""
        means = {}
        for layer, level, values in statistics.take():
            name = f"layer_{layer:02d}/level_{level:02d}"
            means[f"lambda_mean/{name}"] = values.mean().item()
            within = values[values < HISTOGRAM_END]
            if len(within):
                self._writer.add_histogram(f"lambda/{name}", within, step)
        if means:
            self._scalars(step, means)

    def pause(self, seconds: float) -> None:
        """Leave `seconds` of evaluating or saving out of the throughput."""
        self._since += seconds

    def close(self) -> None:
        """Flush everything."""
        self._writer.close()
        self._metrics.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(step, values)


def peak_memory() -> int:
    """Bytes: the most that torch held on the GPU, or that the process held in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
