"""Descriptions of clusters and sweeps: what is refused, and with which sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from submitit.core.utils import FailedJobError

from launch.cluster import ClusterConfig, load_cluster, split_overrides
from launch.job import JobFolder
from launch.ranks import rank_command, srun_command
from launch.slurm import submitting
from launch.sweep import configurations, load_sweep
from loglinear.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def test_local_is_this_machine_with_one_rank() -> None:
    assert load_cluster("local") == ClusterConfig(kind="local")
    assert load_cluster("local").ranks == 1
    assert load_cluster("local", ["ranks_per_node=3"]).ranks == 3


def test_a_node_has_as_many_ranks_as_gpus_unless_told_otherwise() -> None:
    assert ClusterConfig(nodes=3, gpus_per_node=8).ranks == 24
    assert ClusterConfig(nodes=3, gpus_per_node=8, ranks_per_node=2).ranks == 6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"partitoin": "gpu"}, "unknown key 'partitoin'; did you mean 'partition'?"),
        ({"kind": "local", "nodes": 2}, "nodes (2): a local run has one node; set ranks_per_node for more ranks"),
        ({"minutes": 1, "save_seconds": 60}, "save_seconds (60) must be less than the 1 minutes of a job"),
        ({"nodes": 0}, "nodes = 0: Input should be greater than 0"),
        (
            {"container": {"image": "i"}, "python": "p"},
            "python belongs to a run without a container; in one, set container.python",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError) as raised:
        load_cluster(str(file))
    assert str(raised.value) == f"{file}: {sentence}"


def test_overrides_of_the_cluster_are_told_apart() -> None:
    assert split_overrides(["train.steps=3", "cluster.nodes=2"]) == (["train.steps=3"], ["nodes=2"])


def test_a_cluster_survives_being_written_down(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        nodes=2,
        exclude=("n1", "n2"),
        environment={"NCCL_DEBUG": "WARN"},
        sbatch={"reservation": "big", "exclusive": True},
    )
    (tmp_path / "cluster.yaml").write_text(cluster.to_yaml())
    assert load_cluster(str(tmp_path / "cluster.yaml")) == cluster


def test_srun_is_told_all_that_sbatch_was(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        nodes=3, gpus_per_node=4, cpus_per_rank=6, srun={"cpu-bind": "cores", "overlap": True}, python=Path("/py")
    )
    job = JobFolder(tmp_path)
    assert srun_command(cluster, job, 12) == [
        *("srun", "--kill-on-bad-exit=1", "--unbuffered", "--export=ALL"),
        *("--nodes=3", "--ntasks=12", "--ntasks-per-node=4"),
        f"--output={tmp_path}/logs/attempt-012/rank-%t.log",
        *("--cpus-per-task=6", "--gpus-per-node=4", "--cpu-bind=cores", "--overlap"),
        *("/py", "-u", "-m", "launch.rank", str(tmp_path)),
    ]
    few = srun_command(ClusterConfig(), job, 1)
    assert not [option for option in few if option.startswith(("--cpus", "--gpus"))]


def test_containers_are_what_pyxis_and_apptainer_take() -> None:
    job = JobFolder(Path("/runs/a/job"))
    image = {"image": "image.sif", "mounts": ("/shared:/shared", "/data:/in")}
    pyxis = ClusterConfig.model_validate({"gpus_per_node": 8, "container": image})
    command = srun_command(pyxis, job, 3)
    assert "--container-image=image.sif" in command
    assert "--container-mounts=/shared:/shared,/data:/in" in command
    assert "--output=/runs/a/job/logs/attempt-003/rank-%t.log" in command
    assert command[-5:] == ["python3", "-u", "-m", "launch.rank", "/runs/a/job"]
    apptainer = ClusterConfig.model_validate({"gpus_per_node": 8, "container": image | {"runtime": "apptainer"}})
    binds = ["--bind", "/shared:/shared", "--bind", "/data:/in"]
    assert rank_command(apptainer, job)[:8] == ["apptainer", "exec", "--nv", *binds, "image.sif"]
    assert not any(option.startswith("--container") for option in srun_command(apptainer, job, 1))
    on_cpus = ClusterConfig.model_validate({"container": image | {"runtime": "apptainer"}})
    assert rank_command(on_cpus, job)[:2] == ["apptainer", "exec"]
    assert "--nv" not in rank_command(on_cpus, job)


def sweep_file(folder: Path, **settings: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {"name": "s", "dir": str(folder / "out"), "config": str(QUICKSTART), **settings}, sort_keys=False
        )
    )
    return path


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, grid={"optimizer.lr": [1e-3, 1e-5], "train.steps": [50, 60, 70]}))
    configs = configurations(sweep, ["run.seed=3"])
    assert [(config.optimizer.lr, config.train.steps) for config in configs] == [
        (lr, steps) for lr in (1e-3, 1e-5) for steps in (50, 60, 70)
    ]
    assert {config.run.seed for config in configs} == {3}
    assert configs[1].run.dir == tmp_path / "out" / "01-lr_0.001-steps_60"
    assert len({config.run.dir for config in configs}) == 6


def test_a_list_of_runs_has_names(tmp_path: Path) -> None:
    runs = {"small": {"model.pattern": ["log_linear", "softmax"]}, "plain": {}}
    small, plain = configurations(load_sweep(sweep_file(tmp_path, runs=runs)))
    assert (small.run.name, small.model.pattern) == ("small", ("log_linear", "softmax"))
    assert (plain.run.name, plain.model.pattern) == ("plain", ("log_linear",))


def test_a_variant_may_set_anything(tmp_path: Path) -> None:
    """Long texts, lines, nested lists: whatever YAML can say."""
    settings: dict[str, Any] = {
        "eval.prompt": "a word or two " * 20 + "\nand a line: [more]",
        "model.pattern": ["log_linear", "softmax"] * 2,
        "data.sources": [{"kind": "stdlib", "name": name, "weight": 0.5} for name in ("first", "second")],
    }
    (config,) = configurations(load_sweep(sweep_file(tmp_path, runs={"run": settings})))
    assert config.eval.prompt == settings["eval.prompt"]
    assert list(config.model.pattern) == settings["model.pattern"]
    assert [source.name for source in config.data.sources] == ["first", "second"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "give either grid, of which every combination is a run, or runs, by their names"),
        ({"grid": {"optimizer.lr": []}}, "grid.optimizer.lr has no values"),
        ({"runs": {"a/b": {}}}, "'a/b' names a folder: take letters, digits, dots, dashes and underscores"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sweep(sweep_file(tmp_path, **settings))


def test_what_slurm_refuses_at_last_is_told_in_its_words() -> None:
    sentence = "SLURM did not take the job: sbatch: error: QOSMaxSubmitJobPerUserLimit"
    with pytest.raises(UserError, match=sentence), submitting():
        raise FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit\n")


def test_a_variant_that_is_not_valid_is_named(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, runs={"good": {}, "bad": {"optimizer.lr": -1}}))
    with pytest.raises(UserError, match=r"run bad of sweep s: .*optimizer\.lr = -1"):
        configurations(sweep)
