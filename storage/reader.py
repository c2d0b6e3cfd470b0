"""Reads a cache, sealed or still growing: its samples by position or id, with the families asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import commit as layout
from storage import files
from storage.columns import relation_matrix, sparse_rows, tokens_record
from storage.documents import Commit, Description
from storage.errors import CacheError, CorruptPartError
from storage.identity import Identity
from storage.part_files import PartFiles
from storage.records import ImageRef, SampleError, SampleRecord, TokensRecord
from storage.rows import SparseRows

DEFAULT_MAX_BYTES = 256 << 20

_INDEX_COLUMNS = ("sample_id", "split", "category", "num_response_tokens", "image_keys")


class Cache:
    """Samples in the order of parts and of rows in them. It holds no open file, so may be forked or pickled.

    The index (ids, splits, counts, image keys) is read when the cache is opened, signals when asked for.
    """

    def __init__(
        self, folder: Path, description: Description, commits: Sequence[Commit], reads: tuple[str, ...],
        part_files: PartFiles, *, sealed: bool,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.sealed = sealed
        self.families: tuple[str, ...] = ("tokens", *description.families)  # that the cache holds
        self._description = description
        self._commits = commits
        self._reads = reads
        self._files = part_files
        self._image_rows: dict[tuple[int, str], dict[str, int]] = {}
        self._read_index()

    @classmethod
    def open(
        cls,
        path: str | Path,
        families: Sequence[str] | None = None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        checksums: bool = True,
    ) -> Cache:
        """Open a cache to read tokens and `families` (None: all that it holds).

        `max_bytes` bounds the row groups kept in memory. With `checksums` each file's sha256 is checked
        when it is first touched. Errors: CacheError if there is no cache or a family is not in it;
        CorruptPartError.
        """
        folder = files.local_folder(path)
        description, cache_sha256 = layout.read_description(folder)
        held = ("tokens", *description.families)
        reads = held if families is None else tuple(families)
        for family in reads:
            if family not in held:
                raise CacheError(f"{folder}: holds {', '.join(held)}, not {family}; dump that family first")
        manifest = layout.read_manifest(folder, cache_sha256)
        parts = layout.commit_numbers(folder) if manifest is None else range(len(manifest.commits))
        commits = []
        for part in parts:
            try:
                commit, sha256 = layout.read_commit(folder, part, description, cache_sha256)
            except FileNotFoundError as error:
                place = folder / layout.commit_file(part)
                raise CorruptPartError(f"{place}: is missing, but the manifest names it; run the dump again") from error
            if manifest is not None and sha256 != manifest.commits[part].sha256:
                raise CorruptPartError(
                    f"{folder / layout.commit_file(part)}: sha256 is {sha256}, the manifest says "
                    f"{manifest.commits[part].sha256}; run the dump again"
                )
            commits.append(commit)
        part_files = PartFiles(folder, max_bytes=max_bytes, checksums=checksums)
        return cls(folder, description, commits, reads, part_files, sealed=manifest is not None)

    @property
    def identity(self) -> Identity:
        return self._description.identity

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    @property
    def errors(self) -> list[SampleError]:
        """Samples of the plan that have no record, with reasons."""
        return [SampleError(error.sample_id, error.reason) for commit in self._commits for error in commit.errors]

    def index_of(self, sample_id: str) -> int:
        """The position of a sample. Errors: KeyError."""
        return self._positions[sample_id]

    def read(self, index: int) -> SampleRecord:
        """One sample with the families asked for. Errors: IndexError, CorruptPartError."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        position, row = int(self._part_of[index]), int(self._row_of[index])
        commit = self._commits[position]
        try:
            return self._record(position, commit, row)
        except (CorruptPartError, ValueError) as error:
            place = f"{self.folder}: part {commit.part}, sample {self.sample_ids[index]!r}"
            raise CorruptPartError(f"{place}: {error}") from error

    def tables(self, family: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Plain columns of a family, one table a part; `tokens` and `response` in the order of the samples.

        No payload is decoded, so scalars of the whole cache are read this way. Errors: CorruptPartError.
        """
        for commit in self._commits:
            yield self._files.columns(family, commit.families[family], columns)

    def statistics(self) -> dict[str, Any]:
        """Counts and bytes, from the commits alone.

        `bytes_per_row` are the bytes of the response and visual files by their rows (0.0 without rows).
        """
        num_rows = {"response": 0, "visual": 0, **layout.total_rows(self._commits)}
        by_family = {
            family: sum(commit.families[family].file_bytes for commit in self._commits) for family in self.families
        }
        row_bytes = {family: by_family.get(family, 0) for family in num_rows}
        return {
            "num_samples": self.num_samples,
            "num_images": sum(commit.num_images for commit in self._commits),
            "num_rows": num_rows,
            "bytes": sum(by_family.values()),
            "bytes_by_family": by_family,
            "bytes_per_row": sum(row_bytes.values()) / max(1, sum(num_rows.values())),
            "bytes_per_row_by_family": {
                family: row_bytes[family] / count for family, count in num_rows.items() if count
            },
            "num_errors": sum(len(commit.errors) for commit in self._commits),
            "num_parts": len(self._commits),
            "sealed": self.sealed,
        }

    def _record(self, position: int, commit: Commit, row: int) -> SampleRecord:
        vocab_size = self.identity.vocab_size
        tokens = tokens_record(*self._files.row("tokens", commit.families["tokens"], row), self.identity)
        response = None
        if "response" in self._reads:
            response = self._response(commit, row, tokens)
        visual, relation = {}, {}
        for image in tokens.images:
            if "visual" in self._reads:
                table, at = self._image_row(position, "visual", image.key)
                visual[image.key] = sparse_rows(table, at, vocab_size=vocab_size)
                _check_count(image, visual[image.key].num_rows)
            if "relation" in self._reads:
                table, at = self._image_row(position, "relation", image.key)
                relation[image.key] = relation_matrix(table, at)
                _check_count(image, len(relation[image.key].values))
        return SampleRecord(tokens, response, visual, relation)

    def _response(self, commit: Commit, row: int, tokens: TokensRecord) -> SparseRows:
        table, at = self._files.row("response", commit.families["response"], row)
        if table["sample_id"][at].as_py() != tokens.sample_id:
            raise CorruptPartError("its response row belongs to another sample")
        rows = sparse_rows(table, at, vocab_size=self.identity.vocab_size)
        if rows.num_rows != tokens.num_response_tokens:
            raise CorruptPartError(f"{rows.num_rows} rows for {tokens.num_response_tokens} response tokens")
        return rows

    def _image_row(self, position: int, family: str, key: str) -> tuple[Any, int]:
        entry = self._commits[position].families[family]
        rows = self._image_rows.get((position, family))
        if rows is None:
            keys = self._files.columns(family, entry, ["image_key"])["image_key"].to_pylist()
            rows = self._image_rows[position, family] = {key: row for row, key in enumerate(keys)}
        if key not in rows:
            raise CorruptPartError(f"image {key} has no {family} rows in its part")
        return self._files.row(family, entry, rows[key])

    def _read_index(self) -> None:
        self.sample_ids: list[str] = []
        self.splits: list[str] = []
        self.categories: list[str] = []
        self.image_keys: list[tuple[str, ...]] = []
        counts, sizes = [np.zeros(0, np.int32)], []
        for commit in self._commits:
            table = self._files.columns("tokens", commit.families["tokens"], _INDEX_COLUMNS)
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
    """What a cache was made from, by its cache.json alone: quick whatever its size. Errors as Cache.open."""
    return layout.read_description(files.local_folder(path))[0].identity


def first_sample_with_images(path: str | Path, splits: Sequence[str]) -> TokensRecord | None:
    """An example of the teacher's visual grid: the first sample of some splits that has images, if any has.

    Reads part after part until it is found, not the index of all. Errors as Cache.open.
    """
    folder = files.local_folder(path)
    description, cache_sha256 = layout.read_description(folder)
    part_files = PartFiles(folder, max_bytes=DEFAULT_MAX_BYTES, checksums=True)
    for part in layout.commit_numbers(folder):
        entry = layout.read_commit(folder, part, description, cache_sha256)[0].families["tokens"]
        table = part_files.columns("tokens", entry, ("split", "image_keys"))
        columns = zip(table["split"].to_pylist(), table["image_keys"].to_pylist(), strict=True)
        row = next((row for row, (split, keys) in enumerate(columns) if split in splits and keys), None)
        if row is not None:
            return tokens_record(*part_files.row("tokens", entry, row), description.identity)
    return None


def _check_count(image: ImageRef, num_rows: int) -> None:
    if num_rows != image.num_visual_tokens:
        raise CorruptPartError(f"image {image.path} has {num_rows} rows, expected {image.num_visual_tokens}")
