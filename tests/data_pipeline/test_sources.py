"""Every kind of source, read by the real libraries, and what is wrong with some of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.sources import Document, Skipped, iterate_documents
from loglinear.config import SourceConfig
from loglinear.errors import UserError

TEXTS = ["first\ntext\n", " second\r\n", "third ▁ \u00e9 \U0001f600", "fourth"]


def read(kind: str, path: Path | str, seed: int = 0, skip: int = 0, **options: Any) -> list[Document | Skipped]:
    source = SourceConfig.model_validate({"kind": kind, "path": str(path), **options})
    return list(iterate_documents([source], seed, skip))


def texts(items: list[Document | Skipped]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def jsonl(values: list[Any], field: str = "text") -> bytes:
    return "".join(json.dumps({field: value}, ensure_ascii=False) + "\n" for value in values).encode()


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(TEXTS))
    assert read("jsonl", file) == [Document(text, f"{file}:{row}") for row, text in enumerate(TEXTS)]


def test_compressed_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(jsonl(TEXTS, "body")))
    assert texts(read("jsonl", tmp_path / "a.jsonl.xz", text_field="body")) == TEXTS


COMPRESSED = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("end", COMPRESSED)
def test_compressed_files(tmp_path: Path, end: str) -> None:
    content = jsonl([f"{text} {row}" for row in range(5000) for text in TEXTS])
    path = tmp_path / f"a.jsonl.{end}"
    path.write_bytes(COMPRESSED[end](content[:300_000]) + COMPRESSED[end](content[300_000:]))
    found = texts(read("jsonl", path))
    assert found == [f"{text} {row}" for row in range(5000) for text in TEXTS]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"a.jsonl.{end} is not readable as jsonl .*end"):
        read("jsonl", path)


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow(tmp_path: Path, make: Any) -> None:
    table = pyarrow.table({"id": range(4), "body": TEXTS})
    with make(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert texts(read("arrow", tmp_path / "a.arrow", text_field="body")) == TEXTS
    with pytest.raises(UserError, match="no field 'text'; set text_field to one of: body, id"):
        read("arrow", tmp_path / "a.arrow")


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800"}\n{"text": "\\ud83d\\ude00"}\n')
    first, second = read("jsonl", tmp_path / "a.jsonl")
    assert first == Skipped(f"{tmp_path / 'a.jsonl'}:0", "half a surrogate pair")
    assert texts([second]) == ["\U0001f600"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    assert texts(read("parquet", tmp_path / "a.parquet")) == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    assert texts(read("text", tmp_path / "*.txt")) == ["one\n\ntwo\n", "three"]


def test_hub_streams_a_dataset_repository(tmp_path: Path) -> None:
    """A dataset's repository on disk goes the way of one on the hub."""
    (tmp_path / "train.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "test.jsonl").write_bytes(jsonl(["tested"]))
    assert texts(read("hub", tmp_path)) == TEXTS
    assert texts(read("hub", tmp_path, split="test")) == ["tested"]


def test_standard_library() -> None:
    items = list(islice(iterate_documents([SourceConfig(kind="stdlib")], seed=0), 40))
    assert all(item.name.endswith(".py") and "site-packages" not in item.name for item in items)


def test_folder_reads_every_file_once_in_an_order_of_the_seed(corpus: Path) -> None:
    names = {seed: [item.name for item in read("folder", corpus, seed)] for seed in (0, 0, 1)}
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1]) == sorted(path.name for path in corpus.iterdir())
    assert names[0] == [item.name for item in read("folder", corpus, 0)]


def test_folder_pattern(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "sub/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(texts(read("folder", tmp_path, pattern="**/*.py"))) == ["a.py", "sub/c.py"]


def test_folder_leaves_out_and_names_what_holds_no_text(corpus: Path) -> None:
    skipped = [item for item in read("folder", corpus) if isinstance(item, Skipped)]
    assert {item.name: item.reason for item in skipped} == {"empty.txt": "empty", "latin.txt": "not UTF-8"}


def test_a_file_name_that_is_not_utf8_can_still_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.txt").write_bytes(b"\xff")
    assert read("folder", tmp_path) == [Skipped("caf\ufffd.txt", "not UTF-8")]


def test_empty_rows_are_left_out_and_counted_in_the_position(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(["one", "", None, " \n", "two"]))
    items = read("jsonl", file)
    assert [isinstance(item, Skipped) for item in items] == [False, True, True, True, False]
    assert read("jsonl", file, skip=3) == items[3:]


def test_sources_follow_each_other(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    sources = [SourceConfig(kind="text", path=str(tmp_path / name)) for name in "ba"]
    assert texts(list(iterate_documents(sources, seed=0))) == ["b", "a"]


@pytest.mark.parametrize(
    ("kind", "path", "options", "message"),
    [
        ("folder", "absent", {}, "there is no folder .*absent"),
        ("folder", ".", {"pattern": "*.rs"}, r"no file below .* matches '\*.rs'"),
        ("folder", ".", {"pattern": "/etc/*"}, "pattern '/etc/\\*' is no glob"),
        ("jsonl", "absent.jsonl", {}, "no file .*absent.jsonl"),
        ("hub", "absent", {}, "cannot stream dataset .*absent"),
        ("jsonl", "latin.jsonl", {}, "latin.jsonl is not UTF-8; convert it"),
        ("text", "latin.jsonl", {}, "latin.jsonl is not UTF-8; convert it"),
        ("jsonl", "broken.jsonl", {}, "broken.jsonl is not readable as jsonl"),
        ("parquet", "broken.jsonl", {}, "broken.jsonl is not readable as parquet"),
        ("jsonl", "good.jsonl", {"text_field": "body"}, "no field 'body'; set text_field to one of: text"),
        ("jsonl", "number.jsonl", {}, "field 'text' of .*number.jsonl row 0 holds int, not text"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, kind: str, path: str, options: dict[str, str], message: str) -> None:
    (tmp_path / "latin.jsonl").write_bytes(json.dumps({"text": "café"}, ensure_ascii=False).encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "good.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "number.jsonl").write_bytes(jsonl([1]))
    with pytest.raises(UserError, match=message):
        read(kind, tmp_path / path, **options)
