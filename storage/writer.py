"""Writes a cache: opens or joins it, commits parts, seals it. Any number of writers may do so at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from storage import commit as layout
from storage import files
from storage.coding_errors import summary
from storage.columns import (
    Columns,
    check_token_ids,
    family_errors,
    hidden_columns,
    image_columns,
    relation_columns,
    rows_columns,
    sequence_columns,
    tokens_columns,
)
from storage.documents import Commit, Description, ErrorEntry, FileEntry, HeadEntry, Manifest
from storage.errors import CacheError, IdentityError
from storage.head import StoredHead, encode_head
from storage.identity import FORMAT_VERSION, Identity, difference, stored_hidden, stored_relation, stored_tau
from storage.preference import check_pairs, check_sequence
from storage.records import PartRecords, TokensRecord
from storage.schema import FAMILIES, parquet_bytes


class CacheWriter:
    """A cache that parts are added to. Invariant: its cache.json lies on disk and says what this one says."""

    def __init__(self, folder: Path, description: Description, cache_sha256: str, zstd_level: int) -> None:
        self.folder = folder
        self.description = description
        self._cache_sha256 = cache_sha256
        self._zstd_level = zstd_level
        self._head: HeadEntry | None = None
        self._head_width = 0

    @classmethod
    def open(cls, path: str | Path, identity: Identity, families: Sequence[str], *, zstd_level: int = 9) -> CacheWriter:
        """Create a cache, or join the one that lies there if it has the same identity and families.

        `families` come besides tokens, which are always there. Errors: IdentityError naming each
        field that differs; CacheError for object storage or an unknown family.
        """
        folder = files.local_folder(path)
        unknown = [family for family in families if family not in FAMILIES]
        if unknown:
            raise CacheError(f"{folder}: unknown families {unknown}, expected some of {FAMILIES}")
        wanted = tuple(family for family in FAMILIES if family in families and family != "tokens")
        ours = Description(format_version=FORMAT_VERSION, families=wanted, identity=identity)
        for sub in ("tokens", *wanted, layout.COMMITS_FOLDER):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        if not (folder / layout.CACHE_FILE).exists():
            files.create_exclusively(folder / layout.CACHE_FILE, ours.to_bytes())
        theirs, cache_sha256 = layout.read_description(folder)
        lines = difference(theirs.identity, identity)
        if theirs.families != wanted:
            lines.append(f"families: cache has {theirs.families}, this run has {wanted}")
        if lines:
            raise IdentityError(
                f"{folder}: the cache there was made otherwise; delete it, or give cache.path another folder:"
                + "".join(f"\n  {line}" for line in lines)
            )
        return cls(folder, theirs, cache_sha256, zstd_level)

    @property
    def identity(self) -> Identity:
        return self.description.identity

    def committed_parts(self) -> set[int]:
        """Parts that need no more work. CorruptPartError if a file of one is gone or has another size."""
        return {commit.part for commit, _ in self._commits()}

    def write_part(self, part: int, records: PartRecords) -> Commit:
        """Write a part's files, then its commit. A part that has a commit is left as it is.

        The commit that counts is returned: of writers that race, one wins and the others adopt its commit.
        Errors: ValueError for records that contradict each other or the identity; OSError.
        """
        if not 0 <= part < self.identity.num_parts:
            raise ValueError(f"part {part} is not one of the plan's {self.identity.num_parts}")
        existing = self._existing(part)
        if existing:
            return existing
        check_records(records, self.description)
        self._check_widths(records)
        entries: dict[str, FileEntry] = {}
        try:
            columns = part_columns(records, self.description)
            for family, rows in columns.items():
                entries[family] = self._write_family(family, part, rows)
            commit = self._commit(part, records, entries, columns)
            if files.create_exclusively(self.folder / layout.commit_file(part), commit.to_bytes()):
                return commit
            winner = self._existing(part)
        except FileNotFoundError:  # the cache was sealed meanwhile, and our temporary file removed
            winner = self._existing(part)
            if winner is None:
                raise
        if winner is None:
            raise CacheError(f"{self.folder}: somebody removes commits while the dump is running")
        named = {entry.file for entry in winner.families.values()}
        for entry in entries.values():
            if entry.file not in named:
                (self.folder / entry.file).unlink(missing_ok=True)
        return winner

    def put_head(self, head: StoredHead) -> None:
        """Keep the teacher's output head, before the first part of a cache that holds hidden states.

        Any number of writers may do so; the same head is one file. ValueError for one that does not fit.
        """
        if "hidden" not in self.description.families or head.vocab_size != self.identity.vocab_size:
            raise ValueError(
                f"a head of {head.vocab_size} tokens for a vocabulary of {self.identity.vocab_size} and the "
                f"families {self.description.families}; it must fit, and hidden be among them"
            )
        content = encode_head(head)
        sha256 = hashlib.sha256(content).hexdigest()
        entry = HeadEntry(file=layout.head_file(sha256), file_bytes=len(content), sha256=sha256)
        place = self.folder / entry.file
        if not place.exists() or place.stat().st_size != entry.file_bytes:
            place.parent.mkdir(exist_ok=True)
            files.write_atomically(place, content)
        self._head, self._head_width = entry, head.width

    def seal(self) -> Manifest:
        """Write the manifest, when every part is committed. A no-op on a sealed, unchanged cache.

        Errors: CacheError naming missing parts, or sample ids that two parts hold; CorruptPartError.
        """
        commits = self._commits()
        committed = {commit.part for commit, _ in commits}
        missing = [part for part in range(self.identity.num_parts) if part not in committed]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
            raise CacheError(
                f"{self.folder}: {len(missing)} of {self.identity.num_parts} parts are not committed: "
                f"{shown}; run the dump again"
            )
        layout.check_one_head([commit for commit, _ in commits])
        manifest = layout.make_manifest(self._cache_sha256, commits)
        place, content = self.folder / layout.MANIFEST_FILE, manifest.to_bytes()
        if place.exists() and files.read_bytes(place) == content:
            return manifest
        self._refuse_duplicates([commit for commit, _ in commits])
        layout.remove_orphans(self.folder, [commit for commit, _ in commits])
        files.write_atomically(place, content)
        return manifest

    def _existing(self, part: int) -> Commit | None:
        try:
            return layout.read_commit(self.folder, part, self.description, self._cache_sha256)[0]
        except FileNotFoundError:
            return None

    def _commits(self) -> list[tuple[Commit, str]]:
        commits = [
            layout.read_commit(self.folder, part, self.description, self._cache_sha256)
            for part in layout.commit_numbers(self.folder)
        ]
        for commit, _ in commits:
            for entry in commit.families.values():
                layout.check_file(self.folder, entry, content=False)
            if commit.head is not None:
                layout.check_file(self.folder, commit.head, content=False)
        return commits

    def _write_family(self, family: str, part: int, rows: Sequence[Columns]) -> FileEntry:
        content = parquet_bytes(family, rows, zstd_level=self._zstd_level)
        sha256 = hashlib.sha256(content).hexdigest()
        name = layout.part_file(family, part, sha256)
        files.write_atomically(self.folder / name, content)
        return FileEntry(file=name, rows=len(rows), file_bytes=len(content), sha256=sha256)

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

    def _commit(
        self,
        part: int,
        records: PartRecords,
        entries: Mapping[str, FileEntry],
        columns: Mapping[str, Sequence[Columns]],
    ) -> Commit:
        errors = {family: family_errors(family, rows) for family, rows in columns.items()}
        num_rows = {}
        if records.response is not None:
            num_rows["response"] = sum(rows.num_rows for rows in records.response)
        if records.visual is not None:
            num_rows["visual"] = sum(rows.num_rows for rows in records.visual.values())
        return Commit(
            format_version=FORMAT_VERSION,
            cache_sha256=self._cache_sha256,
            part=part,
            num_samples=len(records.tokens),
            num_images=len({image.key for record in records.tokens for image in record.images}),
            num_rows=num_rows,
            families=dict(entries),
            errors=tuple(
                ErrorEntry(sample_id=_encodable(error.sample_id), reason=_encodable(error.reason))
                for error in records.errors
            ),
            errors_by_family={family: summary(family, each) for family, each in errors.items() if each},
            head=self._head if records.hidden is not None else None,
        )

    def _refuse_duplicates(self, commits: Sequence[Commit]) -> None:
        holders: dict[str, int] = {}
        for commit in commits:
            path = self.folder / commit.families["tokens"].file
            for sample_id in pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist():
                if sample_id in holders:
                    raise CacheError(
                        f"{self.folder}: parts {holders[sample_id]} and {commit.part} both hold sample "
                        f"{sample_id!r}; sample ids must be unique in the plan"
                    )
                holders[sample_id] = commit.part


def part_columns(records: PartRecords, description: Description) -> Mapping[str, Sequence[Columns]]:
    """The Parquet rows of each family. Images are written in the order of the samples."""
    identity = description.identity
    keys = list(dict.fromkeys(image.key for record in records.tokens for image in record.images))
    families: dict[str, Sequence[Columns]] = {"tokens": [tokens_columns(record) for record in records.tokens]}
    if records.response is not None:
        settings = {"vocab_size": identity.vocab_size, "tau": stored_tau(identity, "response")}
        families["response"] = [
            {"sample_id": record.sample_id, **rows_columns(rows, **settings)}
            for record, rows in zip(records.tokens, records.response, strict=True)
        ]
    if records.visual is not None:
        settings = {"vocab_size": identity.vocab_size, "tau": stored_tau(identity, "visual")}
        visual = records.visual
        families["visual"] = [{"image_key": key, **rows_columns(visual[key], **settings)} for key in keys]
    if records.relation is not None:
        relation, section = records.relation, stored_relation(identity)
        families["relation"] = [{"image_key": key, **relation_columns(relation[key], section)} for key in keys]
    if records.sequence is not None:
        families["sequence"] = [
            {"sample_id": record.sample_id, **sequence_columns(sequence)}
            for record, sequence in zip(records.tokens, records.sequence, strict=True)
        ]
    if records.hidden is not None:
        hidden = stored_hidden(identity)
        families["hidden"] = [
            {"sample_id": record.sample_id, **hidden_columns(states, hidden)}
            for record, states in zip(records.tokens, records.hidden, strict=True)
        ]
    if records.images is not None:
        images = records.images
        shas = dict.fromkeys(image.sha256 for record in records.tokens for image in record.images)
        families["images"] = [image_columns(sha256, images[sha256]) for sha256 in shas]
    return families


def check_records(records: PartRecords, description: Description) -> None:
    """ValueError, naming the sample, unless a part's records agree with each other and with the identity."""
    for family in FAMILIES[1:]:
        if (getattr(records, family) is None) == (family in description.families):
            raise ValueError(f"{family}: records and cache must both have it or both lack it")
    ids = Counter(record.sample_id for record in records.tokens)
    ids.update(error.sample_id for error in records.errors)
    twice = [sample_id for sample_id, count in ids.items() if count > 1]
    if twice:
        raise ValueError(f"sample ids appear more than once in one part: {twice[:5]}")
    for record in records.tokens:
        _check_tokens(record, description.identity)
    _check_images(records)
    if records.response is not None:
        if len(records.response) != len(records.tokens):
            raise ValueError(f"{len(records.response)} responses for {len(records.tokens)} samples")
        for record, rows in zip(records.tokens, records.response, strict=True):
            if rows.num_rows != record.num_response_tokens or rows.label_logprob is None:
                raise ValueError(
                    f"sample {record.sample_id}: {rows.num_rows} response rows for "
                    f"{record.num_response_tokens} response tokens, each with a label logprob"
                )
    _check_hidden(records)
    if records.sequence is not None:
        if len(records.sequence) != len(records.tokens):
            raise ValueError(f"{len(records.sequence)} sequence logprobs for {len(records.tokens)} samples")
        for record, sequence in zip(records.tokens, records.sequence, strict=True):
            check_sequence(sequence, record)
        check_pairs(records.tokens)
    for rows in (records.visual or {}).values():
        if rows.label_logprob is not None:
            raise ValueError("visual rows have no label")


def _check_tokens(record: TokensRecord, identity: Identity) -> None:
    ids, mask, place = record.token_ids, record.response_mask, f"sample {record.sample_id}"
    if ids.dtype != np.int32 or mask.dtype != np.bool_ or ids.ndim != 1 or ids.shape != mask.shape:
        raise ValueError(
            f"{place}: token_ids {ids.dtype}{ids.shape} and response_mask {mask.dtype}{mask.shape} "
            "must be int32[t] and bool[t]"
        )
    try:
        check_token_ids(ids, identity)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    placeholders = int(np.count_nonzero(ids == identity.image_token_id))
    if placeholders != len(record.images):
        raise ValueError(f"{place}: {placeholders} image placeholders for {len(record.images)} images")


def _check_images(records: PartRecords) -> None:
    num_tokens: dict[str, int] = {}
    for record in records.tokens:
        for image in record.images:
            if num_tokens.setdefault(image.key, image.num_visual_tokens) != image.num_visual_tokens:
                raise ValueError(f"sample {record.sample_id}: image {image.path} has two visual token counts")
    _check_image_files(records)
    for family in ("visual", "relation"):
        signals = getattr(records, family)
        if signals is None:
            continue
        if signals.keys() != num_tokens.keys():
            missing, extra = num_tokens.keys() - signals.keys(), signals.keys() - num_tokens.keys()
            raise ValueError(f"{family}: {len(missing)} image keys are missing, {len(extra)} are unknown")
        for key, signal in signals.items():
            rows = signal.num_rows if family == "visual" else len(signal.values)
            if rows != num_tokens[key]:
                raise ValueError(f"{family}: image {key} has {rows} rows for {num_tokens[key]} visual tokens")


def _check_hidden(records: PartRecords) -> None:
    if records.hidden is None:
        return
    if len(records.hidden) != len(records.tokens):
        raise ValueError(f"{len(records.hidden)} hidden states for {len(records.tokens)} samples")
    for record, states in zip(records.tokens, records.hidden, strict=True):
        if states.ndim != 2 or len(states) != record.num_response_tokens:
            raise ValueError(
                f"sample {record.sample_id}: hidden states {states.shape} for "
                f"{record.num_response_tokens} response tokens"
            )


def _check_image_files(records: PartRecords) -> None:
    if records.images is None:
        return
    wanted = {image.sha256 for record in records.tokens for image in record.images}
    if records.images.keys() != wanted:
        missing, extra = wanted - records.images.keys(), records.images.keys() - wanted
        raise ValueError(f"images: {len(missing)} files are missing, {len(extra)} are unknown")
    for sha256, content in records.images.items():
        if hashlib.sha256(content).hexdigest() != sha256 or len(content) >= 1 << 31:
            raise ValueError(f"images: the {len(content)} bytes of {sha256} have another hash, or are 2 GiB or more")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
