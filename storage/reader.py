"""Reads a cache, sealed or still growing: its samples by position or id, with the families asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import commit as layout
from storage.coding_errors import total as total_errors
from storage.columns import (
    hidden_states,
    image_content,
    relation_matrix,
    sequence_logprob,
    tokens_record,
)
from storage.distributions import RowFormat
from storage.documents import Commit, ErrorSummary, FileEntry
from storage.errors import CacheError, CorruptPartError
from storage.files import Folder, open_folder
from storage.head import StoredHead
from storage.identity import Identity, stored_hidden, stored_relation
from storage.part_files import PartFiles
from storage.preference import PreferencePair, check_sequence, pairs_of
from storage.records import ImageRef, SampleError, SampleRecord, SequenceLogprob, TokensRecord
from storage.relation import check_encoding
from storage.rows import SparseRows
from storage.schema import FAMILIES
from storage.segments import Segment, additions, merged_identity, read_segments, tokens_segments

DEFAULT_MAX_BYTES = 256 << 20

_INDEX_COLUMNS = ("sample_id", "split", "category", "num_response_tokens", "image_keys")


@dataclass(frozen=True)
class Part:
    """A committed part with the files of every segment that has some for it."""

    number: int
    commits: tuple[Commit, ...]  # of the segment that holds its tokens first, then of those that add families
    families: Mapping[str, FileEntry]


class Cache:
    """Samples in the order of parts and of rows in them. It holds no open file, so may be forked or pickled.

    The index (ids, splits, counts, image keys) is read when the cache is opened, signals when asked for.
    """

    def __init__(
        self, folder: Folder, segments: Sequence[Segment], parts: Sequence[Part], held: tuple[str, ...],
        reads: tuple[str, ...], part_files: PartFiles, *, sealed: bool,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.sealed = sealed  # all samples, with the families that were asked for
        self.families = held  # that every part has
        self.segments = tuple(segments)
        self.identity: Identity = merged_identity(segments)
        self._parts = parts
        self._reads = reads
        self._files = part_files
        self._relation_section = stored_relation(self.identity)
        self._row_formats = {family: RowFormat.of(self.identity, family) for family in ("response", "visual")}
        self._hidden_section = stored_hidden(self.identity)
        self._image_rows: dict[tuple[int, str], dict[str, int]] = {}
        self._read_index()

    @classmethod
    def open(
        cls,
        path: str | Path,
        families: Sequence[str] | None = None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        checksums: bool | None = None,
    ) -> Cache:
        """Open a cache to read tokens and `families` (None: all that every part has).

        `max_bytes` bounds the row groups kept in memory. With `checksums` each file's sha256 is checked
        when it is first touched, for which it is read whole; None: in a local folder, but not in an object
        store, where rows are read by ranges and their pages' checksums must do. Errors: CacheError if there
        is no cache or a part lacks a family; CorruptPartError.
        """
        folder = open_folder(path)
        segments = read_segments(folder)
        commits: dict[int, dict[int, Commit]] = {}
        sealed: set[int] = set()
        for segment in segments:
            manifest = layout.read_manifest(folder, segment)
            if manifest is not None:
                sealed.add(segment.number)
            listed = None if manifest is None else [entry.sha256 for entry in manifest.commits]
            commits[segment.number] = _read_commits(folder, segment, listed)
        parts = join_parts(segments, commits)
        held = held_families(segments, parts)
        reads = held if families is None else tuple(families)
        for family in reads:
            if family not in held:
                raise CacheError(_lacks(folder, segments, parts, held, family))
        needed = {segment.number for segment in segments if segment.has_tokens or {*segment.families} & {*reads}}
        checksums = not folder.is_remote if checksums is None else checksums
        part_files = PartFiles(folder, max_bytes=max_bytes, checksums=checksums)
        return cls(folder, segments, parts, held, reads, part_files, sealed=needed <= sealed)

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    @property
    def errors(self) -> list[SampleError]:
        """Samples of the plan that have no record, with reasons."""
        return [SampleError(error.sample_id, error.reason) for commit in self._commits() for error in commit.errors]

    def index_of(self, sample_id: str) -> int:
        """The position of a sample. Errors: KeyError."""
        return self._positions[sample_id]

    def read(self, index: int) -> SampleRecord:
        """One sample with the families asked for. Errors: IndexError, CorruptPartError."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        position, row = int(self._part_of[index]), int(self._row_of[index])
        part = self._parts[position]
        try:
            return self._record(position, part, row)
        except (CorruptPartError, ValueError) as error:
            place = f"{self.folder}: part {part.number}, sample {self.sample_ids[index]!r}"
            raise CorruptPartError(f"{place}: {error}") from error

    def head(self) -> StoredHead:
        """The teacher's output head, read and checked anew: keep it. `head.logits(record.hidden)` are full rows.

        Errors: CacheError where the cache holds no hidden states or no part yet, CorruptPartError.
        """
        entry = layout.check_one_head(self._commits())
        if entry is None:
            raise CacheError(f"{self.folder}: holds no output head; dump the family hidden first")
        return layout.read_head(self.folder, entry, self.identity.vocab_size)

    def image_bytes(self, index: int, sha256: str) -> bytes:
        """The file of one of a sample's images, with its hash checked; only its part is opened.

        Errors: CacheError where the cache holds no images, KeyError for no image of the sample, CorruptPartError.
        """
        if "images" not in self.families:
            raise CacheError(f"{self.folder}: holds no images; dump the family images first")
        position = int(self._part_of[index])
        table, at = self._files.row("images", *self._image_file(position, sha256))
        try:
            return image_content(table, at)
        except CorruptPartError as error:
            raise CorruptPartError(f"{self.folder}: part {self._parts[position].number}: {error}") from error

    def pairs(self) -> list[PreferencePair]:
        """The preference pairs: samples `<id>#chosen` and `<id>#rejected`."""
        return pairs_of(self.sample_ids)

    def tables(self, family: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Plain columns of a family, one table a part; `tokens` and `response` in the order of the samples.

        No payload is decoded, so scalars of the whole cache are read this way. Errors: CorruptPartError.
        """
        for part in self._parts:
            yield self._files.columns(family, part.families[family], columns)

    def statistics(self) -> dict[str, Any]:
        """Counts and bytes, from the commits alone.

        `bytes_per_row` are the bytes of the response and visual files by their rows (0.0 without rows).
        """
        commits = self._commits()
        num_rows = {"response": 0, "visual": 0, **layout.total_rows(commits)}
        stored = {"tokens", *(family for segment in self.segments for family in segment.families)}
        by_family = {
            family: sum(part.families[family].file_bytes for part in self._parts if family in part.families)
            for family in FAMILIES
            if family in stored
        }
        head = layout.check_one_head(commits)
        if head is not None:
            by_family[layout.HEAD_FOLDER] = head.file_bytes
        row_bytes = {family: by_family.get(family, 0) for family in num_rows}
        return {
            "num_samples": self.num_samples,
            "num_images": sum(part.commits[0].num_images for part in self._parts),
            "num_rows": num_rows,
            "bytes": sum(by_family.values()),
            "bytes_by_family": by_family,
            "bytes_per_row": sum(row_bytes.values()) / max(1, sum(num_rows.values())),
            "bytes_per_row_by_family": {
                family: row_bytes[family] / count for family, count in num_rows.items() if count
            },
            "errors_by_family": {family: each.model_dump() for family, each in coding_errors(commits).items()},
            "num_errors": sum(len(commit.errors) for commit in commits),
            "num_parts": self.num_parts,
            "sealed": self.sealed,
        }

    def _commits(self) -> list[Commit]:
        return [commit for part in self._parts for commit in part.commits]

    def _record(self, position: int, part: Part, row: int) -> SampleRecord:
        tokens = tokens_record(*self._files.row("tokens", part.families["tokens"], row), self.identity)
        response = None
        if "response" in self._reads:
            response = self._response(part, row, tokens)
        visual, relation = {}, {}
        for image in tokens.images:
            if "visual" in self._reads:
                entry, at = self._image_place(position, "visual", image.key)
                _, visual[image.key] = self._files.sparse_rows("visual", entry, at, self._row_formats["visual"])
                _check_count(image, visual[image.key].num_rows)
            if "relation" in self._reads:
                table, at = self._image_row(position, "relation", image.key)
                relation[image.key] = relation_matrix(table, at, image.num_visual_tokens)
                check_encoding(relation[image.key], self._relation_section)
        hidden = self._hidden(part, row, tokens) if "hidden" in self._reads else None
        sequence = self._sequence(part, row, tokens) if "sequence" in self._reads else None
        return SampleRecord(tokens, response, visual, relation, hidden, sequence)

    def _hidden(self, part: Part, row: int, tokens: TokensRecord) -> NDArray[np.float32]:
        table, at = self._sample_row("hidden", part, row, tokens)
        states = hidden_states(table, at, self._hidden_section)
        if len(states) != tokens.num_response_tokens:
            raise CorruptPartError(f"{len(states)} hidden states for {tokens.num_response_tokens} response tokens")
        return states

    def _sequence(self, part: Part, row: int, tokens: TokensRecord) -> SequenceLogprob:
        sequence = sequence_logprob(*self._sample_row("sequence", part, row, tokens))
        check_sequence(sequence, tokens)
        return sequence

    def _sample_row(self, family: str, part: Part, row: int, tokens: TokensRecord) -> tuple[Any, int]:
        table, at = self._files.row(family, part.families[family], row)
        if table["sample_id"][at].as_py() != tokens.sample_id:
            raise CorruptPartError(f"its {family} row belongs to another sample")
        return table, at

    def _response(self, part: Part, row: int, tokens: TokensRecord) -> SparseRows:
        entry = part.families["response"]
        sample_id, rows = self._files.sparse_rows("response", entry, row, self._row_formats["response"])
        if sample_id != tokens.sample_id:
            raise CorruptPartError("its response row belongs to another sample")
        if rows.num_rows != tokens.num_response_tokens:
            raise CorruptPartError(f"{rows.num_rows} rows for {tokens.num_response_tokens} response tokens")
        return rows

    def _image_row(self, position: int, family: str, key: str) -> tuple[Any, int]:
        return self._files.row(family, *self._image_place(position, family, key))

    def _image_place(self, position: int, family: str, key: str) -> tuple[FileEntry, int]:
        entry = self._parts[position].families[family]
        rows = self._image_rows.get((position, family))
        if rows is None:
            keys = self._files.columns(family, entry, ["image_key"])["image_key"].to_pylist()
            rows = self._image_rows[position, family] = {key: row for row, key in enumerate(keys)}
        if key not in rows:
            raise CorruptPartError(f"image {key} has no {family} rows in its part")
        return entry, rows[key]

    def _image_file(self, position: int, sha256: str) -> tuple[FileEntry, int]:
        entry = self._parts[position].families["images"]
        rows = self._image_rows.get((position, "images"))
        if rows is None:
            shas = self._files.columns("images", entry, ["sha256"])["sha256"].to_pylist()
            rows = self._image_rows[position, "images"] = {sha: row for row, sha in enumerate(shas)}
        return entry, rows[sha256]

    def _index_tables(self) -> list[pa.Table]:
        def read(part: Part) -> pa.Table:
            return self._files.columns("tokens", part.families["tokens"], _INDEX_COLUMNS)

        if not self.folder.is_remote:
            return [read(part) for part in self._parts]
        with ThreadPoolExecutor(layout.NUM_CONNECTIONS) as pool:
            return list(pool.map(read, self._parts))

    def _read_index(self) -> None:
        self.sample_ids: list[str] = []
        self.splits: list[str] = []
        self.categories: list[str] = []
        self.image_keys: list[tuple[str, ...]] = []
        counts, sizes = [np.zeros(0, np.int32)], []
        for table in self._index_tables():
            self.sample_ids += table["sample_id"].to_pylist()
            self.splits += table["split"].to_pylist()
            self.categories += table["category"].to_pylist()
            self.image_keys += map(tuple, table["image_keys"].to_pylist())
            counts.append(table["num_response_tokens"].to_numpy())
            sizes.append(table.num_rows)
        self.num_response_rows: NDArray[np.int32] = np.concatenate(counts)
        self.num_images: NDArray[np.int32] = np.array([len(keys) for keys in self.image_keys], np.int32)
        self._part_of = np.repeat(np.arange(len(sizes)), sizes)
        self._row_of = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, np.int64)
        self._positions = {sample_id: index for index, sample_id in enumerate(self.sample_ids)}
        if len(self._positions) != len(self.sample_ids):
            raise CorruptPartError(f"{self.folder}: a sample id has two records; run stillhouse verify")


def read_identity(path: str | Path) -> Identity:
    """What a cache was made from, by its segments' documents alone: quick whatever its size. Errors as Cache.open."""
    return merged_identity(read_segments(open_folder(path)))


def first_sample_with_images(path: str | Path, splits: Sequence[str]) -> TokensRecord | None:
    """An example of the teacher's visual grid: the first sample of some splits that has images, if any has.

    Reads part after part until it is found, not the index of all. Errors as Cache.open.
    """
    folder = open_folder(path)
    segments = read_segments(folder)
    part_files = PartFiles(folder, max_bytes=DEFAULT_MAX_BYTES, checksums=True)
    for segment in tokens_segments(segments):
        for number in layout.commit_numbers(folder, segment):
            entry = layout.read_commit(folder, segment, number)[0].families["tokens"]
            table = part_files.columns("tokens", entry, ("split", "image_keys"))
            columns = zip(table["split"].to_pylist(), table["image_keys"].to_pylist(), strict=True)
            row = next((row for row, (split, keys) in enumerate(columns) if split in splits and keys), None)
            if row is not None:
                return tokens_record(*part_files.row("tokens", entry, row), merged_identity(segments))
    return None


def _check_count(image: ImageRef, num_rows: int) -> None:
    if num_rows != image.num_visual_tokens:
        raise CorruptPartError(f"image {image.path} has {num_rows} rows, expected {image.num_visual_tokens}")


def join_parts(segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]]) -> list[Part]:
    """The parts that have tokens, by number. `commits` are by segment and part."""
    parts = []
    for base in tokens_segments(segments):
        adding = [commits[segment.number] for segment in additions(segments, base)]
        for number, commit in sorted(commits[base.number].items()):
            of_part = (commit, *(added[number] for added in adding if number in added))
            parts.append(Part(number, of_part, {name: one for each in of_part for name, one in each.families.items()}))
    return parts


def coding_errors(commits: Sequence[Commit]) -> dict[str, ErrorSummary]:
    """What the encoding of each family cost, over all commits that have it; without those that one is silent about."""
    silent = {family for commit in commits if commit.errors_by_family is None for family in commit.families}
    stated = total_errors([commit for commit in commits if commit.errors_by_family is not None]) or {}
    return {family: errors for family, errors in stated.items() if family not in silent}


def held_families(segments: Sequence[Segment], parts: Sequence[Part]) -> tuple[str, ...]:
    """The families that every part has, tokens first; of a cache without parts, those it was begun with."""
    begun = {"tokens", *segments[0].families}
    return tuple(
        family for family in FAMILIES if all(family in part.families for part in parts) and (parts or family in begun)
    )


def _read_commits(folder: Folder, segment: Segment, listed: Sequence[str] | None) -> dict[int, Commit]:
    """A segment's commits by part: those whose hashes its manifest lists, or all that are there."""
    numbers = layout.commit_numbers(folder, segment) if listed is None else segment.parts[: len(listed)]
    try:
        found = layout.read_commits(folder, segment, list(numbers))
    except FileNotFoundError as error:
        there = layout.commit_numbers(folder, segment)
        gone = next((part for part in numbers if part not in there), segment.first_part)
        place = folder.place(layout.commit_file(segment, gone))
        raise CorruptPartError(f"{place}: is missing, but the manifest names it; run the dump again") from error
    for (commit, sha256), stated in zip(found, listed or (), strict=listed is not None):
        if sha256 != stated:
            place = folder.place(layout.commit_file(segment, commit.part))
            raise CorruptPartError(f"{place}: sha256 is {sha256}, the manifest says {stated}; run the dump again")
    return {commit.part: commit for commit, _ in found}


def _lacks(folder: Folder, segments: Sequence[Segment], parts: Sequence[Part], held: Sequence[str], family: str) -> str:
    """Which parts lack a family, and what to do."""
    text = f"{folder}: holds {', '.join(held)}, not {family}"
    lacking = [part.number for part in parts if family not in part.families]
    if family not in FAMILIES or not lacking or len(lacking) == len(parts):
        return f"{text}; dump that family first"
    bases = [one for one in tokens_segments(segments) if any(part in one.parts for part in lacking)]
    spans = []
    for base in bases:
        adding = next((one for one in additions(segments, base) if family in one.families), None)
        what = "was dumped without it" if adding is None else f"gets it from segment {adding.number}, not finished"
        spans.append(f"segment {base.number} (parts {base.parts.start} to {base.parts.stop - 1}) {what}")
    return (
        f"{text}, of all parts: {len(lacking)} of {len(parts)} lack it, part {lacking[0]} first; {'; '.join(spans)}; "
        f"run the dump over the samples of segment {bases[0].number} with {family} in cache.families"
    )
