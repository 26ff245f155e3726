"""A sweep's runs beside each other: in its table, in TensorBoard's files, and on the page that people open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from launch.sweep import load_sweep, update_report, write_sweep
from tests import browser

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
RUNS: dict[str, dict[str, Any]] = {
    "low": {"optimizer.lr": 1e-3, "model.pattern": ["log_linear"]},
    "high": {"optimizer.lr": 3e-2, "model.pattern": ["log_linear", "softmax"]},
    "fresh": {"optimizer.lr": 1e-2},
}
RESULTS = {"low": (3.25, 3.5), "high": (2.5, 2.75), "fresh": (4.125, None)}  # loss and held-out loss, exact in fp32


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep whose runs have ended; one of them ended twice, and was better the second time."""
    folder = tmp_path / "out"
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"name": "rates", "dir": str(folder), "config": str(QUICKSTART), "runs": RUNS})
    )
    write_sweep(load_sweep(tmp_path / "sweep.yaml"))
    for name in RUNS:
        (folder / name).mkdir()
    finish(folder / "high", 4, 9.0, 9.5)
    for name, results in RESULTS.items():
        finish(folder / name, 8, *results)
    return folder


def finish(run_dir: Path, step: int, loss: float, held_out_loss: float | None) -> None:
    """Record the end of a run, as its job does."""
    records: list[dict[str, float]] = [{"step": step, "loss": loss}]
    if held_out_loss is not None:
        records.append({"step": step, "held_out_loss": held_out_loss})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    update_report(run_dir)


def test_tensorboard_gets_the_settings_and_the_last_results_of_every_run(sweep: Path) -> None:
    for name, settings in RUNS.items():
        events = EventAccumulator(str(sweep / "comparison" / name))
        events.Reload()

        def told(tag: str, events: EventAccumulator = events) -> HParamsPluginData:
            return HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)

        values = told("session_start_info").session_start_info.hparams
        assert {key: value.number_value or value.string_value for key, value in values.items()} == {
            key: value if isinstance(value, float) else str(value) for key, value in settings.items()
        }
        columns = told("experiment").experiment
        assert {info.name for info in columns.hparam_infos} == {"optimizer.lr", "model.pattern"}, "also those of others"
        assert [info.name.tag for info in columns.metric_infos] == ["final/loss", "final/held_out_loss"]
        scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        results = dict(zip(("final/loss", "final/held_out_loss"), RESULTS[name], strict=True))
        assert scalars == {tag: [value] for tag, value in results.items() if value is not None}


@pytest.mark.browser
def test_the_page_of_hyperparameters_shows_all_settings_and_the_last_results(sweep: Path) -> None:
    wanted = {
        "Trial ID": ["Show Metrics", "model.pattern", "optimizer.lr", "final/loss", "final/held_out_loss"],
        "comparison/fresh": ["0.010000", "4.1250"],
        "comparison/high": ["['log_linear', 'softmax']", "0.030000", "2.5000", "2.7500"],
        "comparison/low": ["['log_linear']", "0.0010000", "3.2500", "3.5000"],
    }
    with browser.tensorboard(sweep) as address, browser.empty_page() as page:
        page.goto(address + "#hparams")
        browser.eventually(page, lambda: table(page) == wanted)
        assert table(page) == wanted


def table(page: Any) -> dict[str, list[str]]:
    """What is written in each row, behind its first cell."""
    rows: dict[str, list[str]] = {}
    for text in filter(None, map(str.strip, page.locator("vaadin-grid-cell-content").all_inner_texts())):
        if text == "Trial ID" or text.startswith("comparison/"):
            row = rows.setdefault(text, [])
        else:
            row.append(text)
    return rows
