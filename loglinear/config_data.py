"""The data's part of the configuration: sources, tokenizer, mixture, packing and loading."""

from __future__ import annotations

import typing
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from loglinear.config_section import NAME_PATTERN, Section

NonNegative = typing.Annotated[float, Field(ge=0.0)]
SOURCE_OPTIONS = {  # which kinds of source each of these belongs to
    "pattern": ("folder",),
    "subset": ("hub",),
    "split": ("hub",),
    "text_field": ("hub", "jsonl", "parquet", "arrow"),
}


class SourceConfig(Section):
    """Where documents come from. In a mixture every source has a name and a weight.

    kind: hub is a dataset of the Hugging Face hub, streamed; jsonl, parquet, arrow and text are files, compressed or
        not; folder is every file below a folder that matches `pattern`; stdlib the running Python's own source.
    path: the dataset's name, the folder, or a file or a glob, here or at a URL (http, s3, gs).
    pattern: of a folder: the glob that its files match.
    subset: of a hub dataset: its configuration.
    split: of a hub dataset.
    text_field: the field or column that holds the text.
    name: of a source in a mixture, and of its folder below data.dir.
    weight: its share of a mixture, relative to the other weights.
    max_epochs: passes over it, after which the other sources of a mixture share its place.
    """

    kind: Literal["hub", "jsonl", "parquet", "arrow", "text", "folder", "stdlib"]
    path: str | None = None
    pattern: str = "**/*"
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    weight: float | None = Field(default=None, gt=0)
    max_epochs: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "stdlib" and self.path is not None:
            raise ValueError("kind stdlib takes no path: it is the running Python's own source")
        if self.kind != "stdlib" and not self.path:
            raise ValueError(f"kind {self.kind} needs a path")
        for option, kinds in SOURCE_OPTIONS.items():
            if self.kind not in kinds and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} belongs to kind {' or '.join(kinds)}, and does nothing for {self.kind}")
        if (self.name is None) != (self.weight is None):
            raise ValueError("name and weight belong together: give both to every source of a mixture, or neither")
        if self.max_epochs is not None and self.weight is None:
            raise ValueError("max_epochs belongs to a source of a mixture, which has a name and a weight")
        return self


class TokenizerConfig(Section):
    """A tokenizer that is given, or one that is trained here.

    path: a sentencepiece model or a Hugging Face tokenizer.json; without it a sentencepiece model is trained.
    bos: the piece that starts a document, where a tokenizer.json does not tell it.
    train_bytes: bytes of the sources' first documents that a tokenizer is trained on.
    """

    path: Path | None = None
    bos: str | None = None
    train_bytes: PositiveInt = 8_000_000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bos is not None and self.path is None:
            raise ValueError("bos belongs to a tokenizer.json in path; a tokenizer that is trained here knows its own")
        return self


class StageConfig(Section):
    """What changes from a step on; what is not given stays as it was.

    from_step: the first step of the stage, counted from 0.
    weights: of all sources, by name; a source that is not among them is left out.
    seq_len: the longest sequence; rows still have model.seq_len tokens, but hold several sequences that know nothing
        of each other.
    """

    from_step: int = Field(ge=0)
    weights: dict[str, NonNegative] | None = None
    seq_len: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights must give a source more than 0")
        return self


class DataConfig(Section):
    """Token shards, made from the sources, and how samples are read from them.

    dir: the folder of the token shards.
    sources: what they are made from: one after the other, or mixed by their weights.
    curriculum: stages of a mixture or of the length of sequences.
    tokenizer: what turns text into tokens.
    held_out: share of documents, chosen by their hash, that is kept for evaluation.
    best_fit: equal to model.seq_len, it packs documents into rows of so many tokens such that few are cut.
    shard_tokens: tokens of a shard, at least.
    prepare_workers: processes that tokenise; they do not change the result.
    seed: of the order of the data.
    shuffle_window: samples that are shuffled among each other.
    contiguous: so many samples that follow each other in the text follow each other in training.
    loader_workers: processes of each rank that load batches; with 0 the rank does it itself.
    """

    dir: Path = Path("data/prepared")
    sources: tuple[SourceConfig, ...] = Field(default=(SourceConfig(kind="stdlib"),), min_length=1)
    curriculum: tuple[StageConfig, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    held_out: float = Field(default=0.02, gt=0, lt=1)
    best_fit: PositiveInt | None = None
    shard_tokens: PositiveInt = 4_194_304
    prepare_workers: PositiveInt = 2
    seed: int = 0
    shuffle_window: PositiveInt = 4096
    contiguous: PositiveInt = 1
    loader_workers: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources if source.name is not None]
        if names and (len(names) < len(self.sources) or len(set(names)) < len(names)):
            raise ValueError("sources must all have a name, each its own, and a weight, or none of them")
        steps = [stage.from_step for stage in self.curriculum]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError("curriculum must be in the order of from_step, and each step stand there once")
        for name in (name for stage in self.curriculum for name in stage.weights or ()):
            if name not in names:
                raise ValueError(f"curriculum gives a weight to {name!r}, but sources have no such name")
        if self.shuffle_window % self.contiguous:
            raise ValueError(
                f"shuffle_window ({self.shuffle_window}) must be a multiple of contiguous ({self.contiguous})"
            )
        return self

    @property
    def is_mixture(self) -> bool:
        """Whether the sources are mixed by weights, instead of one after the other."""
        return self.sources[0].weight is not None
