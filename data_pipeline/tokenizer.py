"""Tokenizers: sentencepiece, trained here or given, and tokenizer.json files. Trained here, they keep any UTF-8 text
exactly: decode(encode(text)) == text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.files import write_bytes
from data_pipeline.tokenizer_models import HuggingFaceModel, SentencePieceModel
from loglinear.errors import UserError

DType = Literal["uint16", "uint32"]

LINE_CHARS = 4000  # a training sentence's longest: the trainer counts symbols of a word in 16 bits


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-fallback BPE model of `vocab_size` pieces on `texts` and write it atomically to `path`.

    The same texts give the same file, byte for byte.

    Raises:
        UserError: there is too little text for so many pieces, or too few pieces for bytes and characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * LINE_CHARS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from error
    write_bytes(path, model.getvalue())


class Tokenizer:
    """A loaded tokenizer: a sentencepiece model, or a `tokenizer.json` of Hugging Face's tokenizers.

    Attributes:
        vocab_size: number of pieces.
        bos_id: the piece that starts every document and stands nowhere else.
        sha256: fingerprint of the file.
    """

    def __init__(self, path: Path, bos: str | None = None) -> None:
        """Load `path`.

        Args:
            path: the file; its content tells which kind it is.
            bos: the piece that starts a document, where a tokenizer.json does not tell it.

        Raises:
            UserError: the file is missing or no tokenizer, has no bos piece, or would lose text.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read this tokenizer ({error.strerror}); correct its path") from None
        model = HuggingFaceModel(path, content, bos) if content[:1] == b"{" else SentencePieceModel(path, content)
        self._model = model
        self.vocab_size = model.vocab_size
        self.bos_id = model.bos_id
        self.sha256 = hashlib.sha256(content).hexdigest()

    @property
    def dtype_name(self) -> DType:
        """The smallest unsigned type that holds every token."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos."""
        return [token for part in self._model.parts(text) for token in self._model.encode(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of `dtype_name` a text: bos, then its pieces."""
        return [self._encode_array(text) for text in texts]

    def _encode_array(self, text: str) -> np.ndarray:
        parts = (self._model.encode(part) for part in self._model.parts(text))
        return np.concatenate([np.array(tokens, self.dtype_name) for tokens in ([self.bos_id], *parts)])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bos is left out."""
        return self._model.decode([int(token) for token in tokens])

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Every token as the tokenizer writes it."""
        return [self._model.piece(int(token)) for token in tokens]


def load_tokenizer(path: Path, vocab_size: int, bos: str | None = None) -> Tokenizer:
    """The tokenizer in `path`, for a model of `vocab_size` embeddings.

    Raises:
        UserError: the file is missing or unfit, or has more pieces than the model has embeddings.
    """
    tokenizer = Tokenizer(path, bos)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} pieces, but model.vocab_size is {vocab_size};"
            f" set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[i : i + LINE_CHARS] for i in range(0, len(line), LINE_CHARS))


def _explain(message: str, vocab_size: int) -> str:
    """The trainer's complaint as one sentence."""
    if "too high" in message:
        most = message.rpartition("<=")[2].strip(" .")
        return (
            f"model.vocab_size = {vocab_size}: the training text is too small for so many pieces;"
            f" set it to at most {most}, or give more text"
        )
    if "smaller than required_chars" in message:
        least = message.partition(" vs ")[2].partition(".")[0]
        return f"model.vocab_size = {vocab_size}: bytes and frequent characters need {least}; set it higher"
    if "sentences_.empty()" in message:
        return "data.sources: they hold no text to train a tokenizer on; add a source with text"
    return f"training the tokenizer failed: {message}"
