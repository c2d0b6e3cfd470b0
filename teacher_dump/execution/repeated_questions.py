"""Asks failed questions again: those without an answer, whose samples are errors of a cache.

The teacher, or the model that answers in its place, is asked. Images or rows of the questions may have been fixed. The
results go to later.jsonl (answer_files.py), which a retry reads; the first answers do not change, nor does the plan of
the dump over them. Unfinished work lies in again/, so a stopped run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from storage.records.records import SampleError
from teacher_dump.execution.answer_generation import JOB_FILE, make_answer_job, open_answerer, run_answer_processes
from teacher_dump.planning.answer_files import (
    AGAIN_FOLDER,
    get_part_path,
    read_json_lines,
    read_refusals,
    resolve_answers_folder,
    write_json_lines,
    write_text,
)
from teacher_dump.planning.dump_plan import DumpPlan, plan_questions
from teacher_dump.planning.failed_rows import (
    FailedRow,
    read_failed_rows,
    read_later_rows,
    row_as_json,
    row_from_json,
    write_later_rows,
)
from teacher_dump.settings import DumpSettings


def reask_failed_questions(
    settings: DumpSettings, questions: DumpPlan, failed_ids: Collection[str], *, progress: bool = True
) -> None:
    """Has the failed questions that still have no answer answered.

    The data.responses of `settings` are generated, and their first answers exist; `questions` is their plan. Questions
    that cannot be read yet are skipped. Raises StillhouseError if a process fails; the answers that it wrote stay.
    """
    folder = resolve_answers_folder(settings, questions.identity)
    work = begin_reasking(settings, folder, failed_ids)
    job = json.loads((work / JOB_FILE).read_bytes())
    missing = sum(not get_part_path(work, number).exists() for number in range(len(job["again"])))
    if missing:
        num_asked = sum(map(len, job["again"]))
        message = f"{settings.data.answerer} is asked {num_asked:,} failed questions again" * progress
        run_answer_processes(settings, work / JOB_FILE, missing, message)
    _save_later_answers(folder, work, job)


def begin_reasking(settings: DumpSettings, folder: Path, failed_ids: Collection[str]) -> Path:
    """Returns the work folder with its job document: the unfinished job, or a new one for these ids."""
    work = folder / AGAIN_FOLDER
    if (work / JOB_FILE).exists():
        unfinished = json.loads((work / JOB_FILE).read_bytes())
        write_text(work / JOB_FILE, json.dumps(unfinished | make_answer_job(settings)))  # the project may have moved
        return work
    shutil.rmtree(work, ignore_errors=True)  # remains of a killed run
    rows = _read_current_rows(settings, folder, failed_ids)
    askable = [name for name, row in rows.items() if row.samples]
    size = settings.dump.samples_per_part
    job = {
        **make_answer_job(settings),
        "again": [askable[start : start + size] for start in range(0, len(askable), size)],
        "unreadable": [row_as_json(name, row) for name, row in rows.items() if not row.samples],
    }
    work.mkdir(exist_ok=True)
    write_text(work / JOB_FILE, json.dumps(job))
    return work


def answer_failed_questions(
    work: Path, parts: Sequence[Sequence[str]], settings: DumpSettings, *, stripe: int, num_stripes: int
) -> None:
    """Answers every `num_stripes`-th of these parts of failed ids that has no answers yet."""
    numbered = list(enumerate(parts))[stripe::num_stripes]
    todo = [(number, ids) for number, ids in numbered if not get_part_path(work, number).exists()]
    if not todo:
        return
    answerer = open_answerer(settings, plan_questions(settings))
    rows = read_failed_rows(settings, {name for _, ids in todo for name in ids})
    for number, ids in todo:
        asked = [(name, sample) for name in ids if name in rows for sample in rows[name].samples]
        answered: dict[str, FailedRow] = {}
        for (name, _), outcome in zip(asked, answerer.answer_samples([sample for _, sample in asked]), strict=True):
            row = answered.get(name, FailedRow())
            if isinstance(outcome, SampleError):
                answered[name] = FailedRow(row.samples, row.error or outcome)
            else:
                answered[name] = FailedRow((*row.samples, outcome), row.error)
        write_json_lines(get_part_path(work, number), (row_as_json(name, row) for name, row in answered.items()))


def _read_current_rows(settings: DumpSettings, folder: Path, failed_ids: Collection[str]) -> dict[str, FailedRow]:
    """Reads the current rows of failed questions without an answer, by the ids of their errors."""
    later = read_later_rows(folder)
    refused = [error.sample_id for errors in read_refusals(folder).values() for error in errors]
    answered = {name for name, row in later.items() if row.samples}
    wanted = [name for name in refused if name in failed_ids and name not in answered]
    rows = read_failed_rows(settings, set(wanted)) if wanted else {}
    return {name: rows[name] for name in wanted if name in rows}


def _save_later_answers(folder: Path, work: Path, job: dict[str, Any]) -> None:
    """Adds the results of asking again to the later answers, and removes the work folder."""
    first = {error.sample_id: error.reason for errors in read_refusals(folder).values() for error in errors}
    later = read_later_rows(folder)
    parts = [line for number in range(len(job["again"])) for line in read_json_lines(get_part_path(work, number))]
    for line in [*job["unreadable"], *parts]:
        name, row = line["id"], row_from_json(line)
        if row.error is not None and row.error.reason == first[name]:  # it failed as before
            later.pop(name, None)
        else:
            later[name] = row
    write_later_rows(folder, later)
    shutil.rmtree(work, ignore_errors=True)  # another job on this cache may remove it, too
