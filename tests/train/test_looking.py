"""What people look at: TensorBoard's layout, and the trace of a few steps."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from loglinear.config import DataConfig
from loglinear.train.layout import layout
from loglinear.train.profile import profile_steps
from loglinear.train.schedule import learning_rate
from tests.processes import exit_codes, start_ranks
from tests.train.small import small_config


def test_the_first_page_shows_curves_that_are_there(reference: Path) -> None:
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    (name,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("custom_scalars")]
    shown = Layout.FromString(events.Tensors(name)[0].tensor_proto.string_val[0])
    assert [category.title for category in shown.category] == ["run", "lambda by level"]
    tags = events.Tags()["scalars"]
    drawn = set()
    for category in shown.category:
        for chart in category.chart:
            found = {tag for pattern in chart.multiline.tag for tag in tags if re.fullmatch(pattern, tag)}
            assert found, f"{chart.title} is empty"
            drawn |= found
    assert drawn == set(tags)


@pytest.mark.parametrize(
    ("changes", "charts"), [({}, 1), ({"pattern": ["softmax"]}, 0), ({"log_linear": {"level_scale": "none"}}, 0)]
)
def test_layers_without_level_scales_have_no_chart(
    prepared: DataConfig, tmp_path: Path, changes: dict[str, object], charts: int
) -> None:
    shown = layout(small_config(tmp_path, prepared, model=changes).model)
    assert len(shown.get("lambda by level", {})) == charts


def test_the_rate_behind_a_run_of_warm_up_alone(prepared: DataConfig, tmp_path: Path) -> None:
    """A profile makes steps that the run does not have."""
    config = small_config(tmp_path / "run", prepared, train={"steps": 2})
    assert learning_rate(config, 5) == config.optimizer.lr * config.schedule.final_ratio


def test_a_profile_names_the_phases_of_every_step(prepared: DataConfig, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", prepared, train={"global_batch": 16})
    assert config.train.micro_batches(2) > 2
    log = tmp_path / "log"
    assert exit_codes(start_ranks(2, profile_steps, config, tmp_path / "out", 2, log=log)) == [0, 0]
    for rank in range(2):
        with gzip.open(tmp_path / "out" / f"rank-{rank:05d}.trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        assert names["step"] == 2
        assert {names[phase] for phase in ("forward", "backward", "optimizer")} == {4}, "two micro-batches a step"
        assert any(event["name"] == "aten::mm" for event in events)
        assert any(event["name"] == "[memory]" for event in events)
    assert "rank-*.trace.json.gz" in log.read_text()
    assert not (tmp_path / "run").exists()
