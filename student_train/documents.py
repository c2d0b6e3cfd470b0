"""The files that a stage leaves beside its checkpoint: metrics.jsonl line by line, JSON documents whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class MetricsLog:
    """metrics.jsonl. Each line is written at once. Use as a context manager."""

    def __init__(self, path: Path | None, *, resumed_at: int = 0) -> None:
        """`path` None: nothing is written, as ranks but the first want it.

        `resumed_at`: the steps that are done; lines up to there are kept, and others are dropped.
        """
        self._file = None
        self.kept: list[dict[str, Any]] = []
        if path is not None:
            kept = _lines_until(path, resumed_at)
            self.kept = [json.loads(line) for line in kept]
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()


def _lines_until(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one of a killed run may be torn
    return [line for line in whole if json.loads(line)["step"] <= step]


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Make a file hold a JSON document: whoever looks sees all of it or none."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
