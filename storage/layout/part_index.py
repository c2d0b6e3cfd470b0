"""Joins the committed parts of a cache over its segments, and finds the families that all parts have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.backends.folder import Folder
from storage.encoding.parquet_schema import FAMILIES
from storage.errors import CorruptPartError
from storage.layout import commits as layout
from storage.layout.documents import Commit, ErrorEntry, ErrorSummary, FileEntry
from storage.layout.error_summaries import merge_summaries
from storage.layout.retries import select_remaining_errors
from storage.layout.segments import Segment, select_additions, select_tokens_segments


@dataclass(frozen=True)
class Part:
    """A committed part with its files from all segments."""

    number: int
    commits: tuple[Commit, ...]  # of the segment that holds its tokens first, then of those that add families
    families: Mapping[str, FileEntry]
    errors: tuple[ErrorEntry, ...] = ()  # of its samples, without those that a later retry holds


def join_parts(segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]]) -> list[Part]:
    """Returns the parts that have tokens, by number. `commits`: by segment number and part number."""
    parts, left = [], select_remaining_errors(segments, commits)
    for base in select_tokens_segments(segments):
        adding = [commits[segment.number] for segment in select_additions(segments, base)]
        for number, commit in sorted(commits[base.number].items()):
            of_part = (commit, *(added[number] for added in adding if number in added))
            families = {name: one for each in of_part for name, one in each.families.items()}
            parts.append(Part(number, of_part, families, left[base.number][number]))
    return parts


def merge_stated_summaries(commits: Sequence[Commit], kind: str) -> dict[str, ErrorSummary]:
    """Merges one kind of error summary by family; leaves out families of commits that state none."""
    silent = {family for commit in commits if getattr(commit, kind) is None for family in commit.families}
    stated = merge_summaries([commit for commit in commits if getattr(commit, kind) is not None], kind) or {}
    return {family: errors for family, errors in stated.items() if family not in silent}


def select_common_families(segments: Sequence[Segment], parts: Sequence[Part]) -> tuple[str, ...]:
    """Returns the families that every part has, tokens first; without parts, those of the first segment."""
    begun = {"tokens", *segments[0].families}
    return tuple(
        family for family in FAMILIES if all(family in part.families for part in parts) and (parts or family in begun)
    )


def read_parts(folder: Folder, segments: Sequence[Segment]) -> tuple[list[Part], set[int]]:
    """Returns the committed parts and the numbers of the sealed segments. Errors: CorruptPartError."""
    commits: dict[int, dict[int, Commit]] = {}
    sealed: set[int] = set()
    for segment in segments:
        manifest = layout.read_manifest(folder, segment)
        if manifest is not None:
            sealed.add(segment.number)
        listed = None if manifest is None else [entry.sha256 for entry in manifest.commits]
        commits[segment.number] = _read_commits(folder, segment, listed)
    return join_parts(segments, commits), sealed


def _read_commits(folder: Folder, segment: Segment, listed: Sequence[str] | None) -> dict[int, Commit]:
    """Reads a segment's commits by part: those that the manifest lists (by hash), or all if unsealed."""
    numbers = layout.list_committed_parts(folder, segment) if listed is None else segment.parts[: len(listed)]
    try:
        found = layout.read_commits(folder, segment, list(numbers))
    except FileNotFoundError as error:
        there = layout.list_committed_parts(folder, segment)
        gone = next((part for part in numbers if part not in there), segment.first_part)
        place = folder.locate(layout.commit_file(segment, gone))
        raise CorruptPartError(f"{place}: is missing, but the manifest names it; run the dump again") from error
    for (commit, sha256), stated in zip(found, listed or (), strict=listed is not None):
        if sha256 != stated:
            place = folder.locate(layout.commit_file(segment, commit.part))
            raise CorruptPartError(f"{place}: sha256 is {sha256}, the manifest says {stated}; run the dump again")
    return {commit.part: commit for commit, _ in found}


def explain_missing_family(
    folder: Folder, segments: Sequence[Segment], parts: Sequence[Part], stored: Sequence[str], family: str
) -> str:
    """Returns a message that says which parts lack a family and what to do."""
    text = f"{folder}: holds {', '.join(stored)}, not {family}"
    parts_without = [part.number for part in parts if family not in part.families]
    if family not in FAMILIES or not parts_without or len(parts_without) == len(parts):
        return f"{text}; dump that family first"
    bases = [one for one in select_tokens_segments(segments) if any(part in one.parts for part in parts_without)]
    reasons = []
    for base in bases:
        adding = next((one for one in select_additions(segments, base) if family in one.families), None)
        what = "was dumped without it" if adding is None else f"gets it from segment {adding.number}, not finished"
        reasons.append(f"segment {base.number} (parts {base.parts.start} to {base.parts.stop - 1}) {what}")
    return (
        f"{text}, of all parts: {len(parts_without)} of {len(parts)} lack it, part {parts_without[0]} first; "
        f"{'; '.join(reasons)}; "
        f"run the dump over the samples of segment {bases[0].number} with {family} in cache.families"
    )
