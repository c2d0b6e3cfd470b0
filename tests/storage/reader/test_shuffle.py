"""The order of samples: every one once an epoch, mixed within a window, of seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encoding.distributions import ROWS_PER_GROUP, RowFormat, encode_groups
from storage.reader.shuffle import BLOCK_ROWS, Shuffle, cut_blocks
from storage.records.sparse_rows import SparseRows
from tests.hypothesis_profiles import examples


@st.composite
def shuffles(draw: st.DrawFn) -> Shuffle:
    blocks = draw(st.lists(st.integers(0, 9), min_size=1, max_size=60))
    rows = draw(st.lists(st.integers(1, 50), min_size=10, max_size=10))
    return Shuffle(np.array(blocks), np.array(rows), window_rows=draw(st.integers(1, 600)))


@given(shuffle=shuffles(), seed=st.integers(0, 100), epoch=st.integers(0, 5))
def test_an_epoch_has_every_sample_once_and_is_of_seed_and_epoch(shuffle: Shuffle, seed: int, epoch: int) -> None:
    order = shuffle.epoch(epoch, seed=seed).tolist()
    assert sorted(order) == list(range(len(shuffle)))
    for other in range(4):
        shuffle.epoch(other, seed=seed + 1)
    assert shuffle.epoch(epoch, seed=seed).tolist() == order  # made anew: it was forgotten


@given(shuffle=shuffles(), size=st.integers(1, 70), seed=st.integers(0, 9))
def test_batches_are_consecutive_pieces_of_the_endless_sequence(shuffle: Shuffle, size: int, seed: int) -> None:
    endless = np.concatenate([shuffle.epoch(epoch, seed=seed) for epoch in range(5 * size // len(shuffle) + 1)])
    got = np.concatenate([shuffle.batch(step, size, seed=seed) for step in range(5)])
    assert got.tolist() == endless[: 5 * size].tolist()


@pytest.mark.parametrize("window_rows", [1, 700, 4000, 10**9])
def test_seeds_and_epochs_shuffle_differently(window_rows: int) -> None:
    shuffle = Shuffle(np.arange(400) // 10, np.full(40, 100), window_rows=window_rows)
    orders = {tuple(shuffle.epoch(epoch, seed=seed)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_what_fits_into_a_window_is_a_plain_permutation() -> None:
    expected = np.random.Generator(np.random.PCG64([7, 2])).permutation(50)
    blocks, rows = np.arange(50) // 5, np.full(10, 100)
    assert Shuffle(blocks, rows, window_rows=1000).epoch(2, seed=7).tolist() == expected.tolist()
    assert Shuffle.plain(50).epoch(2, seed=7).tolist() == expected.tolist()
    assert Shuffle(blocks, rows, window_rows=999).epoch(2, seed=7).tolist() != expected.tolist()


@given(seed=st.integers(0, 1000), window=st.integers(4, 40))
@settings(max_examples=examples(30))
def test_a_block_is_read_within_one_window(seed: int, window: int) -> None:
    """Of equal blocks, those begun and not finished are never many more rows than the window."""
    num_blocks, samples = 100, 20
    blocks = np.repeat(np.arange(num_blocks), samples)
    order = Shuffle(blocks, np.full(num_blocks, 100), window_rows=100 * window).epoch(0, seed=seed)
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    first, last = (each(places.reshape(num_blocks, samples), axis=1) for each in (np.min, np.max))
    begun = (first[:, None] <= np.arange(len(order))) & (last[:, None] >= np.arange(len(order)))
    assert begun.sum(0).max() <= window + 3  # that of the middle, and what chance moves: samples lie unevenly


def test_samples_that_are_neighbours_part_and_others_meet() -> None:
    blocks = np.repeat(np.arange(200), 30)
    order = Shuffle(blocks, np.full(200, 100), window_rows=4000).epoch(0, seed=0)
    batches = blocks[order][: 6000 // 32 * 32].reshape(-1, 32)
    distinct = np.array([len(np.unique(batch)) for batch in batches])
    assert distinct.min() > 8  # in the first and the last batch too, where half as many blocks are open
    assert distinct.mean() > 18  # 40 blocks are open: 32 draws of them hit 22


def test_nothing_to_shuffle_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Shuffle.plain(0)
    with pytest.raises(ValueError, match="window of 0 rows"):
        Shuffle(np.zeros(1, np.int64), np.ones(1, np.int64), window_rows=0)


@given(counts=st.lists(st.integers(0, 3 * ROWS_PER_GROUP), min_size=1, max_size=40), data=st.data())
@settings(max_examples=examples(50))
def test_blocks_are_whole_row_groups_of_a_part(counts: list[int], data: st.DataObject) -> None:
    parts = np.sort(np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts)))))
    visual = np.array(data.draw(st.lists(st.integers(0, 2000), min_size=len(counts), max_size=len(counts))))
    responses = np.array(counts, np.int32)
    blocks = cut_blocks(parts, responses, visual)
    assert (np.diff(blocks) >= 0).all()
    assert sorted(set(blocks.tolist())) == list(range(blocks[-1] + 1))
    borders = set((np.flatnonzero(np.diff(blocks)) + 1).tolist())
    allowed = set()
    for part in np.unique(parts):
        inside = np.flatnonzero(parts == part)
        keys = [{"sample_id": str(index)} for index in inside]
        rows = [_make_empty_rows(int(count)) for count in responses[inside]]
        sizes = [len(group) for group in encode_groups(keys, rows, RowFormat(4, 0.0, 0.0, 0)).groups]
        allowed |= set((inside[0] + np.cumsum([0, *sizes])).tolist())
    assert borders <= allowed
    assert {int(at) + 1 for at in np.flatnonzero(np.diff(parts))} <= borders
    for block in range(blocks[-1] + 1):
        inside = np.flatnonzero(blocks == block)
        rows = responses[inside].sum() + visual[inside].sum()
        last_of_part = inside[-1] + 1 == len(parts) or parts[inside[-1] + 1] != parts[inside[-1]]
        assert rows >= BLOCK_ROWS or last_of_part


def _make_empty_rows(num_rows: int) -> SparseRows:
    """Rows of which nothing is stored."""
    zeros = np.zeros(num_rows, np.float32)
    return SparseRows(
        offsets=np.zeros(num_rows + 1, np.int64),
        ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        num_exact=np.zeros(num_rows, np.int32),
        tail_mass=zeros + 1,
        entropy=zeros,
        log_sum_exp=np.zeros((num_rows, 0), np.float32),
        label_logprob=zeros,
    )
