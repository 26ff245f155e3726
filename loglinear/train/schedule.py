"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

from loglinear.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The rate of step `step`, counted from 0.

    Linear from lr / warmup_steps to lr over the warm-up; then a cosine to lr * final_ratio at the last step, or (WSD,
    arXiv 2404.06395) constant until `decay_steps` remain and linear down to lr * final_ratio.
    """
    schedule, peak, steps = config.schedule, config.optimizer.lr, config.train.steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    decay_steps = schedule.decay_steps if schedule.kind == "wsd" else steps - schedule.warmup_steps
    progress = (step - (steps - decay_steps) + 1) / max(decay_steps, 1)  # none if all is warm-up
    progress = min(max(progress, 0.0), 1.0)
    remaining = 1 - progress if schedule.kind == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * remaining)
