"""Sources at a URL, from a server that drops, stalls and errs: every row once and in order, or a clear end."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import random
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import remote
from data_pipeline.prepare import prepare
from data_pipeline.sources import Document, iterate_documents
from loglinear.config import DataConfig, SourceConfig
from loglinear.errors import UserError
from tests.corpus import VOCAB, data_config
from tests.data_pipeline.flaky_server import Fault, Site, serving

_random = random.Random(0)
TEXTS = [f"document {number} {_random.randbytes(80).hex()}" for number in range(3000)]


def jsonl() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def columnar(kind: str) -> bytes:
    table, buffer = pyarrow.table({"text": TEXTS}), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, buffer, compression="none", row_group_size=500)
    else:
        with pyarrow.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    return buffer.getvalue()


FILES = {
    "a.jsonl": jsonl(),
    "a.jsonl.gz": gzip.compress(jsonl(), 1),
    "a.jsonl.xz": lzma.compress(jsonl(), preset=0),
    "a.jsonl.zst": zstandard.compress(jsonl(), 1),
    "a.parquet": columnar("parquet"),
    "a.arrow": columnar("arrow"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small requests, so that there are many, and short waits."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(remote, "STALL", 0.4)
    monkeypatch.setattr(remote, "BLOCK", 20_000)


def read(site: Site, name: str) -> list[str]:
    kind = name.split(".")[1]
    source = SourceConfig.model_validate({"kind": kind, "path": f"{site.url}/{name}"})
    return [item.text for item in iterate_documents([source], 0) if isinstance(item, Document)]


@pytest.mark.parametrize("name", FILES)
def test_every_format_comes_over_the_network(name: str) -> None:
    with serving(Site(FILES)) as site:
        assert read(site, name) == TEXTS


@pytest.mark.parametrize("name", FILES)
def test_no_row_is_lost_or_doubled_when_the_server_fails(name: str) -> None:
    faults: list[Fault] = ["none", "drop", "none", "500", "503", "drop", "none", "none", "drop"]
    with serving(Site(FILES, faults=faults)) as site:
        assert read(site, name) == TEXTS
        assert site.asked > 2


def test_a_stalled_connection_is_given_up_and_opened_again() -> None:
    with serving(Site(FILES, faults=["none", "stall", "none", "stall"])) as site:
        assert read(site, "a.jsonl") == TEXTS
        assert not site.faults
        assert not site.outwaited


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_server_that_gives_no_parts_is_read_from_the_start_again(name: str) -> None:
    with serving(Site(FILES, ranges=False, faults=["none", "drop", "drop"])) as site:
        assert read(site, name) == TEXTS


@pytest.mark.parametrize("fault", ["drop", "500"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_source_that_stays_dead_ends_with_its_name(name: str, fault: Fault) -> None:
    with serving(Site(FILES, faults=["none"] * 3, always=fault)) as site:
        with pytest.raises(UserError, match=f"{site.url}/{name} stays dead: 8 attempts in a row failed"):
            read(site, name)
        assert site.asked >= 8


def test_a_server_that_is_gone_is_named() -> None:
    with serving(Site(FILES)) as site:
        pass
    with pytest.raises(UserError, match=rf"{site.url}/a.jsonl stays dead: 8 attempts in a row .*the same command"):
        read(site, "a.jsonl")


def test_a_file_that_ends_too_early_is_no_short_epoch() -> None:
    with (
        serving(Site(FILES, promised=1000)) as site,
        pytest.raises(UserError, match=r"a.jsonl stays dead: .*it ended after \d+ of \d+ bytes"),
    ):
        read(site, "a.jsonl")


def test_a_file_that_is_not_there_is_not_asked_for_again() -> None:
    with serving(Site(FILES)) as site:
        with pytest.raises(UserError, match=r"cannot read .*b.jsonl .*correct the path"):
            read(site, "b.jsonl")
        assert site.missed <= 2


def test_a_file_that_changes_while_it_is_read_is_refused() -> None:
    with serving(Site(dict(FILES))) as site:
        source = SourceConfig(kind="jsonl", path=f"{site.url}/a.jsonl")
        items = iterate_documents([source], 0)
        next(items)
        site.files["a.jsonl"] += b"{}"
        site.faults = ["500"]
        with pytest.raises(UserError, match=r"a.jsonl changed from \d+ to \d+ bytes while it was read"):
            list(items)


def test_a_store_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot open nowhere://a.jsonl"):
        list(iterate_documents([SourceConfig(kind="jsonl", path="nowhere://a.jsonl")], 0))


def test_patterns_are_listed_where_the_store_can() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("b", "a"):
        store.pipe(f"/listed/{name}.jsonl", json.dumps({"text": name}).encode())
    items = iterate_documents([SourceConfig(kind="jsonl", path="memory://listed/*.jsonl")], 0)
    assert [item.text for item in items if isinstance(item, Document)] == ["a", "b"]


def test_a_preparation_from_a_flaky_server_gives_the_bytes_of_local_files(
    tmp_path: Path,
) -> None:
    folder = tmp_path
    (folder / "a.jsonl").write_bytes(FILES["a.jsonl"])

    def train_files(path: str, name: str) -> list[bytes]:
        source = SourceConfig(kind="jsonl", path=path)
        data: DataConfig = data_config(folder / name, folder, sources=(source,), shard_tokens=100_000)
        prepare(data, VOCAB)
        return [file.read_bytes() for file in sorted(data.dir.glob("train-*.bin"))]

    with serving(Site(FILES, faults=["none", "drop", "500", "none", "drop"])) as site:
        over_network = train_files(f"{site.url}/a.jsonl", "remote")
    local = train_files(str(folder / "a.jsonl"), "local")
    assert over_network == local
    assert len(local) > 1
