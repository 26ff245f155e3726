"""Everything that `bench scaling` measures on several GPUs, on two CPU ranks with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.job import JobFolder
from launch.ranks import Result
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.scaling.bench import _left, bench_scaling
from loglinear.scaling.rank import OUT_OF_MEMORY
from loglinear.scaling.results import Results
from loglinear.scaling.speed import communication
from loglinear.scaling.tasks import make_tasks
from tests.processes import wait_for

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "seq_len": 64,
    "dim": 32,
    "layers": 2,
    "pattern": ["log_linear", "softmax"],
    "log_linear": {"heads": 2, "head_dim": 16, "state_dim": 16},
    "softmax": {"heads": 2, "head_dim": 16},
    "mlp_dim": 64,
}
TINY = Config.model_validate(
    {"run": {"name": "tiny"}, "model": MODEL, "optimizer": {"lr": 1e-2}, "train": {"peak_tflops": 0.5}}
)
LAYOUTS = ["DP ZeRO-1", "DP ZeRO-3", "TP", "TP+SP", "CP"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks import this tree."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_all_is_measured_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ([TINY], ["parity", "reshard", "speed", "weak"], (64,), 512, 2, tmp_path)
    bench_scaling(*arguments)
    found = Results(tmp_path).read()

    for dtype in ("float32", "bfloat16"):
        parity = found[f"parity/{dtype}"]
        assert (parity["cases"], parity["found"]) == (11, [])
        assert 0 < parity["largest"] <= 1

    saved = found["reshard/save tiny, DP ZeRO-1 on 2"]
    assert saved["fall"] > 0.1
    loads = {name: result for name, result in found.items() if name.startswith("reshard/load")}
    places = [*(f"{name} on 2" for name in LAYOUTS), "DP ZeRO-1 on 1"]
    assert [*loads] == [f"reshard/load tiny, {place}" for place in places]
    for result in loads.values():
        assert result["agrees"]
        torch.testing.assert_close(result["losses"], saved["losses"], rtol=0, atol=1e-5)

    model = build_model(TINY.model, 0)
    for layout in LAYOUTS:
        result = found[f"speed/tiny/64/{layout} on 2"]
        tokens = 2 * 512  # of two data-parallel ranks, whatever the layout
        assert (result["tokens"], result["parameters"]) == (tokens, model.parameter_count())
        flops = 3 * model.flops_per_token(64) * tokens
        assert result["mfu"] == pytest.approx(flops / result["seconds"] / (2 * 0.5e12))
        assert (result["peak_bytes"], result["exposed_seconds"], result["recomputes"]) == (None, None, False)

    weak = {name: result["tokens"] / result["ranks"] for name, result in found.items() if name.startswith("weak/")}
    assert set(weak.values()) == {512}
    assert {"weak/tiny/64/DP ZeRO-1 on 2", "weak/tiny/1024/CP on 2", "weak/tiny/512/CP on 1"} <= weak.keys()

    table = (tmp_path / "scaling.md").read_text()
    assert capsys.readouterr().out.count("as without stopping") == table.count("as without stopping") == 6
    rows = [line.split(", ")[-1] for line in table[table.index("| weak scaling") :].splitlines()[2:]]
    assert [row.partition(" |")[0] for row in rows] == ["CP on 1", "CP on 2", "DP ZeRO-1 on 1", "DP ZeRO-1 on 2"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    bench_scaling(*arguments)
    assert not (tmp_path / "ranks").exists(), "no rank was started again"
    assert Results(tmp_path).read() == found


def test_a_rank_is_killed_and_the_run_trains_again(tmp_path: Path) -> None:
    bench_scaling([TINY], ["recovery"], (64,), 64, 2, tmp_path)
    (result,) = Results(tmp_path).read().values()
    assert result["from_step"] >= 5
    assert result["from_step"] % 5 == 0
    assert 0 <= result["killed_after"] - result["from_step"] <= 5, "it went on from the last checkpoint"
    order = [result[f"{event}_seconds"] for event in ("noticed", "started", "trains", "caught_up")]
    assert order == sorted(order)
    assert order[0] > 0
    log = (tmp_path / "recovery/run/job/attempts.jsonl").read_text()
    assert "rank 1: Killed" in log


def test_a_task_that_ends_a_rank_is_a_result_and_the_others_are_measured(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.to_yaml())
    command = [sys.executable, "-m", "loglinear", "bench", "scaling", str(config), "--out", str(tmp_path / "out")]
    command += ["--parts", "parity", "--ranks", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        wait_for(lambda: (tmp_path / "out/ranks/running.json").exists())
        found = subprocess.run(["pgrep", "--parent", str(bench.pid)], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        shown = bench.communicate()[0]
    assert bench.returncode == 0
    results = json.loads((tmp_path / "out/scaling.json").read_text())["results"]
    (struck,) = [result for result in results.values() if "error" in result]
    assert "rank 1: Killed" in struck["error"]
    (other,) = [result for result in results.values() if result is not struck]
    assert other["found"] == []
    assert "rank 1: Killed" in shown


def test_what_does_not_fit_is_tried_once_more_with_recomputation(tmp_path: Path) -> None:
    tasks = make_tasks([TINY], ["speed"], (64,), 64, 2)
    job, results = JobFolder(tmp_path / "ranks"), Results(tmp_path)
    job.root.mkdir()
    (job.root / "running.json").write_text(json.dumps({"name": tasks[1].name}))
    (job.root / "failure.json").write_text(json.dumps({"error": OUT_OF_MEMORY}))
    again = _left(tasks, Result(1), job, 1, results)
    assert [task.name for task in again] == [tasks[number].name for number in (1, 0, 2, 3, 4)]
    assert [task.config.train.activation_checkpointing for task in again] == [True, *[False] * 4]
    left = _left(again, Result(1, "rank 0: Exited"), job, 2, results)
    assert [task.name for task in left] == [tasks[number].name for number in (0, 2, 3, 4)]
    assert results.read()[tasks[1].name]["error"] == f"{OUT_OF_MEMORY} (rank 0: Exited)"


def test_ranks_that_fail_behind_a_task_leave_its_result(tmp_path: Path) -> None:
    tasks = make_tasks([TINY], ["speed"], (64,), 64, 2)
    job, results = JobFolder(tmp_path / "ranks"), Results(tmp_path)
    job.root.mkdir()
    (job.root / "running.json").write_text(json.dumps({"name": tasks[1].name}))
    results.add(tasks[1].name, {"seconds": 1.0})
    left = _left(tasks, Result(1, "rank 0: Exited"), job, 1, results)
    assert [task.name for task in left] == [tasks[number].name for number in (0, 2, 3, 4)]
    assert results.read() == {tasks[1].name: {"seconds": 1.0}}


def test_exposed_communication_is_what_no_other_kernel_hides() -> None:
    """Two collectives of 4 us; other kernels run in half of the first."""
    kernels = [
        ("ncclDevKernel_AllReduce", 10, 4),
        ("matmul", 8, 4),
        ("norm", 11, 1),
        ("ncclDevKernel_AllGather", 20, 4),
    ]
    events = [{"cat": "kernel", "name": name, "ts": start, "dur": length} for name, start, length in kernels]
    events += [{"cat": "gpu_user_annotation", "name": "nccl:all_reduce", "ts": 0, "dur": 100}, {"name": "process"}]
    assert communication(events) == pytest.approx((8e-6, 6e-6))
    assert communication(events[4:]) is None


def test_mistakes_are_told_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no part 'sped' of this benchmark: take some of parity, reshard"):
        bench_scaling([TINY], ["sped"], (64,), 64, 2, tmp_path)
    with pytest.raises(UserError, match=r"tiny at 64 tokens cannot be laid out as TP: .*must be a multiple of"):
        bench_scaling([TINY], ["speed"], (64,), 64, 4, tmp_path)
    assert not (tmp_path / "ranks").exists()
