"""The plan that a cache was begun with, found again although rows that could not be read then can be read now.

A row that is broken, or whose image is missing, is an error of the plan; once it is mended, it is a sample, and the
same sources give another plan. The cache names its errors, so the plan of then is made again, and its hash proves it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence

from storage import commit as layout
from storage.documents import ErrorEntry
from storage.files import open_folder
from storage.records import SampleError
from storage.segments import has_cache, read_segments, tokens_segments
from teacher_dump.plan import Plan
from teacher_dump.reading import SampleSet
from teacher_dump.sample_file import Chosen
from teacher_dump.samples import Sample

ReadAgain = Callable[[Collection[str]], SampleSet]  # with these ids and places watched
MakePlan = Callable[[Sequence[Sample], Sequence[SampleError]], Plan]


def plan_as_cached(plan: Plan, cache_path: str, *, read_again: ReadAgain, make: MakePlan) -> Plan:
    """The plan of a segment of the cache at `cache_path` that these sources had when it was begun; else `plan`.

    Errors: CacheError for a cache that cannot be read.
    """
    folder = open_folder(cache_path)
    segments = read_segments(folder) if has_cache(folder) else []
    bases = [segment for segment in tokens_segments(segments) if segment.retries is None]
    if any(base.identity.plan_fingerprint == plan.fingerprint for base in bases):
        return plan
    for base in bases:
        try:
            errors = layout.read_commit(folder, base, base.first_part)[0].errors  # rows that were no samples are here
        except FileNotFoundError:
            continue
        earlier = _without_mended(read_again({error.sample_id for error in errors}), errors, make) if errors else None
        if earlier is not None and earlier.fingerprint == base.identity.plan_fingerprint:
            return earlier
    return plan


def _without_mended(sample_set: SampleSet, errors: Sequence[ErrorEntry], make: MakePlan) -> Plan | None:
    """The plan of these sources if rows that were errors still were; None if none of them is mended."""
    errors_now = {error.sample_id: error for error in sample_set.errors}
    errors_then: list[SampleError] = []
    mended: set[str] = set()
    for error in errors:
        row = sample_set.rows.get(error.sample_id)
        if row is not None and error.reason.startswith(f"{row.place}: "):  # of the row, not of a sample's prompt
            mended.update(row.sample_ids)
            errors_then.append(SampleError(error.sample_id, error.reason))
        elif error.sample_id in errors_now:
            errors_then.append(errors_now[error.sample_id])
    if not mended:
        return None
    samples = sample_set.samples
    kept = array("q", (place for place, sample in enumerate(samples) if sample.id not in mended))
    return make(Chosen(samples, kept), errors_then)
