"""Ranks that hang end and say where; ranks that differ, or compute wrongly, do not begin."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.prepared import fingerprint
from loglinear.config import Config, DataConfig, ParallelConfig, TrainConfig
from loglinear.errors import UserError
from loglinear.parallel import make_mesh, start_world
from loglinear.parallel.world import PATIENCE
from loglinear.train import preflight as preflight_module
from loglinear.train import watchdog as watchdog_module
from loglinear.train.preflight import FailedNodes, Health, preflight, report, require_agreement
from loglinear.train.watchdog import EXIT_HUNG, Watchdog
from tests.processes import exit_codes, start_ranks


def hang_in_a_collective() -> None:
    """Rank 1 sleeps instead of taking part."""
    with Watchdog(3.0) as watchdog:
        world = start_world()
        world.sum(1.0)  # ranks connect at their first collective; from here they count together
        watchdog.beat("adding up")
        if world.rank == 1:
            time.sleep(600)
        world.sum(1.0)


def test_a_hung_collective_ends_with_the_stack_of_every_rank(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert exit_codes(start_ranks(2, hang_in_a_collective, log=log), 60) == [EXIT_HUNG] * 2
    said = log.read_text()
    for rank in (0, 1):
        assert f"watchdog: rank {rank} on " in said
    assert said.count("made no progress for 3 s while adding up; its stack:") == 2
    assert "in all_reduce" in said, "where rank 0 waits"
    assert 'test_watchdog.py", line' in said


def look_at_groups() -> None:
    """gloo's patience is a backend's option, as NCCL's is."""
    world = start_world()
    mesh = make_mesh(world, ParallelConfig())
    for group in (dist.group.WORLD, mesh.data.group, mesh.tensor.group, mesh.replicas.group):
        assert group is not None
        assert group._get_backend(world.device).options._timeout == PATIENCE
    world.close()


def test_no_collective_gives_up_before_the_watchdog_or_while_data_are_prepared() -> None:
    assert PATIENCE.total_seconds() > 100 * TrainConfig().hang_seconds
    assert exit_codes(start_ranks(2, look_at_groups)) == [0, 0]


def fail_after_the_report() -> None:
    """What a rank sees whose partner, hung like itself, ends a moment earlier."""
    watchdog_module.REPORT_SECONDS = 2.0
    with Watchdog(0.5) as watchdog:
        watchdog.beat("waiting for the other rank")
        time.sleep(1.5)
        raise ConnectionError("the other rank is gone")


def test_a_hung_rank_that_fails_because_another_ended_first_ends_as_hung(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert exit_codes(start_ranks(1, fail_after_the_report, log=log)) == [EXIT_HUNG]
    assert "ConnectionError: the other rank is gone" in log.read_text()


def beat_slowly() -> None:
    watchdog_module.SPARE_SECONDS = 0.5  # so that both watchdogs would strike
    with Watchdog(2.0) as watchdog:
        for _ in range(4):
            watchdog.beat("sleeping")
            time.sleep(1.0)
        watchdog.rest()
        time.sleep(3.0)
    time.sleep(1.0)


def test_a_rank_that_makes_progress_or_rests_is_left_alone() -> None:
    assert exit_codes(start_ranks(1, beat_slowly)) == [0]


def multiply_wrongly() -> None:
    right = torch.mm
    torch.mm = lambda a, b: right(a, b) + 100


def add_up_wrongly() -> None:
    right = dist.all_reduce
    dist.all_reduce = lambda values: (right(values), values.__setitem__(7, 0.0))


def run_other_code() -> None:
    preflight_module.git_revision = lambda: "0123abc"


def run_another_torch() -> None:
    right = importlib.metadata.version
    importlib.metadata.version = lambda name: "1.0" if name == "torch" else right(name)


def preflight_that_reports(log: Path, fault: Callable[[], None] | None, seeds: tuple[int, int]) -> None:
    """Something is wrong with rank 1."""
    world = start_world()
    os.environ["SLURMD_NODENAME"] = f"node{world.rank}"
    if fault and world.rank == 1:
        fault()
    try:
        said = preflight(Config.model_validate({"run": {"seed": seeds[world.rank]}}), world)
    except (UserError, FailedNodes) as error:
        said = f"{type(error).__name__}: {error}"
    (log / str(world.rank)).write_text(said)
    dist.barrier()
    world.close()


def preflight_of_two(
    folder: Path, fault: Callable[[], None] | None = None, seeds: tuple[int, int] = (0, 0)
) -> list[str]:
    assert exit_codes(start_ranks(2, preflight_that_reports, folder, fault, seeds)) == [0, 0]
    return [(folder / str(rank)).read_text() for rank in (0, 1)]


def test_equal_ranks_pass_the_preflight(tmp_path: Path) -> None:
    first, second = preflight_of_two(tmp_path)
    assert first.startswith("Preflight: 2 ranks on node0, node1 agree; a matrix product of 256 takes ")
    assert second.startswith("Preflight: 2 ranks")


def test_a_slow_node_is_named() -> None:
    seconds = {"n1": 0.010, "n2": 0.011, "n3": 0.025, "n4": 0.009}
    line = report([Health(node, time, True, True) for node, time in seconds.items()], 4096, 0.001)
    assert "a matrix product of 4096 takes 9.00 to 25.00 ms, an all-reduce of 1 MiB 1.00 ms." in line
    assert line.endswith(" Slow: n3 (2.4 times the median).")


def test_ranks_with_other_configurations_are_named_by_all(tmp_path: Path) -> None:
    first, second = preflight_of_two(tmp_path, seeds=(0, 7))
    assert first == second
    assert first.startswith("UserError: rank 1 on node1 has configuration hash ")


def test_a_node_that_computes_wrongly_is_named_by_all(tmp_path: Path) -> None:
    first, second = preflight_of_two(tmp_path, multiply_wrongly)
    assert first == second == "FailedNodes: preflight: wrong results of a matrix product on node1; use other nodes"


def test_a_node_where_the_sum_over_ranks_arrives_wrong_is_named_by_all(tmp_path: Path) -> None:
    first, second = preflight_of_two(tmp_path, add_up_wrongly)
    assert first == second == "FailedNodes: preflight: wrong results of a sum over all ranks on node1; use other nodes"


@pytest.mark.parametrize(
    ("fault", "fact"), [(run_other_code, "code revision 0123abc"), (run_another_torch, "torch 1.0")]
)
def test_ranks_that_run_other_code_are_named_by_all(fault: Callable[[], None], fact: str, tmp_path: Path) -> None:
    first, second = preflight_of_two(tmp_path, fault)
    assert first == second
    assert first.startswith(f"UserError: rank 1 on node1 has {fact}, but rank 0 on node0 has ")


def agree_on_data(log: Path, folders: list[DataConfig]) -> None:
    world = start_world()
    try:
        require_agreement(world, {"data index": fingerprint(folders[world.rank], complete=True)})
        said = "agreed"
    except UserError as error:
        said = str(error)
    (log / str(world.rank)).write_text(said)
    world.close()


def test_ranks_must_see_one_data_index(prepared: DataConfig, own: DataConfig, tmp_path: Path) -> None:
    """A copy is the same; one whose index says other things is not, and neither is one that is not there."""
    assert exit_codes(start_ranks(2, agree_on_data, tmp_path, [prepared, own])) == [0, 0]
    assert (tmp_path / "1").read_text() == "agreed"
    (own.dir / "index.json").write_text((own.dir / "index.json").read_text() + " ")
    assert exit_codes(start_ranks(2, agree_on_data, tmp_path, [prepared, own])) == [0, 0]
    assert re.match(r"rank 1 on .* has data index \w{12}, but rank 0 on .* has \w{12}: ", (tmp_path / "0").read_text())
    shutil.rmtree(own.dir)
    assert exit_codes(start_ranks(2, agree_on_data, tmp_path, [prepared, own])) == [0, 0]
    assert " has data index missing, but rank 0 " in (tmp_path / "1").read_text()
