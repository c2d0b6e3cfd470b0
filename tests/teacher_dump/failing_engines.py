"""Engines that fail, and a script that dumps with them: `python -m tests.teacher_dump.failing_engines CONFIG KIND`."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence

import torch

from storage.errors import StillhouseError
from storage.writer.cache_writer import CacheWriter
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.ray_jobs import PartPool, score_parts
from teacher_dump.settings import read_settings
from teacher_dump.teachers.teacher import Teacher, TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from teacher_dump.workers.worker import WorkerSettings


class FailingEngine:
    """An engine whose device fails from one call on, until its process ends."""

    def __init__(self, engine: Teacher, *, healthy_calls: int) -> None:
        self._engine = engine
        self._left = healthy_calls

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        if self._left == 0:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        self._left -= 1
        return self._engine.hidden_states(prompts)


def _reference(settings: WorkerSettings) -> Teacher:
    return TransformersTeacher(settings.checkpoint, dtype="float32", image_token_id=299, settings={})


def fails_from_the_third_call(settings: WorkerSettings) -> Teacher:
    return FailingEngine(_reference(settings), healthy_calls=2)


def always_fails(settings: WorkerSettings) -> Teacher:
    return FailingEngine(_reference(settings), healthy_calls=0)


ENGINES: dict[str, Callable[[WorkerSettings], Teacher]] = {
    "third": fails_from_the_third_call,
    "always": always_fails,
}


def main(config: str, kind: str) -> None:
    settings = read_settings(config)
    planned = plan_dump(settings)
    cache = settings.cache
    writer = CacheWriter.open(cache.path, planned.identity, cache.families, append=False, zstd_level=cache.zstd_level)
    scoring = score_parts(
        list(planned.plan.parts),
        make_worker_settings(planned, settings),
        pool=PartPool(min_actors=1, max_actors=1, num_cpus=1, num_gpus=0),
        committed=writer.committed_parts,
        stop=threading.Event(),
        logs=settings.logs,
        notify=lambda message: None,
        open_engine=ENGINES[kind],
    )
    failure = ""
    try:
        for _ in scoring:
            pass
    except StillhouseError as error:
        failure = str(error)
    print(json.dumps({"failure": failure, "parts": sorted(writer.committed_parts())}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
