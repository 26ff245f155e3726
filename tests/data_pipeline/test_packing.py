"""Rows hold every token once as a label, cut few documents, and say where sequences start."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import IGNORED, make_batch
from data_pipeline.held_out import held_out_batches
from data_pipeline.manifest import read_index
from data_pipeline.packing import cut_by_concatenation, pack_best_fit
from data_pipeline.prepare import prepare
from data_pipeline.progress import summary
from data_pipeline.rows import Rows
from data_pipeline.shards import ShardReader
from loglinear.config import DataConfig
from tests.corpus import SEQ_LEN, VOCAB

BOS = 1


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents of so many tokens, bos included, that all differ."""
    starts = np.cumsum([0, *lengths]) + 10
    return [np.array([BOS, *range(start, start + n - 1)], np.uint16) for start, n in zip(starts, lengths, strict=False)]


lengths = st.lists(st.integers(2, 60), min_size=1, max_size=30)


@given(lengths=lengths, seq_len=st.integers(1, 20))
def test_every_token_is_a_label_once(lengths: list[int], seq_len: int) -> None:
    given_documents = documents(lengths)
    packed = pack_best_fit(given_documents, seq_len, BOS)
    rows = packed.tokens.reshape(-1, seq_len + 1)
    batch = make_batch(list(rows), seq_len, BOS, [seq_len] * len(rows))
    labels = batch.labels[batch.labels != IGNORED].numpy()
    wanted = np.concatenate([document[1:] for document in given_documents])
    assert sorted(labels[labels != BOS]) == sorted(wanted)
    long = sum(n for n in lengths if n > seq_len + 1)
    assert packed.padding == rows.size - sum(lengths) - max(0, (long - 2) // seq_len)  # neighbours share one
    assert packed.cut == sum(n > seq_len + 1 for n in lengths)


@given(lengths=lengths, seq_len=st.integers(1, 20))
def test_a_token_follows_the_one_before_it_or_starts_a_sequence(lengths: list[int], seq_len: int) -> None:
    given_documents = documents(lengths)
    before = {int(b): int(a) for document in given_documents for a, b in pairwise(document)}
    rows = pack_best_fit(given_documents, seq_len, BOS).tokens.reshape(-1, seq_len + 1)
    batch = make_batch(list(rows), seq_len, BOS, [seq_len] * len(rows))
    inputs, starts = batch.inputs.flatten().tolist(), set(batch.cu_seqlens.tolist())
    for place, token in enumerate(inputs):
        if place not in starts and token != BOS:
            assert before[token] == inputs[place - 1]


@given(lengths=lengths, seq_len=st.integers(1, 20))
def test_a_document_ends_where_a_label_says_so(lengths: list[int], seq_len: int) -> None:
    """And there alone; only what stands last in its row, and so is no input, has no label."""
    given_documents = documents(lengths)
    rows = pack_best_fit(given_documents, seq_len, BOS).tokens.reshape(-1, seq_len + 1)
    batch = make_batch(list(rows), seq_len, BOS, [seq_len] * len(rows))
    told = batch.inputs[batch.labels == BOS].tolist()
    ends = {int(document[-1]) for document in given_documents}
    assert sorted(told) == sorted(ends & set(batch.inputs.flatten().tolist()))


def test_best_fit_cuts_fewer_documents_and_wastes_little() -> None:
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5, 1.2, 5000), 2, 20_000).astype(int).tolist()
    seq_len = 1024
    given_documents = [np.full(size, 7, np.uint16) for size in sizes]
    packed = pack_best_fit(given_documents, seq_len, BOS)
    place, cut = 0, 0
    for size in sizes:  # cut the concatenation at every multiple of seq_len
        cut += any(row % seq_len == 0 for row in range(place + 1, place + size))
        place += size
    assert packed.cut_concatenated == cut == cut_by_concatenation(sizes, seq_len)
    assert packed.cut == sum(size > seq_len + 1 for size in sizes) < cut / 3
    assert packed.padding / len(packed.tokens) < 0.01


def test_long_documents_follow_each_other_and_short_ones_fill_their_last_row() -> None:
    short, first, second = documents([5, 2 * 16 + 6, 16 + 3])
    rows = pack_best_fit([short, first, second], 16, BOS).tokens.reshape(-1, 17)
    stream = np.concatenate([first, second])  # 57 tokens: three rows of 17 that share one, and 9
    for row, start in zip(rows[:3], range(0, 48, 16), strict=True):
        np.testing.assert_array_equal(row, stream[start : start + 17])
    np.testing.assert_array_equal(rows[3], [*stream[48:], *short, BOS, BOS, BOS])


def test_sequences_end_where_the_curriculum_says() -> None:
    row = documents([17])[0]
    batch = make_batch([row, row], 16, BOS, [4, 16])
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12, 16, 32]
    assert batch.labels.tolist() == [row[1:].tolist()] * 2


def test_filling_is_a_sequence_without_labels() -> None:
    batch = make_batch([np.array([BOS, 5, 6, BOS, BOS, BOS, BOS], np.uint16)], 6, BOS, [6])
    assert batch.cu_seqlens.tolist() == [0, 3, 6]
    assert batch.labels.tolist() == [[5, 6, BOS, IGNORED, IGNORED, IGNORED]]


@pytest.fixture(scope="module")
def packed(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    data = prepared.model_copy(update={"dir": tmp_path_factory.mktemp("packed"), "best_fit": SEQ_LEN})
    prepare(data, VOCAB)
    return data


def rows_of(data: DataConfig) -> list[np.ndarray]:
    index = read_index(data.dir)
    assert index is not None
    rows = Rows(ShardReader(data.dir, "train", index.tokenizer_sha256), SEQ_LEN, data.best_fit)
    return [rows.read(row) for row in range(len(rows))]


def test_prepared_rows_hold_the_text_of_the_concatenation(packed: DataConfig, prepared: DataConfig) -> None:
    plain = np.concatenate([np.fromfile(file, "<u2") for file in sorted(prepared.dir.glob("train-*.bin"))])
    rows = rows_of(packed)
    assert all(len(row) == SEQ_LEN + 1 for row in rows)
    labels = make_batch(rows, SEQ_LEN, BOS, [SEQ_LEN] * len(rows)).labels.numpy()
    wanted = np.bincount(plain[plain != BOS])
    np.testing.assert_array_equal(np.bincount(labels[(labels != IGNORED) & (labels != BOS)]), wanted)


def test_the_summary_reports_cuts_and_waste(packed: DataConfig, prepared: DataConfig) -> None:
    index, plain = read_index(packed.dir), read_index(prepared.dir)
    assert index is not None
    assert plain is not None
    assert 0 < index.packing.cut <= index.packing.cut_concatenated
    said = f"{index.packing.cut} documents cut, where concatenation would cut {index.packing.cut_concatenated}"
    assert said in summary(index)
    assert "best fit" not in summary(plain)
    assert index.unigram_entropy == pytest.approx(plain.unigram_entropy, rel=0.02), "filling is no text"


def test_the_held_out_set_does_not_depend_on_packing(packed: DataConfig, prepared: DataConfig) -> None:
    sets = [
        held_out_batches(data, vocab_size=VOCAB, seq_len=SEQ_LEN, batch=4, limit_samples=10**6)
        for data in (packed, prepared)
    ]
    for ours, theirs in zip(*sets, strict=True):
        assert ours.inputs.equal(theirs.inputs)
