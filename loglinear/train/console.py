"""What a run says on the terminal; only rank 0 speaks."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainConsole:
    """A progress bar on a terminal, a line every `every` steps elsewhere. Use as a context manager."""

    def __init__(self, start: int, steps: int, every: int, speaks: bool) -> None:
        self._console = Console(quiet=not speaks, highlight=False)
        self._live = self._console.is_terminal and speaks
        self._every, self._steps = every, steps
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._progress.add_task("", total=steps, completed=start)

    def __enter__(self) -> TrainConsole:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show how far the run is."""
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, description=status)
        if not self._live and (step % self._every == 0 or step == self._steps):
            left = self._progress.tasks[0].time_remaining
            self.say(f"step {step}/{self._steps}  {status}" + (f"  {_duration(left)} left" if left else ""))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, soft_wrap=True, markup=False)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
