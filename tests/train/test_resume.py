"""Interrupted in any way and started again, a run is the run that nothing interrupted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from data_pipeline.lock import preparation_lock
from loglinear.checkpoint.files import complete_checkpoints, step_of
from loglinear.config import Config, DataConfig
from loglinear.train.run import train
from tests.processes import exit_codes, start_ranks, wait_for
from tests.train.small import STEPS, losses, records, saved_tensors, small_config
from tests.train.trouble import train_signalled

KILLS_ANYWHERE, KILLS_IN_A_SAVE = 14, 6


def last_saved(folder: Path) -> int:
    return max(map(step_of, complete_checkpoints(folder / "checkpoints")), default=0)


def run_until(config: Config, ranks: int, step: int, number: int) -> None:
    """Train, and in `step` one rank gets the signal; all save together behind it and end well."""
    assert exit_codes(start_ranks(ranks, train_signalled, config, step, number)) == [0] * ranks
    assert last_saved(config.run.folder) == step


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.tmp"))


def freeze_in_a_save(process: BaseProcess, folder: Path, rng: random.Random) -> None:
    """Return when the process stands still at a random place of a save, or has ended."""
    while True:
        wait_for(lambda: is_saving(folder) or not process.is_alive())
        if not process.is_alive():
            return
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(process.pid, signal.SIGSTOP)
        if is_saving(folder):
            return
        os.kill(process.pid, signal.SIGCONT)


def finish(config: Config, ranks: int = 1) -> None:
    assert exit_codes(start_ranks(ranks, train, config)) == [0] * ranks


def assert_same_run(folder: Path, reference: Path) -> None:
    """Bit for bit."""
    assert records(folder) == records(reference)
    expected = saved_tensors(reference)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_tensors(folder).items())


def test_asked_to_stop_while_it_waits_for_data_it_ends_well(
    prepared: DataConfig, reference: Path, tmp_path: Path
) -> None:
    data = prepared.model_copy(update={"dir": tmp_path / "data"})
    config, log = small_config(tmp_path / "run", data), tmp_path / "log"
    data.dir.mkdir()
    with preparation_lock(data.dir):
        ranks = start_ranks(2, train, config, log=log)
        wait_for(lambda: log.exists() and "training starts as soon as" in log.read_text())
        for rank in ranks:
            os.kill(rank.pid or 0, signal.SIGUSR1)
        assert exit_codes(ranks) == [0, 0]
    assert "Asked to stop before the data were there" in log.read_text()
    finish(config)
    assert_same_run(tmp_path / "run", reference)


def test_stopped_twice_by_signals_it_goes_on_bit_for_bit(prepared: DataConfig, reference: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", prepared)
    run_until(config, 1, 3, signal.SIGTERM)
    run_until(config, 1, 9, signal.SIGINT)
    run_until(config, 1, STEPS, signal.SIGTERM)
    assert_same_run(tmp_path / "run", reference)
    assert (tmp_path / "run" / "loss.png").exists(), "it has ended, whoever asks it to stop in its last step"


def test_killed_at_20_random_moments_it_goes_on_bit_for_bit(
    prepared: DataConfig, reference: Path, tmp_path: Path
) -> None:
    """Some of the kills strike while a checkpoint is being written, for it is written after every step."""
    folder = tmp_path / "run"
    config = small_config(folder, prepared, checkpoint={"every": 1})
    rng = random.Random()
    struck_saves = 0
    for kill in range(KILLS_ANYWHERE + KILLS_IN_A_SAVE):
        before = last_saved(folder)
        if before > STEPS - 4:  # start again rather than kill a run that has nothing left to do
            shutil.rmtree(folder)
        (process,) = start_ranks(1, train, config)
        if kill < KILLS_ANYWHERE:
            time.sleep(rng.uniform(0.0, 2.5))
        else:
            freeze_in_a_save(process, folder, rng)
        process.kill()
        process.join()
        struck_saves += is_saving(folder)
    assert struck_saves > 0
    finish(config)
    assert_same_run(folder, reference)
    assert not is_saving(folder)


def test_another_number_of_ranks_gives_the_same_curve(prepared: DataConfig, reference: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", prepared)
    run_until(config, 1, 2, signal.SIGTERM)
    run_until(config, 2, 6, signal.SIGUSR1)
    run_until(config, 4, 10, signal.SIGTERM)
    finish(config)
    assert_close(tmp_path / "run", reference)


def test_another_zero_stage_gives_the_same_curve(prepared: DataConfig, reference: Path, tmp_path: Path) -> None:
    def at(stage: int) -> Config:
        return small_config(tmp_path / "run", prepared, train={"zero_stage": stage})

    run_until(at(1), 2, 2, signal.SIGTERM)
    run_until(at(3), 2, 6, signal.SIGTERM)
    run_until(at(2), 1, 10, signal.SIGTERM)
    finish(at(3), ranks=4)
    assert_close(tmp_path / "run", reference)


def assert_close(folder: Path, reference: Path) -> None:
    """As far as sums in another order can agree."""
    torch.testing.assert_close(losses(folder), losses(reference), rtol=0, atol=1e-5)
    expected = saved_tensors(reference)
    for name, tensor in saved_tensors(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=3e-4, msg=f"{name} differs")


def test_a_mixture_with_a_curriculum_goes_on_with_the_same_curve(
    configure: Callable[..., DataConfig], corpus: Path, tmp_path: Path
) -> None:
    """On one rank and, in between, on two: the samples are the same, so the sums differ in their order alone."""
    sources = [
        {"kind": "folder", "path": str(corpus), "pattern": f"0{digits}*.txt", "name": name, "weight": weight}
        for digits, name, weight in (("[0-3]", "early", 0.75), ("[4-7]", "late", 0.25))
    ]
    curriculum = [{"from_step": 0, "seq_len": 80}, {"from_step": 8, "seq_len": 160, "weights": {"late": 1.0}}]
    data = configure(sources=sources, curriculum=curriculum)
    whole = small_config(tmp_path / "whole", data)
    finish(whole)
    parts = small_config(tmp_path / "parts", data)
    run_until(parts, 1, 4, signal.SIGTERM)
    run_until(parts, 2, 10, signal.SIGTERM)
    finish(parts)
    assert_close(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_has_nothing_left_to_do(prepared: DataConfig, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    finish(small_config(tmp_path / "run", prepared))
    assert_same_run(tmp_path / "run", reference)


def test_more_steps_train_a_finished_run_on(prepared: DataConfig, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    finish(small_config(tmp_path / "run", prepared, train={"steps": STEPS + 4}))
    assert losses(tmp_path / "run")[:STEPS].equal(losses(reference))
    assert last_saved(tmp_path / "run") == STEPS + 4


@pytest.mark.parametrize("marker", ["step-00000012.tmp", "step-00000099"])
def test_a_checkpoint_that_is_not_complete_is_never_taken(
    prepared: DataConfig, reference: Path, tmp_path: Path, marker: str
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(complete_checkpoints(checkpoints)[-1], checkpoints / marker)
    (checkpoints / marker / "COMPLETE").unlink()
    finish(small_config(tmp_path / "run", prepared))
    assert not (checkpoints / marker).exists()
    assert_same_run(tmp_path / "run", reference)
