"""The ranks together evaluate on every held-out token once, in equally many batches."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.batch import IGNORED, Batch
from data_pipeline.held_out import held_out_batches
from data_pipeline.prepare import prepare
from loglinear.config import DataConfig
from loglinear.errors import UserError
from tests.corpus import SEQ_LEN, VOCAB

EVERYTHING = 10**9


def stream(data: DataConfig) -> np.ndarray:
    return np.concatenate([np.fromfile(file, "<u2") for file in sorted(data.dir.glob("held_out-*.bin"))])


def load(data: DataConfig, limit: int, world_size: int) -> list[list[Batch]]:
    return [
        list(
            held_out_batches(
                data,
                vocab_size=VOCAB,
                seq_len=SEQ_LEN,
                batch=4,
                limit_samples=limit,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 10, 64, EVERYTHING])
def test_all_ranks_together_take_every_token_once(prepared: DataConfig, limit: int, world_size: int) -> None:
    ranks = load(prepared, limit, world_size)
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for turn in zip(*ranks, strict=True) for batch in turn for row in batch.labels]
    labels = np.concatenate(rows)
    expected = stream(prepared)[1:][: limit * SEQ_LEN]
    np.testing.assert_array_equal(labels[labels != IGNORED], expected)
    padded = len(labels) - len(expected)
    assert padded < world_size * 4 * SEQ_LEN, "no turn consists of padding alone"


def test_padding_is_at_the_end_and_valid_as_input(prepared: DataConfig) -> None:
    batch = load(prepared, EVERYTHING, 1)[0][-1]
    valid = (batch.labels != IGNORED).flatten().tolist()
    assert valid == sorted(valid, reverse=True)
    assert batch.inputs.shape == (4, SEQ_LEN)
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < VOCAB
    assert batch.cu_seqlens[-1] == batch.inputs.numel()


def test_a_folder_without_held_out_text_is_refused(prepared: DataConfig, own: DataConfig) -> None:
    data = own.model_copy(update={"dir": own.dir / "fresh", "held_out": 1e-9})
    prepare(data, VOCAB)
    with pytest.raises(UserError, match=r"holds no held-out text .* raise data.held_out"):
        load(data, 4, 1)


def test_a_damaged_shard_is_named(own: DataConfig) -> None:
    file = own.dir / "held_out-00000.bin"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=r"held_out-00000.bin is damaged"):
        load(own, 4, 1)
