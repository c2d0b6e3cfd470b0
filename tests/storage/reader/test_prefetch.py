"""Prefetched batches: what single reads give, in the order of the shuffle, within the memory that was given."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encoding.arrow_rows import decode_tokens_row
from storage.encoding.token_rows import decode_tokens
from storage.errors import CorruptPartError
from storage.reader.batch_reader import join_samples
from storage.reader.cache import Cache
from storage.reader.prefetch import prefetch, shuffled_batches
from storage.records.records import SampleRecord
from storage.records.sample_batch import SampleBatch
from storage.records.sparse_rows import SparseRows
from tests.hypothesis_profiles import examples
from tests.storage.family_cache import write_family_cache
from tests.storage.synthetic_cache import SAMPLES_PER_PART, write_cache

NUM_PARTS = 4
WINDOW_ROWS = 400
SAMPLES = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    write_cache(path, num_parts=NUM_PARTS, num_samples=SAMPLES)
    return path


def assert_same(ours: SampleRecord, theirs: SampleRecord) -> None:
    assert ours.tokens.sample_id == theirs.tokens.sample_id
    assert ours.tokens.images == theirs.tokens.images
    np.testing.assert_array_equal(ours.tokens.token_ids, theirs.tokens.token_ids)
    np.testing.assert_array_equal(ours.tokens.response_mask, theirs.tokens.response_mask)
    assert ours.response is not None
    assert theirs.response is not None
    assert ours.response.equals(theirs.response)
    assert ours.visual.keys() == theirs.visual.keys()
    for key, rows in theirs.visual.items():
        assert ours.visual[key].equals(rows)
        np.testing.assert_array_equal(ours.relation[key].values, theirs.relation[key].values)


@given(indices=st.lists(st.integers(0, NUM_PARTS * SAMPLES - 1), min_size=1, max_size=30))
@settings(max_examples=examples(15))
def test_many_are_as_each_alone(folder: Path, indices: list[int]) -> None:
    cache = Cache.open(folder)
    batch = cache.read_many(indices)
    assert batch.indices.tolist() == indices
    for at, index in enumerate(indices):
        assert_same(batch.record(at), cache.read(index))
    assert batch.response is not None
    assert batch.visual is not None
    assert batch.relation is not None
    images = [image for shown in batch.images for image in shown]
    assert batch.response.num_rows == batch.row_offsets[-1]
    assert batch.visual.num_rows == sum(image.num_visual_tokens for image in images)
    assert len(batch.relation) == len(images)


def test_other_families_come_in_batches_too(tmp_path: Path) -> None:
    write_family_cache(tmp_path)
    cache = Cache.open(tmp_path)
    batch = cache.read_many([3, 2, 7])
    assert batch.hidden is not None
    assert len(batch.hidden) == batch.row_offsets[-1]  # flat, as everything else
    for ours, index in zip(batch.records(), (3, 2, 7), strict=True):
        theirs = cache.read(index)
        assert ours.sequence == theirs.sequence
        assert theirs.hidden is not None
        np.testing.assert_array_equal(ours.hidden, theirs.hidden)
        for key, matrix in theirs.relation.items():
            np.testing.assert_array_equal(ours.relation[key].values, matrix.values)


def test_samples_of_two_caches_are_joined_in_any_order(folder: Path, tmp_path: Path) -> None:
    write_cache(tmp_path, noise=5)  # the same ids, other rows
    caches = [Cache.open(folder), Cache.open(tmp_path, ("response", "visual"))]
    found = [cache.find_many([2, 1]) for cache in caches]
    batch = join_samples([found[1][0], found[0][0], found[1][1], found[0][1]], np.arange(4))
    for ours, (cache, index) in zip(batch.records(), [(1, 2), (0, 2), (1, 1), (0, 1)], strict=True):
        theirs = caches[cache].read(index)
        assert ours.tokens.sample_id == theirs.tokens.sample_id
        assert ours.response is not None
        assert theirs.response is not None
        assert ours.response.equals(theirs.response)
        assert [ours.visual[key].equals(rows) for key, rows in theirs.visual.items()] == [True] * len(ours.visual)
    assert batch.relation is None  # which one of them was not asked for


def test_conversations_without_signals_become_a_batch(folder: Path) -> None:
    records = [Cache.open(folder, ()).read(index) for index in (5, 0, 3)]
    batch = SampleBatch.of_tokens([record.tokens for record in records])
    assert batch.response is batch.visual is batch.relation is batch.hidden is batch.sequence is None
    for ours, theirs in zip(batch.records(), records, strict=True):
        assert ours.tokens.sample_id == theirs.tokens.sample_id
        assert ours.tokens.images == theirs.tokens.images
        np.testing.assert_array_equal(ours.tokens.token_ids, theirs.tokens.token_ids)
        np.testing.assert_array_equal(ours.tokens.response_mask, theirs.tokens.response_mask)


@pytest.mark.parametrize("indices", [[], [-1], [0, NUM_PARTS * SAMPLES]])
def test_indices_out_of_bounds_are_refused(folder: Path, indices: list[int]) -> None:
    with pytest.raises(IndexError):
        Cache.open(folder).read_many(indices)


def test_a_row_group_of_tokens_is_what_its_rows_are_one_by_one(folder: Path) -> None:
    cache = Cache.open(folder)
    part = cache._parts[1]
    for first in (0, 64):
        table, _ = cache._row_groups.read_row("tokens", part.families["tokens"], first)
        rows = decode_tokens(table, cache.identity)
        for at in range(table.num_rows):
            ours, theirs = rows.record(at), decode_tokens_row(table, at, cache.identity)
            assert (ours.sample_id, ours.split, ours.category) == (theirs.sample_id, theirs.split, theirs.category)
            assert ours.images == theirs.images
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(ours.response_mask, theirs.response_mask)
            assert rows.num_response_tokens[at] == theirs.num_response_tokens


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("num_tokens", lambda good: good + 1),
        ("num_response_tokens", lambda good: good + 1),
        ("response_starts", lambda good: [-5, *good[1:]]),
        ("response_starts", lambda good: [*good, 10**6]),
        ("response_stops", lambda good: [*good[:-1], 10**6]),
        ("response_stops", lambda good: [1, *good[1:]]),
        ("token_ids", lambda good: [-5, *good[1:]]),
        ("image_keys", lambda good: ["0" * 64, *good]),
    ],
)
def test_wrong_tokens_are_found_in_a_row_group_too(folder: Path, column: str, wrong: Callable) -> None:
    cache = Cache.open(folder)
    table, _ = cache._row_groups.read_row("tokens", cache._parts[0].families["tokens"], 0)
    values, field = table[column].to_pylist(), table.schema.field(column)
    at = next(row for row, value in enumerate(values) if value not in (0, []))
    values[at] = wrong(values[at])
    changed = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    with pytest.raises((CorruptPartError, ValueError)):
        decode_tokens_row(changed, at, cache.identity)
    with pytest.raises((CorruptPartError, ValueError)):
        decode_tokens(changed, cache.identity)


@given(data=st.data())
@settings(max_examples=examples(25))
def test_gathered_rows_are_slices_one_after_another(folder: Path, data: st.DataObject) -> None:
    cache = Cache.open(folder)
    rows = cache.read_many([data.draw(st.integers(0, 300)) for _ in range(5)]).response
    assert rows is not None
    bounds = st.tuples(st.integers(0, rows.num_rows), st.integers(0, rows.num_rows)).map(sorted)
    pieces = data.draw(st.lists(bounds, min_size=1, max_size=9))
    expected = SparseRows.concatenate([rows.slice(start, stop) for start, stop in pieces])
    assert SparseRows.gather([(rows, start, stop) for start, stop in pieces]).equals(expected)


def read_ids(folder: Path, steps: range, **settings: Any) -> list[list[str]]:
    cache = Cache.open(folder, max_bytes=settings.pop("max_bytes", 1 << 28))
    batches = shuffled_batches(cache, batch_size=16, steps=steps, window_rows=WINDOW_ROWS, **settings)
    return [list(batch.sample_ids) for batch in batches]


def test_order_is_of_seed_and_position_not_of_threads_memory_or_ranks(folder: Path) -> None:
    steps = range(25)  # an epoch is 20
    expected = read_ids(folder, steps, seed=3)
    assert len({name for batch in expected[:20] for name in batch}) == NUM_PARTS * SAMPLES
    assert read_ids(folder, steps, seed=3, num_threads=1, depth=1, max_bytes=1) == expected
    assert read_ids(folder, steps, seed=4) != expected
    for num_ranks in (2, 4):
        of_ranks = [read_ids(folder, steps, seed=3, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        for step in steps:
            of_step = [of_rank[step] for of_rank in of_ranks]
            assert [name for together in zip(*of_step, strict=True) for name in together] == expected[step]


@given(stop=st.integers(0, 23))
@settings(max_examples=examples(3))
def test_going_on_gives_what_would_have_come(folder: Path, stop: int) -> None:
    whole = read_ids(folder, range(24), seed=1)
    assert read_ids(folder, range(stop), seed=1) + read_ids(folder, range(stop, 24), seed=1) == whole


def test_memory_stays_within_its_bound_and_each_row_group_is_read_about_once(tmp_path: Path) -> None:
    """Of many small parts, so that a window spans a few of them."""
    write_cache(tmp_path, num_parts=40, num_samples=SAMPLES_PER_PART)
    plain = Cache.open(tmp_path)
    plain.read_many(range(plain.num_samples))
    groups, held = plain.num_groups_read, plain.held_bytes
    rows = int(plain.num_response_rows.sum()) + 4 * int(plain.num_images.sum())
    cache = Cache.open(tmp_path, max_bytes=held // 3)
    most = 0
    num_batches = plain.num_samples // 8
    for _ in shuffled_batches(cache, batch_size=8, steps=range(num_batches), window_rows=rows // 8):
        most = max(most, cache.held_bytes)
    assert held // 6 < most <= held // 3
    assert cache.num_groups_read <= 1.1 * groups
    thrown = Cache.open(tmp_path, max_bytes=held // 3)  # what a permutation of everything would cost
    for _ in shuffled_batches(thrown, batch_size=8, steps=range(num_batches), window_rows=1 << 30):
        pass
    assert thrown.num_groups_read > 2 * groups


def test_threads_that_want_the_same_row_group_read_it_once(folder: Path) -> None:
    cache = Cache.open(folder)
    alone = Cache.open(folder)
    alone.read_many(range(64))
    for _ in prefetch(cache.read_many, [range(64)] * 12, num_threads=6, depth=12):
        pass
    assert cache.num_groups_read == alone.num_groups_read


def test_an_error_comes_with_its_batch_and_threads_end(tmp_path: Path) -> None:
    write_cache(tmp_path, num_parts=2)
    victim = next((tmp_path / "response").glob("part-00001*"))
    cache = Cache.open(tmp_path)
    victim.write_bytes(victim.read_bytes()[:-9])
    batches = prefetch(cache.read_many, [[0], [1], [SAMPLES_PER_PART], [2]])
    assert [next(batches).indices.tolist() for _ in range(2)] == [[0], [1]]
    with pytest.raises(CorruptPartError, match=victim.name):
        next(batches)
    batches = prefetch(cache.read_many, [[0]] * 100)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_cache_is_pickled_while_a_thread_reads(folder: Path) -> None:
    cache, started, go = Cache.open(folder), threading.Event(), threading.Event()

    def wait() -> tuple[None, int]:
        started.set()
        go.wait(60)
        return None, 0

    thread = threading.Thread(target=cache._row_groups._get_or_read, args=(("a file", 0), wait))
    thread.start()
    started.wait(60)
    try:
        copy = pickle.loads(pickle.dumps(cache))
    finally:
        go.set()
        thread.join()
    assert_same(copy.read(3), cache.read(3))


def test_ranks_that_would_get_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="rank 3 of 3"):
        shuffled_batches(Cache.open(folder), batch_size=8, steps=range(1), rank=3, num_ranks=3)
    with pytest.raises(ValueError, match="expected 0 <= rank < num_ranks <= batch_size"):
        shuffled_batches(Cache.open(folder), batch_size=2, steps=range(1), num_ranks=3)


class _RecordingCache:
    """A cache that notes which draws it is asked for."""

    def __init__(self, cache: Cache) -> None:
        self.num_samples, self.shuffle, self._read_many = cache.num_samples, cache.shuffle, cache.read_many
        self.draw_sets: dict[int, int] = {}  # by a batch's first sample, the last time

    def read_many(self, indices: np.ndarray, *, draw_set: int) -> SampleBatch:
        self.draw_sets[int(indices[0])] = draw_set
        return self._read_many(indices, draw_set=draw_set)


def test_each_epoch_asks_for_the_next_set_of_draws(folder: Path) -> None:
    asked: Any = _RecordingCache(Cache.open(folder, ()))
    for step, epoch in ((0, 0), (1, 0), (2, 1), (5, 2)):
        (batch,) = shuffled_batches(asked, range(8), batch_size=4, steps=range(step, step + 1))
        assert asked.draw_sets[int(batch.indices[0])] == epoch
