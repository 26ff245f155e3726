"""The stream of batches is the same for every number of ranks and workers, and damaged data are never served."""

from __future__ import annotations

import shutil
from itertools import islice

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.loader import TrainLoader
from data_pipeline.order import SampleOrder
from data_pipeline.prepared import open_tokenizer
from data_pipeline.state import DataState
from data_pipeline.tokenizer import train_tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError
from tests.corpus import SEQ_LEN, VOCAB

GLOBAL_BATCH = 16


def load(data: DataConfig, batches: int, **options: int) -> list[Batch]:
    """The first batches of one rank; steps of one micro-batch a rank unless `options` say otherwise."""
    world_size = options.get("world_size", 1)
    settings = {"global_batch": GLOBAL_BATCH, "micro_batch": GLOBAL_BATCH // world_size, **options}
    return list(islice(TrainLoader(data, vocab_size=VOCAB, seq_len=SEQ_LEN, **settings), batches))


def steps(data: DataConfig, count: int, world_size: int, micro_batch: int, start: int = 0) -> np.ndarray:
    """The samples (count, GLOBAL_BATCH, SEQ_LEN + 1) of the first steps, put together from all ranks."""
    per_rank = GLOBAL_BATCH // world_size
    options = {"world_size": world_size, "micro_batch": micro_batch, "start_sample": start}
    ranks = []
    for rank in range(world_size):
        batches = load(data, count * per_rank // micro_batch, rank=rank, **options)
        ranks.append(samples(batches).reshape(count, per_rank, SEQ_LEN + 1))
    return np.concatenate(ranks, axis=1)


def samples(batches: list[Batch]) -> np.ndarray:
    """Inputs and the last label of every sample (samples, SEQ_LEN + 1)."""
    return np.concatenate([torch.cat([b.inputs, b.labels[:, -1:]], dim=1).numpy() for b in batches])


def stream(data: DataConfig) -> np.ndarray:
    return np.concatenate([np.fromfile(file, "<u2") for file in sorted(data.dir.glob("train-*.bin"))])


def stream_samples(data: DataConfig) -> np.ndarray:
    """All samples of the stream, in its order."""
    tokens = stream(data)
    total = (len(tokens) - 1) // SEQ_LEN
    return np.stack([tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in range(total)])


def with_workers(data: DataConfig, workers: int) -> DataConfig:
    return data.model_copy(update={"loader_workers": workers})


@pytest.fixture(scope="module")
def reference(prepared: DataConfig) -> np.ndarray:
    """Four steps, straight from the files."""
    all_samples = stream_samples(prepared)
    order = SampleOrder(prepared.seed, prepared.shuffle_window)
    numbers = [order.locate(number, len(all_samples)) for number in range(4 * GLOBAL_BATCH)]
    return all_samples[numbers].reshape(4, GLOBAL_BATCH, SEQ_LEN + 1)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 16), (1, 4), (2, 4), (4, 4), (8, 1)])
def test_ranks_and_workers_do_not_change_a_step(
    prepared: DataConfig, reference: np.ndarray, world_size: int, micro_batch: int, workers: int
) -> None:
    found = steps(with_workers(prepared, workers), 4, world_size, micro_batch)
    np.testing.assert_array_equal(found, reference)


def test_a_pass_takes_every_sample_once_and_the_next_one_too(prepared: DataConfig) -> None:
    expected = stream_samples(prepared)
    total = len(expected)
    found = samples(load(prepared, 2 * total, global_batch=1, micro_batch=1))
    first, second = found[:total], found[total:]
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == sorted(map(tuple, expected))
    assert not np.array_equal(first, second)


def test_a_batch_is_what_a_model_takes(prepared: DataConfig) -> None:
    bos = open_tokenizer(prepared, VOCAB).bos_id
    for batch in load(prepared, 20):
        inputs, labels, cu_seqlens = batch
        assert inputs.shape == labels.shape == (GLOBAL_BATCH, SEQ_LEN)
        assert inputs.dtype == labels.dtype == torch.int64
        assert cu_seqlens.dtype == torch.int32
        torch.testing.assert_close(inputs[:, 1:], labels[:, :-1])
        starts = {i for i, token in enumerate(inputs.flatten().tolist()) if token == bos or i % SEQ_LEN == 0}
        assert cu_seqlens.tolist() == [*sorted(starts), inputs.numel()]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_twice_on_other_ranks_goes_on_with_the_same_samples(
    prepared: DataConfig, reference: np.ndarray, workers: int
) -> None:
    data = with_workers(prepared, workers)
    found, state = [], None
    for world_size, count in ((4, 1), (2, 2), (8, 1)):
        start = DataState.from_dict(state).samples if state else 0
        found.append(steps(data, count, world_size, 2, start))
        loader = TrainLoader(
            data,
            vocab_size=VOCAB,
            seq_len=SEQ_LEN,
            global_batch=GLOBAL_BATCH,
            micro_batch=2,
            world_size=world_size,
            start_sample=start,
        )
        state = loader.state(count).to_dict()
    np.testing.assert_array_equal(np.concatenate(found), reference)


def test_a_changed_order_is_refused_at_resume(prepared: DataConfig) -> None:
    def state(data: DataConfig, seq_len: int = SEQ_LEN) -> DataState:
        return TrainLoader(data, vocab_size=VOCAB, seq_len=seq_len, global_batch=8, micro_batch=8).state(3)

    saved = DataState.from_dict(state(prepared).to_dict())
    assert saved.samples == 24
    saved.require_same_order(state(with_workers(prepared, 5)))
    with pytest.raises(UserError, match=r"model.seq_len = 16, this run has 32"):
        saved.require_same_order(state(prepared, seq_len=32))
    with pytest.raises(UserError, match=r"data.shuffle_window = 32, this run has 64"):
        saved.require_same_order(state(prepared.model_copy(update={"shuffle_window": 64})))


@pytest.mark.parametrize("saved", [{}, {"version": 1}, {"samples": -1}])
def test_an_unreadable_state_is_explained(saved: dict[str, int]) -> None:
    with pytest.raises(UserError, match="data state is unreadable"):
        DataState.from_dict(saved)


def test_loading_draws_none_of_the_models_random_numbers(prepared: DataConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load(prepared, 2)
    assert torch.equal(before, torch.get_rng_state())


def damage(data: DataConfig, kind: str) -> str:
    """Damage the first train shard; returns what the message must say."""
    file = data.dir / "train-00000.bin"
    content = file.read_bytes()
    if kind == "corrupt":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return r"train-00000.bin is damaged: its SHA-256 is \w{64} instead of \w{64}; delete it and run"
    if kind == "truncated":
        file.write_bytes(content[:-6])
        return f"train-00000.bin is truncated: {len(content) - 6} bytes instead of {len(content)}; delete it"
    file.unlink()
    return "train-00000.bin is missing; run"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["corrupt", "truncated", "missing"])
def test_nothing_is_served_of_a_damaged_shard(own: DataConfig, kind: str, workers: int) -> None:
    message = damage(own, kind)
    served = []
    with pytest.raises(UserError, match=message) as caught:
        served.extend(load(with_workers(own, workers), 1))
    assert served == []
    assert "Traceback" not in str(caught.value)


def test_another_tokenizer_is_refused(own: DataConfig) -> None:
    train_tokenizer(["some other text to learn from " * 9], VOCAB - 20, own.dir / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model is not the tokenizer that .* was prepared with"):
        load(own, 1)


def test_a_shard_of_another_tokenizer_is_refused(own: DataConfig) -> None:
    (own.dir / "index.json").unlink()
    record = own.dir / "shard-00001.json"
    sha256 = open_tokenizer(own, VOCAB).sha256
    record.write_text(record.read_text().replace(sha256, "0" * 64))
    with pytest.raises(UserError, match=f"shard-00001.json was made with the tokenizer of SHA-256 {'0' * 64}"):
        load(own, 1)


def test_unprepared_data_are_named(own: DataConfig) -> None:
    shutil.rmtree(own.dir)
    with pytest.raises(UserError, match="holds no prepared data: run `loglinear data prepare"):
        load(own, 1)


def test_other_settings_are_refused(prepared: DataConfig) -> None:
    with pytest.raises(UserError, match=r"prepared with model.vocab_size = 300"):
        TrainLoader(prepared, vocab_size=299, seq_len=SEQ_LEN, global_batch=1, micro_batch=1)
    with pytest.raises(UserError, match=r"prepared with data.held_out = 0.2"):
        load(prepared.model_copy(update={"held_out": 0.1}), 1)


def test_batches_that_do_not_divide_are_refused(prepared: DataConfig) -> None:
    with pytest.raises(UserError, match=r"global_batch \(16\) must be a multiple of train.micro_batch \(4\)"):
        load(prepared, 1, world_size=3, micro_batch=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_shorter_than_a_sample_are_refused(prepared: DataConfig, workers: int) -> None:
    tokens = len(stream(prepared))
    loader = TrainLoader(
        with_workers(prepared, workers), vocab_size=VOCAB, seq_len=tokens, global_batch=1, micro_batch=1
    )
    with pytest.raises(UserError, match=f"hold {tokens} tokens to train on"):
        next(iter(loader))
