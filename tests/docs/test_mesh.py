"""Every number of docs/mesh.md is what `loglinear plan` computes."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from loglinear.cli import app
from loglinear.config import load_config
from loglinear.train.plan import Plan, make_plan
from tests.docs.pages import ROOT, blocks, read
from tests.docs.test_commands import parse

PAGE = read("docs/mesh.md")
TABLES = re.findall(r"^`loglinear (plan [^`]+)`[^`|]*\n\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
ROWS = [
    pytest.param((base.replace("CONFIG", with_) if "CONFIG" in base else f"{base} {with_}").split(), numbers, id=with_)
    for base, table in TABLES
    for with_, numbers in re.findall(r"^\| `([^`]+)` \| (.*) \|$", table, re.MULTILINE)
]


def cells(plan: Plan) -> str:
    """A plan as a row of the page, in GiB."""
    sizes = [f"{size / 2**30:.1f}" for size in (*plan.memory.values(), sum(plan.memory.values()))]
    return " | ".join([*sizes, ", ".join(f"{axis} {size / 2**30:.1f}" for axis, size in plan.traffic.items())])


@pytest.mark.parametrize(("words", "numbers"), ROWS)
def test_a_row_is_what_plan_computes(words: list[str], numbers: str) -> None:
    given = parse(words)
    assert cells(make_plan(load_config(ROOT / given["config"], given["overrides"]), given["ranks"])) == numbers


def test_the_output_is_what_plan_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (shown,) = blocks(PAGE, "console")
    command, _, output = shown.removeprefix("$ loglinear ").partition("\n")
    assert CliRunner().invoke(app, command.split()).stdout == output
    assert len(ROWS) == 17
