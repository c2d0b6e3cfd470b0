"""The files that a stage leaves beside its checkpoint: metrics.jsonl line by line, JSON documents whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class MetricsLog:
    """metrics.jsonl, begun anew. Each line is written at once. Use as a context manager."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: nothing is written, as ranks but the first want it."""
        self._file = None if path is None else path.open("w", encoding="utf-8")

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


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Make a file hold a JSON document: whoever looks sees all of it or none."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
