"""The plan of a run against what a real model keeps in memory, and against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.train.plan import Plan, make_plan, print_plan
from tests.ops.test_triton_interpreted import interpreted
from tests.train.plan_cases import CASES, PATTERNS, config_of, measured


@pytest.fixture(scope="module")
def held() -> Any:
    return interpreted("tests.train.plan_cases")


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_holds_with_the_kernels(case: str, held: dict[str, list[int]]) -> None:
    planned, really = held[case]
    assert planned == pytest.approx(really, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_holds_on_a_gpu(case: str) -> None:
    config = CASES[case]
    assert make_plan(config, 1).memory["activations"] == pytest.approx(measured(config, "cuda"), rel=0.02)


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients"),
    [
        (1, "fp32", 4.0, 4.0),
        (1, "bf16", 2.0, 2.0),
        (2, "fp32", 4.0, 1.0),
        (2, "bf16", 2.0, 0.5),
        (3, "fp32", 1.0, 1.0),
        (3, "bf16", 0.5, 0.5),
    ],
)
def test_bytes_of_a_parameter_on_four_ranks_by_hand(
    stage: int, precision: str, weights: float, gradients: float
) -> None:
    """ZeRO 1 shards 12 bytes of fp32 weight and two moments, ZeRO 2 the gradient too, ZeRO 3 the weight too."""
    plan = make_plan(config_of(PATTERNS["softmax"], zero_stage=stage, precision=precision, micro_batch=1), 4)
    assert plan.parameters == 70 * 48 + 3 * (4 * 48 * 96 + 3 * 48 * 56 + 2 * 48) + 48
    assert plan.parameters % 4 == 0
    state = {kind: plan.memory[kind] / plan.parameters for kind in ("weights", "gradients", "optimizer")}
    assert state == {"weights": weights, "gradients": gradients, "optimizer": 3.0}


def test_sums_of_a_softmax_model_by_hand() -> None:
    plan = make_plan(config_of(PATTERNS["softmax"]), 2)
    products = 70 * 48 + 3 * (4 * 48 * 96 + 3 * 48 * 56)
    scores_and_values = 3 * 2 * 96 * 256 // 2  # of which a causal half
    assert plan.flops_per_token == 3 * 2 * (products + scores_and_values)
    assert plan.tokens_per_step == 12 * 256
    assert plan.micro_batches == 2


def test_shares_of_a_model_that_does_not_divide_are_rounded_up() -> None:
    whole, third = (make_plan(config_of(PATTERNS["hybrid"], micro_batch=4), ranks) for ranks in (1, 3))
    bare = make_plan(config_of(PATTERNS["hybrid"], micro_batch=1, zero_stage=3), 12)
    assert third.memory["optimizer"] == 12 * -(-whole.parameters // 3)
    assert bare.memory["weights"] == 4 * -(-whole.parameters // 12)


def test_nothing_is_allocated() -> None:
    config = config_of(PATTERNS["log_linear"])
    enormous = config.model.model_copy(update={"vocab_size": 10**7, "dim": 10**6})
    plan = make_plan(config.model_copy(update={"model": enormous}), 1)
    assert plan.memory["weights"] > 40 * 10**12


def test_ranks_that_do_not_divide_the_batch_are_named() -> None:
    with pytest.raises(UserError, match=r"train.global_batch \(12\) must be a multiple of .* ranks \(8\)"):
        make_plan(config_of(PATTERNS["softmax"]), 8)


def test_the_table_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(1234567, 890, 4096, 2, {"weights": 2**30, "activations": 2**29}, {"tensor": 3 * 2**30})
    print_plan(plan)
    shown = capsys.readouterr().out
    for text in ("1,234,567", "890", "4,096", "weights, per rank", "1.000 GiB", "0.500 GiB", "1.500 GiB", "3.000 GiB"):
        assert text in shown


def over(tensor: int, context: int, stage: int = 1) -> Config:
    tree = config_of(PATTERNS["log_linear"], zero_stage=stage).model_dump()
    tree["model"]["log_linear"] |= {"heads": 4}
    tree["parallel"] = {"tensor": tensor, "context": context, "sequence": False}
    return Config.model_validate(tree)


def test_tensor_ranks_hold_their_part_of_the_cut_parameters() -> None:
    alone, halved = make_plan(over(1, 1), 1), make_plan(over(2, 1), 2)
    assert halved.parameters == alone.parameters
    assert halved.flops_per_token == alone.flops_per_token
    assert 0.5 < halved.memory["weights"] / alone.memory["weights"] < 0.55, "all but norms and small maps are cut"


def test_context_ranks_hold_their_part_of_the_activations_and_share_the_optimizer() -> None:
    alone, halved = make_plan(over(1, 1), 1), make_plan(over(1, 2), 2)
    assert halved.memory["weights"] == alone.memory["weights"]
    assert halved.memory["optimizer"] == pytest.approx(alone.memory["optimizer"] / 2, abs=12)
    assert 0.5 <= halved.memory["activations"] / alone.memory["activations"] < 0.7, "half, and what is received"


def test_traffic_of_tensor_ranks_by_hand() -> None:
    """Four sums of the residual stream a layer, one behind the embedding and one before the head, twice a ring."""
    config = over(2, 1)
    plan = make_plan(config, 2)
    model, train = config.model, config.train
    stream = train.micro_batch * model.seq_len * model.dim * 4
    sums = plan.micro_batches * (4 * model.layers + 2) * 2 * stream * 1 // 2
    assert plan.traffic["tensor"] == pytest.approx(sums, rel=0.05)
    assert plan.traffic["tensor"] > sums, "the loss and shared weights come on top"


@pytest.mark.parametrize(("stage", "times"), [(1, 1 + 1), (2, 2 + 1), (3, 2 + 2 * 2)])
def test_traffic_of_replicas_by_hand(stage: int, times: int) -> None:
    """Gradients, after every micro-batch from stage 2 on, and weights: once, or twice a micro-batch in stage 3."""
    plan = make_plan(over(1, 1, stage), 2)
    assert plan.micro_batches == 2
    assert plan.traffic == {"replicas": times * 4 * plan.parameters // 2}


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 3}, r"model.mlp_dim|model.vocab_size|heads"),
        ({"context": 7}, r"model.seq_len \(\d+\) must be a multiple of parallel.context \(7\)"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(parallel: dict[str, int], message: str) -> None:
    tree = over(1, 1).model_dump() | {"parallel": parallel}
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tree)


def test_ranks_that_do_not_fit_the_mesh_are_named() -> None:
    with pytest.raises(UserError, match=r"6 ranks do not divide into groups of parallel.context \(2\) x .* \(2\)"):
        make_plan(over(2, 2), 6)
