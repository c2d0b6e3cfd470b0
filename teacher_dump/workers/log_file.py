"""Redirects output to log files, by file descriptor, so that output of C++ and child processes goes there, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from storage.backends.disk import explain_write_errors
from storage.processes.waiting import send_notices_to


def redirect_output(path: Path) -> None:
    """Appends this process's stdout and stderr to a file from now on."""
    descriptor = _open_log(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextmanager
def log_output(path: Path) -> Iterator[TextIO]:
    """Appends stdout and stderr to a file while the block runs; yields a stream to the original stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    descriptor = _open_log(path)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        with (
            os.fdopen(os.dup(saved[1]), "w", buffering=1, encoding="utf-8", errors="replace") as screen,
            send_notices_to(lambda notice: print(notice, file=screen)),
        ):
            yield screen
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the log's disk may be full; the terminal must be restored
                stream.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for opened in (*saved, descriptor):
            os.close(opened)


def _open_log(path: Path) -> int:
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
