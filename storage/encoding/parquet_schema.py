"""The Arrow schemas of the families, and a part's Parquet bytes.

Ids, spans, counts and scalars are ordinary columns; the entries of rows and matrices are flat binary
payloads (codec.py). Lists of scalars have one value for each distribution row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CorruptPartError

SAMPLES_PER_ROW_GROUP = 64
_SCALARS = ("entropy", "tail_mass", "log_sum_exp", "label_logprob")
_COMPRESSED_ALREADY = ("response", "visual", "images")  # in their blocks and payloads
ROW_GROUP_BYTES = 1 << 20  # of payload; a group of relation matrices would otherwise be tens of MB a read


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


_ROW_SCALARS = [
    _field("entropy", _list(pa.float32())),
    _field("tail_mass", _list(pa.float32())),
    _field("log_sum_exp", _list(pa.float32())),  # as many a row as temperatures are configured besides 1
]
_ROWS = [*_ROW_SCALARS, _field("block", pa.binary())]  # of a whole row group, at its first row
_RESPONSE = [
    _field("sample_id", pa.string()),
    _field("num_rows", pa.int32()),
    _field("label_logprob", _list(pa.float32())),
]
_VISUAL = [_field("image_key", pa.string()), _field("num_rows", pa.int32())]

SCHEMAS: Mapping[str, pa.Schema] = {
    "tokens": pa.schema(
        [
            _field("sample_id", pa.string()),
            _field("split", pa.string()),
            _field("category", pa.string()),
            _field("num_tokens", pa.int32()),
            _field("num_response_tokens", pa.int32()),
            _field("token_ids", _list(pa.int32())),
            _field("response_starts", _list(pa.int32())),  # spans of the response mask: start : stop
            _field("response_stops", _list(pa.int32())),
            _field("image_paths", _list(pa.string())),
            _field("image_sha256s", _list(pa.string())),
            _field("image_visual_tokens", _list(pa.int32())),
            _field("image_keys", _list(pa.string())),
        ]
    ),
    "response": pa.schema([*_RESPONSE, *_ROWS]),
    "visual": pa.schema([*_VISUAL, *_ROWS]),
    "relation": pa.schema(
        [
            _field("image_key", pa.string()),
            _field("num_rows", pa.int32()),
            _field("norm", pa.float32()),
            _field("payload", pa.binary()),
        ]
    ),
    "sequence": pa.schema(
        [_field("sample_id", pa.string()), _field("num_tokens", pa.int32()), _field("logprob", pa.float32())]
    ),
    "hidden": pa.schema(
        [
            _field("sample_id", pa.string()),
            _field("num_rows", pa.int32()),
            _field("width", pa.int32()),
            _field("relative_error", _list(pa.float32())),  # of each row's encoding
            _field("payload", pa.binary()),
        ]
    ),
    "images": pa.schema(
        [_field("sha256", pa.string()), _field("num_bytes", pa.int32()), _field("payload", pa.binary())]
    ),
}
FAMILIES = tuple(SCHEMAS)


def parquet_bytes(
    family: str, groups: Sequence[Sequence[Mapping[str, Any]]], *, zstd_level: int, metadata: Mapping[str, str]
) -> bytes:
    """A part's file of one family, of these row groups. The same rows give the same bytes under the same pyarrow."""
    schema = SCHEMAS[family]
    sink = pa.BufferOutputStream()
    plain = [name for name in ("block", "payload") if name in schema.names and family in _COMPRESSED_ALREADY]
    leaves = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]
    scalars = [f"{name}.list.element" for name in _SCALARS if name in schema.names]
    settings: dict[str, Any] = {
        "compression": {leaf: "none" if leaf in plain else "zstd" for leaf in leaves},
        "compression_level": {leaf: zstd_level for leaf in leaves if leaf not in plain},
        "use_dictionary": [name for name in ("split", "category") if name in schema.names],
        "column_encoding": dict.fromkeys(scalars, "BYTE_STREAM_SPLIT") or None,
        "write_statistics": [name for name in ("sample_id", "split", "num_rows") if name in schema.names],
        "write_page_checksum": True,
        "store_schema": False,
    }
    with pq.ParquetWriter(sink, schema, **settings) as writer:
        for group in groups:
            columns = [pa.array([row[field.name] for row in group], field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(group))
        writer.add_key_value_metadata(metadata)
    return sink.getvalue().to_pybytes()


def row_groups(rows: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """Rows cut into groups of at most SAMPLES_PER_ROW_GROUP, and of ROW_GROUP_BYTES of payload or one row."""
    groups, start, size = [], 0, 0
    for position, row in enumerate(rows):
        row_bytes = len(row.get("payload", b""))
        full = position - start >= SAMPLES_PER_ROW_GROUP or size + row_bytes > ROW_GROUP_BYTES
        if position > start and full:
            groups.append(rows[start:position])
            start, size = position, 0
        size += row_bytes
    return [*groups, rows[start:]] if start < len(rows) else groups


def whole_column(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece; it is copied only if it is in several, where `combine_chunks` always copies."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def check_schema(family: str, got: pa.Schema, place: str) -> None:
    """CorruptPartError unless a file's columns are those of its family."""
    expected = SCHEMAS[family]
    if not got.equals(expected):
        raise CorruptPartError(f"{place}: columns are {_columns(got)}, expected {_columns(expected)}")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
