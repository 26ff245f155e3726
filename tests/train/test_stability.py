"""Bad batches and broken weights cost a run the steps that they spoil, on all ranks alike, and nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.loader import TrainLoader
from data_pipeline.prepare import prepare_all
from loglinear.checkpoint import read_latest
from loglinear.checkpoint.files import complete_checkpoints, step_of
from loglinear.config import DataConfig, StabilityConfig
from loglinear.errors import UserError
from loglinear.train.stability import Guard, Rollbacks
from tests.corpus import VOCAB
from tests.processes import exit_codes, start_ranks
from tests.train.small import GLOBAL_BATCH, records, saved_tensors, small_config
from tests.train.trouble import (
    events,
    flip,
    make_infinite,
    train_doubted,
    train_poisoned,
    train_scrambled,
    train_struck,
    train_without,
)

SENSITIVE = {"window": 8, "spike": 6.0}


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_a_poisoned_step_of_one_rank_leaves_all_ranks_untouched(
    prepared: DataConfig, tmp_path: Path, stage: int, precision: str
) -> None:
    """Not finite, or finite but too large; the ranks themselves compare what they own before and after.

    Step 4 was to be saved: the step after it is.
    """
    train = {"steps": 8, "zero_stage": stage, "precision": precision}
    config = small_config(tmp_path / "run", prepared, train=train, stability=SENSITIVE)
    assert exit_codes(start_ranks(2, train_poisoned, config, {2: math.inf, 4: math.nan, 7: 1e4})) == [0, 0]
    assert [record["step"] for record in records(tmp_path / "run") if "refusal" in record] == [2, 4, 7]
    found = events(tmp_path / "run")
    assert [(event["event"], event["step"], event["until_sample"]) for event in found] == [
        ("refused", step, step * GLOBAL_BATCH) for step in (2, 4, 7)
    ]
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [5, 8]
    assert [event["reason"].split()[0:2] for event in found] == [["the", "loss"]] * 3
    assert "deviations above" in found[-1]["reason"]
    assert all(tensor.isfinite().all() for tensor in saved_tensors(tmp_path / "run").values())


def test_what_one_rank_refuses_all_refuse(prepared: DataConfig, tmp_path: Path) -> None:
    """The first step, before which there are no moments."""
    config = small_config(tmp_path / "run", prepared, train={"steps": 4, "zero_stage": 2})
    assert exit_codes(start_ranks(2, train_doubted, config)) == [0, 0]
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["step"], event["reason"]) == ("refused", 1, "another rank refused it")
    snapshot = read_latest(tmp_path / "run" / "checkpoints")
    assert (snapshot.step, snapshot.state["optimizer_step"], snapshot.state["stability"]["refused"]) == (4, 3, 1)


def same_run(folder: Path, reference: Path) -> None:
    """Bit for bit."""
    assert records(folder) == records(reference)
    expected = saved_tensors(reference)
    assert all(tensor.equal(expected[name]) for name, tensor in saved_tensors(folder).items())


WENT_BACK = {"train": {"steps": 16, "zero_stage": 3}}
POISON = {6: math.nan, 7: math.nan, 8: math.nan, 20: math.nan}


@pytest.fixture(scope="module")
def went_back(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps 6, 7 and 8 are poisoned: back to the checkpoint of step 4, and on with later data.

    So is its last, 12 calls later: back to that of step 12, for a run does not end with a step that was left out.
    """
    folder = tmp_path_factory.mktemp("back") / "run"
    config = small_config(folder, prepared, **WENT_BACK)
    assert exit_codes(start_ranks(2, train_poisoned, config, POISON)) == [0, 0]
    return folder


def test_a_run_that_went_back_is_one_that_never_saw_those_data(
    prepared: DataConfig, went_back: Path, tmp_path: Path
) -> None:
    truth = small_config(tmp_path / "truth", prepared, **WENT_BACK)
    assert exit_codes(start_ranks(2, train_without, truth, {4: 4, 12: 4})) == [0, 0]
    same_run(went_back, tmp_path / "truth")
    found = events(went_back)
    assert [event["step"] for event in found if event["event"] == "refused"] == [6, 7, 8, 16]
    backs = [
        (event["step"], event["to_step"], event["to_sample"]) for event in found if event["event"] == "rolled back"
    ]
    assert backs == [(8, 4, 64), (16, 12, 160)]


def suffices(loader: TrainLoader, steps: int) -> bool:
    try:
        loader.require(steps)
    except UserError:
        return False
    return True


def test_after_going_back_it_trains_until_the_data_end(
    configure: Callable[..., DataConfig], corpus: Path, tmp_path: Path
) -> None:
    """What was skipped is missed at the end, and not before: an early return must not end the run at once."""
    folder = {"kind": "folder", "path": str(corpus), "weight": 1.0, "max_epochs": 1}
    sources = [
        folder | {"pattern": f"0{digits}*.txt", "name": name}
        for digits, name in (("[0-3]", "first"), ("[4-7]", "second"))
    ]
    data = configure(sources=sources)
    prepare_all(data, VOCAB)
    small = small_config(tmp_path / "run", data)
    given = {"vocab_size": VOCAB, "seq_len": small.model.seq_len, "micro_batch": 2}
    loader = TrainLoader(data, global_batch=GLOBAL_BATCH, **given)
    most = next(steps for steps in count(1) if not suffices(loader, steps + 1))
    assert most >= 10
    config = small_config(tmp_path / "run", data, train={"steps": most})
    log = tmp_path / "log"
    poison = dict.fromkeys((6, 7, 8), math.nan)
    assert exit_codes(start_ranks(1, train_poisoned, config, poison, log=log)) == [2]
    assert "every source has reached its max_epochs" in log.read_text()
    trained = [record["step"] for record in records(tmp_path / "run") if "loss" in record]
    assert trained == [*range(1, most - 3)], "the steps from 5 on were made again, with later data"


def test_stopped_after_it_went_back_it_goes_on_bit_for_bit(
    prepared: DataConfig, went_back: Path, tmp_path: Path
) -> None:
    stopped = small_config(tmp_path / "stopped", prepared, **WENT_BACK)
    assert exit_codes(start_ranks(2, train_poisoned, stopped, POISON, 10)) == [0, 0]
    assert len(records(tmp_path / "stopped")) < len(records(went_back))
    assert exit_codes(start_ranks(2, train_poisoned, stopped, {9: math.nan})) == [0, 0]  # calls count anew
    same_run(tmp_path / "stopped", went_back)


def test_tensorboard_shows_what_was_refused(went_back: Path) -> None:
    shown = EventAccumulator(str(went_back / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    shown.Reload()
    refused = {event.step: event.value for event in shown.Scalars("stability/refused_steps")}
    assert (refused[2], refused[4], refused[10], refused[12], refused[16]) == (0, 3, 3, 4, 4)
    assert shown.Scalars("stability/rollbacks")[-1].value == 2
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("events/text_summary")]
    assert texts == [
        *["left out: the loss is nan"] * 3,
        "back from step 8: the loss is nan",
        "left out: the loss is nan",
        "back from step 16: the loss is nan",
    ]


def test_a_bad_part_of_the_data_is_skipped(prepared: DataConfig, tmp_path: Path) -> None:
    """Random labels for three steps, once the model knows better than chance."""
    config = small_config(tmp_path / "run", prepared, stability=SENSITIVE, train={"steps": 26})
    assert exit_codes(start_ranks(1, train_scrambled, config, 21, 23)) == [0]
    kinds = [(event["event"], event["step"]) for event in events(tmp_path / "run")]
    assert kinds == [("refused", 21), ("refused", 22), ("refused", 23), ("rolled back", 23)]
    assert [record["step"] for record in records(tmp_path / "run") if "loss" in record] == list(range(1, 27))


def test_a_flipped_bit_in_a_weight_is_healed_from_the_checkpoint(prepared: DataConfig, tmp_path: Path) -> None:
    """The exponent's highest bit, before step 22: refused until the checkpoint of step 20 is taken again."""
    config = small_config(tmp_path / "run", prepared, train={"steps": 26, "zero_stage": 2}, stability=SENSITIVE)
    assert exit_codes(start_ranks(2, train_struck, config, 22, flip)) == [0, 0]
    found = events(tmp_path / "run")
    assert [event["event"] for event in found][-1] == "rolled back"
    assert {event["to_step"] for event in found if event["event"] == "rolled back"} == {20}
    weights = [tensor for name, tensor in saved_tensors(tmp_path / "run").items() if name.startswith("weight")]
    assert max(float(tensor.abs().max()) for tensor in weights) < 10
    assert [record["step"] for record in records(tmp_path / "run") if "loss" in record] == list(range(1, 27))


@pytest.mark.parametrize("step", [6, 8])
def test_weights_that_are_not_finite_are_never_a_checkpoint(prepared: DataConfig, tmp_path: Path, step: int) -> None:
    """One becomes infinite where no loss sees it: behind the forward pass of a step that is evaluated, or saved."""
    config = small_config(tmp_path / "run", prepared, train={"steps": 12}, eval={"every": 6})
    assert exit_codes(start_ranks(2, train_struck, config, step, make_infinite)) == [0, 0]
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["step"], event["to_step"]) == ("rolled back", step, 4)
    assert event["reason"] == "a weight or moment is not finite"
    assert all(tensor.isfinite().all() for tensor in saved_tensors(tmp_path / "run").values())


def guard(losses: list[float], norms: list[float], **changes: float) -> Guard:
    built = Guard(StabilityConfig.model_validate({"window": 32, "spike": 6.0} | changes))
    for loss, norm in zip(losses, norms, strict=True):
        built.note(loss, norm, built.judge(loss, norm))
    return built


def test_a_spike_is_judged_by_median_and_deviation() -> None:
    """By hand: losses 1..9 have median 5 and median deviation 2, so 6 deviations end at 5 + 6 * 1.4826 * 2."""
    seen = Guard(StabilityConfig(window=32, spike=6.0))
    for loss in range(1, 10):
        seen.note(float(loss), 1.0, None)
    limit = 5 + 6 * 1.4826 * 2
    assert seen.judge(limit - 0.01, 1.0) is None
    assert seen.judge(limit + 0.01, 1.0) == f"the loss {limit + 0.01:.3f} is 6 deviations above the last 9"
    assert seen.judge(-100.0, 1.0) is None, "lower is no trouble"
    assert seen.judge(5.0, math.exp(0.59)) is None, "deviations of a norm are at least a tenth of its logarithm"
    assert "gradient norm" in str(seen.judge(5.0, math.exp(0.61)))


def test_nothing_is_a_spike_before_a_quarter_of_the_window_is_known() -> None:
    seen = guard([1.0] * 7, [1.0] * 7)
    assert seen.judge(1e9, 1e9) is None
    seen.note(1.0, 1.0, None)
    assert seen.judge(1e9, 1.0) is not None
    assert seen.judge(1.0, 1e9) is not None


def test_deviations_of_a_loss_are_at_least_a_hundredth_of_it() -> None:
    seen = guard([2.0] * 9, [1.0] * 9)
    assert seen.judge(2 + 6 * 0.0199, 1.0) is None
    assert seen.judge(2 + 6 * 0.0201, 1.0) is not None


def test_only_the_last_steps_count() -> None:
    """Losses and norms that were high before the window are spikes now, in a run that was resumed too."""
    seen = guard([9.0] * 20 + [1.0] * 8, [9.0] * 20 + [1.0] * 8, window=8)
    again = Guard(StabilityConfig(window=8, spike=6.0), seen.state())
    for step in range(8):
        again.note(0.5, 0.5, again.judge(0.5, 0.5))
        assert (again.judge(5.0, 0.5), again.judge(0.5, 5.0)) != (None, None), step
    assert again.state()["losses"] == [0.5] * 8
    assert again.state()["norms"] == pytest.approx([math.log(0.5)] * 8)


def test_a_gradient_that_is_not_finite_or_vanishes() -> None:
    seen = guard([1.0] * 9, [0.0] * 9)
    assert seen.refused == 0
    assert seen.judge(1.0, math.inf) == "the gradient norm is inf"
    assert seen.judge(1.0, math.nan) == "the gradient norm is nan"


def test_a_checkpoint_to_go_back_to_for_the_fourth_time_does_not_help(tmp_path: Path) -> None:
    rollbacks = Rollbacks()
    for _ in range(3):
        rollbacks.count(tmp_path / "first", 8, "the loss is nan")
    with pytest.raises(
        UserError, match=r"step 9 cannot be trained \(too large\), and going back to .*first 3 times has"
    ):
        rollbacks.count(tmp_path / "first", 9, "too large")
    rollbacks.count(tmp_path / "second", 9, "too large")
    assert rollbacks.total == 4


def test_noise_and_descent_are_no_spikes() -> None:
    rng = random.Random(0)
    losses = [3 + 7 * math.exp(-step / 50) + rng.gauss(0, 0.05) for step in range(1000)]
    norms = [math.exp(rng.gauss(0, 0.3)) for _ in range(1000)]
    config = StabilityConfig()
    seen = guard(losses, norms, window=config.window, spike=config.spike)
    assert seen.refused == 0
    assert seen.judge(4.5, 1.0) is not None


def test_a_spike_does_not_hide_the_next() -> None:
    seen = guard([1.0, 1.01] * 8 + [50.0] * 2, [1.0] * 18, rollback_after=3)
    assert (seen.refused, seen.in_a_row, seen.gives_up) == (2, 2, False)
    seen.note(50.0, 1.0, seen.judge(50.0, 1.0))
    assert seen.gives_up
    seen.note(1.0, 1.0, seen.judge(1.0, 1.0))
    assert (seen.refused, seen.in_a_row) == (3, 0)
    again = Guard(StabilityConfig(window=32, spike=6.0), seen.state())
    assert again.judge(50.0, 1.0) == seen.judge(50.0, 1.0)
    assert again.refused == 3
    assert torch.tensor(again.state()["losses"]).max() < 2
