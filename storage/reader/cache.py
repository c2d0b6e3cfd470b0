"""Reads samples of a cache by position or id, with the requested families. The cache may be unsealed."""

# pyarrow makes its compute functions when it is imported:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.backends.folder import Folder, open_folder
from storage.encoding.arrow_rows import decode_image_row, decode_keys, decode_tokens_row
from storage.encoding.output_head import StoredHead
from storage.encoding.parquet_schema import KEY_COLUMNS, SCHEMAS
from storage.encoding.tail_profile import compute_mean_profile, select_tail_parts
from storage.errors import CacheError, CorruptPartError, MissingFamilyError
from storage.identity import Identity, stored_selection
from storage.images.image_root import find_image_root, may_follow_links
from storage.layout import commits as layout
from storage.layout.documents import Commit, EngineCheckEntry
from storage.layout.part_index import (
    Part,
    explain_missing_family,
    read_parts,
    select_common_families,
)
from storage.layout.segments import Segment, merge_identities, read_segments, select_tokens_segments
from storage.reader.batch_reader import BatchReader, FoundSample, join_samples
from storage.reader.cache_statistics import compute_statistics
from storage.reader.narrowing import Narrowing
from storage.reader.row_group_cache import RowGroupCache
from storage.reader.sample_index import INDEX_COLUMNS, SampleIndex, TextColumn
from storage.reader.shuffle import WINDOW_ROWS, Shuffle, cut_blocks
from storage.records.preference_pairs import PreferencePair, find_pair_positions
from storage.records.records import SampleError, SampleRecord, TokensRecord
from storage.records.sample_batch import SampleBatch

DEFAULT_MAX_BYTES = 256 << 20
ITERATION_BATCH = 64  # samples that iteration reads at once


class Cache:
    """A cache opened for reading: samples by position, in the order of parts and of rows within a part.

    Opening reads the index (ids, splits, categories, counts); all else is read on demand. A cache holds
    no open file, so it can be forked, pickled, and used by several threads.
    """

    def __init__(
        self, folder: Folder, segments: Sequence[Segment], parts: Sequence[Part], families: tuple[str, ...],
        requested: tuple[str, ...], row_groups: RowGroupCache, *, sealed: bool,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.sealed = sealed  # True if all samples of the requested families are written
        self.families = families  # those that every part has
        self.segments = tuple(segments)
        self.identity: Identity = merge_identities(segments)
        self._parts = parts
        self._row_groups = row_groups
        self._batches = BatchReader(row_groups, self.identity, requested)
        self._index = self._read_index()

    @classmethod
    def open(
        cls,
        path: str | Path,
        families: Sequence[str] | None = None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        checksums: bool | None = None,
        narrowing: Mapping[str, Narrowing] | None = None,
    ) -> Cache:
        """Opens a cache to read tokens and `families` (None: all families that every part has).

        `max_bytes` bounds the decoded row groups kept in memory. `checksums`: check the sha256 of each file
        at its first use, which reads the whole file; None means True for a local folder and False for an
        object store, where rows are read by ranges and only page checksums are checked. `narrowing`, by
        family, reads fewer entries per row than are stored.

        Errors: CacheError if there is no cache or a part lacks a family; ConfigError if the stored rows
        cannot be narrowed as requested; CorruptPartError.
        """
        folder = open_folder(path)
        segments = read_segments(folder)
        parts, sealed = read_parts(folder, segments)
        stored = select_common_families(segments, parts)
        requested = stored if families is None else tuple(families)
        for family in requested:
            if family not in stored:
                raise MissingFamilyError(explain_missing_family(folder, segments, parts, stored, family))
        needed = {segment.number for segment in segments if segment.has_tokens or {*segment.families} & {*requested}}
        checksums = not folder.is_remote if checksums is None else checksums
        for family, family_narrowing in (narrowing or {}).items():
            family_narrowing.check(stored_selection(merge_identities(segments), family), family)
        row_groups = RowGroupCache(folder, max_bytes=max_bytes, checksums=checksums, narrowing=narrowing)
        return cls(folder, segments, parts, stored, requested, row_groups, sealed=needed <= sealed)

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    @property
    def num_samples(self) -> int:
        return len(self._index)

    @property
    def sample_ids(self) -> TextColumn:
        """The id of each sample, by position."""
        return self._index.sample_ids

    @property
    def splits(self) -> TextColumn:
        """The split of each sample, by position."""
        return self._index.splits

    @property
    def categories(self) -> TextColumn:
        """The category of each sample, by position."""
        return self._index.categories

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """(s,) token ids per sample before image expansion: an image counts as one."""
        return self._index.num_tokens

    @property
    def num_response_rows(self) -> NDArray[np.int32]:
        """(s,) response tokens, and thus response rows, per sample."""
        return self._index.num_response_rows

    @property
    def num_images(self) -> NDArray[np.int32]:
        """(s,) images per sample."""
        return self._index.num_images

    @property
    def num_visual_tokens(self) -> NDArray[np.int64]:
        """(s,) visual tokens of all images of a sample, in the teacher's grid."""
        return self._index.num_visual_tokens

    @property
    def held_bytes(self) -> int:
        """Bytes of the decoded row groups in memory."""
        return self._row_groups.held_bytes

    @property
    def num_groups_read(self) -> int:
        """The number of row groups read so far.

        If it exceeds one read per row group and epoch, `max_bytes` is too small for the order of reading.
        """
        return self._row_groups.num_groups_read

    @property
    def errors(self) -> list[SampleError]:
        """The samples of the plan that have no record, each with its most recent reason."""
        return [SampleError(error.sample_id, error.reason) for part in self._parts for error in part.errors]

    @property
    def image_root(self) -> Path:
        """The folder that image paths are relative to: a recorded one, or one moved along with the cache."""
        index = int(np.argmax(self.num_images > 0)) if self.num_samples else 0
        example = None
        if self.num_samples and self.num_images[index]:
            positions, rows_in_parts = self._index.locate(np.array([index]))
            entry = self._parts[int(positions[0])].families["tokens"]
            rows, index_in_group = self._row_groups.read_token_rows(entry, int(rows_in_parts[0]), self.identity)
            example = rows.images[index_in_group][0].path
        return find_image_root(self._recorded_roots, self.folder.locate(""), example=example)

    @property
    def follows_image_links(self) -> bool:
        """True if symbolic links may lead out of `image_root`: only in the folder that was dumped."""
        return may_follow_links(self.image_root, self._recorded_roots)

    @property
    def _recorded_roots(self) -> list[str]:
        return [segment.identity.image_root for segment in reversed(select_tokens_segments(self.segments))]

    def index_of(self, sample_id: str) -> int:
        """Returns the position of a sample. Errors: KeyError for an unknown id."""
        return self._index.find(sample_id)

    def read(self, index: int, *, draw_set: int = 0) -> SampleRecord:
        """Reads one sample with the requested families; `draw_set` as in `read_many`.

        Errors: IndexError for a position outside 0..num_samples - 1, CorruptPartError.
        """
        return self.read_many([index], draw_set=draw_set).record(0)

    def read_many(self, indices: Sequence[int] | NDArray[np.int64], *, draw_set: int = 0) -> SampleBatch:
        """Reads one or more samples, in the order of `indices`, with the requested families.

        Each row group is decoded at most once, and several threads may read at the same time. `draw_set`
        selects one of a family's independent draw sets, modulo their number: pass the epoch to get other
        draws in each epoch. Errors: IndexError for no or an unknown position, CorruptPartError.
        """
        return join_samples(self.find_many(indices, draw_set=draw_set), np.array(indices, np.int64))

    def find_many(self, indices: Sequence[int] | NDArray[np.int64], *, draw_set: int = 0) -> list[FoundSample]:
        """Decodes the row groups that hold some samples, without copying them; for `join_samples`.

        Arguments and errors as `read_many`.
        """
        chosen = np.asarray(indices, np.int64)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= self.num_samples:
            raise IndexError(
                f"samples {chosen.tolist()[:8]}: expected positions from 0 to {self.num_samples - 1}, at least one"
            )
        positions, rows = self._index.locate(chosen)
        ids = [self.sample_ids[index] for index in chosen]
        parts = [self._parts[position] for position in positions.tolist()]
        try:
            return self._batches.find(ids, parts, rows.tolist(), draw_set=draw_set)
        except CorruptPartError as error:
            raise CorruptPartError(f"{self.folder}: {error}") from error

    def __iter__(self) -> Iterator[SampleRecord]:
        """Every sample in the cache's order, read in batches. Errors: CorruptPartError."""
        for start in range(0, self.num_samples, ITERATION_BATCH):
            stop = min(start + ITERATION_BATCH, self.num_samples)
            yield from self.read_many(range(start, stop)).records()

    def shuffle(
        self, indices: Sequence[int] | NDArray[np.int64] | None = None, *, window_rows: int = WINDOW_ROWS
    ) -> Shuffle:
        """Returns the shuffled order of some samples (None: of all); see storage/reader/shuffle.py.

        The order yields positions within `indices`. The window should fit into `max_bytes`: a row takes
        about 270 bytes.
        """
        chosen = slice(None) if indices is None else np.asarray(indices, np.int64)
        blocks = cut_blocks(self._index.assign_parts(), self.num_response_rows, self.num_visual_tokens)
        rows = np.bincount(blocks, self.num_response_rows + self.num_visual_tokens).astype(np.int64)
        return Shuffle(blocks[chosen], rows, window_rows=window_rows)

    def head(self) -> StoredHead:
        """Reads and checks the teacher's output head; every call reads it again, so keep the result.

        `head.logits(record.hidden)` returns full-vocabulary logits of a sample's response rows. Errors:
        CacheError if the cache holds no hidden states or no part yet, CorruptPartError.
        """
        entry = layout.check_one_head(self._commits())
        if entry is None:
            raise CacheError(f"{self.folder}: holds no output head; dump the family hidden first")
        return layout.read_head(self.folder, entry, self.identity.vocab_size)

    def tail_profile(self, family: str) -> NDArray[np.float32]:
        """Returns (v,) the mean distribution outside the exact entries of a family's rows; it sums to 1.

        It is estimated from a few parts spread over each segment (tail_profile.select_tail_parts).
        Errors: CacheError if no part stores a tail profile, CorruptPartError.
        """
        groups, vocab_size = [], self.identity.vocab_size
        for segment in self.segments:
            parts = {
                part.number: part
                for part in self._parts
                if part.number in segment.parts and family in segment.families and family in part.families
            }
            kept = [segment.first_part + number for number in select_tail_parts(segment.num_parts)]
            found = [
                self._row_groups.read_tail_total(family, parts[number].families[family], vocab_size)
                for number in kept
                if number in parts
            ]
            rows = sum(commit.num_rows.get(family, 0) for part in parts.values() for commit in part.commits)
            groups.append(([tail for tail in found if tail is not None], rows))
        if not any(tails for tails, _ in groups):
            raise MissingFamilyError(
                f"{self.folder}: stores no tail profile of {family}; dump that family again to get one"
            )
        return compute_mean_profile(groups, vocab_size)

    def image_bytes(self, index: int, sha256: str) -> bytes:
        """Returns the file content of one image of a sample, its hash checked; opens that part only.

        Errors: CacheError if the cache holds no images, KeyError if its part has no such image,
        CorruptPartError.
        """
        if "images" not in self.families:
            raise CacheError(f"{self.folder}: holds no images; dump the family images first")
        part = self._parts[int(self._index.locate(np.array([index]))[0][0])]
        entry = part.families["images"]
        table, at = self._row_groups.read_row(
            "images", entry, self._row_groups.index_rows("images", entry, "sha256")[sha256]
        )
        try:
            return decode_image_row(table, at)
        except CorruptPartError as error:
            raise CorruptPartError(f"{self.folder}: part {part.number}: {error}") from error

    def pairs(self) -> list[PreferencePair]:
        """Returns the preference pairs: the two halves of one row each."""
        table = self._read_keys()
        found = find_pair_positions(table)
        keys = decode_keys(table.take(found[:, 0]))
        return [PreferencePair(key.whole.sample_id, *pair) for key, pair in zip(keys, found.tolist(), strict=True)]

    def find_pair_positions(self) -> NDArray[np.int64]:
        """Returns (p, 2) the positions of the chosen and the rejected sample of each preference pair."""
        return find_pair_positions(self._read_keys())

    def count_samples_showing(self, image_key: str) -> int:
        """Counts the samples that show an image after the same prefix; reads one column of every part."""
        count = 0
        for table in self.tables("tokens", ("image_keys",)):
            keys = table["image_keys"].combine_chunks()
            shows = pc.equal(pc.list_flatten(keys), image_key)
            count += len(pc.list_parent_indices(keys).filter(shows).unique())
        return count

    def tables(self, family: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yields plain columns of a family, one table per part, without decoding payloads.

        `tokens` and `response` have one row per sample, in the order of the samples. Use it to read a scalar
        over the whole cache. Errors: CorruptPartError.
        """
        for part in self._parts:
            yield self._row_groups.read_columns(family, part.families[family], columns)

    def statistics(self) -> dict[str, Any]:
        """Returns counts, sizes in bytes and error summaries, read from the commits alone.

        `bytes_per_row` is the size of the response and visual files divided by their rows (0.0 if none).
        """
        found = compute_statistics(self._parts, self.segments)
        return {"num_samples": self.num_samples, **found, "num_errors": len(self.errors), "sealed": self.sealed}

    def engine_checks(self) -> dict[int, EngineCheckEntry]:
        """Returns what the manifests say of engines, by segment: how far each was from the model itself.

        A segment that is not sealed, or whose dump had no engine check, is left out.
        """
        manifests = {segment.number: layout.read_manifest(self.folder, segment) for segment in self.segments}
        return {
            number: manifest.engine_check
            for number, manifest in manifests.items()
            if manifest is not None and manifest.engine_check is not None
        }

    def _commits(self) -> list[Commit]:
        return [commit for part in self._parts for commit in part.commits]

    def _read_keys(self) -> pa.Table:
        columns = ("sample_id", *KEY_COLUMNS)
        none = SCHEMAS["tokens"].empty_table().select(columns)
        return pa.concat_tables([none, *self._read_tokens_columns(columns)])

    def _read_tokens_columns(self, columns: Sequence[str]) -> list[pa.Table]:
        entries = [part.families["tokens"] for part in self._parts]
        return self._row_groups.read_columns_of_files("tokens", entries, columns)

    def _read_index(self) -> SampleIndex:
        index = SampleIndex(self._read_tokens_columns(INDEX_COLUMNS))
        if index.has_duplicates():
            raise CorruptPartError(f"{self.folder}: a sample id has two records; run stillhouse verify")
        return index


def read_identity(path: str | Path) -> Identity:
    """Reads a cache's identity from its segment documents, fast at any size. Errors as Cache.open."""
    return merge_identities(read_segments(open_folder(path)))


def find_first_sample_with_images(path: str | Path, splits: Sequence[str]) -> TokensRecord | None:
    """Returns the first sample of some splits that has images, as an example of the teacher's visual grid.

    Returns None if no sample has images. Stops at the first match. Errors as Cache.open.
    """
    folder = open_folder(path)
    segments = read_segments(folder)
    part_files = RowGroupCache(folder, max_bytes=DEFAULT_MAX_BYTES, checksums=True)
    for segment in select_tokens_segments(segments):
        for number in layout.list_committed_parts(folder, segment):
            entry = layout.read_commit(folder, segment, number)[0].families["tokens"]
            table = part_files.read_columns("tokens", entry, ("split", "image_keys"))
            columns = zip(table["split"].to_pylist(), table["image_keys"].to_pylist(), strict=True)
            row = next((row for row, (split, keys) in enumerate(columns) if split in splits and keys), None)
            if row is not None:
                return decode_tokens_row(*part_files.read_row("tokens", entry, row), merge_identities(segments))
    return None
