"""Which steps are refused: those whose loss or gradient is not finite, or far outside what the last steps showed.

A refused step leaves weights, moments and their count of updates as they are. The deviation is robust: from the median
of a window, in units of its median absolute deviation (times 1.4826, which makes it a standard deviation where values
are normal), so that a spike does not hide the next. Source: Iglewicz and Hoaglin, "How to detect and handle outliers",
1993. Gradient norms are compared by their logarithm, since they vary by factors.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from pathlib import Path
from statistics import median
from typing import Any

from loglinear.config import StabilityConfig
from loglinear.errors import UserError

NORMAL = 1.4826  # standard deviations in a median absolute deviation of normal values
LEAST_LOSS, LEAST_LOG_NORM = 0.01, 0.1  # deviations are never taken for less: of the median loss, of log(norm)
LEAST_SHARE = 4  # the window must be a quarter full before it is trusted
ROLLBACKS = 3  # to one checkpoint, before a person has to look


class Guard:
    """What the last accepted steps looked like, and how many were refused since.

    Attributes:
        refused: steps, since the run began.
        in_a_row: the last ones.
    """

    def __init__(self, config: StabilityConfig, saved: dict[str, Any] | None = None) -> None:
        """Go on from what `state` gave, or begin."""
        self._config = config
        saved = saved or {"losses": [], "norms": [], "refused": 0}
        self._losses: deque[float] = deque(saved["losses"], config.window)
        self._norms: deque[float] = deque(saved["norms"], config.window)
        self.refused: int = saved["refused"]
        self.in_a_row = 0

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were refused that the weights are to blame."""
        return self.in_a_row >= self._config.rollback_after

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why a step is refused, or None.

        Args:
            loss: of the step, in nats per token.
            grad_norm: L2 norm of its gradient before clipping.
        """
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        found = _deviation(loss, self._losses, lambda middle: LEAST_LOSS * abs(middle), self._config.window)
        if found > self._config.spike:
            return f"the loss {loss:.3f} is {found:.0f} deviations above the last {len(self._losses)}"
        found = _deviation(_log(grad_norm), self._norms, lambda _: LEAST_LOG_NORM, self._config.window)
        if found > self._config.spike:
            return f"the gradient norm {grad_norm:.3g} is {found:.0f} deviations above the last {len(self._norms)}"
        return None

    def note(self, loss: float, grad_norm: float, refusal: str | None) -> None:
        """Remember a step, once all ranks agree on it."""
        if refusal is not None:
            self.refused += 1
            self.in_a_row += 1
            return
        self.in_a_row = 0
        self._losses.append(loss)
        self._norms.append(_log(grad_norm))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self._losses), "norms": list(self._norms), "refused": self.refused}


class Rollbacks:
    """How often a run went back to which checkpoint since it was started.

    Attributes:
        total: to any.
    """

    def __init__(self) -> None:
        self._to: Counter[Path] = Counter()

    @property
    def total(self) -> int:
        return self._to.total()

    def count(self, folder: Path | None, step: int, reason: str) -> None:
        """Count one to the checkpoint in `folder`.

        Raises:
            UserError: there is no checkpoint, or going back to this one does not help.
        """
        if folder is None:
            raise UserError(
                f"step {step} cannot be trained ({reason}), and there is no checkpoint to go back to: start again with "
                "a lower optimizer.lr"
            )
        if self._to[folder] == ROLLBACKS:
            raise UserError(
                f"step {step} cannot be trained ({reason}), and going back to {folder} {ROLLBACKS} times has not"
                " helped: lower optimizer.lr, raise stability.spike if the data change here on purpose, or remove that"
                " folder to go back further"
            )
        self._to[folder] += 1


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _deviation(value: float, window: deque[float], least: Any, size: int) -> float:
    """How far `value` lies above the window's median, in robust deviations; 0 while there is too little to tell."""
    if len(window) < size // LEAST_SHARE:
        return 0.0
    middle = median(window)
    spread = NORMAL * median(abs(each - middle) for each in window)
    return (value - middle) / max(spread, least(middle), 1e-30)
