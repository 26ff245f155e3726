"""What a finished run is good for: its last checkpoint is evaluated and generated from, anywhere."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from data_pipeline.held_out import held_out_batches
from data_pipeline.tokenizer import Tokenizer
from loglinear.checkpoint import load_weights, read_latest
from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.parallel import lone_mesh
from loglinear.parallel.mesh import Axis
from loglinear.train.folder import RunFolder
from loglinear.train.inference import _over, evaluate_run, generate_text, load_model
from tests.processes import exit_codes, start_ranks
from tests.train.small import records

RESULT = re.compile(r"step (\d+): held-out loss ([\d.]+) nats/token, perplexity ([\d.]+)")


def last_held_out(run: Path) -> float:
    return [record["held_out_loss"] for record in records(run) if "held_out_loss" in record][-1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_gives_the_loss_that_training_saw(reference: Path, tmp_path: Path, ranks: int) -> None:
    log = tmp_path / "log"
    assert exit_codes(start_ranks(ranks, evaluate_run, reference, 8, log=log)) == [0] * ranks
    step, loss, perplexity = map(float, RESULT.findall(log.read_text())[0])
    assert step == 24
    assert loss == pytest.approx(last_held_out(reference), abs=6e-5)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)


def test_evaluation_uses_all_held_out_text_unless_told(reference: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert exit_codes(start_ranks(1, evaluate_run, reference, None, log=log)) == [0]
    assert float(RESULT.findall(log.read_text())[0][1]) != pytest.approx(last_held_out(reference), abs=6e-5)


@torch.no_grad()
def surprises(reference: Path) -> dict[int, list[float]]:
    """Of the first 8 held-out samples, one document after the other: by the bit length of the position."""
    config = RunFolder(reference).load_config()
    model = build_model(config.model, 0)
    load_weights(read_latest(reference / "checkpoints").folder, model)
    found: dict[int, list[float]] = defaultdict(list)
    options = {"vocab_size": config.model.vocab_size, "seq_len": config.model.seq_len, "batch": 1, "limit_samples": 8}
    for batch in held_out_batches(config.data, **options):
        inputs, labels = batch.inputs.flatten(), batch.labels.flatten()
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            logits_tv = model(inputs[None, start:end])[0]
            for position, (logits_v, label) in enumerate(zip(logits_tv, labels[start:end].tolist(), strict=True)):
                if label != -100:
                    found[position.bit_length()].append(-float(logits_v.log_softmax(-1)[label]))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_by_position_is_that_of_every_document_alone(reference: Path, tmp_path: Path, ranks: int) -> None:
    run, log = Path(shutil.copytree(reference, tmp_path / "run")), tmp_path / "log"
    assert exit_codes(start_ranks(ranks, evaluate_run, run, 8, True, log=log)) == [0] * ranks
    wanted = surprises(reference)
    assert len(wanted) > 6
    for part in json.loads((run / "positions.json").read_text()):
        values = wanted.pop(part["start"].bit_length())
        assert part["end"] == max(1, 2 * part["start"])
        assert part["tokens"] == len(values)
        assert part["loss"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert not wanted
    assert "4 to 7" in log.read_text()
    assert (run / "positions.png").read_bytes().startswith(b"\x89PNG")


def evaluate_in_a_rank(run: Path, tensor: int, by_position: bool, folder: Path) -> None:
    """Write down the loss, whole."""
    loss = evaluate_run(run, 8, by_position, tensor)
    (folder / f"loss-{os.environ['RANK']}").write_text(repr(loss))


@pytest.mark.parametrize(("ranks", "by_position"), [(2, False), (4, True)])
def test_ranks_that_share_the_weights_give_the_loss_of_one_process(
    reference: Path, tmp_path: Path, ranks: int, by_position: bool
) -> None:
    """Two tensor ranks, alone and twice."""
    run, log = Path(shutil.copytree(reference, tmp_path / "run")), tmp_path / "log"
    codes = exit_codes(start_ranks(ranks, evaluate_in_a_rank, run, 2, by_position, tmp_path, log=log))
    assert codes == [0] * ranks, log.read_text()
    found = surprises(reference)
    total, tokens = sum(map(math.fsum, found.values())), sum(map(len, found.values()))
    for rank in range(ranks):
        assert float((tmp_path / f"loss-{rank}").read_text()) == pytest.approx(total / tokens, abs=1e-6)
    if by_position:
        parts = json.loads((run / "positions.json").read_text())
        assert {part["start"].bit_length(): part["tokens"] for part in parts} == {
            length: len(values) for length, values in found.items()
        }


def test_a_rank_holds_its_part_of_the_weights_alone(reference: Path) -> None:
    folder = RunFolder(reference)
    config = _over(folder.load_config(), 2)
    second = replace(lone_mesh(torch.device("cpu")), tensor=Axis("tensor", 2, 1, None))
    part, whole = (load_model(folder, config, mesh)[0] for mesh in (second, lone_mesh(torch.device("cpu"))))
    assert part.head.weight.shape == (whole.head.weight.shape[0] // 2, whole.head.weight.shape[1])
    assert torch.equal(part.head.weight, whole.head.weight[len(part.head.weight) :])
    assert part.parameter_count() < 0.6 * whole.parameter_count()


def test_weights_that_do_not_divide_are_refused(reference: Path) -> None:
    with pytest.raises(UserError, match=r"--tensor 3: model.mlp_dim \(64\) must be a multiple of parallel.tensor"):
        generate_text(reference, "a", 1, 1.0, 0, tensor=3)


def test_ranks_that_share_the_weights_say_together_what_one_says(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    assert exit_codes(start_ranks(2, generate_text, reference, "abc", 20, 0.8, 3, 2, log=log)) == [0, 0]
    generate_text(reference, "abc", 20, 0.8, 3)
    assert log.read_text() == capsys.readouterr().out


def generated(reference: Path, capsys: pytest.CaptureFixture[str], temperature: float, seed: int) -> str:
    generate_text(reference, "abc \N{GRINNING FACE}", 40, temperature, seed)
    return capsys.readouterr().out


def test_generation_goes_on_from_the_prompt(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(reference, capsys, 0.8, 0)
    assert text.startswith("abc \N{GRINNING FACE}")
    assert len(text) > 30
    assert text == generated(reference, capsys, 0.8, 0)
    assert text != generated(reference, capsys, 0.8, 1)
    assert generated(reference, capsys, 0.0, 0) == generated(reference, capsys, 0.0, 1)


def test_generation_prints_tokens_as_they_come(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write is flushed before the next, so that a reader sees it at once."""
    done: list[str] = []

    class Reader(io.StringIO):
        def write(self, text: str) -> int:
            done.append(text)
            return len(text)

        def flush(self) -> None:
            done.append("flushed")

    monkeypatch.setattr(sys, "stdout", Reader())
    generate_text(reference, "abc", 20, 0.8, 0)
    assert done.count("flushed") == 20
    assert "".join(part for part in done if part != "flushed").startswith("abc")


def test_a_moved_run_still_generates(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = Path(shutil.copytree(reference, tmp_path / "moved"))
    assert generated(moved, capsys, 0.0, 0) == generated(reference, capsys, 0.0, 0)


def test_the_run_keeps_its_tokenizer(reference: Path) -> None:
    assert Tokenizer(reference / "tokenizer.model").vocab_size == 300


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder \(no config.yaml in it\)"):
        generate_text(tmp_path, "a", 1, 1.0, 0)


def test_torchrun_starts_ranks_that_share_an_evaluation(reference: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "loglinear", "eval", str(reference), "--samples", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = RESULT.findall(done.stdout)
    assert float(result[1]) == pytest.approx(last_held_out(reference), abs=6e-5)
