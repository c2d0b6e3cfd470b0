"""How every benchmark prints: a table for people, and with --json one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """What a benchmark found. `metrics` are the numbers that have names."""

    name: str
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def print(self, *, as_json: bool) -> None:
        """The metrics as a table, and as JSON if asked for."""
        width = max(map(len, self.metrics), default=0)
        print(f"\n{self.name} on {machine()}")
        for name, value in self.metrics.items():
            print(f"  {name:<{width}}  {value:.6g}")
        if as_json:
            print(json.dumps({"metrics": self.metrics, "machine": machine(), "details": self.details}))


def wants_json(description: str) -> bool:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args().json


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows in columns of equal width, numbers as they are spelt."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def machine() -> str:
    """Processor and number of cores."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"
