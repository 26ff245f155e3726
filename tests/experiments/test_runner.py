"""Experiments run on a CPU: every one, stopped and continued, and what their results hold."""

from __future__ import annotations

import json
import lzma
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from loglinear.errors import UserError
from loglinear.experiments import runner
from loglinear.experiments.ensemble import Trainer
from loglinear.experiments.group import Group
from loglinear.experiments.measures import GROUPS, LEVEL_COLUMNS
from loglinear.experiments.protocol import Experiment, load_protocol
from loglinear.experiments.results import append_results, read_results
from loglinear.experiments.runner import Settings, run_experiment
from loglinear.experiments.selection import best_rate
from tests.experiments.small import book, small_experiment


@pytest.fixture(autouse=True)
def signals_as_before() -> Any:
    """Runs take signals over; afterwards they are whoever's they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def novels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four books to train on and two for the test."""
    folder = tmp_path_factory.mktemp("novels")
    for file, seeds in (("train", range(4)), ("val", range(4, 6))):
        with lzma.open(folder / f"{file}.jsonl.xz", "wt", encoding="utf-8") as out:
            for seed in seeds:
                out.write(json.dumps({"source": f"book {seed}", "text": book(seed)}) + "\n")
    return folder


def settings(folder: Path, **changes: Any) -> Settings:
    defaults = {"modes": ("mlp",), "seeds": None, "rate": None, "minutes": None, "novels": None}
    return Settings(**{**defaults, "out": folder / "out", "state": folder / "state", **changes})


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_results(folder / "out" / f"{name}.jsonl")


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "seconds"} for result in found]


@pytest.mark.parametrize("name", load_protocol().experiments)
def test_every_experiment_runs_for_a_few_steps(tmp_path: Path, novels: Path, name: str) -> None:
    """Every mode that the protocol names, its sweep and its seeds, with all that is recorded."""
    experiment = small_experiment(name)
    assert run_experiment(name, experiment, settings(tmp_path, modes=None, novels=novels))
    found = results(tmp_path, name)
    for mode in experiment.modes:
        sweep = [(r["rate"], r["seed"]) for r in found if (r["mode"], r["phase"]) == (mode, "sweep")]
        assert sweep == [(rate, seed) for rate in (1e-3, 1e-2) for seed in (1000, 1001)]
        final = [r for r in found if (r["mode"], r["phase"]) == (mode, "final")]
        assert [(r["rate"], r["seed"]) for r in final] == [(best_rate(found, mode), seed) for seed in range(3)]
        for result in final:
            assert [record["step"] for record in result["curve"]] == [3, 6]
            assert set(result["curve"][-1]["gradient_norms"]) <= set(GROUPS)
            levels = result["curve"][-1]["levels"]
            assert bool(levels) == (mode not in ("none", "softmax"))
            assert all(len(row) == len(LEVEL_COLUMNS) for row in levels)
            assert {test["kind"] for test in result["test"]} == (
                {"novels", "needle"} if name == "novels" else {"test", "longer"}
            )
            for test in result["test"]:
                assert 0 <= test["exact"] <= test["accuracy"] <= 1
                assert test["loss"] > 0


def test_what_is_longer_than_training_is_tested_by_every_policy(tmp_path: Path) -> None:
    modes = ("none", "mlp", "mlp_masked_softmax", "softmax")
    assert run_experiment("mqar", small_experiment("mqar", seeds=1), settings(tmp_path, modes=modes, rate=1e-3))
    found = {
        result["mode"]: [(test["set"], test["beyond"]) for test in result["test"]]
        for result in results(tmp_path, "mqar")
    }
    short = [("16/2", None), ("32/2", None)]
    assert found["none"] == found["softmax"] == [*short, ("64/2", None)]
    assert found["mlp"] == [*short, ("64/2", "clamp"), ("64/2", "one")]
    assert found["mlp_masked_softmax"] == [*short, ("64/2", "clamp"), ("64/2", "extend"), ("64/2", "one")]


def test_novels_are_tested_by_region_and_by_novel(tmp_path: Path, novels: Path) -> None:
    experiment = small_experiment("novels", seeds=1)
    assert run_experiment("novels", experiment, settings(tmp_path, rate=1e-3, novels=novels))
    (result,) = results(tmp_path, "novels")
    whole = [test for test in result["test"] if test["kind"] == "novels"]
    assert [test["beyond"] for test in whole] == ["clamp", "one"]
    for test in whole:
        assert set(test["regions"]) == {"book 4", "book 5"}
        lengths = torch.tensor([32, 32, 64]).double() / 128  # of the regions between 0, 32, 64 and 128
        by_novel = [(torch.tensor(losses).double() * lengths).sum() for losses in test["regions"].values()]
        assert sum(by_novel) / 2 == pytest.approx(test["loss"], rel=1e-3)
    assert len([test for test in result["test"] if test["kind"] == "needle"]) == 4 * 2


def test_a_stopped_experiment_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop whenever something is recorded, in the middle of groups too; equal in every digit."""
    experiment = small_experiment("mqar", steps=9, records=3)
    assert run_experiment("mqar", experiment, settings(tmp_path / "whole"))
    record = Group._record

    def and_stop(group: Group) -> None:
        record(group)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Group, "_record", and_stop)
    monkeypatch.setattr("loglinear.experiments.group.LOOK_EVERY", 1)
    kept = []
    while not run_experiment("mqar", experiment, settings(tmp_path / "parts")):
        kept.append(len(list((tmp_path / "parts").glob("state/*.safetensors"))))
    assert kept == [1, 1, 0, 1, 1], "at steps 3, 6 and 9 of the sweep, 3 and 6 of the seeds"
    assert without_times(results(tmp_path / "parts", "mqar")) == without_times(results(tmp_path / "whole", "mqar"))
    assert list((tmp_path / "parts" / "state").iterdir()) == []


def test_a_state_whose_weights_lie_otherwise_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an earlier version laid them out: its group is trained afresh, not from numbers in the wrong places."""
    experiment = small_experiment("mqar", seeds=1)
    assert run_experiment("mqar", experiment, settings(tmp_path / "whole", rate=1e-3))
    with monkeypatch.context() as patch:
        patch.setattr("loglinear.experiments.ensemble.ALIGNMENT", 1)
        patch.setattr("loglinear.experiments.group.LOOK_EVERY", 1)
        patch.setattr(Group, "_record", lambda group: signal.raise_signal(signal.SIGTERM))
        assert not run_experiment("mqar", experiment, settings(tmp_path / "parts", rate=1e-3))
    assert len(list((tmp_path / "parts" / "state").iterdir())) == 1
    assert run_experiment("mqar", experiment, settings(tmp_path / "parts", rate=1e-3))
    assert without_times(results(tmp_path / "parts", "mqar")) == without_times(results(tmp_path / "whole", "mqar"))


def test_a_test_that_is_cut_short_is_made_up_for_without_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small_experiment("mqar", seeds=2)
    assert run_experiment("mqar", experiment, settings(tmp_path / "whole", rate=1e-3))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "score_sets", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment("mqar", experiment, settings(tmp_path / "cut", rate=1e-3))
    assert results(tmp_path / "cut", "mqar") == []
    monkeypatch.setattr(Trainer, "train_step", None)
    assert run_experiment("mqar", experiment, settings(tmp_path / "cut", rate=1e-3))
    assert without_times(results(tmp_path / "cut", "mqar")) == without_times(results(tmp_path / "whole", "mqar"))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = small_experiment("copying", seeds=2)
    assert run_experiment("copying", experiment, settings(tmp_path))
    before = results(tmp_path, "copying")
    assert run_experiment("copying", experiment, settings(tmp_path, seeds=(0, 1, 5)))
    after = results(tmp_path, "copying")
    assert after[: len(before)] == before
    assert [(r["seed"], r["together"]) for r in after[len(before) :]] == [(5, 1)]
    monkeypatch.setattr(runner, "make_data", None)
    assert run_experiment("copying", experiment, settings(tmp_path)), "nothing is made for nothing to do"


def test_the_printed_command_of_a_run_is_its_run(tmp_path: Path) -> None:
    """A run alone is the run of its group in every digit, with the rate and the seed that its command names."""
    experiment = small_experiment("mqar")
    assert run_experiment("mqar", experiment, settings(tmp_path))
    wanted = results(tmp_path, "mqar")[-1]
    assert f"--modes mlp --out runs/again --rate {wanted['rate']:g} --seeds 2" in wanted["command"]
    assert run_experiment("mqar", experiment, settings(tmp_path / "again", rate=wanted["rate"], seeds=(2,)))
    (alone,) = results(tmp_path / "again", "mqar")
    assert {key: alone[key] for key in ("curve", "test")} == {key: wanted[key] for key in ("curve", "test")}


def test_results_of_another_protocol_are_refused(tmp_path: Path) -> None:
    assert run_experiment("mqar", small_experiment("mqar", seeds=1), settings(tmp_path, rate=1e-3))
    with pytest.raises(UserError, match=r"mqar\.jsonl has results of protocol .* but protocol\.yaml is"):
        run_experiment("mqar", small_experiment("mqar", seeds=1, batch=5), settings(tmp_path, rate=1e-3))


def test_half_a_line_is_no_result_and_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.jsonl"
    append_results(path, [{"seed": 1}])
    path.write_bytes(path.read_bytes() + b'{"seed": 2, "ra')
    assert read_results(path) == [{"seed": 1}]
    append_results(path, [{"seed": 3}])
    assert path.read_text().splitlines() == ['{"seed":1}', '{"seed":3}']
    path.write_text('{"seed": 1}\nnonsense\n')
    with pytest.raises(UserError, match="line 2 is no JSON object"):
        read_results(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modes": ("mpl",)}, "has no mode 'mpl': take some of none, static"),
        ({"seeds": (0, 1000)}, "seeds from 1000 on choose learning rates"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    experiment: Experiment = small_experiment("mqar")
    with pytest.raises(UserError, match=sentence):
        run_experiment("mqar", experiment, settings(tmp_path, **changes))


def test_novels_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"by --novels"):
        run_experiment("novels", small_experiment("novels"), settings(tmp_path))
