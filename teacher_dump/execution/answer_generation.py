"""Generates the answers of the teacher or of another model (`data.responses`), before the dump that scores them.

Answers lie in a folder of the run (teacher_dump/planning/answer_files.py). Existing answers are kept, so a stopped
run resumes; only `--retry-errors` asks failed questions again (repeated_questions.py).
Ray starts one process for each stripe of the parts (answer_job.py). All of them end before the dump starts its
teacher, so the two models are never in memory together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import ConfigError, StillhouseError
from storage.processes.search_path import make_module_command
from teacher_dump.execution.driver import LOG_FILE
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.answer_files import (
    DONE_FILE,
    get_part_path,
    read_json_lines,
    resolve_answers_folder,
    write_json_lines,
    write_text,
)
from teacher_dump.planning.answering_model import AnsweringModel
from teacher_dump.planning.dump_plan import DumpPlan, plan_questions
from teacher_dump.settings import DumpSettings
from teacher_dump.workers.answerer import Answerer
from teacher_dump.workers.log_file import log_output

if TYPE_CHECKING:
    from teacher_dump.prompts.teacher_prompt import TeacherPrompt
    from teacher_dump.teachers.teacher import Generator
    from teacher_dump.workers.worker import WorkerSettings

JOB_FILE = "job.json"


def generate_missing_answers(settings: DumpSettings, questions: DumpPlan, *, progress: bool = True) -> None:
    """Generates all missing answers, in as many processes as the dump has actors.

    Raises StillhouseError if a process fails; the answers that it wrote stay.
    """
    folder = resolve_answers_folder(settings, questions.identity)
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(not get_part_path(folder, part.number).exists() for part in questions.plan.parts)
    if missing:
        write_text(folder / JOB_FILE, json.dumps(make_answer_job(settings)))
        message = f"{settings.data.answerer} answers {missing:,} parts" * progress
        run_answer_processes(settings, folder / JOB_FILE, missing, message)
    _write_answer_data_set(folder, settings, questions)


def run_answer_processes(settings: DumpSettings, job: Path, num_parts: int, message: str) -> None:
    """Runs an answer job of `num_parts` parts in as many processes as the dump has actors.

    Prints `message` on the terminal unless it is empty. Raises StillhouseError if a process fails; its finished
    parts stay.
    """
    from teacher_dump import ray_jobs

    count = min(settings.dump.actors.max, num_parts)
    commands = [
        ray_jobs.Command(
            name=f"answers-{stripe}",
            argv=(*make_module_command("teacher_dump.execution.answer_job"), str(job), str(stripe), str(count)),
            log_path=settings.logs.resolve() / f"answers-{stripe}.log",
            num_devices=ray_jobs.count_engine_gpus((settings.data.answering_model or settings.teacher).settings),
        )
        for stripe in range(count)
    ]
    with log_output(settings.logs / LOG_FILE) as screen:
        if message:
            print(f"answers: {message}; logs are in {settings.logs}", file=screen)
        results = ray_jobs.run_commands(
            commands,
            settings.dump.cpus_per_actor,
            settings.dump.gpus_per_actor,
            address=settings.dump.ray_address,
            logs=settings.logs,
        )
        with closing(results):
            failed = [result for result in results if result.returncode]
    if failed:
        kind = ConfigError if failed[0].returncode == 2 else StillhouseError
        reason = _read_last_line(failed[0].log_path)
        raise kind(f"{settings.data.answerer}'s answers: {reason} (see {failed[0].log_path})")


def answer_parts(settings: DumpSettings, *, stripe: int, num_stripes: int) -> None:
    """Answers every `num_stripes`-th part that has no answers yet."""
    questions = plan_questions(settings)
    folder = resolve_answers_folder(settings, questions.identity)
    folder.mkdir(parents=True, exist_ok=True)
    parts = questions.plan.parts[stripe::num_stripes]
    todo = [part for part in parts if not get_part_path(folder, part.number).exists()]
    if not todo:
        return
    answerer = open_answerer(settings, questions)
    for part in todo:
        write_json_lines(get_part_path(folder, part.number), answerer.answer_part(part))


def open_answerer(settings: DumpSettings, questions: DumpPlan) -> Answerer:
    """Returns the answerer for a plan of questions; its engine starts with the first usable question."""
    from teacher_dump.prompts.processor import load_processor
    from teacher_dump.workers.worker import open_preparer

    worker = make_worker_settings(questions, settings)
    trust = bool(worker.engine_settings.get("trust_remote_code", False))
    processor = load_processor(worker.checkpoint, trust_remote_code=trust)
    return Answerer(
        preparer=open_preparer(worker),
        generator=_LazyGenerator(_select_generating_worker(worker, questions.answering_model)),
        tokenizer=getattr(processor, "tokenizer", processor),
        image_token_id=worker.facts.image_token_id,
        eos_token_ids=worker.facts.eos_token_ids,
        sampling=settings.data.sampling,
        vocab_size=worker.facts.vocab_size,
        speaker=settings.data.answerer,
    )


def _select_generating_worker(worker: WorkerSettings, model: AnsweringModel | None) -> WorkerSettings:
    """Returns the settings of the engine that generates: the teacher's own, or those of another model."""
    if model is None:
        return worker
    return replace(
        worker,
        checkpoint=model.checkpoint,
        backend=model.backend,
        dtype=model.dtype,
        max_length=model.max_length,
        engine_settings=model.engine_settings,
        facts=replace(worker.facts, image_token_id=model.image_token_id),
    )


class _LazyGenerator:
    """A generating engine that starts on its first call with prompts."""

    def __init__(self, worker: WorkerSettings) -> None:
        self._worker = worker

    @cached_property
    def _engine(self) -> Generator:
        from teacher_dump.workers.worker import open_generator

        return open_generator(self._worker)

    def generate(self, prompts: Sequence[TeacherPrompt], **options: Any) -> list[list[int]]:
        """See Generator."""
        return self._engine.generate(prompts, **options) if prompts else []


def _write_answer_data_set(folder: Path, settings: DumpSettings, questions: DumpPlan) -> None:
    """Writes one file per split, in the plan's order, and then the document that marks the answers complete."""
    by_split: dict[str, list[str]] = {}
    for part in questions.plan.parts:
        for row in read_json_lines(get_part_path(folder, part.number)):
            split = row.pop("split") or next(iter(by_split), "train")
            by_split.setdefault(split, []).append(json.dumps(row))
    splits = [(split, f"split-{number}.jsonl") for number, split in enumerate(by_split)]
    for split, name in splits:
        write_text(folder / name, "".join(f"{line}\n" for line in by_split[split]))
    done = {
        "splits": splits,
        "sampling": settings.data.sampling.model_dump(mode="json"),
        "keeps_parts": True,
    }
    write_text(folder / DONE_FILE, json.dumps(done, indent=1))


def make_answer_job(settings: DumpSettings) -> dict[str, Any]:
    """Returns the job document for an answer process, as JSON values."""
    sections = {name: getattr(settings, name).model_dump(mode="json") for name in ("data", "teacher", "dump", "cache")}
    return {"run": str(settings.run), **sections}


def _read_last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "the log is empty")
