"""docs/config.md is what the configuration's classes say, and they say something of every key."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from launch.cluster import ClusterConfig
from launch.reference import descriptions, reference
from launch.sweep import SweepConfig
from loglinear.config import Config, TrainConfig
from loglinear.config_text import sections
from tests.docs.pages import read

PAGE = read("docs/config.md")
SECTIONS = {section for root in (Config, ClusterConfig, SweepConfig) for _, section in sections(root)} - {Config}


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda section: section.__name__))
def test_a_docstring_explains_every_key_and_no_other(section: type[BaseModel]) -> None:
    assert list(descriptions(section)) == list(section.model_fields)


def test_the_page_is_what_the_command_prints() -> None:
    assert reference() == PAGE, "run `loglinear config reference > docs/config.md`"


def test_rows_by_hand() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|", PAGE.partition("### train\n")[2], re.MULTILINE)[:8])
    assert set(rows) == set(TrainConfig.model_fields)
    assert rows["steps"] == "integer > 0 | `1000` | steps of the whole run."
    assert rows["precision"].startswith("`fp32`, `bf16` | `fp32` | ")
    assert rows["peak_tflops"].startswith("number > 0 |  | ")
    assert "| `held_out` | number > 0, < 1 | `0.02` | " in PAGE
    assert "| `betas` | [number ≥ 0, < 1, number ≥ 0, < 1] | `[0.9, 0.95]` | " in PAGE
    assert "| `sources` | list of: section | `[{kind: stdlib}]` | " in PAGE
    assert "| `kind` | `hub`, `jsonl`, `parquet`, `arrow`, `text`, `folder`, `stdlib` | required | " in PAGE
    assert "| `environment` | by name: text | `{}` | " in PAGE
