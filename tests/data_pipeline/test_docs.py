"""What docs/data.md shows is what the code takes and gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.state import DataState
from loglinear.cli import app
from loglinear.config import load_config

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_configurations_are_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml").data.sources


def test_the_state_is_one() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert DataState.from_dict(json.loads(text)).samples == 24_000


def test_commands_exist() -> None:
    commands = re.findall(r"^loglinear (.*?) CONFIG", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0
