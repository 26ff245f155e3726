"""The command line as a user meets it: real processes, their output and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loglinear.config import load_config
from loglinear.train.plan import make_plan
from tests.corpus import VOCAB, data_config, write_corpus

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
QUICKSTART = ROOT / "configs/quickstart.yaml"


def loglinear(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, where it would write if it did."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "loglinear", *map(str, arguments)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def refusal(folder: Path, *arguments: str | Path) -> str:
    """The one sentence with which the command refuses; it writes nothing."""
    before = sorted(folder.rglob("*"))
    done = loglinear(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("loglinear: ")
    assert done.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *([], ["train"], ["plan"], ["profile"], ["eval"], ["export"], ["generate"], ["data"], ["data", "prepare"]),
        *(["bench", name] for name in ("kernels", "decode", "model")),
        *(["submit"], ["jobs"], ["logs"], ["cancel"], ["sweep"], ["experiment"], ["config", "reference"]),
    ],
)
def test_help_of_every_command(tmp_path: Path, command: list[str]) -> None:
    done = loglinear(tmp_path, *command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert re.search(r"Usage:.*loglinear", done.stdout) or "Options" in done.stdout
    commands = ["train", "plan", "profile", "eval", "export", "generate", "data", "bench", "submit", "sweep"]
    for name in [] if command else commands:
        assert re.search(rf"^\W*{name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", [["train"], ["plan"], ["data", "prepare"]])
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, command: list[str]) -> None:
    said = refusal(tmp_path, *command, QUICKSTART, "optimiser.lr=1")
    assert said == f"loglinear: {QUICKSTART}: unknown key 'optimiser'; did you mean 'optimizer'?\n"


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    said = refusal(tmp_path, "train", "absent.yaml")
    assert said == "loglinear: absent.yaml: no such configuration file; the examples are in configs/\n"


def test_an_override_without_a_value_is_explained(tmp_path: Path) -> None:
    said = refusal(tmp_path, "train", QUICKSTART, "optimizer.lr", "1e-3")
    assert said.endswith("override 'optimizer.lr': write it as section.key=value, such as optimizer.lr=1e-3\n")


def test_an_impossible_combination_is_one_sentence(tmp_path: Path) -> None:
    said = refusal(tmp_path, "train", QUICKSTART, "train.global_batch=8", "train.micro_batch=3")
    assert said.endswith("train: global_batch (8) must be a multiple of micro_batch (3)\n")


@pytest.mark.parametrize(
    "command",
    [["eval", "absent"], ["generate", "absent", "--prompt", "x"], ["eval", "."]],
    ids=["eval", "generate", "eval of a folder"],
)
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, command: list[str]) -> None:
    said = refusal(tmp_path, *command)
    assert f"{command[1]} is no run folder (no config.yaml in it): name the run.dir of a training run" in said


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_config(QUICKSTART).to_yaml())
    said = refusal(tmp_path, "generate", tmp_path, "--prompt", "x")
    assert f"{tmp_path}/checkpoints holds no complete checkpoint: train until checkpoint.every steps are made" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--needles", "512,1k"], "--needles 512,1k is no list of positive whole numbers: write it as 1024,4096"),
        (["--needles", "0"], "--needles 0 is no list of positive whole numbers: write it as 1024,4096"),
        (["--needles", "512", "--by-position"], "a time: give one of --by-position, --tasks and --needles"),
    ],
)
def test_options_of_eval_that_make_no_sense_are_explained(tmp_path: Path, options: list[str], sentence: str) -> None:
    assert refusal(tmp_path, "eval", tmp_path, *options).endswith(sentence + "\n")


def test_lengths_that_are_no_numbers_are_explained(tmp_path: Path) -> None:
    said = refusal(tmp_path, "bench", "scaling", QUICKSTART, "--lengths", "4k")
    assert said.endswith("--lengths 4k is no list of positive whole numbers: write it as 1024,4096\n")


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "ops", "--out"],
        ["bench", "data", "--out"],
        ["bench", "decode", QUICKSTART, "--out"],
        ["bench", "model", QUICKSTART, "--out"],
        ["bench", "scaling", QUICKSTART, "--out"],
        ["profile", QUICKSTART, "--out"],
        ["experiment", "mqar", "--out"],
    ],
    ids=lambda command: " ".join(command[:2]) if command[0] != "profile" else "profile",
)
def test_a_folder_that_cannot_be_made_is_named_before_the_work_begins(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    said = refusal(tmp_path, *command, "file/folder")
    assert said == "loglinear: cannot make the folder file/folder (Not a directory): name another\n"


@pytest.mark.parametrize("command", ["inspect", "verify", "prepare"])
def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    said = refusal(tmp_path, "data", command, QUICKSTART, "data.dir=file")
    assert re.search(r"(cannot read|data.dir: cannot make the folder) file.* \((Not a directory|File exists)\): ", said)


def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    batch = ("train.global_batch=8", "train.micro_batch=2")
    said = refusal(tmp_path, "plan", QUICKSTART, *batch, "--ranks", "3")
    assert "train.global_batch (8) must be a multiple of train.micro_batch (2) times" in said


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    sources = "data.sources=[{kind: folder, path: absent}]"
    done = loglinear(tmp_path, "data", "prepare", QUICKSTART, sources, "data.dir=prepared")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "loglinear: data.sources: there is no folder absent; correct the path"
    assert not list(tmp_path.rglob("*.bin"))


def test_preparation_says_what_it_did_and_leaves_what_is_done(tmp_path: Path) -> None:
    """The corpus holds an empty file and one that is not UTF-8."""
    write_corpus(tmp_path / "corpus", 30)
    settings = data_config(tmp_path / "prepared", tmp_path / "corpus")
    file = tmp_path / "run.yaml"
    file.write_text(load_config(QUICKSTART).model_copy(update={"data": settings}).to_yaml())

    first = loglinear(tmp_path, "data", "prepare", file, f"model.vocab_size={VOCAB}")
    assert first.returncode == 0, first.stderr
    counts, pieces, *left_out = first.stdout.splitlines()
    numbers = re.fullmatch(r"(\d+) documents \(.*\) to train on, (\d+) \(.*\) held out, in \d+ shards", counts)
    assert numbers
    assert sum(map(int, numbers.groups())) == 30
    assert pieces.startswith("300 pieces, unigram entropy ")
    assert left_out == ["left out 1 (empty): empty.txt", "left out 1 (not UTF-8): latin.txt"]

    written = {path: path.stat().st_mtime_ns for path in settings.dir.glob("*.[bj]*")}
    again = loglinear(tmp_path, "data", "prepare", file, f"model.vocab_size={VOCAB}")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert written == {path: path.stat().st_mtime_ns for path in settings.dir.glob("*.[bj]*")}


def test_plan_shows_a_table_and_writes_nothing(tmp_path: Path) -> None:
    done = loglinear(tmp_path, "plan", ROOT / "configs/loglinear_1.3b.yaml", "train.zero_stage=3", "--ranks", "32")
    assert done.returncode == 0, done.stderr
    shown = dict(re.findall(r"│ ([\w ,-]+?) +│ +([\d.,]+)(?: GiB)? │", done.stdout))
    assert shown["tokens per step"] == f"{256 * 8192:,}"
    assert shown["micro-batches per rank and step"] == "4"
    parameters = int(shown["parameters"].replace(",", ""))
    assert float(shown["weights, per rank"]) == pytest.approx(2 * parameters / 32 / 2**30, abs=1e-3)
    assert float(shown["total, per rank"]) == pytest.approx(
        sum(float(size) for kind, size in shown.items() if kind.endswith(", per rank") and "total" not in kind),
        abs=3e-3,
    )
    assert list(tmp_path.iterdir()) == []


def test_parameters_by_hand() -> None:
    """Dimension 768, 12 heads of 64, one group of 128, 14 levels for 8,192 tokens, 12 layers."""
    embedding = 32000 * 768
    projections = 768 * (2 * 128 + 2 * 768 + 12) + 768 * 768
    convolutions = (4 + 1) * (2 * 128 + 768)
    level_scales = 768 * 12 * 14 + (14 * 64 + 64) + (64 * 14 + 14)
    decay_step_skip_norm = 3 * 12 + 64
    mlp = 3 * 768 * 2560
    layer = projections + convolutions + level_scales + decay_step_skip_norm + mlp + 2 * 768
    assert make_plan(load_config(ROOT / "configs/loglinear_125m.yaml"), 1).parameters == embedding + 12 * layer + 768


SIZES = {"125m": 125e6, "360m": 360e6, "1.3b": 1.3e9}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path != QUICKSTART], ids=lambda path: path.stem)
def test_configurations_have_the_size_that_they_are_named_after(path: Path) -> None:
    config = load_config(path)
    plan = make_plan(config, 8)
    size = next(size for name, size in SIZES.items() if f"_{name}" in path.stem)
    assert plan.parameters == pytest.approx(size, rel=0.05)
    assert plan.flops_per_token > 6 * (plan.parameters - config.model.vocab_size * config.model.dim)
    assert plan.tokens_per_step * config.train.steps > 20 * plan.parameters, "about what its size deserves"
    assert sum(plan.memory.values()) < 72 * 2**30, "fits a GPU of 80 GB"
