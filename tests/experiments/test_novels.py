"""Novels as rows, and needles in haystacks."""

from __future__ import annotations

import json
import lzma
import re
import uuid
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.tokenizer import Tokenizer
from loglinear.errors import UserError
from loglinear.experiments.examples import Cell
from loglinear.experiments.needle import FORMS, NOISE, _longest, make_prompt, needle_examples, split_sentences
from loglinear.experiments.novels import Novel, next_token_rows, novels_tokenizer, read_novels, tokenise
from tests.experiments.small import book

SENTENCES = split_sentences(book(0))


@pytest.fixture(scope="module")
def novels() -> list[Novel]:
    return [Novel(f"book {seed}", book(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def tokenizer(novels: list[Novel], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return novels_tokenizer(novels, 512, 20_000, tmp_path_factory.mktemp("tokenizer"))


def test_rows_follow_each_other_within_a_document_and_rests_are_left_out() -> None:
    examples, owner = next_token_rows([np.arange(10), np.arange(100, 104), np.arange(20, 29)], 4)
    assert examples.tokens_et.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [20, 21, 22, 23], [24, 25, 26, 27]]
    assert examples.labels_en.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [21, 22, 23, 24], [25, 26, 27, 28]]
    assert owner == [0, 0, 2, 2]
    few, owner = next_token_rows([np.arange(10), np.arange(20, 29)], 4, most=1)
    assert few.tokens_et[:, 0].tolist() == [0, 20]
    assert owner == [0, 1]
    with pytest.raises(UserError, match="no document has 11 tokens"):
        next_token_rows([np.arange(10)], 10)


def test_novels_are_read_in_their_order(tmp_path: Path, novels: list[Novel]) -> None:
    path = tmp_path / "train.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"source": novel.source, "text": novel.text}) + "\n" for novel in novels)
    assert read_novels(path) == novels
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="holds no JSON lines"):
        read_novels(path)
    with pytest.raises(UserError, match=r"cannot read .*absent.*--novels"):
        read_novels(tmp_path / "absent")


def test_kept_tokens_are_those_of_the_text(tmp_path: Path, novels: list[Novel], tokenizer: Tokenizer) -> None:
    for _ in range(2):
        found = tokenise(tokenizer, novels, tmp_path)
        assert [tokenizer.decode(tokens[1:]) for tokens in found] == [novel.text for novel in novels]
        assert {int(tokens[0]) for tokens in found} == {tokenizer.bos_id}
    assert len(list(tmp_path.iterdir())) == 1, "made once"
    tokenise(tokenizer, novels[:2], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "other novels are other tokens"


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_asks_for_a_needle_that_it_holds(name: str) -> None:
    form, rng = FORMS[name], np.random.default_rng(0)
    for _ in range(20):
        prompt = make_prompt(form, SENTENCES, 30, rng)
        kind = form.value
        needles = dict(re.findall(rf"One of the special magic {kind}s for (\w+-\w+) is: ([\w-]+)\.", prompt.text))
        assert len(needles) == form.needles
        asked = re.search(rf"What is the special magic {kind} for (\S+) mentioned in the provided text\? ", prompt.text)
        assert asked is not None
        assert prompt.answer == " " + needles[asked[1]]
        if kind == "number":
            assert 10**6 <= int(needles[asked[1]]) < 10**7
        else:
            assert uuid.UUID(needles[asked[1]]).version == 4
        assert prompt.text.endswith(f"The special magic {kind} for {asked[1]} mentioned in the provided text is")
        assert prompt.text.count(NOISE) == (30 if form.haystack == "noise" else 0)


def test_a_prompt_of_ruler_by_hand() -> None:
    """RULER's niah_single_1 with three sentences of noise."""
    prompt = make_prompt(FORMS["single_1"], [], 3, np.random.default_rng(4))
    lines = prompt.text.split("\n")
    needle = next(line for line in lines if line.startswith("One of"))
    key, value = re.fullmatch(r"One of the special magic numbers for (\S+) is: (\d{7})\.", needle).groups()  # type: ignore[union-attr]
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it."
        " I will quiz you about the number afterwards."
    )
    assert sorted(lines[1:5]) == sorted([needle, *[NOISE] * 3])
    assert lines[5:] == [
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    ]
    assert prompt.answer == f" {value}"


def test_needles_lie_anywhere() -> None:
    """Forty depths from the first sentence to the end, all alike."""
    rng, places = np.random.default_rng(0), []
    for _ in range(2_000):
        hay = make_prompt(FORMS["single_1"], [], 39, rng).text.split("\n")[1:-1]
        places.append(next(index for index, line in enumerate(hay) if line != NOISE))
    counts = np.bincount(places, minlength=40)
    assert len(counts) == 40
    assert np.abs(counts - 50).max() < 5 * 50**0.5


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_needles_fill_their_length_and_their_labels_are_the_answer(name: str, tokenizer: Tokenizer) -> None:
    examples = needle_examples(FORMS[name], Cell(1536, 1, 4), SENTENCES, tokenizer, np.random.default_rng(0))
    assert examples.positions_en is not None
    for tokens, positions, labels in zip(
        examples.tokens_et.tolist(), examples.positions_en.tolist(), examples.labels_en.tolist(), strict=True
    ):
        due = [(position, label) for position, label in zip(positions, labels, strict=True) if label >= 0]
        assert [tokens[position + 1] for position, _ in due] == [label for _, label in due]
        end = due[-1][0] + 2
        assert 1536 - 120 < end <= 1536, "one more sentence would not fit"
        assert tokens[end:] == [0] * (1536 - end)
        text = tokenizer.decode(tokens[1:end])
        asked = re.findall(r"for (\S+) mentioned", text)[0]
        assert f"for {asked} is:{tokenizer.decode([label for _, label in due])}." in text


def test_a_haystack_that_is_too_small_is_refused(tokenizer: Tokenizer) -> None:
    for length, hay in ((40, SENTENCES), (1536, SENTENCES[:3])):
        with pytest.raises(UserError, match=f"needles in {length} tokens need"):
            needle_examples(FORMS["single_2"], Cell(length, 1, 1), hay, tokenizer, np.random.default_rng(0))


def test_the_longest_that_fits_is_found() -> None:
    for limit in (1, 7, 100):
        for most in range(limit + 3):
            tried: list[int] = []
            assert _longest(lambda n, most=most, tried=tried: tried.append(n) or n <= most, limit) == min(most, limit)
            assert max(tried) <= max(1, 2 * most), "what is far too long costs too much to try"
