"""Where documents come from: every source is one stream of documents in an order that never changes."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_pipeline.formats import read_rows
from data_pipeline.remote import expand, is_remote
from loglinear.config import SourceConfig
from loglinear.errors import UserError

SHUFFLED_KINDS = frozenset({"folder", "stdlib"})  # their files come in an order that depends on the seed
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    name: str


@dataclass(frozen=True)
class Skipped:
    """A place in the stream whose content is left out, and why."""

    name: str
    reason: str


def iterate_documents(sources: Sequence[SourceConfig], seed: int, skip: int = 0) -> Iterator[Document | Skipped]:
    """All documents of all sources, one source after the other, without the first `skip` items.

    The files of a folder come shuffled by `seed`, for neighbours by name are alike, and training shuffles
    only nearby samples. Items that are left out are yielded as `Skipped`, so that a position in the stream
    counts them too.

    Raises:
        UserError: a path or dataset is missing, unreadable or not UTF-8, or has no such text field.
    """
    yield from islice(chain.from_iterable(_open(source, seed) for source in sources), skip, None)


def _open(source: SourceConfig, seed: int) -> Iterator[Document | Skipped]:
    path = source.path or sysconfig.get_paths()["stdlib"]
    if source.kind == "stdlib":
        return _folder(Path(path), "**/*.py", NOT_STDLIB, seed)
    if source.kind == "folder":
        return _folder(Path(path), source.pattern, frozenset(), seed)
    if source.kind == "hub":
        return _hub(source, path)
    return _files(source, path)


def _folder(root: Path, pattern: str, without: frozenset[str], seed: int) -> Iterator[Document | Skipped]:
    """Every file below `root` that matches `pattern` and passes through no folder named in `without`."""
    for name in _shuffled(_names(root, pattern, without), seed):
        try:
            text = (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            yield Skipped(_printable(name), "not UTF-8")
        except OSError as error:
            raise UserError(f"data.sources: cannot read {root / name} ({error.strerror})") from None
        else:
            yield _item(text, _printable(name))


def _names(root: Path, pattern: str, without: frozenset[str]) -> list[str]:
    """The paths of the files, relative to `root`."""
    if not root.is_dir():
        raise UserError(f"data.sources: there is no folder {root}; correct the path")
    if os.path.isabs(pattern):
        raise UserError(f"data.sources: pattern {pattern!r} is no glob below {root}; leave out what is above it")
    found = glob.iglob(pattern, root_dir=root, recursive=True, include_hidden=True)
    inside = {name for name in found if without.isdisjoint(name.split(os.sep))}  # `**` may find a name twice
    names = [name for name in inside if os.path.isfile(os.path.join(root, name))]
    if not names:
        raise UserError(f"data.sources: no file below {root} matches {pattern!r}; correct path or pattern")
    return names


def _shuffled(names: list[str], seed: int) -> list[str]:
    """`names` in an order that depends on them and on `seed` alone."""
    return sorted(names, key=lambda name: blake2b(b"%d/%s" % (seed, os.fsencode(name))).digest())


def _printable(name: str) -> str:
    """`name` as valid Unicode: a file's name may hold any bytes."""
    return os.fsencode(name).decode(errors="replace")


def _files(source: SourceConfig, path: str) -> Iterator[Document | Skipped]:
    """The documents of the files that `path` names or matches, file after file."""
    files = expand(path) if is_remote(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        raise UserError(f"data.sources: no file {path}; correct the path of this {source.kind} source")
    for file in files:
        rows = read_rows(source.kind, file, source.text_field)
        yield from _documents(
            _guarded(rows, lambda error, file=file: _bad_file(file, source, error)), source.text_field, file
        )


def _hub(source: SourceConfig, path: str) -> Iterator[Document | Skipped]:
    def rows() -> Iterator[dict[str, Any]]:
        datasets = _quiet_datasets()
        yield from datasets.load_dataset(path, source.subset, split=source.split, streaming=True)

    def failed(error: Exception) -> UserError:
        return UserError(
            f"data.sources: cannot stream dataset {path!r}, subset {source.subset!r}, split {source.split!r}"
            f" ({_first_line(error)}); check its name, the network and, for a gated dataset, HF_TOKEN"
        )

    return _documents(_guarded(rows(), failed), source.text_field, path)


def _quiet_datasets() -> Any:
    """Hugging Face `datasets` without its own bars and log lines; imported late, for it takes a second."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _guarded(rows: Iterable[Any], explain: Callable[[Exception], UserError]) -> Iterator[Any]:
    """`rows`, with whatever the library raises turned into one sentence."""
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:
        raise explain(error) from error


def _bad_file(file: str, source: SourceConfig, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"data.sources: {file} is not UTF-8; convert it, such as with `iconv -f LATIN1 -t UTF-8`")
    return UserError(
        f"data.sources: {file} is not readable as {source.kind} ({_first_line(error)}); repair or remove it"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _documents(rows: Iterable[dict[str, Any]], field: str, origin: str) -> Iterator[Document | Skipped]:
    """The text field of every row; the name of row i is `origin:i`, counted from 0."""
    for number, row in enumerate(rows):
        if field not in row:
            known = ", ".join(sorted(row))
            raise UserError(f"data.sources: {origin} has no field {field!r}; set text_field to one of: {known}")
        text = row[field]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"data.sources: field {field!r} of {origin} row {number} holds {type(text).__name__},"
                " not text; set text_field to a field that holds text"
            )
        yield _item(text or "", f"{origin}:{number}")


def _item(text: str, name: str) -> Document | Skipped:
    if not text or text.isspace():
        return Skipped(name, "empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say what UTF-8 cannot
        return Skipped(name, "half a surrogate pair")
    return Document(text, name)
