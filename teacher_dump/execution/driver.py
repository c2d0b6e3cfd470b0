"""Writes the parts that a cache lacks, in this process or by Ray's actors, with one progress line."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from storage.processes.stop_signals import hold_signals
from teacher_dump.config import DumpSection
from teacher_dump.data.partition import Part
from teacher_dump.workers.log_file import log_output
from teacher_dump.workers.progress import Progress

if TYPE_CHECKING:  # these import torch
    from teacher_dump.workers.worker import PartOutcome, WorkerSettings

LOG_FILE = "dump.log"
_BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} samples{postfix}"
_TERMINAL_S, _LOG_S = 0.5, 30.0  # between two progress lines: a terminal overwrites its line, a log grows


def write_parts(
    parts: Sequence[Part],
    worker: WorkerSettings,
    *,
    dump: DumpSection,
    run: Path,
    committed: Callable[[], Collection[int]],
    max_errors: float,
    progress: bool,
) -> tuple[Progress, int | None]:
    """Scores and commits parts in any order; returns the progress, and the signal that stopped it, if any.

    `committed` tells which parts have their commits. Ends early when more than `max_errors` samples have failed.
    Output that libraries print goes to the log files in the run's folder.
    """
    sizes = {part.number: len(part.samples) for part in parts}
    so_far = Progress(num_samples_planned=sum(sizes.values()), num_parts_planned=len(parts))
    with hold_signals() as held, log_output(run / "logs" / LOG_FILE) as screen:
        if progress:
            print(f"dump: logs are in {run / 'logs'}", file=screen)
        interval = _TERMINAL_S if screen.isatty() else _LOG_S
        bar = tqdm(
            total=so_far.num_samples_planned, desc="dump", file=screen, disable=not progress, bar_format=_BAR,
            mininterval=interval, maxinterval=interval,
        )  # fmt: skip
        if worker.request.needs_teacher:
            outcomes = _run_by_ray(
                parts, worker, so_far, dump=dump, run=run, committed=committed, stop=held.event, screen=screen
            )
        else:
            outcomes = _run_here(parts, worker, held.event)
        with closing(outcomes), bar:
            for outcome in outcomes:
                so_far.add(outcome)
                bar.set_postfix_str(so_far.line(), refresh=False)
                bar.update(sizes[outcome.part])
                if so_far.num_errors > max_errors:
                    break
        return so_far, held.number


def _run_here(
    parts: Sequence[Part], worker: WorkerSettings, stop: threading.Event
) -> Generator[PartOutcome, None, None]:
    """Yields the outcomes of parts that this process writes."""
    from teacher_dump.workers.worker import Worker

    local_worker = Worker(worker)
    for part in parts:
        if stop.is_set():
            return
        yield local_worker.run(part)


def _run_by_ray(
    parts: Sequence[Part],
    worker: WorkerSettings,
    so_far: Progress,
    *,
    dump: DumpSection,
    run: Path,
    committed: Callable[[], Collection[int]],
    stop: threading.Event,
    screen: TextIO,
) -> Generator[PartOutcome, None, None]:
    """Yields the outcomes of Ray's actors. Parts are shuffled, so two jobs on one cache rarely do the same part."""
    from teacher_dump import ray_jobs

    scoring = ray_jobs.score_parts(
        random.sample(parts, len(parts)),
        worker,
        pool=ray_jobs.PartPool(
            min_actors=dump.actors.min,
            max_actors=dump.actors.max,
            num_cpus=dump.cpus_per_actor,
            num_gpus=dump.gpus_per_actor,
            address=dump.ray_address,
        ),
        committed=committed,
        stop=stop,
        logs=run / "logs",
        notify=lambda message: print(f"dump: {message}", file=screen),
    )
    metrics: ray_jobs.DumpMetrics | None = None
    with closing(scoring):
        for outcome in scoring:
            yield outcome
            metrics = metrics or ray_jobs.DumpMetrics(run.name)  # Ray is connected by now
            metrics.show(so_far)
