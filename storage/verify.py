"""A full scan of a cache: every checksum, bound, count and tail, every sample id once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from storage import commit as layout
from storage import files
from storage.codec import check_sampled_total
from storage.coding_errors import summary
from storage.columns import (
    family_errors,
    hidden_states,
    image_content,
    relation_matrix,
    sequence_logprob,
    sparse_rows,
    tokens_record,
)
from storage.documents import Commit, Description, Manifest
from storage.errors import CacheError, CorruptPartError
from storage.head import decode_head
from storage.identity import stored_hidden, stored_relation, stored_tau
from storage.part_files import PartFiles
from storage.preference import check_pairs, check_sequence
from storage.records import TokensRecord
from storage.relation import check_encoding

Progress = Callable[[int, int], None]  # parts done, parts in all

_ROW_GROUPS_BYTES = 64 << 20  # each row group is read once, in order


@dataclass
class VerifyReport:
    """What a scan found. A cache is good if `problems` is empty."""

    sealed: bool = False
    num_parts: int = 0
    num_samples: int = 0
    num_images: int = 0
    num_errors: int = 0  # samples that the dump could not do, which is no problem of the cache
    num_rows: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # files that belong to no part, and harm nothing

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Scan a whole cache and report everything wrong with it; a broken cache raises nothing.

    An unsealed cache is a problem too: its samples may be good, but not all of them are there.
    """
    report = VerifyReport()
    try:
        folder = files.local_folder(path)
        description, cache_sha256 = layout.read_description(folder)
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return report
    manifest = _manifest(folder, description, cache_sha256, report)
    commits = _commits(folder, description, cache_sha256, manifest, report)
    _compare_totals(folder, manifest, cache_sha256, commits, report)
    width = _head_width(folder, description, [commit for commit, _ in commits], report)
    holders: dict[str, int] = {}
    for done, (commit, _) in enumerate(commits):
        if progress:
            progress(done, len(commits))
        _Part(folder, description, commit, report, width).scan(holders)
    if progress:
        progress(len(commits), len(commits))
    _note_strangers(folder, [commit for commit, _ in commits], report)
    return report


def _manifest(folder: Path, description: Description, cache_sha256: str, report: VerifyReport) -> Manifest | None:
    try:
        manifest = layout.read_manifest(folder, cache_sha256)
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return None
    report.sealed = manifest is not None
    total = description.identity.num_parts
    if manifest is None:
        committed = len(layout.commit_numbers(folder))
        report.problems.append(
            f"{folder / layout.MANIFEST_FILE}: is missing: the cache is not sealed, {committed} of {total} "
            "parts are committed; run the dump again"
        )
    elif len(manifest.commits) != total:
        report.problems.append(
            f"{folder / layout.MANIFEST_FILE}: lists {len(manifest.commits)} parts, the plan has {total}"
        )
    return manifest


def _commits(
    folder: Path, description: Description, cache_sha256: str, manifest: Manifest | None, report: VerifyReport
) -> list[tuple[Commit, str]]:
    listed = {} if manifest is None else dict(enumerate(manifest.commits))
    commits = []
    for part in sorted({*layout.commit_numbers(folder), *listed}):
        place = folder / layout.commit_file(part)
        try:
            commit, sha256 = layout.read_commit(folder, part, description, cache_sha256)
        except FileNotFoundError:
            report.problems.append(f"{place}: is missing, but the manifest names it; run the dump again")
        except (CacheError, OSError) as error:
            report.problems.append(str(error))
        else:
            commits.append((commit, sha256))
            if manifest is not None and (part not in listed or listed[part].sha256 != sha256):
                stated = listed[part].sha256 if part in listed else "nothing of it"
                report.problems.append(f"{place}: sha256 is {sha256}, the manifest says {stated}")
    return commits


def _compare_totals(
    folder: Path,
    manifest: Manifest | None,
    cache_sha256: str,
    commits: list[tuple[Commit, str]],
    report: VerifyReport,
) -> None:
    report.num_parts = len(commits)
    try:
        total = layout.make_manifest(cache_sha256, commits)
    except ValueError as error:  # counts that a commit may hold, but that add up to more than a manifest may
        report.problems.append(f"{folder / layout.COMMITS_FOLDER}: cannot be added up: {error}")
        return
    report.num_errors = total.num_errors
    report.num_bytes = sum(total.bytes_by_family.values())
    if manifest is not None and len(commits) == len(manifest.commits):
        for name in ("num_samples", "num_errors", "num_rows", "bytes_by_family", "errors_by_family", "head"):
            if getattr(manifest, name) != getattr(total, name):
                report.problems.append(
                    f"{folder / layout.MANIFEST_FILE}: {name} is {getattr(manifest, name)}, "
                    f"the commits say {getattr(total, name)}"
                )


def _head_width(folder: Path, description: Description, commits: list[Commit], report: VerifyReport) -> int | None:
    """The width of the output head, which must be whole and of all parts; None without a good one."""
    entry = commits[0].head if commits else None
    if entry is None:
        return None
    try:
        layout.check_one_head(commits)
        layout.check_file(folder, entry, content=True)
        head = decode_head(files.read_bytes(folder / entry.file))
        if head.vocab_size != description.identity.vocab_size:
            raise CorruptPartError(
                f"has {head.vocab_size} tokens, not the vocabulary's {description.identity.vocab_size}"
            )
    except (CacheError, OSError) as error:
        report.problems.append(f"{folder / entry.file}: {error}")
        return None
    return head.width


class _Part:
    """One part's scan. It keeps the counts that the commit is compared with."""

    def __init__(
        self, folder: Path, description: Description, commit: Commit, report: VerifyReport, head_width: int | None
    ) -> None:
        self.folder = folder
        self.identity = description.identity
        self.families = description.families
        self.commit = commit
        self.report = report
        self.files = PartFiles(folder, max_bytes=_ROW_GROUPS_BYTES, checksums=False)
        self.records: list[TokensRecord] = []
        self.num_rows = dict.fromkeys(commit.num_rows, 0)
        self.head_width = head_width
        self.errors: dict[str, list[float]] = {"relation": [], "hidden": []}

    def scan(self, holders: dict[str, int]) -> None:
        """Report what is wrong with the part; `holders` maps each sample id seen so far to its part."""
        before, whole = len(self.report.problems), True
        for entry in self.commit.families.values():
            whole &= self._try(lambda entry=entry: layout.check_file(self.folder, entry, content=True))
        if not whole:  # what cannot be trusted is not parsed
            return
        for row in range(self.commit.families["tokens"].rows):
            self._try(lambda row=row: self._tokens(row), f"tokens row {row}")
        ids = [record.sample_id for record in self.records]
        for sample_id in [*ids, *(error.sample_id for error in self.commit.errors)]:
            if sample_id in holders:
                self._problem(f"sample {sample_id!r} is in part {holders[sample_id]} too")
            holders[sample_id] = self.commit.part
        for family in ("response", "hidden", "sequence"):
            if family in self.families:
                self._samples(family)
        if "sequence" in self.families:
            self._try(lambda: check_pairs(self.records))
        images = {image.key: image.num_visual_tokens for record in self.records for image in record.images}
        for family in ("visual", "relation"):
            if family in self.families:
                self._images(family, images)
        if "images" in self.families:
            self._image_files()
        if len(self.report.problems) == before:
            self._try(self._compare_errors)
        counted = (len(self.records), len(images), self.num_rows)
        stated = (self.commit.num_samples, self.commit.num_images, self.commit.num_rows)
        if counted != stated:
            self._problem(f"holds (samples, images, rows) {counted}, its commit says {stated}")
        self.report.num_samples += len(self.records)
        self.report.num_images += len(images)
        for family, count in self.num_rows.items():
            self.report.num_rows[family] = self.report.num_rows.get(family, 0) + count

    def _tokens(self, row: int) -> None:
        record = tokens_record(*self.files.row("tokens", self.commit.families["tokens"], row), self.identity)
        self.records.append(record)

    def _samples(self, family: str) -> None:
        entry = self.commit.families[family]
        if entry.rows != len(self.records):
            self._problem(f"{entry.rows} {family} rows for {len(self.records)} samples")
            return
        for row, record in enumerate(self.records):
            self._try(lambda row=row, record=record: self._sample_row(family, row, record), f"{family} row {row}")

    def _sample_row(self, family: str, row: int, record: TokensRecord) -> None:
        table, at = self.files.row(family, self.commit.families[family], row)
        if table["sample_id"][at].as_py() != record.sample_id:
            raise ValueError(f"is not of sample {record.sample_id!r}")
        if family == "response":
            self._distribution("response", table, at, record.num_response_tokens)
        elif family == "sequence":
            check_sequence(sequence_logprob(table, at), record)
        else:
            states = hidden_states(table, at, stored_hidden(self.identity))
            if states.shape != (record.num_response_tokens, self.head_width or states.shape[1]):
                expected = (record.num_response_tokens, self.head_width)
                raise ValueError(f"is {states.shape}, response tokens and head have {expected}")
            self.errors["hidden"] += family_errors("hidden", [{"relative_error": table["relative_error"][at].as_py()}])

    def _image_files(self) -> None:
        unseen = {image.sha256 for record in self.records for image in record.images}
        for row in range(self.commit.families["images"].rows):
            self._try(lambda row=row: self._image_file(row, unseen), f"images row {row}")
        if unseen:
            self._problem(f"images: {len(unseen)} images have no file, such as {next(iter(unseen))}")

    def _image_file(self, row: int, unseen: set[str]) -> None:
        table, at = self.files.row("images", self.commit.families["images"], row)
        sha256 = table["sha256"][at].as_py()
        if sha256 not in unseen:
            raise ValueError(f"image {sha256} is of no sample, or appears twice")
        unseen.remove(sha256)
        image_content(table, at)

    def _compare_errors(self) -> None:
        stated = self.commit.errors_by_family
        if stated is None:
            return
        counted = {family: summary(family, errors) for family, errors in self.errors.items() if errors}
        if counted != stated:
            self._problem(f"its encodings' errors are {counted}, its commit says {stated}")

    def _images(self, family: str, images: dict[str, int]) -> None:
        unseen = dict(images)
        for row in range(self.commit.families[family].rows):
            self._try(lambda row=row: self._image_row(family, row, unseen), f"{family} row {row}")
        if unseen:
            self._problem(f"{family}: {len(unseen)} images have no rows, such as {next(iter(unseen))}")

    def _image_row(self, family: str, row: int, unseen: dict[str, int]) -> None:
        table, at = self.files.row(family, self.commit.families[family], row)
        key = table["image_key"][at].as_py()
        if key not in unseen:
            raise ValueError(f"image {key} is of no sample, or appears twice")
        expected = unseen.pop(key)
        if family == "visual":
            self._distribution("visual", table, at, expected)
        else:
            check_encoding(relation_matrix(table, at, expected), stored_relation(self.identity))
            self.errors["relation"] += family_errors("relation", [{"payload": table["payload"][at].as_buffer()}])

    def _distribution(self, family: str, table, at: int, expected: int) -> None:
        rows = sparse_rows(table, at, vocab_size=self.identity.vocab_size)
        rows.validate(self.identity.vocab_size)
        check_sampled_total(rows, stored_tau(self.identity, family))
        if rows.num_rows != expected:
            raise ValueError(f"has {rows.num_rows} rows for {expected} tokens")
        self.num_rows[family] += rows.num_rows

    def _try(self, step: Callable[[], None], place: str = "") -> bool:
        try:
            step()
        except (CacheError, ValueError) as error:
            self._problem(f"{place}: {error}" if place else str(error))
            return False
        return True

    def _problem(self, text: str) -> None:
        self.report.problems.append(f"part {self.commit.part}: {text}")


def _note_strangers(folder: Path, commits: list[Commit], report: VerifyReport) -> None:
    named = {layout.CACHE_FILE, layout.MANIFEST_FILE}
    for commit in commits:
        named |= {layout.commit_file(commit.part), *(entry.file for entry in commit.families.values())}
        named |= {commit.head.file} if commit.head is not None else set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in named:
            report.notes.append(f"{name}: belongs to no part")
