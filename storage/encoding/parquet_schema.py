"""The Arrow schemas of the families, and the encoding of a part's Parquet file.

Ids, spans, counts and scalars are ordinary columns; the entries of rows and matrices are binary payloads.
Lists of scalars have one value per distribution row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CorruptPartError

SAMPLES_PER_ROW_GROUP = 64
_SCALARS = ("entropy", "tail_mass", "log_sum_exp", "label_logprob")
_COMPRESSED_ALREADY = ("response", "visual", "images")  # in their blocks and payloads
ROW_GROUP_BYTES = 1 << 20  # of payload; a group of relation matrices would otherwise be tens of MB a read


def _make_field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _make_list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


_ROW_SCALARS = [
    _make_field("entropy", _make_list(pa.float32())),
    _make_field("tail_mass", _make_list(pa.float32())),
    _make_field("log_sum_exp", _make_list(pa.float32())),  # as many a row as temperatures are configured besides 1
]
_ROWS = [*_ROW_SCALARS, _make_field("block", pa.binary())]  # of a whole row group, at its first row
_RESPONSE = [
    _make_field("sample_id", pa.string()),
    _make_field("num_rows", pa.int32()),
    _make_field("label_logprob", _make_list(pa.float32())),
]
_VISUAL = [_make_field("image_key", pa.string()), _make_field("num_rows", pa.int32())]

SCHEMAS: Mapping[str, pa.Schema] = {
    "tokens": pa.schema(
        [
            _make_field("sample_id", pa.string()),
            _make_field("row_id", pa.string()),
            _make_field("half", pa.string()),  # of a preference pair: chosen or rejected; else empty
            _make_field("copy", pa.int32()),
            _make_field("source", pa.int32()),
            _make_field("split", pa.string()),
            _make_field("category", pa.string()),
            _make_field("num_tokens", pa.int32()),
            _make_field("num_response_tokens", pa.int32()),
            _make_field("token_ids", _make_list(pa.int32())),
            _make_field("response_starts", _make_list(pa.int32())),  # spans of the response mask: start : stop
            _make_field("response_stops", _make_list(pa.int32())),
            _make_field("image_paths", _make_list(pa.string())),
            _make_field("image_sha256s", _make_list(pa.string())),
            _make_field("image_visual_tokens", _make_list(pa.int32())),
            _make_field("image_keys", _make_list(pa.string())),
        ]
    ),
    "response": pa.schema([*_RESPONSE, *_ROWS]),
    "visual": pa.schema([*_VISUAL, *_ROWS]),
    "relation": pa.schema(
        [
            _make_field("image_key", pa.string()),
            _make_field("num_rows", pa.int32()),
            _make_field("norm", pa.float32()),
            _make_field("payload", pa.binary()),
        ]
    ),
    "sequence": pa.schema(
        [
            _make_field("sample_id", pa.string()),
            _make_field("num_tokens", pa.int32()),
            _make_field("logprob", pa.float32()),
        ]
    ),
    "hidden": pa.schema(
        [
            _make_field("sample_id", pa.string()),
            _make_field("num_rows", pa.int32()),
            _make_field("width", pa.int32()),
            _make_field("relative_error", _make_list(pa.float32())),  # of each row's encoding
            _make_field("payload", pa.binary()),
        ]
    ),
    "images": pa.schema(
        [_make_field("sha256", pa.string()), _make_field("num_bytes", pa.int32()), _make_field("payload", pa.binary())]
    ),
}
FAMILIES = tuple(SCHEMAS)
KEY_COLUMNS = ("row_id", "half", "copy", "source")  # of tokens: the fields of a SampleKey, in order


@dataclass(frozen=True)
class RowGroups:
    """The rows of one family's file of a part, in row groups."""

    groups: Sequence[Sequence[Mapping[str, Any]]]  # the columns of each row
    metadata: Mapping[str, str]  # of the file
    errors: Sequence[float]  # of encoding, in the family's measure (error_summaries.MEASURES)

    @property
    def num_rows(self) -> int:
        """The number of Parquet rows in all groups."""
        return sum(map(len, self.groups))


def encode_parquet(
    family: str, groups: Sequence[Sequence[Mapping[str, Any]]], *, zstd_level: int, metadata: Mapping[str, str]
) -> bytes:
    """Returns the bytes of one family's Parquet file of a part; each group of rows becomes a row group.

    The same rows give the same bytes with the same version of pyarrow.
    """
    schema = SCHEMAS[family]
    sink = pa.BufferOutputStream()
    plain = [name for name in ("block", "payload") if name in schema.names and family in _COMPRESSED_ALREADY]
    leaves = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]
    scalars = [f"{name}.list.element" for name in _SCALARS if name in schema.names]
    settings: dict[str, Any] = {
        "compression": {leaf: "none" if leaf in plain else "zstd" for leaf in leaves},
        "compression_level": {leaf: zstd_level for leaf in leaves if leaf not in plain},
        "use_dictionary": [name for name in ("half", "split", "category") if name in schema.names],
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


def split_row_groups(rows: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """Splits rows into groups of at most SAMPLES_PER_ROW_GROUP rows and ROW_GROUP_BYTES of payload.

    A single row may exceed ROW_GROUP_BYTES.
    """
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
    """Raises CorruptPartError unless a file has the columns of its family."""
    expected = SCHEMAS[family]
    if not got.equals(expected):
        raise CorruptPartError(f"{place}: columns are {_describe_columns(got)}, expected {_describe_columns(expected)}")


def _describe_columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}{' or null' if field.nullable else ''}" for field in schema)
