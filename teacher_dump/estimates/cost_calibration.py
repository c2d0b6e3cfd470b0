"""Calibrates a forecast: the real teacher scores a slice of the plan, which is encoded as the dump would."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from storage.encoding.output_head import encode_head
from storage.encoding.part_encoder import PartEncoder
from storage.errors import ConfigError, StillhouseError
from storage.records.records import PartRecords, SampleError
from teacher_dump.data.partition import Part, group_by_images
from teacher_dump.data.sample import Sample, SampleRefusedError
from teacher_dump.engine_check.engine_states import EngineStates, score_slice_states
from teacher_dump.engine_check.gate import find_missing_check, save_states
from teacher_dump.engine_check.slice_choice import CheckTask
from teacher_dump.estimates.budget_choice import apply_budget
from teacher_dump.estimates.cost_model import Calibration, Forecast, SampleCounts, SliceCost, Work, forecast
from teacher_dump.execution.worker_setup import call_with_teacher, make_worker_settings
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump
from teacher_dump.prompts.data_report import DataReport, DataReporter
from teacher_dump.prompts.preparation import Preparer
from teacher_dump.settings import DumpSettings
from teacher_dump.signals.merged_records import merge_records
from teacher_dump.signals.scoring import PartScorer, ScoredPart
from teacher_dump.workers.worker import open_preparer, open_scorer, prefetch

NUM_SAMPLES = 256
_WARM_UP = 32  # samples, one call of the engine: its first calls are slow


@dataclass(frozen=True)
class SliceTask:
    """The samples that a worker scores for the calibration, and the encoder of the dump."""

    halves: tuple[Part, ...]  # no image in two of them
    encoder: PartEncoder


@dataclass(frozen=True)
class SliceResult:
    """The measurements of a SliceTask."""

    whole: SliceCost
    halves: tuple[SliceCost, ...]
    seconds: Mapping[str, float]
    total_s: float  # of the task
    errors: tuple[SampleError, ...]
    head_bytes: int


def forecast_dump(
    settings: DumpSettings, *, num_samples: int = NUM_SAMPLES, planned: DumpPlan | None = None
) -> Forecast:
    """Forecasts bytes and time of the whole dump, finished parts included. Writes nothing to the cache.

    `planned`: the plan of `settings`, if the caller has made it. If the engine has yet to be checked, it scores the
    slice of the check as well, whose states then lie in the run's folder: gate.measure_engine resumes there.
    Raises the errors of dump.run_dump, and StillhouseError if no sample can be scored.
    """
    planned = planned or plan_dump(settings)
    if not planned.plan.num_samples:
        unread = [error for part in planned.plan.parts for error in part.errors]
        raise ConfigError(f"none of the {len(unread):,} samples can be used: {unread[0]}")
    planned = apply_budget(planned, settings)
    halves = choose_halves(planned.plan.parts, num_samples)
    worker = make_worker_settings(planned, settings)
    families = ("tokens", *settings.cache.families)
    task = SliceTask(halves, PartEncoder(planned.identity, families, settings.cache.zstd_level))
    started = time.perf_counter()
    check = find_missing_check(planned, settings)
    if check is not None:
        both = (task, check.task)
        result, states = call_with_teacher(planned, settings, score_both_slices, both)
        save_states(settings.run, check, states)
    elif worker.request.needs_teacher:
        result = call_with_teacher(planned, settings, score_slice, task)
    else:
        result = score_slice(open_scorer(worker), task)
    start_s = time.perf_counter() - started - result.total_s
    if result.whole.work.samples == 0:
        reason = result.errors[0].reason if result.errors else "there are none"
        raise StillhouseError(f"none of the samples that were tried can be scored: {reason}")
    calibration = Calibration(
        counts=SampleCounts.count(sample for half in halves for sample in half.samples),
        whole=result.whole,
        halves=result.halves,
        seconds=result.seconds,
        start_s=start_s,
        num_errors=len(result.errors),
        head_bytes=result.head_bytes,
    )
    counts = SampleCounts.count(sample for part in planned.plan.parts for sample in part.samples)
    expected = forecast(calibration, counts, num_parts=len(planned.plan.parts), num_actors=settings.dump.actors.max)
    return replace(expected, data=_make_data_report(planned.plan.parts, halves, open_preparer(worker)))


def _make_data_report(parts: Sequence[Part], tried: Sequence[Part], preparer: Preparer) -> DataReport:
    watch = DataReporter()
    for sample in (sample for part in tried for sample in part.samples):
        try:
            watch.add(preparer.prepare(sample))
        except SampleRefusedError as refusal:
            watch.add_errors([SampleError(sample.id, str(refusal))])
    for part in parts:
        watch.add_errors(part.errors)
    return watch.report


def choose_halves(parts: Sequence[Part], num_samples: int) -> tuple[Part, Part]:
    """Returns two halves with at least `num_samples` samples in all (or all samples). Deterministic.

    Draws whole groups of samples that share images, as parts do, so images are shared as often as in the plan.
    """
    groups = [(part, group) for part in parts for group in group_by_images(part.samples)]
    halves: tuple[list[Sample], list[Sample]] = ([], [])
    for place in np.random.default_rng(0).permutation(len(groups)).tolist():
        if len(halves[0]) + len(halves[1]) >= num_samples:
            break
        part, group = groups[place]
        min(halves, key=len).extend(part.samples[member] for member in group)
    return Part(0, tuple(halves[0])), Part(1, tuple(halves[1]))


def score_slice(scorer: PartScorer, task: SliceTask) -> SliceResult:
    """Scores and encodes both halves concurrently, as a worker does; then encodes both as one part."""
    started = time.perf_counter()
    samples = [sample for half in task.halves for sample in half.samples]
    if scorer.teacher is not None:
        scorer.score(Part(0, tuple(samples[:_WARM_UP])))
    before = time.perf_counter()
    scorer.prepare(samples)
    prompts_s = time.perf_counter() - before
    before = time.perf_counter()
    scored, halves = _score_concurrently(scorer, task)
    scoring_s = time.perf_counter() - before
    records = [each.records for each in scored]
    before = time.perf_counter()
    whole = _measure_slice(merge_records(records), sum(each.num_tokens for each in scored), task.encoder)
    encoding_s = time.perf_counter() - before
    seconds = {"prompts": prompts_s, "encoding": encoding_s, "scoring": scoring_s}
    errors = tuple(error for each in records for error in each.errors)
    head_bytes = 0
    if scorer.teacher is not None and "hidden" in task.encoder.families:
        head_bytes = len(encode_head(scorer.teacher.head.stored()))
    return SliceResult(whole, halves, seconds, time.perf_counter() - started, errors, head_bytes)


def score_both_slices(scorer: PartScorer, both: tuple[SliceTask, CheckTask]) -> tuple[SliceResult, EngineStates]:
    """Returns the result of `score_slice`, and the engine's states of the slice of the engine check."""
    started = time.perf_counter()
    states = score_slice_states(scorer, both[1])
    check_s = time.perf_counter() - started
    result = score_slice(scorer, both[0])
    return replace(result, total_s=result.total_s + check_s), states


def _score_concurrently(scorer: PartScorer, task: SliceTask) -> tuple[list[ScoredPart], tuple[SliceCost, ...]]:
    """Scores each half while one thread prepares the next samples and another encodes the half before."""
    with ThreadPoolExecutor(1) as preparing, ThreadPoolExecutor(1) as encoding:
        prepared = [prefetch(scorer.prepare_chunks(half), preparing) for half in task.halves]
        scored: list[ScoredPart] = []
        slices: list[Future[SliceCost]] = []
        for half, chunks in zip(task.halves, prepared, strict=True):
            scored.append(scorer.score(half, chunks))
            slices.append(encoding.submit(_measure_slice, scored[-1].records, scored[-1].num_tokens, task.encoder))
        return scored, tuple(each.result() for each in slices)


def _measure_slice(records: PartRecords, num_tokens: int, encoder: PartEncoder) -> SliceCost:
    family_bytes = {family: len(encoder.to_parquet(family, rows)) for family, rows in encoder.encode(records).items()}
    images = {image.key: image.num_visual_tokens for record in records.tokens for image in record.images}
    text_tokens = sum(len(record.token_ids) for record in records.tokens)
    work = Work(
        samples=len(records.tokens),
        text_tokens=text_tokens,
        visual_tokens=max(num_tokens - text_tokens, 0),
        response_rows=sum(record.num_response_tokens for record in records.tokens),
        visual_rows=sum(images.values()),
        images=len(images),
    )
    return SliceCost(work, family_bytes)
