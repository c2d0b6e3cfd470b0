"""Retries: segments that dump failed samples of another segment again, and the errors that remain.

A retry's document lists the failed sample ids of each of its parts. Once such a part is committed, its
records and errors replace the earlier errors of these samples. See FORMAT.md, "Segments".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from storage.backends.folder import Folder
from storage.errors import CacheError
from storage.identity import FORMAT_VERSION, Identity
from storage.layout import commits as layout
from storage.layout.documents import Commit, ErrorEntry, SegmentDescription
from storage.layout.segments import (
    NewSegment,
    Segment,
    describe_disagreements,
    is_committed,
    make_refusal,
    read_segments,
    select_additions,
)

FailedIds = Sequence[Sequence[str]]  # sample ids of errors, by part of the retry


def select_retries(segments: Sequence[Segment], base: Segment) -> list[Segment]:
    """Returns the segments that retry failed samples of `base`, oldest first."""
    return [segment for segment in segments if segment.retries == base.number]


def collect_retried_ids(segments: Sequence[Segment], segment: Segment) -> frozenset[str]:
    """Returns the ids of a segment's errors that later segments retry."""
    base = segment.number if segment.retries is None else segment.retries
    later = [one for one in segments[segment.number + 1 :] if one.retries == base]
    return frozenset(sample_id for one in later for ids in one.failed_ids for sample_id in ids)


def list_families_of_parts(segments: Sequence[Segment], base: Segment) -> tuple[str, ...]:
    """Returns the families, besides tokens, that a segment's parts have or will get."""
    return tuple(family for one in (base, *select_additions(segments, base)) for family in one.families)


def read_contents(
    folder: Folder, segments: Sequence[Segment], base: Segment
) -> tuple[int, list[tuple[ErrorEntry, ...]]]:
    """Returns the number of samples in a segment and its retries, and the remaining errors of each part."""
    own = [base, *select_retries(segments, base)]
    commits = {one.number: _read_commits_by_part(folder, one) for one in own}
    left = select_remaining_errors(own, commits)
    num_samples = sum(commit.num_samples for of_segment in commits.values() for commit in of_segment.values())
    return num_samples, [errors for one in own for _, errors in sorted(left[one.number].items()) if errors]


def _read_commits_by_part(folder: Folder, segment: Segment) -> dict[int, Commit]:
    commits = layout.read_commits(folder, segment, layout.list_committed_parts(folder, segment))
    return {commit.part: commit for commit, _ in commits}


def find_or_begin_retry(
    folder: Folder, identity: Identity, base: int, failed_ids: FailedIds
) -> tuple[Segment, list[Segment]]:
    """Returns the unfinished retry of segment `base`, or creates one; and all existing segments.

    Errors: CacheError for an id that is not (or no longer) an error of `base` or its retries; IdentityError.
    """
    while True:
        segments = read_segments(folder)
        found = next((one for one in select_retries(segments, segments[base]) if not is_committed(folder, one)), None)
        if found is not None:
            return found, segments
        if not is_committed(folder, segments[base]):
            raise CacheError(f"{folder}: segment {base} lacks parts; finish its dump before its failed samples")
        lines = describe_disagreements(
            segments, identity, list_families_of_parts(segments, segments[base]), plan_of=None
        )
        if lines:
            raise make_refusal(folder, lines, "")
        _, failed = read_contents(folder, segments, segments[base])
        known = {error.sample_id for errors in failed for error in errors}
        strange = [sample_id for ids in failed_ids for sample_id in ids if sample_id not in known]
        if strange or not failed_ids or not all(failed_ids):
            shown = ", ".join(map(repr, strange[:5])) or "a part without samples"
            raise CacheError(f"{folder}: {shown}: expected failed samples of segment {base}; run the dump again")
        new = _new_retry(segments, segments[base], identity, failed_ids)
        folder.make_folders([new.file.rpartition("/")[0]])
        folder.create(new.file, new.document.to_bytes())  # False if another writer created it first: find that


def _new_retry(segments: Sequence[Segment], base: Segment, identity: Identity, failed_ids: FailedIds) -> NewSegment:
    """Makes the segment that retries errors of `base`, with all families of the parts of `base`.

    `identity` is that of a dump over the plan of `base`.
    """
    number, families = len(segments), list_families_of_parts(segments, base)
    selection = {name: identity.selection[name] for name in ("tokens", *families) if name in identity.selection}
    document = SegmentDescription(
        format_version=FORMAT_VERSION,
        cache_sha256=segments[0].sha256,
        segment=number,
        first_part=max(segment.parts.stop for segment in segments),
        families=families,
        identity=identity.model_copy(
            update={"selection": selection, **make_retry_fields(number, failed_ids)},
        ),
        retries=base.number,
        failed_ids=tuple(map(tuple, failed_ids)),
    )
    return NewSegment(number, families, None, document)


def make_retry_fields(number: int, failed_ids: FailedIds) -> dict[str, str | int]:
    """Returns the plan fields of a retry's identity, for segment `number` with these ids in its parts."""
    text = json.dumps([number, [list(ids) for ids in failed_ids]], ensure_ascii=True)
    fingerprint = hashlib.sha256(f"stillhouse retry 1\0{text}".encode()).hexdigest()
    return {"plan_fingerprint": fingerprint, "num_parts": len(failed_ids)}


def select_remaining_errors(
    segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]]
) -> dict[int, dict[int, tuple[ErrorEntry, ...]]]:
    """Returns the remaining errors by segment and part: those that no committed later retry replaced."""
    last_retry = {sample_id: number for number, ids in _list_retried_ids(segments, commits) for sample_id in ids}
    return {
        number: {
            part: tuple(error for error in commit.errors if last_retry.get(error.sample_id, -1) <= number)
            for part, commit in of_segment.items()
        }
        for number, of_segment in commits.items()
    }


def find_retry_problems(segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]]) -> Iterator[str]:
    """Yields a line for each problem of a cache's retries: lost samples, or samples retried twice."""
    for retry in segments:
        if retry.retries is None:
            continue
        if {name: getattr(retry.identity, name) for name in make_retry_fields(0, ())} != make_retry_fields(
            retry.number, retry.failed_ids
        ):
            yield f"{retry.file}: its plan_fingerprint is not that of its failed_ids"
        earlier = [one for one in segments[: retry.number] if retry.retries in (one.number, one.retries)]
        before = {one.number: commits[one.number] for one in segments[: retry.number]}
        left = select_remaining_errors(segments[: retry.number], before)
        known = {error.sample_id for one in earlier for errors in left[one.number].values() for error in errors}
        for part, ids in zip(retry.parts, retry.failed_ids, strict=True):
            strange = [sample_id for sample_id in ids if sample_id not in known]
            # A part of the base whose commit is broken is reported by itself, and its errors are not known.
            if strange and all(len(commits[one.number]) == one.num_parts for one in earlier):
                yield f"{retry.file}: part {part} retries {strange[0]!r}, which is no error of segment {retry.retries}"
            commit = commits[retry.number].get(part)
            if commit is not None and commit.num_samples + len(commit.errors) < len(ids):
                yield (
                    f"part {part}: holds {commit.num_samples} samples and {len(commit.errors)} errors "
                    f"for {len(ids)} that had failed"
                )


def _list_retried_ids(
    segments: Sequence[Segment], commits: Mapping[int, Mapping[int, Commit]]
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yields (segment number, sample ids) for every committed part of a retry, in order."""
    for segment in segments:
        for part, ids in zip(segment.parts, segment.failed_ids, strict=False):
            if part in commits[segment.number]:
                yield segment.number, ids
