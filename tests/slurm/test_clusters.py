"""What clusters do to jobs that no fault strikes: limits, hidden partitions, silent controllers, odd environments."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from launch import slurm
from launch.cluster import load_cluster
from tests.processes import exit_codes
from tests.slurm.cluster import HIDDEN, Cluster, wait_until
from tests.slurm.runs import Launcher, SubmittedRun, loglinear

pytestmark = pytest.mark.slurm

NOBODY = 65534


def hang(run: SubmittedRun, *ranks: int) -> None:
    for rank in ranks:
        os.kill(run.rank(rank), signal.SIGRTMIN)


def end_time_of_job(run: SubmittedRun, seconds: float) -> None:
    """SLURM looks at it every 30 s."""
    at = datetime.now() + timedelta(seconds=seconds)
    run.cluster.command("scontrol", "update", f"JobId={run.id}", f"EndTime={at:%Y-%m-%dT%H:%M:%S}")


def test_ranks_that_neither_end_nor_save_by_themselves_are_ended_and_come_back(launcher: Launcher) -> None:
    """One that hangs beside one that died, and all of them when the job's time is over."""
    config = launcher.config("stuck", train={"steps": 2000}, eval={"every": 2000})
    run = launcher.submit("stuck", config, python=str(launcher.faulty_python()))
    run.wait_until_step(5)
    hang(run, 0)
    os.kill(run.rank(1), signal.SIGKILL)
    wait_until(lambda: len(run.starts()) == 2)
    assert "rank 1 on n2: Killed" in run.ends()[0].reason
    assert run.starts()[1].step == run.ends()[0].step >= 4

    wait_until(lambda: run.is_training(2))
    hang(run, 0, 1)
    saved = run.last_saved()
    end_time_of_job(run, 2.0)
    wait_until(lambda: len(run.starts()) == 3)
    assert re.findall(r"Restarts=(\d+)", run.cluster.command("scontrol", "show", "job", run.id)) == ["1"]
    assert not slurm.is_at_its_limit(run.id), "any more"
    assert run.starts()[2].step == saved
    assert [(end.outcome, end.reason) for end in run.ends()[1:]] in ([], [("failed", "its time was over")])
    assert loglinear("cancel", run.folder).returncode == 0


SHELLS = {
    "of a rank": {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    "of a job with more GPUs": {"SLURM_JOB_ID": "1", "SLURM_GPUS": "9"},
}


def test_the_environment_that_submits_does_not_reach_the_ranks(
    launcher: Launcher, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs are asked for as generic resources here, as SLURM's older selections of resources have it."""
    settings = {"nodes": 1, "ranks_per_node": 2, "max_restarts": 0, "sbatch": {"gres": "gpu:2"}}
    runs = []
    for number, variables in enumerate(SHELLS.values()):
        config = launcher.config(f"shell-{number}", eval={"every": 40})
        with monkeypatch.context() as shell:
            for name, value in variables.items():
                shell.setenv(name, value)
            runs.append(launcher.submit(f"shell-{number}", config, **settings))
    told = [f"SLURM_JOB_ID={runs[0].id}", "SLURM_PROCID=1", "CUDA_VISIBLE_DEVICES=0,1"]
    wait_until(lambda: cluster.processes(*told))
    for run in runs:
        run.wait_until_finished()


def test_a_job_in_a_partition_that_is_hidden_from_its_user_is_found(launcher: Launcher, tmp_path: Path) -> None:
    run = launcher.submit("hidden", launcher.config("hidden"), partition=HIDDEN, nodes=1, sbatch={"begin": "now+1hour"})
    cluster = load_cluster(str(launcher.folder / "hidden-cluster.yaml"))
    executor = slurm.make_executor(cluster, tmp_path, "hidden")
    tmp_path.chmod(0o777)
    id_ = run.id

    def look() -> None:
        os.chdir(tmp_path)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        assert HIDDEN not in slurm._ask(["sinfo"]), "it is hidden"
        assert slurm.job_states([id_])[id_][0] == "PENDING"
        slurm.check(executor, cluster)

    user = multiprocessing.get_context("fork").Process(target=look)
    user.start()
    assert exit_codes([user]) == [0]
    assert loglinear("cancel", run.folder).returncode == 0


def test_while_the_controller_is_away_users_are_told_and_jobs_wait(launcher: Launcher, cluster: Cluster) -> None:
    config = launcher.config("silence")
    run = launcher.submit("silence", config, sbatch={"begin": "now+1hour"})
    files = launcher.write("silence", config)
    with ThreadPoolExecutor() as threads:
        cluster.stop_controller()
        try:
            answers = threads.submit(slurm.node_address, "n3"), threads.submit(slurm.state_of, run.id)
            assert re.search(rf" {run.id} +UNKNOWN ", loglinear("jobs", run.folder).stdout)
            done = loglinear("submit", files[0], "--cluster", files[1])
            assert done.returncode == 2
            assert f"whether job {run.id} still trains {run.folder} is not known: SLURM's controller" in done.stderr
            assert not any(answer.done() for answer in answers)
        finally:
            cluster.start_controller()
            wait_until(cluster.takes_jobs)
        assert [answer.result() for answer in answers] == ["127.0.0.1", "PENDING"]
    assert loglinear("cancel", run.folder).returncode == 0
