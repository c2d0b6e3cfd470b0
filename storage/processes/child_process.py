"""Runs commands, each under a supervisor that ends all processes that the command started."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from storage.processes import supervisor

GRACE_S = 8.0  # between SIGTERM and SIGKILL, for a command that has nothing to save
LAST_S = 6.0  # the same once whoever started the command is gone
POLL_S = 0.2  # an interruption that is no signal (Ray's cancel) does not end a wait
_KILL_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


def run_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Runs a command and returns its exit code: negative if a signal ended it, 127 if it cannot be started.

    If an exception interrupts the wait, the command gets SIGTERM, and `grace_s` seconds later SIGKILL with
    all its descendants (math.inf: never, for a command that saves its state and ends by itself). The
    exception is raised again once all have ended; a second interruption kills them at once. If this
    process is killed, they end within 10 s. `output`: a file for stdout and stderr.
    """
    if sys.platform != "linux":  # other systems have no subreapers
        return subprocess.run(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, check=False).returncode
    process = subprocess.Popen(
        make_supervised_command(argv, grace_s=grace_s),
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on in order
    )
    try:
        return _wait(process)
    except BaseException:
        stop_child(process, grace_s=grace_s)
        raise


def make_supervised_command(argv: Sequence[str], *, grace_s: float) -> list[str]:
    """Returns the argv that runs a command under a supervisor, whose parent is this process."""
    watching = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), str(grace_s), str(LAST_S)]
    return [*watching, *argv]


def stop_child(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """Sends a supervised command SIGTERM and waits for its end; an interruption of the wait kills it at once."""
    process.send_signal(signal.SIGTERM)
    if grace_s == math.inf:
        _log.warning("waiting until the started command has saved its state; a second signal ends it at once")
    try:
        _wait(process)
    except BaseException:
        _kill_now(process)
        raise


@contextmanager
def end_descendants_on_exit() -> Iterator[None]:
    """If this process is killed while the block runs, ends all its descendants within 10 s."""
    if sys.platform != "linux":
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__, "--watch", str(os.getpid()), str(LAST_S + 1)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def end_descendants(*, grace_s: float = 3.0) -> None:
    """Ends all descendants of this process: SIGTERM, and SIGKILL after `grace_s`. Call before exiting."""
    if sys.platform != "linux":
        return
    left = supervisor.list_descendants(os.getpid())
    supervisor.send_signal(left, signal.SIGTERM)
    supervisor.wait_for_descendants(os.getpid(), grace_s)
    supervisor.kill_descendants(os.getpid())


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _kill_now(process: subprocess.Popen[bytes]) -> None:
    """Kills the supervised command and its descendants at once."""
    below = supervisor.list_descendants(process.pid)
    supervisor.send_signal(below, signal.SIGKILL)
    try:
        process.wait(timeout=_KILL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
