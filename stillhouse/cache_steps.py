"""Two steps of an experiment: a dump in this process, and the scan of a sealed cache, which the ledger records."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.cache_scan import scan_with_progress
from stillhouse.config import Experiment
from stillhouse.ledger import Ledger, fingerprint_cache
from storage.errors import StillhouseError
from teacher_dump.__main__ import format_result
from teacher_dump.dump import run_dump
from teacher_dump.engine_check.gate import has_engine, measure_engine, plan_check
from teacher_dump.execution.machine import is_sealed, needs_teacher
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import DumpSettings, read_settings
from teacher_dump.teachers.architectures import read_engine_support
from teacher_dump.teachers.hf_checkpoint import read_json, resolve_checkpoint


def dump_cache(experiment: Experiment, overrides: Sequence[str] = ()) -> None:
    """Runs the dump in this process and prints its result; the engine check first, where no dump starts without it."""
    settings = read_settings(experiment.path, (*experiment.overrides, *overrides))
    _check_untested_engine(settings)
    print_now(format_result(run_dump(settings)))


def _check_untested_engine(settings: DumpSettings) -> None:
    """Compares engine and model if vLLM is untested with the teacher's architecture. The dump judges the figures."""
    teacher = settings.teacher
    wanted = teacher.backend == "vllm" and settings.dump.engine_check and needs_teacher(settings)
    if not wanted or is_sealed(settings.cache.path):
        return
    folder = resolve_checkpoint(teacher.model, teacher.revision, with_weights=False)
    if read_engine_support(read_json(folder / "config.json")).state == "untested":
        planned = plan_dump(settings)
        if has_engine(planned, settings) and plan_check(planned, settings).record is None:
            measure_engine(planned, settings, notify=print_now)


def verify_cache(path: str, ledger: Ledger, *, step: str = "verify") -> None:
    """Scans the sealed cache unless it was scanned before. StillhouseError lists the problems."""
    inputs = {"manifest": fingerprint_cache(path)}
    if ledger.is_done(step, inputs, []):
        return print_now(f"cache: verified already, {path}")
    report = scan_with_progress(path)
    if not report.ok:
        raise StillhouseError(f"{path} does not verify:\n  " + "\n  ".join(report.problems))
    ledger.record(step, inputs)
    return print_now(f"cache: verified, {path}")


def print_now(text: str) -> None:
    """Prints a line that is seen at once, wherever the output goes."""
    print(text, flush=True)
