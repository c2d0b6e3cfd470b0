"""What the sources, or a teacher that was asked again, hold now of something that had failed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.records.records import SampleError
from teacher_dump.data.dataset import read_samples
from teacher_dump.data.sample import Sample
from teacher_dump.planning.answer_files import LATER_FILE, read_lines, write_lines
from teacher_dump.settings import DumpSettings


@dataclass(frozen=True)
class FailedRow:
    """What is there now of something that had failed."""

    samples: tuple[Sample, ...] = ()
    error: SampleError | None = None  # why it still is no sample


def read_failed_rows(settings: DumpSettings, failed_ids: Collection[str]) -> dict[str, FailedRow]:
    """What there is now of these ids of errors, each of which is a sample's id or a row's place.

    Where the answers are the teacher's own, a later answer counts in place of the first refusal.
    """
    extracted = Path(settings.data.extracted or settings.run / "images")
    found = read_samples(
        settings.data.sources,
        extracted=extracted,
        only_questions=settings.data.responses == "teacher",
        spool=settings.run,
        watched=failed_ids,
    )
    wanted = {sample_id for row in found.rows.values() for sample_id in row.sample_ids}
    samples = {sample.id: sample for sample in found.samples if sample.id in wanted} if wanted else {}
    rows = {error.sample_id: FailedRow(error=error) for error in found.errors if error.sample_id in failed_ids}
    for name, row in found.rows.items():
        rows[name] = FailedRow(tuple(samples[sample_id] for sample_id in row.sample_ids))
    if settings.answers is not None:
        later = read_later_rows(settings.answers)
        rows |= {name: row for name, row in later.items() if name in failed_ids}
    return rows


def read_later_rows(folder: Path) -> dict[str, FailedRow]:
    """What became of the failed questions of a folder of answers that were asked again, by the ids of their errors."""
    return {line["id"]: row_from_json(line) for line in read_lines(folder / LATER_FILE)}


def write_later_rows(folder: Path, rows: dict[str, FailedRow]) -> None:
    """The inverse of `read_later_rows`."""
    write_lines(folder / LATER_FILE, _as_lines(rows))


def row_as_json(name: str, row: FailedRow) -> dict[str, Any]:
    """Plain data. `name`: the id of the error."""
    error = None if row.error is None else [row.error.sample_id, row.error.reason]
    return {"id": name, "samples": [sample.as_json() for sample in row.samples], "error": error}


def row_from_json(line: dict[str, Any]) -> FailedRow:
    """The inverse of `row_as_json`, without the name."""
    error = None if line["error"] is None else SampleError(*line["error"])
    return FailedRow(tuple(map(Sample.from_json, line["samples"])), error)


def _as_lines(rows: dict[str, FailedRow]) -> Iterator[dict[str, Any]]:
    return (row_as_json(name, row) for name, row in rows.items())
