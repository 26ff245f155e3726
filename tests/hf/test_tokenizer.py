"""The exported tokenizer gives the ids that the model was trained with, on real text."""

from __future__ import annotations

import io
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError
from loglinear.hf.tokenizer import fast_tokenizer
from tests.hf.runs import exported

transformers = pytest.importorskip("transformers")
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))] + [
    "▁ is no space ▁▁",
    "\U0001f600 中文\x00\x7f",
    "<s>a</s><unk><0x41>",
    " " * 33 + "\t\n\n\n  \n x",
    "\r\n",
]


def sentencepiece_model(path: Path, **options: Any) -> Path:
    """A model trained on a few of the texts, with bytes as ours."""
    model = io.BytesIO()
    fixed = {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False, "minloglevel": 2}
    lines = (line for text in TEXTS[:20] for line in text.splitlines())
    settings = {"vocab_size": 900, "normalization_rule_name": "identity"} | fixed | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


def byte_level(path: Path) -> Path:
    """A tokenizer.json of another library, as many models have it."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    model.train_from_iterator(TEXTS[:20], trainer)
    model.save(str(path))
    return path


def ours(path: Path) -> Path:
    train_tokenizer(TEXTS[:20], 900, path)
    return path


MAKERS = {
    "ours": ours,
    "symbols": lambda path: sentencepiece_model(path, model_type="bpe", user_defined_symbols=["def", "self.", "\n"]),
    "tokenizer.json": byte_level,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_are_those_of_training_on_real_text(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "tokenizer")
    own, fast = Tokenizer(path), fast_tokenizer(path, None)
    for text in TEXTS:
        wanted = own.encode(text)
        assert fast.encode(text).ids == [own.bos_id, *wanted]
        assert fast.decode(wanted) == own.decode(wanted)


def test_a_unigram_model_takes_an_equally_likely_segmentation_at_most(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "tokenizer", model_type="unigram")
    own, fast = Tokenizer(path), fast_tokenizer(path, None)
    scores = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_score
    equal = 0
    for text in TEXTS:
        wanted, found = own.encode(text), fast.encode(text).ids[1:]
        equal += wanted == found
        assert len(found) == len(wanted)
        assert sum(map(scores, found)) == pytest.approx(sum(map(scores, wanted)), rel=1e-6)
        assert fast.decode(found) == own.decode(wanted) == text
    assert equal >= 0.9 * len(TEXTS)


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "tokenizer", model_type="bpe", add_dummy_prefix=True)
    with pytest.raises(UserError, match="cannot be converted: it changes text first, and would give other tokens for"):
        fast_tokenizer(path, None)


def test_transformers_loads_it_and_pads_on_the_left(prepared: DataConfig, tmp_path: Path) -> None:
    _, folder = exported(tmp_path, prepared)
    own, theirs = (
        Tokenizer(folder.parent / "run" / "tokenizer.model"),
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    )
    for text in ("bad cab", "<s> abc ▁ é\n", ""):
        assert theirs(text)["input_ids"] == [own.bos_id, *own.encode(text)]
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    batch = theirs(["bad cab", "a"], padding=True)
    assert batch["input_ids"][1][-2:] == [own.bos_id, *own.encode("a")]
    assert batch["attention_mask"][1] == [0] * (len(batch["input_ids"][0]) - 2) + [1, 1]
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == own.bos_id


def test_the_exported_file_serves_as_the_tokenizer_of_another_run(prepared: DataConfig, tmp_path: Path) -> None:
    _, folder = exported(tmp_path, prepared)
    first, second = Tokenizer(folder.parent / "run" / "tokenizer.model"), Tokenizer(folder / "tokenizer.json")
    assert second.bos_id == first.bos_id
    assert all(second.encode(text) == first.encode(text) for text in TEXTS[-8:])
