"""Parquet files, a few rows in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ConfigError
from teacher_dump.data.sources.row import Broken, Rows, short_place

_ROWS_PER_BATCH = 64  # their images' bytes are in memory together


def parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file. A row group that cannot be decoded ends it with a Broken that says how many rows went.

    ConfigError: no Parquet file.
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
                yield f"{short_place(path)}[{number}]", Broken(lost)
                return
            if batch is None:
                return
            for row in plain_rows(batch):
                yield f"{short_place(path)}[{number}]", row
                number += 1


def plain_rows(batch: pa.RecordBatch | pa.Table) -> list[Any]:
    """Arrow rows as plain data; a text that is no UTF-8 makes its row a Broken."""
    try:
        return batch.to_pylist()
    except (ValueError, pa.ArrowException):
        return [_plain_row(batch, number) for number in range(batch.num_rows)]


def _plain_row(batch: pa.RecordBatch | pa.Table, number: int) -> Any:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except (ValueError, pa.ArrowException) as error:
        return Broken(f"cannot be read: {error}")
