"""Submitting, sweeping, cancelling, and what is refused before it is submitted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.job import FOLDER
from tests.slurm.cluster import PATIENCE, Cluster, wait_until
from tests.slurm.runs import Launcher, loglinear
from tests.train.small import losses, records

pytestmark = pytest.mark.slurm


def test_a_cancelled_run_has_saved_leaves_no_process_and_goes_on(launcher: Launcher, cluster: Cluster) -> None:
    config = launcher.config("cancelled", train={"steps": 2000}, eval={"every": 2000})
    run = launcher.submit("cancelled", config)
    run.wait_until_step(6)
    shown = loglinear("jobs", run.folder).stdout
    assert re.search(rf"{run.id} +RUNNING +\d+/2000 +\d\.\d+ +[\d,]+ +\d+ \w+ +step \d+, \d+ s ago +1", shown), shown
    again = launcher.write("cancelled", config)
    assert f"being trained by job {run.id} already" in loglinear("submit", again[0], "--cluster", again[1]).stderr
    heir = launcher.submit("heir", launcher.config("heir"), after=[run])
    done = loglinear("cancel", run.folder)
    assert done.returncode == 0, done.stderr
    assert f"saved after step {run.last_saved()}" in done.stdout
    assert run.ends()[-1].outcome == "cancelled"
    assert run.last_saved() == run.step() >= 6
    wait_until(lambda: not cluster.processes(f"SLURM_JOB_ID={run.id}"))
    wait_until(lambda: heir.state() == "FAILED")
    assert heir.starts() == [], "what depends on a run starts when that has finished"
    assert f"{run.folder} did not finish, so what depends on it does not start" in heir.said()

    saved = run.last_saved()
    shorter = launcher.config("cancelled", train={"steps": saved + 3}, eval={"every": 2000})
    run = launcher.submit("cancelled", shorter)
    run.wait_until_finished()
    assert run.starts()[-1].step == saved
    assert len(losses(run.folder)) == saved + 3
    assert "finished" in loglinear("jobs", run.folder).stdout


def test_a_job_that_waits_is_cancelled_before_it_starts(launcher: Launcher) -> None:
    run = launcher.submit("waiting", launcher.config("waiting"), sbatch={"begin": "now+1hour"})
    assert re.search(rf"{run.id} +PENDING .*BeginTime", loglinear("jobs", run.folder).stdout)
    assert loglinear("cancel", run.folder).returncode == 0
    assert run.state() == "CANCELLED"
    assert run.starts() == []


def test_a_sweep_of_six_is_an_array_of_which_two_run_at_once(launcher: Launcher, cluster: Cluster) -> None:
    """And a run that depends on all six waits for them."""
    config = launcher.config("base", train={"steps": 4}, eval={"every": 4})
    run_file, cluster_file = launcher.write("base", config, nodes=1)
    out = launcher.folder / "sweep-out"
    grid = {"optimizer.lr": [1e-4, 1e-3, 1e-2], "run.seed": [0, 1]}
    sweep = {"name": "six", "dir": str(out), "config": str(run_file), "parallel": 2, "grid": grid}
    (launcher.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    done = loglinear("sweep", launcher.folder / "sweep.yaml", "--cluster", cluster_file)
    assert done.returncode == 0, done.stderr
    runs = [launcher.submitted(job.parent) for job in sorted(out.glob(f"*/{FOLDER}"))]
    assert len(runs) == 6
    assert len({run.id.partition("_")[0] for run in runs}) == 1
    after = launcher.submit("after", launcher.config("after", train={"steps": 2}), after=runs)
    assert after.state() == "PENDING"
    most = 0

    def all_done() -> bool:
        nonlocal most
        most = max(most, cluster.command("squeue", "-h", "-t", "R", "-n", "six", "-o", "%i").count("\n"))
        return all(run.state() == "COMPLETED" for run in runs)

    wait_until(all_done, 2 * PATIENCE)
    assert most == 2
    after.wait_until_finished()
    assert after.starts()[0].time >= max(run.ends()[-1].time for run in runs)
    rows = [line.strip("| \n").split(" | ") for line in (out / "table.md").read_text().splitlines()]
    assert rows[0] == ["run", "optimizer.lr", "run.seed", "step", "loss", "held-out loss"]
    expected = {run.folder.name: f"{records(run.folder)[-1]['held_out_loss']:.4f}" for run in runs}
    assert {row[0]: row[5] for row in rows[2:]} == expected
    assert [float(row[5]) for row in rows[2:]] == sorted(float(row[5]) for row in rows[2:])


def test_a_run_whose_predecessor_fails_is_not_started(launcher: Launcher) -> None:
    failing = {"python": "/bin/false", "max_restarts": 0}
    first = launcher.submit("failing", launcher.config("failing"), **failing, sbatch={"hold": True})
    after = launcher.submit("orphan", launcher.config("orphan"), after=[first])
    launcher.cluster.command("scontrol", "release", first.id)
    wait_until(lambda: first.state() == "FAILED")
    assert first.ends()[-1].outcome == "gave up"
    assert "1 attempts in a row failed without a new checkpoint after step 0" in first.ends()[-1].reason
    wait_until(lambda: after.state() == "CANCELLED")
    assert after.starts() == []
    run_file, cluster_file = launcher.write("late", launcher.config("late"))
    late = loglinear("submit", run_file, "--cluster", cluster_file, "--depends-on", first.folder)
    assert late.returncode == 2
    assert f"{first.folder} did not finish (gave up), so what depends on it would never start" in late.stderr


def test_a_node_that_computes_wrongly_is_named_and_avoided(launcher: Launcher) -> None:
    run = launcher.submit(
        "avoiding",
        launcher.config("avoiding", train={"steps": 4}, eval={"every": 4}),
        python=str(launcher.faulty_python()),
        environment={"BAD_NODE": "n2"},
    )
    run.wait_until_finished()
    assert "wrong results of a matrix product on n2" in run.said()
    first, second = (start.nodes for start in run.starts())
    assert "n2" in first
    assert "n2" not in second
    assert run.ends()[0].bad_nodes == ("n2",)
    assert run.ends()[1].step == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sbatch": {"licenses": "gold:1"}}, "SLURM refuses the job: "),
        ({"partition": "fast"}, "there is no partition 'fast': this cluster has high, low, secret"),
        ({"gpus_per_node": 5}, "gpus_per_node (5) is more than a node of any partition here has (4)"),
        ({"nodes": 5}, "nodes (5) is more than any partition here has (4)"),
        ({"minutes": 601, "partition": "low"}, "minutes (601) is more than partition low allows (600)"),
        ({"ranks_per_node": 3}, "train.global_batch (40) must be a multiple of train.micro_batch (2) times"),
    ],
)
def test_what_slurm_would_not_take_is_told_before_it_is_submitted(
    launcher: Launcher, cluster: Cluster, changes: dict[str, Any], sentence: str
) -> None:
    before = cluster.command("squeue", "-h", "-t", "all", "-o", "%i")
    run_file, cluster_file = launcher.write(
        "refused", launcher.config("refused", train={"global_batch": 40}), **changes
    )
    for dry in ([], ["--dry-run"]):
        done = loglinear("submit", run_file, "--cluster", cluster_file, *dry)
        assert done.returncode == 2
        assert done.stderr.startswith(f"loglinear: {sentence}"), done.stderr
        assert done.stderr.count("\n") == 1
    assert not (launcher.folder / "refused").exists()
    assert cluster.command("squeue", "-h", "-t", "all", "-o", "%i") == before


def test_dry_run_prints_the_script_and_submits_nothing(launcher: Launcher, cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.command("squeue", "-h", "-t", "all", "-o", "%i")
    changes = {"gpus_per_node": 4, "partition": "high", "exclude": ["n4"], "minutes": 30}
    names = {"account": "ours", "qos": "long", "cpus_per_rank": 2}
    more = names | {"setup": ["module() { :; }", "module load cuda"], "sbatch": {"comment": "two words"}}
    run_file, cluster_file = launcher.write("dry", launcher.config("dry", train={"micro_batch": 1}), **changes, **more)
    done = loglinear("submit", run_file, "--cluster", cluster_file, "--dry-run", "run.seed=9")
    assert done.returncode == 0, done.stderr
    script = done.stdout.partition("# cluster")[0]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", script, re.MULTILINE))
    assert {name: shlex.split(value)[0] for name, value in options.items()}.items() >= {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "partition": "high",
        "account": "ours",
        "qos": "long",
        "cpus-per-task": "2",
        "exclude": "n4",
        "time": "30",
        "signal": "USR2@60",
        "comment": "two words",
    }.items()
    assert "wckey" not in options, "which submitit sets by itself, and some clusters refuse"
    assert "#SBATCH --requeue\n" in script
    assert "\nmodule load cuda\n" in script
    assert "\nexport OMP_NUM_THREADS=1\n" in script
    assert "seed: 9" in done.stdout
    assert not (launcher.folder / "dry").exists()
    assert cluster.command("squeue", "-h", "-t", "all", "-o", "%i") == before
