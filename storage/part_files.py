"""Row groups of a cache's part files, read on demand, each file checked when first touched.

The memory for them is bounded: the least recently used row groups are let go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.commit import check_file
from storage.documents import FileEntry
from storage.errors import CorruptPartError
from storage.files import Folder
from storage.schema import check_schema

MAX_OPEN_FOOTERS = 1024  # parsed Parquet footers that are kept, some tens of KB each


class _Footer:
    """A parsed footer, and the first row of each row group (the total last)."""

    def __init__(self, metadata: pq.FileMetaData) -> None:
        self.metadata = metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])


class PartFiles:
    """Reads Parquet rows by (file, row). Invariant: what it returns is of files that passed their checks."""

    def __init__(self, folder: Folder, *, max_bytes: int, checksums: bool) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._checksums = checksums
        self._checked: set[str] = set()
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._held_bytes = 0

    def columns(self, family: str, entry: FileEntry, names: Sequence[str]) -> pa.Table:
        """Some columns of a whole file; they are not kept. Errors: CorruptPartError."""
        self._check(entry)
        try:
            with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                parquet = self._parquet(family, entry, source)
                table = parquet.read(columns=list(names), use_threads=False)
                return _validated(table, entry.rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error

    def row(self, family: str, entry: FileEntry, row: int) -> tuple[pa.Table, int]:
        """The row group that holds a Parquet row, and the row's place in it. Errors: CorruptPartError."""
        starts = self._footer(family, entry).starts
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if not 0 <= row < starts[-1]:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: has no row {row}")
        return self._group(family, entry, group), row - int(starts[group])

    def _group(self, family: str, entry: FileEntry, group: int) -> pa.Table:
        key = (entry.file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        try:
            with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                parquet = self._parquet(family, entry, source)
                num_rows = parquet.metadata.row_group(group).num_rows
                table = _validated(parquet.read_row_group(group, use_threads=False), num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error
        self._groups[key] = table
        self._held_bytes += table.nbytes
        while self._held_bytes > self._max_bytes and len(self._groups) > 1:
            _, dropped = self._groups.popitem(last=False)
            self._held_bytes -= dropped.nbytes
        return table

    def _footer(self, family: str, entry: FileEntry) -> _Footer:
        self._check(entry)
        if entry.file not in self._footers:
            try:
                with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                    self._parquet(family, entry, source)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error
        return self._footers[entry.file]

    def _parquet(self, family: str, entry: FileEntry, source: pa.NativeFile) -> pq.ParquetFile:
        known = self._footers.get(entry.file)
        parquet = pq.ParquetFile(
            source,
            metadata=known and known.metadata,
            page_checksum_verification=True,
            pre_buffer=self._folder.is_remote,  # the columns of a row group in one request
        )
        if known is None:
            check_schema(family, parquet.schema_arrow, self._folder.place(entry.file))
            if parquet.metadata.num_rows != entry.rows:
                got, place = parquet.metadata.num_rows, self._folder.place(entry.file)
                raise CorruptPartError(f"{place}: has {got} rows, its commit says {entry.rows}")
            self._footers[entry.file] = _Footer(parquet.metadata)
            if len(self._footers) > MAX_OPEN_FOOTERS:
                self._footers.popitem(last=False)
        return parquet

    def _check(self, entry: FileEntry) -> None:
        if entry.file not in self._checked:
            check_file(self._folder, entry, content=self._checksums)
            self._checked.add(entry.file)


def _validated(table: pa.Table, num_rows: int) -> pa.Table:
    """The table in one chunk a column, if Arrow finds its buffers whole and nothing in it null."""
    table.validate(full=True)
    if table.num_rows != num_rows:
        raise ValueError(f"{table.num_rows} rows were read, {num_rows} expected")
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is null")
    return table.combine_chunks()
