"""`python -m teacher_dump.execution.answer_job JOB STRIPE NUM`: answers every NUM-th part of a job."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from storage.config import CacheSection
from storage.entry_point import run_command
from storage.processes.stop_signals import end_process
from teacher_dump.config import DataSection, DumpSection, TeacherSection
from teacher_dump.execution.answer_generation import answer_parts
from teacher_dump.execution.repeated_questions import answer_failed_questions
from teacher_dump.settings import DumpSettings


def main(arguments: Sequence[str]) -> int:
    """Answers one stripe of a job's parts and returns the exit code; a part is written whole or not at all."""
    return run_command(lambda: _answer(*arguments), prefix="")


def _answer(job: str, stripe: str, num_stripes: str) -> None:
    document = json.loads(Path(job).read_bytes())
    answer = answer_parts
    if "again" in document:
        answer = partial(answer_failed_questions, Path(job).parent, document["again"])
    answer(_parse_settings(document), stripe=int(stripe), num_stripes=int(num_stripes))


def _parse_settings(job: dict[str, Any]) -> DumpSettings:
    return DumpSettings(
        Path(job["run"]),
        DataSection.model_validate(job["data"]),
        TeacherSection.model_validate(job["teacher"]),
        DumpSection.model_validate(job["dump"]),
        CacheSection.model_validate(job["cache"]),
    )


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
