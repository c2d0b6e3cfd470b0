"""Part files of distribution rows: row groups, scalars, and what a reader refuses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.encoding import distributions
from storage.encoding.distributions import RowFormat, decode_group, decode_id_groups, encode_groups, rounded
from storage.encoding.parquet_schema import encode_parquet
from storage.errors import CorruptPartError
from storage.records.sparse_rows import SparseRows
from tests.storage.synthetic_cache import TAU, VOCAB_SIZE, make_logits, select

KEPT = RowFormat(vocab_size=VOCAB_SIZE, tau=TAU, rounding_kl=5e-4, num_temperatures=0)


def make_samples(counts: list[int], seed: int = 0) -> list[SparseRows]:
    rng = np.random.default_rng(seed)
    return [select(make_logits(rng, count), tau=TAU, rng=rng, labels=True) for count in counts]


def write(samples: list[SparseRows], kept: RowFormat = KEPT) -> bytes:
    keys = [{"sample_id": f"s{number}"} for number in range(len(samples))]
    groups = encode_groups(keys, samples, kept)
    return encode_parquet("response", groups.groups, zstd_level=3, metadata=groups.metadata)


def read(content: bytes, kept: RowFormat = KEPT) -> list[list[SparseRows]]:
    """The samples of each row group."""
    file = pq.ParquetFile(pa.BufferReader(content))
    id_groups = decode_id_groups(file.metadata.metadata, kept.vocab_size)
    found = []
    for number in range(file.metadata.num_row_groups):
        rows, starts = decode_group(file.read_row_group(number), id_groups, kept.num_temperatures)
        cuts = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        found.append([rows.slice(start, stop) for start, stop in cuts])
    return found


def test_samples_come_back_each_with_its_own_rows(monkeypatch):
    monkeypatch.setattr(distributions, "ROWS_PER_GROUP", 10)
    samples = make_samples([4, 0, 6, 11, 1, 9])
    groups = read(write(samples))
    assert [len(group) for group in groups] == [3, 1, 2]  # 10 rows, one sample that is longer, 10 rows
    for got, sample in zip([sample for group in groups for sample in group], samples, strict=True):
        assert got.offsets.tolist() == sample.offsets.tolist()
        np.testing.assert_allclose(got.tail_mass, sample.tail_mass, rtol=2**-11)
        np.testing.assert_allclose(got.entropy, sample.entropy, rtol=2**-11)
        assert got.label_logprob is not None
        assert sample.label_logprob is not None
        np.testing.assert_allclose(got.label_logprob, sample.label_logprob, rtol=2**-11)


def test_temperatures_are_scalars_of_each_row():
    kept = RowFormat(VOCAB_SIZE, TAU, 0.0, 2)
    (sample,) = make_samples([5])
    scalars = np.arange(10, dtype=np.float32).reshape(5, 2)
    sample = SparseRows(**{**vars(sample), "log_sum_exp": scalars})
    ((got,),) = read(write([sample], kept), kept)
    assert got.log_sum_exp.tolist() == scalars.tolist()
    with pytest.raises(ValueError, match="rows have 2 temperatures, the cache 0"):
        write([sample], KEPT)


def test_a_part_without_samples_is_a_file_without_rows():
    assert read(write([])) == []


def test_the_same_rows_make_the_same_bytes():
    assert write(make_samples([3, 4])) == write(make_samples([3, 4]))


@given(st.floats(-100, 100, width=32))
def test_a_rounded_scalar_is_within_one_part_in_2048_and_ends_in_zeros(value):
    (got,) = rounded(np.array([value], np.float32))
    assert abs(got - value) <= abs(value) * 2**-11 + 1e-38
    assert np.float32(got).view(np.uint32) & 0x1FFF == 0


def test_a_tail_that_would_round_to_one_beside_a_head_stays_below_it():
    row = SparseRows(
        offsets=np.array([0, 1], np.int64), ids=np.zeros(1, np.int32),
        logprobs=np.log(np.array([1e-4], np.float32)), num_exact=np.ones(1, np.int32),
        tail_mass=np.array([1 - 1e-4], np.float32), entropy=np.ones(1, np.float32),
        log_sum_exp=np.zeros((1, 0), np.float32), label_logprob=np.full(1, -1, np.float32),
    )  # fmt: skip
    kept = RowFormat(VOCAB_SIZE, 0.0, 5e-4, 0)
    ((got,),) = read(write([row], kept), kept)
    assert got.tail_mass[0] < 1


def spoilt(content: bytes, change) -> bytes:
    file = pq.ParquetFile(pa.BufferReader(content))
    table = file.read_row_group(0)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    change(columns)
    sink = pa.BufferOutputStream()
    metadata = {distributions.ID_GROUPS_KEY: file.metadata.metadata[distributions.ID_GROUPS_KEY.encode()].decode()}
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(pa.table(columns, schema=table.schema))
        writer.add_key_value_metadata(metadata)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda columns: columns["block"].__setitem__(1, b"x"), "more than one block"),
        (lambda columns: columns["num_rows"].__setitem__(0, -1), "negative"),
        (lambda columns: columns["num_rows"].__setitem__(0, 9), "other lengths"),
        (lambda columns: columns["entropy"][0].pop(), "other lengths"),
        (lambda columns: columns["tail_mass"][1].__setitem__(0, 5.0), "outside 0..1"),
        (lambda columns: columns["block"].__setitem__(0, b""), "shorter than its header"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(change, problem):
    with pytest.raises(CorruptPartError, match=problem):
        read(spoilt(write(make_samples([3, 4])), change))


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (None, "has no table"),
        ({b"other": b"1"}, "has no table"),
        ({b"stillhouse.id_groups": b"\xff\xff"}, "table of id groups"),
        ({b"stillhouse.id_groups": b"0000000000"}, "table of id groups"),
    ],
)
def test_a_missing_or_damaged_table_of_ids_is_refused(metadata, problem):
    with pytest.raises(CorruptPartError, match=problem):
        decode_id_groups(metadata, VOCAB_SIZE)


def test_a_sample_whose_offsets_do_not_fit_its_entries_is_refused_beside_whole_ones():
    whole, shifted = make_samples([3, 3])
    shifted = SparseRows(**{**vars(shifted), "offsets": shifted.offsets + 1})
    with pytest.raises(ValueError, match="offsets must start with 0"):
        write([whole, shifted])
