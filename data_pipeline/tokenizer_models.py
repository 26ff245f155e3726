"""The two libraries that tokenise, behind the same few methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from loglinear.errors import UserError

SPACE_MARK = "\u2581"  # sentencepiece writes a space so; the character itself must travel as bytes
LONGEST_LINE = 1 << 16  # characters; sentencepiece takes a hundred times a line's size in memory
LONGEST_BLOCK = 1 << 20  # characters; a list of tokens takes ten times the memory of an array
PROBE = "a  b\n\t\u00e9\u4e2d\U0001f600\ufb01 <\u2581"  # what a tokenizer that keeps text gives back


class SentencePieceModel:
    """A sentencepiece model with byte pieces.

    Attributes:
        vocab_size: number of pieces.
        bos_id: the piece that starts a document.
    """

    def __init__(self, path: Path, proto: bytes) -> None:
        """Load `proto`, the content of `path`.

        Raises:
            UserError: it is no sentencepiece model, has no bos piece or no byte pieces, or would lose text.
        """
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise UserError(f"{path} is no sentencepiece model; delete it and prepare the data again") from None
        self.vocab_size: int = self._model.get_piece_size()
        if self.vocab_size == 0:
            raise UserError(f"{path} is no sentencepiece model; delete it and prepare the data again")
        self.bos_id: int = self._model.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{path} has no bos piece, which must start every document; train it with bos_id")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if self._model.unk_id() in mark:
            raise UserError(f"{path} has no byte pieces, so some text would be lost; train it with byte_fallback")
        self._mark = mark
        # Lines are encoded twice as fast as whole documents; the pieces agree when no piece spans a newline.
        whole, lines = self._model.encode(["a\n b", "a b"]), self._model.encode(["a\n", "a", " b"])
        self._by_line = whole == [lines[0] + lines[2], lines[1] + lines[2]]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                f"{path} would lose text (such as {PROBE!r}): train it with normalization_rule_name=identity and"
                " remove_extra_whitespaces=false"
            )

    def parts(self, text: str) -> Iterator[str]:
        """`text` in parts that can be encoded one after the other."""
        return cut(text, LONGEST_BLOCK) if self._by_line else iter([text])

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos."""
        first, *others = text.split(SPACE_MARK)
        tokens = self._encode_plain(first)
        for part in others:
            tokens += self._mark
            tokens += self._encode_plain(part)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`; bos is left out, and so is what is no piece."""
        return self._model.decode([token for token in tokens if token < self.vocab_size])

    def piece(self, token: int) -> str:
        """A token as the model writes it; "" if it is no piece."""
        return self._model.id_to_piece(token) if token < self.vocab_size else ""

    def _encode_plain(self, text: str) -> list[int]:
        if not self._by_line:
            return self._model.encode(text)
        return list(chain.from_iterable(self._model.encode(list(_lines(text)), num_threads=1)))


def _lines(text: str) -> Iterator[str]:
    """The lines of `text` with their ends; what is very long is cut."""
    *ended, last = text.split("\n")
    for line in (*(line + "\n" for line in ended), last):
        yield from cut(line, LONGEST_LINE)


def cut(text: str, longest: int) -> Iterator[str]:
    """`text` in parts of at most `longest` characters that end with a line, or else before a space, if they can."""
    start = 0
    while len(text) - start > longest:
        line_end = text.rfind("\n", start, start + longest) + 1
        space = text.rfind(" ", start + 1, start + longest)
        end = line_end if line_end > start else space if space > start else start + longest
        yield text[start:end]
        start = end
    yield text[start:] if start else text


class HuggingFaceModel:
    """A `tokenizer.json`.

    Attributes:
        vocab_size: number of pieces, added ones included.
        bos_id: the piece that starts a document.
    """

    def __init__(self, path: Path, content: bytes, bos: str | None) -> None:
        """Load `content` of `path`, whose documents start with the piece `bos`.

        If `bos` is None, it is what the file itself puts first, or else its only special piece.

        Raises:
            UserError: it is no such file, does not tell or not know bos, or would lose text.
        """
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path} is no tokenizer.json ({error}); correct data.tokenizer.path") from None
        model.encode_special_tokens = True  # what looks like one in a text is text
        model.no_padding()
        model.no_truncation()
        self._model = model
        self.vocab_size: int = model.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._find_bos(path, content, bos)
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(f"{path} would lose text (such as {PROBE!r}); take a tokenizer that works on bytes")

    def parts(self, text: str) -> Iterator[str]:
        """`text`: where its pieces end is known to the library alone."""
        yield text

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`; special pieces are left out, and so is what is no piece."""
        return self._model.decode(tokens)

    def piece(self, token: int) -> str:
        """A token as the file writes it; "" if it is no piece."""
        return self._model.id_to_token(token) or ""

    def _find_bos(self, path: Path, content: bytes, bos: str | None) -> int:
        special = [added["content"] for added in json.loads(content).get("added_tokens", []) if added["special"]]
        first = self._model.encode("", add_special_tokens=True).ids[:1]
        if bos is None:
            known = first or [self._id_of(piece) for piece in special]
            if len(known) == 1:
                return known[0]
            raise UserError(
                f"{path} does not tell which piece starts a document: set data.tokenizer.bos to one of"
                f" {', '.join(special) or 'its special pieces, of which it has none'}"
            )
        if bos not in special:
            raise UserError(f"{path} has no special piece {bos!r}: set data.tokenizer.bos to one of {special}")
        return self._id_of(bos)

    def _id_of(self, special: str) -> int:
        token = self._model.token_to_id(special)
        assert token is not None, "added tokens have ids"
        return token
