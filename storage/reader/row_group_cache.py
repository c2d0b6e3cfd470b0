"""Reads row groups of a cache's part files on demand and keeps the most recently used ones in memory.

Each file is checked at its first use. The memory is bounded: the least recently used row groups are
evicted. Several threads may read at the same time; a row group that two of them need is read once.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.backends.folder import Folder
from storage.encoding.distributions import RowFormat, decode_group, decode_id_groups
from storage.encoding.id_groups import IdGroups
from storage.encoding.parquet_schema import check_schema
from storage.encoding.tail_profile import read_tail_total
from storage.encoding.token_rows import TokenRows, decode_tokens
from storage.errors import CorruptPartError
from storage.identity import Identity
from storage.layout.commits import NUM_CONNECTIONS, check_file
from storage.layout.documents import FileEntry
from storage.reader.narrowing import Narrowing, narrow_rows
from storage.records.records import TailTotal
from storage.records.sparse_rows import RowSpan, SparseRows

# Limit of a row group's uncompressed size, besides four times the file's size. A writer's has 1 MiB or one row.
MAX_GROUP_BYTES = 256 << 20
_NUM_THREADS = 4  # that read columns of local files at the same time
MAX_OPEN_FOOTERS = 1024  # parsed Parquet footers kept in memory, some tens of KB each

_Key = tuple[str, str | int]  # a file, and one of its row groups or the name of other data kept of it
# A decoded row group: Parquet row i has the key keys[i] and the distributions starts[i] : starts[i + 1].
_Distributions = tuple[list[str], SparseRows, list[int]]


class _Footer:
    """A parsed Parquet footer with the first row of each row group (and the total as last item)."""

    def __init__(self, metadata: pq.FileMetaData) -> None:
        self.metadata = metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = list(accumulate(sizes, initial=0))


class RowGroupCache:
    """Reads Parquet rows by (file, row) through a cache of row groups.

    Invariant: returned rows come from files that passed their checks.
    """

    def __init__(
        self, folder: Folder, *, max_bytes: int, checksums: bool, narrowing: Mapping[str, Narrowing] | None = None
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._checksums = checksums
        self._narrowing = narrowing or {}
        self._checked: set[str] = set()
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._entries: OrderedDict[_Key, tuple[Any, int]] = OrderedDict()
        self.held_bytes = 0
        self.num_groups_read = 0
        self._reset_locks()

    def _reset_locks(self) -> None:
        self._lock = threading.Lock()
        self._pending_reads: dict[_Key, Future] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("_lock", "_pending_reads", "_process")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_locks()

    def read_columns_of_files(
        self, family: str, entries: Sequence[FileEntry], columns: Sequence[str]
    ) -> list[pa.Table]:
        """Returns plain columns of several files, which are read at the same time. See `read_columns`."""
        with ThreadPoolExecutor(NUM_CONNECTIONS if self._folder.is_remote else _NUM_THREADS) as pool:
            return list(pool.map(lambda entry: self.read_columns(family, entry, columns), entries))

    def read_columns(self, family: str, entry: FileEntry, names: Sequence[str]) -> pa.Table:
        """Reads some columns of a whole file, without keeping them. Errors: CorruptPartError."""
        self._check_file_once(entry)
        with self._open(family, entry) as (parquet, _):
            return validate_table(parquet.read(columns=list(names), use_threads=False), entry.rows)

    def index_rows(self, family: str, entry: FileEntry, column: str) -> dict[str, int]:
        """Returns the Parquet row of each value of a text column. Errors: CorruptPartError."""

        def read() -> tuple[dict[str, int], int]:
            keys = self.read_columns(family, entry, [column])[column].to_pylist()
            return {key: row for row, key in enumerate(keys)}, 250 * len(keys)

        return self._get_or_read((entry.file, column), read)

    def read_row(self, family: str, entry: FileEntry, row: int) -> tuple[pa.Table, int]:
        """Reads the row group that holds a Parquet row; returns it and the row's index in it.

        Errors: CorruptPartError.
        """
        group, index = self._locate_row(family, entry, row)
        return self._get_or_read(
            (entry.file, group), lambda: _add_size(self._read_row_group(family, entry, group))
        ), index

    def read_token_rows(self, entry: FileEntry, row: int, identity: Identity) -> tuple[TokenRows, int]:
        """Reads the row group of tokens that holds a row; returns it decoded and the row's index in it.

        Errors: CorruptPartError.
        """
        group, index = self._locate_row("tokens", entry, row)

        def read() -> tuple[TokenRows, int]:
            table = self._read_row_group("tokens", entry, group)
            with self._name_file_in_errors(entry):
                rows = decode_tokens(table, identity)
            return rows, rows.num_bytes

        return self._get_or_read((entry.file, group), read), index

    def read_distribution_rows(
        self, family: str, entry: FileEntry, row: int, row_format: RowFormat, draw_set: int = 0
    ) -> tuple[str, RowSpan]:
        """Reads the distributions of a Parquet row; returns its key and where they lie in the decoded row group.

        `draw_set`, modulo the number of draw sets, selects the draws of the tails. Errors: CorruptPartError.
        """
        group, index = self._locate_row(family, entry, row)
        draw_set %= row_format.num_sets
        held_as = f"{group} of draw set {draw_set}" if draw_set else group
        keys, rows, starts = self._get_or_read(
            (entry.file, held_as), lambda: self._read_distribution_group(family, entry, group, row_format, draw_set)
        )
        return keys[index], (rows, starts[index], starts[index + 1])

    def read_tail_total(self, family: str, entry: FileEntry, vocab_size: int) -> TailTotal | None:
        """Returns the sum of tails that a file stores, or None. Errors: CorruptPartError."""
        with self._name_file_in_errors(entry):
            return read_tail_total(self._get_footer(family, entry).metadata.metadata, vocab_size)

    def _locate_row(self, family: str, entry: FileEntry, row: int) -> tuple[int, int]:
        starts = self._get_footer(family, entry).starts
        if not 0 <= row < starts[-1]:
            raise CorruptPartError(f"{self._folder.locate(entry.file)}: has no row {row}")
        group = bisect_right(starts, row) - 1
        return group, row - starts[group]

    def _get_or_read(self, key: _Key, read: Callable[[], tuple[Any, int]]) -> Any:
        """Returns the cached value or reads it; evicts the least recently used entries beyond `max_bytes`."""
        if self._process != os.getpid():  # after a fork: the parent's threads are gone, but may have held the lock
            self._reset_locks()
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
            reading = self._pending_reads.get(key)
            if reading is None:
                self._pending_reads[key] = Future()
        return self._read_and_keep(key, read) if reading is None else reading.result()

    def _read_and_keep(self, key: _Key, read: Callable[[], tuple[Any, int]]) -> Any:
        reading = self._pending_reads[key]
        try:
            value, num_bytes = read()
        except BaseException as error:
            with self._lock:
                del self._pending_reads[key]
            reading.set_exception(error)
            raise
        with self._lock:
            del self._pending_reads[key]
            self._entries[key] = value, num_bytes
            self.held_bytes += num_bytes
            while self.held_bytes > self._max_bytes and len(self._entries) > 1:
                _, (_, dropped) = self._entries.popitem(last=False)
                self.held_bytes -= dropped
        reading.set_result(value)
        return value

    def _read_row_group(self, family: str, entry: FileEntry, group: int) -> pa.Table:
        with self._open(family, entry) as (parquet, footer):
            num_rows = footer.starts[group + 1] - footer.starts[group]
            table = validate_table(parquet.read_row_group(group, use_threads=False), num_rows)
        with self._lock:
            self.num_groups_read += 1
        return table

    def _read_distribution_group(
        self, family: str, entry: FileEntry, group: int, row_format: RowFormat, draw_set: int
    ) -> tuple[_Distributions, int]:
        table = self._read_row_group(family, entry, group)
        with self._name_file_in_errors(entry):
            metadata = self._get_footer(family, entry).metadata.metadata
            id_groups = self._get_or_read(
                (entry.file, "id groups"), lambda: _read_id_groups(metadata, row_format.vocab_size)
            )
            rows, starts = decode_group(
                table, id_groups, row_format.num_temperatures, num_sets=row_format.num_sets, draw_set=draw_set
            )
        if family in self._narrowing:  # with the same random numbers whenever this row group is read
            seed = [int(entry.sha256[:16], 16), group, draw_set]
            uniforms = np.random.default_rng(seed).random(rows.num_rows)
            rows = narrow_rows(rows, self._narrowing[family], uniforms)
        keys = table[0].to_pylist()
        return (keys, rows, starts.tolist()), rows.num_bytes + 250 * len(keys)

    def _get_footer(self, family: str, entry: FileEntry) -> _Footer:
        known = self._footers.get(entry.file)
        if known is not None:
            return known
        self._check_file_once(entry)
        with self._open(family, entry) as (_, footer):
            return footer

    @contextmanager
    def _open(self, family: str, entry: FileEntry) -> Iterator[tuple[pq.ParquetFile, _Footer]]:
        try:
            with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                yield self._open_parquet(family, entry, source)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.locate(entry.file)}: {error}") from error

    @contextmanager
    def _name_file_in_errors(self, entry: FileEntry) -> Iterator[None]:
        """Turns a decoder's errors into CorruptPartErrors that name the file."""
        try:
            yield
        except (CorruptPartError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.locate(entry.file)}: {error}") from error

    def _open_parquet(self, family: str, entry: FileEntry, source: pa.NativeFile) -> tuple[pq.ParquetFile, _Footer]:
        known = self._footers.get(entry.file)
        parquet = pq.ParquetFile(
            source,
            metadata=known and known.metadata,
            page_checksum_verification=True,
            pre_buffer=self._folder.is_remote,  # the columns of a row group in one request
        )
        if known is None:
            place = self._folder.locate(entry.file)
            check_schema(family, parquet.schema_arrow, place)
            if parquet.metadata.num_rows != entry.rows:
                raise CorruptPartError(f"{place}: has {parquet.metadata.num_rows} rows, its commit says {entry.rows}")
            check_sizes(parquet.metadata, entry.file_bytes)
            known = _Footer(parquet.metadata)
            with self._lock:
                self._footers[entry.file] = known
                if len(self._footers) > MAX_OPEN_FOOTERS:
                    self._footers.popitem(last=False)
        return parquet, known

    def _check_file_once(self, entry: FileEntry) -> None:
        if entry.file not in self._checked:
            check_file(self._folder, entry, content=self._checksums)
            self._checked.add(entry.file)


def _read_id_groups(metadata: Mapping[bytes, bytes] | None, vocab_size: int) -> tuple[IdGroups, int]:
    id_groups = decode_id_groups(metadata, vocab_size)
    return id_groups, id_groups.num_bytes


def _add_size(table: pa.Table) -> tuple[pa.Table, int]:
    return table, table.nbytes


def check_sizes(metadata: pq.FileMetaData, file_bytes: int) -> None:
    """Raises ValueError if a row group claims to be far larger than its file, before any is read."""
    for number in range(metadata.num_row_groups):
        claimed_bytes = metadata.row_group(
            number
        ).total_byte_size  # of its columns' metadata Arrow may abort when damaged
        if claimed_bytes > MAX_GROUP_BYTES + 4 * file_bytes:
            raise ValueError(f"row group {number} claims {claimed_bytes:,} bytes, of a file of {file_bytes:,}")


def validate_table(table: pa.Table, num_rows: int) -> pa.Table:
    """Returns the table with one chunk per column. ValueError for damaged buffers, nulls or missing rows."""
    table.validate(full=True)
    if table.num_rows != num_rows:
        raise ValueError(f"{table.num_rows} rows were read, {num_rows} expected")
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is null")
    return table.combine_chunks()
