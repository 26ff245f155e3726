"""What the commands about prepared data say, against counts by hand and damage done on purpose."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.contamination import GRAM, check_contamination, gram_starts
from data_pipeline.encode import is_held_out
from data_pipeline.inspection import histogram, inspect
from data_pipeline.manifest import read_index
from data_pipeline.prepare import prepare, prepare_all
from data_pipeline.verify import verify
from loglinear.cli import app
from loglinear.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from loglinear.errors import UserError
from tests.corpus import SEQ_LEN, VOCAB, data_config


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def source(path: Path, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"kind": "jsonl", "path": str(path), **options})


def inspected(data: DataConfig, documents: int = 0) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    inspect(data, VOCAB, SEQ_LEN, documents, console)
    return console.export_text()


def config_file(data: DataConfig) -> str:
    path = data.dir.with_suffix(".yaml")
    path.write_text(Config(model=ModelConfig(vocab_size=VOCAB, seq_len=SEQ_LEN), data=data).to_yaml())
    return str(path)


def test_inspect_counts_documents_and_lengths(prepared: DataConfig) -> None:
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in sorted(prepared.dir.glob("train-*.bin"))])
    starts = np.flatnonzero(tokens == 1)
    lengths = np.diff([*starts, len(tokens)])
    said = inspected(prepared)
    assert f"of {len(lengths)}: least {lengths.min()}, median {np.median(lengths):.0f}" in said
    assert f"most {lengths.max():,}" in said
    bars = re.findall(r"from +([\d,]+) +([\d,]+) +█+", said)
    assert sum(int(count) for _, count in bars) == len(lengths)
    for least, count in bars:
        low = int(least.replace(",", ""))
        assert int(count) == ((lengths >= low) & (lengths < 2 * low)).sum()
    index = read_index(prepared.dir)
    assert index is not None
    assert re.search(
        rf"all +│ +{len(lengths)} │ +{len(tokens):,} │ +[\d.]+ │ 100.00% │ +- │ +"
        rf"{index.held_out.documents} │",
        said,
    )


def test_inspect_shows_documents_as_text_and_pieces(prepared: DataConfig, corpus: Path) -> None:
    said = inspected(prepared, documents=3)
    texts = [path.read_text().splitlines()[0] for path in corpus.glob("0*.txt")]
    assert sum(text in said for text in texts) >= 3
    assert said.count("as text and as pieces") == 3
    assert said.count("<s> | ") == 3


def test_inspect_shows_the_shares_of_a_mixture(tmp_path: Path) -> None:
    for name, count in (("much", 60), ("little", 20)):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} text number {i} of some words" for i in range(count)])
    sources = tuple(source(tmp_path / f"{n}.jsonl", name=n, weight=w) for n, w in (("much", 1), ("little", 3)))
    data = data_config(tmp_path / "out", tmp_path, sources=sources)
    indices = prepare_all(data, 290)
    console = Console(width=160, record=True, file=(tmp_path / "said").open("w"))
    inspect(data, 290, SEQ_LEN, 0, console)
    said = console.export_text()
    total = sum(index.train.tokens for index in indices.values())
    for name, asked in (("much", "25.00%"), ("little", "75.00%")):
        share = f"{indices[name].train.tokens / total:.2%}"
        assert re.search(rf"{name} .*{share} │ +{asked}", said)


def test_histogram_by_hand() -> None:
    assert histogram([2, 3, 4, 9, 15]) == [(2, 2), (4, 1), (8, 2)]


def test_what_is_not_complete_is_not_inspected(own: DataConfig) -> None:
    (own.dir / "index.json").unlink()
    with pytest.raises(UserError, match="not completely prepared: run `loglinear data prepare"):
        inspected(own)


@pytest.mark.parametrize("complete", [True, False])
def test_verify_names_every_file_that_is_not_whole(own: DataConfig, complete: bool) -> None:
    if not complete:
        (own.dir / "index.json").unlink()
    seen: list[tuple[int, int]] = []
    assert verify(own, VOCAB, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (len(list(own.dir.glob("*.bin"))),) * 2
    flipped, cut, gone = (own.dir / name for name in ("train-00001.bin", "held_out-00002.bin", "train-00004.bin"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-2])
    gone.unlink()
    problems = "\n".join(verify(own, VOCAB))
    assert "train-00001.bin is damaged" in problems
    assert "held_out-00002.bin is truncated" in problems
    assert "train-00004.bin is missing" in problems
    assert len(problems.splitlines()) == 3
    prepare_again = own.dir / "train-00001.bin"
    prepare_again.unlink()
    prepare(own, VOCAB)
    assert verify(own, VOCAB) == []


def test_the_verify_command(own: DataConfig) -> None:
    arguments = ["data", "verify", config_file(own)]
    assert "every file is whole" in CliRunner().invoke(app, arguments).output
    (own.dir / "train-00000.bin").write_bytes(b"")
    done = CliRunner().invoke(app, arguments)
    assert "train-00000.bin is truncated" in done.output
    assert isinstance(done.exception, UserError)
    assert "1 files are missing or damaged" in str(done.exception)


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(count))


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, list[str]]:
    """Two sources whose training texts hold: a passage of one held-out text, almost a gram of another, nothing of
    the others; the held-out texts, in their order."""
    folder = tmp_path_factory.mktemp("overlapping")
    rng = random.Random(1)
    texts = [words(rng, 120) for _ in range(120)]
    held_out = [text for text in texts if is_held_out(text, 0.2)]
    assert len(held_out) > 5
    other = [f"{words(rng, 30)} {held_out[3][100:420]} {words(rng, 30)} {i}" for i in range(2)]
    other += [words(rng, 80) for _ in range(40)] + [f"{words(rng, 9)} {held_out[4][100:160]} {words(rng, 9)}"]
    other = [text for text in other if not is_held_out(text, 0.2)]
    write_jsonl(folder / "a.jsonl", texts)
    write_jsonl(folder / "b.jsonl", other)
    sources = tuple(source(folder / f"{name}.jsonl", name=name, weight=1) for name in "ab")
    data = data_config(folder / "out", folder, sources=sources)
    prepare_all(data, VOCAB)
    return data, held_out


def windows(file: Path) -> set[tuple[int, ...]]:
    """All windows of `GRAM` tokens of one document, by definition."""
    tokens = np.fromfile(file, "<u2").tolist()
    found = (tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1))
    return {window for window in found if 1 not in window}


def test_contamination_is_what_a_set_of_all_windows_says(overlapping: tuple[DataConfig, list[str]]) -> None:
    data, _ = overlapping
    report = check_contamination(data, VOCAB)
    train = set().union(*map(windows, data.dir.rglob("train-*.bin")))
    contaminated = documents = 0
    for name in "ab":
        for file in sorted((data.dir / name).glob("held_out-*.bin")):
            tokens = np.fromfile(file, "<u2").tolist()
            starts = [i for i, token in enumerate(tokens) if token == 1]
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=False):
                documents += 1
                contaminated += any(tuple(tokens[i : i + GRAM]) in train for i in range(start + 1, end - GRAM + 1))
    assert report.held_out_documents == documents
    assert report.contaminated_documents == contaminated == 1
    assert report.copied_documents == 0


def test_a_gram_lies_within_a_document() -> None:
    tokens = np.full(400, 7)
    tokens[[0, 30, 80, 81, 131, 240, 395]] = 1
    wanted = [i for i in range(400 - GRAM + 1) if 1 not in tokens[i : i + GRAM]]
    assert gram_starts(tokens, 1).tolist() == wanted
    assert len(gram_starts(tokens[:20], 1)) == 0


def test_the_report_shows_the_passage(overlapping: tuple[DataConfig, list[str]], tmp_path: Path) -> None:
    data, held_out = overlapping
    (example,) = check_contamination(data, VOCAB).examples
    assert example["held_out_document"] == 3
    assert str(example["train_file"]).startswith(str(data.dir / "b" / "train-"))
    assert str(example["text"])[:40] in held_out[3]
    out = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["data", "contamination", config_file(data), "--out", str(out)])
    assert done.exit_code == 1
    assert "held-out documents share 50 tokens in a row with training data; 0 are there as a whole" in done.output
    assert json.loads(out.read_text())["contaminated_documents"] == 1


def test_short_documents_are_compared_as_a_whole(overlapping: tuple[DataConfig, list[str]], tmp_path: Path) -> None:
    """Only a changed fraction can bring a text to both sides: one source is prepared with another."""
    texts = [f"short text {number}" for number in range(60)]
    write_jsonl(tmp_path / "short.jsonl", texts)
    data = data_config(tmp_path / "out", tmp_path, sources=(source(tmp_path / "short.jsonl"),), held_out=0.5)
    tokens = {}
    for fraction in (0.5, 0.1):
        at = data.model_copy(update={"held_out": fraction, "dir": tmp_path / f"out{fraction}"})
        if fraction == 0.1:
            given = TokenizerConfig(path=tmp_path / "out0.5" / "tokenizer.model")
            at = at.model_copy(update={"tokenizer": given})
        prepare(at, 280)
        tokens[fraction] = {file.name: file for file in at.dir.glob("*.bin")}
    report = check_contamination(data.model_copy(update={"dir": tmp_path / "out0.5"}), 280)
    assert report.copied_documents == report.contaminated_documents == 0
    # Train on texts that the other fraction holds out: its train file and record in place of ours.
    mixed = tmp_path / "out0.5"
    (mixed / "train-00000.bin").write_bytes(tokens[0.1]["train-00000.bin"].read_bytes())
    ours = json.loads((mixed / "index.json").read_text())
    theirs = json.loads((tmp_path / "out0.1" / "index.json").read_text())
    ours["train_files"] = theirs["train_files"]
    (mixed / "index.json").write_text(json.dumps(ours))
    report = check_contamination(data.model_copy(update={"dir": mixed}), 280)
    expected = sum(is_held_out(text, 0.5) and not is_held_out(text, 0.1) for text in texts)
    assert report.copied_documents == report.contaminated_documents == expected > 5


def test_clean_data_end_with_0(prepared: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(Config(model=ModelConfig(vocab_size=VOCAB, seq_len=SEQ_LEN), data=prepared).to_yaml())
    done = CliRunner().invoke(app, ["data", "contamination", str(file)])
    assert done.exit_code == 0
    assert done.output.splitlines()[-1].startswith("0 of ")
