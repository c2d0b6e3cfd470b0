"""Makes the settings of a planned dump's workers, and calls a function in a single worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from storage.backends.folder import is_url
from storage.config import CacheSection
from storage.encoding.hidden_states import MAX_FLOAT16
from storage.encoding.tail_profile import select_tail_parts
from storage.identity import Identity, stored_draw_sets, stored_seed, stored_selection, stored_temperatures
from storage.records.records import SampleError
from teacher_dump.data.sample import SampleRefusedError
from teacher_dump.execution.driver import LOG_FILE
from teacher_dump.planning.dump_plan import DumpPlan
from teacher_dump.settings import DumpSettings
from teacher_dump.workers.log_file import log_output

if TYPE_CHECKING:  # these import torch, which a dump over a complete cache does not need
    from teacher_dump.prompts.data_report import DataReport
    from teacher_dump.signals.scoring import PartScorer
    from teacher_dump.signals.spec import RowRequest, SignalRequest
    from teacher_dump.workers.worker import WorkerSettings

A = TypeVar("A")
B = TypeVar("B")


def make_worker_settings(planned: DumpPlan, settings: DumpSettings) -> WorkerSettings:
    """Returns the settings of each worker of a planned dump."""
    from teacher_dump.signals.vision_check import choose_check_samples
    from teacher_dump.workers.worker import WorkerSettings

    cache, teacher = settings.cache, settings.teacher
    samples = (sample for part in planned.plan.parts for sample in part.samples)
    return WorkerSettings(
        checkpoint=planned.checkpoint,
        backend=teacher.backend,
        dtype=planned.identity.dtype.split()[0],
        max_length=planned.max_length,
        engine_settings=dict(teacher.settings),
        served=(settings.run / "served").resolve(),
        facts=planned.facts,
        image_root=Path(planned.identity.image_root),
        request=_make_signal_request(settings, planned.identity),
        cache=_make_absolute(cache.path),
        identity=planned.identity,
        families=cache.families,
        append=cache.append,
        zstd_level=cache.zstd_level,
        rows_per_chunk=settings.dump.rows_per_chunk,
        check_samples=choose_check_samples(samples, settings.dump.blind_check_samples),
        too_long=settings.data.too_long,
        template_arguments=dict(teacher.chat_template_arguments),
    )


def call_with_teacher(
    planned: DumpPlan,
    settings: DumpSettings,
    function: Callable[[PartScorer, A], B],
    argument: A,
    *,
    request: SignalRequest | None = None,
    is_reference: bool = False,
) -> B:
    """Calls `function(scorer, argument)` in one actor with its teacher loaded. See ray_jobs.call_with_teacher.

    `request` replaces the signals of the dump. `is_reference`: transformers loads the teacher in the place of the
    engine, in the same dtype and with as many GPUs.
    """
    from teacher_dump import ray_jobs

    worker, dump = make_worker_settings(planned, settings), settings.dump
    if request is not None:
        worker = replace(worker, request=request)
    if is_reference:
        worker = make_reference_settings(worker)
    with log_output(settings.logs / LOG_FILE):
        return ray_jobs.call_with_teacher(
            worker,
            function,
            argument,
            num_cpus=dump.cpus_per_actor,
            num_gpus=dump.gpus_per_actor,
            address=dump.ray_address,
            logs=settings.logs,
        )


def make_reference_settings(worker: WorkerSettings) -> WorkerSettings:
    """Returns the settings of a worker whose teacher transformers loads, beside an engine of the same settings.

    It does without the vision check, which the engine has passed. Its GPUs are all of one node.
    """
    from teacher_dump.workers.worker import REFERENCE

    own = {name: value for name, value in worker.engine_settings.items() if name != "distributed_executor_backend"}
    return replace(worker, backend=REFERENCE, engine_settings=own, check_samples=())


def list_prompt_errors(settings: DumpSettings, planned: DumpPlan, *, progress: bool = True) -> list[SampleError]:
    """Returns every row of the sources that a dump would count as an error. See `inspect_data`."""
    return inspect_data(settings, planned, progress=progress)[0]


def inspect_data(
    settings: DumpSettings, planned: DumpPlan, *, progress: bool = True
) -> tuple[list[SampleError], DataReport]:
    """Returns the rows that a dump would count as errors, and a report of unusual data; needs no teacher.

    Builds all prompts and decodes all images: a few milliseconds a sample.
    """
    from teacher_dump.prompts.data_report import DataReporter
    from teacher_dump.workers.worker import open_preparer

    preparer = open_preparer(make_worker_settings(planned, settings))
    errors = [error for part in planned.plan.parts for error in part.errors]
    samples = (sample for part in planned.plan.parts for sample in part.samples)
    total = planned.plan.num_samples
    watch = DataReporter()
    for sample in tqdm(samples, total=total, unit=" samples", desc="prompts", disable=not progress, leave=False):
        try:
            watch.add(preparer.prepare(sample))
        except SampleRefusedError as refusal:
            errors.append(SampleError(sample.id, str(refusal)))
    watch.add_errors(errors)
    return errors, watch.report


def _make_absolute(path: str) -> str:
    """Makes a cache's path absolute, for processes that may run in another folder."""
    return path if is_url(path) else str(Path(path).resolve())


def _make_signal_request(settings: DumpSettings, identity: Identity) -> SignalRequest:
    from teacher_dump.signals.spec import SignalRequest

    cache = settings.cache
    return SignalRequest(
        response=_make_row_request(identity, "response") if "response" in cache.families else None,
        visual=_make_row_request(identity, "visual") if "visual" in cache.families else None,
        relation_centered=cache.relation.centered if "relation" in cache.families else None,
        relation_pool=cache.relation.pool if "relation" in cache.families else None,
        hidden_limit=_get_hidden_limit(cache) if "hidden" in cache.families else None,
        sequence="sequence" in cache.families,
        images="images" in cache.families,
        measured_parts=frozenset(select_tail_parts(identity.num_parts)),
    )


def _get_hidden_limit(cache: CacheSection) -> float:
    return MAX_FLOAT16 if cache.hidden.encoding == "float16" else math.inf


def _make_row_request(identity: Identity, family: str) -> RowRequest:
    from teacher_dump.signals.spec import RowRequest

    selection = stored_selection(identity, family)
    assert selection is not None
    return RowRequest(
        selection,
        stored_seed(identity, family),
        stored_temperatures(identity, family),
        stored_draw_sets(identity, family),
    )
