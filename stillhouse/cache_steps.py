"""Two steps of an experiment: a dump in this process, and the scan of a sealed cache, which the ledger records."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.cache_scan import scan_with_progress
from stillhouse.config import Experiment
from stillhouse.ledger import Ledger, fingerprint_cache
from storage.errors import StillhouseError
from teacher_dump.__main__ import format_result
from teacher_dump.dump import run_dump
from teacher_dump.settings import read_settings


def dump_cache(experiment: Experiment, overrides: Sequence[str] = ()) -> None:
    """Runs the dump in this process and prints its result."""
    print_now(format_result(run_dump(read_settings(experiment.path, (*experiment.overrides, *overrides)))))


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
