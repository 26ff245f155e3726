"""docs/tutorial.md from top to bottom: its commands run as they stand there, on models that are smaller."""

from __future__ import annotations

import os
from pathlib import Path

from loglinear.config import load_config
from tests.corpus import write_corpus
from tests.docs.pages import ROOT, blocks, parts, read, shell_commands
from tests.processes import exit_codes, start_ranks, wait_for

PAGE = read("docs/tutorial.md")
ELSEWHERE = {"On one GPU", "On two nodes under SLURM"}  # these parts need what is not here; their commands are parsed
PATIENCE = 240.0  # seconds that a command may take before the test fails
TINY = [
    "model.vocab_size=300",
    "model.seq_len=32",
    "model.dim=16",
    "model.layers=1",
    "model.mlp_dim=16",
    "model.log_linear={heads: 2, head_dim: 8, state_dim: 8}",
    "data.tokenizer.train_bytes=20000",
    "data.shard_tokens=2000",
    "data.shuffle_window=32",
    "data.held_out=0.2",
    "train.steps=30",
    "eval.samples=4",
    "eval.generate_tokens=4",
    "checkpoint.every=10",
]


def shrink(text: str, path: Path, *changes: str) -> None:
    """Write a configuration of the page to `path`, smaller."""
    path.write_text(text)
    path.write_text(load_config(path, [*TINY, *changes]).to_yaml())


def run(folder: Path, words: list[str]) -> str:
    """What a command says; it must succeed."""
    log = folder / "said.log"
    log.write_text("")
    assert exit_codes(start_ranks(1, _command, folder, words, log=log), PATIENCE) == [0], (words, log.read_text())
    return log.read_text()


def _command(folder: Path, words: list[str]) -> None:
    from loglinear.cli import app

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)  # of what is started in the background
    app(words)


def _python(folder: Path, code: str) -> None:
    os.chdir(folder)
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    exec(code, {})


def test_the_tutorial_runs(tmp_path: Path) -> None:
    write_corpus(tmp_path / "texts")
    (tmp_path / "texts/latin.txt").unlink()  # a source of texts refuses what is not UTF-8
    (tmp_path / "configs").mkdir()
    stdlib = "data.sources=[{kind: folder, path: texts}]"
    shrink((ROOT / "configs/quickstart.yaml").read_text(), tmp_path / "configs/quickstart.yaml", stdlib)
    shrink(blocks(PAGE, "yaml")[0], tmp_path / "my_run.yaml")
    assert "$(BIN)/loglinear train configs/quickstart.yaml\n" in (ROOT / "Makefile").read_text()  # make quickstart
    run(tmp_path, ["train", "configs/quickstart.yaml"])
    said: list[str] = []
    for part in (text for title, text in parts(PAGE).items() if title not in ELSEWHERE):
        for name, *words in shell_commands(part):
            if name == "loglinear" and "--tasks" not in words:  # which need a network
                said.append(run(tmp_path, words))
            if words[0] == "submit":  # a reader looks after a while
                wait_for((tmp_path / "runs/rehearsal/metrics.jsonl").exists, PATIENCE)
    assert len(said) == 14
    assert (tmp_path / "runs/quickstart/checkpoints/step-00000300").is_dir()
    assert (tmp_path / "runs/quickstart/positions.png").exists()
    assert (tmp_path / "runs/my_run/loss.png").exists()
    (code,) = blocks(PAGE, "python")
    log = tmp_path / "python.log"
    assert exit_codes(start_ranks(1, _python, tmp_path, code, log=log), PATIENCE) == [0], log.read_text()
    assert "class Parser:" in log.read_text()
