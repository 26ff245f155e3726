"""No text is lost: any UTF-8 comes back exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data_pipeline.tokenizer_models import cut
from loglinear.config import DataConfig, TokenizerConfig
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
    assert 0 not in tokens, "the unknown piece"
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text


def test_training_is_deterministic_and_gives_the_pieces_asked_for(tmp_path: Path, corpus: Path) -> None:
    texts = [path.read_text() for path in sorted(corpus.glob("0*.txt"))]
    for name in "ab":
        train_tokenizer(texts, 280, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Tokenizer(tmp_path / "a").vocab_size == 280


@pytest.mark.parametrize("text", ["word " * 100_000, "x" * 300_000, "\n" * 200_000, "ab▁ " * 7_000])
def test_long_lines_are_cut_without_a_trace(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    if " " in text and "▁" not in text:
        once = tokenizer.encode("word " * 100)
        assert tokens[: len(once) - 9] == once[:-9]
        assert tokenizer.pieces(tokens).count("▁") == tokenizer.pieces(once).count("▁") * 1000


def test_cuts_are_at_lines_or_before_spaces_where_they_can_be() -> None:
    assert list(cut("ab\ncd ef gh", 6)) == ["ab\n", "cd ef", " gh"]
    assert list(cut("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(cut("", 3)) == [""]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A byte-level BPE as GPT-2's, trained by the library."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train([str(path) for path in sorted(corpus.glob("0*.txt"))], trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


@given(text=st.one_of(any_text, st.sampled_from(["<|endoftext|>", "a<|endoftext|>b"])))
def test_a_tokenizer_json_keeps_text_too(byte_level: Path, text: str) -> None:
    tokenizer = Tokenizer(byte_level)
    (tokens,) = tokenizer.encode_batch([text])
    assert tokens[0] == tokenizer.bos_id == 0
    assert 0 not in tokens[1:], "what looks like bos in a text is text"
    assert tokenizer.decode(tokens) == text
    assert tokens[1:].tolist() == tokenizer.encode(text)


def test_a_tokenizer_json_encodes_as_its_library_does(byte_level: Path, corpus: Path) -> None:
    text = (corpus / "000.txt").read_text()
    library = tokenizers.Tokenizer.from_file(str(byte_level))
    ours = Tokenizer(byte_level)
    assert ours.encode(text) == library.encode(text).ids
    assert ours.pieces(ours.encode(text)) == library.encode(text).tokens
    assert ours.vocab_size == 400


def test_data_are_prepared_with_a_tokenizer_json(byte_level: Path, configure: Callable[..., DataConfig]) -> None:
    data = configure(tokenizer=TokenizerConfig(path=byte_level))
    index = prepare(data, 400)
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in sorted(data.dir.glob("train-*.bin"))])
    assert (tokens == 0).sum() == index.train.documents > 0


def with_special(path: Path, *names: str) -> Path:
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_special_tokens(list(names))
    changed = path.with_name("more.json")
    model.save(str(changed))
    return changed


def test_another_bos_is_another_preparation(byte_level: Path, configure: Callable[..., DataConfig]) -> None:
    """Else documents of one would be looked for by the other, and not found."""
    path = with_special(byte_level, "<|pad|>")
    data = configure(tokenizer=TokenizerConfig(path=path, bos="<|endoftext|>"))
    prepare(data, 401)
    other = data.model_copy(update={"tokenizer": TokenizerConfig(path=path, bos="<|pad|>")})
    with pytest.raises(UserError, match=r"prepared with data.tokenizer.bos = .*endoftext.*configuration says .*pad"):
        prepare(other, 401)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_what_is_no_piece_has_no_text(prepared: DataConfig, byte_level: Path, kind: str) -> None:
    """A model may have more embeddings than the tokenizer has pieces, and write any of them before it has learned."""
    tokenizer = Tokenizer(byte_level if kind == "tokenizer.json" else prepared.dir / "tokenizer.model")
    tokens = tokenizer.encode("some text")
    strange = [tokenizer.vocab_size, *tokens, tokenizer.vocab_size + 99]
    assert tokenizer.decode(strange) == "some text"
    assert tokenizer.pieces(strange) == ["", *tokenizer.pieces(tokens), ""]


def test_bos_is_asked_for_where_the_file_does_not_tell_it(byte_level: Path) -> None:
    path = with_special(byte_level, "<|pad|>")
    with pytest.raises(UserError, match=r"set data.tokenizer.bos to one of <\|endoftext\|>, <\|pad\|>"):
        Tokenizer(path)
    assert Tokenizer(path, "<|pad|>").bos_id == 400
    with pytest.raises(UserError, match="no special piece '<s>'"):
        Tokenizer(path, "<s>")


def test_bos_is_what_the_file_puts_first(byte_level: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(with_special(byte_level, "<s>", "</s>")))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 400), ("</s>", 401)]
    )
    path = byte_level.with_name("llama.json")
    model.save(str(path))
    tokenizer = Tokenizer(path)
    assert tokenizer.bos_id == 400
    assert 401 not in tokenizer.encode("text")


def test_a_tokenizer_json_that_loses_text_is_refused(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.add_special_tokens(["[CLS]"])
    model.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"words.json would lose text"):
        Tokenizer(tmp_path / "words.json")


def test_a_json_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.json is no tokenizer.json"):
        Tokenizer(tmp_path / "other.json")


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
    [
        ({"bos_id": -1, "byte_fallback": True}, "no bos piece"),
        ({"byte_fallback": False}, "no byte pieces"),
        ({"byte_fallback": True}, "would lose text .* normalization_rule_name=identity"),
        ({"byte_fallback": True, "normalization_rule_name": "nfkc", "remove_extra_whitespaces": False}, "would lose"),
    ],
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
