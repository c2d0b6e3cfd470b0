"""Keeps sample ids unique: one id, one record, in whichever segment and however often a dump is run or retried."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from storage.backends.folder import Folder
from storage.errors import CacheError
from storage.layout import commits as layout
from storage.layout.documents import Commit
from storage.layout.retries import collect_retried_ids
from storage.layout.segments import Segment, read_segments, select_tokens_segments
from storage.reader.row_group_cache import RowGroupCache
from storage.records.records import PartRecords, SampleError, reorder


class UniqueIds:
    """Checks the ids of one segment's parts against those of all other segments."""

    def __init__(self, folder: Folder, segment: Segment, row_groups: RowGroupCache) -> None:
        self._folder = folder
        self._segment = segment
        self._row_groups = row_groups
        self._part_of_sample: dict[str, int] | None = None
        self._retried: frozenset[str] = frozenset()  # read together with _part_of_sample

    def check_part(self, part: int, records: PartRecords) -> PartRecords:
        """Returns the records of a part of the plan, without samples that a later segment retried.

        Errors: ValueError for a part of a retry with other samples than it was planned with; CacheError if
        another segment has one of the samples.
        """
        known = self._load_known_ids()
        records = self._drop_retried(records)
        ids = [record.sample_id for record in (*records.tokens, *records.errors)]
        self._check_retried(part, ids)
        refuse_known_ids(self._folder, known, ids)
        return records

    def check_commits(self, commits: Sequence[Commit]) -> None:
        """Raises CacheError if two parts hold one sample; `commits` are all of the segment's."""
        self._part_of_sample = None  # read again: other dumps may have committed since
        holders = dict(self._load_known_ids())
        for commit in commits:
            for sample_id in _read_sample_ids(commit, self._row_groups):
                if sample_id in holders:
                    raise CacheError(
                        f"{self._folder}: parts {holders[sample_id]} and {commit.part} both hold sample "
                        f"{sample_id!r}; sample ids must be unique in the plan"
                    )
                holders[sample_id] = commit.part

    def _load_known_ids(self) -> dict[str, int]:
        """Returns the part of each sample in the other segments, as committed at the first call.

        Leaves out the errors that this segment retries and those that later segments retried for it: these
        ids may also occur in this segment.
        """
        if self._part_of_sample is None:
            segments = read_segments(self._folder)
            others = [segment for segment in segments if segment.number != self._segment.number]
            self._part_of_sample = map_samples_to_parts(self._folder, others, self._row_groups)
            self._retried = collect_retried_ids(segments, self._segment)
            for sample_id in (*self._retried, *(sample_id for ids in self._segment.failed_ids for sample_id in ids)):
                self._part_of_sample.pop(sample_id, None)
        return self._part_of_sample

    def _drop_retried(self, records: PartRecords) -> PartRecords:
        """Returns the records of a part without samples that a later segment retried; they remain errors."""
        places = [place for place, record in enumerate(records.tokens) if record.sample_id not in self._retried]
        if len(places) == len(records.tokens):
            return records
        again = sorted({record.sample_id for record in records.tokens} & self._retried)
        errors = [*records.errors, *(SampleError(sample_id, "is in a later segment") for sample_id in again)]
        return replace(reorder(records, places), errors=errors)

    def _check_retried(self, part: int, ids: Sequence[str]) -> None:
        """Raises ValueError unless a retry's part has a record or an error for each of its samples."""
        if self._segment.retries is None:
            return
        failed = self._segment.failed_ids
        of_others = {sample_id for number, of_part in enumerate(failed) if number != part for sample_id in of_part}
        strange = sorted(of_others.intersection(ids))
        if strange or len(ids) < len(failed[part]):
            raise ValueError(
                f"part {part} of a retry has {len(ids)} records and errors for {len(failed[part])} failed samples"
                + (f"; {strange[:5]} belong to other parts" if strange else "")
            )


def map_samples_to_parts(folder: Folder, segments: Sequence[Segment], row_groups: RowGroupCache) -> dict[str, int]:
    """Returns the part of each committed sample of some segments, both records and errors."""
    holders: dict[str, int] = {}
    for segment in select_tokens_segments(segments):
        for commit, _ in layout.read_commits(folder, segment, layout.list_committed_parts(folder, segment)):
            ids = [*_read_sample_ids(commit, row_groups), *(error.sample_id for error in commit.errors)]
            holders |= dict.fromkeys(ids, commit.part)
    return holders


def refuse_known_ids(folder: Folder, known: Mapping[str, int], sample_ids: Collection[str]) -> None:
    """Raises CacheError if a sample to append is in the cache already."""
    twice = [sample_id for sample_id in sample_ids if sample_id in known]
    if twice:
        shown = ", ".join(map(repr, twice[:5])) + (", …" if len(twice) > 5 else "")
        raise CacheError(
            f"{folder}: {len(twice)} of the samples to append are in the cache already: {shown}; "
            f"{twice[0]!r} is in part {known[twice[0]]}; give only new samples in data.sources (--retry-errors "
            "dumps failed samples again, with the same data.sources as before)"
        )


def _read_sample_ids(commit: Commit, row_groups: RowGroupCache) -> list[str]:
    return row_groups.read_columns("tokens", commit.families["tokens"], ["sample_id"])["sample_id"].to_pylist()
