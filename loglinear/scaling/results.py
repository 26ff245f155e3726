"""What was measured so far, in one file that is whole at every moment."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from data_pipeline.files import read_json, write_json

Result = dict[str, Any]


class Results:
    """`scaling.json`: on which machine, and a result for each task's name. One process writes at a time."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scaling.json"

    def read(self) -> dict[str, Result]:
        """Results by their tasks' names, in the order in which they came."""
        return self._tree()["results"]

    def machine(self) -> dict[str, str | int]:
        """What they were measured on; empty before the first ranks have started."""
        return self._tree()["machine"]

    def describe(self, machine: dict[str, str | int]) -> None:
        """Note what the measurements are made on."""
        write_json(self.file, self._tree() | {"machine": machine})

    def add(self, name: str, result: Result) -> None:
        """Note a result, in place of one of that name."""
        tree = self._tree()
        tree["results"][name] = result
        write_json(self.file, tree)

    def drop(self, names: Container[str]) -> None:
        """Forget results."""
        tree = self._tree()
        tree["results"] = {name: result for name, result in tree["results"].items() if name not in names}
        write_json(self.file, tree)

    def _tree(self) -> dict[str, Any]:
        return read_json(self.file) if self.file.exists() else {"machine": {}, "results": {}}
