"""Training beside a preparation: the stream is the one of prepared data, and no one waits for the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SEQ_LEN, VOCAB

from data_pipeline import background
from data_pipeline.background import start_preparation, wait_until_ready
from data_pipeline.loader import TrainLoader
from data_pipeline.manifest import read_index
from loglinear.config import Config, DataConfig, ModelConfig

SCRIPT = Path(__file__).with_name("prepare_once.py")
Configure = Callable[..., DataConfig]


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "COMMAND", (sys.executable, str(SCRIPT)))


def start(data: DataConfig) -> subprocess.Popen[bytes]:
    process = start_preparation(Config(model=ModelConfig(vocab_size=VOCAB), data=data))
    assert process is not None
    return process


def wait_ready(data: DataConfig, process: subprocess.Popen[bytes] | None, samples: int = 32) -> None:
    wait_until_ready(data, vocab_size=VOCAB, samples=samples, seq_len=SEQ_LEN, process=process)


def loader(data: DataConfig) -> TrainLoader:
    return TrainLoader(data, vocab_size=VOCAB, seq_len=SEQ_LEN, global_batch=8, micro_batch=8)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def halted(configure: Configure) -> Iterator[tuple[DataConfig, subprocess.Popen[bytes]]]:
    """A preparation of shards of a few documents that is halted after its second shard."""
    data = configure(shard_tokens=900)
    process = start(data)
    wait_for((data.dir / "shard-00001.json").exists)
    process.send_signal(signal.SIGSTOP)
    assert read_index(data.dir) is None
    yield data, process
    process.kill()
    process.wait()
