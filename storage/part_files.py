"""Row groups of a cache's part files, read on demand, each file checked when first touched.

The memory for them is bounded: the least recently used row groups are let go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.columns import sparse_rows
from storage.commit import check_file
from storage.distributions import RowFormat, decode_group, decode_id_groups
from storage.documents import FileEntry
from storage.errors import CorruptPartError
from storage.files import Folder
from storage.id_groups import IdGroups
from storage.rows import SparseRows
from storage.schema import check_schema

MAX_OPEN_FOOTERS = 1024  # parsed Parquet footers that are kept, some tens of KB each


class _Footer:
    """A parsed footer, and the first row of each row group (the total last)."""

    def __init__(self, metadata: pq.FileMetaData) -> None:
        self.metadata = metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])


class _Rows:
    """A row group of distributions: the key of each Parquet row, all their rows, and where each's start."""

    def __init__(self, keys: list[str], rows: SparseRows, starts: NDArray[np.int64]) -> None:
        self.keys = keys
        self.rows = rows
        self.starts = starts


class PartFiles:
    """Reads Parquet rows by (file, row). Invariant: what it returns is of files that passed their checks."""

    def __init__(self, folder: Folder, *, max_bytes: int, checksums: bool) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._checksums = checksums
        self._checked: set[str] = set()
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._held: OrderedDict[tuple[str, int], tuple[pa.Table | _Rows | IdGroups, int]] = OrderedDict()
        self._held_bytes = 0

    def columns(self, family: str, entry: FileEntry, names: Sequence[str]) -> pa.Table:
        """Some columns of a whole file; they are not kept. Errors: CorruptPartError."""
        self._check(entry)
        try:
            with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                parquet = self._parquet(family, entry, source)
                table = parquet.read(columns=list(names), use_threads=False)
                return validated(table, entry.rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error

    def row(self, family: str, entry: FileEntry, row: int) -> tuple[pa.Table, int]:
        """The row group that holds a Parquet row, and the row's place in it. Errors: CorruptPartError."""
        group, at = self._place(family, entry, row)
        table = self._hold((entry.file, group), lambda: _sized(self._read_group(family, entry, group)))
        return table, at

    def sparse_rows(self, family: str, entry: FileEntry, row: int, kept: RowFormat) -> tuple[str, SparseRows]:
        """The key of a Parquet row (sample id or image key) and its distribution rows. Errors: CorruptPartError."""
        group, at = self._place(family, entry, row)
        try:
            rows = self._hold((entry.file, group), lambda: self._read_rows(family, entry, group, kept))
        except CorruptPartError as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error
        return rows.keys[at], rows.rows.slice(int(rows.starts[at]), int(rows.starts[at + 1])).copy()

    def _place(self, family: str, entry: FileEntry, row: int) -> tuple[int, int]:
        starts = self._footer(family, entry).starts
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if not 0 <= row < starts[-1]:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: has no row {row}")
        return group, row - int(starts[group])

    def _hold(self, key: tuple[str, int], read: Callable[[], tuple[Any, int]]) -> Any:
        """What was read before, or is read now; the least recently used is let go when memory is short."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        value, num_bytes = read()
        self._held[key] = value, num_bytes
        self._held_bytes += num_bytes
        while self._held_bytes > self._max_bytes and len(self._held) > 1:
            _, (_, dropped) = self._held.popitem(last=False)
            self._held_bytes -= dropped
        return value

    def _read_group(self, family: str, entry: FileEntry, group: int) -> pa.Table:
        try:
            with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                parquet = self._parquet(family, entry, source)
                num_rows = parquet.metadata.row_group(group).num_rows
                return validated(parquet.read_row_group(group, use_threads=False), num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error

    def _read_rows(self, family: str, entry: FileEntry, group: int, kept: RowFormat) -> tuple[_Rows, int]:
        table = self._read_group(family, entry, group)
        keys = table[0].to_pylist()
        if "payload" in table.column_names:  # format version 1
            each = [sparse_rows(table, row, vocab_size=kept.vocab_size) for row in range(table.num_rows)]
            starts = np.cumsum([0, *(rows.num_rows for rows in each)])
            rows = SparseRows.concatenate(each)
        else:
            id_groups = self._hold((entry.file, -1), lambda: self._read_id_groups(entry, kept.vocab_size))
            rows, starts = decode_group(table, id_groups, kept.num_temperatures)
        return _Rows(keys, rows, starts), rows.num_bytes + starts.nbytes + 200 * len(keys)

    def _read_id_groups(self, entry: FileEntry, vocab_size: int) -> tuple[IdGroups, int]:
        id_groups = decode_id_groups(self._footers[entry.file].metadata.metadata, vocab_size)
        return id_groups, id_groups.num_bytes

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


def _sized(table: pa.Table) -> tuple[pa.Table, int]:
    return table, table.nbytes


def validated(table: pa.Table, num_rows: int) -> pa.Table:
    """The table in one chunk a column, if Arrow finds its buffers whole and nothing in it null."""
    table.validate(full=True)
    if table.num_rows != num_rows:
        raise ValueError(f"{table.num_rows} rows were read, {num_rows} expected")
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is null")
    return table.combine_chunks()
