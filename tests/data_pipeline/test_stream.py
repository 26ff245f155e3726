"""Mixtures from files to batches: shares, limits, curriculum, and one order for every number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.background import start_preparation, wait_until_ready
from data_pipeline.held_out import held_out_batches
from data_pipeline.loader import TrainLoader
from data_pipeline.manifest import Index, Packing, Table, Totals, read_index
from data_pipeline.prepare import prepare_all
from data_pipeline.prepared import is_complete
from data_pipeline.state import DataState
from loglinear.config import Config, DataConfig, ModelConfig, SourceConfig, StageConfig
from loglinear.errors import UserError
from tests.corpus import SEQ_LEN, VOCAB, data_config

LETTERS = {"low": "abcd", "high": "wxyz", "more": "klmn"}
WEIGHTS = {"low": 0.5, "high": 0.3, "more": 0.2}
GLOBAL_BATCH = 24  # for 1, 2, 3, 8 ranks


def write_texts(folder: Path) -> None:
    """A file of documents for each source, with letters of its own."""
    rng = np.random.default_rng(0)
    for name, letters in LETTERS.items():
        rows = [
            " ".join("".join(rng.choice(list(letters), rng.integers(2, 6))) for _ in range(rng.integers(20, 80)))
            for _ in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def mixture(folder: Path, **changes: object) -> DataConfig:
    sources = tuple(
        SourceConfig(kind="jsonl", path=str(folder / f"{name}.jsonl"), name=name, weight=weight)
        for name, weight in WEIGHTS.items()
    )
    return data_config(folder / "prepared", folder, **{"sources": sources, **changes})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("mixed")
    write_texts(folder)
    data = mixture(folder)
    prepare_all(data, VOCAB)
    return data


def with_epochs(data: DataConfig, **most: float) -> DataConfig:
    sources = [source.model_copy(update={"max_epochs": most.get(source.name or "")}) for source in data.sources]
    return data.model_copy(update={"sources": tuple(sources)})


def loader(data: DataConfig, **options: int) -> TrainLoader:
    settings = {"global_batch": GLOBAL_BATCH, "micro_batch": 1, **options}
    return TrainLoader(data, vocab_size=VOCAB, seq_len=SEQ_LEN, **settings)


def rows(data: DataConfig, count: int, **options: int) -> np.ndarray:
    """Inputs and last label of the first samples of a rank (count, SEQ_LEN + 1)."""
    batches = list(islice(loader(data, **options), count // options.get("micro_batch", 1)))
    return np.concatenate([torch.cat([b.inputs, b.labels[:, -1:]], 1).numpy() for b in batches])


def samples_of(data: DataConfig) -> dict[bytes, str]:
    """The source of every sample, straight from the files."""
    found = {}
    for name in LETTERS:
        files = sorted((data.dir / name).glob("train-*.bin"))
        tokens = np.concatenate([np.fromfile(file, "<u2") for file in files]).astype(np.int64)
        for start in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
            found[tokens[start : start + SEQ_LEN + 1].tobytes()] = name
    return found


def test_samples_come_from_their_sources_by_weight(mixed: DataConfig) -> None:
    source_of = samples_of(mixed)
    counts = Counter(source_of[row.tobytes()] for row in rows(mixed, 2048, micro_batch=8))
    for name, weight in WEIGHTS.items():
        assert counts[name] / 2048 == pytest.approx(weight, abs=0.002)


def test_a_source_gives_no_more_than_its_epochs(mixed: DataConfig) -> None:
    source_of = samples_of(mixed)
    sizes = Counter(source_of.values())
    data = with_epochs(mixed, low=1, high=2.5, more=1)
    total = sizes["low"] + int(2.5 * sizes["high"]) + sizes["more"]
    found = Counter(row.tobytes() for row in rows(data, total))
    by_source = Counter(dict.fromkeys(LETTERS, 0))
    for row, times in found.items():
        by_source[source_of[row]] += times
        assert times <= {"low": 1, "high": 3, "more": 1}[source_of[row]]
    assert by_source["low"] == sizes["low"], "every sample once"
    assert by_source["high"] == int(2.5 * sizes["high"])
    with pytest.raises(UserError, match=f"after {total} samples every source has reached its max_epochs"):
        rows(data, total + 1)
    with pytest.raises(UserError, match=r"lower train.steps, or raise max_epochs"):
        loader(data).require(total // GLOBAL_BATCH + 1)
    loader(data).require(total // GLOBAL_BATCH)


def curriculum(data: DataConfig) -> DataConfig:
    stages = (
        StageConfig(from_step=0, seq_len=4),
        StageConfig(from_step=4, weights={"high": 1}, seq_len=8),
        StageConfig(from_step=6, seq_len=16),
    )
    return data.model_copy(update={"curriculum": stages})


def test_a_curriculum_changes_weights_and_lengths_at_its_steps(mixed: DataConfig) -> None:
    source_of = samples_of(mixed)
    batches = list(islice(loader(curriculum(mixed), micro_batch=GLOBAL_BATCH), 8))
    for step, batch in enumerate(batches):
        found = np.concatenate([batch.inputs, batch.labels[:, -1:]], 1)
        sources = {source_of[row.tobytes()] for row in found}
        assert sources == (set(LETTERS) if step < 4 else {"high"})
        length = 4 if step < 4 else 8 if step < 6 else 16
        starts = batch.cu_seqlens.numpy()
        assert np.diff(starts).max() <= length
        assert set(range(0, GLOBAL_BATCH * SEQ_LEN, length)) <= set(starts.tolist())
        assert np.isin(starts[starts % length > 0], np.flatnonzero(batch.inputs.flatten() == 1)).all()


def step_rows(data: DataConfig, steps: int, ranks: int, micro_batch: int, start: int) -> np.ndarray:
    """The samples of some steps, put together from all ranks (steps, GLOBAL_BATCH, SEQ_LEN + 1)."""
    share = GLOBAL_BATCH // ranks
    options = {"world_size": ranks, "micro_batch": micro_batch, "start_sample": start}
    parts = [rows(data, steps * share, rank=rank, **options).reshape(steps, share, -1) for rank in range(ranks)]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("contiguous", [1, 4])
def test_interrupted_twice_on_1_3_8_and_2_ranks_the_order_is_that_of_one_run(
    mixed: DataConfig, contiguous: int
) -> None:
    data = curriculum(with_epochs(mixed, low=1)).model_copy(update={"contiguous": contiguous, "shuffle_window": 32})
    uninterrupted = step_rows(data, 16, 1, 24, 0)
    found, state = [], ""
    for ranks, micro_batch, workers, steps in ((1, 4, 0, 3), (3, 8, 1, 5), (8, 1, 0, 2), (2, 6, 2, 6)):
        data = data.model_copy(update={"loader_workers": workers})
        start = DataState.from_dict(json.loads(state)).samples if state else 0
        found.append(step_rows(data, steps, ranks, micro_batch, start))
        now = loader(data, world_size=ranks, micro_batch=micro_batch, start_sample=start)
        if state:
            DataState.from_dict(json.loads(state)).require_same_order(now.state(0))
        state = json.dumps(now.state(steps).to_dict(), indent=1)
        assert len(state) < 500
    np.testing.assert_array_equal(np.concatenate(found), uninterrupted)


def test_a_place_in_a_mixture_means_nothing_in_that_of_other_sources(mixed: DataConfig) -> None:
    """In another order, or by another name, though all weigh alike."""
    even = [source.model_copy(update={"weight": 1.0}) for source in mixed.sources]
    data = mixed.model_copy(update={"sources": tuple(even[:2])})
    saved = loader(data).state(5)
    saved.require_same_order(loader(data, start_sample=saved.samples).state(0))
    for others in (even[1::-1], [even[0], even[2]]):
        changed = mixed.model_copy(update={"sources": tuple(others)})
        with pytest.raises(UserError, match="trained with the mixture so far"):
            saved.require_same_order(loader(changed, start_sample=saved.samples).state(0))


def test_later_stages_may_change_and_earlier_ones_may_not(mixed: DataConfig) -> None:
    data = curriculum(mixed)
    saved = loader(data).state(5)
    first, second, third = data.curriculum
    later = data.model_copy(update={"curriculum": (first, second, third.model_copy(update={"from_step": 7}))})
    saved.require_same_order(loader(later).state(5))
    earlier = data.model_copy(update={"curriculum": (first, second.model_copy(update={"from_step": 3}), third)})
    with pytest.raises(UserError, match="trained with the mixture so far"):
        saved.require_same_order(loader(earlier).state(5))


def test_runs_of_samples_stay_together(prepared: DataConfig) -> None:
    data = prepared.model_copy(update={"contiguous": 8})
    found = rows(data, 64).reshape(8, 8, SEQ_LEN + 1)
    np.testing.assert_array_equal(found[:, 1:, 0], found[:, :-1, -1])  # each goes on where the one before ended
    stream = np.concatenate([np.fromfile(file, "<u2") for file in sorted(prepared.dir.glob("train-*.bin"))])
    starts = [
        int(np.flatnonzero((np.lib.stride_tricks.sliding_window_view(stream, 17) == run[0]).all(1))[0]) for run in found
    ]
    assert starts != sorted(starts)
    assert all(start % (8 * SEQ_LEN) == 0 for start in starts)


def test_a_mixture_waits_for_all_of_its_preparation(mixed: DataConfig, tmp_path: Path) -> None:
    write_texts(tmp_path)
    data = mixture(tmp_path, shard_tokens=900)
    process = start_preparation(Config(model=ModelConfig(vocab_size=VOCAB), data=data))
    assert process is not None
    needed = {"vocab_size": VOCAB, "samples": 8, "seq_len": SEQ_LEN}
    assert wait_until_ready(data, **needed, process=process, is_over=lambda: False)
    assert is_complete(data, VOCAB)
    assert process.wait(300) == 0
    assert start_preparation(Config(model=ModelConfig(vocab_size=VOCAB), data=data)) is None
    (data.dir / "high" / "index.json").unlink()
    with pytest.raises(UserError, match="high is not complete, and a mixture must be"):
        loader(data)


def test_weights_may_change_without_a_new_preparation_and_sources_may_join(mixed: DataConfig, tmp_path: Path) -> None:
    write_texts(tmp_path)
    data = mixture(tmp_path)
    two = data.model_copy(update={"sources": data.sources[:2]})
    prepare_all(two, VOCAB)
    before = {path: path.stat().st_mtime_ns for path in data.dir.rglob("*.bin")}
    prepare_all(data, VOCAB)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert read_index(data.dir / "more") is not None
    heavier = data.sources[0].model_copy(update={"weight": 9.0, "max_epochs": 3.0})
    rows(data.model_copy(update={"sources": (heavier, *data.sources[1:])}), 8)


def test_held_out_sources_take_turns(mixed: DataConfig) -> None:
    batches = held_out_batches(mixed, vocab_size=VOCAB, seq_len=SEQ_LEN, batch=3, limit_samples=9)
    firsts = [np.fromfile(mixed.dir / name / "held_out-00000.bin", "<u2")[: 3 * SEQ_LEN] for name in LETTERS]
    for number, batch in enumerate(batches):
        wanted = [tokens[number * SEQ_LEN : (number + 1) * SEQ_LEN] for tokens in firsts]
        np.testing.assert_array_equal(batch.inputs, np.stack(wanted))


def test_a_source_shorter_than_a_sample_is_named(mixed: DataConfig) -> None:
    with pytest.raises(UserError, match=r"source 'low' holds \d+ tokens to train on, less than"):
        TrainLoader(mixed, vocab_size=VOCAB, seq_len=10**6, global_batch=1, micro_batch=1)


def test_a_hundred_thousand_shards_open_in_two_seconds(tmp_path: Path) -> None:
    count = 100_000
    table = Table(
        tokens=tuple(range(4_000_000, 4_000_000 + count)),
        documents=(4000,) * count,
        text_bytes=(16_000_000,) * count,
        sha256=tuple(f"{number:064x}" for number in range(count)),
    )
    index = Index(
        settings={},
        tokenizer_sha256="0",
        vocab_size=9,
        dtype="uint16",
        train=Totals(),
        held_out=Totals(),
        packing=Packing(),
        unigram_entropy=1.0,
        skipped={},
        train_files=table,
        held_out_files=table,
    )
    index.save(tmp_path / "index.json")
    code = (
        "import sys, time; from pathlib import Path; from data_pipeline.shards import ShardReader\n"
        "start = time.process_time(); reader = ShardReader(Path(sys.argv[1]), 'train', '0')\n"
        "print(time.process_time() - start, reader.tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, tokens = done.stdout.split()
    assert int(tokens) == sum(table.tokens)
    assert float(seconds) < 2
