"""Whatever strikes a run, it comes back by itself and ends as the run that nothing struck."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loglinear.checkpoint import read_latest
from loglinear.config import Config
from loglinear.train.run import train
from tests.processes import exit_codes, start_ranks
from tests.slurm.cluster import NODES, Cluster, wait_until
from tests.slurm.runs import ROOT, Launcher, SubmittedRun
from tests.train.small import losses, records, saved_tensors

pytestmark = pytest.mark.slurm

STEPS, SAVED_EVERY = 300, 5
HANG_SECONDS = 15
RANDOM_FAULTS = 10
REPORT = ROOT / "build" / "recovery.md"


def configure(launcher: Launcher, name: str) -> Config:
    return launcher.config(
        name,
        train={"steps": STEPS, "hang_seconds": HANG_SECONDS},
        eval={"every": 200},
        checkpoint={"every": SAVED_EVERY},
    )


def start(launcher: Launcher, name: str, **cluster: Any) -> SubmittedRun:
    """A run whose ranks can be made to fail."""
    return launcher.submit(name, configure(launcher, name), python=str(launcher.faulty_python()), **cluster)


@pytest.fixture(scope="module")
def reference(launcher: Launcher) -> Iterator[Path]:
    """The folder of a run that nothing strikes: two processes without SLURM, beside everything else here."""
    config = configure(launcher, "undisturbed")
    ranks = start_ranks(2, train, config)
    yield config.run.folder
    assert exit_codes(ranks, 0) == [0, 0]


@pytest.fixture(scope="module")
def run(launcher: Launcher, reference: Path) -> SubmittedRun:
    """The run that the faults below strike one after the other."""
    return start(launcher, "struck")


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, str]]:
    """What each fault cost, written down at the end."""
    rows: dict[str, str] = {}
    yield rows
    REPORT.parent.mkdir(exist_ok=True)
    head = "| fault | seconds until it trains again | steps made twice |\n|---|---|---|\n"
    REPORT.write_text(head + "".join(f"| {fault} | {cost} |\n" for fault, cost in rows.items()))


def other_node(run: SubmittedRun) -> str:
    """The node of the run that its supervisor is not on."""
    return run.starts()[-1].nodes[1]


def send_usr2(run: SubmittedRun) -> None:
    run.cluster.command("scancel", "--signal=USR2", run.id)


def requeue(run: SubmittedRun) -> None:
    run.cluster.command("scontrol", "requeue", run.id)


def preempt(run: SubmittedRun) -> None:
    run.cluster.command("sbatch", "-p", "high", "-N4", "--exclusive", "-t1", "-o", "/dev/null", "--wrap", "sleep 1")


def reach_time_limit(run: SubmittedRun) -> None:
    """SLURM looks at time limits every 30 s; until then the ranks sleep nine tenths of their time."""
    attempts, pids = len(run.ends()), list(run.ranks().values())
    run.cluster.command("scontrol", "update", f"JobId={run.id}", "TimeLimit=1")
    while len(run.ends()) == attempts:
        for number, seconds in ((signal.SIGSTOP, 0.45), (signal.SIGCONT, 0.05)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(seconds)
    run.cluster.command("scontrol", "update", f"JobId={run.id}", "TimeLimit=10")


def set_node_down(run: SubmittedRun) -> None:
    run.cluster.command("scontrol", "update", f"NodeName={other_node(run)}", "State=DOWN", "Reason=test")


def crash_other_node(run: SubmittedRun) -> None:
    run.cluster.crash_node(other_node(run))


def crash_first_node(run: SubmittedRun) -> None:
    run.cluster.crash_node(run.starts()[-1].nodes[0])


def kill_rank(run: SubmittedRun) -> None:
    os.kill(run.rank(1), signal.SIGKILL)


def kill_rank_without_controller(run: SubmittedRun) -> None:
    run.cluster.stop_controller()
    kill_rank(run)
    time.sleep(3.0)
    run.cluster.start_controller()


def hang_rank(run: SubmittedRun) -> None:
    os.kill(run.rank(1), signal.SIGRTMIN)


GRACEFUL = {send_usr2, preempt, reach_time_limit}
FAULTS: dict[str, Callable[[SubmittedRun], None]] = {
    "`scancel --signal=USR2`": send_usr2,
    "`scontrol requeue`": requeue,
    "preemption by a partition of higher priority": preempt,
    "time limit": reach_time_limit,
    "a rank hangs": hang_rank,
    "node set down": set_node_down,
    "node crashed (not the first)": crash_other_node,
    "node crashed (the first)": crash_first_node,
    "`kill -9` of a rank": kill_rank,
    "`kill -9` of a rank while slurmctld is away for 3 s": kill_rank_without_controller,
}


@pytest.fixture(autouse=True)
def repair(cluster: Cluster) -> Iterator[None]:
    """After a test every node is well."""
    yield
    for node in NODES:
        if not cluster.lives(node) or cluster.node_state(node).startswith(("down", "drain")):
            cluster.revive_node(node)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_goes_on_from_its_last_checkpoint_after(fault: str, run: SubmittedRun, report: dict[str, str]) -> None:
    strike = FAULTS[fault]
    wait_until(lambda: run.starts() and run.is_training(run.starts()[-1].attempt))
    attempt = run.starts()[-1].attempt
    wait_until(lambda: run.last_saved() > run.starts()[-1].step)
    run.wait_until_step(run.last_saved() + 1)
    saved = run.last_saved()
    strike(run)
    made, began = run.step(), time.monotonic()
    wait_until(lambda: run.starts()[-1].attempt > attempt)
    resumed = run.starts()[-1]
    repeated = max(0, run.step() - resumed.step)
    wait_until(lambda: run.is_training(resumed.attempt))
    report[fault] = f"{time.monotonic() - began:.1f} | {repeated}"
    assert resumed.attempt == attempt + 1
    assert resumed.step >= saved > 0
    assert repeated <= SAVED_EVERY
    if strike in GRACEFUL:
        assert resumed.step >= made
        assert repeated == 0


def test_a_hang_was_reported_with_the_stack_of_every_rank(run: SubmittedRun) -> None:
    hung = [end.attempt for end in run.ends() if "exit code 4" in end.reason]
    assert len(hung) == 1
    for rank in (0, 1):
        log = (run.job.logs(hung[0]) / f"rank-{rank}.log").read_text()
        assert re.search(
            rf"watchdog: rank {rank} on n\d made no progress for {HANG_SECONDS} s while training step", log
        )
        assert "most recent call first" in log
    assert "faulty_rank.py" in log.partition("most recent call first")[2]  # where rank 1 is: asleep in its handler


def test_after_all_these_faults_the_run_is_the_undisturbed_one(run: SubmittedRun, reference: Path) -> None:
    run.wait_until_finished()
    assert_same(run, reference)


def test_ten_faults_at_random_moments_leave_no_gap_and_no_doubled_step(launcher: Launcher, reference: Path) -> None:
    rng = random.Random()
    run = start(launcher, "random", max_restarts=2 * RANDOM_FAULTS)
    strikes = [kill_rank] * 5 + [send_usr2, send_usr2, requeue, requeue, preempt]
    rng.shuffle(strikes)
    for strike in strikes:
        wait_until(lambda: run.starts() and 1 in run.ranks())
        attempts = len(run.starts())
        if rng.random() < 0.5:  # while they start, or after some steps
            time.sleep(rng.uniform(0.0, 3.0))
        else:
            until = run.starts()[-1].step + rng.randint(1, 12)
            wait_until(lambda until=until: run.is_training(run.starts()[-1].attempt) and run.step() >= until)
        strike(run)
        wait_until(lambda attempts=attempts: len(run.starts()) > attempts)
    run.wait_until_finished()
    assert len(run.starts()) > RANDOM_FAULTS
    assert_same(run, reference)


def assert_same(run: SubmittedRun, reference: Path) -> None:
    """Bit for bit; `losses` finds gaps and doubled steps."""
    wait_until(lambda: read_latest(reference / "checkpoints").step == STEPS)
    assert len(losses(run.folder)) == STEPS
    assert records(run.folder) == records(reference)
    expected = saved_tensors(reference)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_tensors(run.folder).items())
