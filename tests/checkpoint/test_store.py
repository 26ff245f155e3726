"""Checkpoints on disk: any range of any parameter comes back, some are kept, damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loglinear.checkpoint import load_weights, read_latest
from loglinear.checkpoint.files import complete_checkpoints, open_shard, shard_name, write_shard
from loglinear.checkpoint.random_state import random_state, restore_random_state
from loglinear.checkpoint.weights import PieceReader
from loglinear.config import DataConfig
from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.parallel.shard import Shard
from loglinear.train.run import train
from tests.processes import exit_codes, start_ranks
from tests.train.small import small_config


@pytest.fixture(scope="module")
def sharded(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 13 steps by 3 ranks under ZeRO 3, whose parameters do not divide evenly."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    config = small_config(
        folder,
        prepared,
        train={"steps": 13, "zero_stage": 3, "global_batch": 6},
        eval={"every": 13},
        checkpoint={"every": 2, "keep_last": 2, "keep_every": 4},
    )
    assert exit_codes(start_ranks(3, train, config)) == [0] * 3
    return folder


@pytest.fixture
def own(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "own"))


def test_the_last_ones_and_every_mth_are_kept(sharded: Path) -> None:
    kept = [path.name for path in complete_checkpoints(sharded / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (4, 8, 12, 13)]
    assert {path.name for path in (sharded / "checkpoints").iterdir()} == set(kept)


def test_what_lies_beside_checkpoints_is_let_alone(own: Path, prepared: DataConfig) -> None:
    """A copy, and an export; what a save left behind goes when the run goes on."""
    folder = own / "checkpoints"
    shutil.copytree(folder / "step-00000013", folder / "step-00000013.bak")
    for name in ("step-12-exported", "step-00000014", "step-00000015.tmp"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    assert read_latest(folder).step == 13
    config = small_config(own, prepared, train={"steps": 13, "global_batch": 6})
    assert exit_codes(start_ranks(1, train, config)) == [0]
    left = {path.name for path in folder.iterdir()} - {path.name for path in complete_checkpoints(folder)}
    assert left == {"step-00000013.bak", "step-12-exported"}


def test_a_checkpoint_holds_one_file_a_rank_and_says_what_it_is(sharded: Path) -> None:
    snapshot = read_latest(sharded / "checkpoints")
    names = {path.name for path in snapshot.folder.iterdir()}
    shards = {f"rank-{rank:05d}.safetensors" for rank in range(3)}
    assert names == shards | {"index.json", "state.json", "COMPLETE"}
    assert len({path.stat().st_mode for path in snapshot.folder.iterdir()}) == 1, "all may read what one may"
    assert snapshot.step == snapshot.state["step"] == snapshot.state["optimizer_step"] == 13
    assert snapshot.state["data"]["samples"] == 13 * 6
    assert snapshot.state["ranks"] == 3
    assert snapshot.state["config"]["train"]["zero_stage"] == 3
    assert {"revision", "versions", "learning_rate"} <= set(snapshot.state)


def test_every_element_is_saved_once(sharded: Path) -> None:
    index = json.loads((read_latest(sharded / "checkpoints").folder / "index.json").read_text())
    for entry in index["parameters"].values():
        ranges = sorted((piece["start"], piece["start"] + piece["numel"]) for piece in entry["pieces"])
        assert ranges[0][0] == 0
        assert ranges[-1][1] == torch.Size(entry["shape"]).numel()
        assert all(end == start for (_, end), (start, _) in pairwise(ranges))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_any_parameter_comes_back(sharded: Path, data: st.DataObject) -> None:
    with PieceReader(read_latest(sharded / "checkpoints").folder) as reader:
        name = data.draw(st.sampled_from(sorted(reader.parameters)))
        shape = tuple(reader.parameters[name]["shape"])
        numel = torch.Size(shape).numel()
        shard = Shard(shape, 0, 0, shape[0])
        start = data.draw(st.integers(0, numel - 1))
        end = data.draw(st.integers(start, numel))
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            whole, part = torch.empty(numel), torch.empty(end - start)
            reader.read_into(whole, name, shard, 0, kind)
            reader.read_into(part, name, shard, start, kind)
            assert torch.equal(part, whole[start:end])


def test_the_weights_make_a_model(sharded: Path, prepared: DataConfig) -> None:
    model = build_model(small_config(sharded, prepared).model, seed=1)
    fresh = {name: parameter.clone() for name, parameter in model.named_parameters()}
    load_weights(read_latest(sharded / "checkpoints").folder, model)
    assert all(not torch.equal(parameter, fresh[name]) for name, parameter in model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_weights_of_another_model_are_refused(sharded: Path, prepared: DataConfig) -> None:
    other = build_model(small_config(sharded, prepared, model={"dim": 48}).model, seed=0)
    with pytest.raises(
        UserError, match=r"holds embedding.weight with shape \[300, 32\], but this model has \[300, 48\]"
    ):
        load_weights(read_latest(sharded / "checkpoints").folder, other)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
@pytest.mark.parametrize("name", ["rank-00002.safetensors", "index.json", "state.json"])
def test_damage_is_named(own: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = complete_checkpoints(own / "checkpoints")[-1] / name
    damage(path)
    with pytest.raises(UserError, match=rf"{name} is damaged.*remove the folder .*step-00000013"):
        read_latest(own / "checkpoints")


def test_random_numbers_go_on_where_they_were_saved(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    write_shard(tmp_path, 0, random_state())
    expected = torch.rand(4)
    torch.manual_seed(7)
    with open_shard(tmp_path, shard_name(0)) as shard:
        restore_random_state(shard)
    assert torch.equal(torch.rand(4), expected)


def test_without_a_checkpoint_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        read_latest(tmp_path)
