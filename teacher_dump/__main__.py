"""`python -m teacher_dump [FILE] [section.field=value …]` runs the dump, here or as a submitted Ray job.

Exit codes: 0 success, 2 a user's mistake, 1 a failure, 130 or 143 after SIGINT or SIGTERM,
141 when the reader of its output has closed the pipe.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` puts the current folder first, where a user's own storage.py would hide our package.
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parent.parent:
    del sys.path[0]

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from storage.entry_point import run_command
from storage.processes.search_path import check_current_folder

if TYPE_CHECKING:  # this import takes a second, and no signal handler is installed yet
    from teacher_dump.dump import DumpResult, RetryOutcome
    from teacher_dump.settings import DumpSettings

RETRY_HELP = "retry samples that failed, after their images or rows were fixed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the dump that a YAML file describes and returns the exit code."""
    return run_command(lambda: _parse_and_dump(arguments), owns_process=arguments is None)


def _parse_and_dump(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m teacher_dump", description="Dump a teacher's signals.")
    parser.add_argument("file", nargs="?", default="pipeline.yaml", help="the experiment (pipeline.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--retry-errors", action="store_true", help=RETRY_HELP)
    parsed = parser.parse_intermixed_args(arguments)
    file, overrides = parsed.file, list(parsed.overrides)
    if "=" in file:  # only overrides were given
        file, overrides = "pipeline.yaml", [file, *overrides]
    check_current_folder()
    from teacher_dump.dump import run_dump
    from teacher_dump.settings import read_settings

    settings = read_settings(file, overrides)
    warn_of_machine(settings)
    print(format_result(run_dump(settings, retry_errors=parsed.retry_errors)), flush=True)


def warn_of_machine(settings: DumpSettings) -> None:
    """Prints on stderr which resources of this machine may run short.

    Raises ConfigError if one of them keeps a dump from starting.
    """
    from teacher_dump.execution.machine import check_dump_machine

    for line in check_dump_machine(settings):
        print(f"warning: {line}", file=sys.stderr)


def format_result(result: DumpResult) -> str:
    """Formats a dump's result for a terminal."""
    rows = [
        ("cache", result.cache),
        ("samples", f"{result.num_samples:,}"),
        ("errors", f"{result.num_errors:,}"),
        ("parts", f"{result.num_parts:,}"),
    ]
    summary, retried = result.summary, result.retried
    if retried is not None:
        rows.append(("retried", _describe_retry(retried)))
    if summary is None:
        rows.append(("written now", "nothing; the cache was complete"))
    else:
        written = f"{summary.num_parts_written:,} parts in {summary.seconds:.1f} s, once a teacher had started"
        rows.append(("written now", written))
    if summary is not None and summary.num_cut:
        rows.append(("cut", f"{summary.num_cut:,} samples were too long (data.too_long)"))
    if summary is not None and summary.num_tokens:
        rows.append(("teacher", f"{summary.num_tokens:,} tokens, {summary.tokens_per_s:,.0f} tokens/s"))
        rows.append(("memory", f"{tqdm.format_sizeof(summary.peak_memory_bytes, 'B')} at most, of one worker"))
    if summary is not None:
        rows += [(f"{count:,} errors" if count > 1 else "1 error", kind) for kind, count in summary.error_kinds.items()]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _describe_retry(retried: RetryOutcome) -> str:
    if not retried.num_failed:
        return "nothing; this plan has no failed samples"
    if not retried.num_attempted:
        return f"nothing; {retried.num_failed:,} failed samples cannot be read yet, for the same reasons as before"
    return (
        f"{retried.num_attempted:,} of {retried.num_failed:,} failed samples; {retried.num_left:,} have no record now"
    )


if __name__ == "__main__":
    sys.exit(main())
