import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.encoding.parquet_schema import (
    FAMILIES,
    ROW_GROUP_BYTES,
    SCHEMAS,
    check_schema,
    encode_parquet,
    split_row_groups,
)
from storage.errors import CorruptPartError


def make_relation_rows(count, payload_bytes):
    return [
        {"image_key": f"{row:064x}", "num_rows": 1, "norm": np.float32(1), "payload": bytes(payload_bytes)}
        for row in range(count)
    ]


def read_metadata(content):
    return pq.ParquetFile(pa.BufferReader(content)).metadata


def read_group_sizes(content):
    metadata = read_metadata(content)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@pytest.mark.parametrize(
    ("count", "payload_bytes", "sizes"),
    [
        (0, 10, []),
        (1, 10, [1]),
        (64, 10, [64]),
        (130, 10, [64, 64, 2]),
        (5, ROW_GROUP_BYTES // 2, [2, 2, 1]),
        (3, ROW_GROUP_BYTES * 2, [1, 1, 1]),
    ],
)
def test_row_groups_end_at_64_rows_or_a_mebibyte(count, payload_bytes, sizes):
    content = encode_parquet(
        "relation", split_row_groups(make_relation_rows(count, payload_bytes)), zstd_level=3, metadata={}
    )
    assert read_group_sizes(content) == sizes
    table = pq.read_table(pa.BufferReader(content))
    assert table["image_key"].to_pylist() == [f"{row:064x}" for row in range(count)]


def test_files_are_zstd_deterministic_and_without_nulls():
    rows = make_relation_rows(3, 1000)
    content = encode_parquet("relation", [rows], zstd_level=9, metadata={})
    assert content == encode_parquet("relation", [rows], zstd_level=9, metadata={})
    group = read_metadata(content).row_group(0)
    assert {group.column(column).compression for column in range(group.num_columns)} == {"ZSTD"}
    for family in FAMILIES:
        assert not any(field.nullable for field in SCHEMAS[family])


def test_a_page_with_a_flipped_bit_is_noticed_by_its_checksum():
    payload = np.random.default_rng(0).bytes(4000)  # incompressible, so it lies in the page as it is
    content = bytearray(
        encode_parquet("relation", [[{**make_relation_rows(1, 0)[0], "payload": payload}]], zstd_level=1, metadata={})
    )
    position = bytes(content).index(payload[:100])
    content[position + 50] ^= 1
    pq.read_table(pa.BufferReader(bytes(content)), page_checksum_verification=False)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(pa.BufferReader(bytes(content)), page_checksum_verification=True)


def test_other_columns_are_refused():
    check_schema("tokens", SCHEMAS["tokens"], "x")
    with pytest.raises(CorruptPartError, match=r"x: columns are .*norm.*, expected .*entropy"):
        check_schema("visual", SCHEMAS["relation"], "x")
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMAS["visual"]])
    with pytest.raises(CorruptPartError, match=r"columns are image_key string or null, .*, expected image_key string,"):
        check_schema("visual", nullable, "x")
