"""Runs in the background of this machine: the same commands, the same faults, the same end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import local, ranks
from launch.job import End, JobFolder, Start
from loglinear.config import DataConfig
from loglinear.train.folder import read_records
from tests.processes import wait_for
from tests.train.small import losses, records, small_config

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0


def loglinear(*arguments: str | Path, code: int = 0) -> str:
    """What the command says on stdout, or, if it is to fail with `code`, on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "loglinear", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "250", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def write(folder: Path, data: DataConfig, **changes: Any) -> Path:
    config = small_config(folder / "run", data, **changes)
    (folder / "run.yaml").write_text(config.to_yaml())
    return folder / "run.yaml"


def wait_until_over(job: JobFolder) -> End:
    wait_for(lambda: not local.is_alive(job), PATIENCE)
    last = job.attempts()[-1]
    assert isinstance(last, End), job.local_log.read_text()
    return last


def step_of(run_dir: Path) -> int:
    return max((record["step"] for record in read_records(run_dir / "metrics.jsonl")), default=0)


def rank_pids(job: JobFolder) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"launch.rank {job.root}"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_a_rank_is_killed_the_run_is_cancelled_and_goes_on(prepared: DataConfig, tmp_path: Path) -> None:
    config = write(tmp_path, prepared, checkpoint={"every": 2}, train={"steps": 2000, "hang_seconds": 60})
    said = loglinear("submit", config, "--cluster", "local", "cluster.ranks_per_node=2")
    run_dir = tmp_path / "run"
    assert re.match(r"Job \d+: 1 x 2 ranks train in .*run\.\n", said)
    job = JobFolder.of(run_dir)
    refusal = loglinear("submit", config, "--cluster", "local", code=2)
    assert f"{run_dir} is being trained by job {job.submission().id} already" in refusal

    wait_for(lambda: step_of(run_dir) >= 3, PATIENCE)
    first, second = rank_pids(job)
    os.kill(first, signal.SIGSTOP)  # it neither notices that the other is gone, nor ends when it is asked to
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: sum(isinstance(event, Start) for event in job.attempts()) == 2, PATIENCE)
    end, start = job.attempts()[1:3]
    assert isinstance(end, End)
    assert (end.outcome, start.step) == ("failed", end.step)
    assert "Killed" in end.reason
    assert end.step >= 2
    wait_for(lambda: step_of(run_dir) > start.step + 2, PATIENCE)

    shown = loglinear("jobs", tmp_path)
    assert re.search(
        rf"{job.submission().id} +RUNNING +\d+/2000 +\d\.\d{{3}} +[\d,]+ +\d+ \w+ +step \d+, \d+ s ago +2", shown
    )
    assert "step 4/2000  loss " in loglinear("logs", run_dir, "--attempt", "1") or start.step < 4
    assert "attempt 2 on " in loglinear("logs", run_dir, "--supervisor")

    said = loglinear("cancel", run_dir)
    saved = job.last_step()
    assert (
        said == f"Job {job.submission().id} has ended: saved after step {saved}. The same submit goes on from there.\n"
    )
    assert wait_until_over(job).outcome == "cancelled"
    assert rank_pids(job) == []
    assert "is not running" in loglinear("cancel", run_dir, code=2)

    loglinear("submit", config, "--cluster", "local", "cluster.ranks_per_node=2", f"train.steps={saved + 4}")
    assert wait_until_over(job).outcome == "finished"
    assert len(losses(run_dir)) == saved + 4
    assert "finished" in loglinear("jobs", run_dir)

    *events, _ = job.attempts_file.read_text().splitlines(True)
    job.attempts_file.write_text("".join(events))
    assert "finished" not in loglinear("jobs", run_dir), "the node was lost before its end was recorded"
    loglinear("submit", config, "--cluster", "local", "cluster.ranks_per_node=2", f"train.steps={saved + 4}")
    assert wait_until_over(job).outcome == "finished"
    assert len(losses(run_dir)) == saved + 4


def test_ranks_meet_at_a_port_that_nobody_listens_to_and_no_connection_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = ranks.free_port()
    assert port < lowest_given
    with socket.socket() as listener:
        listener.bind(("", 0))
        monkeypatch.setattr(ranks, "PORTS", [listener.getsockname()[1], port])
        assert {ranks.free_port() for _ in range(20)} == {port}


def test_ranks_do_not_outlive_their_supervisor(prepared: DataConfig, tmp_path: Path) -> None:
    """Else those of the next submission would write beside them."""
    config = write(tmp_path, prepared, train={"steps": 2000}, checkpoint={"every": 1000}, eval={"every": 1000})
    loglinear("submit", config, "--cluster", "local")
    job = JobFolder.of(tmp_path / "run")
    wait_for(lambda: step_of(tmp_path / "run") >= 2, PATIENCE)
    os.kill(int(job.submission().id), signal.SIGKILL)
    wait_for(lambda: rank_pids(job) == [], PATIENCE)
    assert job.last_step() == step_of(tmp_path / "run") >= 2, "they were asked to save"
    assert "lost" in loglinear("jobs", tmp_path)


def test_a_run_that_fails_again_and_again_gives_up_with_a_reason(prepared: DataConfig, tmp_path: Path) -> None:
    config = write(tmp_path, prepared)
    loglinear("submit", config, "--cluster", "local", "cluster.python=/bin/false", "cluster.max_restarts=1")
    job = JobFolder.of(tmp_path / "run")
    end = wait_until_over(job)
    assert end.outcome == "gave up"
    assert end.reason == (
        "2 attempts in a row failed without a new checkpoint after step 0; the last: rank 0: Exited with exit code 1"
    )
    assert [event.attempt for event in job.attempts() if isinstance(event, Start)] == [1, 2]


def test_told_to_end_between_two_attempts_it_starts_no_other(prepared: DataConfig, tmp_path: Path) -> None:
    config = write(tmp_path, prepared)
    loglinear("submit", config, "--cluster", "local", "cluster.python=/bin/false")
    job = JobFolder.of(tmp_path / "run")
    wait_for(lambda: sum(isinstance(event, End) for event in job.attempts()) == 3, PATIENCE)
    time.sleep(1.0)  # into its pause of 4 s
    os.kill(int(job.submission().id), signal.SIGTERM)
    wait_for(lambda: not local.is_alive(job), PATIENCE)
    assert max(event.attempt for event in job.attempts()) == 3


def test_a_users_mistake_that_only_ranks_can_see_is_not_tried_again(prepared: DataConfig, tmp_path: Path) -> None:
    other = prepared.model_copy(update={"held_out": 0.4})  # the folder was prepared with another share
    loglinear("submit", write(tmp_path, other), "--cluster", "local")
    end = wait_until_over(JobFolder.of(tmp_path / "run"))
    assert (end.attempt, end.outcome) == (1, "refused")
    assert f"{prepared.dir} was prepared with data.held_out = 0.2" in end.reason


def test_lines_of_setup_run_before_the_ranks_which_do_not_start_if_one_fails(
    prepared: DataConfig, tmp_path: Path
) -> None:
    setup = 'cluster.setup=["echo found nothing", "false"]'
    said = loglinear("submit", write(tmp_path, prepared), "--cluster", "local", setup, code=2)
    job = JobFolder(tmp_path / "run/job")
    assert f"the run ended before it began: {job.local_log} says why" in said
    assert job.local_log.read_text() == "found nothing\n"
    assert job.attempts() == []


def test_dry_run_shows_everything_and_writes_nothing(prepared: DataConfig, tmp_path: Path) -> None:
    config = write(tmp_path, prepared)
    before = sorted(tmp_path.rglob("*"))
    shown = loglinear("submit", config, "--cluster", "local", "--dry-run", "cluster.ranks_per_node=2", "run.seed=5")
    cluster, run = yaml.safe_load_all(shown.replace("# run\n", "---\n"))
    assert (cluster["ranks_per_node"], run["run"]["seed"]) == (2, 5)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cluster.ranks_per_node=3", "train.global_batch (8) must be a multiple of train.micro_batch (2) times"),
        ("optimizer.lr=-1", "optimizer.lr = -1"),
        ("cluster.gpus=1", "unknown key 'gpus'"),
        ("cluster.nodes=2", "a local run has one node"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    prepared: DataConfig, tmp_path: Path, override: str, sentence: str
) -> None:
    config = write(tmp_path, prepared)
    assert sentence in loglinear("submit", config, "--cluster", "local", override, code=2)
    assert not (tmp_path / "run").exists()


def test_folders_without_jobs_are_named(tmp_path: Path) -> None:
    for command in ("jobs", "logs", "cancel"):
        assert f"{tmp_path} holds no submitted run" in loglinear(command, tmp_path, code=2)


def test_a_sweep_runs_as_many_at_once_as_it_may_and_is_compared(prepared: DataConfig, tmp_path: Path) -> None:
    """Two learning rates one after the other, and a run that depends on both."""
    config = write(tmp_path, prepared, train={"steps": 4}, eval={"every": 4})
    out = tmp_path / "out"
    sweep = {"name": "rates", "dir": str(out), "config": str(config), "parallel": 1}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"grid": {"optimizer.lr": [1e-4, 1e-2]}}))
    loglinear("sweep", tmp_path / "sweep.yaml", "--cluster", "local")
    runs = [out / "00-lr_0.0001", out / "01-lr_0.01"]
    after = [option for run in runs for option in ("--depends-on", run)]
    loglinear("submit", config, "--cluster", "local", *after)
    ends = [wait_until_over(JobFolder.of(run)) for run in (*runs, tmp_path / "run")]
    assert [end.outcome for end in ends] == ["finished"] * 3
    spans = sorted((JobFolder.of(run).attempts()[0].time, end.time) for run, end in zip(runs, ends, strict=False))
    assert spans[0][1] <= spans[1][0], "one at a time"
    assert JobFolder.of(tmp_path / "run").attempts()[0].time >= spans[1][1], "after both"

    rows = [line.strip("| \n").split(" | ") for line in (out / "table.md").read_text().splitlines()]
    assert rows[0] == ["run", "optimizer.lr", "step", "loss", "held-out loss"]
    held_out = {run.name: records(run)[-1]["held_out_loss"] for run in runs}
    assert {row[0]: row[4] for row in rows[2:]} == {name: f"{loss:.4f}" for name, loss in held_out.items()}
    assert [row[0] for row in rows[2:]] == sorted(held_out, key=lambda name: held_out[name])
    assert {path.parent.name for path in (out / "comparison").rglob("events*")} >= {run.name for run in runs}
