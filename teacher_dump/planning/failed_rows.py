"""Failed rows and questions, read again from the sources or from later answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.records.records import SampleError
from teacher_dump.data.dataset import read_samples
from teacher_dump.data.sample import Sample
from teacher_dump.planning.answer_files import LATER_FILE, read_json_lines, write_json_lines
from teacher_dump.settings import DumpSettings


@dataclass(frozen=True)
class FailedRow:
    """The current state of a row or question that had failed."""

    samples: tuple[Sample, ...] = ()
    error: SampleError | None = None  # why it still is not a sample


def read_failed_rows(settings: DumpSettings, failed_ids: Collection[str]) -> dict[str, FailedRow]:
    """Reads the current state of failed rows, by the ids of their errors (a sample's id or a row's place).

    If the answers were generated, a later answer replaces the first refusal.
    """
    extracted = Path(settings.data.extracted or settings.run / "images")
    found = read_samples(
        settings.data.sources,
        extracted=extracted,
        only_questions=settings.data.responses != "dataset",
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
    """Reads the results of failed questions that were asked again, by the ids of their errors."""
    return {line["id"]: row_from_json(line) for line in read_json_lines(folder / LATER_FILE)}


def write_later_rows(folder: Path, rows: dict[str, FailedRow]) -> None:
    """Writes what `read_later_rows` reads."""
    write_json_lines(folder / LATER_FILE, _make_lines(rows))


def row_as_json(name: str, row: FailedRow) -> dict[str, Any]:
    """Returns a failed row as plain data. `name`: the id of its error."""
    error = None if row.error is None else [row.error.sample_id, row.error.reason]
    return {"id": name, "samples": [sample.as_json() for sample in row.samples], "error": error}


def row_from_json(line: dict[str, Any]) -> FailedRow:
    """Inverts `row_as_json`; the name is not returned."""
    error = None if line["error"] is None else SampleError(*line["error"])
    return FailedRow(tuple(map(Sample.from_json, line["samples"])), error)


def _make_lines(rows: dict[str, FailedRow]) -> Iterator[dict[str, Any]]:
    return (row_as_json(name, row) for name, row in rows.items())
