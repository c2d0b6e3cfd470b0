"""Restores the plan that a cache, or a teacher's answers, were begun with, after broken rows were fixed.

A broken row, or a row whose image is missing, is an error of the plan. Once it is fixed it is a sample, so the
same sources give another plan. The cache names its errors, so the earlier plan can be rebuilt; its hash proves it.
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
from teacher_dump.data.sample_spool import SampleSubset, SubstitutedSamples
from teacher_dump.planning.answer_files import DONE_FILE, read_refusals

ReadAgain = Callable[[Collection[str]], SampleSet]  # with these ids and places watched
_IMAGE_REASON = re.compile(r"image '([^']+)': ")  # begins every refusal by image_loading.load_image
MakePlan = Callable[[Sequence[Sample], Sequence[SampleError]], Plan]


def restore_cached_plan(plan: Plan, cache_path: str, *, read_again: ReadAgain, make_parts: MakePlan) -> Plan:
    """Returns the plan that a segment of the cache at `cache_path` was begun with; `plan` if none matches.

    Raises CacheError for a cache that cannot be read.
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
        if not failed_ids:
            continue
        earlier = _rebuild_earlier_plan(read_again(failed_ids), errors, base.first_part, make_parts)
        if earlier is not None and earlier.fingerprint == base.identity.plan_fingerprint:
            return earlier
    return plan


def restore_answered_plan(
    plan: Plan, answers: Path, *, compute_key: Callable[[Plan], str], read_again: ReadAgain, make_parts: MakePlan
) -> Plan:
    """Returns the plan of questions that a folder below `answers` was made for; `plan` if none matches.

    `compute_key` gives the name of that folder.
    """
    if (answers / compute_key(plan) / DONE_FILE).exists():
        return plan
    for done in sorted(answers.glob(f"*/{DONE_FILE}")):
        errors = read_refusals(done.parent)
        failed_ids = {error.sample_id for of_part in errors.values() for error in of_part}
        earlier = _rebuild_earlier_plan(read_again(failed_ids), errors, 0, make_parts) if failed_ids else None
        if earlier is not None and compute_key(earlier) == done.parent.name:
            return earlier
    return plan


def _rebuild_earlier_plan(
    sample_set: SampleSet, errors: Mapping[int, Sequence[ErrorEntry]], first_part: int, make_parts: MakePlan
) -> Plan | None:
    """Returns the plan as if no failed row had been fixed; None if nothing was fixed.

    Two kinds of fixes change a plan. A row that was an error becomes samples; those errors belong to the first
    part. And an image that is bytes in a row or an archive is a file named by its hash: new bytes, new name.
    """
    current_errors = {error.sample_id: error for error in sample_set.errors}
    earlier_errors: list[SampleError] = []
    fixed_ids: set[str] = set()
    earlier_images: dict[str, str] = {}
    for part, of_part in errors.items():
        for error in of_part:
            row = sample_set.rows.get(error.sample_id)
            if row is not None and error.reason.startswith(f"{row.place}: "):  # of the row, not of a sample's prompt
                fixed_ids.update(row.sample_ids)
                earlier_errors.append(SampleError(error.sample_id, error.reason))
            elif error.sample_id in current_errors and part == first_part:
                earlier_errors.append(current_errors[error.sample_id])
            elif found := _IMAGE_REASON.match(error.reason):
                earlier_images[error.sample_id] = found[1]
    kept = array("q")
    renamed: dict[int, Sample] = {}
    for place, sample in enumerate(sample_set.samples):
        if sample.id not in fixed_ids:
            kept.append(place)
        name = earlier_images.get(sample.id)
        if name is not None and len(sample.images) == 1 and sample.images[0] != name:
            renamed[place] = replace(sample, images=(name,))
    if not fixed_ids and not renamed:
        return None
    return make_parts(SampleSubset(SubstitutedSamples(sample_set.samples, renamed), kept), earlier_errors)
