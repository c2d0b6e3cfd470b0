"""Writes metrics.jsonl beside a stage's checkpoint, line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from storage.backends.disk import explain_write_errors
from storage.backends.folder import write_atomically


class MetricsLog:
    """Appends lines to metrics.jsonl, unbuffered. Use as a context manager."""

    def __init__(self, path: Path | None, *, resumed_at: int = 0) -> None:
        """`path`: None writes nothing, for ranks other than the first.

        `resumed_at`: the number of steps that are done; later lines are dropped.
        """
        self._file = None
        self._path = path
        self.kept: list[dict[str, Any]] = []
        if path is not None:
            kept = _read_lines_until(path, resumed_at)
            self.kept = [json.loads(line) for line in kept]
            write_atomically(path, "".join(kept).encode())
            self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line. WriteError if the disk is full; the file then ends with the line before."""
        if self._file is None or self._path is None:
            return
        line = f"{json.dumps(values)}\n".encode()
        with explain_write_errors(self._path, needed_bytes=len(line)):
            end = self._file.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that fills up may take only a part of it
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(end)
                raise


def _read_lines_until(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one of a killed run may be torn
    return [line for line in whole if json.loads(line)["step"] <= step]
