"""Plans retries: selects the failed samples that are worth another attempt, and plans their segment.

A sample is retried if its prompt and images can be read now, or if it fails for another reason than before.
So a retry with nothing fixed writes nothing. A sample that only the teacher refused is retried each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from storage.identity import Identity
from storage.layout.documents import ErrorEntry
from storage.layout.retries import make_retry_fields
from storage.layout.segments import Segment
from storage.records.records import PartRecords, SampleError, TokensRecord
from teacher_dump.data.partition import Part, Plan
from teacher_dump.data.sample import SampleRefusedError
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import DumpPlan
from teacher_dump.planning.failed_rows import FailedRow, read_failed_rows
from teacher_dump.settings import DumpSettings
from teacher_dump.signals.pair_logprobs import drop_lone_halves

if TYPE_CHECKING:  # imports transformers
    from teacher_dump.prompts.preparation import Preparer

GONE = "is no longer in data.sources"


def make_retry_plan(retry: Segment, planned: DumpPlan, settings: DumpSettings) -> DumpPlan:
    """Returns the plan of a retry segment. `planned` is the plan that its samples failed in."""
    rows = read_failed_rows(settings, {sample_id for ids in retry.failed_ids for sample_id in ids})
    parts = []
    for number, ids in enumerate(retry.failed_ids):
        of_part = [rows.get(sample_id, FailedRow(error=SampleError(sample_id, GONE))) for sample_id in ids]
        samples = tuple(sample for row in of_part for sample in row.samples)
        parts.append(Part(number, samples, tuple(row.error for row in of_part if row.error is not None)))
    return replace(
        planned,
        plan=Plan(tuple(parts), retry.identity.plan_fingerprint),
        identity=make_retry_identity(retry, planned),
    )


def make_retry_identity(retry: Segment, planned: DumpPlan) -> Identity:
    """Returns the identity of a dump over a retry's plan."""
    return planned.identity.model_copy(update=make_retry_fields(retry.number, retry.failed_ids))


def select_retryable(
    planned: DumpPlan, settings: DumpSettings, failed: Sequence[Sequence[ErrorEntry]]
) -> list[list[str]]:
    """Returns the ids of the errors to retry, by part; empty if a retry would change nothing.

    `failed`: the remaining errors, by the part that they were in.
    """
    rows = read_failed_rows(settings, {error.sample_id for errors in failed for error in errors})
    preparer: Preparer | None = None
    if any(row.samples for row in rows.values()):
        from teacher_dump.workers.worker import open_preparer

        preparer = open_preparer(make_worker_settings(planned, settings))
    parts: list[list[str]] = []
    for errors in failed:
        readable = [rows[error.sample_id] for error in errors if error.sample_id in rows]
        reasons = _find_current_reasons(readable, preparer)
        chosen = {error.sample_id for error in errors if _is_changed(error, rows.get(error.sample_id), reasons)}
        others = _map_other_halves(readable)
        chosen |= {others[name] for name in chosen if name in others}
        units = _iterate_units([error.sample_id for error in errors if error.sample_id in chosen], others)
        for position, unit in enumerate(units):
            if not parts or position == 0 or len(parts[-1]) + len(unit) > settings.dump.samples_per_part:
                parts.append([])
            parts[-1] += unit
    return parts


def _find_current_reasons(rows: Sequence[FailedRow], preparer: Preparer | None) -> dict[str, str]:
    """Returns why samples of a part would fail again, by id; samples that would not are left out."""
    records: list[TokensRecord] = []
    errors = [row.error for row in rows if row.error is not None]
    for sample in (sample for row in rows for sample in row.samples):
        assert preparer is not None
        try:
            records.append(preparer.prepare(sample).record)
        except SampleRefusedError as refusal:
            errors.append(SampleError(sample.id, str(refusal)))
    return {error.sample_id: error.reason for error in drop_lone_halves(PartRecords(records, errors=errors)).errors}


def _is_changed(error: ErrorEntry, row: FailedRow | None, reasons: dict[str, str]) -> bool:
    """Returns whether a retry would give a record, or another reason."""
    if row is None:
        return False
    if row.error is not None:
        return _encode_as_stored(row.error.reason) != error.reason
    return any(_encode_as_stored(reasons.get(sample.id, "")) != error.reason for sample in row.samples)


def _encode_as_stored(reason: str) -> str:
    return reason.encode("utf-8", "backslashreplace").decode("utf-8")


def _map_other_halves(rows: Sequence[FailedRow]) -> dict[str, str]:
    """Returns the id of the other half of a preference pair, by the id of each half."""
    keys = [sample.key for row in rows for sample in row.samples]
    keys += [row.error.key for row in rows if row.error is not None and row.error.key is not None]
    return {key.sample_id: key.other_half.sample_id for key in keys if key.half is not None}


def _iterate_units(sample_ids: Sequence[str], others: Mapping[str, str]) -> Iterator[list[str]]:
    """Yields ids one by one, but both halves of a preference pair together. `others`: the id of the other half."""
    known, seen = set(sample_ids), set[str]()
    for sample_id in sample_ids:
        if sample_id not in seen:
            unit = [sample_id]
            if others.get(sample_id) in known:
                unit.append(others[sample_id])
            seen.update(unit)
            yield unit
