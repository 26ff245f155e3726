"""Training beside a preparation: the stream is the one of prepared data, and no one waits for the dead."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipeline.background import start_preparation, wait_until_ready
from data_pipeline.batch import Batch
from data_pipeline.held_out import held_out_batches
from data_pipeline.loader import TrainLoader
from data_pipeline.lock import LOCK_FILE, PreparationEndedError, is_preparing, preparation_lock
from data_pipeline.manifest import read_index
from loglinear.config import Config, DataConfig, ModelConfig, SourceConfig
from loglinear.errors import UserError
from tests.corpus import SEQ_LEN, VOCAB
from tests.processes import is_running, wait_for

Configure = Callable[..., DataConfig]
ATTEMPTS = 5  # to halt a preparation before it ends, which this process may be too late for
Halted = tuple[DataConfig, subprocess.Popen[bytes]]


def start(data: DataConfig) -> subprocess.Popen[bytes]:
    process = start_preparation(Config(model=ModelConfig(vocab_size=VOCAB), data=data))
    assert process is not None
    return process


def wait_ready(data: DataConfig, process: subprocess.Popen[bytes] | None, samples: int = 32) -> None:
    needed = {"vocab_size": VOCAB, "samples": samples, "seq_len": SEQ_LEN}
    assert wait_until_ready(data, **needed, process=process, is_over=lambda: False)


def batches(data: DataConfig, count: int) -> list[Batch]:
    loader = TrainLoader(data, vocab_size=VOCAB, seq_len=SEQ_LEN, global_batch=8, micro_batch=8)
    return list(islice(loader, count))


@pytest.fixture
def halted(configure: Configure) -> Iterator[Halted]:
    """A preparation of shards of a few documents that is halted after its second shard."""
    data = configure(shard_tokens=900)
    process = start(data)
    for _ in range(ATTEMPTS):
        wait_for((data.dir / "shard-00001.json").exists)
        process.send_signal(signal.SIGSTOP)
        if read_index(data.dir) is None:
            break
        process.kill()
        process.wait()
        shutil.rmtree(data.dir)
        process = start(data)
    yield data, process
    process.kill()
    process.wait()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_stream_before_and_after_the_preparation_ends(halted: Halted, workers: int) -> None:
    data, process = halted
    data = data.model_copy(update={"loader_workers": workers})
    wait_ready(data, process)
    early = batches(data, 4)
    process.send_signal(signal.SIGCONT)
    assert process.wait(300) == 0
    assert read_index(data.dir) is not None
    for before, after in zip(early, batches(data, 4), strict=True):
        assert all(map(torch.equal, before, after))


def test_a_loader_waits_for_shards_that_are_still_being_made(halted: Halted) -> None:
    data, process = halted
    wait_ready(data, process)
    loader = iter(TrainLoader(data, vocab_size=VOCAB, seq_len=SEQ_LEN, global_batch=64, micro_batch=64))
    process.send_signal(signal.SIGCONT)
    waited = list(islice(loader, 8))  # more than the two shards held
    process.wait(300)
    again = TrainLoader(data, vocab_size=VOCAB, seq_len=SEQ_LEN, global_batch=64, micro_batch=64)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(waited, islice(again, 8), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_nobody_waits_for_a_dead_preparation(halted: Halted, workers: int) -> None:
    data, process = halted
    process.kill()
    process.wait()
    with pytest.raises(UserError, match=r"ended before it was complete: run `loglinear data prepare"):
        wait_ready(data, process, samples=10**6)
    with pytest.raises(UserError, match="ended before it was complete"):
        batches(data.model_copy(update={"loader_workers": workers}), 100)


def test_an_interrupted_preparation_goes_on(halted: Halted) -> None:
    """What was written is not enough, and the process that goes on needs seconds to take its lock."""
    data, process = halted
    process.kill()
    process.wait()
    again = start(data)
    wait_ready(data, again, samples=10**6)
    assert again.wait(300) == 0


def test_it_goes_on_when_the_trainer_is_asked_to_stop_waiting(halted: Halted) -> None:
    """Signals to all processes of a job reach it too."""
    data, process = halted
    asked = {"vocab_size": VOCAB, "samples": 10**6, "seq_len": SEQ_LEN, "process": process}
    assert not wait_until_ready(data, **asked, is_over=lambda: True)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    assert process.wait(300) == 0
    assert read_index(data.dir) is not None


def test_who_waits_for_held_out_data_can_say_that_he_lives(halted: Halted) -> None:
    data, process = halted

    def meanwhile() -> None:
        process.send_signal(signal.SIGCONT)

    options = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "batch": 4, "limit_samples": 10**6}
    waited = list(held_out_batches(data, **options, meanwhile=meanwhile))
    assert process.wait(300) == 0
    assert len(waited) == len(list(held_out_batches(data, **options)))


def test_the_last_words_of_a_failed_preparation_are_quoted(configure: Configure, tmp_path: Path) -> None:
    data = configure(sources=(SourceConfig(kind="folder", path=str(tmp_path / "absent")),))
    with pytest.raises(UserError, match=r"(?s)its last words:.*there is no folder .*absent"):
        wait_ready(data, start(data))


def test_only_what_may_go_on_is_worth_another_start(halted: Halted, configure: Configure, tmp_path: Path) -> None:
    data, process = halted
    process.kill()
    process.wait()
    with pytest.raises(PreparationEndedError):
        wait_ready(data, process, samples=10**6)
    absent = configure(dir=tmp_path / "other", sources=(SourceConfig(kind="folder", path=str(tmp_path / "absent")),))
    with pytest.raises(UserError) as raised:
        wait_ready(absent, start(absent))
    assert not isinstance(raised.value, PreparationEndedError)


def test_two_that_start_at_once_both_get_their_data(configure: Configure) -> None:
    """Each has asked before the other's preparation held the lock."""
    data = configure(shard_tokens=900)
    first, second = start(data), start(data)
    wait_ready(data, first, samples=10**6)
    wait_ready(data, second, samples=10**6)
    assert sorted([first.wait(300), second.wait(300)])[0] == 0
    assert read_index(data.dir) is not None


def test_those_who_ask_do_not_take_each_other_for_a_preparation(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    ask = f"from pathlib import Path; from data_pipeline.lock import *; import sys\nfolder = Path({str(tmp_path)!r})\n"
    ask += "sys.exit(any(is_preparing(folder) for _ in range(20000)))"
    asking = [subprocess.Popen([sys.executable, "-c", ask]) for _ in range(2)]
    assert [each.wait(300) for each in asking] == [0, 0]
    with preparation_lock(tmp_path):
        assert is_preparing(tmp_path)
    assert not is_preparing(tmp_path)


def test_prepared_data_need_no_process(prepared: DataConfig) -> None:
    assert start_preparation(Config(model=ModelConfig(vocab_size=VOCAB), data=prepared)) is None
    wait_ready(prepared, None)


def test_a_second_trainer_waits_for_the_first_ones_preparation(configure: Configure) -> None:
    data = configure()
    data.dir.mkdir()
    with preparation_lock(data.dir):
        assert start_preparation(Config(model=ModelConfig(vocab_size=VOCAB), data=data)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the child only on Linux")
def test_the_preparation_ends_with_the_trainer(configure: Configure, tmp_path: Path) -> None:
    data = configure()
    config = tmp_path / "config.yaml"
    config.write_text(Config(model=ModelConfig(vocab_size=VOCAB), data=data).to_yaml())
    script = (
        "import os, signal, sys\n"
        "from data_pipeline.background import start_preparation\n"
        "from loglinear.config import load_config\n"
        "process = start_preparation(load_config(sys.argv[1]))\n"
        "os.kill(process.pid, signal.SIGSTOP)\n"
        "print(process.pid, flush=True)\n"
        "signal.pause()\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script, str(config)], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    child = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    os.kill(child, signal.SIGCONT)
    wait_for(lambda: not is_running(child))
