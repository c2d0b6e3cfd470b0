"""The dump: plans parts, has workers score them, and seals the cache."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from signal import Signals

from storage.backends.folder import open_folder
from storage.errors import ConfigError, StillhouseError
from storage.layout.commits import SUMMARY_FILE
from storage.layout.processor_files import read_processor_files
from storage.layout.retries import list_families_of_parts, read_contents, select_retries
from storage.layout.segments import (
    NewSegment,
    Segment,
    find_segment,
    has_cache,
    is_committed,
    is_complete,
    read_segments,
    select_tokens_segments,
)
from storage.processes.stop_signals import Interrupted
from storage.reader.cache import Cache
from storage.records.records import SampleError
from storage.writer.cache_writer import CacheWriter
from teacher_dump.config import DumpSection
from teacher_dump.engine_check.gate import require_engine_check
from teacher_dump.estimates.budget_choice import apply_budget
from teacher_dump.execution.answer_generation import generate_missing_answers
from teacher_dump.execution.driver import write_parts
from teacher_dump.execution.repeated_questions import reask_failed_questions
from teacher_dump.execution.retry import make_retry_identity, make_retry_plan, select_retryable
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.answer_files import ANSWERS_FOLDER, load_answered_settings
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump, plan_questions
from teacher_dump.planning.recorded_budget import make_comparable_identity
from teacher_dump.settings import DumpSettings
from teacher_dump.workers.progress import DumpSummary, count_error_kinds

_SHOWN_ERRORS = 5
_SHOWN_KINDS = 8


class DumpStopped(Interrupted):
    """A signal stopped the dump; it stopped between two parts."""


@dataclass(frozen=True)
class DumpResult:
    """Describes a sealed cache and what this dump wrote into it."""

    cache: str  # folder or URL
    num_parts: int  # in the cache
    num_samples: int  # in the cache
    num_errors: int  # in the cache
    segments: tuple[int, ...]  # numbers of the segments that this dump completed or found complete
    summary: DumpSummary | None  # of the last segment that was written; None: every part existed already
    retried: RetryOutcome | None = None  # None: no retry was requested


@dataclass(frozen=True)
class RetryOutcome:
    """Counts the samples that had failed, and how their retry ended."""

    num_failed: int  # before the retry
    num_attempted: int  # in the retry
    num_left: int  # without a record after the retry


def run_dump(settings: DumpSettings, *, retry_errors: bool = False, progress: bool = True) -> DumpResult:
    """Writes the parts and families that a cache lacks, and seals it; leaves a complete cache as it is.

    For a cache of the same samples it dumps only the missing families; with `cache.append` it adds other
    samples as new parts. It finishes an unfinished dump first. With `retry_errors` it attempts failed samples
    of this plan again, except those that cannot be read for the same reason as before.

    With no families (but images) it writes tokens in this process and starts neither Ray nor a teacher.
    Raises ConfigError; IdentityError if `cache.path` holds another cache; StillhouseError, among others when
    more samples fail than dump.max_error_fraction allows (the cache then stays unsealed).
    """
    asked, settings = settings, _resolve_answers(settings, retry_errors=retry_errors, progress=progress)
    planned, cache = plan_dump(settings), settings.cache
    check = require_engine_check(planned, settings) if retry_errors or not _has_all(planned, settings) else None
    planned = apply_budget(planned, settings)
    retried, summary = _retry_failed(planned, settings, asked, progress=progress) if retry_errors else (None, None)
    finished: set[int] = set()
    for plan in _iterate_plans(planned, settings):
        while (writer := _open_writer(plan, settings)).segment.number not in finished:
            summary = _write_missing_parts(writer, plan, settings, progress=progress) or summary
            writer.seal(check if {*writer.segment.families} - {"images"} else None)
            finished.add(writer.segment.number)
    whole = Cache.open(cache.path, families=())
    return DumpResult(
        cache=cache.path,
        num_parts=whole.num_parts,
        num_samples=whole.num_samples,
        num_errors=len(whole.errors),
        segments=tuple(sorted(finished)),
        summary=summary,
        retried=retried,
    )


def _has_all(planned: DumpPlan, settings: DumpSettings) -> bool:
    """Returns whether the cache has all parts and families of a plan, and of its retries."""
    folder, cache = open_folder(settings.cache.path), settings.cache
    found, _ = find_segment(
        folder, make_comparable_identity(planned.identity, cache), cache.families, append=cache.append
    )
    if isinstance(found, NewSegment) or not is_complete(folder, found):
        return False
    return next(_iterate_unfinished_retries(planned, settings), None) is None


def _iterate_plans(planned: DumpPlan, settings: DumpSettings) -> Iterator[DumpPlan]:
    """Yields the plan; once it is dumped, yields the plans of its retries that are incomplete."""
    yield planned
    for retry in _iterate_unfinished_retries(planned, settings):
        yield make_retry_plan(retry, planned, settings)


def _iterate_unfinished_retries(planned: DumpPlan, settings: DumpSettings) -> Iterator[Segment]:
    """Yields the retries of a dumped plan whose parts or families are incomplete."""
    folder, cache = open_folder(settings.cache.path), settings.cache
    segments = read_segments(folder)
    for retry in select_retries(segments, _find_base_segment(segments, planned)):
        found, _ = find_segment(folder, make_retry_identity(retry, planned), cache.families, append=False)
        if isinstance(found, NewSegment) or not is_complete(folder, found):
            yield retry


def _retry_failed(
    planned: DumpPlan, settings: DumpSettings, asked: DumpSettings, *, progress: bool
) -> tuple[RetryOutcome, DumpSummary | None]:
    """Writes the parts that a plan lacks, then attempts its failed samples again. Seals nothing.

    Finishes an incomplete retry rather than begin another. `asked`: the settings before generated
    answers replaced the sources. Raises the errors of `run_dump`.
    """
    cache, folder = settings.cache, open_folder(settings.cache.path)
    writer, summary = _open_writer(planned, settings), None
    if writer.segment.has_tokens:
        summary = _write_missing_parts(writer, planned, settings, progress=progress, ignores_earlier_errors=True)
    segments = read_segments(folder)
    base = _find_base_segment(segments, planned)
    _, failed = read_contents(folder, segments, base)
    num_failed = sum(map(len, failed))
    missing = [family for family in list_families_of_parts(segments, base) if family not in cache.families]
    if missing:
        raise ConfigError(
            f"cache.families: lacks {', '.join(missing)}, which the samples beside those that failed have in "
            f"{folder}; a retry needs them all"
        )
    begun = next((one for one in select_retries(segments, base) if not is_committed(folder, one)), None)
    if begun is None and asked.data.responses != "dataset" and num_failed:
        names = {error.sample_id for errors in failed for error in errors}
        reask_failed_questions(asked, plan_questions(asked), names, progress=progress)
    failed_ids = begun.failed_ids if begun is not None else select_retryable(planned, settings, failed)
    if failed_ids:
        writer = CacheWriter.begin_retry(cache.path, planned.identity, base.number, failed_ids)
        again = make_retry_plan(writer.segment, planned, settings)
        summary = _write_missing_parts(writer, again, settings, progress=progress) or summary
    _, left = read_contents(folder, read_segments(folder), base)
    return RetryOutcome(num_failed, sum(map(len, failed_ids)), sum(map(len, left))), summary


def _find_base_segment(segments: Sequence[Segment], planned: DumpPlan) -> Segment:
    """Returns the segment that holds the parts of a plan; the cache must have it."""
    fingerprint = planned.identity.plan_fingerprint
    return next(one for one in select_tokens_segments(segments) if one.identity.plan_fingerprint == fingerprint)


def _open_writer(planned: DumpPlan, settings: DumpSettings) -> CacheWriter:
    """Opens the unfinished segment or a new one; a complete segment when nothing is left to do."""
    cache = settings.cache
    return CacheWriter.open(
        cache.path,
        planned.identity,
        cache.families,
        append=cache.append,
        sample_ids=[sample.id for part in planned.plan.parts for sample in part.samples] if cache.append else (),
        processor_files=read_processor_files(planned.checkpoint),
    )


def _write_missing_parts(
    writer: CacheWriter,
    planned: DumpPlan,
    settings: DumpSettings,
    *,
    progress: bool,
    ignores_earlier_errors: bool = False,
) -> DumpSummary | None:
    """Writes the parts that a segment lacks, with its own families; returns None if it lacks none.

    `ignores_earlier_errors`: samples that have failed already do not count against dump.max_error_fraction.
    Raises DumpStopped; StillhouseError as soon as the number of errors exceeds the limit.
    """
    committed = writer.committed_parts()
    missing = [part for part in planned.plan.parts if part.number not in committed]
    num_rows = planned.plan.num_samples + sum(len(part.errors) for part in planned.plan.parts)
    num_samples, errors = writer.contents()
    max_errors = settings.dump.max_error_fraction * num_rows + (len(errors) if ignores_earlier_errors else 0)
    if writer.segment.retries is not None or not writer.segment.has_tokens:
        max_errors = math.inf  # the errors count for the segment that holds the samples
    _check_error_limit(num_samples, errors, settings.dump, max_errors, num_missing=len(missing))
    if not missing:
        return None
    writer.unseal()
    own = settings.cache.model_copy(update={"families": writer.segment.families})
    done, stopped = write_parts(
        missing,
        make_worker_settings(planned, replace(settings, cache=own)),
        dump=settings.dump,
        run=settings.run,
        committed=writer.committed_parts,
        max_errors=max_errors - len(errors) if writer.segment.has_tokens else math.inf,
        progress=progress,
    )
    num_samples, errors = writer.contents()
    summary = done.summary(errors)
    if done.num_parts:
        writer.folder.write(SUMMARY_FILE, f"{json.dumps(asdict(summary), indent=1)}\n".encode())
    num_missing = len(planned.plan.parts) - len(writer.committed_parts())
    _check_error_limit(num_samples, errors, settings.dump, max_errors, num_missing=num_missing)
    if stopped is not None:
        raise DumpStopped(
            stopped,
            f"stopped by {Signals(stopped).name}: {done.num_parts:,} parts were written, {num_missing:,} are left; "
            "run the same command again to resume",
        )
    return summary


def _check_error_limit(
    num_samples: int, errors: Sequence[SampleError], dump: DumpSection, max_errors: float, *, num_missing: int
) -> None:
    """Raises StillhouseError if too many samples of a segment failed; `num_missing` parts are not written yet."""
    if len(errors) <= max_errors and (num_samples or num_missing or math.isinf(max_errors)):
        return
    fraction = len(errors) / max(num_samples + len(errors), 1)
    kinds = "".join(f"\n  {count:,} × {kind}" for kind, count in list(count_error_kinds(errors).items())[:_SHOWN_KINDS])
    shown = "".join(f"\n  {error}" for error in errors[:_SHOWN_ERRORS])
    more = f"\n  … and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
    early = f"; {num_missing:,} parts are left, but no more than {max_errors:,.0f} may fail" if num_missing else ""
    raise StillhouseError(
        f"{len(errors)} of {num_samples + len(errors)} samples failed ({fraction:.1%}; "
        f"dump.max_error_fraction is {dump.max_error_fraction:.1%}){early}:{kinds}\nsuch as{shown}{more}"
    )


def _resolve_answers(settings: DumpSettings, *, retry_errors: bool, progress: bool) -> DumpSettings:
    """Returns settings whose sources hold the answers of `data.responses`; generates missing answers first.

    Raises ConfigError for a retry of a cache that was made from other answers.
    """
    if settings.data.responses == "dataset":
        return settings
    questions = plan_questions(settings)
    found = load_answered_settings(settings, questions.identity)
    if found is None and retry_errors and not settings.cache.append and has_cache(open_folder(settings.cache.path)):
        raise ConfigError(
            f"{settings.cache.path}: a retry needs the answers that this cache was made from, and "
            f"{settings.run / ANSWERS_FOLDER} has none for the questions of data.sources; undo all changes except "
            "fixed rows and images, or run the dump without --retry-errors, which asks all questions again"
        )
    if found is None:
        require_engine_check(questions, settings)
        generate_missing_answers(settings, questions, progress=progress)
        found = load_answered_settings(settings, questions.identity)
    assert found is not None
    return found
