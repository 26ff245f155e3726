"""The report against numbers worked out by hand, and over real runs of every experiment."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loglinear.experiments import tables
from loglinear.experiments.answers import reproduces
from loglinear.experiments.protocol import Protocol, load_protocol
from loglinear.experiments.report import write_report
from loglinear.experiments.results import append_results
from loglinear.experiments.runner import run_experiment
from loglinear.experiments.selection import best_rate
from loglinear.experiments.statistics import Difference
from loglinear.experiments.summary import Summary, failure
from tests.experiments.small import small_experiment
from tests.experiments.test_runner import novels, settings, signals_as_before  # noqa: F401

RULES = load_protocol().statistics.model_copy(update={"resamples": 2_000})
EXPERIMENT = small_experiment("mqar", modes=("none", "mlp", "softmax"))
ACCURACY = {"none": (0.2, 0.3, 0.1), "mlp": (0.5, 0.9, 0.7), "softmax": (1.0, 1.0, 1.0)}


def record(step: int, accuracy: float, loss: float | None = 1.0) -> dict[str, Any]:
    sizes = ((layer, level) for layer in range(2) for level in range(4))
    levels = [[layer, level, 1.0 + level, 0.5, 0.8, 1.0, 1.2, 1.5, 0.0, 0.25] for layer, level in sizes]
    validation = [{"kind": "validation", "set": "32/2", "beyond": None, "accuracy": accuracy, "loss": loss}]
    return {
        "step": step,
        "train_loss": loss,
        "gradient_norms": {"decay": 0.1},
        "validation": validation,
        "levels": levels,
    }


def made(mode: str, phase: str, rate: float, seed: int, accuracy: float) -> dict[str, Any]:
    """A finished run with the same accuracy in two tests, a tenth less in a longer one, half of that with lambda 1."""
    policies: tuple[str | None, ...] = ("clamp", "one") if mode == "mlp" else (None,)
    tests: list[dict[str, Any]] = [
        {"kind": "test", "set": name, "beyond": None, "accuracy": accuracy} for name in ("16/2", "32/2")
    ]
    tests += [
        {"kind": "longer", "set": "64/2", "beyond": policy, "accuracy": (accuracy - 0.1) / (1 + (policy == "one"))}
        for policy in policies
    ]
    curve = [record(3, accuracy / 2, 2 - accuracy), record(6, accuracy, 2 - accuracy)]
    if mode != "mlp":
        curve = [{**each, "levels": []} for each in curve]
    return {
        "experiment": "mqar",
        "phase": phase,
        "mode": mode,
        "rate": rate,
        "seed": seed,
        "curve": curve,
        "test": tests,
        "seconds": 60.0,
        "device": "a GPU",
        "date": "2026-01-02",
        "protocol": EXPERIMENT.fingerprint,
    }


def made_results() -> list[dict[str, Any]]:
    """A sweep that prefers 0.01, three reported seeds at it, and one at a rate that was given by hand."""
    results = [
        made(mode, "sweep", rate, 1000, accuracy)
        for mode in EXPERIMENT.modes
        for rate, accuracy in ((1e-3, 0.3), (1e-2, 0.4))
    ]
    results += [
        made(mode, "final", 1e-2, seed, accuracy)
        for mode, accuracies in ACCURACY.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    return [*results, made("mlp", "final", 1e-3, 0, 0.0)]


@pytest.fixture
def summary() -> Summary:
    return Summary("mqar", EXPERIMENT, RULES, made_results())


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_accuracies_are_means_and_deviations_over_seeds_at_the_chosen_rate(summary: Summary) -> None:
    """By hand: 20, 30, 10 have mean 20 and deviation 10; 50, 90, 70 have 70 and 20."""
    assert rows(tables.accuracy_table(summary)) == [
        ["mode", "seeds", "16/2", "32/2", "mean"],
        ["---", *["---:"] * 4],
        ["none", "3", *["20.0 ± 10.0"] * 3],
        ["mlp", "3", *["70.0 ± 20.0"] * 3],
        ["softmax", "3", *["100.0 ± 0.0"] * 3],
    ]


def test_every_seed_is_shown(summary: Summary) -> None:
    """Three rows; a star for what has learned nothing, whose accuracy never reached 15 %."""
    assert rows(tables.seeds_table(summary))[2:] == [
        ["none", "0.01", "20.0", "30.0", "10.0*"],
        ["mlp", "0.01", "50.0", "90.0", "70.0"],
        ["softmax", "0.01", "100.0", "100.0", "100.0"],
    ]
    assert rows(tables.failures_table(summary))[2] == ["none", "3", "0", "0", "1 (2)"]


def test_longer_rows_are_shown_by_policy(summary: Summary) -> None:
    """Under clamp 40, 80, 60; under one half of it; to extend is to clamp where nothing else was tested."""
    assert rows(tables.longer_table(summary))[2:] == [
        ["none, no levels", "10.0 ± 10.0"],
        ["mlp, clamp", "60.0 ± 20.0"],
        ["mlp, extend", "60.0 ± 20.0"],
        ["mlp, one", "30.0 ± 10.0"],
        ["softmax, no levels", "90.0 ± 0.0"],
    ]


def test_the_sweep_shows_its_choice_and_whether_it_was_wide_enough(summary: Summary) -> None:
    """Only a best rate between others is one that no rate beyond can beat."""
    assert rows(tables.sweep_table(summary))[3] == ["mlp", "1.700", "**1.600** *"]
    wider = EXPERIMENT.model_copy(update={"rates": (1e-3, 1e-2, 3e-2)})
    worse = made("mlp", "sweep", 3e-2, 1000, 0.35)
    enough = replace(summary, experiment=wider, results=[*summary.results, worse])
    assert rows(tables.sweep_table(enough))[3] == ["mlp", "1.700", "**1.600**", "1.650"]


def test_of_rates_that_tie_the_smallest_is_taken() -> None:
    tied = [made("mlp", "sweep", rate, seed, 0.4) for rate in (1e-2, 1e-3, 3e-2) for seed in (1000, 1001)]
    assert best_rate(tied, "mlp") == 1e-3
    lost = [*tied, {**made("mlp", "sweep", 1e-4, 1000, 0.9), "curve": [record(6, 0.9, None)]}]
    assert best_rate(lost, "mlp") == 1e-3, "a rate that diverges is never chosen"


def test_comparisons_are_paired_by_seed(summary: Summary) -> None:
    """Differences 30, 60, 60 points, all of one sign: the least p that 2,000 resamples can give, twice by Holm."""
    test, longer = summary.comparisons
    assert (test.rival, test.outcome, test.seeds) == ("none", "test", 3)
    assert test.difference.mean == pytest.approx(0.5)
    assert test.adjusted_p == pytest.approx(2 * 2 / 2001)
    assert test.counts
    assert longer.difference.mean == pytest.approx(0.5)
    assert rows(tables.comparisons_table(summary))[2][:4] == ["mlp - none", "test", "3", "+50.0"]


def test_what_is_missing_is_counted(summary: Summary) -> None:
    """Three modes of four runs in the sweep and three seeds are 21; 6 of the sweep and 9 seeds are there."""
    assert summary.missing == 21 - 6 - 9
    assert summary.gpu_minutes == 16


def test_failures_are_told_apart() -> None:
    """Not finite; above 15 % and then far down; never above it; and fine."""
    curves = {
        "diverged": [record(3, 0.9), record(6, 0.9, None)],
        "collapsed": [record(3, 0.9), record(6, 0.7)],
        "learned nothing": [record(3, 0.1), record(6, 0.14)],
        None: [record(3, 0.9), record(6, 0.85)],
    }
    for wanted, curve in curves.items():
        assert failure({"curve": curve}, RULES) == wanted


def test_a_loss_that_is_not_finite_is_shown_as_such() -> None:
    assert tables.spread([1.0, None]) == "nan"
    assert tables.spread([1.0, 3.0]) == "2.0 ± 1.4"


def test_level_scales_are_summed_up_by_halves_of_the_levels(summary: Summary) -> None:
    """Levels 0 and 1 have means 1 and 2, levels 2 and 3 have 3 and 4."""
    first, second = rows(tables.levels_table(summary))[2:]
    assert first == ["mlp, 0 to 1", "1.50", "0.50", "1.00", "1.50", "0.0", "25.0"]
    assert second[:2] == ["mlp, 2 and up", "3.50"]


def test_the_report_says_what_is_not_known(tmp_path: Path) -> None:
    report = write_report(tmp_path / "evidence").read_text()
    for name in load_protocol().experiments:
        assert f"No reported run is finished yet. `loglinear experiment {name}" in report
    assert report.count("Not known yet") == 10, "the summary, and every point of the reviewer's"
    assert "not run yet" in report
    assert re.search(r"\d±|± \d", report) is None, "no number is made up"


def test_the_report_answers_the_reviewer_with_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "evidence"
    append_results(out / "mqar.jsonl", made_results())
    small = load_protocol().experiments | {"mqar": EXPERIMENT}
    report = write_report(out, Protocol(statistics=RULES, experiments=small)).read_text()
    assert "6 runs of the protocol are missing: what follows is preliminary." in report
    assert "- mqar, test: mlp minus none is +50.0 points (+30.0 to +60.0; corrected p 0.002), which counts" in report
    assert "- mqar: of 9 reported runs 0 diverged, 0 collapsed, 1 learned nothing." in report
    assert "- mqar: 2 of 2 comparisons count as a difference, with at least 3 seeds a mode" in report
    assert "| mqar | 16 (6 missing) | 16.0 | a GPU | 2026-01-02 |" in report
    assert "| rival | mqar, test (preliminary) | mqar, longer than trained (preliminary) |" in report
    assert "| none | **+50.0** | **+50.0** |" in report
    assert "- mqar, test: mlp 70.0 ± 20.0 %, softmax 100.0 ± 0.0 %." in report


def test_only_what_counts_is_bold(summary: Summary) -> None:
    """A margin of 60 points makes a difference of 50 none; an experiment without comparisons has no column."""
    strict = replace(summary, name="strict", experiment=EXPERIMENT.model_copy(update={"margin": 0.6}))
    empty = replace(summary, name="empty", results=[])
    header, _, row = rows(tables.overview_table([summary, strict, empty]))
    assert len(header) == 5
    assert row == ["none", "**+50.0**", "**+50.0**", "+50.0", "+50.0"]


@pytest.mark.parametrize(
    ("low", "high", "is_better", "verdict"),
    [
        (0.01, 0.3, True, "yes"),
        (-0.1, 0.3, True, "no difference found"),
        (-0.3, -0.1, True, "no, the opposite"),
        (-0.01, 0.02, False, "yes"),
        (-0.01, 0.03, False, "not decided"),
        (0.01, 0.03, False, "no, they differ"),
        (-0.03, -0.01, False, "no, they differ"),
    ],
)
def test_a_published_direction_reproduces_or_not(low: float, high: float, is_better: bool, verdict: str) -> None:
    found = Difference((low + high) / 2, low, high, 0.5)
    assert reproduces(found, is_better, margin=0.02) == verdict


def test_real_runs_become_a_report_with_pictures(tmp_path: Path, novels: Path) -> None:  # noqa: F811
    """Two experiments with three modes each; every picture is there, and every number of a table can be found again."""
    modes = ("none", "mlp_softmax", "softmax")
    small = {name: small_experiment(name) for name in load_protocol().experiments}
    small["novels"] = small_experiment("novels", modes=("none", "mlp", "softmax"))
    for name, chosen in (("mqar", modes), ("novels", None)):
        run_experiment(name, small[name], settings(tmp_path, modes=chosen, novels=novels))
    protocol = Protocol(statistics=RULES, experiments=small)
    report = write_report(tmp_path / "out", protocol).read_text()
    pictures = re.findall(r"\]\(out/(\S+\.png)\)", report)
    assert {"mqar-accuracy.png", "novels-loss-by-position.png", "mqar-level-scales.png"} <= set(pictures)
    assert all((tmp_path / "out" / picture).stat().st_size > 5_000 for picture in pictures)
    assert "loglinear experiment novels --novels FOLDER" in report
    assert np.isfinite([float(x) for x in re.findall(r"(\d+\.\d+) ±", report)]).all()
