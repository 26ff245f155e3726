"""Disks that fill up, indices of other versions, and documents of sizes that nobody expects."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.background import COMMAND
from data_pipeline.files import make_folder
from data_pipeline.loader import TrainLoader
from data_pipeline.manifest import read_index
from data_pipeline.prepare import prepare
from data_pipeline.prepared import open_tokenizer
from data_pipeline.tokenizer import Tokenizer
from loglinear.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from loglinear.errors import UserError
from tests.corpus import SEQ_LEN, VOCAB, contents
from tests.processes import exit_codes

Configure = Callable[..., DataConfig]


def run_prepare(data: DataConfig, most_bytes: int) -> subprocess.CompletedProcess[str]:
    """Prepare in a process for which the system refuses files over `most_bytes`, as a full disk would."""
    file = data.dir.with_suffix(".yaml")
    file.write_text(Config(model=ModelConfig(vocab_size=VOCAB), data=data).to_yaml())
    return subprocess.run(
        [*COMMAND, str(file)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become another user")
def test_a_folder_of_another_user_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)

        def make() -> None:
            os.setuid(65534)  # nobody
            with pytest.raises(UserError, match=r"cannot write into the folder .*: name another"):
                make_folder(Path(folder))

        user = multiprocessing.get_context("fork").Process(target=make)
        user.start()
        assert exit_codes([user]) == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
@pytest.mark.parametrize(("most_bytes", "named"), [(1000, "tokenizer.model"), (2500, "train-00000.bin")])
def test_a_full_disk_is_named_and_with_room_it_goes_on(
    prepared: DataConfig, configure: Configure, most_bytes: int, named: str
) -> None:
    data = configure()
    data.dir.mkdir()
    if named != "tokenizer.model":
        (data.dir / "tokenizer.model").write_bytes((prepared.dir / "tokenizer.model").read_bytes())
        (data.dir / "prepare.json").write_bytes((prepared.dir / "prepare.json").read_bytes())
    done = run_prepare(data, most_bytes)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"loglinear: cannot write {data.dir / named} (File too large)")
    assert not (data.dir / named).exists()
    prepare(data, VOCAB)
    assert contents(data.dir) == contents(prepared.dir)


@pytest.mark.parametrize("name", ["index.json", "prepare.json"])
@pytest.mark.parametrize("version", [1, 3])
def test_records_of_another_version_are_refused(own: DataConfig, name: str, version: int) -> None:
    record = json.loads((own.dir / name).read_text())
    (own.dir / "index.json").unlink()
    (own.dir / name).write_text(json.dumps({**record, "version": version, "other": []}))
    said = rf"{name} has format version {version}, and this version of loglinear reads 2: set another data.dir"
    with pytest.raises(UserError, match=said):
        prepare(own, VOCAB)
    with pytest.raises(UserError, match=said):
        TrainLoader(own, vocab_size=VOCAB, seq_len=SEQ_LEN, global_batch=1, micro_batch=1)


def from_jsonl(configure: Configure, file: Path, tokenizer: Path, **changes: object) -> DataConfig:
    source = SourceConfig(kind="jsonl", path=str(file))
    return configure(sources=(source,), tokenizer=TokenizerConfig(path=tokenizer), prepare_workers=1, **changes)


def test_a_document_of_100_mb_is_one_document(prepared: DataConfig, configure: Configure, tmp_path: Path) -> None:
    line = "abcd efgh" * 5000 + " " * 5000 + "\n"  # which the tokenizer takes fast
    text = line * (100_000_000 // len(line) + 1)
    file = tmp_path / "large.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "and a small one"}) + "\n")
    data = from_jsonl(configure, file, prepared.dir / "tokenizer.model", held_out=1e-9)
    index = prepare(data, VOCAB)
    assert index.train.documents == 2
    assert index.train.text_bytes == len(text) + len("and a small one")
    tokens = np.fromfile(data.dir / "train-00000.bin", "<u2")
    assert (tokens == 1).sum() == 1
    once = Tokenizer(prepared.dir / "tokenizer.model").encode(line)
    lines = len(text) // len(line)
    np.testing.assert_array_equal(tokens[1:].reshape(lines, -1)[[0, 1, 999, -1]], [once] * 4)
    assert index.shards == 2


def test_a_million_empty_documents_are_counted(prepared: DataConfig, configure: Configure, tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text('{"text": ""}\n' * 1_000_000 + json.dumps({"text": "the only text"}) + "\n")
    data = from_jsonl(configure, file, prepared.dir / "tokenizer.model", held_out=1e-9)
    index = prepare(data, VOCAB)
    assert index.skipped["empty"].count == 1_000_000
    assert len(index.skipped["empty"].first) == 20
    assert index.train.documents == 1
    assert open_tokenizer(data, VOCAB).decode(np.fromfile(data.dir / "train-00000.bin", "<u2")) == "the only text"
    assert read_index(data.dir) == index
