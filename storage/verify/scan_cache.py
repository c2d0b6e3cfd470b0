"""A full scan of a cache: every checksum, bound, count and tail, every sample id once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from storage.backends.folder import Folder, open_folder
from storage.errors import CacheError
from storage.identity import Identity
from storage.layout import commits as layout
from storage.layout.documents import Commit, Manifest
from storage.layout.error_summaries import KINDS
from storage.layout.part_index import Part, join_parts
from storage.layout.processor_files import load_processor_files
from storage.layout.retries import find_retry_problems
from storage.layout.segments import Segment, merge_identities, read_segments
from storage.verify.scan_part import Advance, PartFindings, scan_part

Progress = Callable[[int, int], None]  # bytes of part files done, bytes in all

_MAX_SCANS = 8  # parts at once, each with one file in memory (part_scan.WHOLE_BYTES)


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
    report.problems += find_retry_problems(segments, commits)
    parts = join_parts(segments, commits)
    report.num_parts = len(parts)
    report.num_errors = sum(len(part.errors) for part in parts)
    _check_processor_files(folder, segments, report)
    width = _head_width(folder, segments, commits, report)
    bar = _Bytes(progress, sum(entry.file_bytes for part in parts for entry in part.families.values()))
    holders: dict[str, int] = {}
    for findings in _scans(folder, merge_identities(segments), parts, width, bar.advance):
        _add(report, findings, holders)
    _note_strangers(folder, segments, commits, report)
    return report


def _scans(
    folder: Folder, identity: Identity, parts: Sequence[Part], head_width: int | None, advance: Advance
) -> Iterator[PartFindings]:
    """What is found in each part, in order; a few are scanned at once."""
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_SCANS))
    try:
        yield from pool.map(
            lambda part: scan_part(folder, identity, part, head_width=head_width, advance=advance), parts
        )
    finally:  # of an interrupt too
        pool.shutdown(cancel_futures=True)


def _add(report: VerifyReport, findings: PartFindings, holders: dict[str, int]) -> None:
    """Add a part's findings to the report; `holders` maps each sample id seen so far to its part."""
    report.problems += findings.problems
    for sample_id in findings.sample_ids:
        if sample_id in holders:
            report.problems.append(
                f"part {findings.number}: sample {sample_id!r} is in part {holders[sample_id]} too; {layout.ADVICE}"
            )
        holders[sample_id] = findings.number
    report.num_samples += findings.num_samples
    report.num_images += findings.num_images
    for family, count in findings.num_rows.items():
        report.num_rows[family] = report.num_rows.get(family, 0) + count


class _Bytes:
    """How many bytes are read, over all threads."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        if progress:
            progress(0, total)

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._progress:
                self._progress(self._done, self._total)


def _scan_documents(folder: Folder, segment: Segment, report: VerifyReport) -> dict[int, Commit]:
    """A segment's good commits, by part, after they and the manifest were compared with each other."""
    manifest = _manifest(folder, segment, report)
    report.sealed &= manifest is not None
    commits = _commits(folder, segment, manifest, report)
    _compare_totals(folder, segment, manifest, commits, report)
    return {commit.part: commit for commit, _ in commits}


def _manifest(folder: Folder, segment: Segment, report: VerifyReport) -> Manifest | None:
    place = folder.locate(segment.manifest_file)
    try:
        manifest = layout.read_manifest(folder, segment)
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return None
    if manifest is None:
        whole = "the cache" if segment.number == 0 else f"segment {segment.number}"
        committed = len(layout.list_committed_parts(folder, segment))
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
    for part in sorted({*layout.list_committed_parts(folder, segment), *listed}):
        place = folder.locate(layout.commit_file(segment, part))
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
        report.problems.append(f"{folder.locate(segment.commits_folder)}: cannot be added up: {error}")
        return
    report.num_bytes += sum(count for family, count in total.bytes_by_family.items() if family != layout.HEAD_FOLDER)
    if manifest is not None and len(commits) == len(manifest.commits):
        for name in ("num_samples", "num_errors", "num_rows", "bytes_by_family", *KINDS, "head"):
            if getattr(manifest, name) != getattr(total, name):
                report.problems.append(
                    f"{folder.locate(segment.manifest_file)}: {name} is {getattr(manifest, name)}, "
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
        return layout.read_head(folder, entry, merge_identities(segments).vocab_size).width
    except (CacheError, OSError) as error:
        report.problems.append(str(error))
        return None


def _check_processor_files(folder: Folder, segments: Sequence[Segment], report: VerifyReport) -> None:
    for segment in segments:
        try:
            contents = load_processor_files(folder, segment.processor_files)
            report.num_bytes += sum(map(len, contents.values()))
        except CacheError as error:
            report.problems.append(str(error))


def _note_strangers(
    folder: Folder, segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]], report: VerifyReport
) -> None:
    named = {layout.SUMMARY_FILE}
    for segment in segments:
        named |= {segment.file, segment.manifest_file, *(entry.file for entry in segment.processor_files)}
        for part, commit in commits[segment.number].items():
            named |= {layout.commit_file(segment, part), *(entry.file for entry in commit.families.values())}
            named |= {commit.head.file} if commit.head is not None else set()
    report.notes += [f"{name}: belongs to no part" for name in folder.list_files(deep=True) if name not in named]
