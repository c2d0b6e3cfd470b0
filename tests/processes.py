"""The processes that a command has started, in whatever session: they inherit a mark in their environment.

A process that clears its environment is not found; none of ours does.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "STILLHOUSE_TESTMARK"


@dataclass(frozen=True)
class MarkedCommand:
    """A running command whose processes can be told from all others."""

    process: subprocess.Popen[str]
    mark: str
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Command lines of living processes that the command or its descendants have started, by process id."""
        return marked_processes(self.mark)

    def wait(self, timeout_s: float = 400) -> int:
        return self.process.wait(timeout=timeout_s)

    def wait_until_gone(self, patience_s: float) -> dict[int, str]:
        """Returns what is left after so many seconds: nothing, one hopes."""
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.05)
        return left

    def kill(self) -> None:
        """SIGKILL to whatever is left, for the end of a test."""
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()
            time.sleep(0.02)
        self.process.wait(60)  # or Python complains of a child that nobody waited for, at the end of all tests


def start_marked(
    argv: Sequence[str], output: Path, *, cwd: Path, environment: Mapping[str, str] | None = None, **options: Any
) -> MarkedCommand:
    """Start a command in a session of its own, its output in a file."""
    mark = secrets.token_hex(12)
    with output.open("ab") as file:
        process: subprocess.Popen[str] = subprocess.Popen(
            argv, cwd=cwd, env={**os.environ, **(environment or {}), MARK: mark}, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options,
        )  # fmt: skip
    return MarkedCommand(process, mark, output)


def marked_processes(mark: str) -> dict[int, str]:
    """Command lines of living processes with this mark, by process id."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it is gone, or another user's
            continue
        if state not in ("Z", "X"):
            found[int(folder.name)] = line
    return found
