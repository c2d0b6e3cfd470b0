"""Ends a command: what went wrong becomes one message on stderr and the exit code that belongs to it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from storage.errors import ConfigError, StillhouseError
from storage.processes.standard_streams import drop_output, open_closed_streams
from storage.processes.stop_signals import (
    describe_interruption,
    exit_now,
    exit_on_signals,
    get_exit_code,
    interruptible,
)

PIPE_CLOSED = 141  # 128 + SIGPIPE, the code that a shell gives
Work = Callable[[], None]


def run_command(
    work: Work,
    *,
    owns_process: bool = False,
    prefix: str = "error: ",
    stop_prefix: str = "",
    is_shown: Callable[[BaseException], bool] = lambda _: True,
) -> int:
    """Runs a command's work and returns its exit code: 0; 2 for a user's mistake; 1; 130 or 143; 141.

    SIGTERM and SIGINT interrupt the work. With `owns_process` this process belongs to the command alone: it
    adopts orphans, and a signal ends it at once with everything below it. `is_shown` says of a StillhouseError
    or an interruption whether this process reports it, as one of several ranks.
    """
    if owns_process:
        open_closed_streams()
    try:
        with interruptible(adopt=owns_process):
            code = _run_reporting(work, prefix, is_shown)
    except KeyboardInterrupt as stop:
        if is_shown(stop):
            sys.stderr.write(f"{stop_prefix}{describe_interruption(stop)}\n")
        if owns_process:
            exit_now(get_exit_code(stop))
        return get_exit_code(stop)
    if owns_process:
        exit_on_signals(code)
    return code


def _run_reporting(work: Work, prefix: str, is_shown: Callable[[BaseException], bool]) -> int:
    try:
        work()
    except BrokenPipeError:  # the reader has ended, such as `head`
        drop_output(sys.stdout, sys.stderr)
        return PIPE_CLOSED
    except StillhouseError as error:
        if is_shown(error):
            sys.stderr.write(f"{prefix}{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        from storage.backends.disk import report_full_disk  # 60 ms, for errors alone

        code = report_full_disk(error, prefix=prefix)
        drop_output(sys.stdout)  # the rest would fail again if it goes to that disk
        return code
    return 0
