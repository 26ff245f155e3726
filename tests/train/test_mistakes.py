"""Bad input and bad luck: one sentence that names the thing and the remedy, exit code 2, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loglinear.checkpoint import read_latest
from loglinear.checkpoint.files import complete_checkpoints
from loglinear.config import Config, DataConfig, SourceConfig
from loglinear.config_data import StageConfig
from loglinear.errors import UserError
from loglinear.train.folder import RunFolder
from loglinear.train.run import train
from tests.processes import exit_codes, start_ranks
from tests.train.small import STEPS, records, saved_tensors, small_config


def refused(config: Config, log: Path, ranks: int = 1, target: Any = train) -> str:
    """What the ranks say of a run that is refused, once however many they are."""
    assert exit_codes(start_ranks(ranks, target, config, log=log)) == [2] * ranks
    lines = log.read_text().splitlines()
    assert lines.count(lines[-1]) == ranks, "one sentence, the same on every rank"
    return lines[-1]


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "run"))


MODEL_CHANGES = [
    ({"layers": 3}, "model.layers = 2, but the configuration says 3"),
    ({"log_linear": {"heads": 4, "head_dim": 8, "state_dim": 16}}, "model.log_linear.heads = 2, .* says 4"),
    ({"norm_eps": 1e-6}, "model.norm_eps = 1.0e-05, but the configuration says 1.0e-06"),
]


@pytest.mark.parametrize(("change", "message"), MODEL_CHANGES)
def test_resuming_with_another_model_names_the_setting(
    prepared: DataConfig, copy: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    said = refused(small_config(copy, prepared, model=change, train={"steps": STEPS + 1}), tmp_path / "log", ranks=2)
    with pytest.raises(UserError, match=f"was trained with {message}: restore it to go on, or choose another run.dir"):
        raise UserError(said)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_curriculum_counts_in_batches_that_must_stay(prepared: DataConfig, copy: Path, tmp_path: Path) -> None:
    data = prepared.model_copy(update={"curriculum": (StageConfig(from_step=STEPS + 2, seq_len=80),)})
    batch = {"steps": STEPS + 1, "global_batch": 4}
    said = refused(small_config(copy, data, train=batch), tmp_path / "log")
    assert "was trained with train.global_batch = 8, but the configuration says 4: the steps of data.curriculum" in said
    plain = small_config(copy, prepared, train=batch)
    assert exit_codes(start_ranks(1, train, plain)) == [0], "without one, batches may change"


def test_resuming_in_another_order_of_the_data_is_refused(prepared: DataConfig, copy: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    data = prepared.model_copy(update={"shuffle_window": 64})
    said = refused(small_config(copy, data, train={"steps": STEPS + 1}), tmp_path / "log")
    assert "trained with data.shuffle_window = 32, this run has 64" in said
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_shard_is_named_and_nothing_is_trained_on_it(own: DataConfig, tmp_path: Path, ranks: int) -> None:
    shard = own.dir / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    said = refused(small_config(tmp_path / "run", own), tmp_path / "log", ranks)
    assert f"{shard} is damaged: its SHA-256 is " in said
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_damaged_checkpoint_is_named(prepared: DataConfig, copy: Path, tmp_path: Path) -> None:
    folder = complete_checkpoints(copy / "checkpoints")[-1]
    shard = folder / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    said = refused(small_config(copy, prepared, train={"steps": STEPS + 1}), tmp_path / "log", ranks=2)
    assert f"checkpoint file {shard} is damaged (SHA-256 " in said
    assert f"remove the folder {folder}, and the run goes on from the checkpoint before" in said


def test_the_checkpoint_before_a_damaged_one_serves(
    prepared: DataConfig, reference: Path, copy: Path, tmp_path: Path
) -> None:
    shutil.rmtree(complete_checkpoints(copy / "checkpoints")[-1])
    assert exit_codes(start_ranks(1, train, small_config(copy, prepared))) == [0]
    expected = saved_tensors(reference)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_tensors(copy).items())


def train_on_a_full_disk(config: Config) -> None:
    """The system refuses to let any file grow over 64 KiB, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    train(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_during_a_save_leaves_the_checkpoint_before(
    prepared: DataConfig, copy: Path, tmp_path: Path, ranks: int
) -> None:
    before = saved_tensors(copy)
    config = small_config(copy, prepared, train={"steps": STEPS + 4})
    said = refused(config, tmp_path / "log", ranks, target=train_on_a_full_disk)
    assert said.startswith(f"cannot save a checkpoint in {copy}/checkpoints on rank 0")
    assert "make room there and start again; the last complete one stays" in said
    assert [path.name for path in sorted((copy / "checkpoints").iterdir())] == ["step-00000020", "step-00000024"]
    assert read_latest(copy / "checkpoints").step == STEPS
    after = saved_tensors(copy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert exit_codes(start_ranks(1, train, config)) == [0], "with room again it goes on"


def describe_on_a_full_disk(config: Config) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    folder = RunFolder(config.run.folder)
    try:
        folder.describe(config, folder.tokenizer)
    except UserError:
        os._exit(2)  # there is no room for a log


def test_a_disk_that_is_full_leaves_the_configuration_before(prepared: DataConfig, copy: Path) -> None:
    before = (copy / "config.yaml").read_bytes()
    config = small_config(copy, prepared, train={"steps": STEPS + 4})
    assert exit_codes(start_ranks(1, describe_on_a_full_disk, config)) == [2]
    assert (copy / "config.yaml").read_bytes() == before


def test_batches_that_do_not_divide_over_the_ranks_are_refused(prepared: DataConfig, tmp_path: Path) -> None:
    said = refused(small_config(tmp_path / "run", prepared), tmp_path / "log", ranks=3)
    assert "train.global_batch (8) must be a multiple of train.micro_batch (2) times" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset_ends_all_ranks(configure: Any, tmp_path: Path) -> None:
    data = configure(sources=(SourceConfig(kind="jsonl", path=str(tmp_path / "absent.jsonl")),))
    log = tmp_path / "log"
    assert exit_codes(start_ranks(2, train, small_config(tmp_path / "run", data), log=log)) == [2, 2]
    assert f"no file {tmp_path}/absent.jsonl; correct the path" in log.read_text()


def test_a_folder_that_cannot_be_written_to_is_named(prepared: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused(small_config(tmp_path / "file" / "run", prepared), tmp_path / "log", ranks=2)
    assert f"cannot write to run.dir {tmp_path}/file/run" in said


def test_a_sample_is_as_long_as_the_trained_levels_allow(prepared: DataConfig, tmp_path: Path) -> None:
    """What the model cannot write must not end a run at its first evaluation, before it has saved anything."""
    mixer = {"heads": 2, "head_dim": 16, "state_dim": 16, "beyond_trained_levels": "error"}
    changes = {"model": {"log_linear": mixer}, "eval": {"every": 4, "generate_tokens": 400}, "train": {"steps": 4}}
    assert exit_codes(start_ranks(1, train, small_config(tmp_path / "run", prepared, **changes))) == [0]


def test_a_loss_that_stays_infinite_ends_the_run(prepared: DataConfig, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", prepared, optimizer={"lr": 1e30}, checkpoint={"every": 100})
    said = refused(config, tmp_path / "log", ranks=2)
    assert "cannot be trained (the loss is nan), and there is no checkpoint to go back to" in said
    assert "lower optimizer.lr" in said
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records(tmp_path / "run") if "loss" in record)
