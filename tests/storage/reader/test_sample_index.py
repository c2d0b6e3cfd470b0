"""The index of a cache: Arrow columns that read as sequences, and the places of samples."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from storage.encoding.parquet_schema import SCHEMAS
from storage.reader.sample_index import INDEX_COLUMNS, SampleIndex, TextColumn

SCHEMA = pa.schema([SCHEMAS["tokens"].field(name) for name in INDEX_COLUMNS])


def table(ids: list[str], splits: list[str], images: list[list[int]]) -> pa.Table:
    count = len(ids)
    columns = [ids, splits, ["c"] * count, range(5, 5 + count), range(count), images]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)


@pytest.fixture
def index() -> SampleIndex:
    tables = (
        table(["b", "ä", "𝄞"], ["train", "test", "train"], [[4, 2], [], [1]]),
        table([], [], []),
        table(["a", "﹏"], ["val", "train"], [[], [7]]),
    )
    return SampleIndex(tables)


def test_samples_are_found_by_position_and_by_id(index: SampleIndex) -> None:
    parts, rows = index.locate(np.array([0, 2, 3, 4]))
    assert (parts.tolist(), rows.tolist()) == ([0, 0, 2, 2], [0, 2, 0, 1])
    assert index.assign_parts().tolist() == [0, 0, 0, 2, 2]
    assert [index.find(name) for name in index.sample_ids] == [0, 1, 2, 3, 4]
    for name in ("A", "aa", "z", "\U0001ffff"):
        with pytest.raises(KeyError):
            index.find(name)


def test_counts_are_those_of_the_lists(index: SampleIndex) -> None:
    assert index.num_images.tolist() == [2, 0, 1, 0, 1]
    assert index.num_visual_tokens.tolist() == [6, 0, 1, 0, 7]
    assert index.num_tokens.tolist() == [5, 6, 7, 5, 6]
    assert index.num_response_rows.tolist() == [0, 1, 2, 0, 1]


def test_a_column_reads_as_a_sequence_of_texts(index: SampleIndex) -> None:
    splits = index.splits
    assert splits == ["train", "test", "train", "val", "train"]
    assert splits != ["train"]
    assert (splits[-1], splits[1:3], len(splits)) == ("train", ["test", "train"], 5)
    assert (splits.count("train"), splits.count("nobody")) == (3, 0)
    assert splits.unique() == ["train", "test", "val"]
    assert splits.find_positions(("val", "train")).tolist() == [0, 2, 3, 4]
    assert splits.find_positions(()).tolist() == splits.find_positions(("x",)).tolist() == []
    assert "val" in splits
    with pytest.raises(IndexError):
        splits[5]


def test_an_empty_cache_has_an_empty_index() -> None:
    index = SampleIndex([])
    assert len(index) == 0
    assert index.splits == []
    assert not index.has_duplicates()
    assert index.assign_parts().tolist() == index.num_visual_tokens.tolist() == []


def test_an_id_that_stands_twice_is_seen(index: SampleIndex) -> None:
    assert not index.has_duplicates()
    assert SampleIndex([table(["a"], ["s"], [[]])] * 2).has_duplicates()


def test_a_million_samples_cost_what_their_texts_do() -> None:
    count = 1_000_000
    ids = pa.array([f"sample-{number:07d}" for number in range(count)])
    columns = [ids, pa.array(["train"] * count), pa.array(["c"] * count)]
    numbers = pa.array(np.full(count, 9, np.int32))
    images = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32)), numbers)
    whole = pa.table([*columns, numbers, numbers, images.cast(SCHEMA.field("image_visual_tokens").type)], SCHEMA)
    index = SampleIndex([whole.slice(start, 1000) for start in range(0, count, 1000)])
    texts = (index.sample_ids, index.splits, index.categories)
    numbers_bytes = index.num_tokens.nbytes + index.num_images.nbytes + index.num_visual_tokens.nbytes
    assert sum(column.arrow.get_total_buffer_size() for column in texts) + numbers_bytes < 60 * count
    assert index.find("sample-0765432") == 765432
    assert isinstance(index.sample_ids, TextColumn)
