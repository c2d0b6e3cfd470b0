"""Log files: what engines and clusters print goes there, by file descriptor, so that C++ and children go too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from storage.backends.disk import explain_write_errors
from storage.processes.waiting import send_notices_to


def send_output_to(path: Path) -> None:
    """Append this process's stdout and stderr to a file from now on."""
    descriptor = _open(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextmanager
def quiet(path: Path) -> Iterator[TextIO]:
    """Append stdout and stderr to a file while the block runs; gives a stream to the original stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    descriptor = _open(path)
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
            with suppress(OSError):  # a log on a full disk; the terminal must come back all the same
                stream.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for opened in (*saved, descriptor):
            os.close(opened)


def _open(path: Path) -> int:
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
