"""Reads a cache, sealed or still growing: its samples by position or id, with the families asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import commit as layout
from storage import files
from storage.coding_errors import total as total_errors
from storage.columns import (
    hidden_states,
    image_content,
    relation_matrix,
    sequence_logprob,
    sparse_rows,
    tokens_record,
)
from storage.documents import Commit, Description, FileEntry
from storage.errors import CacheError, CorruptPartError
from storage.head import StoredHead, decode_head
from storage.identity import Identity, stored_hidden, stored_relation
from storage.part_files import PartFiles
from storage.preference import PreferencePair, check_sequence, pairs_of
from storage.records import ImageRef, SampleError, SampleRecord, SequenceLogprob, TokensRecord
from storage.relation import check_encoding
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
        self._relation_section = stored_relation(description.identity)
        self._hidden_section = stored_hidden(description.identity)
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

    def head(self) -> StoredHead:
        """The teacher's output head, read and checked anew: keep it. `head.logits(record.hidden)` are full rows.

        Errors: CacheError where the cache holds no hidden states or no part yet, CorruptPartError.
        """
        entry = self._commits[0].head if self._commits else None
        if entry is None:
            raise CacheError(f"{self.folder}: holds no output head; dump the family hidden first")
        layout.check_file(self.folder, entry, content=True)
        head = decode_head(files.read_bytes(self.folder / entry.file))
        if head.vocab_size != self.identity.vocab_size:
            raise CorruptPartError(
                f"{self.folder / entry.file}: has {head.vocab_size} tokens, the vocabulary {self.identity.vocab_size}"
            )
        return head

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
            raise CorruptPartError(f"{self.folder}: part {self._commits[position].part}: {error}") from error

    def pairs(self) -> list[PreferencePair]:
        """The preference pairs: samples `<id>#chosen` and `<id>#rejected`."""
        return pairs_of(self.sample_ids)

    def statistics(self) -> dict[str, Any]:
        """Counts and bytes, from the commits alone.

        `bytes_per_row` are the bytes of the response and visual files by their rows (0.0 without rows).
        """
        num_rows = {"response": 0, "visual": 0, **layout.total_rows(self._commits)}
        by_family = {
            family: sum(commit.families[family].file_bytes for commit in self._commits) for family in self.families
        }
        if self._commits and (head := self._commits[0].head) is not None:
            by_family[layout.HEAD_FOLDER] = head.file_bytes
        errors = total_errors(self._commits) or {}
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
            "errors_by_family": {family: each.model_dump() for family, each in errors.items()},
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
                relation[image.key] = relation_matrix(table, at, image.num_visual_tokens)
                check_encoding(relation[image.key], self._relation_section)
        hidden = self._hidden(commit, row, tokens) if "hidden" in self._reads else None
        sequence = self._sequence(commit, row, tokens) if "sequence" in self._reads else None
        return SampleRecord(tokens, response, visual, relation, hidden, sequence)

    def _hidden(self, commit: Commit, row: int, tokens: TokensRecord) -> NDArray[np.float32]:
        table, at = self._sample_row("hidden", commit, row, tokens)
        states = hidden_states(table, at, self._hidden_section)
        if len(states) != tokens.num_response_tokens:
            raise CorruptPartError(f"{len(states)} hidden states for {tokens.num_response_tokens} response tokens")
        return states

    def _sequence(self, commit: Commit, row: int, tokens: TokensRecord) -> SequenceLogprob:
        sequence = sequence_logprob(*self._sample_row("sequence", commit, row, tokens))
        check_sequence(sequence, tokens)
        return sequence

    def _sample_row(self, family: str, commit: Commit, row: int, tokens: TokensRecord) -> tuple[Any, int]:
        table, at = self._files.row(family, commit.families[family], row)
        if table["sample_id"][at].as_py() != tokens.sample_id:
            raise CorruptPartError(f"its {family} row belongs to another sample")
        return table, at

    def _response(self, commit: Commit, row: int, tokens: TokensRecord) -> SparseRows:
        table, at = self._sample_row("response", commit, row, tokens)
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

    def _image_file(self, position: int, sha256: str) -> tuple[FileEntry, int]:
        entry = self._commits[position].families["images"]
        rows = self._image_rows.get((position, "images"))
        if rows is None:
            shas = self._files.columns("images", entry, ["sha256"])["sha256"].to_pylist()
            rows = self._image_rows[position, "images"] = {sha: row for row, sha in enumerate(shas)}
        return entry, rows[sha256]

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


def _check_count(image: ImageRef, num_rows: int) -> None:
    if num_rows != image.num_visual_tokens:
        raise CorruptPartError(f"image {image.path} has {num_rows} rows, expected {image.num_visual_tokens}")
