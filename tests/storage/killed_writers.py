"""Forks writer processes and kills them after a given time; the parent imports everything once.

python -m tests.storage.killed_writers FOLDER reads one number of seconds per line, lets a writer write to
FOLDER/<round> for that long, kills it with SIGKILL and prints `killed`, or prints `done` as soon as the
writer has finished. After `done` the next round begins. The parent uses no Arrow, whose threads would not
survive a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import FAMILIES, make_identity, make_part

NUM_PARTS = 4
NUM_APPENDED = 2
ADDED = ("visual", "relation")


def grow(folder: str | Path) -> None:
    """Writes the missing parts of a cache: one family, then two more families, then more samples."""
    plan = {"plan_fingerprint": "f", "num_parts": NUM_APPENDED}
    for families, identity, first, append in (
        (("response",), make_identity(num_parts=NUM_PARTS), 0, False),
        (FAMILIES, make_identity(num_parts=NUM_PARTS), 0, False),
        (FAMILIES, make_identity(**plan), NUM_PARTS, True),
    ):
        writer = CacheWriter.open(folder, identity, families, append=append)
        for part in sorted(set(range(writer.segment.num_parts)) - writer.committed_parts()):
            writer.write_part(part, make_part(first + part, families=writer.segment.families))
        writer.seal()


def main(folder: Path) -> None:
    number = 0
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            grow(folder / str(number))
            os._exit(0)
        status = _wait(child, float(line))
        if os.WIFSIGNALED(status):
            answer = "killed"
        else:
            assert os.WEXITSTATUS(status) == 0
            answer, number = "done", number + 1
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _wait(child: int, limit_s: float) -> int:
    """Returns the wait status of a child that ended or was killed when its time was over."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
