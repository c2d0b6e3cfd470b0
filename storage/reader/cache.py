"""Reads a cache, sealed or still growing: its samples by position or id, with the families asked for."""

# pyarrow makes its compute functions when it is imported:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.backends.folder import Folder, open_folder
from storage.encoding.arrow_rows import image_content, tokens_record
from storage.encoding.output_head import StoredHead
from storage.encoding.parquet_schema import FAMILIES
from storage.encoding.tail_profile import mean_profile, tail_parts
from storage.errors import CacheError, CorruptPartError, MissingFamilyError
from storage.identity import Identity
from storage.images.image_root import find_image_root, follows_links
from storage.layout import commits as layout
from storage.layout.documents import Commit
from storage.layout.error_summaries import KINDS
from storage.layout.part_index import Part, held_families, lacks, read_parts, stated_losses
from storage.layout.segments import Segment, merged_identity, read_segments, tokens_segments
from storage.reader.batch_reader import BatchReader
from storage.reader.narrowing import Narrowing
from storage.reader.row_group_cache import PartFiles
from storage.reader.sample_index import INDEX_COLUMNS, SampleIndex, TextColumn
from storage.reader.shuffle import WINDOW_ROWS, Shuffle, cut_blocks
from storage.records.preference_pairs import CHOSEN, PreferencePair, pair_positions
from storage.records.records import SampleError, SampleRecord, TokensRecord
from storage.records.sample_batch import SampleBatch

DEFAULT_MAX_BYTES = 256 << 20
NUM_THREADS = 4  # that read the index of a local cache
ITERATION_BATCH = 64  # samples that iteration reads at once


class Cache:
    """Samples in the order of parts and of rows in them. It holds no open file, so may be forked or pickled.

    The index (ids, splits, categories, counts) is read when the cache is opened, signals when asked for.
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
        self._files = part_files
        self._batches = BatchReader(part_files, self.identity, reads)
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
        """Open a cache to read tokens and `families` (None: all that every part has).

        `max_bytes` bounds the row groups kept in memory. With `checksums` each file's sha256 is checked
        when it is first touched, for which it is read whole; None: in a local folder, but not in an object
        store, where rows are read by ranges and their pages' checksums must do. `narrowing`, by family: fewer
        entries than are stored. Errors: CacheError if there is no cache or a part lacks a family; ConfigError if
        rows cannot be narrowed so; CorruptPartError.
        """
        folder = open_folder(path)
        segments = read_segments(folder)
        parts, sealed = read_parts(folder, segments)
        held = held_families(segments, parts)
        reads = held if families is None else tuple(families)
        for family in reads:
            if family not in held:
                raise MissingFamilyError(lacks(folder, segments, parts, held, family))
        needed = {segment.number for segment in segments if segment.has_tokens or {*segment.families} & {*reads}}
        checksums = not folder.is_remote if checksums is None else checksums
        for family, each in (narrowing or {}).items():
            each.check(merged_identity(segments).selection.get(family, {}), family)
        part_files = PartFiles(folder, max_bytes=max_bytes, checksums=checksums, narrowing=narrowing)
        return cls(folder, segments, parts, held, reads, part_files, sealed=needed <= sealed)

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    @property
    def num_samples(self) -> int:
        return len(self._index)

    @property
    def sample_ids(self) -> TextColumn:
        return self._index.sample_ids

    @property
    def splits(self) -> TextColumn:
        return self._index.splits

    @property
    def categories(self) -> TextColumn:
        return self._index.categories

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """Of each sample, unexpanded: an image counts as one."""
        return self._index.num_tokens

    @property
    def num_response_rows(self) -> NDArray[np.int32]:
        return self._index.num_response_rows

    @property
    def num_images(self) -> NDArray[np.int32]:
        return self._index.num_images

    @property
    def num_visual_tokens(self) -> NDArray[np.int64]:
        """Of each sample's images together, in the teacher's grid."""
        return self._index.num_visual_tokens

    @property
    def held_bytes(self) -> int:
        """Bytes of the row groups that are in memory."""
        return self._files.held_bytes

    @property
    def num_groups_read(self) -> int:
        """Row groups read so far: more than once an epoch each, and `max_bytes` is too small for the order."""
        return self._files.num_groups_read

    @property
    def errors(self) -> list[SampleError]:
        """Samples of the plan that have no record, with the newest reasons."""
        return [SampleError(error.sample_id, error.reason) for part in self._parts for error in part.errors]

    @property
    def image_root(self) -> Path:
        """The folder that image paths are relative to: one that a segment names, or that was moved with the cache."""
        index = int(np.argmax(self.num_images > 0)) if self.num_samples else 0
        example = None
        if self.num_samples and self.num_images[index]:
            positions, rows_in_parts = self._index.places(np.array([index]))
            entry = self._parts[int(positions[0])].families["tokens"]
            rows, at = self._files.token_rows(entry, int(rows_in_parts[0]), self.identity)
            example = rows.images[at][0].path
        return find_image_root(self._recorded_roots, self.folder.place(""), example=example)

    @property
    def follows_image_links(self) -> bool:
        """Whether links below `image_root` may lead out of it: that is the folder that was dumped, on this machine."""
        return follows_links(self.image_root, self._recorded_roots)

    @property
    def _recorded_roots(self) -> list[str]:
        return [segment.identity.image_root for segment in reversed(tokens_segments(self.segments))]

    def index_of(self, sample_id: str) -> int:
        """The position of a sample. Errors: KeyError."""
        return self._index.position(sample_id)

    def read(self, index: int, *, draw_set: int = 0) -> SampleRecord:
        """One sample with the families asked for, draws as in `read_many`. Errors: IndexError, CorruptPartError."""
        return self.read_many([index], draw_set=draw_set).record(0)

    def read_many(self, indices: Sequence[int] | NDArray[np.int64], *, draw_set: int = 0) -> SampleBatch:
        """Some samples, one or more, in this order, with the families asked for. Threads may read at once.

        A row group that several of them lie in is decoded once. Where a family's rows have several sets of draws
        (`draw_sets`), they are given with set `draw_set` modulo their number: who passes the epoch sees other draws
        each time. Errors: IndexError, CorruptPartError.
        """
        chosen = np.asarray(indices, np.int64)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= self.num_samples:
            raise IndexError(f"samples {chosen.tolist()[:8]} of {self.num_samples}")
        positions, rows = self._index.places(chosen)
        ids, parts = [self.sample_ids[index] for index in chosen], [self._parts[at] for at in positions.tolist()]
        try:
            return self._batches.read(chosen, ids, parts, rows.tolist(), draw_set=draw_set)
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
        """The shuffled order of some samples (None: of all), whose positions it gives; see storage/reader/shuffle.py.

        Its window should fit into `max_bytes`: rows take some 270 bytes each.
        """
        chosen = slice(None) if indices is None else np.asarray(indices, np.int64)
        blocks = cut_blocks(self._index.parts(), self.num_response_rows, self.num_visual_tokens)
        rows = np.bincount(blocks, self.num_response_rows + self.num_visual_tokens).astype(np.int64)
        return Shuffle(blocks[chosen], rows, window_rows=window_rows)

    def head(self) -> StoredHead:
        """The teacher's output head, read and checked anew: keep it. `head.logits(record.hidden)` are full rows.

        Errors: CacheError where the cache holds no hidden states or no part yet, CorruptPartError.
        """
        entry = layout.check_one_head(self._commits())
        if entry is None:
            raise CacheError(f"{self.folder}: holds no output head; dump the family hidden first")
        return layout.read_head(self.folder, entry, self.identity.vocab_size)

    def tail_profile(self, family: str) -> NDArray[np.float32]:
        """(v,) the mean distribution of what lies outside the exact entries of a family's rows; it sums to 1.

        Estimated by a few parts spread over each segment (tail_profile.tail_parts). Errors: CacheError where no
        part keeps one; CorruptPartError.
        """
        groups, vocab_size = [], self.identity.vocab_size
        for segment in self.segments:
            parts = {
                part.number: part
                for part in self._parts
                if part.number in segment.parts and family in segment.families and family in part.families
            }
            kept = [segment.first_part + number for number in tail_parts(segment.num_parts)]
            found = [
                self._files.tail_total(family, parts[number].families[family], vocab_size)
                for number in kept
                if number in parts
            ]
            rows = sum(commit.num_rows.get(family, 0) for part in parts.values() for commit in part.commits)
            groups.append(([tail for tail in found if tail is not None], rows))
        if not any(tails for tails, _ in groups):
            raise MissingFamilyError(
                f"{self.folder}: keeps no tail profile of {family}; dump that family anew to have one"
            )
        return mean_profile(groups, vocab_size)

    def image_bytes(self, index: int, sha256: str) -> bytes:
        """The file of one of a sample's images, with its hash checked; only its part is opened.

        Errors: CacheError where the cache holds no images, KeyError for no image of the sample, CorruptPartError.
        """
        if "images" not in self.families:
            raise CacheError(f"{self.folder}: holds no images; dump the family images first")
        part = self._parts[int(self._index.places(np.array([index]))[0][0])]
        entry = part.families["images"]
        table, at = self._files.row("images", entry, self._files.rows_of("images", entry, "sha256")[sha256])
        try:
            return image_content(table, at)
        except CorruptPartError as error:
            raise CorruptPartError(f"{self.folder}: part {part.number}: {error}") from error

    def pairs(self) -> list[PreferencePair]:
        """The preference pairs: samples `<id>#chosen` and `<id>#rejected`."""
        return [
            PreferencePair(self.sample_ids[chosen].removesuffix(CHOSEN), chosen, rejected)
            for chosen, rejected in self.pair_positions().tolist()
        ]

    def pair_positions(self) -> NDArray[np.int64]:
        """(p, 2) the positions of the chosen and the rejected answer of each preference pair."""
        return pair_positions(self.sample_ids.arrow)

    def count_samples_showing(self, image_key: str) -> int:
        """The samples that show an image after the same prefix; reads one column of every part."""
        count = 0
        for table in self.tables("tokens", ("image_keys",)):
            keys = table["image_keys"].combine_chunks()
            shows = pc.equal(pc.list_flatten(keys), image_key)
            count += len(pc.list_parent_indices(keys).filter(shows).unique())
        return count

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
            **{
                kind: {family: each.model_dump() for family, each in stated_losses(commits, kind).items()}
                for kind in KINDS
            },
            "num_errors": len(self.errors),
            "num_parts": self.num_parts,
            "sealed": self.sealed,
        }

    def _commits(self) -> list[Commit]:
        return [commit for part in self._parts for commit in part.commits]

    def _read_index(self) -> SampleIndex:
        def read(part: Part) -> pa.Table:
            return self._files.columns("tokens", part.families["tokens"], INDEX_COLUMNS)

        with ThreadPoolExecutor(layout.NUM_CONNECTIONS if self.folder.is_remote else NUM_THREADS) as pool:
            tables = list(pool.map(read, self._parts))
        index = SampleIndex(tables)
        if index.has_duplicates():
            raise CorruptPartError(f"{self.folder}: a sample id has two records; run stillhouse verify")
        return index


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
