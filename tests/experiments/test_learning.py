"""The adaptive form learns associative recall, through the whole of an experiment."""

from __future__ import annotations

from pathlib import Path

from loglinear.experiments.results import read_results
from loglinear.experiments.runner import Settings, run_experiment
from tests.experiments.small import small_experiment
from tests.experiments.test_runner import signals_as_before  # noqa: F401


def test_recall_is_learned_to_more_than_99_per_cent(tmp_path: Path) -> None:
    """Four pairs of 15 keys and 16 values in 32 tokens; chance is 1 in 16. A minute on one core."""
    task = {"kind": "mqar_contiguous", "train": [(16, 2, 16000), (32, 4, 16000)]}
    task |= {"validation": [(32, 4, 100)], "test": [(32, 4, 1000)], "longer": []}
    model = {"vocab_size": 32, "seq_len": 32, "dim": 64, "layers": 2, "mlp_dim": 0, "init_std": 0.1}
    model["log_linear"] = {"heads": 2, "head_dim": 32, "state_dim": 16, "level_scale_hidden": 16}
    small = small_experiment(
        "mqar_contiguous", task=task, model=model, steps=1200, batch=64, schedule={"warmup_steps": 120}
    )
    settings = Settings(("mlp",), (0,), 0.01, None, tmp_path, tmp_path, None)
    assert run_experiment("mqar_contiguous", small, settings)
    (result,) = read_results(tmp_path / "mqar_contiguous.jsonl")
    (test,) = result["test"]
    assert test["accuracy"] > 0.99
