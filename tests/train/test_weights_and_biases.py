"""Weights & Biases, offline: what it keeps is what TensorBoard shows, and a resumed run goes on in the same run."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loglinear.config import Config, DataConfig
from loglinear.train.folder import RunFolder
from loglinear.train.run import train
from loglinear.train.weights_and_biases import WandbRun
from tests.processes import exit_codes, is_running, start_ranks, wait_for
from tests.train.small import small_config

BLOCK, HEADER = 32_768, 7  # bytes of LevelDB's log format; W&B's files begin with as many of its own as a header has
Curves = dict[str, list[tuple[int, float]]]


def offline(config: Config) -> None:
    os.environ["WANDB_MODE"] = "offline"
    train(config)


def without_wandb(config: Config) -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]  # to Python, it is not installed
    train(config)


def without_account(config: Config) -> None:
    os.environ |= {"HOME": str(config.run.folder.parent), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        os.environ.pop(name, None)
    train(config)


def losing_wandb(config: Config) -> None:
    """Log, kill wandb's process, log again and end."""
    os.environ["WANDB_MODE"] = "offline"
    folder = RunFolder(config.run.folder)
    folder.prepare()
    run = WandbRun(folder, config)
    run.log(1, {"loss": 2.0})
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout
    os.kill(int(found), signal.SIGKILL)
    wait_for(lambda: not is_running(int(found)))
    for step in (2, 3):
        run.log(step, {"loss": 1.0})
    run.close()
    print("at the end", flush=True)


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: parts of one follow each other, and none crosses a block."""
    content, place, record = path.read_bytes(), HEADER, b""
    while place < len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def kept(run_dir: Path) -> tuple[Curves, list[Any]]:
    """Every scalar that W&B keeps of the run, and the beginnings of its parts."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    curves, runs = defaultdict(list), []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for content in log_records(path):
            record = messages.Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = items.pop("step")
                for name, value in items.items():
                    if not name.startswith("_"):
                        curves[name].append((step, value))
    return dict(curves), runs


def shown(run_dir: Path) -> Curves:
    """Every scalar that TensorBoard shows of the run."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_run_is_one_run_with_the_scalars_of_tensorboard(prepared: DataConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'loglinear[wandb]'")
    run_dir = tmp_path / "run"
    for steps in (8, 12):
        config = small_config(
            run_dir, prepared, train={"steps": steps}, monitor={"wandb": "a project", "levels_every": 4}
        )
        assert exit_codes(start_ranks(1, offline, config)) == [0]
    curves, runs = kept(run_dir)
    tensorboard = shown(run_dir)
    assert curves.keys() == tensorboard.keys()
    assert {"loss/train", "loss/held_out", "throughput/tokens_per_second"} <= curves.keys()
    assert [step for step, _ in curves["loss/train"]] == [2, 4, 6, 8, 10, 12]
    for name, points in curves.items():
        assert [(step, float(np.float32(value))) for step, value in points] == tensorboard[name], name
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        ((run_dir / "wandb.id").read_text().strip(), "a project", "run")
    }
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2


def test_wandb_that_is_asked_for_and_absent_is_named_before_anything_is_written(
    prepared: DataConfig, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "run", prepared, monitor={"wandb": "project"})
    assert exit_codes(start_ranks(2, without_wandb, config, log=tmp_path / "log")) == [2, 2]
    sentence = "monitor.wandb=project needs Weights & Biases: pip install 'loglinear[wandb]'"
    assert (tmp_path / "log").read_text().splitlines().count(sentence) == 2
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_start_ends_the_run_with_a_sentence(prepared: DataConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'loglinear[wandb]'")
    config = small_config(tmp_path / "run", prepared, monitor={"wandb": "project"})
    assert exit_codes(start_ranks(1, without_account, config, log=tmp_path / "log")) == [2]
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert said.startswith("monitor.wandb=project: W&B cannot start a run (")
    assert said.endswith("); log in with `wandb login`, or set WANDB_MODE=offline")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_training_goes_on_without_a_wandb_that_has_died(prepared: DataConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'loglinear[wandb]'")
    config = small_config(tmp_path / "run", prepared, monitor={"wandb": "project"})
    assert exit_codes(start_ranks(1, losing_wandb, config, log=tmp_path / "log")) == [0]
    said = (tmp_path / "log").read_text()
    assert said.count("W&B is lost (") == 1
    assert "at the end" in said
