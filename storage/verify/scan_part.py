"""One part's scan: every byte hashed, and every row of it checked, from one reading of each file.

Whole row groups are checked as arrays; no row, matrix or record is made of them. What a reader's decoders refuse
is refused here too (tests compare the two on damaged files). Memory is bounded: a file of up to WHOLE_BYTES is
read once and parsed where it lies; of a larger one the bytes are hashed first and its row groups read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.backends.folder import Folder
from storage.encoding.arrow_rows import (
    collect_encoding_errors,
    decode_hidden_row,
    decode_image_row,
    decode_sequence_row,
    decode_tokens_row,
)
from storage.encoding.distributions import RowFormat, check_groups, decode_id_groups
from storage.encoding.id_groups import IdGroups
from storage.encoding.parquet_schema import check_schema
from storage.encoding.relation_matrix import check_payload
from storage.encoding.tail_profile import read_tail_total
from storage.errors import CacheError, CorruptPartError
from storage.identity import Identity, stored_hidden, stored_relation
from storage.layout import commits as layout
from storage.layout.documents import Commit, FileEntry
from storage.layout.error_summaries import summarize_encoding_errors
from storage.layout.part_index import Part
from storage.reader.row_group_cache import check_sizes, validate_table
from storage.records.preference_pairs import check_pairs, check_sequence
from storage.records.records import ImageRef, TokensRecord
from storage.verify.token_columns import check_tokens

WHOLE_BYTES = 256 << 20  # of a file that is read once; each scan at a time holds one
_BLOCK_BYTES = 4 << 20
_BATCH_BYTES = 4 << 20  # of small row groups that are read and checked together, uncompressed
_BATCH_GROUPS = 16  # at most, whatever bytes a footer claims
_BAD = (CacheError, ValueError, OSError, pa.ArrowException)

Advance = Callable[[int], None]  # bytes that were read


@dataclass
class PartFindings:
    """What a part holds, and what is wrong with it."""

    number: int
    problems: list[str] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)  # records, then the errors that count
    num_samples: int = 0
    num_images: int = 0
    num_rows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What the other families of a part are compared with."""

    sample_ids: list[str]
    num_response_tokens: NDArray[np.int64]
    images: dict[str, int]  # visual tokens by image key
    image_sha256s: set[str]
    records: list[TokensRecord]  # only where there is a family `sequence`


@dataclass(frozen=True, eq=False)
class _RowGroups:
    """Row groups of a file, one after another in one table."""

    first: int  # row of the file
    table: pa.Table
    sizes: list[int]  # rows of each
    metadata: Mapping[bytes, bytes]  # of the file


def scan_part(
    folder: Folder, identity: Identity, part: Part, *, head_width: int | None, advance: Advance
) -> PartFindings:
    """Everything that can be found wrong with a part by itself. It raises nothing of a broken file.

    `head_width` is that of the output head, None if there is no good one. Parts may be scanned at once, in threads:
    hashing, decompressing and arithmetic let go of the interpreter's lock.
    """
    findings = PartFindings(part.number)
    _Scan(folder, identity, part, head_width, advance, findings).scan()
    return findings


class _Scan:
    """A part's scan. It keeps the counts that the commits are compared with."""

    def __init__(
        self,
        folder: Folder,
        identity: Identity,
        part: Part,
        head_width: int | None,
        advance: Advance,
        findings: PartFindings,
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.part = part
        self.head_width = head_width
        self.advance = advance
        self.findings = findings
        self.num_rows = {family: 0 for commit in part.commits for family in commit.num_rows}
        self.errors: dict[str, list[float]] = {"relation": [], "hidden": []}

    def scan(self) -> None:
        """Tokens first: they say what must be in the other files. Those are hashed even if tokens are broken."""
        tokens: _Tokens | None = None
        for family, entry in sorted(self.part.families.items(), key=lambda item: item[0] != "tokens"):
            try:
                source = self._checked_file(entry)
            except _BAD as error:
                self.findings.problems.append(f"part {self.part.number}: {error}")
                continue
            try:
                with source:
                    if family == "tokens":
                        tokens = self._tokens(source)
                    elif tokens is not None:
                        self._family(family, source, tokens)
            except _BAD as error:
                said = str(error).removeprefix(f"{self.folder.locate(entry.file)}: ")
                self._problem(entry.file, f"{family} {said}" if said.startswith("row ") else f"{family}: {said}")
        if tokens is None:
            return
        self.findings.sample_ids = [*tokens.sample_ids, *(error.sample_id for error in self.part.errors)]
        self.findings.num_samples, self.findings.num_images = len(tokens.sample_ids), len(tokens.images)
        self.findings.num_rows = self.num_rows
        if not self.findings.problems:
            for commit in self.part.commits:
                self._compare(commit)

    def _problem(self, file: str, text: str) -> None:
        self.findings.problems.append(f"part {self.part.number}: {self.folder.locate(file)}: {text}; {layout.ADVICE}")

    def _checked_file(self, entry: FileEntry) -> pa.NativeFile:
        """A file whose size and hash are those of its commit, ready to be parsed. Errors: CorruptPartError."""
        layout.check_file(self.folder, entry, content=False)
        digest, done = hashlib.sha256(), 0
        is_kept = entry.file_bytes <= WHOLE_BYTES
        buffer = np.empty(entry.file_bytes + 1 if is_kept else _BLOCK_BYTES, np.uint8)  # one byte too many shows
        content = memoryview(buffer.data)
        try:
            with self.folder.open_for_arrow(entry.file, entry.file_bytes) as source:
                while True:
                    start = done if is_kept else 0
                    num_bytes = source.readinto(block := content[start : start + _BLOCK_BYTES])
                    if not num_bytes:
                        break
                    digest.update(block[:num_bytes])
                    done += num_bytes
                    self.advance(num_bytes)
        except OSError as error:
            raise CorruptPartError(f"{self.folder.locate(entry.file)}: cannot be read: {error}") from error
        layout.check_size_and_hash(self.folder, entry, done, digest.hexdigest())
        if is_kept:
            return pa.BufferReader(pa.py_buffer(buffer[:done]))
        return self.folder.open_for_arrow(entry.file, entry.file_bytes)

    def _groups(self, family: str, source: pa.NativeFile, *, batch_bytes: int = 0) -> Iterator[_RowGroups]:
        """The row groups, one by one or as many at once as have `batch_bytes`. Errors: CorruptPartError."""
        entry = self.part.families[family]
        file = pq.ParquetFile(source, page_checksum_verification=True)
        check_schema(family, file.schema_arrow, self.folder.locate(entry.file))
        metadata = file.metadata
        if metadata.num_rows != entry.rows:
            raise CorruptPartError(f"has {metadata.num_rows} rows, its commit says {entry.rows}")
        check_sizes(metadata, entry.file_bytes)
        row = 0
        for batch in _batches(metadata, batch_bytes):
            sizes = [metadata.row_group(group).num_rows for group in batch]
            table = validate_table(file.read_row_groups(batch, use_threads=False), sum(sizes))
            yield _RowGroups(row, table, sizes, metadata.metadata or {})
            row += sum(sizes)

    def _tokens(self, source: pa.NativeFile) -> _Tokens:
        ids: list[str] = []
        counts: list[NDArray[np.int64]] = []
        images: dict[str, int] = {}
        sha256s: set[str] = set()
        records: list[TokensRecord] = []
        for groups in self._groups("tokens", source, batch_bytes=_BATCH_BYTES):
            table = groups.table
            counts.append(check_tokens(table, self.identity, groups.first))
            ids += table["sample_id"].to_pylist()
            names = ("image_paths", "image_sha256s", "image_visual_tokens", "image_keys")
            lists = [table[name].combine_chunks().flatten().to_pylist() for name in names]
            for image in map(ImageRef, *lists):
                if images.setdefault(image.key, image.num_visual_tokens) != image.num_visual_tokens:
                    raise ValueError(f"image {image.path} has two visual token counts")
                sha256s.add(image.sha256)
            if "sequence" in self.part.families:
                records += [decode_tokens_row(table, row, self.identity) for row in range(table.num_rows)]
        twice = {sample_id for sample_id in ids if ids.count(sample_id) > 1} if len(set(ids)) < len(ids) else ()
        if twice:
            raise ValueError(f"sample {min(twice)!r} is in part {self.part.number} too")
        if records:
            check_pairs(records)
        return _Tokens(ids, np.concatenate([np.zeros(0, np.int64), *counts]), images, sha256s, records)

    def _family(self, family: str, source: pa.NativeFile, tokens: _Tokens) -> None:
        """One file against the tokens. Errors: ValueError and others, naming the row."""
        if family in ("response", "hidden", "sequence"):
            rows = self.part.families[family].rows
            if rows != len(tokens.sample_ids):
                raise ValueError(f"{rows} rows for {len(tokens.sample_ids)} samples")
        if family in ("response", "visual"):
            self._distributions(family, source, tokens)
        elif family == "images":
            self._each_row(family, source, partial(self._image, unseen := set(tokens.image_sha256s)))
            if unseen:
                raise ValueError(f"{len(unseen)} images have no file, such as {min(unseen)}")
        elif family == "relation":
            self._each_row(family, source, partial(self._relation, unseen := dict(tokens.images)))
            if unseen:
                raise ValueError(f"{len(unseen)} images have no rows, such as {min(unseen)}")
        else:
            check = self._hidden if family == "hidden" else self._sequence
            self._each_row(family, source, partial(check, tokens))

    def _distributions(self, family: str, source: pa.NativeFile, tokens: _Tokens) -> None:
        kept, id_groups = RowFormat.of(self.identity, family), None
        unseen = dict(tokens.images)
        for groups in self._groups(family, source, batch_bytes=_BATCH_BYTES):
            first, table = groups.first, groups.table
            if id_groups is None:
                with _naming_rows(first, groups.sizes[0]):
                    id_groups = decode_id_groups(groups.metadata, kept.vocab_size)
                    read_tail_total(groups.metadata, kept.vocab_size)
            counts = _check_rows(groups, id_groups, kept)
            keys, stop = table[0].to_pylist(), first + table.num_rows
            if family == "visual":
                for row, (key, count) in enumerate(zip(keys, counts.tolist(), strict=True), start=first):
                    if count != _expected(key, unseen, row):
                        raise ValueError(f"row {row}: has {count} rows, not as many as image {key} has visual tokens")
            elif keys != tokens.sample_ids[first:stop] or (counts != tokens.num_response_tokens[first:stop]).any():
                for row, (key, count) in enumerate(zip(keys, counts.tolist(), strict=True), start=first):
                    _check_sample(tokens, row, key)
                    if count != tokens.num_response_tokens[row]:
                        raise ValueError(f"row {row}: has {count} rows for {tokens.num_response_tokens[row]} tokens")
            self.num_rows[family] += int(counts.sum())
        if family == "visual" and unseen:
            raise ValueError(f"{len(unseen)} images have no rows, such as {min(unseen)}")

    def _each_row(self, family: str, source: pa.NativeFile, check: Callable[[int, pa.Table, int], None]) -> None:
        for groups in self._groups(family, source):
            first, table = groups.first, groups.table
            for at in range(table.num_rows):
                try:
                    check(first + at, table, at)
                except (CacheError, ValueError) as error:
                    said = str(error).removeprefix(f"row {first + at}: ")
                    raise CorruptPartError(f"row {first + at}: {said}") from error

    def _relation(self, unseen: dict[str, int], row: int, table: pa.Table, at: int) -> None:
        expected = _expected(table["image_key"][at].as_py(), unseen, row)
        payload = memoryview(table["payload"][at].as_buffer())
        norm, section = table["norm"][at].as_py(), stored_relation(self.identity)
        check_payload(payload, norm=norm, num_visual_tokens=expected, section=section)
        if table["num_rows"][at].as_py() != expected:
            raise CorruptPartError(f"relation payload has n = {expected}, its column says otherwise")
        self.errors["relation"] += collect_encoding_errors("relation", [{"payload": payload}])

    def _hidden(self, tokens: _Tokens, row: int, table: pa.Table, at: int) -> None:
        _check_sample(tokens, row, table["sample_id"][at].as_py())
        states = decode_hidden_row(table, at, stored_hidden(self.identity))
        expected = (int(tokens.num_response_tokens[row]), self.head_width or states.shape[1])
        if states.shape != expected:
            raise ValueError(f"is {states.shape}, response tokens and head have {expected}")
        self.errors["hidden"] += collect_encoding_errors(
            "hidden", [{"relative_error": table["relative_error"][at].as_py()}]
        )

    def _sequence(self, tokens: _Tokens, row: int, table: pa.Table, at: int) -> None:
        _check_sample(tokens, row, table["sample_id"][at].as_py())
        check_sequence(decode_sequence_row(table, at), tokens.records[row])

    @staticmethod
    def _image(unseen: set[str], row: int, table: pa.Table, at: int) -> None:
        sha256 = table["sha256"][at].as_py()
        if sha256 not in unseen:
            raise ValueError(f"image {sha256} is of no sample, or appears twice")
        unseen.remove(sha256)
        decode_image_row(table, at)

    def _compare(self, commit: Commit) -> None:
        """What a commit says of its part."""
        found = self.findings
        place = next(iter(commit.families.values())).file if commit.families else ""
        counted = (found.num_samples, found.num_images, {family: self.num_rows[family] for family in commit.num_rows})
        stated = (commit.num_samples, commit.num_images, commit.num_rows)
        if counted != stated:
            self._problem(place, f"the part holds (samples, images, rows) {counted}, its commit says {stated}")
        if commit.errors_by_family is None:
            return
        # What rounding probabilities cost was measured against numbers that are nowhere any more.
        said = {family: each for family, each in commit.errors_by_family.items() if family in self.errors}
        errors = {
            family: summarize_encoding_errors(family, each)
            for family, each in self.errors.items()
            if each and family in commit.families
        }
        if errors != said:
            self._problem(place, f"its encodings' errors are {errors}, its commit says {said}")


def _check_rows(groups: _RowGroups, id_groups: IdGroups, kept: RowFormat) -> NDArray[np.int64]:
    """check_groups; where it finds something, each row group by itself, so that the error names that one's rows."""
    try:
        return check_groups(groups.table, groups.sizes, id_groups, kept)
    except (CacheError, ValueError):
        start = 0
        for size in groups.sizes:
            with _naming_rows(groups.first + start, size):
                check_groups(groups.table.slice(start, size), [size], id_groups, kept)
            start += size
        raise


@contextmanager
def _naming_rows(first: int, num_rows: int) -> Iterator[None]:
    """Within it, an error is one of these rows of the file."""
    try:
        yield
    except (CacheError, ValueError) as error:
        raise CorruptPartError(f"rows {first} to {first + num_rows - 1}: {error}") from error


def _batches(metadata: pq.FileMetaData, batch_bytes: int) -> Iterator[list[int]]:
    """The numbers of all row groups, as many together as have `batch_bytes` uncompressed, or one."""
    batch, size = [], 0
    for number in range(metadata.num_row_groups):
        group_bytes = metadata.row_group(number).total_byte_size
        if batch and (size + group_bytes > batch_bytes or len(batch) == _BATCH_GROUPS):
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += group_bytes
    if batch:
        yield batch


def _check_sample(tokens: _Tokens, row: int, sample_id: str) -> None:
    if sample_id != tokens.sample_ids[row]:
        raise ValueError(f"row {row}: is not of sample {tokens.sample_ids[row]!r}")


def _expected(key: str, unseen: dict[str, int], row: int) -> int:
    if key not in unseen:
        raise ValueError(f"row {row}: image {key} is of no sample, or appears twice")
    return unseen.pop(key)
