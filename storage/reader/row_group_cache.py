"""Row groups of a cache's part files, read on demand, each file checked when first touched.

The memory for them is bounded: the least recently used row groups are let go. Any number of threads may read at
once; what two of them want is read by one.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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
from storage.encoding.tail_profile import tail_total_of
from storage.encoding.token_rows import TokenRows, decode_tokens
from storage.errors import CorruptPartError
from storage.identity import Identity
from storage.layout.commits import check_file
from storage.layout.documents import FileEntry
from storage.reader.narrowing import Narrowing, narrowed
from storage.records.records import TailTotal
from storage.records.sparse_rows import SparseRows

# Of a row group, uncompressed, besides four times the file's bytes. A writer's is 1 MiB of payload, or one row.
MAX_GROUP_BYTES = 256 << 20
MAX_OPEN_FOOTERS = 1024  # parsed Parquet footers that are kept, some tens of KB each

_Key = tuple[str, str | int]  # a file, and one of its row groups or what else is kept of it


class _Footer:
    """A parsed footer, and the first row of each row group (the total last)."""

    def __init__(self, metadata: pq.FileMetaData) -> None:
        self.metadata = metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = list(accumulate(sizes, initial=0))


class DistributionRows:
    """A row group of distributions: the key of each Parquet row, all their rows, and where each's start."""

    def __init__(self, keys: list[str], rows: SparseRows, starts: list[int]) -> None:
        self.keys = keys
        self.rows = rows
        self.starts = starts

    @property
    def num_bytes(self) -> int:
        """What a reader keeps of it in memory."""
        return self.rows.num_bytes + 250 * len(self.keys)


class PartFiles:
    """Reads Parquet rows by (file, row). Invariant: what it returns is of files that passed their checks."""

    def __init__(
        self, folder: Folder, *, max_bytes: int, checksums: bool, narrowing: Mapping[str, Narrowing] | None = None
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._checksums = checksums
        self._narrowing = narrowing or {}
        self._checked: set[str] = set()
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._held: OrderedDict[_Key, tuple[Any, int]] = OrderedDict()
        self.held_bytes = 0
        self.num_groups_read = 0
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._reading: dict[_Key, Future] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_reading", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def columns(self, family: str, entry: FileEntry, names: Sequence[str]) -> pa.Table:
        """Some columns of a whole file; they are not kept. Errors: CorruptPartError."""
        self._check(entry)
        with self._open(family, entry) as (parquet, _):
            return validated(parquet.read(columns=list(names), use_threads=False), entry.rows)

    def rows_of(self, family: str, entry: FileEntry, column: str) -> dict[str, int]:
        """The Parquet row of each value of a text column. Errors: CorruptPartError."""

        def read() -> tuple[dict[str, int], int]:
            keys = self.columns(family, entry, [column])[column].to_pylist()
            return {key: row for row, key in enumerate(keys)}, 250 * len(keys)

        return self._hold((entry.file, column), read)

    def row(self, family: str, entry: FileEntry, row: int) -> tuple[pa.Table, int]:
        """The row group that holds a Parquet row, and the row's place in it. Errors: CorruptPartError."""
        group, at = self._place(family, entry, row)
        return self._hold((entry.file, group), lambda: _sized(self._read_group(family, entry, group))), at

    def token_rows(self, entry: FileEntry, row: int, identity: Identity) -> tuple[TokenRows, int]:
        """The conversations of a row group of tokens, and a row's place in them. Errors: CorruptPartError."""
        group, at = self._place("tokens", entry, row)

        def read() -> tuple[TokenRows, int]:
            table = self._read_group("tokens", entry, group)
            with self._decoding(entry):
                rows = decode_tokens(table, identity)
            return rows, rows.num_bytes

        return self._hold((entry.file, group), read), at

    def distribution_rows(
        self, family: str, entry: FileEntry, row: int, kept: RowFormat, draw_set: int = 0
    ) -> tuple[DistributionRows, int]:
        """The row group of distributions that holds a Parquet row, and its place in it. Errors: CorruptPartError.

        `draw_set` (modulo their number) says which draws of their tails.
        """
        group, at = self._place(family, entry, row)
        draw_set %= kept.num_sets
        held_as = f"{group} of set {draw_set}" if draw_set else group
        return self._hold((entry.file, held_as), lambda: self._read_rows(family, entry, group, kept, draw_set)), at

    def tail_total(self, family: str, entry: FileEntry, vocab_size: int) -> TailTotal | None:
        """The sum of tails that a file keeps, if it keeps one. Errors: CorruptPartError."""
        with self._decoding(entry):
            return tail_total_of(self._footer(family, entry).metadata.metadata, vocab_size)

    def _place(self, family: str, entry: FileEntry, row: int) -> tuple[int, int]:
        starts = self._footer(family, entry).starts
        if not 0 <= row < starts[-1]:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: has no row {row}")
        group = bisect_right(starts, row) - 1
        return group, row - starts[group]

    def _hold(self, key: _Key, read: Callable[[], tuple[Any, int]]) -> Any:
        """What was read before, or is read now; the least recently used is let go when memory is short."""
        if self._process != os.getpid():  # a fork: its parent's threads are not here, their locks may be held
            self._begin()
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            reading = self._reading.get(key)
            if reading is None:
                self._reading[key] = Future()
        return self._read_now(key, read) if reading is None else reading.result()

    def _read_now(self, key: _Key, read: Callable[[], tuple[Any, int]]) -> Any:
        reading = self._reading[key]
        try:
            value, num_bytes = read()
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            reading.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            self._held[key] = value, num_bytes
            self.held_bytes += num_bytes
            while self.held_bytes > self._max_bytes and len(self._held) > 1:
                _, (_, dropped) = self._held.popitem(last=False)
                self.held_bytes -= dropped
        reading.set_result(value)
        return value

    def _read_group(self, family: str, entry: FileEntry, group: int) -> pa.Table:
        with self._open(family, entry) as (parquet, footer):
            num_rows = footer.starts[group + 1] - footer.starts[group]
            table = validated(parquet.read_row_group(group, use_threads=False), num_rows)
        with self._lock:
            self.num_groups_read += 1
        return table

    def _read_rows(
        self, family: str, entry: FileEntry, group: int, kept: RowFormat, draw_set: int
    ) -> tuple[DistributionRows, int]:
        table = self._read_group(family, entry, group)
        with self._decoding(entry):
            metadata = self._footer(family, entry).metadata.metadata
            id_groups = self._hold((entry.file, "id groups"), lambda: _id_groups(metadata, kept.vocab_size))
            rows, starts = decode_group(
                table, id_groups, kept.num_temperatures, num_sets=kept.num_sets, draw_set=draw_set
            )
        if family in self._narrowing:  # by the same numbers whenever this row group is read
            seed = [int(entry.sha256[:16], 16), group, draw_set]
            uniforms = np.random.default_rng(seed).random(rows.num_rows)
            rows = narrowed(rows, self._narrowing[family], uniforms)
        decoded = DistributionRows(table[0].to_pylist(), rows, starts.tolist())
        return decoded, decoded.num_bytes

    def _footer(self, family: str, entry: FileEntry) -> _Footer:
        known = self._footers.get(entry.file)
        if known is not None:
            return known
        self._check(entry)
        with self._open(family, entry) as (_, footer):
            return footer

    @contextmanager
    def _open(self, family: str, entry: FileEntry) -> Iterator[tuple[pq.ParquetFile, _Footer]]:
        try:
            with self._folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                yield self._parquet(family, entry, source)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error

    @contextmanager
    def _decoding(self, entry: FileEntry) -> Iterator[None]:
        """Within it, whatever a decoder finds is an error that names the file."""
        try:
            yield
        except (CorruptPartError, ValueError) as error:
            raise CorruptPartError(f"{self._folder.place(entry.file)}: {error}") from error

    def _parquet(self, family: str, entry: FileEntry, source: pa.NativeFile) -> tuple[pq.ParquetFile, _Footer]:
        known = self._footers.get(entry.file)
        parquet = pq.ParquetFile(
            source,
            metadata=known and known.metadata,
            page_checksum_verification=True,
            pre_buffer=self._folder.is_remote,  # the columns of a row group in one request
        )
        if known is None:
            place = self._folder.place(entry.file)
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

    def _check(self, entry: FileEntry) -> None:
        if entry.file not in self._checked:
            check_file(self._folder, entry, content=self._checksums)
            self._checked.add(entry.file)


def _id_groups(metadata: Mapping[bytes, bytes] | None, vocab_size: int) -> tuple[IdGroups, int]:
    id_groups = decode_id_groups(metadata, vocab_size)
    return id_groups, id_groups.num_bytes


def _sized(table: pa.Table) -> tuple[pa.Table, int]:
    return table, table.nbytes


def check_sizes(metadata: pq.FileMetaData, file_bytes: int) -> None:
    """ValueError for a row group that by its own account grows far beyond the file's bytes: none is read then."""
    for number in range(metadata.num_row_groups):
        grown = metadata.row_group(number).total_byte_size  # of its columns' metadata Arrow may abort when damaged
        if grown > MAX_GROUP_BYTES + 4 * file_bytes:
            raise ValueError(f"row group {number} claims {grown:,} bytes, of a file of {file_bytes:,}")


def validated(table: pa.Table, num_rows: int) -> pa.Table:
    """The table in one chunk a column, if Arrow finds its buffers whole and nothing in it null."""
    table.validate(full=True)
    if table.num_rows != num_rows:
        raise ValueError(f"{table.num_rows} rows were read, {num_rows} expected")
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is null")
    return table.combine_chunks()
