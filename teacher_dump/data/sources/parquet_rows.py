"""Reads Parquet files, a few rows in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ConfigError
from teacher_dump.data.sources.row import BrokenRow, SourceRows, shorten_path

_ROWS_PER_BATCH = 64  # their images' bytes are in memory together


def read_parquet_rows(path: Path) -> SourceRows:
    """Yields rows of a Parquet file; a broken row group ends it with a BrokenRow that counts the lost rows.

    Raises ConfigError if it is not a Parquet file.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"data.sources: {path}: cannot be read as Parquet: {error}") from error
    number = 0
    with file:
        total = file.metadata.num_rows
        batches = file.iter_batches(_ROWS_PER_BATCH)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                lost = f"{total - number:,} of {total:,} rows cannot be read: {error}"
                yield f"{shorten_path(path)}[{number}]", BrokenRow(lost)
                return
            if batch is None:
                return
            for row in to_plain_rows(batch):
                yield f"{shorten_path(path)}[{number}]", row
                number += 1


def to_plain_rows(batch: pa.RecordBatch | pa.Table) -> list[Any]:
    """Returns Arrow rows as plain data; a row with text that is not UTF-8 becomes a BrokenRow."""
    try:
        return batch.to_pylist()
    except (ValueError, pa.ArrowException):
        return [_to_plain_row(batch, number) for number in range(batch.num_rows)]


def _to_plain_row(batch: pa.RecordBatch | pa.Table, number: int) -> Any:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except (ValueError, pa.ArrowException) as error:
        return BrokenRow(f"cannot be read: {error}")
