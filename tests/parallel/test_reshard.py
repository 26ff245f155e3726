"""A checkpoint of any mesh and ZeRO stage goes on under any other, and becomes one file."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loglinear.checkpoint import load_weights, read_latest
from loglinear.checkpoint.blocks import Block, rectangles, view
from loglinear.config import Config, DataConfig
from loglinear.model import build_model
from loglinear.parallel import make_mesh, parallel_model, start_world
from loglinear.train.run import train
from tests.processes import exit_codes, start_ranks
from tests.train.small import GLOBAL_BATCH, losses, saved_tensors, small_config
from tests.train.test_resume import run_until

MODEL = {"log_linear": {"heads": 4, "head_dim": 16, "state_dim": 16}, "softmax": {"heads": 4, "head_dim": 16}}
STOP = 8  # the step behind which a run is saved; ten more follow
LOADS = [(1, 1, 1), (4, 1, 1), (1, 1, 4), (2, 2, 1)]


def over(folder: Path, data: DataConfig, mesh: tuple[int, int, int], stage: int) -> Config:
    parallel = {"context": mesh[1], "tensor": mesh[2]}
    train_settings = {"steps": STOP + 10, "zero_stage": stage, "micro_batch": GLOBAL_BATCH // mesh[0]}
    return small_config(folder, data, model=MODEL, train=train_settings, parallel=parallel)


@pytest.fixture(scope="module")
def uninterrupted(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert exit_codes(start_ranks(1, train, over(folder, prepared, (1, 1, 1), 1))) == [0]
    return folder


@pytest.fixture(scope="module", params=[1, 2, 3])
def stopped(request: pytest.FixtureRequest, prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over data 2 x tensor 2, stopped ten steps before its end, under each ZeRO stage."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_until(over(folder, prepared, (2, 1, 2), request.param), 4, STOP, signal.SIGTERM)
    return folder


@pytest.mark.parametrize("mesh", LOADS, ids=str)
def test_the_curve_goes_on_over_another_mesh(
    prepared: DataConfig, uninterrupted: Path, stopped: Path, tmp_path: Path, mesh: tuple[int, int, int]
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    ranks = mesh[0] * mesh[1] * mesh[2]
    stage = 1 + LOADS.index(mesh) % 3
    assert exit_codes(start_ranks(ranks, train, over(folder, prepared, mesh, stage))) == [0] * ranks
    torch.testing.assert_close(losses(folder), losses(uninterrupted), rtol=0, atol=1e-5)
    expected = saved_tensors(uninterrupted)
    for name, tensor in saved_tensors(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=f"{name} differs")


def test_an_export_holds_every_weight_in_one_file(stopped: Path, prepared: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "model.safetensors"
    export = [sys.executable, "-m", "loglinear", "export", str(stopped)]
    subprocess.run([*export, str(out)], check=True)
    (plain := tmp_path / "plain").touch()
    assert out.stat().st_mode == plain.stat().st_mode, "whoever may read other files may read this one"
    refused = subprocess.run([*export, "/proc/model.safetensors"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("loglinear: cannot write /proc/model.safetensors (")
    model = build_model(over(stopped, prepared, (1, 1, 1), 1).model, seed=1)
    load_weights(read_latest(stopped / "checkpoints").folder, model)
    weights = load_file(out)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


blocks = st.builds(Block, st.integers(0, 5), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6))


@given(block=blocks, data=st.data())
def test_a_range_of_a_block_is_at_most_three_rectangles(block: Block, data: st.DataObject) -> None:
    whole = torch.arange(12 * 12).view(12, 12)
    flat = whole[block.row : block.row + block.rows, block.column : block.column + block.columns].flatten()
    start = data.draw(st.integers(0, len(flat) - 1))
    end = data.draw(st.integers(start + 1, len(flat)))
    parts = list(rectangles(block, start, end - start))
    assert len(parts) <= 3
    own = flat[start:end]
    for part in parts:
        row, rows, column, columns = part.block
        expected = whole[row : row + rows, column : column + columns]
        assert torch.equal(view(own, part, part.block), expected)
    assert sum(part.block.rows * part.block.columns for part in parts) == end - start


def test_loading_takes_little_more_memory_than_a_ranks_own_part(prepared: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    large = {"dim": 512, "mlp_dim": 2048, "layers": 6, "log_linear": {"heads": 8}, "softmax": {"heads": 8}}
    config = small_config(folder, prepared, model=large, train={"steps": 2}, parallel={"tensor": 2})
    assert exit_codes(start_ranks(2, train, config)) == [0, 0]
    assert exit_codes(start_ranks(2, load_and_watch, config, tmp_path)) == [0, 0]
    for file in tmp_path.glob("memory-*"):
        peak, own = map(int, file.read_text().split())
        assert own > 40e6
        assert peak < 1.5 * own


def load_and_watch(config: Config, folder: Path) -> None:
    """In a rank: load the weights of the last checkpoint; write down the peak of new memory and the weights' bytes."""
    world = start_world()
    mesh = make_mesh(world, config.parallel)
    snapshot = read_latest(config.run.folder / "checkpoints")
    parallel_model(mesh, config, fresh=False)  # torch imports much for its first tensors without data
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = parallel_model(mesh, config, fresh=False)
    load_weights(snapshot.folder, model)
    done.set()
    watcher.join()
    own = sum(parameter.nbytes for parameter in model.parameters())
    (folder / f"memory-{world.rank}").write_text(f"{peak[0] - before} {own}")
    world.close()


def anonymous_memory() -> int:
    """Bytes of this process that no file is behind."""
    lines: dict[str, Any] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
