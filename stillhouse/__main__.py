"""The command `stillhouse`, the same as `python -m stillhouse`.

Exit codes: 0 success; 2 a user's mistake, explained in one message; 1 a failure; 130 after SIGINT and 143 after
SIGTERM, when every process that the verb started has ended; 141 if the reader of the output has closed it.

What a verb does is in stillhouse/verbs.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` puts the current folder first, where a user's own storage.py would shadow our package.
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parent.parent:
    del sys.path[0]

import argparse
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from stillhouse.verbs.command_line import build_parser, parse_overrides
from storage.entry_point import run_command
from storage.processes.search_path import check_current_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. Without `argv` the verb owns this process, and a signal ends it."""
    return run_command(
        lambda: _run_verb(argv), owns_process=argv is None, prefix="stillhouse: ", stop_prefix="stillhouse: "
    )


def _run_verb(argv: Sequence[str] | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # or a terminal that is not UTF-8 raises an error
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    check_current_folder()
    parse_overrides(arguments, rest)
    with _reserve_stdout(arguments):
        arguments.run(arguments)
    sys.stdout.flush()


@contextmanager
def _reserve_stdout(arguments: argparse.Namespace) -> Iterator[None]:
    """Sets `arguments.output` to stdout. With --json all other output, of C++ and children too, goes to stderr."""
    arguments.output = sys.stdout
    if not getattr(arguments, "json", False):
        yield
        return
    sys.stdout.flush()
    if sys.stdout is not sys.__stdout__:  # an object without a file descriptor, as in tests
        with redirect_stdout(sys.stderr):
            yield
        return
    stdout, stderr = sys.stdout.fileno(), sys.stderr.fileno()
    with os.fdopen(os.dup(stdout), "w", encoding="utf-8") as arguments.output:
        os.dup2(stderr, stdout)
        try:
            yield
        finally:
            sys.stdout.flush()
            arguments.output.flush()
            os.dup2(arguments.output.fileno(), stdout)


if __name__ == "__main__":
    sys.exit(main())
