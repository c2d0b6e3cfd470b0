"""The engine check: two processes one after the other, and what a dump may do with the result.

The engine scores a slice of the samples and its states go to the disk; then transformers scores the same samples in
the teacher's dtype, and compares. So a teacher never stands twice in memory. A check that was stopped in between
resumes from the states on disk, if what they hold for is the same; they are removed at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from storage.backends.lock import hold_lock
from storage.errors import ConfigError, StillhouseError
from storage.identity import NO_TEACHER
from storage.layout.documents import EngineCheckEntry
from storage.layout.error_summaries import summarize_errors
from storage.records.records import SampleError
from teacher_dump.engine_check.record import (
    ALL,
    RECORD_FILE,
    EngineCheckRecord,
    Figure,
    RefusedSample,
    Refuser,
    explain_failure,
    explain_staleness,
    format_record,
    make_check_identity,
    make_manifest_entry,
    read_record,
    write_record,
)
from teacher_dump.engine_check.slice_choice import KINDS, CheckTask, Kind, choose_slice, classify_sample
from teacher_dump.execution.worker_setup import call_with_teacher
from teacher_dump.planning.dump_plan import DumpPlan
from teacher_dump.settings import DumpSettings
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers.architectures import read_engine_support

if TYPE_CHECKING:  # these import torch, which a dump over a complete cache does not need
    from teacher_dump.engine_check.engine_states import EngineStates
    from teacher_dump.engine_check.model_comparison import ModelComparison

STATES_FOLDER = "engine_check"  # of the run, while a check is unfinished
_STATES_FILE = "states.safetensors"
_log = logging.getLogger(__name__)


class CallTeacher(Protocol):
    """Calls a function with a loaded teacher in a process of its own; see worker_setup.call_with_teacher."""

    def __call__(
        self,
        planned: DumpPlan,
        settings: DumpSettings,
        function: Callable[..., Any],
        argument: Any,
        *,
        is_reference: bool = False,
    ) -> Any: ...


@dataclass(frozen=True)
class CheckPlan:
    """What a check of this dump scores, and what is known already."""

    task: CheckTask
    identity: dict[str, Any]
    key: str  # of the states on disk
    record: EngineCheckRecord | None  # that holds for this dump; None if there is none
    stale: tuple[str, ...]  # why the record that is there does not hold

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of samples that the dump has."""
        found = {classify_sample(sample) for sample in self.task.samples}
        return tuple(kind for kind in KINDS if kind in found)


def has_engine(planned: DumpPlan, settings: DumpSettings) -> bool:
    """Whether a dump has an engine that may differ from the model: not without a teacher, nor with transformers."""
    return settings.teacher.backend != "transformers" and planned.identity.teacher_fingerprint != NO_TEACHER


def plan_check(planned: DumpPlan, settings: DumpSettings) -> CheckPlan:
    """Chooses the slice and reads the record of the run's folder."""
    samples = choose_slice(
        (sample for part in planned.plan.parts for sample in part.samples), settings.check.engine_samples
    )
    families = settings.cache.families
    task = CheckTask(samples, settings.cache.relation.centered if "relation" in families else None)
    identity = make_check_identity(planned, settings)
    record = read_record(settings.run / RECORD_FILE)
    scored = [identity, planned.identity.image_root, task.relation_centered, [one.as_json() for one in samples]]
    key = hashlib.sha256(json.dumps(scored, sort_keys=True).encode()).hexdigest()
    plan = CheckPlan(task, identity, key, record, ())
    stale = () if record is None else tuple(explain_staleness(record, identity, plan.kinds, families))
    return CheckPlan(task, identity, key, None if stale else record, stale)


def find_check_failures(record: EngineCheckRecord, plan: CheckPlan, settings: DumpSettings) -> list[str]:
    """Returns one line for each difference beyond check.max_engine_kl; empty if the check passed."""
    return explain_failure(record, plan.kinds, settings.cache.families, limit=settings.check.max_engine_kl)


def measure_engine(
    planned: DumpPlan,
    settings: DumpSettings,
    *,
    call: CallTeacher = call_with_teacher,
    notify: Callable[[str], None] = _log.info,
) -> EngineCheckRecord:
    """Compares the engine with the model and writes the record; returns an earlier one that holds and has passed.

    Reports the figures. Raises StillhouseError if the two cannot be compared; `refuse_difference` judges the record.
    """
    settings.run.mkdir(parents=True, exist_ok=True)
    with hold_lock(settings.run / "engine_check.lock", f"the engine check of {settings.run}"):
        plan, path = plan_check(planned, settings), settings.run / RECORD_FILE
        if not plan.task.samples:
            raise ConfigError("data.sources: has no sample that the engine could be checked with")
        if plan.stale:
            notify("\n  ".join([f"engine: {path} holds for another identity and is made again:", *plan.stale]))
        record = plan.record
        if record is not None and not find_check_failures(record, plan, settings):
            notify(f"engine: checked before, for the same identity ({path}):")
        else:
            states = _read_or_compute_states(planned, settings, plan, call=call, notify=notify)
            notify(f"engine: transformers scores the same samples in {planned.identity.dtype.split()[0]}")
            record = _compare(planned, settings, plan, states, call=call)
            write_record(path, record)
            remove_states(settings.run)
    for line in format_record(record):
        notify(line)
    return record


def refuse_difference(record: EngineCheckRecord, planned: DumpPlan, settings: DumpSettings) -> None:
    """Raises StillhouseError if engine and model differ by more than check.max_engine_kl."""
    _refuse(find_check_failures(record, plan_check(planned, settings), settings), settings.run / RECORD_FILE)


def _refuse(failures: Sequence[str], path: Path) -> None:
    if failures:
        raise StillhouseError(
            f"the engine does not say what the model says ({path}):"
            + "".join(f"\n  {line}" for line in failures)
            + "\nset teacher.backend: transformers, or find the version or setting of the engine that changes its "
            "outputs; until then no dump of this teacher starts (dump.engine_check: false starts one nevertheless, "
            "which its manifest then says)"
        )


def require_engine_check(planned: DumpPlan, settings: DumpSettings) -> EngineCheckEntry | None:
    """Returns what the manifest of a dump says of its engine; None if the engine was not checked and need not be.

    Raises ConfigError if vLLM is untested with the teacher's architecture and no check holds for this dump;
    StillhouseError if a check that holds has failed. With dump.engine_check: false it raises neither.
    """
    if not has_engine(planned, settings):
        return None
    path, is_required = settings.run / RECORD_FILE, settings.dump.engine_check
    support = read_engine_support(checkpoint.read_json(planned.checkpoint / "config.json"))
    if not path.is_file() and (support.state == "tested" or not is_required):  # the samples need not be read again
        return None if is_required else make_manifest_entry(None, limit=0.0, is_on=False)
    plan, limit = plan_check(planned, settings), settings.check.max_engine_kl
    if not is_required:
        return make_manifest_entry(plan.record, limit=limit, is_on=False)
    if plan.record is not None:
        _refuse(find_check_failures(plan.record, plan, settings), path)
        return make_manifest_entry(plan.record, limit=limit, is_on=True)
    if support.state == "tested":
        return None
    why = f"{path} holds for another identity:" if plan.stale else f"there is no {path}"
    raise ConfigError(
        f"teacher.model: a {support.model_type or 'model without model_type'} is untested in vLLM ({support.reason}), "
        "so this dump needs a passed engine check: "
        + "\n  ".join([why, *plan.stale])
        + "\nrun `stillhouse check --engine FILE` with the same file and overrides, which compares the engine with "
        "transformers on a few samples; or set teacher.backend: transformers; or dump.engine_check: false, which "
        "starts without and which the cache's manifest then says"
    )


def find_missing_check(planned: DumpPlan, settings: DumpSettings) -> CheckPlan | None:
    """Returns the check that a dump still lacks: for an engine that may differ, unless dump.engine_check is false.

    None if it passed for the same identity, or if the engine's states are on disk already.
    """
    if not has_engine(planned, settings) or not settings.dump.engine_check:
        return None
    plan = plan_check(planned, settings)
    if plan.record is not None and not find_check_failures(plan.record, plan, settings):
        return None
    from teacher_dump.engine_check.engine_states import read_states

    return plan if read_states(get_states_path(settings.run), plan.key) is None else None


def save_states(run: Path, plan: CheckPlan, states: EngineStates) -> None:
    """Keeps the engine's states in the run's folder until the check is finished."""
    from teacher_dump.engine_check.engine_states import write_states

    remove_states(run)
    write_states(get_states_path(run), plan.key, states)


def get_states_path(run: Path) -> Path:
    """Returns the path of the engine's states while a check is unfinished."""
    return run / STATES_FOLDER / _STATES_FILE


def remove_states(run: Path) -> None:
    """Removes the states on disk, and what a killed process has left beside them."""
    shutil.rmtree(run / STATES_FOLDER, ignore_errors=True)


def _read_or_compute_states(
    planned: DumpPlan,
    settings: DumpSettings,
    plan: CheckPlan,
    *,
    call: CallTeacher,
    notify: Callable[[str], None],
) -> EngineStates:
    from teacher_dump.engine_check.engine_states import read_states, score_slice_states

    path = get_states_path(settings.run)
    states = read_states(path, plan.key)
    if states is not None:
        notify(f"engine: resumes from the engine's states in {path}")
        return states
    notify(f"engine: {planned.identity.engine} scores {len(plan.task.samples)} samples")
    states = call(planned, settings, score_slice_states, plan.task)
    save_states(settings.run, plan, states)
    return states


def _compare(
    planned: DumpPlan, settings: DumpSettings, plan: CheckPlan, states: EngineStates, *, call: CallTeacher
) -> EngineCheckRecord:
    from teacher_dump.engine_check.model_comparison import compare_with_model

    compared: ModelComparison = call(planned, settings, compare_with_model, (plan.task, states), is_reference=True)
    if compared.problem:
        remove_states(settings.run)
        raise StillhouseError(f"the engine cannot be compared with the model: {compared.problem}")
    kinds = {sample.id: classify_sample(sample) for sample in plan.task.samples}
    ids = {one.sample_id for one in compared.distances}
    found: list[tuple[Refuser, Sequence[SampleError]]] = [
        ("data", states.unusable), ("engine", states.errors), ("model", compared.errors)
    ]  # fmt: skip
    refused = [
        RefusedSample(sample_id=error.sample_id, kind=kinds[error.sample_id], by=by, reason=error.reason)
        for by, errors in found
        for error in errors
    ]
    return EngineCheckRecord(
        identity=plan.identity,
        num_samples={kind: sum(kinds[one] == kind for one in ids) for kind in plan.kinds},
        figures=tuple(_summarize(compared)),
        refused=tuple(refused),
        engine_device=states.device,
        model_device=compared.device,
    )


def _summarize(compared: ModelComparison) -> list[Figure]:
    """Summarizes the distances of all samples, and of each kind, by family and measure."""
    figures = []
    for family, measure in dict.fromkeys((one.family, one.measure) for one in compared.distances):
        some = [one for one in compared.distances if (one.family, one.measure) == (family, measure)]
        for kind in (ALL, *KINDS):
            values = [one.values for one in some if kind in (ALL, one.kind)]
            joined = np.concatenate(values).tolist() if values else []
            if joined:
                figures.append(Figure(family=family, kind=kind, summary=summarize_errors(measure, joined)))
    return figures
