"""What an experiment says on the terminal: a bar for the group that trains, a line for each that is finished."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ExperimentConsole:
    """Use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        terminal = self._console.is_terminal
        self._progress = Progress(*columns, *times, console=self._console, disable=not terminal)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> ExperimentConsole:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, title: str, step: int, steps: int) -> None:
        """Show how far a group is."""
        self._progress.update(self._task, description=title, completed=step, total=steps)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, soft_wrap=True, markup=False)
