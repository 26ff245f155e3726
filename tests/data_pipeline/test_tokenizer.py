"""No text is lost: any UTF-8 comes back exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError

PIECES = ["\n", " ", "\t", "\r", "▁", "<s>", "<unk>", "<0x41>", "ab", "\0", "é", "\U0001f600", "\u2028"]
any_text = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@pytest.fixture(scope="module")
def tokenizer(prepared: DataConfig) -> Tokenizer:
    return Tokenizer(prepared.dir / "tokenizer.model")


@given(text=any_text)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = tokenizer.encode_batch([text])
    assert tokens[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in tokens[1:]
    assert tokenizer.unk_id not in tokens
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text


def test_training_is_deterministic_and_gives_the_pieces_asked_for(tmp_path: Path, corpus: Path) -> None:
    texts = [path.read_text() for path in sorted(corpus.glob("0*.txt"))]
    for name in "ab":
        train_tokenizer(texts, 280, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Tokenizer(tmp_path / "a").vocab_size == 280


def test_long_lines_do_not_stop_the_training(tmp_path: Path) -> None:
    train_tokenizer(["abc " * 50_000], 266, tmp_path / "model")
    assert Tokenizer(tmp_path / "model").vocab_size == 266


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["ab"], 4096, "model.vocab_size = 4096: the training text is too small .* at most 26"),
        (["ab cd ef"], 100, "model.vocab_size = 100: bytes and frequent characters need 26"),
        ([], 300, "hold no text"),
    ],
)
def test_unfit_training_text_is_explained(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(UserError, match="model is no sentencepiece model"):
        Tokenizer(tmp_path / "model")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: cannot read this tokenizer"):
        Tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bos_id": -1, "byte_fallback": True}, "no bos piece"), ({"byte_fallback": False}, "no byte pieces")],
)
def test_a_model_that_would_lose_text_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    lines = iter(["some words to train on", "and a few more words"])
    with (tmp_path / "model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path / "model")


def test_a_tokenizer_larger_than_the_model_is_refused(prepared: DataConfig) -> None:
    with pytest.raises(UserError, match=r"has 300 pieces, but model.vocab_size is 299"):
        load_tokenizer(prepared.dir / "tokenizer.model", 299)
