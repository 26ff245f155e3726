"""What a preparation writes, that breaking it off changes nothing, and that it does not mix settings."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import lock
from data_pipeline.background import COMMAND
from data_pipeline.encode import is_held_out
from data_pipeline.lock import preparation_lock
from data_pipeline.manifest import Index, read_index, read_shard
from data_pipeline.prepare import prepare
from data_pipeline.progress import summary
from data_pipeline.sources import Document, iterate_documents
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from loglinear.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from loglinear.errors import UserError
from tests.corpus import VOCAB, contents, write_corpus
from tests.processes import is_running, wait_for

Configure = Callable[..., DataConfig]


def index_of(data: DataConfig) -> Index:
    index = read_index(data.dir)
    assert index is not None
    return index


def stored_texts(data: DataConfig, split: str) -> list[str]:
    """The documents of a split, cut at every bos and decoded."""
    tokenizer = Tokenizer(data.dir / "tokenizer.model")
    files = sorted(data.dir.glob(f"{split}-*.bin"))
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in files])
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(document) for document in np.split(tokens, starts[1:])]


def test_shards_hold_every_document_in_stream_order(prepared: DataConfig) -> None:
    items = iterate_documents(prepared.sources, prepared.seed)
    texts = [item.text for item in items if isinstance(item, Document)]
    for split, wanted in (("train", False), ("held_out", True)):
        expected = [text for text in texts if is_held_out(text, prepared.held_out) is wanted]
        assert stored_texts(prepared, split) == expected
        assert expected


def test_train_and_held_out_text_are_disjoint(prepared: DataConfig) -> None:
    assert not set(stored_texts(prepared, "train")) & set(stored_texts(prepared, "held_out"))


def test_held_out_fraction() -> None:
    chosen = {fraction: {n for n in range(4000) if is_held_out(f"text {n}", fraction)} for fraction in (0.1, 0.5)}
    assert 0.08 < len(chosen[0.1]) / 4000 < 0.12
    assert 0.47 < len(chosen[0.5]) / 4000 < 0.53
    assert chosen[0.1] < chosen[0.5], "a larger fraction holds out more, never others"


def test_index_sums_up(prepared: DataConfig) -> None:
    index = index_of(prepared)
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in sorted(prepared.dir.glob("train-*.bin"))])
    shares = np.bincount(tokens) / len(tokens)
    shares = shares[shares > 0]
    assert index.train.tokens == len(tokens)
    assert index.train.documents + index.held_out.documents == 80
    assert index.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert {reason: skips.first for reason, skips in index.skipped.items()} == {
        "empty": ("empty.txt",),
        "not UTF-8": ("latin.txt",),
    }
    assert index.shards >= 8
    assert index.vocab_size == VOCAB
    assert "left out 1 (not UTF-8): latin.txt" in summary(index)


def test_shards_have_the_size_asked_for(prepared: DataConfig) -> None:
    index = index_of(prepared)
    sizes = [a + b for a, b in zip(index.train_files.tokens, index.held_out_files.tokens, strict=True)]
    assert all(prepared.shard_tokens <= size < 2 * prepared.shard_tokens for size in sizes[:-1])


def test_the_number_of_workers_changes_nothing(prepared: DataConfig, configure: Configure) -> None:
    data = configure(prepare_workers=1)
    prepare(data, VOCAB)
    assert contents(data.dir) == contents(prepared.dir)


def test_a_second_run_touches_nothing(own: DataConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.dir.glob("*.[bj]*")}
    prepare(own, VOCAB)
    assert before == {path: path.stat().st_mtime_ns for path in own.dir.glob("*.[bj]*")}


def test_progress_is_told(configure: Configure) -> None:
    seen: list[tuple[str, int, int]] = []
    index = prepare(configure(), VOCAB, lambda tally: seen.append((tally.stage, tally.documents, tally.tokens)))
    assert seen[0] == ("training the tokenizer", 0, 0)
    assert seen[-1] == ("tokenising", 80, index.train.tokens + index.held_out.tokens)


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 5, 9, 15])
def test_continues_from_whatever_was_written(prepared: DataConfig, configure: Configure, kept: int) -> None:
    """The folder as it is when a run ends after its `kept`-th file, halfway through the next."""
    data = configure()
    data.dir.mkdir()
    order = ["tokenizer.model", "prepare.json"]
    for number in range(index_of(prepared).shards):
        order += [f"train-{number:05d}.bin", f"held_out-{number:05d}.bin", f"shard-{number:05d}.json"]
    for name in order[:kept]:
        shutil.copy(prepared.dir / name, data.dir)
    (data.dir / f"{order[kept]}.123.tmp").write_bytes(b"half")
    prepare(data, VOCAB)
    assert contents(data.dir) == contents(prepared.dir)


def start(config_file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, str(config_file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def config_file(data: DataConfig) -> Path:
    path = data.dir.with_suffix(".yaml")
    path.write_text(Config(model=ModelConfig(vocab_size=VOCAB), data=data).to_yaml())
    return path


def lose_some(folder: Path, rng: random.Random) -> None:
    """Take away some of a folder, if it is complete, so that there is something to do again."""
    if (folder / "index.json").exists():
        (folder / "index.json").unlink()
        for number in rng.sample(range(8), 6):
            for name in (f"shard-{number:05d}.json", f"train-{number:05d}.bin"):
                (folder / name).unlink()


def test_killed_20_times_at_random_moments_it_leaves_the_same_bytes(prepared: DataConfig, configure: Configure) -> None:
    data = configure()
    file = config_file(data)
    rng = random.Random()
    begin = time.monotonic()
    assert start(file).wait() == 0
    whole = time.monotonic() - begin
    for _ in range(15):
        lose_some(data.dir, rng)
        process = start(file)
        time.sleep(rng.uniform(0.3, 1) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
    shutil.rmtree(data.dir)
    for shard in (None, 0, 2, 5, 7):
        process = start(file)
        if shard is not None:
            wait_for(lambda name=f"shard-{shard:05d}.json": (data.dir / name).exists())
        time.sleep(rng.uniform(0, 0.02 if shard is not None else 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(file).wait() == 0
    assert contents(data.dir) == contents(prepared.dir)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_workers_behind(configure: Configure) -> None:
    data = configure()
    workers: list[int] = []
    for _ in range(5):  # again if it had ended before it was halted
        process = start(config_file(data))
        wait_for(lambda: (data.dir / "shard-00000.json").exists())
        os.kill(process.pid, signal.SIGSTOP)
        workers = children(process.pid)
        process.kill()
        process.wait()
        if workers:
            break
        shutil.rmtree(data.dir)
    assert workers
    wait_for(lambda: not any(map(is_running, workers)))


def test_two_runs_do_not_meet(prepared: DataConfig, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    data = configure()
    data.dir.mkdir()
    with preparation_lock(data.dir), pytest.raises(UserError, match="another process is preparing"):
        prepare(data, VOCAB)
    prepare(data, VOCAB)
    assert contents(data.dir) == contents(prepared.dir)


@pytest.mark.parametrize("name", ["train-00003.bin", "held_out-00000.bin", "shard-00004.json"])
def test_only_what_is_missing_is_made_again(prepared: DataConfig, own: DataConfig, name: str) -> None:
    (own.dir / name).unlink()
    if name.endswith(".json"):  # else the index still tells all that it said
        (own.dir / "index.json").unlink()
    other = own.dir / "train-00005.bin"
    before = other.stat().st_mtime_ns
    prepare(own, VOCAB)
    assert contents(own.dir) == contents(prepared.dir)
    assert other.stat().st_mtime_ns == before


def test_a_lost_tokenizer_is_trained_again(prepared: DataConfig, own: DataConfig) -> None:
    (own.dir / "tokenizer.model").unlink()
    (own.dir / "index.json").unlink()
    prepare(own, VOCAB)
    assert contents(own.dir) == contents(prepared.dir)


def test_a_shard_of_changed_sources_is_not_mixed_in(tmp_path: Path, configure: Configure) -> None:
    write_corpus(tmp_path / "corpus", 20)
    data = configure(sources=(SourceConfig(kind="folder", path=str(tmp_path / "corpus")),))
    prepare(data, VOCAB)
    for file in (tmp_path / "corpus").glob("0*.txt"):
        file.write_text(file.read_text().upper())
    lost = data.dir / "train-00000.bin"
    lost.unlink()
    with pytest.raises(UserError, match="shard 0 cannot be made again, for the sources have changed"):
        prepare(data, VOCAB)
    assert not lost.exists()


def test_a_file_damaged_before_the_end_is_found(own: DataConfig) -> None:
    (own.dir / "index.json").unlink()
    damaged = own.dir / "train-00002.bin"
    content = bytearray(damaged.read_bytes())
    content[7] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002.bin is damaged: its SHA-256 is \w{64} instead of \w{64}"):
        prepare(own, VOCAB)


@pytest.mark.parametrize("content", ["{", "[]", '{"number": 1}'])
def test_a_damaged_record_is_named(own: DataConfig, content: str) -> None:
    (own.dir / "shard-00001.json").write_text(content)
    with pytest.raises(UserError, match=r"shard-00001.json is damaged .*: delete it and run"):
        read_shard(own.dir, 1)


OTHER_SETTINGS = [
    ({"held_out": 0.3}, VOCAB, "data.held_out = 0.2, but the configuration says 0.3"),
    ({"shard_tokens": 4000}, VOCAB, "data.shard_tokens"),
    ({"seed": 1}, VOCAB, "data.seed"),
    ({"sources": (SourceConfig(kind="stdlib"),)}, VOCAB, "data.sources"),
    ({"tokenizer": TokenizerConfig(train_bytes=9)}, VOCAB, "data.tokenizer.train_bytes"),
    (
        {"tokenizer": TokenizerConfig(path=Path("given"))},
        VOCAB,
        "data.tokenizer = 'trained', .* says 'given'",
    ),
    ({}, 310, "model.vocab_size = 300, but the configuration says 310"),
]


@pytest.mark.parametrize(("change", "vocab_size", "message"), OTHER_SETTINGS)
@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_named_and_refused(
    own: DataConfig, change: dict[str, object], vocab_size: int, message: str, complete: bool
) -> None:
    if not complete:
        (own.dir / "index.json").unlink()
    with pytest.raises(UserError, match=message) as caught:
        prepare(own.model_copy(update=change), vocab_size)
    assert "set another data.dir, or delete" in str(caught.value)


def test_settings_that_change_no_byte_are_free(own: DataConfig) -> None:
    change = {"prepare_workers": 5, "shuffle_window": 7, "loader_workers": 3}
    assert prepare(own.model_copy(update=change), VOCAB) == index_of(own)


def test_a_given_tokenizer_is_used_and_kept_to(prepared: DataConfig, configure: Configure, tmp_path: Path) -> None:
    given = shutil.copy(prepared.dir / "tokenizer.model", tmp_path / "given.model")
    data = configure(tokenizer=TokenizerConfig(path=given))
    assert prepare(data, 512).vocab_size == VOCAB
    assert stored_texts(prepared, "train")
    assert (data.dir / "train-00000.bin").read_bytes() == (prepared.dir / "train-00000.bin").read_bytes()
    (data.dir / "index.json").unlink()
    train_tokenizer(["some other text " * 9], 270, given)
    with pytest.raises(UserError, match=r"given.model is not the tokenizer that .* was prepared with"):
        prepare(data, 512)


def test_sources_without_text_are_refused(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    source = SourceConfig(kind="text", path=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="hold no text"):
        prepare(configure(sources=(source,)), VOCAB)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "fresh").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"data.dir: cannot make .*fresh"):
        prepare(configure(), VOCAB)
