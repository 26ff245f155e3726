"""What a prepared folder (`data.dir`) holds, and the records that describe it.

tokenizer.model      the trained tokenizer, unless data.tokenizer.path names another
prepare.json         `Preparation`: the settings and the tokenizer; written before the first shard
train-00000.bin      little-endian tokens of dtype uint16 or uint32, document after document, bos first
held_out-00000.bin   the same, of the documents that are not trained on
shard-00000.json     `Shard`: describes both; written after them, so its presence means that they are whole
index.json           `Index`: the sum of all shards; its presence means that the preparation is complete
prepare.lock         locked while a preparation runs
prepare.log          what a preparation in the background printed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.files import PREPARE_COMMAND, read_json, write_json
from data_pipeline.sources import SHUFFLED_KINDS
from data_pipeline.tokenizer import DType
from loglinear.config import DataConfig
from loglinear.errors import UserError

PREPARATION_FILE = "prepare.json"
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.model"
LOG_FILE = "prepare.log"
EXAMPLES = 20  # names of skipped items that a record keeps a reason

Split = Literal["train", "held_out"]


class Record(BaseModel):
    """Something that is written as JSON and read back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> None:
        """Write it atomically; equal records give equal bytes."""
        write_json(path, self.model_dump(mode="json"))


class Totals(Record):
    """Sizes of a split: tokens with one bos a document, documents, and bytes of text in UTF-8."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            tokens=self.tokens + other.tokens,
            documents=self.documents + other.documents,
            text_bytes=self.text_bytes + other.text_bytes,
        )


class TokenFile(Totals):
    """A file of tokens and its checksum."""

    name: str
    sha256: str


class Skips(Record):
    """How many items were left out for one reason, and the names of the first ones."""

    count: int = 0
    first: tuple[str, ...] = ()

    def __add__(self, other: Skips) -> Skips:
        return Skips(count=self.count + other.count, first=(self.first + other.first)[:EXAMPLES])


class Shard(Record):
    """The items `first_item` (included) to `end_item` (excluded) of the document stream, tokenised."""

    number: int
    first_item: int
    end_item: int
    dtype: DType
    tokenizer_sha256: str
    train: TokenFile
    held_out: TokenFile
    skipped: dict[str, Skips]

    def file(self, split: Split) -> TokenFile:
        """The token file of `split`."""
        return self.train if split == "train" else self.held_out


class Preparation(Record):
    """What the shards of a folder are made from; `vocab_size` counts the tokenizer's pieces."""

    version: Literal[1] = 1
    settings: dict[str, Any]
    tokenizer_sha256: str
    vocab_size: int
    dtype: DType

    def check(self, data: DataConfig, vocab_size: int) -> Self:
        """Itself, if `data` and a model of `vocab_size` ask for just this preparation.

        Raises:
            UserError: a setting differs.
        """
        for name, wanted in settings_of(data, vocab_size).items():
            found = self.settings.get(name)
            if found != wanted:
                raise UserError(
                    f"{data.dir} was prepared with {name} = {_short(found)}, but the configuration says"
                    f" {_short(wanted)}; set another data.dir, or delete {data.dir}"
                    f" and run `{PREPARE_COMMAND}`"
                )
        return self


class Index(Preparation):
    """A complete preparation; `unigram_entropy` is that of the train tokens, in nats."""

    train: Totals
    held_out: Totals
    unigram_entropy: float
    skipped: dict[str, Skips]
    shards: tuple[Shard, ...]


def settings_of(data: DataConfig, vocab_size: int) -> dict[str, Any]:
    """The settings that the prepared bytes depend on, by their names in the configuration."""
    trained = data.tokenizer.path is None
    settings: dict[str, Any] = {
        "data.sources": [source.model_dump(mode="json") for source in data.sources],
        "data.tokenizer": "trained" if trained else "given",
        "data.held_out": data.held_out,
        "data.shard_tokens": data.shard_tokens,
    }
    if trained:
        settings["data.tokenizer.train_bytes"] = data.tokenizer.train_bytes
        settings["model.vocab_size"] = vocab_size
    if any(source.kind in SHUFFLED_KINDS for source in data.sources):
        settings["data.seed"] = data.seed
    return settings


def tokenizer_path(data: DataConfig) -> Path:
    """The tokenizer that `data` names, or the one that its preparation trains."""
    return data.tokenizer.path or data.dir / TOKENIZER_FILE


def shard_path(folder: Path, number: int) -> Path:
    """The record of shard `number`."""
    return folder / f"shard-{number:05d}.json"


def read_preparation(folder: Path) -> Preparation | None:
    """What `folder` is being prepared from, or None if no preparation has come so far.

    Raises:
        UserError: the file is damaged; so too for the two functions below.
    """
    return _read(folder / PREPARATION_FILE, Preparation)


def read_shard(folder: Path, number: int) -> Shard | None:
    """The record of shard `number`, or None if it is not there."""
    return _read(shard_path(folder, number), Shard)


def read_index(folder: Path) -> Index | None:
    """The index, or None if the preparation is not complete."""
    return _read(folder / INDEX_FILE, Index)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def _read(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    try:
        return kind.model_validate(read_json(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            f"{path} is damaged ({where}: {problem['msg']}): delete it and run `{PREPARE_COMMAND}`"
        ) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
