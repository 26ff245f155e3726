"""The rows of an experiment: to train on, to choose the learning rate by, and to report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from loglinear.errors import UserError
from loglinear.experiments.copying import selective_copying
from loglinear.experiments.examples import Cell, Examples
from loglinear.experiments.mqar import contiguous_recall, spread_recall
from loglinear.experiments.needle import FORMS, needle_examples, split_sentences
from loglinear.experiments.novels import next_token_rows, novels_tokenizer, read_novels, tokenise
from loglinear.experiments.protocol import Experiment, NovelsTask, RecallTask

TRAIN, VALIDATION, TEST, LONGER, NEEDLES = range(5)  # what random numbers are for
MAKERS: dict[str, Callable[[Cell, int, np.random.Generator], Examples]] = {
    "mqar": spread_recall,
    "mqar_contiguous": contiguous_recall,
    "copying": selective_copying,
}


@dataclass(frozen=True)
class RowSet:
    """Rows that are scored together.

    Attributes:
        kind: test, longer, validation, novels or needle.
        name: its size or form, unique within its kind.
        examples: the rows.
        sources: the novel of each row, if they are of novels.
        edges: positions at which the loss is split into regions, if it is.
    """

    kind: str
    name: str
    examples: Examples
    sources: tuple[str, ...] = ()
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskData:
    """All rows of an experiment."""

    train: tuple[Examples, ...]
    validation: tuple[RowSet, ...]
    test: tuple[RowSet, ...]

    def to(self, device: torch.device) -> TaskData:
        """The same on `device`."""
        validation, test = (
            tuple(replace(rows, examples=rows.examples.to(device)) for rows in sets)
            for sets in (self.validation, self.test)
        )
        return TaskData(tuple(part.to(device) for part in self.train), validation, test)


def make_data(experiment: Experiment, novels: Path | None, cache: Path) -> TaskData:
    """The data of an experiment, the same whatever the mode and the seed of a run.

    Args:
        experiment: what it asks for.
        novels: the folder with train.jsonl.xz and val.jsonl.xz, for language modelling.
        cache: a folder that keeps the tokenizer and the tokens of novels.

    Raises:
        UserError: the novels are needed and missing, or sizes do not fit.
    """
    if isinstance(experiment.task, RecallTask):
        return _recall_data(experiment.task, experiment.model.vocab_size)
    if novels is None:
        raise UserError("this experiment needs novels: give the folder of train.jsonl.xz and val.jsonl.xz by --novels")
    return _novels_data(experiment.task, experiment.model.vocab_size, novels, cache)


def _recall_data(task: RecallTask, vocab_size: int) -> TaskData:
    def made(purpose: int, cells: Sequence[Cell]) -> list[Examples]:
        make = MAKERS[task.kind]
        return [make(cell, vocab_size, np.random.default_rng([purpose, index])) for index, cell in enumerate(cells)]

    def sets(kind: str, purpose: int, cells: Sequence[Cell]) -> tuple[RowSet, ...]:
        return tuple(RowSet(kind, cell.name, rows) for cell, rows in zip(cells, made(purpose, cells), strict=True))

    return TaskData(
        train=tuple(made(TRAIN, task.train)),
        validation=sets("validation", VALIDATION, task.validation),
        test=sets("test", TEST, task.test) + sets("longer", LONGER, task.longer),
    )


def _novels_data(task: NovelsTask, vocab_size: int, folder: Path, cache: Path) -> TaskData:
    """The last of the training novels are for validation, all novels of val.jsonl.xz for the test."""
    novels, test = read_novels(folder / "train.jsonl.xz"), read_novels(folder / "val.jsonl.xz")
    if len(novels) <= task.validation_novels:
        raise UserError(
            f"{folder} has {len(novels)} novels to train on, but {task.validation_novels} are for validation"
        )
    train, validation = novels[: -task.validation_novels], novels[-task.validation_novels :]
    tokenizer = novels_tokenizer(train, vocab_size, task.tokenizer_bytes, cache)
    train_rows, _ = next_token_rows(tokenise(tokenizer, train, cache), task.length)
    validation_rows, _ = next_token_rows(tokenise(tokenizer, validation, cache), task.length, task.test_rows)
    test_rows, owner = next_token_rows(tokenise(tokenizer, test, cache), task.test_length, task.test_rows)
    sources = tuple(test[number].source for number in owner)
    sentences = split_sentences("\n".join(novel.text for novel in test))
    needles = tuple(
        RowSet(
            "needle",
            f"{name} {cell.length}",
            needle_examples(form, cell, sentences, tokenizer, np.random.default_rng([NEEDLES, size, index])),
        )
        for index, (name, form) in enumerate(FORMS.items())
        for size, cell in enumerate(task.needles)
    )
    return TaskData(
        train=(train_rows,),
        validation=(RowSet("validation", str(task.length), validation_rows),),
        test=(RowSet("novels", str(task.test_length), test_rows, sources, task.edges), *needles),
    )
