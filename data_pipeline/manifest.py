"""What a prepared folder (`data.dir`) holds, and the records that describe it.

Of a mixture, `data.dir` holds the tokenizer with its prepare.json, and a prepared folder for each source.

tokenizer.model      the trained tokenizer, unless data.tokenizer.path names another
prepare.json         `Preparation`: the settings and the tokenizer; written before the first shard
train-00000.bin      little-endian tokens of dtype uint16 or uint32, document after document, bos first
                     (with data.best_fit: rows of so many tokens and one more, filled up with bos)
held_out-00000.bin   document after document, those that are not trained on
shard-00000.json     `Shard`: describes both; written after them, so its presence means that they are whole
index.json           `Index`: the sum and a table of all shards; its presence means that the preparation is complete
prepare.lock         locked while a preparation runs
prepare.log          what a preparation in the background printed
"""

from __future__ import annotations

from collections.abc import Sequence
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
VERSION = 2  # of the records; another one is refused
MIXING = {"name", "weight", "max_epochs"}  # options of a source that its prepared bytes do not depend on
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


class Table(Record):
    """The token files of a split, column by column: read a hundred times faster than a record for each."""

    tokens: tuple[int, ...]
    documents: tuple[int, ...]
    text_bytes: tuple[int, ...]
    sha256: tuple[str, ...]

    @classmethod
    def of(cls, files: Sequence[TokenFile]) -> Table:
        """The table of `files`, which are in order."""
        return cls(**{column: tuple(getattr(file, column) for file in files) for column in cls.model_fields})

    def file(self, split: Split, number: int) -> TokenFile:
        """The file of shard `number`."""
        columns = {column: getattr(self, column)[number] for column in type(self).model_fields}
        return TokenFile(name=file_name(split, number), **columns)


class Packing(Record):
    """What best-fit packing cost: filling, and documents cut, beside those that concatenation would cut."""

    padding: int = 0
    cut: int = 0
    cut_concatenated: int = 0

    def __add__(self, other: Packing) -> Packing:
        return Packing(
            padding=self.padding + other.padding,
            cut=self.cut + other.cut,
            cut_concatenated=self.cut_concatenated + other.cut_concatenated,
        )


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
    packing: Packing
    skipped: dict[str, Skips]

    def file(self, split: Split) -> TokenFile:
        """The token file of `split`."""
        return self.train if split == "train" else self.held_out


class Preparation(Record):
    """What the shards of a folder are made from; `vocab_size` counts the tokenizer's pieces."""

    version: int = VERSION
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
    packing: Packing
    unigram_entropy: float
    skipped: dict[str, Skips]
    train_files: Table
    held_out_files: Table

    @property
    def shards(self) -> int:
        """How many there are."""
        return len(self.train_files.tokens)

    def table(self, split: Split) -> Table:
        """The token files of `split`."""
        return self.train_files if split == "train" else self.held_out_files

    def file(self, split: Split, number: int) -> TokenFile:
        """The token file of `split` in shard `number`."""
        return self.table(split).file(split, number)


def settings_of(data: DataConfig, vocab_size: int) -> dict[str, Any]:
    """The settings that the prepared bytes depend on, by their names in the configuration."""
    trained = data.tokenizer.path is None
    settings: dict[str, Any] = {"data.tokenizer": "trained" if trained else "given"}
    if trained:
        settings["data.tokenizer.train_bytes"] = data.tokenizer.train_bytes
        settings["model.vocab_size"] = vocab_size
    else:
        settings["data.tokenizer.bos"] = data.tokenizer.bos
    if data.is_mixture:  # whose own folder holds the tokenizer alone: sources may join and leave
        return settings
    settings |= {
        "data.sources": [source.model_dump(mode="json", exclude=MIXING) for source in data.sources],
        "data.held_out": data.held_out,
        "data.best_fit": data.best_fit,
        "data.shard_tokens": data.shard_tokens,
    }
    if any(source.kind in SHUFFLED_KINDS for source in data.sources):
        settings["data.seed"] = data.seed
    return settings


def tokenizer_path(data: DataConfig) -> Path:
    """The tokenizer that `data` names, or the one that its preparation trains."""
    return data.tokenizer.path or data.dir / TOKENIZER_FILE


def parts(data: DataConfig) -> dict[str, DataConfig]:
    """What is prepared into a folder of its own: every source of a mixture by its name, else `data` itself, as ""."""
    if not data.is_mixture:
        return {"": data}
    tokenizer = data.tokenizer.model_copy(update={"path": tokenizer_path(data)})
    return {
        source.name or "": data.model_copy(
            update={
                "dir": data.dir / (source.name or ""),
                "sources": (source.model_copy(update=dict.fromkeys(MIXING)),),
                "curriculum": (),
                "tokenizer": tokenizer,
            }
        )
        for source in data.sources
    }


def file_name(split: Split, number: int) -> str:
    """The token file of `split` in shard `number`."""
    return f"{split}-{number:05d}.bin"


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
        value = read_json(path)
    except FileNotFoundError:
        return None
    if value.get("version", VERSION) != VERSION:
        raise UserError(
            f"{path} has format version {value['version']}, and this version of loglinear reads {VERSION}:"
            " set another data.dir and prepare anew, or use the version that wrote it"
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            f"{path} is damaged ({where}: {problem['msg']}): delete it and run `{PREPARE_COMMAND}`"
        ) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
