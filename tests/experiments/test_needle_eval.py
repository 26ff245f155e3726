"""Needles asked of a run: rows by hand, and scores against what the model writes token by token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from data_pipeline.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import Config, DataConfig
from loglinear.experiments.ensemble import score_rows
from loglinear.experiments.examples import Cell, Examples
from loglinear.experiments.needle import FORMS, NEEDLE
from loglinear.experiments.needle_eval import DEPTHS, evaluate_needles, held_out_sentences, needle_rows
from loglinear.model import LanguageModel, build_model
from loglinear.model.generation import generate
from loglinear.train.folder import RunFolder
from tests.corpus import VOCAB
from tests.hf.runs import write_run
from tests.model.model_cases import tiny

CELL = Cell(1024, 1, 2)
HAYSTACK = [f"Sentence number {number} of a text." for number in range(60)]
LEARNED = (("single_1", 0.0, 1), ("single_2", 0.5, 0), ("multikey_1", 1.0, 0))  # form, depth, example


@pytest.fixture(scope="module")
def run(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Path]:
    """A model that has learned three answers by heart, and its run."""
    config = tiny(("log_linear", "softmax"), vocab_size=VOCAB, dim=48, init_std=0.1)
    folder = tmp_path_factory.mktemp("needles") / "run"
    model = build_model(config, 0)
    whole = Config.model_validate({"model": config.model_dump(), "data": prepared.model_dump()})
    haystack = held_out_sentences(whole, Tokenizer(prepared.dir / "tokenizer.model"), 4 * CELL.length)
    rows = [cell_rows(form, depth, haystack, prepared).take(slice(row, row + 1)) for form, depth, row in LEARNED]
    learn(model, rows)
    return model.eval(), write_run(folder, config, model, prepared)


def cell_rows(form: str, depth: float, haystack: list[str], data: DataConfig) -> Examples:
    return needle_rows(form, CELL, depth, haystack, Tokenizer(data.dir / "tokenizer.model"))


def learn(model: LanguageModel, rows: list[Examples]) -> None:
    """Train on the rows' answers alone until every token of them is the likeliest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        parts = [score_rows(model, row) for row in rows]
        if all(bool((hits | (row.labels_en < 0)).all()) for (_, hits), row in zip(parts, rows, strict=True)):
            return
        optimizer.zero_grad()
        sum(losses.sum() for losses, _ in parts).backward()
        optimizer.step()
    raise AssertionError("the model learned nothing")


def greedy_is_right(model: LanguageModel, rows: Examples, row: int) -> bool:
    """Whether the model, asked with the row's prompt, writes its answer, a token at a time."""
    assert rows.positions_en is not None
    answer = [label for label in rows.labels_en[row].tolist() if label >= 0]
    prompt = rows.tokens_et[row, : int(rows.positions_en[row, 0]) + 1].tolist()
    return list(generate(model, prompt, len(answer), temperature=0)) == answer


def test_scores_are_what_the_model_writes_token_by_token(
    run: tuple[LanguageModel, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = run
    scores = evaluate_needles(folder, [CELL.length], CELL.examples)
    assert [(score.form, score.depth) for score in scores] == [(form, depth) for form in FORMS for depth in DEPTHS]
    found = {(score.form, score.depth): score.right for score in scores}
    config = RunFolder(folder).load_config()
    haystack = held_out_sentences(config, Tokenizer(folder / "tokenizer.model"), 4 * CELL.length)
    for form, depth in [*((form, depth) for form, depth, _ in LEARNED), ("single_2", 0.0), ("single_3", 0.5)]:
        rows = cell_rows(form, depth, haystack, config.data)
        assert found[form, depth] == sum(greedy_is_right(model, rows, row) for row in range(CELL.examples))
    assert [found[form, depth] >= 1 for form, depth, _ in LEARNED] == [True] * 3
    assert sum(found.values()) < len(scores), "else a model that is always right would do"
    written = json.loads((folder / "needles.json").read_text())
    assert [(line["form"], line["depth"], line["right"]) for line in written] == [
        (form, depth, right) for (form, depth), right in found.items()
    ]
    assert (folder / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"single_1\W+1,024\W+[12]\W", capsys.readouterr().out)


@pytest.mark.parametrize("form", FORMS)
def test_the_needle_that_is_asked_for_lies_at_its_depth(form: str, prepared: DataConfig) -> None:
    tokenizer = Tokenizer(prepared.dir / "tokenizer.model")
    sentence = "There and back again." if FORMS[form].haystack == "noise" else "of a text."
    for depth in DEPTHS:
        rows = needle_rows(form, Cell(2048, 1, 1), depth, HAYSTACK, tokenizer)
        assert rows.positions_en is not None
        text = tokenizer.decode(rows.tokens_et[0, : int(rows.positions_en[0, 0]) + 1].tolist())
        kind, key = re.findall(r"What is the special magic (\w+) for (\S+) mentioned", text)[0]
        value = tokenizer.decode([label for label in rows.labels_en[0].tolist() if label >= 0]).strip()
        before, after = text.split(NEEDLE.format(kind=kind, key=key, value=value))
        share = depth * text.count(sentence)
        assert text.count(sentence) > 10
        assert abs(before.count(sentence) - share) <= 0.5
        assert after.count(sentence) == text.count(sentence) - before.count(sentence)


def test_the_haystack_is_held_out_text(prepared: DataConfig, corpus: Path, run: tuple[LanguageModel, Path]) -> None:
    tokenizer = Tokenizer(prepared.dir / "tokenizer.model")
    pieces = held_out_sentences(RunFolder(run[1]).load_config(), tokenizer, 1_000)
    lines = {line for path in corpus.glob("[0-9]*.txt") for line in path.read_text().splitlines()}
    train = ShardReader(prepared.dir, "train", tokenizer.sha256)
    trained_on = set(tokenizer.decode(train.read(0, train.tokens)).splitlines())
    assert len(pieces) > 20
    assert set(pieces[:-1]) <= lines, "the last may be cut"
    assert trained_on & lines, "else nothing is known of it"
    assert not set(pieces) & trained_on
