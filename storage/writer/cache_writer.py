"""Writes a segment of a cache: creates or joins it, commits parts, seals it. Several writers may run at once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.backends.folder import Folder, open_folder
from storage.encoding.arrow_rows import Columns, encode_tokens_row
from storage.encoding.output_head import StoredHead, encode_head
from storage.encoding.parquet_schema import KEY_COLUMNS, RowGroups
from storage.encoding.part_encoder import PartEncoder
from storage.errors import CacheError, CorruptPartError
from storage.identity import Identity
from storage.layout import commits as layout
from storage.layout.documents import (
    CacheDescription,
    Commit,
    EngineCheckEntry,
    ErrorEntry,
    FileEntry,
    HeadEntry,
    Manifest,
)
from storage.layout.error_summaries import summarize_encoding_errors, summarize_errors_before_encoding
from storage.layout.processor_files import write_processor_files
from storage.layout.retries import FailedIds, find_or_begin_retry, read_contents
from storage.layout.segments import NewSegment, Segment, find_segment, read_segments
from storage.reader.row_group_cache import RowGroupCache
from storage.records.preference_pairs import check_pairs
from storage.records.records import PartRecords, SampleError, TokensRecord, reorder
from storage.writer.unique_ids import UniqueIds, map_samples_to_parts, refuse_known_ids
from storage.writer.validation import check_records

# Columns in which the tokens of an added family must equal the stored ones; the other columns follow from them.
_ALIGNED_COLUMNS = ("sample_id", *KEY_COLUMNS, "token_ids", "response_starts", "response_stops", "image_keys")


class CacheWriter:
    """Writes the parts of one segment, numbered from 0 as in the segment's plan.

    Several writers may write the same segment at the same time; of each part, one commit wins.
    Invariant: the segment's document exists in the cache and describes `segment`.
    """

    def __init__(self, folder: Folder, segments: Sequence[Segment], number: int, *, zstd_level: int = 9) -> None:
        self.folder = folder
        self.segment = segments[number]
        self._segments = segments
        self._encoder = PartEncoder(self.segment.identity, self.segment.stored_families, zstd_level)
        self._row_groups = RowGroupCache(folder, max_bytes=0, checksums=False)
        self._unique_ids = UniqueIds(folder, self.segment, self._row_groups)
        self._head: HeadEntry | None = None
        self._head_width = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        identity: Identity,
        families: Sequence[str],
        *,
        append: bool = False,
        sample_ids: Collection[str] = (),
        zstd_level: int = 9,
        processor_files: Mapping[str, bytes] | None = None,
    ) -> CacheWriter:
        """Opens the segment that a dump of `families` must write; creates it if it does not exist.

        `families` are those besides tokens. segments.find_segment chooses the segment. If an earlier dump is
        unfinished, the segment may have fewer families than requested; open again once it is sealed.

        `append`: add samples of another plan as new parts. `sample_ids`: the plan's ids; if given, they are
        compared with the cache's before a segment is appended. `processor_files`: contents by name that a
        new cache stores.

        Errors: IdentityError naming each field that differs; CacheError, e.g. for an unknown family or for
        a sample that the cache already has.
        """
        folder = open_folder(path)
        found, segments = find_segment(folder, identity, families, append=append)
        while isinstance(found, NewSegment):
            if segments and found.adds_to is None and sample_ids:
                files = RowGroupCache(folder, max_bytes=0, checksums=False)
                refuse_known_ids(folder, map_samples_to_parts(folder, segments, files), sample_ids)
            folder.make_folders([found.file.rpartition("/")[0]])
            document = found.document
            if processor_files and isinstance(document, CacheDescription):
                entries = write_processor_files(folder, processor_files)
                document = document.model_copy(update={"processor_files": entries})
            folder.create(found.file, document.to_bytes())  # False if another writer created it first: join that
            found, segments = find_segment(folder, identity, families, append=append)
        folder.make_folders([*found.stored_families, found.commits_folder])
        return cls(folder, segments, found.number, zstd_level=zstd_level)

    @classmethod
    def begin_retry(cls, path: str | Path, identity: Identity, base: int, failed_ids: FailedIds) -> CacheWriter:
        """Opens a segment that retries failed samples of segment `base`; joins an unfinished retry.

        `identity` is that of a dump over the plan of `base`, whose parts must all be committed.
        `failed_ids`: the ids of failed samples for each part of the retry. Errors: CacheError for an id that
        is not (or no longer) an error of `base` and its retries; IdentityError.
        """
        folder = open_folder(path)
        retry, segments = find_or_begin_retry(folder, identity, base, failed_ids)
        folder.make_folders([*retry.stored_families, retry.commits_folder])
        return cls(folder, segments, retry.number)

    @property
    def identity(self) -> Identity:
        """The segment's identity."""
        return self.segment.identity

    def committed_parts(self) -> set[int]:
        """Returns the committed parts. CorruptPartError if a file of one is missing or has another size."""
        return {commit.part - self.segment.first_part for commit, _ in self._read_commits()}

    def contents(self) -> tuple[int, list[SampleError]]:
        """Returns the number of samples in the committed parts and their retries, and the remaining errors."""
        num_samples, failed = read_contents(self.folder, read_segments(self.folder), self.segment)
        return num_samples, [SampleError(error.sample_id, error.reason) for errors in failed for error in errors]

    def commit_of(self, part: int) -> Commit | None:
        """Returns the commit of a part of the plan, or None if it must still be written."""
        return self._find_commit(self.segment.first_part + part)

    def write_part(self, part: int, records: PartRecords) -> Commit:
        """Writes a part's files, then its commit, and returns the commit that is in force.

        A part that already has a commit is not written again. If several writers write the same part, the
        first commit wins and the others return it.

        Errors: ValueError for records that contradict each other or the identity; CacheError if families
        are added to a part with other samples, if the cache already has a sample, if the disk is full, or
        if the object store fails.
        """
        if not 0 <= part < self.segment.num_parts:
            raise ValueError(f"part {part} is outside the plan, which has parts 0 to {self.segment.num_parts - 1}")
        number = self.segment.first_part + part
        existing = self._find_commit(number)
        if existing:
            return existing
        check_records(records, self.segment)
        self._check_widths(records)
        if self.segment.has_tokens:
            records = self._unique_ids.check_part(part, records)
        else:
            records = self._align_records(number, records)
        families = self._encoder.encode(records)
        entries = {family: self._write_family(family, number, rows) for family, rows in families.items()}
        commit = self._make_commit(number, records, entries, families)
        if self.folder.create(layout.commit_file(self.segment, number), commit.to_bytes()):
            return commit
        winner = self._find_commit(number)
        if winner is None:
            raise CacheError(
                f"{self.folder}: the commit of part {number} was removed while the dump was running; "
                "run the dump again, and delete no commits meanwhile"
            )
        named = {entry.file for entry in winner.families.values()}
        for entry in entries.values():
            if entry.file not in named:
                self.folder.remove(entry.file)
        return winner

    def put_head(self, head: StoredHead) -> None:
        """Stores the teacher's output head; call it before the first part of a segment with hidden states.

        Several writers may store the same head; it becomes one file. Errors: ValueError if the head does not
        fit the segment; CacheError if the cache has a different head.
        """
        if "hidden" not in self.segment.families or head.vocab_size != self.identity.vocab_size:
            raise ValueError(
                f"the output head has {head.vocab_size} tokens and the segment the families "
                f"{self.segment.families}; expected {self.identity.vocab_size} tokens and the family hidden"
            )
        content = encode_head(head)
        sha256 = hashlib.sha256(content).hexdigest()
        entry = HeadEntry(file=layout.head_file(sha256), file_bytes=len(content), sha256=sha256)
        self._refuse_other_head(entry)
        try:
            layout.check_file(self.folder, entry, content=not self.folder.is_remote)
        except CorruptPartError:  # missing or damaged
            self.folder.make_folders([layout.HEAD_FOLDER])
            self.folder.write(entry.file, content)
        self._head, self._head_width = entry, head.width

    def unseal(self) -> None:
        """Removes the segment's manifest, so that parts whose commits were deleted can be written again."""
        self.folder.remove(self.segment.manifest_file)

    def seal(self, engine_check: EngineCheckEntry | None = None) -> Manifest:
        """Writes the manifest once every part is committed; does nothing if the segment is already sealed.

        `engine_check`: what the dump that wrote the parts knew; a segment that is sealed keeps its own.

        Errors: CacheError naming missing parts or a sample id that two parts hold; CorruptPartError.
        """
        commits = self._read_commits()
        committed = {commit.part for commit, _ in commits}
        missing = [part for part in self.segment.parts if part not in committed]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
            raise CacheError(
                f"{self.folder}: {len(missing)} of {self.segment.num_parts} parts are not committed: "
                f"{shown}; run the dump again"
            )
        layout.check_one_head([*(commit for commit, _ in commits), *self._read_commits_with_head()])
        earlier = self._read_manifest()
        kept = engine_check if earlier is None else earlier.engine_check
        manifest = layout.make_manifest(self.segment, commits, kept)
        if earlier == manifest:
            return manifest
        if self.segment.has_tokens:
            self._unique_ids.check_commits([commit for commit, _ in commits])
        layout.remove_orphans(self.folder, self.segment, [commit for commit, _ in commits])
        self.folder.write(self.segment.manifest_file, manifest.to_bytes())
        return manifest

    def _read_manifest(self) -> Manifest | None:
        """Reads the segment's manifest; None if there is none, or if it is damaged and must be written again."""
        try:
            return layout.read_manifest(self.folder, self.segment)
        except CacheError:
            return None

    def _find_commit(self, number: int) -> Commit | None:
        try:
            return layout.read_commit(self.folder, self.segment, number)[0]
        except FileNotFoundError:
            return None

    def _read_commits(self) -> list[tuple[Commit, str]]:
        numbers = layout.list_committed_parts(self.folder, self.segment)
        commits = layout.read_commits(self.folder, self.segment, numbers)
        for commit, _ in commits:
            for entry in commit.families.values():
                layout.check_file(self.folder, entry, content=False)
        heads = {commit.head.sha256: commit.head for commit, _ in commits if commit.head is not None}
        for head in heads.values():
            layout.check_file(self.folder, head, content=False)
        return commits

    def _write_family(self, family: str, number: int, rows: RowGroups) -> FileEntry:
        content = self._encoder.to_parquet(family, rows)
        sha256 = hashlib.sha256(content).hexdigest()
        name = layout.part_file(family, number, sha256)
        self.folder.write(name, content)
        return FileEntry(file=name, rows=rows.num_rows, file_bytes=len(content), sha256=sha256)

    def _check_widths(self, records: PartRecords) -> None:
        if records.hidden is None:
            return
        if self._head is None:
            raise ValueError("hidden states need the output head: call put_head first")
        for record, states in zip(records.tokens, records.hidden, strict=True):
            if states.shape[1] != self._head_width:
                raise ValueError(
                    f"sample {record.sample_id}: hidden states of width {states.shape[1]}, "
                    f"the head needs {self._head_width}"
                )

    def _read_commits_with_head(self) -> list[Commit]:
        """Returns one commit of each segment with hidden states that has any commit."""
        commits = []
        for segment in read_segments(self.folder):  # other writers may have created one since
            if "hidden" in segment.families:
                numbers = layout.list_committed_parts(self.folder, segment)[:1]
                commits += [commit for commit, _ in layout.read_commits(self.folder, segment, numbers)]
        return commits

    def _refuse_other_head(self, entry: HeadEntry) -> None:
        there = layout.check_one_head(self._read_commits_with_head())
        if there is not None and there != entry:
            raise CacheError(
                f"{self.folder}: its hidden states were made with the output head {there.file}, this teacher's is "
                f"{entry.file}; dump into another folder, or use the same teacher and Stillhouse version as before"
            )

    def _make_commit(
        self,
        number: int,
        records: PartRecords,
        entries: Mapping[str, FileEntry],
        families: Mapping[str, RowGroups],
    ) -> Commit:
        num_rows = {}
        if records.response is not None:
            num_rows["response"] = sum(rows.num_rows for rows in records.response)
        if records.visual is not None:
            num_rows["visual"] = sum(rows.num_rows for rows in records.visual.values())
        errors = records.errors if self.segment.has_tokens else ()  # of added families: with the tokens
        return Commit(
            format_version=self.segment.format_version,
            cache_sha256=self.segment.sha256,
            part=number,
            num_samples=len(records.tokens),
            num_images=len({image.key for record in records.tokens for image in record.images}),
            num_rows=num_rows,
            families=dict(entries),
            errors=tuple(
                ErrorEntry(sample_id=_escape_surrogates(error.sample_id), reason=_escape_surrogates(error.reason))
                for error in errors
            ),
            errors_by_family={
                family: summarize_encoding_errors(family, rows.errors)
                for family, rows in families.items()
                if rows.errors
            },
            head=self._head if records.hidden is not None else None,
            **summarize_errors_before_encoding(records, self.segment.identity),
        )

    def _align_records(self, number: int, records: PartRecords) -> PartRecords:
        """Returns the records in the order of the part's stored tokens, without samples that the part lacks."""
        base = self._segments[self.segment.adds_to or 0]
        commit, _ = layout.read_commit(self.folder, base, number)
        stored = self._row_groups.read_columns("tokens", commit.families["tokens"], _ALIGNED_COLUMNS).to_pylist()
        places = {record.sample_id: place for place, record in enumerate(records.tokens)}
        for row in stored:
            name = f"{self.folder}: part {number}, sample {row['sample_id']!r}"
            if row["sample_id"] not in places:
                reason = _describe_missing_record(row, records)
                raise CacheError(f"{name}: is in the cache, but this dump has no record of it{reason}")
            ours = _to_plain_values(encode_tokens_row(records.tokens[places[row["sample_id"]]]))
            for column in _ALIGNED_COLUMNS:
                if ours[column] != row[column]:
                    raise CacheError(
                        f"{name}: its {column} differ from those of segment {base.number}; families can be added "
                        "only with the same samples, images and chat template"
                    )
        aligned = reorder(records, [places[row["sample_id"]] for row in stored])
        if aligned.sequence is not None:
            _check_pairs_of_cache(f"{self.folder}: part {number}", aligned.tokens)
        return aligned


def _describe_missing_record(row: Mapping[str, Any], records: PartRecords) -> str:
    reasons = [error.reason for error in records.errors if error.sample_id == row["sample_id"]]
    return f": {reasons[0]}" if reasons else ""


def _check_pairs_of_cache(place: str, records: Sequence[TokensRecord]) -> None:
    try:
        check_pairs(records)
    except ValueError as error:
        raise CacheError(
            f"{place}: {error}: the cache was created without the family sequence; dump into another folder"
        ) from error


def _to_plain_values(columns: Columns) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in columns.items()}


def _escape_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
