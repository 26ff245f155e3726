"""`loglinear experiment` as a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loglinear.errors import UserError
from loglinear.experiments.commands import experiment, parse_seeds
from loglinear.experiments.protocol import MODES, PROTOCOL, load_protocol


def test_time_that_is_over_is_exit_code_3_and_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-m", "loglinear", "experiment", "mqar", "--minutes", "0", "--modes", "none,mlp"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (3, "")
    assert "the same command goes on from here" in done.stdout
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mqr", {}, "there is no experiment 'mqr': take one of mqar, mqar_contiguous, copying, novels"),
        ("mqar", {"modes": "none,mpl"}, "mqar has no mode 'mpl'"),
        ("mqar", {"seeds": "a"}, "--seeds 'a': write numbers and ranges, such as 0-9 or 0,3"),
        ("mqar", {"seeds": "3-"}, "--seeds '3-': write numbers and ranges"),
        ("mqar", {"seeds": "4-2"}, "--seeds '4-2' names no seed"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, name: str, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        experiment(name, out=tmp_path, state=tmp_path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_read_as_they_are_written() -> None:
    assert parse_seeds("0-2,7") == (0, 1, 2, 7)
    assert parse_seeds("5,1,5") == (1, 5)


def test_the_protocol_is_what_was_promised() -> None:
    """All modes and ten seeds for recall and copying, three for language modelling, the same rates for every mode."""
    experiments = load_protocol().experiments
    for name in ("mqar", "mqar_contiguous", "copying"):
        assert experiments[name].modes == MODES
        assert experiments[name].seeds >= 10
    assert {"none", "static", "scaled", "mlp", "softmax"} <= set(experiments["novels"].modes)
    assert experiments["novels"].seeds >= 3
    longer = {name: [cell.length for cell in experiments[name].task.longer] for name in list(experiments)[:3]}
    for name, lengths in longer.items():
        trained = experiments[name].model.seq_len
        assert lengths == [2 * trained, 4 * trained, 8 * trained]


def test_modes_of_language_modelling_have_as_many_parameters() -> None:
    from loglinear.model import build_model

    novels = load_protocol().experiment("novels")
    counts = [build_model(novels.config(mode).model, 0).parameter_count() for mode in novels.modes]
    assert max(counts) / min(counts) < 1.005


def test_kernels_have_the_sizes_of_the_protocol() -> None:
    """Otherwise a GPU would take the slow form."""
    pytest.importorskip("triton")
    from loglinear.ops.triton.config import STATE_SIZES, VALUE_SIZES

    for sizes in (each.model.log_linear for each in load_protocol().experiments.values()):
        assert sizes.head_dim in VALUE_SIZES
        assert sizes.state_dim in STATE_SIZES


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"records": 9000}, r"records \(9000\) must not be more than steps \(8000\)"),
        ({"rate": [1e-3]}, "unknown key 'experiments.mqar.rate'; did you mean"),
    ],
)
def test_a_protocol_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    tree = yaml.safe_load(PROTOCOL.read_text())
    tree["experiments"]["mqar"] |= change
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=sentence):
        load_protocol(tmp_path / "protocol.yaml")
