"""A full scan of a cache: every checksum, bound, count and tail, every sample id once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from storage import commit as layout
from storage.coding_errors import summary
from storage.columns import (
    family_errors,
    hidden_states,
    image_content,
    relation_matrix,
    sequence_logprob,
    tokens_record,
)
from storage.distributions import RowFormat
from storage.documents import Commit, Manifest
from storage.errors import CacheError
from storage.files import Folder, open_folder
from storage.identity import stored_hidden, stored_relation
from storage.part_files import PartFiles
from storage.preference import check_pairs, check_sequence
from storage.reader import Part, join_parts
from storage.records import TokensRecord
from storage.relation import check_encoding
from storage.rows import check_sampled_total
from storage.segments import Segment, merged_identity, read_segments

Progress = Callable[[int, int], None]  # parts done, parts in all

_ROW_GROUPS_BYTES = 64 << 20  # each row group is read once, in order


@dataclass
class VerifyReport:
    """What a scan found. A cache is good if `problems` is empty."""

    sealed: bool = False  # every segment
    num_segments: int = 0
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

    An unsealed segment is a problem too: its samples may be good, but not all of them are there.
    """
    report = VerifyReport()
    try:
        folder = open_folder(path)
        segments = read_segments(folder)
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return report
    report.num_segments = len(segments)
    report.sealed = True
    commits = {segment.number: _scan_documents(folder, segment, report) for segment in segments}
    parts = join_parts(segments, commits)
    report.num_parts = len(parts)
    width = _head_width(folder, segments, commits, report)
    holders: dict[str, int] = {}
    for done, part in enumerate(parts):
        if progress:
            progress(done, len(parts))
        _PartScan(folder, segments, part, report, width).scan(holders)
    if progress:
        progress(len(parts), len(parts))
    _note_strangers(folder, segments, commits, report)
    return report


def _scan_documents(folder: Folder, segment: Segment, report: VerifyReport) -> dict[int, Commit]:
    """A segment's good commits, by part, after they and the manifest were compared with each other."""
    manifest = _manifest(folder, segment, report)
    report.sealed &= manifest is not None
    commits = _commits(folder, segment, manifest, report)
    _compare_totals(folder, segment, manifest, commits, report)
    return {commit.part: commit for commit, _ in commits}


def _manifest(folder: Folder, segment: Segment, report: VerifyReport) -> Manifest | None:
    place = folder.place(segment.manifest_file)
    try:
        manifest = layout.read_manifest(folder, segment)
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return None
    if manifest is None:
        whole = "the cache" if segment.number == 0 else f"segment {segment.number}"
        committed = len(layout.commit_numbers(folder, segment))
        report.problems.append(
            f"{place}: is missing: {whole} is not sealed, {committed} of {segment.num_parts} "
            "parts are committed; run the dump again"
        )
    elif len(manifest.commits) != segment.num_parts:
        report.problems.append(f"{place}: lists {len(manifest.commits)} parts, the plan has {segment.num_parts}")
    return manifest


def _commits(
    folder: Folder, segment: Segment, manifest: Manifest | None, report: VerifyReport
) -> list[tuple[Commit, str]]:
    listed = {} if manifest is None else dict(zip(segment.parts, manifest.commits, strict=False))
    commits = []
    for part in sorted({*layout.commit_numbers(folder, segment), *listed}):
        place = folder.place(layout.commit_file(segment, part))
        try:
            commit, sha256 = layout.read_commit(folder, segment, part)
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
    folder: Folder,
    segment: Segment,
    manifest: Manifest | None,
    commits: list[tuple[Commit, str]],
    report: VerifyReport,
) -> None:
    try:
        total = layout.make_manifest(segment, commits)
    except ValueError as error:  # counts that a commit may hold, but that add up to more than a manifest may
        report.problems.append(f"{folder.place(segment.commits_folder)}: cannot be added up: {error}")
        return
    report.num_errors += total.num_errors
    report.num_bytes += sum(count for family, count in total.bytes_by_family.items() if family != layout.HEAD_FOLDER)
    if manifest is not None and len(commits) == len(manifest.commits):
        for name in ("num_samples", "num_errors", "num_rows", "bytes_by_family", "errors_by_family", "head"):
            if getattr(manifest, name) != getattr(total, name):
                report.problems.append(
                    f"{folder.place(segment.manifest_file)}: {name} is {getattr(manifest, name)}, "
                    f"the commits say {getattr(total, name)}"
                )


def _head_width(
    folder: Folder, segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]], report: VerifyReport
) -> int | None:
    """The width of the output head, which must be whole and one for all segments; None without a good one."""
    every = [commit for of_segment in commits.values() for commit in of_segment.values()]
    try:
        entry = layout.check_one_head(every)
        if entry is None:
            return None
        report.num_bytes += entry.file_bytes
        return layout.read_head(folder, entry, merged_identity(segments).vocab_size).width
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return None


class _PartScan:
    """One part's scan, over the files of all segments. It keeps the counts that the commits are compared with."""

    def __init__(
        self, folder: Folder, segments: Sequence[Segment], part: Part, report: VerifyReport, head_width: int | None
    ) -> None:
        self.folder = folder
        self.identity = merged_identity(segments)
        self.part = part
        self.report = report
        self.files = PartFiles(folder, max_bytes=_ROW_GROUPS_BYTES, checksums=False)
        self.records: list[TokensRecord] = []
        self.num_rows = {family: 0 for commit in part.commits for family in commit.num_rows}
        self.head_width = head_width
        self.errors: dict[str, list[float]] = {"relation": [], "hidden": []}

    def scan(self, holders: dict[str, int]) -> None:
        """Report what is wrong with the part; `holders` maps each sample id seen so far to its part."""
        before, whole = len(self.report.problems), True
        for entry in self.part.families.values():
            whole &= self._try(lambda entry=entry: layout.check_file(self.folder, entry, content=True))
        if not whole:  # what cannot be trusted is not parsed
            return
        for row in range(self.part.families["tokens"].rows):
            self._try(lambda row=row: self._tokens(row), f"tokens row {row}")
        ids = [record.sample_id for record in self.records]
        for sample_id in [*ids, *(error.sample_id for error in self.part.commits[0].errors)]:
            if sample_id in holders:
                self._problem(f"sample {sample_id!r} is in part {holders[sample_id]} too")
            holders[sample_id] = self.part.number
        for family in ("response", "hidden", "sequence"):
            if family in self.part.families:
                self._samples(family)
        if "sequence" in self.part.families:
            self._try(lambda: check_pairs(self.records))
        images = {image.key: image.num_visual_tokens for record in self.records for image in record.images}
        for family in ("visual", "relation"):
            if family in self.part.families:
                self._images(family, images)
        if "images" in self.part.families:
            self._image_files()
        sound = len(self.report.problems) == before
        for commit in self.part.commits:
            if sound:
                self._try(lambda commit=commit: self._compare_errors(commit))
            counted = (len(self.records), len(images), {family: self.num_rows[family] for family in commit.num_rows})
            stated = (commit.num_samples, commit.num_images, commit.num_rows)
            if counted != stated:
                self._problem(f"holds (samples, images, rows) {counted}, its commit says {stated}")
        self.report.num_samples += len(self.records)
        self.report.num_images += len(images)
        for family, count in self.num_rows.items():
            self.report.num_rows[family] = self.report.num_rows.get(family, 0) + count

    def _tokens(self, row: int) -> None:
        record = tokens_record(*self.files.row("tokens", self.part.families["tokens"], row), self.identity)
        self.records.append(record)

    def _samples(self, family: str) -> None:
        entry = self.part.families[family]
        if entry.rows != len(self.records):
            self._problem(f"{entry.rows} {family} rows for {len(self.records)} samples")
            return
        scan = self._response_row if family == "response" else partial(self._sample_row, family)
        for row, record in enumerate(self.records):
            self._try(partial(scan, row, record), f"{family} row {row}")

    def _response_row(self, row: int, record: TokensRecord) -> None:
        sample_id, num_rows = self._distribution("response", row)
        if sample_id != record.sample_id:
            raise ValueError(f"is not of sample {record.sample_id!r}")
        if num_rows != record.num_response_tokens:
            raise ValueError(f"has {num_rows} rows for {record.num_response_tokens} tokens")

    def _sample_row(self, family: str, row: int, record: TokensRecord) -> None:
        table, at = self.files.row(family, self.part.families[family], row)
        if table["sample_id"][at].as_py() != record.sample_id:
            raise ValueError(f"is not of sample {record.sample_id!r}")
        if family == "sequence":
            check_sequence(sequence_logprob(table, at), record)
        else:
            states = hidden_states(table, at, stored_hidden(self.identity))
            if states.shape != (record.num_response_tokens, self.head_width or states.shape[1]):
                expected = (record.num_response_tokens, self.head_width)
                raise ValueError(f"is {states.shape}, response tokens and head have {expected}")
            self.errors["hidden"] += family_errors("hidden", [{"relative_error": table["relative_error"][at].as_py()}])

    def _image_files(self) -> None:
        unseen = {image.sha256 for record in self.records for image in record.images}
        for row in range(self.part.families["images"].rows):
            self._try(lambda row=row: self._image_file(row, unseen), f"images row {row}")
        if unseen:
            self._problem(f"images: {len(unseen)} images have no file, such as {next(iter(unseen))}")

    def _image_file(self, row: int, unseen: set[str]) -> None:
        table, at = self.files.row("images", self.part.families["images"], row)
        sha256 = table["sha256"][at].as_py()
        if sha256 not in unseen:
            raise ValueError(f"image {sha256} is of no sample, or appears twice")
        unseen.remove(sha256)
        image_content(table, at)

    def _compare_errors(self, commit: Commit) -> None:
        if commit.errors_by_family is None:
            return
        # What rounding probabilities cost was measured against numbers that are nowhere any more.
        stated = {family: each for family, each in commit.errors_by_family.items() if family in self.errors}
        counted = {
            family: summary(family, errors)
            for family, errors in self.errors.items()
            if errors and family in commit.families
        }
        if counted != stated:
            self._problem(f"its encodings' errors are {counted}, its commit says {stated}")

    def _images(self, family: str, images: dict[str, int]) -> None:
        unseen = dict(images)
        for row in range(self.part.families[family].rows):
            self._try(lambda row=row: self._image_row(family, row, unseen), f"{family} row {row}")
        if unseen:
            self._problem(f"{family}: {len(unseen)} images have no rows, such as {next(iter(unseen))}")

    def _image_row(self, family: str, row: int, unseen: dict[str, int]) -> None:
        if family == "visual":
            key, num_rows = self._distribution("visual", row)
            if num_rows != self._expected(key, unseen):
                raise ValueError(f"has {num_rows} rows, not as many as image {key} has visual tokens")
        else:
            table, at = self.files.row(family, self.part.families[family], row)
            expected = self._expected(table["image_key"][at].as_py(), unseen)
            check_encoding(relation_matrix(table, at, expected), stored_relation(self.identity))
            self.errors["relation"] += family_errors("relation", [{"payload": table["payload"][at].as_buffer()}])

    @staticmethod
    def _expected(key: str, unseen: dict[str, int]) -> int:
        if key not in unseen:
            raise ValueError(f"image {key} is of no sample, or appears twice")
        return unseen.pop(key)

    def _distribution(self, family: str, row: int) -> tuple[str, int]:
        """The key and the number of rows of a Parquet row, whose rows are found to be good."""
        kept = RowFormat.of(self.identity, family)
        key, rows = self.files.sparse_rows(family, self.part.families[family], row, kept)
        rows.validate(kept.vocab_size)
        check_sampled_total(rows, kept.tau)
        self.num_rows[family] += rows.num_rows
        return key, rows.num_rows

    def _try(self, step: Callable[[], None], place: str = "") -> bool:
        try:
            step()
        except (CacheError, ValueError) as error:
            self._problem(f"{place}: {error}" if place else str(error))
            return False
        return True

    def _problem(self, text: str) -> None:
        self.report.problems.append(f"part {self.part.number}: {text}")


def _note_strangers(
    folder: Folder, segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]], report: VerifyReport
) -> None:
    named = set()
    for segment in segments:
        named |= {segment.file, segment.manifest_file}
        for part, commit in commits[segment.number].items():
            named |= {layout.commit_file(segment, part), *(entry.file for entry in commit.families.values())}
            named |= {commit.head.file} if commit.head is not None else set()
    report.notes += [f"{name}: belongs to no part" for name in folder.names(deep=True) if name not in named]
