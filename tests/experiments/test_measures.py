"""What is recorded of runs, against the same numbers taken from each run alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loglinear.experiments.ensemble import Ensemble, Run, Trainer
from loglinear.experiments.examples import Cell, Examples
from loglinear.experiments.measures import (
    LevelScaleRecorder,
    gradient_norms,
    group_of,
    policies,
    rounded,
    score_sets,
)
from loglinear.experiments.mqar import spread_recall
from loglinear.experiments.tasks import RowSet
from loglinear.model import build_model
from loglinear.ops.lambda_map import LambdaMap
from tests.experiments.small import small_experiment

RUNS = (Run(1e-2, 3), Run(1e-2, 4))


def rows(length: int, count: int = 6) -> Examples:
    return spread_recall(Cell(length, 2, count), 16, np.random.default_rng(length))


def trained(mode: str = "mlp", steps: int = 3) -> Trainer:
    config = small_experiment("mqar").config(mode)  # type: ignore[arg-type]
    trainer = Trainer(Ensemble(config, RUNS, torch.device("cpu"), torch.float32), config, [rows(32)])
    for _ in range(steps):
        trainer.train_step(0, torch.arange(4).expand(2, 4))
    return trainer


def test_gradient_norms_are_those_of_the_groups() -> None:
    """Of the first step, by autograd on each model alone; together they are the whole norm."""
    trainer = trained(steps=1)
    for run, norms in enumerate(gradient_norms(trainer.ensemble, trainer.gradient_rw)):
        model, batch = build_model(trainer.config.model, RUNS[run].seed), rows(32).take(slice(0, 4))
        labels_bt = torch.full(batch.tokens_et.shape, -100)
        labels_bt.scatter_(1, batch.positions_en.long(), batch.labels_en.long())
        (model(batch.tokens_et.long(), labels_bt) / batch.labels_en.numel()).backward()
        wanted: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            wanted[group_of(name)] = wanted.get(group_of(name), 0.0) + float(parameter.grad.square().sum())
        assert norms == pytest.approx({group: square**0.5 for group, square in wanted.items()}, rel=1e-3)
        assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(float(trainer.norm_r[run]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("embedding.weight", "embedding"),
        ("blocks.0.mixer.lambda_map.mlp.weight1", "level scales"),
        ("blocks.0.mixer.lambda_map.level_proj.weight", "level scales"),
        ("blocks.1.mixer.dt_proj.weight", "decay"),
        ("blocks.1.mixer.A_log", "decay"),
        ("blocks.1.mixer.D", "decay"),
        ("blocks.1.mixer.q_conv.bias", "convolutions"),
        ("blocks.1.mixer.norm.weight", "norms"),
        ("blocks.1.mlp_norm.weight", "norms"),
        ("blocks.1.mixer.out_proj.weight", "projections"),
        ("blocks.1.mlp.gate.weight", "MLP"),
    ],
)
def test_parameters_are_in_the_group_that_one_expects(name: str, group: str) -> None:
    assert group_of(name) == group


def test_level_scales_are_those_of_each_run_at_the_tokens_that_read_them() -> None:
    """Level 3 is read at positions whose bit 2 is set; its rows against the map's own output there."""
    trainer = trained()
    taken = LevelScaleRecorder(trainer.ensemble, RowSet("validation", "x", rows(32))).take()
    for run in range(2):
        model = trainer.ensemble.models[run]
        seen: list[torch.Tensor] = []
        level_map = next(module for module in model.modules() if isinstance(module, LambdaMap))
        hook = level_map.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model.hidden(rows(32).tokens_et[:4].long())
        hook.remove()
        reading = [position for position in range(32) if position & 4]
        wanted = seen[0][:, reading, :, 3].flatten()
        mean, *quantiles, low, high = next(row[2:] for row in taken[run] if row[:2] == [0, 3])
        assert mean == pytest.approx(float(wanted.mean()), rel=1e-4)
        assert quantiles == pytest.approx(np.quantile(wanted.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(), rel=1e-3)
        assert (low, high) == (float((wanted < 0.05).float().mean()), float((wanted > 2).float().mean()))
        assert len(taken[run]) == 2 * 6, "two layers, levels of 32 tokens"
    assert taken[0] != taken[1]


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on rows longer than training every policy gives its own."""
    ensemble, sets = trained("mlp_softmax").ensemble, [RowSet("longer", "x", rows(128, 7))]
    ensemble.weights_rw += torch.randn(ensemble.weights_rw.shape, generator=torch.Generator().manual_seed(0)) / 5
    whole = score_sets(ensemble, "mlp_softmax", 32, sets)
    monkeypatch.setattr("loglinear.experiments.measures.TOKENS_AT_ONCE", 3 * 128)
    assert score_sets(ensemble, "mlp_softmax", 32, sets) == whole
    assert [record["beyond"] for record in whole[0]] == ["clamp", "extend", "one"]
    assert len({record["loss"] for record in whole[0]}) == 3


def test_only_policies_that_can_differ_are_tried() -> None:
    assert policies("mlp", 64, 64) == (None,)
    assert policies("none", 128, 64) == policies("softmax", 128, 64) == (None,)
    assert policies("static", 128, 64) == ("clamp", "one")
    assert policies("mlp_masked_softmax", 128, 64) == ("clamp", "extend", "one")


def test_what_is_due_nowhere_is_not_counted() -> None:
    """Rows whose labels are padded, as answers of different lengths are, score as without the padding."""
    ensemble, plain = trained().ensemble, rows(32)
    padding = torch.full((len(plain), 3), -100, dtype=torch.int32)
    padded = Examples(
        plain.tokens_et,
        torch.cat([plain.positions_en, torch.zeros_like(padding)], 1),
        torch.cat([plain.labels_en, padding], 1),
    )
    scores = [score_sets(ensemble, "mlp", 32, [RowSet("needle", "x", each)]) for each in (plain, padded)]
    for one, other in zip(*scores, strict=True):
        assert one[0] == pytest.approx(other[0])


def test_numbers_are_rounded_and_what_is_not_finite_is_none() -> None:
    assert rounded(1.23456789) == 1.2346
    assert rounded(float("nan")) is rounded(float("inf")) is None
