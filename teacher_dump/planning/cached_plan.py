"""The plan that a cache, or a teacher's answers, were begun with, found again although what was broken is mended now.

A row that is broken, or whose image is missing, is an error of the plan; once it is mended, it is a sample, and the
same sources give another plan. The cache names its errors, so the plan of then is made again, and its hash proves it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from storage.backends.folder import open_folder
from storage.layout import commits as layout
from storage.layout.documents import ErrorEntry
from storage.layout.segments import has_cache, read_segments, select_tokens_segments
from storage.records.records import SampleError
from teacher_dump.data.dataset import SampleSet
from teacher_dump.data.partition import Plan
from teacher_dump.data.sample import Sample
from teacher_dump.data.sample_spool import Chosen, Replaced
from teacher_dump.planning.answer_files import DONE_FILE, read_refusals

ReadAgain = Callable[[Collection[str]], SampleSet]  # with these ids and places watched
_IMAGE = re.compile(r"image '([^']+)': ")  # the reason of images.load_image
MakePlan = Callable[[Sequence[Sample], Sequence[SampleError]], Plan]


def plan_as_cached(plan: Plan, cache_path: str, *, read_again: ReadAgain, make: MakePlan) -> Plan:
    """The plan of a segment of the cache at `cache_path` that these sources had when it was begun; else `plan`.

    Errors: CacheError for a cache that cannot be read.
    """
    folder = open_folder(cache_path)
    segments = read_segments(folder) if has_cache(folder) else []
    bases = [segment for segment in select_tokens_segments(segments) if segment.retries is None]
    if any(base.identity.plan_fingerprint == plan.fingerprint for base in bases):
        return plan
    for base in bases:
        commits = layout.read_commits(folder, base, layout.list_committed_parts(folder, base))
        errors = {commit.part: commit.errors for commit, _ in commits}
        failed_ids = {error.sample_id for of_part in errors.values() for error in of_part}
        earlier = _before_mending(read_again(failed_ids), errors, base.first_part, make) if failed_ids else None
        if earlier is not None and earlier.fingerprint == base.identity.plan_fingerprint:
            return earlier
    return plan


def plan_as_answered(
    plan: Plan, answers: Path, *, key_of: Callable[[Plan], str], read_again: ReadAgain, make: MakePlan
) -> Plan:
    """The plan of questions that a folder of answers below `answers` was made for; else `plan`.

    `key_of`: the name of that folder.
    """
    if (answers / key_of(plan) / DONE_FILE).exists():
        return plan
    for done in sorted(answers.glob(f"*/{DONE_FILE}")):
        errors = read_refusals(done.parent)
        failed_ids = {error.sample_id for of_part in errors.values() for error in of_part}
        earlier = _before_mending(read_again(failed_ids), errors, 0, make) if failed_ids else None
        if earlier is not None and key_of(earlier) == done.parent.name:
            return earlier
    return plan


def _before_mending(
    sample_set: SampleSet, errors: Mapping[int, Sequence[ErrorEntry]], first_part: int, make: MakePlan
) -> Plan | None:
    """The plan of these sources if nothing that had failed were mended; None if nothing is.

    Two kinds of mending change a plan. A row that was an error becomes samples; those errors are the first part's. And
    an image that is bytes in a row or an archive is a file named by its hash: other bytes give it another name.
    """
    errors_now = {error.sample_id: error for error in sample_set.errors}
    errors_then: list[SampleError] = []
    mended: set[str] = set()
    images_then: dict[str, str] = {}
    for part, of_part in errors.items():
        for error in of_part:
            row = sample_set.rows.get(error.sample_id)
            if row is not None and error.reason.startswith(f"{row.place}: "):  # of the row, not of a sample's prompt
                mended.update(row.sample_ids)
                errors_then.append(SampleError(error.sample_id, error.reason))
            elif error.sample_id in errors_now and part == first_part:
                errors_then.append(errors_now[error.sample_id])
            elif found := _IMAGE.match(error.reason):
                images_then[error.sample_id] = found[1]
    kept = array("q")
    renamed: dict[int, Sample] = {}
    for place, sample in enumerate(sample_set.samples):
        if sample.id not in mended:
            kept.append(place)
        name = images_then.get(sample.id)
        if name is not None and len(sample.images) == 1 and sample.images[0] != name:
            renamed[place] = replace(sample, images=(name,))
    if not mended and not renamed:
        return None
    return make(Chosen(Replaced(sample_set.samples, renamed), kept), errors_then)
