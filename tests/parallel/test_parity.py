"""Every mesh computes what one process computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.parallel import World
from loglinear.parallel.context_softmax import Halves
from loglinear.parallel.mesh import Axis, Mesh
from loglinear.parallel.parallelize import parallelize
from loglinear.scaling.parity import PATTERNS, Case
from tests.parallel.parity import (
    BREAKS,
    MESHES,
    count_bytes,
    lose_on_large_logits,
    note_order,
    run_broken,
    run_cases,
    train_cases,
    train_plainly,
)
from tests.processes import exit_codes, start_ranks

RANKS = [1, 2, 4, 8]
EVERY_CASE = [
    Case(mesh, pattern, sequence)
    for mesh in MESHES
    for pattern in PATTERNS
    for sequence in ((True, False) if mesh[2] > 1 else (True,))
]
LEVEL_SCALES = ["none", "static", "scaled", "linear", "mlp_token", "mlp_softmax", "mlp_masked_softmax"]
SPECIAL_CASES = [
    *(Case(mesh, packed=False) for mesh in MESHES),
    *(Case((1, 1, tensor), "log_linear", groups=groups) for tensor in (2, 4) for groups in (2, 4)),
    Case((1, 2, 2), "log_linear", groups=2),
    Case((1, 2, 4), "log_linear", groups=2),
    *(Case((1, 2, 2), "log_linear", level_scale=name) for name in LEVEL_SCALES),
    *(Case(mesh, recomputes=True) for mesh in ((1, 1, 2), (1, 2, 2))),
    Case((1, 3, 1), packed=True),
    Case((1, 3, 1), packed=False),
    *(Case((1, 3, 1), "softmax", packed=packed, seq_len=93) for packed in (True, False)),  # an odd part for each
]
RECOMPUTING = [Case(mesh, recomputes=True) for mesh in ((2, 1, 1), (1, 1, 2), (2, 1, 2))]


def run(ranks: int, target: Callable[..., Any], folder: Path, *args: Any) -> None:
    """Run cases in one start of ranks; nothing may differ in any of them."""
    codes = exit_codes(start_ranks(ranks, target, *args, folder, log=folder / "log"), seconds=600)
    differences = "\n".join(file.read_text() for file in sorted(folder.glob("rank-*"))).strip()
    assert codes == [0] * ranks, differences + (folder / "log").read_text()
    assert not differences, differences


@pytest.mark.parametrize("ranks", RANKS)
def test_loss_logits_and_every_gradient_are_those_of_one_process(tmp_path: Path, ranks: int) -> None:
    """In float64, to 1e-10."""
    run(ranks, run_cases, tmp_path, [case for case in EVERY_CASE if case.ranks == ranks])


@pytest.mark.parametrize("ranks", [*RANKS, 3])
def test_groups_maps_and_whole_sequences_too(tmp_path: Path, ranks: int) -> None:
    run(ranks, run_cases, tmp_path, [case for case in SPECIAL_CASES if case.ranks == ranks])


@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_under_every_zero_stage_are_those_of_one_process(tmp_path: Path, ranks: int) -> None:
    """Losses, gradient norms, first gradients and last weights, in fp32, to 1e-5 of plain PyTorch in float64."""
    truths = {pattern: train_plainly(Case((1, 1, 1), pattern)) for pattern in PATTERNS}
    cases = [(case, stage) for case in EVERY_CASE for stage in (1, 2, 3) if case.ranks == ranks]
    cases += [(case, 3) for case in RECOMPUTING if case.ranks == ranks]
    run(ranks, train_cases, tmp_path, cases, truths)


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_seen(tmp_path: Path, rule: Callable[[Any], None]) -> None:
    case = BREAKS[rule]
    codes = exit_codes(start_ranks(case.ranks, run_broken, rule, case, tmp_path, log=tmp_path / "log"))
    assert codes == [0] * case.ranks, (tmp_path / "log").read_text()
    assert any(file.read_text() for file in tmp_path.glob("rank-*")), "nothing differs without it"


def test_what_context_ranks_send_does_not_grow_with_the_sequence(tmp_path: Path) -> None:
    """One state, one halo and one decay a head and rank, there and back; float32."""
    ranks = 4
    assert exit_codes(start_ranks(ranks, count_bytes, [256, 1024, 4096], tmp_path)) == [0] * ranks
    samples, heads, state, width = 2, 4, 16 * 16, 4
    channels = 2 * 16 + 4 * 16  # keys and queries of one group, values of all heads
    whole = 4 * ranks * samples * (heads * (state + 1) + (width - 1) * channels)
    for file in tmp_path.glob("rank-*"):
        assert json.loads(file.read_text()) == [{"context": 2 * whole * (ranks - 1) // ranks}] * 3


def test_a_loss_over_a_cut_vocabulary_does_not_overflow(tmp_path: Path) -> None:
    run(2, lose_on_large_logits, tmp_path)


def test_weights_gradients_are_computed_while_that_of_the_input_is_summed(tmp_path: Path) -> None:
    """Head; what the MLP reads with; what the mixer reads with."""
    assert exit_codes(start_ranks(2, note_order, tmp_path)) == [0, 0]
    expected = ["start", "weights", "wait"] * 3
    for file in tmp_path.glob("rank-*"):
        assert file.read_text().split() == expected


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("length", [10, 11])
def test_softmax_attention_is_as_much_work_for_every_context_rank(ranks: int, length: int) -> None:
    """Pairs of a query and a key that it sees, counted one by one."""
    computed = []
    for rank in range(ranks):
        halves = Halves(ranks, rank, length)
        computed.append([halves.start(half) + t for half in halves.own for t in range(halves.size(half))])
    assert sorted(query for queries in computed for query in queries) == list(range(ranks * length))
    pairs = [sum(query + 1 for query in queries) for queries in computed]
    assert max(pairs) - min(pairs) <= (length % 2) * ranks * length
    assert max(pairs) < 1.1 * sum(pairs) / ranks


def test_a_mixer_that_has_no_form_over_context_ranks_is_refused() -> None:
    config = Case((1, 2, 1)).config()
    model = build_model(config.model, seed=0)
    model.blocks[0].mixer = nn.Identity()
    sizes = {"data": 1, "context": 2, "tensor": 1, "replicas": 2}
    mesh = Mesh(World(0, 2, torch.device("cpu")), **{name: Axis(name, size, 0, None) for name, size in sizes.items()})
    with pytest.raises(UserError, match=r"Identity has no form .* context ranks: set parallel\.context=1"):
        parallelize(model, mesh, config)
